"""The measures that EasyEdit's scripts call by themselves."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from ...evaluation.functional import fluency


def summary_metrics(all_metrics: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Write the means of what `BaseEditor.edit` returned to standard output, and return them; no file is written.

    Returns:
        ``pre`` and ``post``, each name → mean over the requests that have it; sections by axis.
    """
    cases = [all_metrics] if isinstance(all_metrics, Mapping) else list(all_metrics)
    means: dict[str, Any] = {}
    for half in ("pre", "post"):
        found = [case.get(half) or {} for case in cases]
        means[half] = _means(found)
        for section in ("locality", "portability"):
            if inner := _means([scores.get(section) or {} for scores in found]):
                means[half][section] = inner
    sys.stdout.write(f"Metrics Summary: {json.dumps(means, ensure_ascii=False)}\n")  # to show them is what it is for
    return means


def n_gram_entropy(gen_texts: Iterable[str], agg: str = "arith") -> float:
    """Mean n-gram entropy of texts, 0 where none has three words; ``agg`` is taken for ``"arith"``."""
    return float(fluency(list(gen_texts))["ngram_entropy"] or 0.0)


def test_generation_quality(
    model: Any, tok: Any, prefixes: Sequence[str], max_out_len: int = 100, vanilla_generation: bool = False
) -> dict[str, Any]:
    """Fluency of greedy continuations of up to ``max_out_len`` new tokens.

    Returns:
        ``ngram_entropy`` (0 where no text has three words) and ``text``, prefix and continuation each.
    """
    texts = []
    for prefix in prefixes:
        tokens = tok(prefix, return_tensors="pt").to(model.device)
        texts += tok.batch_decode(model.generate(**tokens, max_new_tokens=max_out_len, do_sample=False), True)
    return {"ngram_entropy": n_gram_entropy(texts), "text": texts}


test_generation_quality.__test__ = False  # type: ignore[attr-defined]  # the name is EasyEdit's; pytest leaves it alone


def _means(scores: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean of each name's numbers, a list of them counting as its mean; names without numbers are left out."""
    values: dict[str, list[float]] = {}
    for one in scores:
        for name, value in one.items():
            numbers = value if isinstance(value, list) else [value]
            if numbers and all(isinstance(n, (int, float)) for n in numbers):
                values.setdefault(name, []).append(fmean(numbers))
    return {name: fmean(found) for name, found in values.items()}

"""The measures that EasyEdit's scripts call by themselves."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from ...data.easyedit import from_easyedit_requests
from ...errors import EvaluationError
from ...evaluation import generate_answers, score_pairs
from ...evaluation.functional import fluency, prefix_share
from ...evaluation.protocols.base import standard_questions


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


def test_prediction_acc(
    model: Any,
    tok: Any,
    hparams: Any,
    prompts: str | Sequence[str],
    targets: str | Sequence[str],
    device: Any = None,
    locality: bool = False,
    vanilla_generation: bool = False,
    **other: Any,
) -> list[Any]:
    """The share of right tokens of each target behind its prompt; ``locality``: the tokens themselves.

    Args:
        model: as it is now.
        tok: its tokenizer.
        hparams: no meaning.
        prompts: one text or several.
        targets: as many.
        device: no meaning.
        locality: return the most probable ids.
        vanilla_generation: of what the model writes; otherwise teacher forced.
        other: no meaning.

    Raises:
        EvaluationError: if a pair cannot be scored, or there are not as many targets as prompts.
    """
    sides = [[texts] if isinstance(texts, str) else list(texts) for texts in (prompts, targets)]
    if len(sides[0]) != len(sides[1]):
        raise EvaluationError(f"{len(sides[0])} prompts and {len(sides[1])} targets do not match")
    scores = score_pairs(model, tok, list(zip(*sides, strict=True)))
    if vanilla_generation:
        length = max(len(score.target_ids) for score in scores)
        written = [answer.ids for answer in generate_answers(model, tok, sides[0], length, cut_at_newline=False)]
        if locality:
            return [list(ids[: len(score.target_ids)]) for ids, score in zip(written, scores, strict=True)]
        return [prefix_share(ids, score.target_ids) for ids, score in zip(written, scores, strict=True)]
    return [list(score.pred_ids) if locality else score.token_acc for score in scores]


test_prediction_acc.__test__ = False  # type: ignore[attr-defined]


def compute_edit_quality(
    model: Any,
    model_name: Any,
    hparams: Any,
    tok: Any,
    record: Mapping[str, Any],
    device: Any = None,
    eval_metric: str = "token_em",
    test_generation: bool = False,
) -> dict[str, Any]:
    """Token accuracies of one of EasyEdit's request dicts on a model as it is now.

    Args:
        model: edited or not.
        model_name: no meaning.
        hparams: no meaning.
        tok: its tokenizer.
        record: the request.
        device: no meaning.
        eval_metric: no meaning; `BaseEditor.edit` measures perplexities.
        test_generation: measure fluency too.

    Returns:
        ``rewrite_acc``, ``rephrase_acc``, ``portability`` by axis, ``locality`` by axis as the most probable ids
        (``…_output``), to be compared before and after an edit.
    """
    (request,) = from_easyedit_requests([record])
    row: dict[str, Any] = {"locality": {}, "portability": {}}
    for question in standard_questions(request):
        answers = [alias for group in question.groups for alias in group][:1]
        if not answers:
            continue
        near = question.section == "locality"
        value = test_prediction_acc(model, tok, hparams, question.prompt, answers, locality=near)
        if question.axis is None:
            row.setdefault(f"{question.section}_acc", []).extend(value)
        else:
            name = f"{question.axis}_{'output' if near else 'acc'}"
            row[question.section].setdefault(name, []).extend(value)
    if test_generation:
        row["fluency"] = test_generation_quality(model, tok, [request.filled_prompt])
    return row


def _means(scores: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean of each name's numbers, a list of them counting as its mean; names without numbers are left out."""
    values: dict[str, list[float]] = {}
    for one in scores:
        for name, value in one.items():
            numbers = value if isinstance(value, list) else [value]
            if numbers and all(isinstance(n, (int, float)) for n in numbers):
                values.setdefault(name, []).append(fmean(numbers))
    return {name: fmean(found) for name, found in values.items()}

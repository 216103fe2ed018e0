"""The metrics as modules of Hugging Face's `evaluate`: thin wrappers around `functional`, made when asked for.

`load_metric(name)` gives an ``evaluate.Metric``, with ``compute``, ``add``, ``add_batch`` and `evaluate.combine`.
Nothing else in the library needs `evaluate`, which is an optional package.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import EvaluationError, nearest, require_extra
from . import likelihoods, metrics, texts

Compute = Callable[[str, dict[str, Any]], dict[str, Any]]
"""Config name and columns → numbers."""


def _accuracy(config: str, columns: dict[str, Any]) -> dict[str, Any]:
    predictions, references = columns["predictions"], columns["references"]
    if config == "token":
        scores = [metrics.token_accuracy(p, r) for p, r in zip(predictions, references, strict=True)]
    else:
        scorer = metrics.ANSWER_SCORERS[config]
        scores = [
            max((scorer(p, answer) for answer in r), default=0.0) for p, r in zip(predictions, references, strict=True)
        ]
    return {f"{config}_acc": metrics.mean(scores), "n": len(scores)}


def _locality(config: str, columns: dict[str, Any]) -> dict[str, Any]:
    pairs = zip(columns["references"], columns["predictions"], strict=True)
    compare = metrics.agreement if config == "token" else metrics.text_agreement
    scores = [compare(before, after) for before, after in pairs]
    return {"locality_agreement": metrics.mean(scores), "n": len(scores)}


def _counterfact(config: str, columns: dict[str, Any]) -> dict[str, Any]:
    cases: dict[Any, dict[str, list[tuple[float, float]]]] = {}
    rows = zip(columns["case_id"], columns["kind"], columns["nll_new"], columns["nll_true"], strict=True)
    for case, kind, new, true in rows:
        cases.setdefault(case, {}).setdefault(kind, []).append((new, true))
    unknown = {k for case in cases.values() for k in case} - set(likelihoods.COUNTERFACT_NAMES)
    if unknown:
        raise EvaluationError(f"unknown kind {sorted(unknown)[0]!r}; use {', '.join(likelihoods.COUNTERFACT_NAMES)}")
    return {**likelihoods.counterfact_scores(list(cases.values())), "n": len(cases)}


def _fluency(config: str, columns: dict[str, Any]) -> dict[str, Any]:
    return dict(texts.fluency(columns["predictions"], config))


def _perplexity(config: str, columns: dict[str, Any]) -> dict[str, Any]:
    nlls, counts = columns["nll"], columns["n_tokens"]
    scored = [nll for nll, n in zip(nlls, counts, strict=True) if n]
    return {
        "perplexity_pooled": likelihoods.pooled_perplexity(nlls, counts),
        "perplexity_mean": likelihoods.mean_perplexity(scored),
        "n": len(scored),
    }


def _sentiment(config: str, columns: dict[str, Any]) -> dict[str, Any]:
    rows = zip(columns["wanted"], columns["unwanted"], columns["wanted_before"], strict=True)
    scores = [likelihoods.edit_success(*row) for row in rows]
    return {"edit_success": metrics.mean(scores), "n": len(scores)}


def _text_overlap(config: str, columns: dict[str, Any]) -> dict[str, Any]:
    pairs = list(zip(columns["predictions"], columns["references"], strict=True))
    if config == "bleu":
        return {"bleu": metrics.mean(texts.bleu(p, r) for p, r in pairs), "n": len(pairs)}
    best = [max((texts.rouge(p, answer) for answer in r), key=lambda s: s["rougeL"]["f"]) for p, r in pairs]
    numbers: dict[str, Any] = {}
    for name in ("rouge1", "rouge2", "rougeL"):
        numbers[name] = metrics.mean(scores[name]["f"] for scores in best)
        numbers[f"{name}_recall"] = metrics.mean(scores[name]["recall"] for scores in best)
    return {**numbers, "n": len(pairs)}


_STRINGS, _IDS = ["string"], ["int64"]
_MODULES: dict[str, tuple[str, Compute, dict[str, dict[str, Any]]]] = {
    "kedit_accuracy": (
        "Whether answers are right: token ids, or texts (`exact`, `contains`, `f1`) with several references.",
        _accuracy,
        {
            "token": {"predictions": _IDS, "references": _IDS},
            "exact": {"predictions": "string", "references": _STRINGS},
            "contains": {"predictions": "string", "references": _STRINGS},
            "f1": {"predictions": "string", "references": _STRINGS},
        },
    ),
    "kedit_locality": (
        "How far an edited model (predictions) says what the unedited one said (references): token ids, or texts.",
        _locality,
        {
            "token": {"predictions": _IDS, "references": _IDS},
            "text": {"predictions": "string", "references": "string"},
        },
    ),
    "kedit_counterfact": (
        "ES, PS, NS, EM, PM, NM and S from negative log-likelihoods of the new and the true answer.",
        _counterfact,
        {"default": {"case_id": "int64", "kind": "string", "nll_new": "float64", "nll_true": "float64"}},
    ),
    "kedit_fluency": (
        "Weighted entropy of bigrams and trigrams, in bits.",
        _fluency,
        {name: {"predictions": "string"} for name in ("treebank", "words", "char")},
    ),
    "kedit_perplexity": (
        "Pooled and mean perplexity from negative log-likelihoods per token and numbers of tokens.",
        _perplexity,
        {"default": {"nll": "float64", "n_tokens": "int64"}},
    ),
    "kedit_sentiment": (
        "Edit success of sentiment and personality edits from mean token log-probabilities.",
        _sentiment,
        {"default": {"wanted": "float64", "unwanted": "float64", "wanted_before": "float64"}},
    ),
    "kedit_text_overlap": (
        "ROUGE-1, -2 and -L (F and recall), or BLEU.",
        _text_overlap,
        {name: {"predictions": "string", "references": _STRINGS} for name in ("rouge", "bleu")},
    ),
}


def list_metrics() -> list[str]:
    """Names that `load_metric` knows."""
    return sorted(_MODULES)


def load_metric(name: str, config_name: str | None = None, prefix: str | None = None, **kwargs: Any) -> Any:
    """Make an ``evaluate.Metric``.

    Args:
        name: see `list_metrics`; the prefix ``kedit_`` may be left out.
        config_name: variant of the metric; default: its first.
        prefix: put before the names of its numbers (with an underscore).
        kwargs: for ``evaluate.Metric``, such as ``cache_dir`` or ``keep_in_memory``.

    Raises:
        EvaluationError: for an unknown name or variant; the nearest known one is given.
        MissingExtraError: if `evaluate` is not installed.
    """
    full = name if name in _MODULES else f"kedit_{name}"
    if full not in _MODULES:
        raise EvaluationError(f"unknown metric {name!r}.{nearest(name, _MODULES)} Known: {', '.join(list_metrics())}.")
    description, compute, variants = _MODULES[full]
    config = next(iter(variants)) if config_name is None else config_name
    if config not in variants:
        raise EvaluationError(
            f"{full} has no variant {config!r}.{nearest(str(config), variants)} It has: {', '.join(variants)}."
        )
    try:
        evaluate: Any = importlib.import_module("evaluate")
    except ImportError as error:
        raise require_extra("evaluate", "eval", "load_metric") from error
    return _metric_class(evaluate, full, description, compute, variants)(config_name=config, prefix=prefix, **kwargs)


def _metric_class(
    evaluate: Any, name: str, description: str, compute: Compute, variants: Mapping[str, Mapping[str, Any]]
) -> Any:
    import datasets

    def feature(kind: str | Sequence[str]) -> Any:
        return datasets.Value(kind) if isinstance(kind, str) else datasets.List(datasets.Value(kind[0]))

    def __init__(self: Any, *args: Any, prefix: str | None = None, **kwargs: Any) -> None:
        self.prefix = prefix  # before super(), which calls _info()
        evaluate.Metric.__init__(self, *args, **kwargs)

    def _info(self: Any) -> Any:
        columns = variants[self.config_name]
        return evaluate.MetricInfo(
            description=description,
            citation="",
            inputs_description=", ".join(columns),
            features=datasets.Features({column: feature(kind) for column, kind in columns.items()}),
        )

    def _compute(self: Any, **columns: Any) -> dict[str, Any]:
        # `combine` passes the columns of the other modules, too.
        own = {column: columns[column] for column in variants[self.config_name]}
        numbers = compute(self.config_name, own)
        return {f"{self.prefix}_{k}": v for k, v in numbers.items()} if self.prefix else numbers

    title = "".join(word.capitalize() for word in name.split("_"))
    body = {"__init__": __init__, "_info": _info, "_compute": _compute, "__doc__": description}
    return type(title, (evaluate.Metric,), body | {"__module__": __name__})

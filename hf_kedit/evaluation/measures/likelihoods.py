"""Metrics on log-probabilities: CounterFact scores, perplexity, edit success and drawdown, divergence. No model.

All negative log-likelihoods are in nats and, unless said otherwise, means per target token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch

from ...errors import EvaluationError, shown
from . import metrics

PairKind = Literal["rewrite", "paraphrase", "neighborhood"]
COUNTERFACT_NAMES: dict[str, tuple[str, str]] = {
    "rewrite": ("ES", "EM"),
    "paraphrase": ("PS", "PM"),
    "neighborhood": ("NS", "NM"),
}
"""Kind of prompt → names of its success and its magnitude."""


# ---------------------------------------------------------------------- CounterFact


def counterfact_pair(nll_new: float, nll_true: float, kind: PairKind = "rewrite") -> tuple[float, float]:
    """Success and magnitude of one prompt (Meng et al. 2022).

    Success is 1.0 if the target that should be preferred is strictly more probable: the new one on rewrite and
    paraphrase prompts, the true one on neighbourhood prompts; a tie is a failure. The magnitude is the difference of
    the geometric-mean token probabilities ``e^{−nll}``, preferred minus other.

    Raises:
        EvaluationError: for an unknown kind.
    """
    if kind not in COUNTERFACT_NAMES:
        raise EvaluationError(f"unknown kind {shown(kind)}; use one of {', '.join(COUNTERFACT_NAMES)}")
    wanted, other = (nll_true, nll_new) if kind == "neighborhood" else (nll_new, nll_true)
    return float(wanted < other), _probability(wanted) - _probability(other)


def _probability(nll: float) -> float:
    """``e^{−nll}``; 0.0 where a model whose logits are not finite gives no probability at all."""
    return 0.0 if math.isnan(nll) else math.exp(-nll)


def harmonic_score(values: Iterable[float]) -> float:
    """Harmonic mean; 0.0 if any value is 0 (the overall score S of ES, PS and NS).

    Raises:
        EvaluationError: if there is nothing to average.
    """
    items = list(values)
    if not items:
        raise EvaluationError("the harmonic mean of nothing does not exist")
    return 0.0 if any(v <= 0 for v in items) else len(items) / sum(1 / v for v in items)


def counterfact_scores(cases: Sequence[Mapping[str, Sequence[tuple[float, float]]]]) -> dict[str, float]:
    """ES, PS, NS, EM, PM, NM, and S where all three successes exist.

    Per case the mean over the prompts of a kind, then the mean over the cases that have any; S is the harmonic mean
    of the *means*.

    Args:
        cases: for each case, kind (``rewrite``, ``paraphrase``, ``neighborhood``) → pairs of the mean negative
            log-likelihoods (new target, true target), one per prompt.

    Returns:
        Fractions of 1; what no case has is absent.
    """
    result: dict[str, float] = {}
    for kind, names in COUNTERFACT_NAMES.items():
        pairs = [[counterfact_pair(new, true, kind) for new, true in case.get(kind, ())] for case in cases]  # type: ignore[arg-type]
        for place, name in enumerate(names):
            value, _ = metrics.dataset_mean([pair[place] for pair in case] for case in pairs)
            if value is not None:
                result[name] = value
    if all(name in result for name in ("ES", "PS", "NS")):
        result["S"] = harmonic_score(result[name] for name in ("ES", "PS", "NS"))
    return result


# ---------------------------------------------------------------------- perplexity


def pooled_perplexity(nlls: Sequence[float], counts: Sequence[int]) -> float | None:
    """Corpus perplexity: ``exp`` of the mean over all scored tokens.

    Args:
        nlls: mean negative log-likelihood per token of each text.
        counts: scored tokens of each text (a text of N tokens has N−1, its first one cannot be predicted).
    """
    total = sum(counts)
    if not total:
        return None
    return _exp(sum(nll * n for nll, n in zip(nlls, counts, strict=True) if n) / total)


def mean_perplexity(nlls: Sequence[float]) -> float | None:
    """Mean of the perplexities of the single texts. Not comparable with `pooled_perplexity`."""
    return metrics.mean(_exp(nll) for nll in nlls)


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:  # a collapsed model
        return math.inf


def surprise_rate(nlls: Sequence[float], probability: float = 0.8) -> float | None:
    """Share of tokens that the model gives more than this probability (``ood_ppl`` in EasyEdit).

    Divided by the real number of tokens, not by a padded length.
    """
    return metrics.mean(float(nll < -math.log(probability)) for nll in nlls)


# ---------------------------------------------------------------------- sentiment and personality


def edit_success(wanted: float, unwanted: float, wanted_before: float) -> float:
    """ES of sentiment and personality edits: ``σ(a − b) · min(1, e^{a − c})`` (Mitchell et al. 2022).

    Args:
        wanted: a, mean token log-probability of texts with the wanted attitude under the edited model.
        unwanted: b, of texts with the opposite one.
        wanted_before: c, of the wanted texts under the *unedited* model.
    """
    gap = wanted - unwanted
    sigmoid = 1 / (1 + math.exp(-gap)) if gap >= 0 else math.exp(gap) / (1 + math.exp(gap))
    return sigmoid * math.exp(min(0.0, wanted - wanted_before))


def divergence(
    logits_before: torch.Tensor, logits_after: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """KL(before ‖ after) of next-token distributions, in nats.

    Args:
        logits_before: ``[..., vocab]`` of the unedited model.
        logits_after: of the edited model, same shape and positions.
        mask: ``[...]``, true where a position counts; without it every position does.

    Returns:
        Mean over the positions that count, a scalar in float32.

    Raises:
        EvaluationError: if the shapes differ or no position counts.
    """
    if logits_before.shape != logits_after.shape:
        raise EvaluationError(f"cannot compare logits of {tuple(logits_before.shape)} and {tuple(logits_after.shape)}")
    before = logits_before.float().log_softmax(-1)
    after = logits_after.to(before.device).float().log_softmax(-1)
    each = (before.exp() * (before - after)).sum(-1)
    if mask is None:
        mask = torch.ones_like(each, dtype=torch.bool)
    if not bool(mask.any()):
        raise EvaluationError("the mask leaves no position to compare")
    return each[mask.to(each.device).bool()].mean().clamp_min(0.0)


def drawdown(before: float, after: float) -> float:
    """How much accuracy an edit costs: before minus after."""
    return before - after

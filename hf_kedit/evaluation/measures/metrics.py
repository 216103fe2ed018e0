"""Metrics as pure functions on scores: no model, no tokenizer, no state.

Reliability, generalisation, portability and locality of one probe, and the aggregation of probes to axes, cases and
data sets. All rates are fractions in [0, 1]; what does not exist is absent (``None``), never 0.
"""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ...errors import EvaluationError, check_choice
from ...text.scripts import is_cjk

_ARTICLES = {"a", "an", "the"}


# ---------------------------------------------------------------------- one probe


def token_accuracy(predicted: Sequence[int], target: Sequence[int]) -> float:
    """Share of positions at which two equally long id sequences agree.

    Raises:
        EvaluationError: if they are empty or differ in length.
    """
    if len(predicted) != len(target) or not target:
        raise EvaluationError(f"cannot compare {len(predicted)} predicted with {len(target)} target tokens")
    return sum(a == b for a, b in zip(predicted, target, strict=True)) / len(target)


def agreement(before: Sequence[int], after: Sequence[int]) -> float:
    """Share of positions where the edited model predicts what the unedited one did (locality as invariance).

    Both are argmax ids at the same target positions; whether the unedited model was right plays no role.
    """
    return token_accuracy(after, before)


def text_agreement(before: str, after: str) -> float:
    """1.0 if two generated answers are the same after normalisation, else 0.0."""
    return float(_words(before) == _words(after))


def prefix_share(predicted: Sequence[int], target: Sequence[int]) -> float:
    """Share of the target's tokens that a continuation has at the same place; one that ends early lacks the rest."""
    return sum(p == t for p, t in zip(predicted, target, strict=False)) / len(target) if target else 0.0


def prefix_agreement(before: Sequence[int], after: Sequence[int], count: int) -> float:
    """Share of the first ``count`` generated tokens that are the same; an answer that ended counts as it ended."""
    old, new = list(before[:count]), list(after[:count])
    length = max(len(old), len(new))
    return sum(a == b for a, b in zip(old, new, strict=False)) / length if length else 1.0


def best_alias(scores: Iterable[float]) -> float:
    """Score of a probe with several acceptable answers: the best one (teacher forcing).

    Raises:
        EvaluationError: if there is none.
    """
    values = list(scores)
    if not values:
        raise EvaluationError("a probe without answers has no score")
    return max(values)


def answer_score(
    prediction: str,
    groups: Sequence[Sequence[str]],
    match: str = "any",
    scorer: str | Callable[[str, str], float] = "contains",
) -> float:
    """Score of a generated answer against groups of aliases.

    Args:
        prediction: the generated text; an empty one scores 0.
        groups: acceptable answers, each group the aliases of one value.
        match: ``any``: the best alias of all groups; ``all``: every group must be hit (the worst group counts).
        scorer: ``exact``, ``contains``, ``f1``, or a function of prediction and answer with values in [0, 1].

    Raises:
        EvaluationError: for an unknown scorer, or if there is no answer.
    """
    score = answer_scorer(scorer)
    per_group = [max(score(prediction, alias) for alias in group) for group in groups if group]
    if not per_group:
        raise EvaluationError("a probe without answers has no score")
    return min(per_group) if match == "all" else max(per_group)


# ---------------------------------------------------------------------- comparing texts


def normalise_answer(text: str) -> str:
    """Lower-case, drop punctuation and the articles a/an/the, collapse white space (as for SQuAD)."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation and unicodedata.category(c)[0] != "P")
    return " ".join(word for word in kept.split() if word not in _ARTICLES)


def _words(text: str) -> list[str]:
    """Words to compare; where a script has no spaces, its characters. Nothing left of it: the bare text."""
    normal = normalise_answer(text)
    if not normal:  # "The" or ")": nothing survives, and an empty answer must not match everything
        return text.lower().split()
    return "".join(f" {c} " if is_cjk(c) else c for c in normal).split()


def exact(prediction: str, answer: str) -> float:
    """1.0 if both are equal after normalisation."""
    words = _words(answer)
    return float(bool(words) and _words(prediction) == words)


def contains(prediction: str, answer: str) -> float:
    """1.0 if the answer occurs in the prediction as a run of whole words, after normalisation."""
    words, text = _words(answer), _words(prediction)
    return float(bool(words) and any(text[i : i + len(words)] == words for i in range(len(text) - len(words) + 1)))


def f1(prediction: str, answer: str) -> float:
    """Harmonic mean of the precision and recall of words, after normalisation."""
    words, text = _words(answer), _words(prediction)
    left = list(words)
    common = 0
    for word in text:
        if word in left:
            left.remove(word)
            common += 1
    return 2 * common / (len(words) + len(text)) if common else 0.0


ANSWER_SCORERS: dict[str, Callable[[str, str], float]] = {"exact": exact, "contains": contains, "f1": f1}


def answer_scorer(scorer: str | Callable[[str, str], float]) -> Callable[[str, str], float]:
    """Return the scorer of this name (a function is returned as it is).

    Raises:
        EvaluationError: naming the nearest scorer.
    """
    if callable(scorer):
        return scorer
    check_choice("scorer", scorer, ANSWER_SCORERS)
    return ANSWER_SCORERS[scorer]


# ---------------------------------------------------------------------- aggregation


def mean(values: Iterable[float]) -> float | None:
    """Arithmetic mean, ``None`` if there is nothing to average."""
    items = list(values)
    return sum(items) / len(items) if items else None


def case_mean(scores: Sequence[float] | Mapping[Any, Sequence[float]] | None) -> float | None:
    """One case's value of a section: mean over the probes of an axis, then over the axes that have any.

    Args:
        scores: the probes' scores, as a list (a section without axes) or by axis.
    """
    if scores is None:
        return None
    if not isinstance(scores, Mapping):
        return mean(scores)
    axes = [mean(values) for values in scores.values()]
    return mean(value for value in axes if value is not None)


def dataset_mean(
    cases: Iterable[Sequence[float] | Mapping[Any, Sequence[float]] | None],
) -> tuple[float | None, int]:
    """Mean over the cases that have the section at all, and how many these are."""
    values = [value for value in map(case_mean, cases) if value is not None]
    return mean(values), len(values)


def axis_means(cases: Iterable[Mapping[Any, Sequence[float]] | None]) -> dict[str, tuple[float, int]]:
    """For each axis: mean over the cases that have it (of the mean over its probes), and how many these are."""
    by_axis: dict[str, list[float]] = {}
    for case in cases:
        for axis, scores in (case or {}).items():
            value = mean(scores)
            if value is not None:
                by_axis.setdefault(axis, []).append(value)
    return {axis: (sum(values) / len(values), len(values)) for axis, values in by_axis.items()}

"""What may be said of means: how sure they are, which run is best and worst, and which axes an edit destroyed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..measures import metrics
from ..measures.catalogue import Metric, metric_of, metrics_of
from ..measures.intervals import bootstrap, wilson
from .case_result import CaseResult, Half
from .summaries import NAMES, AxisKey

_KEPT = 0.5
"""Share of an axis that must be left for it not to count as destroyed."""
Place = Literal["best", "worst"]


@dataclass(frozen=True)
class Estimate:
    """What a mean rests on.

    Args:
        n: edits that have it.
        interval: at 95 percent; ``None`` where there are too few edits for one.
    """

    n: int
    interval: tuple[float, float] | None


def estimates(results: Sequence[CaseResult]) -> dict[AxisKey, Estimate]:
    """(Section, name) of each mean after the edits → what it rests on.

    Shares have Wilson's interval; anything else, and what is made of several means, has a bootstrap over the edits.
    """
    halves = [result.post for result in results]
    found: dict[AxisKey, Estimate] = {}
    for section, name in NAMES.items():
        found[("", name)] = _estimate([metrics.case_mean(half.scores.get(section)) for half in halves])
    for section, key in dict.fromkeys((s, k) for half in halves for s, keys in half.numbers.items() for k in keys):
        values = [_number(half, section, key) for half in halves]
        found[(section, key)] = _estimate(values, metric_of(section, key).share)
    for section in dict.fromkeys(section for half in halves for section in half.numbers):
        for key, metric in metrics_of(section).items():
            if metric.combine is not None:
                found[(section, key)] = _combined(halves, section, metric)
    return {key: estimate for key, estimate in found.items() if estimate.n}


def _combined(halves: Sequence[Half], section: str, metric: Metric) -> Estimate:
    """What a combination of means rests on: the cases that have all its parts."""
    rows = [[_number(half, section, part) for part in metric.parts] for half in halves]
    whole = [[value for value in row if value is not None] for row in rows if None not in row]
    combine = metric.combine or sum
    return Estimate(len(whole), bootstrap(whole, lambda means: [combine(row) for row in means]))


def _number(half: Half, section: str, key: str) -> float | None:
    return metrics.case_mean(half.numbers.get(section, {}).get(key))


def _estimate(by_case: Sequence[float | None], shares: bool = True) -> Estimate:
    values = [value for value in by_case if value is not None]
    if shares and values and all(0 <= value <= 1 for value in values):
        return Estimate(len(values), wilson(min(1.0, sum(values) / len(values)), len(values)))
    return Estimate(len(values), bootstrap([[value] for value in values], lambda means: means[:, 0]))


def places(means: Mapping[str, float | None], better: str | None = "higher") -> dict[str, Place]:
    """Label → whether it is the best or the worst, as far as one decimal of a percentage shows; all that are equal.

    Args:
        means: label → value.
        better: ``higher`` or ``lower``; ``None``: no value is better than another.
    """
    shown = {label: round(value, 3) for label, value in means.items() if value is not None and value == value}
    top, bottom = max(shown.values(), default=0.0), min(shown.values(), default=0.0)
    if top == bottom or better is None:
        return {}
    if better == "lower":
        top, bottom = bottom, top
    return {label: "best" if value == top else "worst" for label, value in shown.items() if value in (top, bottom)}


def destroyed(before: Mapping[str, Mapping[str, float]], after: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Axes of the locality of which less than half is left.

    Args:
        before: section → axis → mean before the edits; agreement with itself is 1 and need not be given.
        after: the same after them.
    """
    lost = []
    for section in ("locality", "locality_accuracy"):
        for axis, value in after.get(section, {}).items():
            old = 1.0 if section == "locality" else before.get(section, {}).get(axis, 0.0)
            if value < _KEPT * old:
                lost.append(axis)
    return list(dict.fromkeys(lost))


def destroyed_by(result: CaseResult) -> list[str]:
    """`destroyed` for the probes of one case."""

    def means(half: Half) -> dict[str, Any]:
        return {
            section: {str(axis): mean for axis, (mean, _) in metrics.axis_means([axes]).items()}
            for section, axes in half.scores.items()
        }

    return destroyed(means(result.pre), means(result.post))

"""What may be said of means: how sure they are, which run is best and worst, and which axes an edit destroyed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..measures import metrics
from ..measures.intervals import bootstrap, wilson
from ..measures.likelihoods import harmonic_score
from .case_result import CaseResult, Half
from .summaries import NAMES, SUCCESSES, AxisKey

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

    Shares have Wilson's interval; entropies, magnitudes and the harmonic mean of CounterFact's successes have a
    bootstrap over the edits.
    """
    halves = [result.post for result in results]
    found: dict[AxisKey, Estimate] = {}
    for section, name in NAMES.items():
        found[("", name)] = _estimate([metrics.case_mean(half.scores.get(section)) for half in halves])
    for section, key in dict.fromkeys((s, k) for half in halves for s, keys in half.numbers.items() for k in keys):
        found[(section, key)] = _estimate([_number(half, section, key) for half in halves], key in SUCCESSES)
    rows = [[_number(half, "counterfact", name) for name in SUCCESSES] for half in halves]
    whole = [[value for value in row if value is not None] for row in rows if None not in row]
    found[("counterfact", "S")] = Estimate(
        len(whole), bootstrap(whole, lambda means: [harmonic_score(row) for row in means])
    )
    return {key: estimate for key, estimate in found.items() if estimate.n}


def _number(half: Half, section: str, key: str) -> float | None:
    return metrics.case_mean(half.numbers.get(section, {}).get(key))


def _estimate(by_case: Sequence[float | None], shares: bool = True) -> Estimate:
    values = [value for value in by_case if value is not None]
    if shares and values and all(0 <= value <= 1 for value in values):
        return Estimate(len(values), wilson(min(1.0, sum(values) / len(values)), len(values)))
    return Estimate(len(values), bootstrap([[value] for value in values], lambda means: means[:, 0]))


def places(means: Mapping[str, float | None]) -> dict[str, Place]:
    """Label → whether it is the best or the worst, as far as one decimal of a percentage shows; all that are equal."""
    shown = {label: round(value, 3) for label, value in means.items() if value is not None and value == value}
    top, bottom = max(shown.values(), default=0.0), min(shown.values(), default=0.0)
    if top == bottom:
        return {}
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

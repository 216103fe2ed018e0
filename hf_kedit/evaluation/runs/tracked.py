"""What an evaluation tells trackers while it runs: means over the number of edits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from statistics import fmean
from typing import Any

from ...tracking import Tracking, edit_numbers, last_loss
from ..report.case_result import CaseResult
from .plan import StepResult


class EvaluationTracking:
    """Tells trackers of every measurement of a run.

    The step is the number of edits so far. Names are ``<when>/<protocol>/<section>[/<axis>]`` for the mean after the
    edits, the same behind ``pre/`` for the mean before them, ``edit/…`` for what the edits took, and ``model/…`` for
    the state of the model as a whole (perplexity, drift).

    Args:
        tracking: who is told.
        after_step: the caller's own, which is called first.
    """

    def __init__(self, tracking: Tracking, after_step: Callable[[StepResult], None] | None):
        self._tracking, self._after_step = tracking, after_step
        self._seen: set[int] = set()

    def __enter__(self) -> EvaluationTracking:
        self._tracking.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._tracking.__exit__(*error)

    def after_step(self, step: StepResult) -> None:
        """Called by the run with what was measured."""
        if self._after_step is not None:
            self._after_step(step)
        if not self._tracking.is_on:
            return
        new = {r.number: r for r in step.results if r.number not in self._seen}
        self._seen |= set(new)
        values: dict[str, list[float]] = defaultdict(list)
        for result in step.results:
            for name, numbers in _means(result):
                values[name] += numbers
        for result in new.values():
            diagnostics = ((result.cost.edit or {}) if result.cost is not None else {}).get("diagnostics") or {}
            for name, value in {"edit/loss": last_loss(diagnostics), **edit_numbers(diagnostics)}.items():
                if value is not None:
                    values[name].append(value)
        means: dict[str, Any] = {name: fmean(numbers) for name, numbers in values.items() if numbers}
        point = step.checkpoint or {}
        means |= {f"model/{name}": value for name, value in point.items() if name != "n_edits"}
        means |= {f"model/drift/{name}": value for name, value in (point.get("drift") or {}).items()}
        self._tracking.log(means, len(self._seen))


def _means(result: CaseResult) -> list[tuple[str, list[float]]]:
    """All numbers of a case by name, before and after its edit."""
    when = result.when.replace(" ", "_") or "final"
    found = []
    for place, half in ((f"pre/{result.protocol}", result.pre), (f"{when}/{result.protocol}", result.post)):
        for section, axes in half.scores.items():
            found += [("/".join(filter(None, (place, section, axis))), scores) for axis, scores in axes.items()]
        for section, numbers in half.numbers.items():
            found += [(f"{place}/{section}/{name}", list(scores)) for name, scores in numbers.items()]
    return found

"""Trials: facts are edited with some settings, one after the other, measured, and undone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..anatomy.switching import Switch
from ..config import EditConfig
from ..evaluation import evaluate_edits
from ..evaluation.runs.cache import PreEditCache
from ..logging import get_verbosity, progress_bar, set_verbosity
from ..requests import EditRequest
from .logbook import Logbook, digest_of
from .scores import FactFigures, figures_of, figures_of_failure, tuning_protocols

if TYPE_CHECKING:
    from ..evaluation.runs.plan import StepResult
    from ..model import EditableModel


class OutOfTime(Exception):
    """The time for this part of a search is over."""


class quiet_trials(Switch[None]):
    """The library says errors only: what candidates do badly is measured. At the level of debugging, everything."""

    def change(self) -> None:
        """Note the level."""
        self._level = get_verbosity()
        set_verbosity(max(self._level, logging.ERROR) if self._level > logging.DEBUG else self._level)

    def put_back(self, failed: bool) -> None:
        """As it was."""
        set_verbosity(self._level)


class Stopwatch:
    """The bar of a search, and its budget.

    Args:
        minutes: for everything; ``None``: as long as it takes.
        clock: seconds from some moment on.
        show: show a bar.
        title: of the bar.
    """

    def __init__(self, minutes: float | None, clock: Callable[[], float], show: bool, title: str):
        self.minutes, self.clock, self.title = minutes, clock, title
        self.began = clock()
        self.bar = progress_bar(None, title, show=show, bar_format="{l_bar}{bar}| {elapsed}<{remaining}")

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return self.clock() - self.began

    def check(self, share: float) -> None:
        """Raise `OutOfTime` once this share of the budget is used up."""
        if self.minutes is not None and self.seconds >= 60 * self.minutes * share:
            raise OutOfTime

    def plan(self, units: float) -> None:
        """How much there is to do after what has been done; one unit is about one edit."""
        self.bar.total = self.bar.n + units
        self.bar.refresh()

    def done(self, units: float = 1.0) -> None:
        """So much was done."""
        self.bar.total = max(self.bar.total or 0, self.bar.n + units)
        self.bar.update(units)

    def say(self, what: str) -> None:
        """What is being done now."""
        self.bar.set_description_str(f"{self.title}: {what}")


class Trials:
    """Figures of facts under settings, measured at most once.

    Args:
        model: without edits; it is as it was after every call, whatever happens.
        logbook: what has been measured.
        watch: bar and budget.
    """

    def __init__(self, model: EditableModel, logbook: Logbook, watch: Stopwatch):
        self.model, self.logbook, self.watch = model, logbook, watch
        self.protocols = tuning_protocols()
        self._asked = [p.settings() for p in self.protocols]
        self._before = PreEditCache()
        self._measured: set[str] = set()

    @property
    def count(self) -> int:
        """Edits that were measured for this search, now or before it was interrupted."""
        return len(self._measured)

    def measure(
        self, config: EditConfig, facts: Sequence[EditRequest], *, share: float, about: Any = None
    ) -> list[FactFigures]:
        """The figures of every fact, edited alone.

        Args:
            config: complete settings.
            facts: to edit, in order.
            share: of the budget, after which no further edit is begun.
            about: what is tried, for people who read the logbook.

        Raises:
            OutOfTime: with what was measured kept in the logbook.
            ConfigError, UnsupportedModelError: if the model cannot be edited with these settings.
        """
        keys = [self._key(config, fact) for fact in facts]
        todo = [i for i, key in enumerate(keys) if key not in self.logbook]
        self.watch.done(len(facts) - len(todo))
        if todo:
            self.watch.check(share)
            self._edit(config, [facts[i] for i in todo], [keys[i] for i in todo], share, about)
        self._measured |= set(keys)
        return [dict(self.logbook[key]) for key in keys]

    def _edit(
        self, config: EditConfig, facts: Sequence[EditRequest], keys: Sequence[str], share: float, about: Any
    ) -> None:
        left = len(facts)

        def after_step(step: StepResult) -> None:
            nonlocal left
            numbers = {result.number for result in step.results} | {failed["case_id"] for failed in step.failed}
            for number in sorted(numbers):
                own = [result for result in step.results if result.number == number]
                figures = figures_of(own) if own else figures_of_failure(facts[number])
                self.logbook.write(keys[number], figures, settings=about, fact=facts[number].filled_prompt)
            left -= len(numbers)
            self.watch.done(len(numbers))
            if left:
                self.watch.check(share)

        with quiet_trials():
            self.model.set_method(config)
            evaluate_edits(
                self.model,
                [fact.with_id(f"tuning-{i}") for i, fact in enumerate(facts)],
                protocol=self.protocols,
                progress=False,
                on_error="skip",
                cache=self._before,
                after_step=after_step,
            )

    def _key(self, config: EditConfig, fact: EditRequest) -> str:
        return digest_of("edit", config.to_dict(), fact.to_dict(), self._asked)

"""What edits and evaluations tell TensorBoard, Weights & Biases, trackio and others: ``report_to=``, as in `Trainer`.

The trackers are accelerate's. Nothing is reported unless somebody asks for it; a tracker that is missing is an error
before anything is changed, and one that fails later costs a warning and its own numbers, never the edit.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from .errors import ConfigError, MissingExtraError, nearest, reason_of, shown
from .journal import EditResult
from .logging import get_logger

logger = get_logger(__name__)
_LAST: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
"""The last step that a tracker was told, which a later call goes on from."""
PROJECT = "hf_kedit"
"""Project of the runs, unless WANDB_PROJECT or TRACKIO_PROJECT names another."""


class Tracking:
    """Trackers that are told numbers while something runs.

    ``with Tracking(...) as tracking:`` finishes, behind the block, those that it has started.

    Args:
        report_to: ``"tensorboard"``, ``"wandb"``, ``"trackio"`` or another tracker that accelerate knows; ``"all"``
            that are installed; ``"none"`` or ``None``; a tracker that was made and started before, which stays open;
            or a list of these.
        kind: of the run (``"edit"``, ``"eval"``), which its name begins with.
        settings: that are stored with it, nested or not.
        folder: for trackers that write to one, unless TENSORBOARD_LOGGING_DIR names another.

    Raises:
        ConfigError: for an unknown tracker.
        MissingExtraError: if its package is not installed.
    """

    def __init__(self, report_to: Any, kind: str, settings: Mapping[str, Any], folder: str | Path = "runs"):
        self._given = _resolve(report_to)
        method = str(settings.get("method") or "")
        self._name = "-".join(filter(None, [kind, method, datetime.now().strftime("%Y%m%d-%H%M%S-%f")]))
        self._settings = _plain(settings) if self._given else {}
        self._folder = os.environ.get("TENSORBOARD_LOGGING_DIR") or str(folder)
        self._open: list[Any] = []
        self._own: list[Any] = []
        self._before: dict[int, int] = {}

    def __enter__(self) -> Tracking:
        for entry in self._given:
            if not isinstance(entry, str):
                self._open.append(entry)
            elif made := self._attempt(entry, self._started, entry):
                self._own.append(made)
                self._open.append(made)
        self._before = {id(tracker): _LAST.get(tracker, 0) for tracker in self._open}
        return self

    def __exit__(self, *_: object) -> None:
        for tracker in self._own:
            self._attempt(tracker.name, tracker.finish)

    @property
    def is_on(self) -> bool:
        """Whether anybody is told."""
        return bool(self._open)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Tell numbers.

        Args:
            values: name → number; what is none, or not finite, is left out.
            step: of this run; the same as before, or a later one.
        """
        numbers = {name: float(value) for name, value in values.items() if _is_number(value)}
        for tracker in list(self._open) if numbers else ():
            _LAST[tracker] = at = self._before[id(tracker)] + step
            if not self._attempt(tracker.name, tracker.log, numbers, step=at):
                self._open.remove(tracker)

    def edits(self, result: EditResult) -> None:
        """Tell what edits took: the loss of every step of every edit, one edit behind the other, and at the last step
        of each its other numbers; then the side effects, if somebody looked for them."""
        if not self.is_on:
            return
        step = 0
        for number, edit in enumerate(result.edits, start=1):
            losses = _losses(edit.diagnostics)
            for loss in losses[:-1]:
                step += 1
                self.log({"edit/loss": loss}, step)
            step += 1
            last = {"edit/loss": losses[-1]} if losses else {}
            self.log({**last, "edit/number": number, **edit_numbers(edit.diagnostics)}, step)
        if result.side_effects is not None:
            counts = {f"side_effects/{row.name}": row.good / row.asked for row in result.side_effects.counts}
            self.log(counts, max(step, 1))

    def _started(self, name: str) -> Any:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # which the trackers' own logger needs
        kind: Any = LOGGER_TYPE_TO_CLASS[name]
        if kind.requires_logging_directory:
            tracker = kind(self._name, self._folder)
        elif name in ("wandb", "trackio"):
            tracker = kind(os.environ.get(f"{name.upper()}_PROJECT") or PROJECT, name=self._name)
        else:
            tracker = kind(self._name)
        tracker.start()
        tracker.store_init_configuration(self._settings)
        return tracker

    def _attempt(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What a call returns, ``True`` for nothing; ``None`` after an error, of which the user is told."""
        try:
            value = function(*args, **kwargs)
        except Exception as error:  # programs of others, and services that may be away
            logger.warning("report_to: %s has failed and is told nothing more: %s", name, reason_of(error))
            return None
        return True if value is None else value


def edit_numbers(diagnostics: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of one edit by the names that trackers see, without its loss."""
    return {f"edit/{name}": value for name, value in diagnostics.items() if name != "loss" and _is_number(value)}


def last_loss(diagnostics: Mapping[str, Any]) -> float | None:
    """The loss that an edit ended with, if its method has one."""
    losses = _losses(diagnostics)
    return losses[-1] if losses else None


def _losses(diagnostics: Mapping[str, Any]) -> list[float]:
    found = diagnostics.get("loss")
    listed: list[Any] = list(found) if isinstance(found, (list, tuple)) else [found]
    return [float(x) for x in listed if _is_number(x)]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _resolve(report_to: Any) -> list[Any]:
    """The names and trackers that are meant, each once, all of them there."""
    wanted = list(report_to) if isinstance(report_to, (list, tuple)) else [report_to]
    wanted = [entry for entry in wanted if entry is not None and entry != "none"]
    if not wanted:
        return []  # without importing what could report
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
    from transformers.integrations import get_available_reporting_integrations

    there = [name for name in get_available_reporting_integrations() if name in LOGGER_TYPE_TO_CLASS]
    found: list[Any] = []
    for entry in wanted:
        if isinstance(entry, str) and entry == "all":
            found += there
        elif isinstance(entry, GeneralTracker):
            found.append(entry)
        elif not isinstance(entry, str) or entry not in LOGGER_TYPE_TO_CLASS:
            known = ["all", "none", *LOGGER_TYPE_TO_CLASS]
            close = nearest(entry, known) if isinstance(entry, str) else ""
            raise ConfigError(f"report_to: unknown tracker {shown(entry)}.{close} Known: {', '.join(known)}.")
        elif entry not in there:
            raise MissingExtraError(f"report_to={entry!r} needs the package '{entry}': pip install {entry}")
        else:
            found.append(entry)
    return [entry for i, entry in enumerate(found) if entry not in found[:i]]


def _plain(settings: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Settings as one mapping of names to texts and numbers, which is what trackers keep."""
    plain: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            plain |= _plain(value, f"{before}{name}.")
        elif isinstance(value, (bool, int, float, str)):
            plain[before + name] = value
        else:
            plain[before + name] = json.dumps(value, default=str)
    return plain

"""What is edited and asked: cases made of requests, cut into units that are edited together, and the plan of a run."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ...data.loading import requests_of
from ...errors import EvaluationError, check_choice, shown
from ...requests import EditRequest
from ...storage.records import read_rows, rows_given
from ..report.case_result import CaseResult

if TYPE_CHECKING:
    from ...model import EditableModel

SEQUENTIAL, SAVED = "sequential", "saved"
Setting = Literal["single", "batch", "sequential", "saved"]
SETTINGS: tuple[Setting, ...] = get_args(Setting)
TIMES = ("immediate", "final")
"""When a sequence may be measured, besides at checkpoints."""


@dataclass(frozen=True)
class Case:
    """One edit of the data set, with its place in it."""

    number: int
    request: EditRequest


@dataclass(frozen=True)
class Step:
    """One measurement of a run.

    Args:
        number: place in the plan; results are filed under it.
        when: ``immediate``, ``final``, or ``at N`` for a checkpoint.
        cases: numbers of the cases that are measured.
        unit: index of the unit after whose edit it happens.
        n_edits: edits in the model by then, if none of them failed.
    """

    number: int
    when: str
    cases: tuple[int, ...]
    unit: int
    n_edits: int


@dataclass
class StepResult:
    """What one measurement brought.

    Args:
        results: one per case and protocol.
        failed: the edits that could not be made, each with ``case_id`` and ``reason``.
        checkpoint: state of the model as a whole, where edits pile up.
    """

    results: list[CaseResult] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)
    checkpoint: dict[str, Any] | None = None


def make_plan(units: Sequence[Sequence[Case]], setting: str, whens: Sequence[str], at: Sequence[int]) -> list[Step]:
    """All measurements of a run, in the order in which they happen.

    A checkpoint happens after the first unit that reaches it; one at the very end is ``final`` where that is measured.
    """
    steps: list[Step] = []
    made: list[int] = []
    total = sum(len(unit) for unit in units)
    waiting = sorted(set(at))
    for index, unit in enumerate(units):
        numbers = tuple(case.number for case in unit)
        made += numbers
        if setting != SEQUENTIAL:
            steps.append(Step(len(steps), whens[-1], numbers, index, len(unit)))
            continue
        if "immediate" in whens:
            steps.append(Step(len(steps), "immediate", numbers, index, len(made)))
        reached = [n for n in waiting if n <= len(made)]
        waiting = waiting[len(reached) :]
        if reached and not (len(made) == total and "final" in whens):
            steps.append(Step(len(steps), f"at {len(made)}", tuple(made), index, len(made)))
    if setting == SEQUENTIAL and "final" in whens:
        steps.append(Step(len(steps), "final", tuple(made), len(units) - 1, total))
    return steps


def parse_shard(shard: str | None, setting: str) -> tuple[int, int]:
    """Turn ``"2/4"`` into ``(2, 4)``; ``None`` into ``(1, 1)``; ``"auto"`` into what torchrun or accelerate says.

    Raises:
        EvaluationError: for anything else, or for a sequential run, whose edits build on each other.
    """
    if shard is None:
        return 1, 1
    if shard == "auto":
        try:
            number, count = int(os.environ.get("RANK", "0")) + 1, int(os.environ.get("WORLD_SIZE", "1"))
        except ValueError as error:
            raise EvaluationError(f"shard='auto' cannot read RANK and WORLD_SIZE: {error}") from error
    else:
        parts = re.fullmatch(r"(\d+)/(\d+)", str(shard))
        if not parts:
            raise EvaluationError(f"shard must look like '2/4' (the second of four parts), not {shown(shard)}")
        number, count = int(parts[1]), int(parts[2])
    if not 1 <= number <= count:
        raise EvaluationError(f"there is no shard {number} of {count}; they are numbered 1 to {count}")
    if count > 1 and setting == SEQUENTIAL:
        raise EvaluationError("a sequential run cannot be cut into shards: each edit builds on the ones before")
    if count > 1 and setting == SAVED:
        raise EvaluationError("saved edits are measured together; there is nothing to cut into shards")
    return number, count


def read_requests(dataset: Any, limit: int | None) -> list[EditRequest]:
    """The first ``limit`` requests of whatever the user passed."""
    if isinstance(dataset, EditRequest):
        return [dataset]
    path = dataset if isinstance(dataset, (str, Path)) else None
    rows = rows_given(dataset, EvaluationError) if path is None else read_rows(path)
    first = list(itertools.islice(rows, limit))
    if not first:
        raise EvaluationError("there is nothing to evaluate: the data set is empty")
    return requests_of(first, path)


def check_requests(model: EditableModel, cases: Sequence[Case], strict: bool = True) -> None:
    """Find now what would stop the run at some later edit.

    Args:
        model: will make the edits.
        cases: the edits.
        strict: a missing subject is an error; otherwise the edit is left to fail when its turn comes.

    Raises:
        RequestError: if the method needs a subject and one is missing or not in its prompt.
        EvaluationError: if the model already carries an edit under one of the ids.
    """
    carried = {edit.id for edit in model.edits}
    for case in cases:
        if case.request.id in carried:
            raise EvaluationError(
                f"row {case.number}: the model already carries an edit with the id {case.request.id!r};"
                " roll it back first"
            )
        if strict and model.capabilities.needs_subject:
            case.request.check_subject()


def make_units(cases: Sequence[Case], setting: str, batch_size: int | None) -> list[list[Case]]:
    """Cut the cases into what is edited together. Rows of one group (``group_id``) are never separated."""
    groups: list[list[Case]] = []
    for _, members in itertools.groupby(cases, key=lambda c: c.request.metadata.get("group_id") or (c.number,)):
        groups.append(list(members))
    size = batch_size or (len(cases) if setting in ("batch", SAVED) else 1)
    units: list[list[Case]] = []
    for group in groups:
        if units and setting != "single" and len(units[-1]) + len(group) <= size:
            units[-1].extend(group)
        else:
            units.append(list(group))
    return units


def parse_when(when: str | Sequence[str], setting: str) -> tuple[str, ...]:
    """The times of measurement in order; outside of ``sequential`` both are the same and one is left.

    Raises:
        EvaluationError: for an unknown time, or none.
    """
    if not isinstance(when, Iterable):
        raise EvaluationError(f"'when' must be a name or several of {', '.join(TIMES)}, not {shown(when)}")
    chosen = [when] if isinstance(when, str) else list(when)
    if not chosen:
        raise EvaluationError(f"'when' is empty; choose from {', '.join(TIMES)}")
    for name in chosen:
        check_choice("entry of 'when':", name, TIMES)
    ordered = tuple(name for name in TIMES if name in chosen)
    return ordered if setting == SEQUENTIAL else ordered[-1:]


def parse_at(at: Sequence[int] | int | None, setting: str, total: int) -> list[int]:
    """The numbers of edits after which everything so far is measured.

    Raises:
        EvaluationError: for a setting without a sequence, or a number that is never reached.
    """
    chosen = [] if at is None else list(at) if isinstance(at, Iterable) else [at]
    if chosen and setting != SEQUENTIAL:
        raise EvaluationError(f"at=… needs setting='sequential'; in '{setting}' edits do not pile up")
    for number in chosen:
        if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= total:
            raise EvaluationError(f"at: {shown(number)} is not a number of edits between 1 and {total}")
    return chosen

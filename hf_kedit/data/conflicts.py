"""Edits that contradict each other, and edits that must not be in a set: finding them and leaving them out.

Two rows are in conflict if they have the same prompt (apart from case, white space and Unicode form; for
multimodal rows also the same image) and different targets. After a sequence of edits at most one of them can hold,
so measuring both punishes every method.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import DataError
from ..requests import EditRequest
from ..storage.records import rows_given
from .normalise import RawRow
from .report import LoadReport

Key = tuple[str, Any]
Keep = Literal["first", "last"]


@dataclass(frozen=True)
class Conflict:
    """Rows with one prompt.

    Args:
        prompt: the prompt of the first of them.
        rows: their positions.
        targets: their targets, in the same order.
    """

    prompt: str
    rows: tuple[int, ...]
    targets: tuple[str, ...]

    @property
    def contradictory(self) -> bool:
        """Whether the targets differ; else the rows are mere repetitions."""
        return len({normalised(t) for t in self.targets}) > 1


def normalised(text: str) -> str:
    """Return a text as it is compared: NFC, one space between words, no case."""
    return " ".join(unicodedata.normalize("NFC", text).split()).casefold()


def key_of(row: Mapping[str, Any] | EditRequest) -> Key:
    """Return what two rows in conflict have in common: prompt and image."""
    if isinstance(row, EditRequest):
        return normalised(row.filled_prompt), row.image
    return normalised(row["prompt"]), row.get("image")


def find_conflicts(rows: Iterable[Mapping[str, Any] | EditRequest], *, repetitions: bool = False) -> list[Conflict]:
    """Find rows that ask for different targets after the same prompt.

    Args:
        rows: a dataset in the layout of ``FEATURES``, or requests.
        repetitions: list prompts that occur several times with the same target, too.

    Returns:
        One entry per prompt, in order of the first occurrence.
    """
    seen: dict[Key, list[tuple[int, str, str]]] = {}
    for number, row in enumerate(rows):
        prompt, target = (
            (row.filled_prompt, row.target_new) if isinstance(row, EditRequest) else (row["prompt"], row["target_new"])
        )
        seen.setdefault(key_of(row), []).append((number, prompt, target))
    conflicts = [
        Conflict(same[0][1], tuple(n for n, _, _ in same), tuple(t for _, _, t in same))
        for same in seen.values()
        if len(same) > 1
    ]
    return [c for c in conflicts if repetitions or c.contradictory]


def excluded_keys(exclude: Iterable[Any] | None) -> frozenset[Key | str]:
    """Return what ``exclude=`` stands for: a text forbids the prompt, a row forbids its prompt with its image."""
    if exclude is None:
        return frozenset()
    if isinstance(exclude, (str, Mapping, EditRequest)):
        raise DataError("'exclude' must be a list of prompts or rows, or a dataset.")
    keys: set[Key | str] = set()
    for entry in rows_given(exclude):
        if isinstance(entry, str):
            keys.add(normalised(entry))
        elif isinstance(entry, EditRequest) or (isinstance(entry, Mapping) and isinstance(entry.get("prompt"), str)):
            keys.add(key_of(entry))
        else:
            raise DataError("'exclude' must hold prompts, or rows with a 'prompt'.")
    return frozenset(keys)


def units(rows: Iterable[RawRow]) -> Iterator[list[RawRow]]:
    """Yield rows that belong together: a group, or a single row."""
    unit: list[RawRow] = []
    for row in rows:
        if unit and row["group_id"] != unit[0]["group_id"]:
            yield unit
            unit = []
        if row["group_id"] is None:  # at once: nothing more is read than what is used
            yield [row]
        else:
            unit.append(row)
    if unit:
        yield unit


def select(
    rows: Iterable[RawRow],
    report: LoadReport,
    limit: int | None,
    keep: Keep | None,
    excluded: frozenset[Key | str],
    skip: int = 0,
) -> Iterator[RawRow]:
    """Yield the rows to use, and count the others in ``report``.

    A group is used as a whole or not at all; the probes of a group would be wrong without one of its edits.
    For ``keep="last"`` all rows are held in memory.
    """
    chosen = _usable(_behind(units(rows), report, skip), report, excluded)
    if keep == "last":
        chosen = reversed(list(_compatible(reversed(list(chosen)), report)))
    elif keep == "first":
        chosen = _compatible(chosen, report)
    for unit in chosen:
        if limit is not None and report.kept + len(unit) > limit:
            if report.kept < limit:
                report.drop("group cut by the limit", len(unit))
            return
        report.read += len(unit)
        report.kept += len(unit)
        yield from unit
        if report.kept == limit:
            return


def _behind(all_units: Iterable[list[RawRow]], report: LoadReport, skip: int) -> Iterator[list[RawRow]]:
    """Leave out the groups that begin before row ``skip``: they are neither used nor compared with the others."""
    first = 0
    for unit in all_units:
        if first < skip:
            report.drop("skipped", len(unit))
        else:
            yield unit
        first += len(unit)


def _usable(
    all_units: Iterable[list[RawRow]], report: LoadReport, excluded: frozenset[Key | str]
) -> Iterator[list[RawRow]]:
    for unit in all_units:
        if not all((row["target_new"] or "").strip() for row in unit):
            report.drop("no target", len(unit))
        elif excluded and any(key_of(row) in excluded or key_of(row)[0] in excluded for row in unit):
            report.drop("excluded", len(unit))
        else:
            yield unit


def _compatible(chosen: Iterable[list[RawRow]], report: LoadReport) -> Iterator[list[RawRow]]:
    """Yield units that contradict none before them; repeated edits are kept only inside groups."""
    targets: dict[Key, str] = {}
    for unit in chosen:
        wanted = [(key_of(row), normalised(row["target_new"])) for row in unit]
        if any(targets.get(key, target) != target for key, target in wanted):
            report.drop("conflict", len(unit))
        elif len(unit) == 1 and unit[0]["group_id"] is None and wanted[0][0] in targets:
            report.drop("repetition", 1)
        else:
            targets.update(wanted)
            yield unit

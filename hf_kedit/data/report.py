"""What became of the rows of a data file: counts by reason, and where the file came from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ..errors import DataError
from ..storage.parsing import as_mapping, parse_json

_MARK = "hf_kedit load report: "


@dataclass
class LoadReport:
    """Counts of one split. ``read == kept + sum(dropped.values())``.

    Args:
        dataset: name of the dataset, or of the file.
        split: name of the split.
        files: paths or addresses of what was read.
        revision: commit of the Hub repository; None for local data.
        read: rows read. With ``limit``, reading stops when enough are kept.
        kept: rows in the table.
        dropped: reason → rows, e.g. ``"no target"``, ``"conflict"``, ``"excluded"``.
        dropped_probes: reason → probes that were left out of rows, e.g. ``"no answer"``.
        complete: False for a stream, whose rows are counted while they are read (and logged at its end).
    """

    dataset: str
    split: str
    files: list[str] = field(default_factory=list)
    revision: str | None = None
    read: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    dropped_probes: dict[str, int] = field(default_factory=dict)
    complete: bool = False

    def drop(self, reason: str, rows: int = 1) -> None:
        """Count rows that are left out (counted as read here)."""
        self.read += rows
        self.dropped[reason] = self.dropped.get(reason, 0) + rows

    def drop_probe(self, reason: str = "no answer") -> None:
        """Count a probe that is left out."""
        self.dropped_probes[reason] = self.dropped_probes.get(reason, 0) + 1

    def __str__(self) -> str:
        text = f"{self.dataset}/{self.split}: {self.read} rows read, {self.kept} kept"
        for what, counts in (("dropped", self.dropped), ("probes dropped", self.dropped_probes)):
            if counts:
                text += f"; {what}: " + ", ".join(f"{n} ({reason})" for reason, n in sorted(counts.items()))
        return text

    def to_text(self) -> str:
        """Return the report as one line, as kept in ``dataset.info.description``."""
        return _MARK + json.dumps(asdict(self))


def load_report(table: Any) -> LoadReport:
    """Return the report of a table that :func:`hf_kedit.data.load_edit_dataset` made.

    It stays with the table through ``save_to_disk``, ``select`` and ``filter``, and describes the loading, not
    what was selected afterwards.

    Args:
        table: a ``Dataset`` or ``IterableDataset``; for a ``DatasetDict`` ask for each split.

    Raises:
        DataError: the table was not made by ``load_edit_dataset``.
    """
    if isinstance(table, Mapping):
        raise DataError(f"Ask for the report of one split: {', '.join(map(repr, table))}.")
    text = getattr(getattr(table, "info", None), "description", None) or ""
    for line in str(text).split("\n"):
        if line.startswith(_MARK):
            what = "the load report of this table"
            values = as_mapping(parse_json(line[len(_MARK) :], what, DataError), what, DataError)
            names = {f.name for f in fields(LoadReport)}
            return LoadReport(**{k: v for k, v in values.items() if k in names})
    raise DataError("This table has no load report: it was not made by load_edit_dataset.")

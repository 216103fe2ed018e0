"""The user's own data: files and tables of any layout, with a mapping of columns.

Without a mapping, rows have the fields of :class:`hf_kedit.EditRequest` (which include those of EasyEdit's request
dicts) or the columns of ``FEATURES``. With one, every field names the column it is taken from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..errors import DataError, RequestError, nearest
from ..requests import EditRequest
from ..storage.cells import read_cell
from ..storage.files import json_ready
from ..storage.records import CsvRow
from .features import row_from_request
from .normalise import Record, groups
from .report import LoadReport

TEXT_FIELDS = ("prompt", "subject", "target_new", "id", "image", "separator")
PROBE_FIELDS = ("locality", "portability")
MAPPED_FIELDS = (*TEXT_FIELDS, "ground_truth", "rephrase_prompts", *PROBE_FIELDS)
Columns = Mapping[str, Any]


def check_columns(columns: Columns) -> None:
    """Check a mapping before anything is read.

    Raises:
        DataError: an unknown field, a missing one, or a value of a wrong kind.
    """
    if not isinstance(columns, Mapping):
        raise DataError(f"'columns' must be a dict field → column, not {type(columns).__name__}.")
    for field, column in columns.items():
        if field not in MAPPED_FIELDS:
            raise DataError(
                f"'columns' has no field {field!r}.{nearest(str(field), MAPPED_FIELDS)} "
                f"It maps {', '.join(MAPPED_FIELDS)} to names of columns."
            )
        if field == "rephrase_prompts" and isinstance(column, (list, tuple)):
            good = bool(column) and all(isinstance(c, str) for c in column)
        elif field in PROBE_FIELDS and isinstance(column, Mapping):
            good = all(
                isinstance(axis, str) and isinstance(pair, (list, tuple)) and len(pair) == 2
                and all(isinstance(c, str) for c in pair)
                for axis, pair in column.items()
            )  # fmt: skip
        else:
            good = isinstance(column, str)
        if not good:
            raise DataError(
                f"'columns': {field!r} must be the name of a column"
                + (" or a list of names" if field == "rephrase_prompts" else "")
                + (" or a dict axis → (prompt column, answer column)" if field in PROBE_FIELDS else "")
                + f", not {column!r}."
            )
    for field in ("prompt", "target_new"):
        if field not in columns:
            raise DataError(f"'columns' must say which column is {field!r}.")


def own_rows(
    records: Iterable[Any], name: str, report: LoadReport, columns: Columns | None, number: int = 0
) -> Iterator[Iterable[dict[str, Any]]]:
    """Yield, per record, the rows it gives (none or one); advancing raises the errors of that record.

    Args:
        records: dicts or requests.
        name: name of the data, used for ids.
        report: counts.
        columns: field → column, or None.
        number: number of the first record.
    """
    for position, value in enumerate(records, start=number):
        yield _own_row(value, position, name, report, columns)


def _own_row(
    value: Any, number: int, name: str, report: LoadReport, columns: Columns | None
) -> Iterator[dict[str, Any]]:
    if isinstance(value, EditRequest):
        yield row_from_request(value, dataset=name, number=number)
        return
    record = Record(value, number, report)
    if columns is None:
        # A blank cell of a CSV file is a missing value, as null is.
        data = {k: v for k, v in json_ready(record.value).items() if v != "" and (k == "separator" or not _blank(v))}
        if isinstance(value, CsvRow):
            data = CsvRow(data)
    else:
        data = _mapped(record, columns)
    if data.get("target_new", data.get("target")) is None and not data.get("erase"):
        report.drop("no target")
        return
    yield row_from_request(EditRequest.from_dict(data, row=number), dataset=name, number=number)


def _blank(value: Any) -> bool:
    return isinstance(value, str) and not value.strip()


def _cell(value: Any, record: Record, column: str, *, objects: bool = False) -> Any:
    """A value of a column of lists or objects; a text may be the JSON of one."""
    if not isinstance(value, str):
        return value
    return read_cell(value, column, record.number, strict=isinstance(record.value, CsvRow), objects=objects)


def _mapped(record: Record, columns: Columns) -> dict[str, Any]:
    """Return the fields of a request; columns that are not mapped go to the metadata."""
    used: set[str] = set()

    def take(column: str) -> Any:
        used.add(column)
        if column not in record.value:
            raise RequestError(
                f"there is no column {column!r}.{nearest(column, [str(k) for k in record.value])}", row=record.number
            )
        return record.raw(column)

    data: dict[str, Any] = {}
    for field, column in columns.items():
        if field == "separator":
            take(column)
            data[field] = record.value[column] or None  # which may be white space
        elif field in TEXT_FIELDS:
            take(column)
            data[field] = record.text(column)
        elif field == "ground_truth":
            data[field] = groups(_cell(take(column), record, column), record, column)
        elif field == "rephrase_prompts":
            names = [column] if isinstance(column, str) else list(column)
            entries = [(one, _cell(take(one), record, one)) for one in names]
            data[field] = [text for one, entry in entries for text in record.nested({one: entry}, "").texts(one)]
        elif isinstance(column, str):
            data[field] = _cell(json_ready(take(column)), record, column, objects=True)
        else:
            axes: dict[str, Any] = {}
            for axis, (prompt, answer) in column.items():
                text, answers = take(prompt), groups(_cell(take(answer), record, answer), record, answer)
                if text is not None and record.text(prompt):
                    axes[axis] = [{"prompt": record.text(prompt), "ground_truth": answers}]
            data[field] = axes
    data["metadata"] = {
        str(k): json_ready(v) for k, v in record.value.items() if k not in used and v not in (None, "")
    }
    return data

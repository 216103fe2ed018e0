"""The user's own data: files and tables of any layout, with a mapping of columns.

Without a mapping, rows have the fields of :class:`hf_kedit.EditRequest` (which include those of EasyEdit's request
dicts) or the columns of ``FEATURES``. With one, every field names the column it is taken from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..errors import DataError, RequestError, nearest
from ..requests import EditRequest
from .features import row_from_request
from .normalise import Record, clean, groups
from .report import LoadReport

TEXT_FIELDS = ("prompt", "subject", "target_new", "id", "image")
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
        data = {k: v for k, v in clean(record.value).items() if not (isinstance(v, str) and not v.strip())}
        data["extra"] = _parsed(data.get("extra"))
    else:
        data = _mapped(record, columns)
    if data.get("target_new", data.get("target")) is None:
        report.drop("no target")
        return
    yield row_from_request(EditRequest.from_dict(data, row=number), dataset=name, number=number)


def _parsed(extra: Any) -> Any:
    """Return ``extra`` as the object that it is; a Parquet file of ours stores it as text."""
    if isinstance(extra, str):
        try:
            value = json.loads(extra)
        except ValueError:
            return extra
        return value if isinstance(value, dict) else extra
    return extra


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
        if field in TEXT_FIELDS:
            take(column)
            data[field] = record.text(column)
        elif field == "ground_truth":
            data[field] = groups(take(column), record, column)
        elif field == "rephrase_prompts":
            names = [column] if isinstance(column, str) else list(column)
            data[field] = [text for one in names if take(one) is not None for text in record.texts(one)]
        elif isinstance(column, str):
            data[field] = clean(take(column))
        else:
            axes: dict[str, Any] = {}
            for axis, (prompt, answer) in column.items():
                text, answers = take(prompt), groups(take(answer), record, answer)
                if text is not None and record.text(prompt):
                    axes[axis] = [{"prompt": record.text(prompt), "ground_truth": answers}]
            data[field] = axes
    data["metadata"] = {str(k): clean(v) for k, v in record.value.items() if k not in used and v not in (None, "")}
    return data

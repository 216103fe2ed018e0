"""Read the records of a data file one by one: JSON arrays, JSON Lines, CSV and Parquet, local or on the Hub.

Nothing here knows what a record means. Files are read a piece at a time, so that a JSON array of two million
objects needs no more memory than one of ten, and taking the first few rows of it costs next to nothing. Values
stay what they are in the file: the text ``"1998"`` is not turned into a number (generic loaders do that).
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path, PurePosixPath
from typing import IO, Any

from ..errors import DataError, KeditError, shown
from .files import named_path
from .parsing import checked, parse_csv, parse_json, parse_json_lines

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".parquet")
"""What :func:`read_records` can read."""

_CHUNK = 1 << 16  # characters; doubled whenever an object does not fit, so that large objects cost linear time


def read_records(file: str) -> Generator[Any, None, None]:
    """Yield the records of one file.

    A JSON file is a list of records, one object (one record), or JSON Lines under the wrong name.

    Args:
        file: a local path, or an address that ``fsspec`` can open (``hf://datasets/<id>@<revision>/<file>``).

    Raises:
        DataError: the file is missing, unreadable, not UTF-8, damaged, or of another format.
    """
    name = PurePosixPath(file.replace("\\", "/")).name
    suffix = PurePosixPath(name).suffix.lower()
    if "\x00" in file:
        raise DataError(f"there is no file {shown(file)}")
    if "://" not in file and os.path.isdir(file):
        raise DataError(f"{file!r} is a folder; give the path of a {', '.join(SUFFIXES)} file")
    if suffix not in SUFFIXES:
        raise DataError(f"cannot read {shown(name)}: use {', '.join(SUFFIXES)}")
    try:
        with _open(file) as stream:
            if suffix == ".parquet":
                yield from _parquet(stream, name)
                return
            with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
                if suffix == ".csv":
                    yield from map(CsvRow, parse_csv(text, name, DataError))
                elif suffix == ".json":
                    yield from _json(text, name)
                else:
                    yield from parse_json_lines(text, name, DataError)
    except FileNotFoundError as error:
        raise DataError(f"there is no file {file!r}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"cannot read {name!r}: it is not UTF-8 ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise DataError(f"cannot read {name!r}: {error}") from error


def rows_given(source: Any, error: type[KeditError] = DataError) -> Iterable[Any]:
    """The rows of what is given in the place of a file.

    Args:
        source: one row (a dict); the slice of a ``datasets.Dataset`` (a dict of columns, each a list with one cell per
            row); or what gives one row after the other (a list, a ``datasets.Dataset``, a generator).
        error: to raise.

    Raises:
        KeditError: ``error``, saying what to pass instead of a table of another library, several splits, bytes, an
            array of numbers, and all else that gives no rows.
    """
    instead = _instead_of(source)
    if instead is not None:
        raise error(f"cannot take rows from a value of type {type(source).__name__}: {instead}")
    return _rows_of_columns(source) if isinstance(source, Mapping) else source


def _instead_of(source: Any) -> str | None:
    """What to pass instead of something that gives no rows; ``None`` if it does.

    Tables are known by what they can do: none of their libraries has to be there.
    """
    if isinstance(source, Mapping):
        values = list(source.values())
        if values and all(isinstance(value, Mapping) for value in values):
            return "it is a dict of dicts; pass a list of its rows (of a DataFrame: frame.to_dict('records'))"
        if values and all(_is_table(value) for value in values):
            return f"it has splits; pass one of them ({', '.join(map(str, source))})"
        return None
    if isinstance(source, (bytes, bytearray, memoryview)):
        return "pass the path of a file, or what json.loads makes of it"
    if isinstance(source, io.IOBase):
        return "pass the path of the file"
    if hasattr(source, "iloc"):  # pandas
        return "pass frame.to_dict('records')" if hasattr(source, "columns") else "pass the row as a dict"
    for name in ("to_dicts", "to_pylist"):  # polars, pyarrow
        if callable(getattr(source, name, None)):
            return f"pass what its {name}() returns"
    numbers = getattr(source, "dtype", None)  # NumPy, PyTorch …; a list of objects or of texts may be an array, too
    if numbers is not None and (len(source.shape) != 1 or getattr(numbers, "kind", "") not in ("O", "U")):
        return "an array holds no facts; pass a list of dicts"
    if isinstance(source, str) or not isinstance(source, Iterable):
        return f"pass a list of dicts, a datasets.Dataset, or the path of a {', '.join(SUFFIXES)} file"
    return None


def _is_table(value: Any) -> bool:
    """Whether a value of a dict is a table: the dict has splits then. The columns of a table are lists of cells."""
    if isinstance(value, (list, tuple)):
        return bool(value) and not isinstance(value[0], (str, int, float, list, tuple, type(None)))
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping))


def _rows_of_columns(columns: Mapping[str, Any]) -> list[Any]:
    """The rows of a dict of columns, each a list with one cell per row; any other dict is the one row that it is."""
    lengths = {len(cells) if isinstance(cells, list) else None for cells in columns.values()}
    if len(lengths) != 1 or None in lengths:
        return [columns]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def read_rows(path: str | Path) -> list[Any]:
    """Read the rows of a JSON (a list, or one object), JSONL, CSV or Parquet file; blank cells of CSV are left out.

    Raises:
        DataError: if the file is missing, unreadable, not UTF-8, or not of these formats.
    """
    rows = read_records(str(named_path(path, "the path of the file", DataError)))
    return [CsvRow({k: v for k, v in row.items() if v}) if isinstance(row, CsvRow) else row for row in rows]


def read_object(file: str) -> Any:
    """Return the whole content of a JSON file.

    Raises:
        DataError: see :func:`read_records`; or the file is JSON Lines.
    """
    records = list(read_records(file))
    return records[0] if len(records) == 1 else records


def read_all(files: Iterable[str]) -> Generator[Any, None, None]:
    """Yield the records of several files. Close the iterator (``contextlib.closing``) when leaving it early."""
    for file in files:
        with closing(read_records(file)) as records:
            yield from records


class CsvRow(dict[str, str]):
    """A row of a CSV file: all its values are text, lists and objects too."""


def _open(file: str) -> Any:
    if "://" not in file:
        return open(file, "rb")
    import fsspec  # type: ignore[import-untyped]  # here, as below: heavy, and most files need neither

    return fsspec.open(file, "rb")


def _parquet(stream: IO[bytes], name: str) -> Iterator[Any]:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        for batch in pq.ParquetFile(stream).iter_batches(batch_size=1000):
            yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise DataError(f"cannot read {name!r}: {error}") from error


def _json(text: IO[str], name: str) -> Iterator[Any]:
    start = ""
    while not start:
        chunk = text.read(_CHUNK)
        if not chunk:
            raise DataError(f"{name}: the file is empty")
        start = chunk.lstrip()
    if start[0] == "[":
        yield from _array(start, text, name)
        return
    whole = start + text.read()
    try:
        value = parse_json(whole, name, DataError)
    except DataError as error:
        if not (isinstance(error.__cause__, json.JSONDecodeError) and error.__cause__.msg.startswith("Extra data")):
            raise
        yield from parse_json_lines(whole, name, DataError)
    else:
        yield value


def _array(start: str, text: IO[str], name: str) -> Iterator[Any]:
    """Decode the elements of a JSON array from a buffer that is refilled when an element is cut off."""
    decoder = json.JSONDecoder()
    buffer, at, chunk, ended, count = start, 1, _CHUNK, False, 0
    comma = False  # an element has to be followed by a comma or the closing bracket
    while True:
        while at < len(buffer) and buffer[at] in " \t\r\n":
            at += 1
        problem: ValueError | None = None
        if at < len(buffer):
            if buffer[at] == "]" and (comma or count == 0):
                after = buffer[at + 1 :] + text.read()
                if after.strip():
                    raise DataError(f"{name}: there is something after the closing bracket of the list")
                return
            if comma:
                if buffer[at] != ",":
                    raise DataError(f"{name}, record {count}: not JSON (a comma is missing before it)")
                at, comma = at + 1, False
                continue
            try:
                value, end = decoder.raw_decode(buffer, at)
            except RecursionError as error:
                raise DataError(f"{name}, record {count}: it is nested too deeply") from error
            except ValueError as error:
                problem = error
            else:
                # A number may go on in the next piece ("1." is read as 1): it ends only at something else.
                if ended or (end < len(buffer) and buffer[end] in ", ]\t\r\n"):
                    yield checked(value, f"{name}, record {count}", DataError)
                    at, comma, count, chunk = end, True, count + 1, _CHUNK
                    continue
        if ended:
            raise DataError(f"{name}, record {count}: not JSON ({problem or 'the list does not end'})") from problem
        more = text.read(chunk)
        ended, chunk = not more, chunk * 2
        buffer, at = buffer[at:] + more, 0

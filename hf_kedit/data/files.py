"""Read the records of a data file one by one: JSON arrays, JSON Lines, CSV and Parquet, local or on the Hub.

Nothing here knows what a record means. Files are read a piece at a time, so that a JSON array of two million
objects needs no more memory than one of ten, and taking the first few rows of it costs next to nothing. Values
stay what they are in the file: the text ``"1998"`` is not turned into a number (generic loaders do that).
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from pathlib import PurePosixPath
from typing import IO, Any

import fsspec  # type: ignore[import-untyped]
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from ..errors import DataError

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
    if suffix not in SUFFIXES:
        raise DataError(f"cannot read {name!r}: use {', '.join(SUFFIXES)}")
    try:
        with _open(file) as stream:
            if suffix == ".parquet":
                yield from _parquet(stream)
                return
            with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
                if suffix == ".csv":
                    yield from _csv(text)
                elif suffix == ".json":
                    yield from _json(text, name)
                else:
                    yield from _lines(text, name)
    except FileNotFoundError as error:
        raise DataError(f"there is no file {file!r}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"cannot read {name!r}: it is not UTF-8 ({error.reason} at byte {error.start})") from error
    except (OSError, csv.Error, pa.ArrowException) as error:
        raise DataError(f"cannot read {name!r}: {error}") from error
    except RecursionError as error:
        raise DataError(f"cannot read {name!r}: its values are nested too deeply") from error


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


def _open(file: str) -> Any:
    return fsspec.open(file, "rb") if "://" in file else open(file, "rb")


def _parquet(stream: IO[bytes]) -> Iterator[Any]:
    for batch in pq.ParquetFile(stream).iter_batches(batch_size=1000):
        yield from batch.to_pylist()


def _csv(text: IO[str]) -> Iterator[dict[str, str]]:
    for row in csv.DictReader(text):
        if None in row:
            raise csv.Error(f"a row has more cells than the header: {str(row)[:80]}…")
        yield {key: value or "" for key, value in row.items()}


def _lines(stream: Iterable[str], name: str) -> Iterator[Any]:
    for number, line in enumerate(stream, start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise DataError(f"{name}, line {number}: not JSON ({error})") from error


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
        yield json.loads(whole)
    except json.JSONDecodeError as error:
        if not error.msg.startswith("Extra data"):
            raise DataError(f"{name}, line {error.lineno}: not JSON ({error.msg})") from error
        yield from _lines(io.StringIO(whole, newline=""), name)
    except ValueError as error:  # a number with thousands of digits
        raise DataError(f"{name}: not JSON ({error})") from error


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
            except ValueError as error:
                problem = error
            else:
                # A number may go on in the next piece ("1." is read as 1): it ends only at something else.
                if ended or (end < len(buffer) and buffer[end] in ", ]\t\r\n"):
                    yield value
                    at, comma, count, chunk = end, True, count + 1, _CHUNK
                    continue
        if ended:
            raise DataError(f"{name}, record {count}: not JSON ({problem or 'the list does not end'})") from problem
        more = text.read(chunk)
        ended, chunk = not more, chunk * 2
        buffer, at = buffer[at:] + more, 0

"""JSON, YAML and CSV as plain values: the one door through which text from files, options and the Hub comes in.

The parsers of these formats raise more than their own errors: thousands of brackets end in a `RecursionError`, a
number of thousands of digits in a `ValueError`, a tag such as ``!!bool maybe`` in a `KeyError`. Here each of them
becomes the error that the caller names, with the place. And what comes out can be walked, copied and written again:
nested at most `LEVELS` deep, without circles, dates or binary, no number beyond what a float can hold.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import KeditError

LEVELS = 100
"""How deep lists and mappings may be nested; far below where a recursive function would fail."""
SIZE = 1_000_000
"""How many values a YAML file may stand for: with aliases, a few lines can stand for more than a memory holds."""
_DIGITS = 300
LARGEST = 10**_DIGITS
TOO_LARGE = f"a number has more than {_DIGITS} digits"
_PLAIN = (str, int, float, bool, type(None))


def read_text(path: Path, error: type[KeditError]) -> str:
    """Content of a text file.

    Raises:
        error: if it is missing, unreadable, or not UTF-8.
    """
    try:
        return decode(path.read_bytes(), repr(str(path)), error)
    except (OSError, ValueError) as reason:  # ValueError: a name with a NUL character
        if isinstance(reason, KeditError):
            raise
        raise error(f"cannot read {str(path)!r}: {reason}") from reason


def decode(data: bytes, what: str, error: type[KeditError]) -> str:
    """Bytes as text; a byte order mark at the start is dropped.

    Raises:
        error: if they are not UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as reason:
        raise error(f"cannot read {what}: it is not UTF-8 ({reason.reason} at byte {reason.start})") from reason


def parse_json(text: str | bytes, what: str, error: type[KeditError]) -> Any:
    """The value that a JSON text holds.

    Args:
        text: bytes must be UTF-8.
        what: name of the text, for messages.
        error: raised for whatever is wrong with it.
    """
    text = decode(text, what, error) if isinstance(text, bytes) else text
    try:
        return _plain_json(text)
    except json.JSONDecodeError as reason:
        raise error(f"{what}, line {reason.lineno}: not JSON ({reason.msg})") from reason
    except (RecursionError, ValueError) as reason:
        raise error(f"{what}: {_beyond(reason)}") from reason


def parse_json_lines(lines: str | bytes | Iterable[str], what: str, error: type[KeditError]) -> Iterator[Any]:
    """The values of JSON Lines, one by one; blank lines are passed over."""
    lines = decode(lines, what, error) if isinstance(lines, bytes) else lines
    for number, line in enumerate(lines.split("\n") if isinstance(lines, str) else lines, start=1):
        if line.strip():
            try:
                value = _plain_json(line)
            except (RecursionError, ValueError) as reason:
                said = f"not JSON ({reason.msg})" if isinstance(reason, json.JSONDecodeError) else _beyond(reason)
                raise error(f"{what}, line {number}: {said}") from reason
            yield value


def parse_yaml(text: str | bytes, what: str, error: type[KeditError]) -> Any:
    """The value that a YAML text holds; see `parse_json`."""
    import yaml  # here: it takes long to import for what only some commands read

    text = decode(text, what, error) if isinstance(text, bytes) else text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as reason:
        raise error(f"{what} is not valid YAML: {reason}") from reason
    # Tagged values (``!!int x``, ``!!bool maybe``, ``!!timestamp x``) fail inside the functions that make them.
    except (RecursionError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as reason:
        raise error(f"{what}: {_beyond(reason)}") from reason
    return checked(value, what, error, SIZE)


def parse_csv(lines: Iterable[str], what: str, error: type[KeditError]) -> Iterator[dict[str, str]]:
    """The rows of a CSV text with a header, one by one: column → cell, ``""`` where a row is too short."""
    reader = csv.DictReader(lines)
    try:
        names = list(reader.fieldnames or ())
        twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
        if twice is not None:
            raise error(f"{what}: two columns are called {twice!r}")
        for row in reader:
            if None in row:
                raise error(f"{what}, line {reader.line_num}: the row has more cells than the header")
            yield {name: cell or "" for name, cell in row.items()}
    except csv.Error as reason:
        raise error(f"{what}, line {reader.line_num + 1}: not CSV ({reason})") from reason


def as_mapping(value: Any, what: str, error: type[KeditError]) -> dict[str, Any]:
    """The value, if it is a mapping with text as keys.

    Raises:
        error: if it is not.
    """
    if not isinstance(value, dict):
        raise error(f"{what} must hold a mapping of names to values, not {type(value).__name__}")
    for key in value:
        if not isinstance(key, str):
            raise error(f"{what}: the name {key!r} must be text; write it in quotes")
    return value


def checked(value: Any, what: str, error: type[KeditError], most: int | None = None) -> Any:
    """The value, if it is plain (see the head of this module) and stands for ``most`` values or fewer.

    Args:
        value: what a parser of JSON made, where ``most`` is not given.
        what: its name, for messages.
        error: raised if it is not plain, saying why.
        most: number of values.
    """
    try:
        if most is None:
            _check_json(value)
        elif _extent(value, 0, {})[1] > most:
            raise ValueError(f"it stands for more than {most:,} values")
    except ValueError as reason:
        raise error(f"{what}: {reason}") from reason
    return value


def _whole(digits: str) -> int:
    """A whole number of a JSON text."""
    if len(digits.lstrip("-")) > _DIGITS:
        raise ValueError(TOO_LARGE)
    return int(digits)


_JSON = json.JSONDecoder(parse_int=_whole)


def _plain_json(text: str) -> Any:
    """The plain value of a JSON text; a `ValueError` or `RecursionError` for what is not JSON, or not plain."""
    value = _JSON.decode(text)
    if text.count("[") + text.count("{") > LEVELS:  # with fewer brackets it cannot be nested deeper
        _check_json(value)
    return value


def _check_json(value: Any) -> None:
    """Raise a `ValueError` for what JSON can hold and is not plain: as `_extent`, in a fraction of its time."""
    level, depth = [[value]], -1  # all lists and mappings of one level; nothing is shared, and every name is text
    while level:
        if depth == LEVELS:
            raise ValueError(f"it is nested more than {LEVELS} levels deep")
        below: list[Any] = []
        for holder in level:
            parts: Iterable[Any] = holder.values() if isinstance(holder, dict) else holder
            for part in parts:
                kind = type(part)
                if kind is dict or kind is list:
                    below.append(part)
                elif kind is int and not -LARGEST < part < LARGEST:
                    raise ValueError(TOO_LARGE)
        level, depth = below, depth + 1


def _extent(value: Any, depth: int, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Height and number of the values below one.

    Args:
        value: to measure.
        depth: of it.
        known: what was measured, by identity: what YAML's aliases share is walked once.

    Raises:
        ValueError: for what is not plain.
    """
    kind = type(value)
    if kind is not dict and kind is not list:
        if kind not in _PLAIN:
            raise ValueError(f"{str(value)[:40]!r} is a {kind.__name__}; write it in quotes, as text")
        if kind is int and not -LARGEST < value < LARGEST:
            raise ValueError(TOO_LARGE)
        return 0, 1
    if id(value) not in known:
        if depth >= LEVELS:
            raise ValueError(f"it is nested more than {LEVELS} levels deep")
        height, size = 0, 1
        for name in value if kind is dict else ():
            if type(name) not in _PLAIN:
                raise ValueError(f"{str(name)[:40]!r} cannot be a name; write it in quotes, as text")
        for part in value.values() if kind is dict else value:
            below, count = _extent(part, depth + 1, known)
            height, size = max(height, below + 1), size + count
        known[id(value)] = height, size
    if depth + known[id(value)][0] > LEVELS:
        raise ValueError(f"it is nested more than {LEVELS} levels deep")
    return known[id(value)]


def _beyond(reason: Exception) -> str:
    """What a parser's error says that is none of its own."""
    if isinstance(reason, RecursionError):
        return f"it is nested more than {LEVELS} levels deep"
    return f"a value cannot be read ({reason})" if str(reason) else "a value cannot be read"

"""Values in the fields of a row: lists and objects in cells of text, and what a file can give back as it was."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import DataError, RequestError, shown
from ..text.scripts import HALF, is_writable
from .parsing import LARGEST, LEVELS, TOO_LARGE, parse_json

_LIST_AS_TEXT = re.compile(r"""\[\s*['"].*['"]\s*\]""", flags=re.DOTALL)  # what str(["a"]) gives in Python and numpy


def read_cell(text: str, name: str, row: int | None = None, *, strict: bool = True, objects: bool = False) -> Any:
    """What a text stands for in a field of lists or objects: itself, or the value that its JSON holds.

    Args:
        text: the content of the field.
        name: of the field, for messages.
        row: number of the row, for messages.
        strict: the text is the cell of a CSV file, which can hold a list in no other way.
        objects: the field may hold objects too.

    Raises:
        RequestError: for a list that is written otherwise, as Python and numpy print one: it would become one text.
    """
    content = text.strip()
    if not content.startswith(("[", "{") if objects else "["):
        return text
    try:
        value = parse_json(content, "the text", DataError)
    except DataError as error:
        if strict or _LIST_AS_TEXT.fullmatch(content):
            kind, right = ("an object", '{"a": "b"}') if content[0] == "{" else ("a list", '["a", "b"]')
            raise RequestError(
                f"{content[:60]!r} begins like {kind} and is no JSON: write {right} with double quotes, or use a JSONL"
                " file",
                row=row,
                field=name,
            ) from error
        return text
    if not strict and not objects and not _answers(value):
        return text  # "[1, 2]" may well be an answer
    return value


def _answers(values: list[Any]) -> bool:
    """Whether a list holds texts, or lists of them."""
    return all(isinstance(v, str) or (isinstance(v, list) and all(isinstance(a, str) for a in v)) for v in values)


def check_plain(name: str, value: Any, fail: Callable[[str, str], None], level: int = 0) -> None:
    """Refuse what JSON does not give back as it was: it could be edited with, and never be saved.

    Args:
        name: of the value, for messages.
        value: of a field.
        fail: called with what is wrong and the name; raises.
        level: how deep the value lies.
    """
    if level == 0 and _is_plain(value):
        return
    if level > LEVELS:
        fail(f"is nested more than {LEVELS} levels deep", name)
    if isinstance(value, str):
        if not is_writable(value):
            fail(HALF, name)
    elif isinstance(value, Mapping):
        for key, part in value.items():
            if not isinstance(key, str):
                fail(f"the key {shown(key)} would come back from a file as text; write it as text", name)
            elif not is_writable(key):
                fail(HALF, name)
            check_plain(f"{name}.{key}", part, fail, level + 1)
    elif isinstance(value, list):
        for i, part in enumerate(value):
            check_plain(f"{name}[{i}]", part, fail, level + 1)
    elif isinstance(value, int) and abs(value) >= LARGEST:
        fail(TOO_LARGE, name)
    elif value is not None and not isinstance(value, (bool, int, float)):
        better = "a list" if isinstance(value, tuple) else "text or plain numbers"
        fail(f"a {type(value).__name__} cannot be saved as it is; write {better}", name)


def _is_plain(value: Any) -> bool:
    """Whether `check_plain` finds nothing to refuse: quicker than to name each part for messages that nobody reads."""
    level, texts = [value], []
    for _ in range(LEVELS + 1):
        below: list[Any] = []
        for part in level:
            kind = type(part)
            if kind is str:
                texts.append(part)
            elif kind is dict:
                texts += part
                below += part.values()
            elif kind is list:
                below += part
            elif kind is int:
                if not -LARGEST < part < LARGEST:
                    return False
            elif kind not in (float, bool, type(None)):
                return False
        if not below:
            return all(type(text) is str for text in texts) and is_writable("".join(texts))
        level = below
    return False

"""Choosing by name: one check, with the nearest known name in its error."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..errors import EvaluationError, nearest


def check_choice(what: str, value: Any, known: Iterable[str]) -> None:
    """Raise an `EvaluationError` that names the nearest choice if ``value`` is not a known one."""
    names = list(known)
    if value not in names:
        raise EvaluationError(f"unknown {what} {value!r}.{nearest(str(value), names)} Known: {', '.join(names)}.")

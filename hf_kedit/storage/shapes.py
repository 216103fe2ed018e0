"""Values of unknown origin against the types that they must have."""

from __future__ import annotations

import functools
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ..errors import KeditError, shown


def of_type(kind: Any, value: Any, what: str, error: type[KeditError]) -> Any:
    """The value, if it has a type: nothing is converted, and what the type does not mention is kept.

    Args:
        kind: a type, also a ``TypedDict`` or a nested generic.
        value: to check.
        what: name of the value, for messages.
        error: kind of error to raise.

    Raises:
        error: naming the place inside the value.
    """
    try:
        _adapter(kind).validate_python(value, strict=True)
    except ValidationError as problem:
        first = problem.errors()[0]
        # Names of alternatives of a union stand in the place, too; they say nothing to a user.
        place = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or str(part).isidentifier())
        given = "" if first["type"] == "missing" else f", not {shown(first['input'])}"
        raise error(f"{what}{f', {place}' if place else ''}: {first['msg']}{given}") from problem
    return value


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)

"""What a row brings along beside its edit (``extra``), which data sets fill and scenarios read."""

from __future__ import annotations

from typing import Any, TypeVar

from ..errors import KeditError, RequestError
from ..requests import EditRequest
from ..storage.shapes import of_type

F = TypeVar("F")


def extra_of(request: EditRequest, fields: type[F]) -> F:
    """The ``extra`` of a request, which may come from anybody's file.

    Args:
        request: of any origin.
        fields: a ``TypedDict`` with what is to be read; other fields may be there and may be anything.

    Raises:
        RequestError: if one of them has another type, naming it.
    """
    given: Any = request.metadata.get("extra") or {}
    try:
        found: F = of_type(fields, given, "extra", KeditError)
    except KeditError as error:
        raise RequestError(str(error), row=request.row, field="extra", request_id=request.id) from error
    return found

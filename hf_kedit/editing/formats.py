"""Requests in the format that the model reads them in: plain, as a chat, or one edit for both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..errors import ChatTemplateError, ConfigError, RequestError
from ..methods.base import Method, Outcome
from ..remote.model import RemoteModel
from ..requests import EditRequest


def read_by(method: Method, requests: Sequence[EditRequest]) -> list[EditRequest]:
    """Requests as a method gets them (`EditRequest.rendered`), checked for formats that it does not take.

    Raises:
        ConfigError: if a request is in two formats and the method edits in one.
        ChatTemplateError: if the tokenizer cannot write a conversation.
        RequestError: if a request has pictures and the method (or the model) works on text.
    """
    if method.both_formats is None and any(request.prompt_format == "both" for request in requests):
        raise ConfigError(
            f"{method.capabilities.name} edits in one format at a time: prompt_format='plain' or 'chat', not 'both'"
        )
    for request in requests:
        if request.image is not None and not method.pictures:
            raise RequestError(
                f"{method.capabilities.name} edits what a model says of text; a fact about a picture needs a method"
                " that takes one (docs/images.md), such as ft-m, lora, rome or grace",
                row=request.row,
                field="image",
                request_id=request.id,
            )
    return [_rendered(request, method) for request in requests]


def _rendered(request: EditRequest, method: Method) -> EditRequest:
    if isinstance(method.bench.model, RemoteModel):  # which writes its chats itself
        return request.asked("plain")
    try:
        return request.rendered(method.bench.tokenizer, method.bench.processor)
    except ChatTemplateError as error:
        raise ChatTemplateError(f"row {request.row}: {error}" if request.row is not None else str(error)) from error


def compute(method: Method, requests: Sequence[EditRequest]) -> tuple[Outcome, list[int]]:
    """What a method finds for rendered requests; those in two formats are given to it as two, where it wants that.

    Returns:
        The outcome, with one dict of diagnostics per request, and for each entry of an outcome with entries the
        request that it belongs to.
    """
    forms = [[request] for request in requests]
    if method.both_formats == "as two":
        forms = [request.formats() for request in requests]
    owners = [i for i, group in enumerate(forms) for _ in group]
    outcome = method.compute([form for group in forms for form in group])
    if len(owners) == len(requests):
        return outcome, owners
    deltas = [d if d.owners is None else replace(d, owners=tuple(owners[o] for o in d.owners)) for d in outcome.deltas]
    numbers = iter(outcome.diagnostics)
    diagnostics = [_together([next(numbers) for _ in group]) for group in forms]
    return Outcome(deltas, diagnostics, outcome.entries), owners


def _together(numbers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The diagnostics of one request: those of its plain form, but of probabilities the lower of both."""
    names = ("target_probability_before", "target_probability_after")
    return {**numbers[0], **{name: min(n[name] for n in numbers) for name in names if name in numbers[0]}}

"""Edits as training data for a provider's fine-tuning: one conversation a line, as OpenAI's file format has it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ..errors import DataError
from ..requests import EditRequest

LEAST = 10
"""Conversations that providers ask for at least."""


def finetune_lines(
    requests: Sequence[EditRequest], *, system: str | None = None, least: int = LEAST, rephrasings: bool = True
) -> list[str]:
    """Conversations in which the assistant gives the new answers, as lines of JSON.

    Args:
        requests: the facts.
        system: what the system says in conversations without a system message.
        least: lines; fewer conversations are repeated in turn until there are so many.
        rephrasings: a conversation for each other wording of a fact, too.

    Raises:
        DataError: if there is no request, or ``least`` is no number of lines.
    """
    if isinstance(least, bool) or not isinstance(least, int) or least < 0:
        raise DataError(f"least must be a number of lines, not {least!r}")
    if not requests:
        raise DataError("there are no edits to write a file for fine-tuning of")
    lines = [
        json.dumps({"messages": _conversation(request, turn, system)}, ensure_ascii=False)
        for request in requests
        for turn in (request.plain_prompt, *(request.rephrase_prompts if rephrasings else ()))
    ]
    return [lines[i % len(lines)] for i in range(max(least, len(lines)))]


def _conversation(request: EditRequest, turn: str, system: str | None) -> list[dict[str, Any]]:
    before = [dict(message) for message in (request.messages or ())[:-1]]
    if system is not None and not any(message["role"] == "system" for message in before):
        before.insert(0, {"role": "system", "content": system})
    return [*before, {"role": "user", "content": turn}, {"role": "assistant", "content": request.target_new}]

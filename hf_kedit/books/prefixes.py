"""What stands in front of prompts, what these say without it, and whether a row that is read has it already."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from ..anatomy.switching import Switch, switched

_BEHIND: ContextVar[bool] = ContextVar("kedit_behind_prefixes", default=False)


def behind_prefixes() -> bool:
    """Whether the rows that the model reads now stand behind prefixes, so that their edits are decided already."""
    return _BEHIND.get()


def reading_behind_prefixes() -> Switch[None]:
    """What the model reads inside the block are rows behind their prefixes (`behind_prefixes`)."""

    def say(behind: bool) -> None:
        _BEHIND.set(behind)

    return switched(lambda: say(True), lambda: say(False))


class RowText(str):
    """What a row of a call says, in a chat the user's last turn.

    ``ids`` are those of the whole prompt; ``look`` tells what its pictures look like (`StateReader.looks`), if asked.
    """

    ids: Sequence[int]
    look: Callable[[], torch.Tensor | None]

    @classmethod
    def of(cls, text: str, ids: Sequence[int], look: Callable[[], torch.Tensor | None] = lambda: None) -> RowText:
        """A text with its ids, and with what finds its look."""
        self = cls(text)
        self.ids, self.look = ids, look
        return self


@dataclass(frozen=True)
class Prefix:
    """What is put in front of a row.

    Args:
        fact: the last part, always there.
        demonstrations: what stands before it, in order; `PicturedText` where they have pictures of their own.
        nearest_last: the most similar demonstration is the last one; where space is short the others go first.
        model: the model that reads the row instead; ``None`` for the edited model itself.
        share: part of the answer that comes from the prefixed row, the rest from the plain one; 1 replaces it.
    """

    fact: str
    demonstrations: tuple[str, ...] = ()
    nearest_last: bool = True
    model: Any | None = None
    share: float = 1.0

"""What stands in front of prompts, what these say without it, and whether a row that is read has it already."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from ..anatomy.switching import Switch, switched


@dataclass(frozen=True)
class PrefixedRows:
    """Rows that the model reads behind prefixes, so that their edits are decided already.

    Args:
        prefixes: of each row; ``generate`` may read several copies of a row, which stand together.
        held: what is found out about them once, by name of who wants to know it.
    """

    prefixes: tuple[Prefix | None, ...]
    held: dict[str, Any] = field(default_factory=dict)


_READ: ContextVar[PrefixedRows | None] = ContextVar("kedit_prefixed_rows", default=None)


def behind_prefixes() -> PrefixedRows | None:
    """The rows that the model reads now, if they stand behind prefixes."""
    return _READ.get()


def reading_behind(prefixes: Sequence[Prefix | None]) -> Switch[None]:
    """What the model reads inside the block are rows behind these prefixes (`behind_prefixes`)."""
    before: list[PrefixedRows | None] = []

    def begin() -> None:
        before.append(_READ.get())
        _READ.set(PrefixedRows(tuple(prefixes)))

    def end() -> None:
        _READ.set(before.pop())

    return switched(begin, end)


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
        mark: what the one who has decided on it wants to know again while the row is read behind it.
    """

    fact: str
    demonstrations: tuple[str, ...] = ()
    nearest_last: bool = True
    model: Any | None = None
    share: float = 1.0
    mark: Any = None

"""What `EditableModel` asks of a book, in which edits are kept: weights, modules wrapped in place, prompts.

An `EditableModel` carries several books and treats them alike: a call of ``edit`` is one transaction over all of
them, and so are rolling back, switching off, merging, saving and loading. The `Ledger` is the book of weight deltas,
`SiteBook` the book of modules that are wrapped in place. This module knows no book and no method.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ..anatomy.switching import Switch, together, uninterrupted
from ..errors import ArtifactError, UnknownEditError


@dataclass(frozen=True)
class Saved:
    """A book's part of a saved edit, as it is read back.

    Args:
        source: folder or repository, for messages.
        description: what `Book.describe` returned, from ``edit_config.json``.
        tensors: every tensor of the saved edit, by name.
        edit_ids: ids of all edits in the saved journal.
        made_on: class and name of the base model that the edits were made on, for messages.
        ignore_fingerprint: accept other base weights than the edits were made on.
        used: names of the tensors that were asked for; what is left over belongs to nothing.
    """

    source: str
    description: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    edit_ids: frozenset[str]
    made_on: str = "another model"
    ignore_fingerprint: bool = False
    used: set[str] = field(default_factory=set)

    def tensor(self, name: Any, shape: Sequence[int | None], dtype: torch.dtype | None = None) -> torch.Tensor:
        """A copy of one tensor.

        Args:
            name: in the file.
            shape: what it must have; ``None`` for any size.
            dtype: what it must have if it holds whole numbers or booleans; ``None``: any of floating point, and the
                copy is fp32.

        Raises:
            ArtifactError: if it is missing, of another shape or dtype, or not finite.
        """
        value = self.tensors.get(name) if isinstance(name, str) else None
        if value is None:
            raise ArtifactError(f"{self.source}: the tensor {name!r} is missing")
        self.used.add(name)
        if value.dim() != len(shape) or any(n is not None and n != m for n, m in zip(shape, value.shape, strict=True)):
            expected = ", ".join("any" if n is None else str(n) for n in shape)
            raise ArtifactError(f"{self.source}: {name!r} has shape {tuple(value.shape)}, expected ({expected})")
        if value.dtype != dtype if dtype is not None else not value.is_floating_point():
            raise ArtifactError(f"{self.source}: {name!r} is {value.dtype}, expected {dtype or 'floating point'}")
        if dtype is not None:
            return value.clone()
        value = value.float().clone()
        # Numbers whose squares overflow make any layer norm behind them NaN.
        if not bool(torch.isfinite(value.square().sum())):
            raise ArtifactError(f"{self.source}: {name!r} holds NaN, infinity, or numbers close to it")
        return value


class Book(Protocol):
    """Keeps the edits of one kind (`Capabilities.kind`) of one model."""

    @property
    def edit_ids(self) -> list[str]:
        """Ids of the edits that own something here, oldest first."""

    def apply(self, batch_id: str, changes: Sequence[Any], edit_ids: Sequence[str]) -> None:
        """Take over what a method returned for one batch: all of it, or nothing and an error."""

    def remove(self, edit_ids: Sequence[str]) -> None:
        """Undo edits exactly: all of them, or nothing and a `RollbackError` that says what is possible instead."""

    def snapshot(self) -> Any:
        """The present state, for `restore`; cheap, whatever the number of edits."""

    def restore(self, snapshot: Any) -> None:
        """Return to a state that `snapshot` or `read` gave, bit for bit. Does not fail."""

    def disabled(self) -> Switch[None]:
        """The model without this book's edits, bit for bit, inside the block; may be nested."""

    def check_mergeable(self) -> None:
        """Raise `MergeError` if the book holds edits that cannot become part of a stock model."""

    def forget(self) -> None:
        """Drop all records and leave the model as it is (after merging)."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything to be saved as tensors, on the CPU; names start with a module's name or are unique otherwise."""

    def describe(self) -> dict[str, Any]:
        """Everything else to be saved, JSON-ready; empty if there is nothing."""

    def read(self, saved: Saved) -> tuple[Any, frozenset[str]]:
        """Check a saved edit and return a state for `restore`, and the ids of its edits; the model is not touched.

        Raises:
            ArtifactError: if something is missing or does not fit.
            BaseModelMismatchError: if the base model is another one.
        """


def snapshot_all(books: Iterable[Book]) -> list[tuple[Book, Any]]:
    """The present state of several books, for `restore_all`."""
    return [(book, book.snapshot()) for book in books]


def restore_all(snapshots: Iterable[tuple[Book, Any]]) -> None:
    """Return every book to the state in which `snapshot_all` found it."""
    with uninterrupted():
        for book, snapshot in snapshots:
            book.restore(snapshot)


def all_disabled(books: Iterable[Book]) -> Switch[None]:
    """The model without any edits inside the block."""
    return together(*(book.disabled() for book in books))


def remove_from(books: Iterable[Book], edit_ids: Collection[str]) -> None:
    """Undo edits in whichever books hold them, all or none.

    Raises:
        RollbackError: if a book cannot take one of them back on its own.
    """
    books = list(books)
    wanted = set(edit_ids)
    before = snapshot_all(books)
    try:
        for book in books:
            mine = [edit_id for edit_id in book.edit_ids if edit_id in wanted]
            if mine:
                book.remove(mine)
    except BaseException:
        restore_all(before)
        raise


def check_known(holder: str, known: Collection[str], edit_ids: Collection[str]) -> None:
    """Raise `UnknownEditError` if an id is not among the known ones."""
    unknown = set(edit_ids) - set(known)
    if unknown:
        raise UnknownEditError(f"{holder} holds nothing of {', '.join(sorted(unknown))}")

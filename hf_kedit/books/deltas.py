"""Weight deltas and the records that the ledger keeps of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from ..errors import RollbackError


@dataclass
class WeightDelta:
    """A change of one parameter, as a method returns it. Always fp32, in functional orientation.

    Either the factors ``left [d_out, r]`` and ``right [d_in, r]`` with ``ΔW = left rightᵀ``, or ``dense`` of the
    parameter's own (functional) shape.

    Args:
        module: in-memory name of the module that owns the parameter.
        name: the parameter's name in its module.
        left: output-side factor.
        right: input-side factor.
        dense: the full change.
        owners: for factors, the request (index into the batch) that each column belongs to; ``None`` if the
            change belongs to all requests of the batch together and cannot be split.
        keys: keys that later edits of this weight must leave alone, ``[d_in, n]``, one column per owner. They are
            kept, saved and taken back together with the delta.
        builds_on: the change corrects the earlier ones of this weight: they can only be taken back together with it.
    """

    module: str
    name: str = "weight"
    left: torch.Tensor | None = None
    right: torch.Tensor | None = None
    dense: torch.Tensor | None = None
    owners: tuple[int, ...] | None = None
    keys: torch.Tensor | None = None
    builds_on: bool = False

    def __post_init__(self) -> None:
        if (self.dense is None) == (self.left is None or self.right is None):
            raise ValueError("a WeightDelta has either both factors or a dense change")
        if self.left is not None and self.right is not None:
            self.left, self.right = self.left.detach().float(), self.right.detach().float()
            if self.owners is not None and len(self.owners) != self.left.shape[1]:
                raise ValueError("a WeightDelta needs one owner per column")
        elif self.dense is not None:
            self.dense = self.dense.detach().float()
        if self.keys is not None:
            self.keys = self.keys.detach().float()
            if self.owners is not None and len(self.owners) != self.keys.shape[1]:
                raise ValueError("a WeightDelta needs one key per owner")

    @property
    def key(self) -> str:
        """Full name of the parameter."""
        return f"{self.module}.{self.name}"

    @property
    def device(self) -> torch.device:
        """Where it is."""
        found = self.dense if self.left is None else self.left
        assert found is not None
        return found.device

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of `matrix`, without multiplying the factors out."""
        if self.left is not None and self.right is not None:
            return self.left.shape[0], self.right.shape[0]
        assert self.dense is not None
        return tuple(self.dense.shape)

    def matrix(self) -> torch.Tensor:
        """The change as one fp32 tensor of the parameter's functional shape."""
        if self.left is not None and self.right is not None:
            return self.left @ self.right.T
        assert self.dense is not None
        return self.dense

    def on_cpu(self) -> WeightDelta:
        """The same change with its tensors on the CPU; itself if they are there."""
        names = ("left", "right", "dense", "keys")
        moved = {n: t.cpu() for n in names if (t := getattr(self, n)) is not None and t.device.type != "cpu"}
        return replace(self, **moved) if moved else self

    def finite(self) -> bool:
        """Whether every number in it is finite."""
        parts = [t for t in (self.left, self.right, self.dense, self.keys) if t is not None]
        return all(bool(torch.isfinite(t).all()) for t in parts)


@dataclass
class Piece:
    """One delta on one parameter, with the ids of the edits that own it.

    A piece that is kept has its tensors on the CPU, beside the original: an accelerator holds the edited weight and
    nothing else of an edit, however many there are. ``columns`` gives the owner of each column of the factors;
    ``None`` means that ``members`` own it jointly.
    """

    batch_id: str
    delta: WeightDelta
    members: tuple[str, ...]
    columns: tuple[str, ...] | None

    def without(self, edit_ids: set[str]) -> Piece | None:
        """Return the piece without some edits, or ``None`` if nothing is left of it."""
        left = tuple(m for m in self.members if m not in edit_ids)
        if left == self.members:
            return self
        if not left:
            return None
        if self.columns is None:
            raise RollbackError(
                f"the edits {', '.join(self.members)} were computed together as one change and cannot be taken apart:"
                " roll all of them back, then edit again without the ones you do not want"
            )
        keep = [i for i, owner in enumerate(self.columns) if owner not in edit_ids]
        assert self.delta.left is not None and self.delta.right is not None
        delta = replace(
            self.delta,
            left=self.delta.left[:, keep],
            right=self.delta.right[:, keep],
            keys=None if self.delta.keys is None else self.delta.keys[:, keep],
            owners=None,
        )
        return Piece(self.batch_id, delta, left, tuple(self.columns[i] for i in keep))


def check_order(pieces: Sequence[Piece], edit_ids: set[str]) -> None:
    """Raise `RollbackError` if a piece that would stay corrects one that would go."""
    going: list[str] = []
    for piece in pieces:
        if going and piece.delta.builds_on and not set(piece.members) <= edit_ids:
            raise RollbackError(
                f"the edit {piece.members[0]} was computed as a correction of {', '.join(dict.fromkeys(going))}, which"
                " can only be undone together with everything that came after: roll back the last edits up to it"
                " (rollback(n)), then make the ones you want to keep again"
            )
        going.extend(m for m in piece.members if m in edit_ids)


@dataclass
class Account:
    """Everything known of one parameter: its untouched original and the pieces on top of it."""

    module: str
    name: str
    original: torch.Tensor
    pieces: list[Piece] = field(default_factory=list)
    total: torch.Tensor | None = None

    @property
    def key(self) -> str:
        """Full name of the parameter."""
        return f"{self.module}.{self.name}"

    def value(self, total: torch.Tensor | None) -> torch.Tensor:
        """The weight under a total change, in the original's dtype."""
        if total is None:
            return self.original
        return (self.original.float() + total.to(self.original.device)).to(self.original.dtype)

    def adding(self, pieces: Sequence[Piece]) -> Account:
        """The account with further pieces behind those that it has.

        They are multiplied out where they are, which may be an accelerator, and kept on the CPU.
        """
        kept = [replace(piece, delta=piece.delta.on_cpu()) for piece in pieces]
        return replace(self, pieces=[*self.pieces, *kept], total=fold(pieces, self.total))

    def without(self, edit_ids: set[str]) -> Account:
        """The account without the pieces of some edits; itself if it has none of them.

        Raises:
            RollbackError: if what stays was computed together with these edits, or on them.
        """
        check_order(self.pieces, edit_ids)
        kept = [p for p in (piece.without(edit_ids) for piece in self.pieces) if p is not None]
        if len(kept) == len(self.pieces) and all(a is b for a, b in zip(kept, self.pieces, strict=True)):
            return self
        return replace(self, pieces=kept, total=fold(kept))


def fold(pieces: Sequence[Piece], start: torch.Tensor | None = None) -> torch.Tensor | None:
    """Sum the pieces in order, in fp32 on the CPU; ``None`` for no piece."""
    total = start
    for piece in pieces:
        change = piece.delta.matrix().to("cpu")
        total = change.clone() if total is None else total + change
    return total

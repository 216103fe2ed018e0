"""The ledger: which deltas lie on which weights, and the untouched originals beneath them.

A weight in the model is always ``cast(original + Σ active deltas)``, summed in fp32 in the order in which the
deltas came. So no rounding accumulates over edits, taking everything back gives the original bits, and taking
back one edit of many is well defined. Every change is a transaction: all weights are written, or none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from ..errors import NonFiniteError, RollbackError, TiedWeightError, UnknownEditError, WeightError
from .weights import get_module, get_weight, is_quantised, set_weight, stored_weight, tied_names, uninterrupted

if TYPE_CHECKING:
    from torch import nn


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
    """

    module: str
    name: str = "weight"
    left: torch.Tensor | None = None
    right: torch.Tensor | None = None
    dense: torch.Tensor | None = None
    owners: tuple[int, ...] | None = None
    keys: torch.Tensor | None = None

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

    def finite(self) -> bool:
        """Whether every number in it is finite."""
        parts = [t for t in (self.left, self.right, self.dense, self.keys) if t is not None]
        return all(bool(torch.isfinite(t).all()) for t in parts)


@dataclass
class Piece:
    """One delta on one parameter, with the ids of the edits that own it.

    ``columns`` gives the owner of each column of the factors; ``None`` means that ``members`` own it jointly.
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


@dataclass
class Account:
    """Everything known of one parameter: its untouched original and the pieces on top of it."""

    module: str
    name: str
    original: torch.Tensor
    pieces: list[Piece] = field(default_factory=list)
    total: torch.Tensor | None = None

    def value(self, total: torch.Tensor | None) -> torch.Tensor:
        """The weight under a total change, in the original's dtype."""
        if total is None:
            return self.original
        return (self.original.float() + total.to(self.original.device)).to(self.original.dtype)


def fold(pieces: Sequence[Piece], start: torch.Tensor | None = None) -> torch.Tensor | None:
    """Sum the pieces in order, in fp32 on the CPU; ``None`` for no piece."""
    total = start
    for piece in pieces:
        change = piece.delta.matrix().to("cpu")
        total = change.clone() if total is None else total + change
    return total


class Ledger:
    """Applies, undoes and remembers weight deltas of one model.

    Args:
        model: the transformers model whose weights are edited in place.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.accounts: dict[str, Account] = {}
        self._tied = tied_names(model)
        self._disabled = 0
        self._parked: dict[str, torch.Tensor] = {}

    # ------------------------------------------------------------------ questions

    @property
    def edit_ids(self) -> list[str]:
        """Ids of all edits that own a piece, in the order in which they came."""
        seen: dict[str, None] = {}
        for account in self.accounts.values():
            for piece in account.pieces:
                seen.update(dict.fromkeys(piece.members))
        return list(seen)

    def original(self, module: str, name: str = "weight") -> torch.Tensor:
        """The unedited parameter in functional orientation (a copy), whether it was edited or not."""
        account = self.accounts.get(f"{module}.{name}")
        return account.original.clone() if account else get_weight(get_module(self.model, module), name)

    def total(self, module: str, name: str = "weight") -> torch.Tensor | None:
        """Sum of the active deltas on a parameter, fp32 on the CPU; ``None`` if it is unedited."""
        account = self.accounts.get(f"{module}.{name}")
        return None if account is None or account.total is None else account.total.clone()

    def keys(self, module: str, name: str = "weight") -> torch.Tensor | None:
        """The keys that the active deltas on a parameter brought along, ``[d_in, n]`` fp32; ``None`` for none."""
        account = self.accounts.get(f"{module}.{name}")
        found = [p.delta.keys for p in account.pieces if p.delta.keys is not None] if account else []
        return torch.cat([k.to("cpu") for k in found], dim=1) if found else None

    def check_editable(self, module: str, name: str = "weight") -> None:
        """Raise if the parameter must not be written.

        Raises:
            WeightError: if it is missing or quantised.
            TiedWeightError: if another module shares it.
            NonFiniteError: if it already holds NaN or infinity.
        """
        owner = get_module(self.model, module)
        if is_quantised(owner, name):
            raise WeightError(
                f"{module}.{name} is quantised; an edit added to it would be rounded away."
                " Load the base model without quantisation to edit its weights."
            )
        others = self._tied.get(f"{module}.{name}")
        if others:
            raise TiedWeightError(
                f"{module}.{name} is the same tensor as {', '.join(others)}: editing it would change both."
                " Choose another module, or untie them first"
                " (config.tie_word_embeddings=False and a copied parameter)."
            )
        if not bool(torch.isfinite(stored_weight(owner, name)).all()):
            raise NonFiniteError(
                f"{module}.{name} of the base model holds NaN or infinity; reload the model before editing"
            )

    # ------------------------------------------------------------------ changes

    def apply(self, batch_id: str, deltas: Sequence[WeightDelta], edit_ids: Sequence[str]) -> None:
        """Put deltas on the weights, all of them or none.

        Args:
            batch_id: name of the computation that produced them.
            deltas: what a method returned; ``owners`` index into ``edit_ids``.
            edit_ids: ids of the edits of this batch.

        Raises:
            NonFiniteError: if a delta is not finite.
            WeightError: if a parameter is missing, quantised, tied or of another shape.
        """
        if self._disabled:
            raise WeightError("edits are switched off (disable_edits); leave that block before editing")
        pieces: dict[str, list[Piece]] = {}
        for delta in deltas:
            if not delta.finite():
                raise NonFiniteError(f"the update of {delta.key} holds NaN or infinity; nothing was changed")
            columns = None if delta.owners is None else tuple(edit_ids[i] for i in delta.owners)
            members = tuple(edit_ids) if columns is None else tuple(dict.fromkeys(columns))
            pieces.setdefault(delta.key, []).append(Piece(batch_id, delta, members, columns))
        accounts = dict(self.accounts)
        for key, new in pieces.items():
            account = accounts.get(key)
            if account is None:
                module, name = new[0].delta.module, new[0].delta.name
                self.check_editable(module, name)
                account = Account(module, name, get_weight(get_module(self.model, module), name).to("cpu"))
            for piece in new:
                if piece.delta.shape != tuple(account.original.shape):
                    raise WeightError(
                        f"the update of {key} has shape {piece.delta.shape},"
                        f" the weight {tuple(account.original.shape)}"
                    )
            accounts[key] = replace(account, pieces=[*account.pieces, *new], total=fold(new, account.total))
        self._commit(accounts, list(pieces))

    def remove(self, edit_ids: Sequence[str]) -> None:
        """Take edits back. Weights that no edit is left on get their original bits.

        Raises:
            RollbackError: if an edit cannot be separated from others that were computed with it.
            UnknownEditError: if an id owns nothing here.
        """
        if self._disabled:
            raise WeightError("edits are switched off (disable_edits); leave that block before rolling back")
        gone = set(edit_ids)
        unknown = gone - set(self.edit_ids)
        if unknown:
            raise UnknownEditError(f"the ledger holds nothing of {', '.join(sorted(unknown))}")
        accounts: dict[str, Account] = {}
        touched = []
        for key, account in self.accounts.items():
            kept = [p for p in (piece.without(gone) for piece in account.pieces) if p is not None]
            if len(kept) == len(account.pieces) and all(a is b for a, b in zip(kept, account.pieces, strict=True)):
                accounts[key] = account
                continue
            touched.append(key)
            accounts[key] = replace(account, pieces=kept, total=fold(kept))
        self._commit(accounts, touched)

    def _commit(self, accounts: dict[str, Account], touched: Sequence[str]) -> None:
        """Write the touched weights and take over the new state; on any failure everything is put back."""
        values = {key: accounts[key].value(accounts[key].total) for key in touched}
        before = {key: get_weight(get_module(self.model, accounts[key].module), accounts[key].name) for key in touched}
        with uninterrupted():
            try:
                for key in touched:
                    set_weight(get_module(self.model, accounts[key].module), values[key], accounts[key].name)
            except BaseException:
                for key in touched:
                    set_weight(get_module(self.model, accounts[key].module), before[key], accounts[key].name)
                raise
            self.accounts = {k: a for k, a in accounts.items() if a.pieces}

    def snapshot(self) -> dict[str, Account]:
        """The present state, for `restore`."""
        return dict(self.accounts)

    def restore(self, snapshot: dict[str, Account]) -> None:
        """Return to an earlier state: weights and records."""
        keys = [k for k in {**snapshot, **self.accounts} if snapshot.get(k) is not self.accounts.get(k)]
        accounts = {k: snapshot.get(k) or replace(self.accounts[k], pieces=[], total=None) for k in keys}
        self._commit({**snapshot, **accounts}, keys)

    # ------------------------------------------------------------------ temporary states

    @contextlib.contextmanager
    def provisional(self) -> Iterator[Provisional]:
        """Lay deltas on the weights for measuring, and take them off again whatever happens.

        Yields:
            An object with ``add(delta)``; later deltas are measured with the earlier ones in place.
        """
        scope = Provisional(self)
        try:
            yield scope
        finally:
            scope.restore()

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """The original weights, bit for bit, inside the block; the edited ones again, bit for bit, behind it."""
        self._disabled += 1
        try:
            if self._disabled == 1:
                self._parked = {
                    key: get_weight(get_module(self.model, a.module), a.name).to("cpu")
                    for key, a in self.accounts.items()
                }
                self._write({key: a.original for key, a in self.accounts.items()})
            yield
        finally:
            self._disabled -= 1
            if self._disabled == 0:
                self._write(self._parked)
                self._parked = {}

    def _write(self, values: dict[str, torch.Tensor]) -> None:
        with uninterrupted():
            for key, value in values.items():
                account = self.accounts[key]
                set_weight(get_module(self.model, account.module), value, account.name)

    def forget(self) -> None:
        """Drop all records and leave the weights as they are (after merging)."""
        self.accounts = {}


class Provisional:
    """Deltas that lie on the weights for the duration of a ``with`` block."""

    def __init__(self, ledger: Ledger):
        self._ledger = ledger
        self._saved: dict[str, tuple[str, str, torch.Tensor]] = {}
        self._totals: dict[str, torch.Tensor | None] = {}

    def add(self, delta: WeightDelta) -> None:
        """Lay one more delta on its weight, exactly as `Ledger.apply` would."""
        ledger, key = self._ledger, delta.key
        account = ledger.accounts.get(key)
        module = get_module(ledger.model, delta.module)
        if key not in self._saved:
            self._saved[key] = (delta.module, delta.name, get_weight(module, delta.name))
            self._totals[key] = account.total if account else None
        if account is None:
            account = Account(delta.module, delta.name, self._saved[key][2].to("cpu"))
        total = self._totals[key]
        change = delta.matrix().to("cpu")
        self._totals[key] = change.clone() if total is None else total + change
        set_weight(module, account.value(self._totals[key]), delta.name)

    def restore(self) -> None:
        """Put back the weights as they were when the block began."""
        with uninterrupted():
            for module, name, value in self._saved.values():
                set_weight(get_module(self._ledger.model, module), value, name)
        self._saved = {}

"""The ledger: which deltas lie on which weights, and the untouched originals beneath them.

A weight in the model is always ``cast(original + Σ active deltas)``, summed in fp32 in the order in which the
deltas came. So no rounding accumulates over edits, taking everything back gives the original bits, and taking
back one edit of many is well defined. Every change is a transaction: all weights are written, or none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ..errors import NonFiniteError, TiedWeightError, WeightError
from .books import Saved, check_known
from .deltas import Account, Piece, WeightDelta, fold
from .experts import parameter_name
from .ledger_files import describe_accounts, read_accounts, tensors_of
from .weights import get_module, get_weight, is_quantised, set_weight, stored_weight, tied_names, uninterrupted

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Account", "Ledger", "Piece", "Provisional", "WeightDelta", "fold"]


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

    def modules_of(self, edit_ids: Sequence[str]) -> list[str]:
        """Modules whose weights these edits have changed."""
        wanted = set(edit_ids)
        accounts = self.accounts.values()
        return [a.module for a in accounts if any(not wanted.isdisjoint(p.members) for p in a.pieces)]

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
        others = self._tied.get(parameter_name(module, name))
        if others:
            raise TiedWeightError(
                f"{module}.{name} is the same tensor as {', '.join(others)}: editing it would change both."
                " Choose another module, or give the head a weight of its own before the model is wrapped:"
                " hf_kedit.untie_head(model)."
            )
        if not bool(torch.isfinite(stored_weight(owner, name)).all()):
            raise NonFiniteError(
                f"{module}.{name} of the base model holds NaN or infinity; reload the model before editing"
            )

    def check_unchanged(self) -> None:
        """Raise if an edited weight was written by somebody else since, which writing it again would undo.

        Raises:
            WeightError: naming the weight.
        """
        for key, account in self.accounts.items() if not self._disabled else ():
            now = get_weight(get_module(self.model, account.module), account.name).to("cpu")
            if not torch.equal(now, account.value(account.total).to("cpu")):
                raise WeightError(
                    f"{key} is no longer what the edits made of it (was the model trained since?), and what happened"
                    " to it would be lost. Make the edits permanent before training, with merge_and_unload()."
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
            WeightError: if a parameter is missing, quantised, tied or of another shape, or `check_unchanged` fails.
        """
        if self._disabled:
            raise WeightError("edits are switched off (disable_edits); leave that block before editing")
        self.check_unchanged()
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
            accounts[key] = account.adding(new)
        self._commit(accounts, list(pieces))

    def remove(self, edit_ids: Sequence[str]) -> None:
        """Take edits back. Weights that no edit is left on get their original bits.

        Raises:
            RollbackError: if an edit cannot be separated from others that were computed with it or on it.
            UnknownEditError: if an id owns nothing here.
            WeightError: if `check_unchanged` fails.
        """
        if self._disabled:
            raise WeightError("edits are switched off (disable_edits); leave that block before rolling back")
        self.check_unchanged()
        gone = set(edit_ids)
        check_known("the ledger", self.edit_ids, gone)
        accounts = {key: account.without(gone) for key, account in self.accounts.items()}
        touched = [key for key, account in self.accounts.items() if accounts[key] is not account]
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

    # ------------------------------------------------------------------ being a book

    def check_mergeable(self) -> None:
        """Deltas lie in the weights already."""

    def forget(self) -> None:
        """Drop all records and leave the weights as they are (after merging)."""
        self.accounts = {}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Factors and dense deltas by name, fp32 on the CPU."""
        return tensors_of(self.accounts)

    def describe(self) -> dict[str, Any]:
        """Which delta lies where, and the fingerprints of the untouched weights."""
        return describe_accounts(self.model, self.accounts)

    def read(self, saved: Saved) -> tuple[dict[str, Account], frozenset[str]]:
        """Check a saved edit and return its accounts, and the ids of their edits; no weight is touched.

        Raises:
            ArtifactError: if something is missing or does not fit.
            BaseModelMismatchError: if the base model is another one.
        """
        accounts = read_accounts(self.model, saved)
        return accounts, frozenset(m for a in accounts.values() for p in a.pieces for m in p.members)


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

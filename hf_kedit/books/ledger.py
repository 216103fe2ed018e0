"""The ledger: which deltas lie on which weights, and the untouched originals beneath them.

A weight in the model is always ``cast(original + Σ active deltas)``, summed in fp32 in the order in which the
deltas came. So no rounding accumulates over edits, taking everything back gives the original bits, and taking
back one edit of many is well defined. Every change is a transaction: all weights are written, or none.

A quantised weight stays as it is, and ``Σ`` runs beside it (`engine.beside`); all else is the same.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..anatomy.switching import Switch, switched, uninterrupted
from ..engine.experts import ExpertSlice, parameter_name
from ..engine.weights import (
    get_module,
    get_weight,
    is_quantised,
    is_transposed,
    model_fingerprint,
    set_weight,
    stored_weight,
    tied_names,
)
from ..errors import MergeError, NonFiniteError, TiedWeightError, WeightError
from ..logging import get_logger
from .beside import Beside, Change
from .book import Saved, check_known
from .deltas import Account, Piece, WeightDelta, fold
from .ledger_files import describe_accounts, read_accounts, tensors_of

__all__ = ["Account", "Ledger", "Piece", "Provisional", "WeightDelta", "fold"]

logger = get_logger(__name__)
LOSSY = 0.05
"""Share of a change that may be lost by rounding before merging warns."""
State = torch.Tensor | Change | None
"""What a parameter shows: its value; for a quantised one, what runs beside it."""


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
        self._parked: dict[str, State] = {}
        self._measured: dict[str, Account] = {}  # unedited parameters that carry provisional deltas
        self._beside = Beside()

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
        account = self._touched.get(f"{module}.{name}")
        return account.original.clone() if account else get_weight(get_module(self.model, module), name)

    def base_fingerprint(self) -> str:
        """`model_fingerprint` of the model without edits, from the originals; the model is not touched."""
        stored: dict[str, torch.Tensor] = {}
        for account in self._touched.values():
            owner, name = get_module(self.model, account.module), parameter_name(account.module, account.name)
            value = account.original
            if self._is_quantised(account):
                continue  # such a weight is never written
            if value.dim() == 2 and is_transposed(owner):
                value = value.t()
            if isinstance(owner, ExpertSlice):
                bank = stored.setdefault(name, stored_weight(owner.bank, owner.param).clone())
                bank[owner.index] = value.to(bank.device)
            else:
                stored[name] = value
        return model_fingerprint(self.model, stored)

    @property
    def _touched(self) -> dict[str, Account]:
        """The accounts of all parameters that do not show their original, provisional deltas included."""
        return {**self._measured, **self.accounts}

    @property
    def is_disabled(self) -> bool:
        """Whether this is inside `disabled`."""
        return self._disabled > 0

    @property
    def runs_beside(self) -> bool:
        """Whether some of the edits run beside weights instead of lying in them."""
        return bool(self._beside)

    def total(self, module: str, name: str = "weight") -> torch.Tensor | None:
        """Sum of the active deltas on a parameter, fp32 on the CPU; ``None`` if it is unedited."""
        account = self.accounts.get(f"{module}.{name}")
        return None if account is None or account.total is None else account.total.clone()

    def keys(self, module: str, name: str = "weight") -> torch.Tensor | None:
        """The keys that the active deltas on a parameter brought along, ``[d_in, n]`` fp32; ``None`` for none."""
        account = self.accounts.get(f"{module}.{name}")
        found = [p.delta.keys for p in account.pieces if p.delta.keys is not None] if account else []
        return torch.cat(found, dim=1) if found else None

    def modules_of(self, edit_ids: Sequence[str]) -> list[str]:
        """Modules whose weights these edits have changed."""
        wanted = set(edit_ids)
        accounts = self.accounts.values()
        return [a.module for a in accounts if any(not wanted.isdisjoint(p.members) for p in a.pieces)]

    def check_editable(self, module: str, name: str = "weight") -> None:
        """Raise if the parameter must not be written.

        Raises:
            WeightError: if it is missing, or quantised in a way that cannot be read.
            TiedWeightError: if another module shares it.
            NonFiniteError: if it already holds NaN or infinity.
        """
        owner = get_module(self.model, module)
        if is_quantised(owner, name) and (name != "weight" or not isinstance(owner, nn.Linear)):
            raise WeightError(
                f"{module}.{name} is quantised, and nothing can run beside it: that takes the weight of a linear"
                " layer. Load the base model without quantisation to edit it."
            )
        others = self._tied.get(parameter_name(module, name))
        if others:
            raise TiedWeightError(
                f"{module}.{name} is the same tensor as {', '.join(others)}: editing it would change both."
                " Choose another module, or give the head a weight of its own: untie=True, for EditableModel(...)"
                " and from_pretrained(...), or --untie on the command line."
            )
        if not bool(torch.isfinite(stored_weight(owner, name)).all()):
            raise NonFiniteError(
                f"{module}.{name} of the base model holds NaN or infinity; reload the model before editing"
            )

    def new_account(self, module: str, name: str) -> Account:
        """An account without pieces for a parameter that carries no edit."""
        known = self._measured.get(f"{module}.{name}")
        return known or Account(module, name, get_weight(get_module(self.model, module), name).to("cpu"))

    def check_unchanged(self) -> None:
        """Raise if an edited weight was written by somebody else since, which writing it again would undo.

        Raises:
            WeightError: naming the weight.
        """
        if self._disabled:
            return
        for key, account in self.accounts.items():
            if self._is_quantised(account):
                continue
            now = get_weight(get_module(self.model, account.module), account.name).to("cpu")
            made = account.value(account.total).to("cpu")
            if not torch.equal(now, made):
                if now.dtype != made.dtype:
                    raise WeightError(
                        f"{key} was cast from {made.dtype} to {now.dtype} since it was edited, which rounds what the"
                        f" edits made of it. Save the edits before a cast and load them with dtype={now.dtype},"
                        " ignore_fingerprint=True; or make them permanent, with merge_and_unload()."
                    )
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
            WeightError: if a parameter is missing, cannot be read, tied or of another shape, or `check_unchanged`
                fails.
        """
        pieces = self._pieces(batch_id, deltas, edit_ids)
        accounts = {**self.accounts, **{key: self._account(key, new).adding(new) for key, new in pieces.items()}}
        self._commit(accounts, list(pieces))

    def exchange(
        self, gone: Sequence[str], batch_id: str, deltas: Sequence[WeightDelta], edit_ids: Sequence[str]
    ) -> None:
        """Put deltas in the place of edits, in one transaction.

        They come before everything else that lies on a weight, so that the bits depend on what is there and not on
        how often a set was solved again.

        Args:
            gone: ids of the edits that go; none of them has to be known.
            batch_id: as for `apply`, like the others.
            deltas: what takes their place.
            edit_ids: ids of the edits of this batch.

        Raises:
            RollbackError: if an edit cannot be separated from others that were computed with it or on it.
            NonFiniteError: if a delta is not finite.
            WeightError: as for `apply`.
        """
        pieces = self._pieces(batch_id, deltas, edit_ids)
        accounts = {key: account.without(set(gone)) for key, account in self.accounts.items()}
        touched = {key for key, account in self.accounts.items() if accounts[key] is not account} | set(pieces)
        for key, new in pieces.items():
            everything = [*new, *(accounts[key].pieces if key in accounts else ())]
            accounts[key] = replace(self._account(key, new), pieces=everything, total=fold(everything))
        self._commit(accounts, sorted(touched))

    def _pieces(self, batch_id: str, deltas: Sequence[WeightDelta], edit_ids: Sequence[str]) -> dict[str, list[Piece]]:
        """What deltas become in the accounts, once everything that can be wrong with them was checked."""
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
        return pieces

    def _account(self, key: str, pieces: Sequence[Piece]) -> Account:
        """The account that pieces go to, a new one if there is none, after a look at their shapes."""
        account = self.accounts.get(key)
        if account is None:
            module, name = pieces[0].delta.module, pieces[0].delta.name
            self.check_editable(module, name)
            account = self.new_account(module, name)
        for piece in pieces:
            if piece.delta.shape != tuple(account.original.shape):
                raise WeightError(
                    f"the update of {key} has shape {piece.delta.shape}, the weight {tuple(account.original.shape)}"
                )
        return account

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
        """Write the touched weights and take over the new state; on any failure everything is put back.

        Raises:
            NonFiniteError: if a weight would hold NaN or infinity: finite factors may have a product that is not, and
                a finite sum may be beyond the weight's own number format.
        """
        values = {key: self._state_of(accounts[key]) for key in touched}
        for key, value in values.items():
            numbers = value if isinstance(value, torch.Tensor) else accounts[key].total
            if numbers is not None and not bool(torch.isfinite(numbers).all()):
                raise NonFiniteError(f"{key} would hold NaN or infinity ({numbers.dtype}); nothing was changed")
        before = {key: self._seen(accounts[key]) for key in touched}
        with uninterrupted():
            try:
                for key in touched:
                    self._show(accounts[key], values[key])
            except BaseException:
                for key in touched:
                    self._show(accounts[key], before[key])
                raise
            self.accounts = {k: a for k, a in accounts.items() if a.pieces}

    # ------------------------------------------------------------------ weights, and what runs beside them

    def _state_of(self, account: Account, provisional: Sequence[WeightDelta] = ()) -> State:
        """What an account wants to be seen, with further deltas on top of its own."""
        if self._is_quantised(account):
            deltas = [*(piece.delta for piece in account.pieces), *provisional]
            return Change(deltas) if deltas else None
        total = account.total
        for delta in provisional:
            change = delta.matrix().to("cpu")
            total = change if total is None else total + change
        return account.value(total)

    def _seen(self, account: Account) -> State:
        """What is there now."""
        if self._is_quantised(account):
            return self._beside.shown(account.key)
        return get_weight(get_module(self.model, account.module), account.name)

    def _show(self, account: Account, state: State) -> None:
        """Make a state what is there."""
        owner = get_module(self.model, account.module)
        if isinstance(state, torch.Tensor):
            set_weight(owner, state, account.name)
        else:
            self._beside.show(account.key, owner, state)

    def _is_quantised(self, account: Account) -> bool:
        return is_quantised(get_module(self.model, account.module), account.name)

    def snapshot(self) -> dict[str, Account]:
        """The present state, for `restore`."""
        return dict(self.accounts)

    def restore(self, snapshot: dict[str, Account]) -> None:
        """Return to an earlier state: weights and records."""
        keys = [k for k in {**snapshot, **self.accounts} if snapshot.get(k) is not self.accounts.get(k)]
        if keys and self._disabled:
            raise WeightError("edits are switched off (disable_edits); leave that block before changing them")
        accounts = {k: snapshot.get(k) or replace(self.accounts[k], pieces=[], total=None) for k in keys}
        self._commit({**snapshot, **accounts}, keys)

    # ------------------------------------------------------------------ temporary states

    def provisional(self) -> Provisional:
        """Lay deltas on the weights for measuring, and take them off again whatever happens.

        Returns:
            For ``with``: an object with ``add(delta)``; later deltas are measured with the earlier ones in place.
        """
        return Provisional(self)

    def emptied(self) -> Switch[None]:
        """The original weights inside the block, and a ledger that knows of no edit: what is measured, and what a
        method takes for the model's edits, is then a matter of the block alone. Everything is back behind it."""
        before = self.snapshot()
        return switched(lambda: self.restore({}), lambda: self.restore(before))

    def disabled(self) -> Switch[None]:
        """The original weights, bit for bit, inside the block; the edited ones again, bit for bit, behind it."""
        return switched(self._switch_off, self._switch_on)

    def _switch_off(self) -> None:
        self._disabled += 1
        if self._disabled > 1:
            return
        touched = self._touched
        seen = {key: self._seen(a) for key, a in touched.items()}
        self._parked = {k: s.to("cpu") if isinstance(s, torch.Tensor) else s for k, s in seen.items()}
        for account in touched.values():
            self._show(account, self._state_of(replace(account, pieces=[], total=None)))

    def _switch_on(self) -> None:
        self._disabled -= 1
        if self._disabled:
            return
        for key, state in self._parked.items():
            self._show(self._touched[key], state)
        self._parked = {}

    # ------------------------------------------------------------------ being a book

    def check_mergeable(self) -> None:
        """Deltas lie in the weights already, unless these are quantised.

        Raises:
            MergeError: naming the ways out.
        """
        if self._disabled:
            raise MergeError("edits are switched off (disable_edits); leave that block before merging them")
        if self._beside:
            raise MergeError(
                "the base model is quantised, so that its edits run beside the weights and cannot be merged into them"
                " without being rounded away. Keep them beside it: save_pretrained(...), or export_lora(...) for PEFT."
                " Or merge them into the unquantised base: from_pretrained(saved_edits, base_model=<the unquantised"
                " model>, ignore_fingerprint=True).merge_and_unload(), or `kedit merge DIR --base MODEL -o OUT`."
            )

    def rounding_losses(self, dtype: torch.dtype | None = None) -> dict[str, float]:
        """What rounding loses of the edits in every edited weight: ``‖cast(W + Δ) − W − Δ‖ / ‖Δ‖``.

        Args:
            dtype: number format that the weights are to be written in; ``None``: the one they have.
        """
        losses = {}
        for key, account in self.accounts.items():
            if account.total is None or self._is_quantised(account):
                continue
            exact = account.original.float() + account.total
            rounded = exact.to(dtype or account.original.dtype).float()
            norm = account.total.norm().item()
            losses[key] = (rounded - exact).norm().item() / norm if norm else 0.0
        return losses

    def warn_of_rounding(self) -> None:
        """Log what rounding has lost of the edits."""
        for key, loss in self.rounding_losses().items():
            level = logging.WARNING if loss > LOSSY else logging.INFO
            logger.log(level, "%s: rounding to its number format loses %.2g %% of the change", key, 100 * loss)

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
        accounts = read_accounts(self.model, saved, self.original)
        return accounts, frozenset(m for a in accounts.values() for p in a.pieces for m in p.members)


class Provisional(Switch["Provisional"]):
    """Deltas that lie on the weights for the duration of a ``with`` block."""

    def __init__(self, ledger: Ledger):
        self._ledger = ledger
        self._saved: dict[str, tuple[Account, State]] = {}
        self._deltas: dict[str, list[WeightDelta]] = {}
        self._first: list[str] = []  # keys of the ledger's notes that are ours

    def add(self, delta: WeightDelta) -> None:
        """Lay one more delta on its weight, exactly as `Ledger.apply` would."""
        ledger, key = self._ledger, delta.key
        if key not in self._saved:
            account = ledger.accounts.get(key) or ledger.new_account(delta.module, delta.name)
            self._saved[key] = (account, ledger._seen(account))
            if key not in ledger._touched:
                ledger._measured[key] = account
                self._first.append(key)
        account = self._saved[key][0]
        self._deltas.setdefault(key, []).append(delta)
        state = ledger._state_of(account, self._deltas[key])
        with uninterrupted():
            ledger._show(account, state)

    def put(self, delta: WeightDelta) -> None:
        """Lay a delta on its weight in the place of those that the block has laid there before."""
        self._deltas.pop(delta.key, None)
        self.add(delta)

    def change(self) -> Provisional:
        """Nothing lies on the weights yet."""
        return self

    def put_back(self, failed: bool) -> None:
        """Show the weights as they were when the block began."""
        for account, state in self._saved.values():
            self._ledger._show(account, state)
        for key in self._first:
            self._ledger._measured.pop(key, None)
        self._saved, self._deltas, self._first = {}, {}, []

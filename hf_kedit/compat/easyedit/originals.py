"""The weights before the edits, as EasyEdit's scripts hold them, and as they put them back."""

from __future__ import annotations

import torch

from ...engine.weights import get_module, get_weight, is_quantised, is_transposed, set_weight
from ...model import EditableModel


class Originals(dict[str, torch.Tensor]):
    """The weights before the edits, by parameter name, as they are stored. Called, it undoes what the model carries,
    which EasyEdit offers for the methods that change no weights."""

    def __init__(self, model: EditableModel):
        super().__init__()
        self._model = model
        for key, account in model.ledger.accounts.items():
            owner, value = get_module(model.base_model, account.module), account.original
            turned = value.dim() == 2 and is_transposed(owner)
            self[key] = (value.t() if turned else value).clone()

    def __call__(self) -> None:
        """Undo all edits of the model."""
        self._model.rollback("all")


def accept_restored(model: EditableModel) -> None:
    """Forget the edits of weights that a script has put back by copying the originals into the parameters.

    That is how EasyEdit's scripts undo an edit. The books would otherwise refuse a weight that is not what they left.
    """
    accounts = list(model.ledger.accounts.values())
    places = [(get_module(model.base_model, account.module), account) for account in accounts]
    if not accounts or any(is_quantised(owner, account.name) for owner, account in places):
        return
    if all(torch.equal(get_weight(owner, account.name).cpu(), account.original) for owner, account in places):
        for owner, account in places:
            set_weight(owner, account.value(account.total), account.name)
        model.rollback(model.ledger.edit_ids)

"""Edits of several people on one model in memory: each sees their own, and nobody else's.

A model has one set of weights, so that two people's edits cannot both lie on it. What an edit is, though, is kept
beside the model: the books hold deltas and memories, never a copy of the weights, and can be returned to any state
that they were in, bit for bit (`Book.restore`). So everybody's edits are such a state. It is laid on the model when
that person's call begins and taken off when it ends, under the model's lock, and between calls the model is what it
was before. Laying on writes the matrices that the person has edited, nothing else; what it costs does not depend on
the number of people.

The alternatives are worse: a model for everybody costs its memory each time, and edits that are told apart row by row
(as `auto` does with prompts) exist for some methods only.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from ..anatomy.switching import Switch, uninterrupted
from ..books.book import Book, remove_from, restore_all, snapshot_all
from ..journal import Edit, Journal

if TYPE_CHECKING:
    import torch

    from ..config import EditConfig
    from ..decoding import Decoding
    from ..methods.base import Method
    from .verbs import Editing


@dataclass(frozen=True)
class EditsState:
    """All that belongs to a model's edits; nothing of it is written to once it is here.

    What belongs to the unedited model (statistics, context templates, fingerprints) is everybody's and stays.
    """

    books: list[tuple[Book, Any]]
    journal: list[Edit]
    method: Method
    config: EditConfig
    learnt: dict[str, torch.Tensor]
    """State of the present method, which it may change while it edits."""
    states: dict[str, dict[str, torch.Tensor]]
    decoding: Decoding | None

    @classmethod
    def of(cls, model: Editing) -> Self:
        """How the model is now."""
        return cls(
            snapshot_all(model.books.values()),
            model.journal.as_list(),
            model._method,
            model.edit_config,
            model.method_state(),
            dict(model._states),
            model.decoding_config,
        )

    def put_on(self, model: Editing) -> None:
        """Make the model so."""
        with uninterrupted():
            restore_all(self.books)
            model.journal = Journal(self.journal)
            model._method, model.edit_config = self.method, self.config
            model.restore_method_state(self.learnt)
            model._states = dict(self.states)
            model.decoding_config = self.decoding


class EditSession:
    """The edits of one person. It begins with those that the model carries when it is made.

    ``with session.inside() as model:`` is a block in which the model carries this session's edits and no others, and
    its verbs (`edit`, `rollback`, `set_method` …) act on them. Other threads wait meanwhile. Packs belong to the model
    and are not to be switched in a session.

    Args:
        model: the model, which may have any number of sessions.
    """

    def __init__(self, model: Editing):
        self.model = model
        with model.exclusive():
            self._state = EditsState.of(model)

    @property
    def edits(self) -> list[Edit]:
        """The journal of the session, oldest first."""
        return list(self._state.journal)

    def inside(self, without: Collection[str] = ()) -> Switch[Any]:
        """A block in which the model carries this session's edits.

        Args:
            without: ids of edits that are left out. What is changed inside such a block is forgotten behind it: it
                is for looking.

        Raises:
            RollbackError: if one of these edits cannot be taken apart from others.
            UnknownEditError: if the session has no such edit.
            ModelBusyError: see `EditableModel.exclusive`.
        """
        return _Inside(self, without)


class _Inside(Switch[Any]):
    """A session's edits on the model, for a block."""

    def __init__(self, session: EditSession, without: Collection[str]):
        self._session, self._without = session, without
        self._lock = session.model.exclusive()
        self._before: EditsState | None = None
        self._locked = self._complete = False

    def change(self) -> Editing:
        """Take the model and lay the edits on."""
        model = self._session.model
        self._lock.__enter__()
        self._locked = True
        self._before = EditsState.of(model)
        self._session._state.put_on(model)
        if self._without:
            ids = model.journal.select(list(self._without))
            remove_from(model.books.values(), ids)
            model.journal.drop(ids)
        self._complete = True
        return model

    def put_back(self, failed: bool) -> None:
        """Keep what the session has now, and return to what the model was.

        Also if the block has failed: what fails in it leaves the edits as they were, and what came before is kept.
        """
        model = self._session.model
        try:
            if self._before is not None:
                if self._complete and not self._without:
                    self._session._state = EditsState.of(model)
                self._before.put_on(model)
        finally:
            if self._locked:
                self._lock.__exit__(None, None, None)

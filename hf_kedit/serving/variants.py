"""One model in memory and several sets of edits for it: every caller is shown the one that it asks for.

A set of edits is what the model's books hold, whatever the kind: deltas, codebooks, prompts. Showing another one
means restoring the books to another state, which is what loading and undoing edits does, too; the weights are written
where the two differ, and nowhere else. Callers of one variant run beside one another. Callers of different ones take
turns, in the order in which they came, because there is one set of weights.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..anatomy.switching import uninterrupted
from ..artifact.packs import OnConflict
from ..artifact.reading import find_artifact, restore
from ..books.book import remove_from
from ..editing.sessions import EditsState
from ..errors import KeditError, PackError, ServeError, nearest
from ..journal import Edit, Journal
from ..model import EditableModel

UNEDITED = "base"
"""Name of the model without any edit."""
MOST_COMBINATIONS = 16
"""Combinations of packs of weights that are kept: each takes a sum for every weight that it changes."""
_PLUS = "+"
_GLANCE_SECONDS = 0.05  # after which somebody who waits looks whether the answer is still wanted


class NoLongerWantedError(KeditError):
    """Whoever asked has gone."""


@dataclass(eq=False)
class _Ticket:
    """Somebody who waits."""

    variant: str
    alone: bool


class Variants:
    """The variants of one model.

    Args:
        model: with the edits of the variant ``name``, if it carries any. Nobody else may change it from now on.
        name: of the model as it is.

    Raises:
        ServeError: for a name that cannot be one.
        WeightError: if somebody else has written to the edited weights.
    """

    def __init__(self, model: EditableModel, name: str):
        if not name.strip() or _PLUS in name or name == UNEDITED:
            raise ServeError(f"a model cannot be called {name!r}: give it a name without '+' that is not 'base'")
        if model.is_remote:
            raise ServeError("this model is behind an API; what can be served is a model in memory")
        self.model, self.name = model, name
        self._changed = threading.Condition()
        self._queue: list[_Ticket] = []
        self._running: list[_Ticket] = []
        self._shown: str | None = name
        self._states = {name: EditsState.of(model)}
        with model.exclusive(), uninterrupted():
            remove_from(model.books.values(), model.journal.select("all"))
            model.journal = Journal()
            model.set_decoding(None)
            self._states[UNEDITED] = EditsState.of(model)
            self._states[name].put_on(model)
        self._combinations: dict[str, EditsState] = {}
        self._packs: dict[str, str | None] = {}  # name → the variant that it is, or None if it can be added to others

    @property
    def names(self) -> list[str]:
        """What can be asked for; packs of weights also together (``base+one+two``)."""
        return [self.name, UNEDITED, *(f"{UNEDITED}{_PLUS}{pack}" for pack in self._packs)]

    def add_pack(
        self,
        name: str,
        source: str | Path,
        *,
        ignore_fingerprint: bool = False,
        on_conflict: OnConflict = "warn",
    ) -> None:
        """Make saved edits a variant, ``base+<name>``.

        Args:
            name: of the pack.
            source: folder or Hub id of saved edits of any kind, made on the same base model.
            ignore_fingerprint: take edits that were made on other weights.
            on_conflict: see `EditableModel.set_active`.

        Raises:
            ServeError: if the name is taken or cannot be one.
            PackError: if the source holds no saved edits.
            BaseModelMismatchError: if they were made on another model.
        """
        if not name.strip() or _PLUS in name or "/" in name or name in self._packs:
            raise ServeError(f"a pack needs a name of its own without '+' and '/', not {name!r}")
        artifact = find_artifact(str(source))
        if artifact is None:
            raise PackError(f"{str(source)!r} is a model, not a set of saved edits")
        described = artifact.config
        with self._turn(UNEDITED, alone=True):
            if set(described.get("books") or ()) <= {"weights"} and not described.get("decoding"):
                self.model.packs.load(
                    artifact, name, activate=False, on_conflict=on_conflict, ignore_fingerprint=ignore_fingerprint
                )
                self._packs[name] = None
                return
            variant = f"{UNEDITED}{_PLUS}{name}"
            with self.model.exclusive():
                try:
                    restore(artifact, self.model, ignore_fingerprint=ignore_fingerprint)
                    self._states[variant] = EditsState.of(self.model)
                finally:
                    self._states[UNEDITED].put_on(self.model)
            self._packs[name] = variant

    def find(self, wanted: str) -> str:
        """The variant of this name, which may be a combination of packs.

        Raises:
            ServeError: if there is none, naming the nearest; or if packs do not add up.
        """
        if wanted in self._states:
            return wanted
        first, *packs = wanted.split(_PLUS)
        unknown = next((pack for pack in packs if pack not in self._packs), None)
        if first != UNEDITED or not packs or unknown is not None:
            known = self.names
            raise ServeError(
                f"the model {wanted[:200]!r} does not exist.{nearest(wanted[:200], known)}"
                f" There is {', '.join(known)}.",
                status=404,
                param="model",
                code="model_not_found",
            )
        single = next((pack for pack in packs if self._packs[pack] is not None), None)
        if single is not None or len(set(packs)) < len(packs):
            why = (
                "a pack is named twice" if single is None else f"{single!r} holds edits that are no change of weights"
            )
            raise ServeError(f"{wanted!r}: {why}, and does not add up with others", param="model")
        return wanted

    def edits(self, variant: str) -> list[Edit]:
        """The edits that a variant carries, oldest first."""
        if variant in self._states:
            return list(self._states[variant].journal)
        return [edit for pack in variant.split(_PLUS)[1:] for edit in self.model.packs.edits(pack)]

    # ------------------------------------------------------------------ turns

    def showing(self, variant: str, gone: Callable[[], bool] = lambda: False) -> Any:
        """A block in which the model is this variant; others who want the same one are let in beside it.

        Args:
            variant: what `find` returned.
            gone: whether the answer is not wanted any more; looked at while waiting.

        Raises:
            NoLongerWantedError: on entering, if it is not.
        """
        return self._turn(variant, alone=False, gone=gone)

    @contextmanager
    def changing(self) -> Iterator[EditableModel]:
        """A block that changes the edits of the model itself (the variant `name`); nobody meets them meanwhile."""
        with self._turn(self.name, alone=True):
            try:
                yield self.model
            finally:
                self._states[self.name] = EditsState.of(self.model)

    @contextmanager
    def _turn(self, variant: str, *, alone: bool, gone: Callable[[], bool] = lambda: False) -> Iterator[None]:
        ticket = _Ticket(variant, alone)
        with self._changed:
            self._queue.append(ticket)
            try:
                while not self._has_turn(ticket):
                    self._changed.wait(_GLANCE_SECONDS)
                    if gone():
                        raise NoLongerWantedError("whoever asked has gone")
                self._show(variant)
                self._running.append(ticket)
            finally:
                self._queue.remove(ticket)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._running.remove(ticket)
                self._changed.notify_all()

    def _has_turn(self, ticket: _Ticket) -> bool:
        """Whether all who run, and all who came before, want the same as this one."""
        before = [*self._running, *self._queue[: self._queue.index(ticket)]]
        if ticket.alone:
            return not before
        return not any(other.alone or other.variant != ticket.variant for other in before)

    def _show(self, variant: str) -> None:
        if self._shown == variant:
            return
        self._shown = None  # what a failure leaves behind is not known
        with self.model.exclusive(), uninterrupted():
            (self._states.get(variant) or self._combined(variant)).put_on(self.model)
        self._shown = variant

    def _combined(self, variant: str) -> EditsState:
        """The model with packs of weights; the latest combinations are remembered."""
        if variant not in self._combinations:
            self._states[UNEDITED].put_on(self.model)
            self.model.set_active(variant.split(_PLUS)[1:], on_conflict="ignore")
            try:
                state = EditsState.of(self.model)
            finally:
                self.model.set_active([])
            while len(self._combinations) >= MOST_COMBINATIONS:
                self._combinations.pop(next(iter(self._combinations)))
            self._combinations[variant] = state
        return self._combinations[variant]

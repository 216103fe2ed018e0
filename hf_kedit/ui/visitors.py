"""Whose edits are whose: the visitors of a page, each with a session on the one model that is in memory.

A visitor is known by a word that nobody can guess, which the browser keeps (so that a page may be loaded again) and
which comes with every call. Sessions that nobody has used for long are dropped, with all that is in them; the model
carries no trace of them then, because it carries a session's edits only while that session's calls run
(`EditSession`).
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..editing import EditSession
from ..errors import UnknownEditError, VisitError
from ..evaluation import SideEffectReport
from ..journal import Edit
from ..model import EditableModel
from .probing import Chance

MOST_VISITORS = 200
IDLE_SECONDS = 6 * 3600.0


@dataclass
class HistoryEntry:
    """An edit as its visitor has seen it.

    Args:
        edit: what was done.
        settings: of the method, as far as they were chosen.
        effects: what the model said before and after it; ``None`` for an edit that the model came with.
        chances: the answers to its prompt with their probabilities.
        is_on: whether the visitor has it switched on.
        is_undone: whether it was taken back.
    """

    edit: Edit
    settings: dict[str, Any]
    effects: SideEffectReport | None
    chances: list[Chance]
    is_on: bool = True
    is_undone: bool = False


@dataclass
class Visitor:
    """One visitor.

    Args:
        session: their edits.
        entries: every edit that they have made, oldest first, those that were undone too.
        version: grows with every change, so that a page knows when to draw its history again.
        seen: when they were here last, in seconds of a clock that never goes back.
    """

    session: EditSession
    entries: list[HistoryEntry] = field(default_factory=list)
    version: int = 1
    seen: float = 0.0

    @property
    def off(self) -> list[str]:
        """Ids of the edits that are switched off."""
        return [entry.edit.id for entry in self.present if not entry.is_on]

    @property
    def present(self) -> list[HistoryEntry]:
        """The edits that were not taken back."""
        return [entry for entry in self.entries if not entry.is_undone]

    @property
    def shared(self) -> list[HistoryEntry]:
        """The present edits that are switched on: what the visitor's model says, and what leaves the page."""
        return [entry for entry in self.present if entry.is_on]

    def entry(self, edit_id: str) -> HistoryEntry:
        """One of the present edits.

        Raises:
            UnknownEditError: if it was undone, or there is none.
        """
        for entry in self.present:
            if entry.edit.id == edit_id:
                return entry
        raise UnknownEditError("this edit is not in your history any more")


class Visitors:
    """The visitors of one page.

    Args:
        model: that all of them use.
        most: visitors that are remembered; of more, the ones who were away longest are forgotten.
        idle: seconds after which somebody is forgotten.
        clock: tells the time.
    """

    def __init__(
        self,
        model: EditableModel,
        most: int = MOST_VISITORS,
        idle: float = IDLE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.model, self.most, self.idle, self.clock = model, most, idle, clock
        self._lock = threading.Lock()
        self._known: OrderedDict[str, Visitor] = OrderedDict()  # whoever was here last is at the end

    def __len__(self) -> int:
        return len(self._known)

    def enter(self, word: str | None) -> tuple[str, Visitor]:
        """Somebody opens the page.

        Args:
            word: that the browser has kept, if any.

        Returns:
            The word to keep, and the visitor: the same one if the word is known.
        """
        known = self._find(word)
        if known is not None and word is not None:
            return word, known
        session = EditSession(self.model)  # waits for the model, so not under the lock
        visitor = Visitor(session, [HistoryEntry(edit, {}, None, []) for edit in session.edits], seen=self.clock())
        fresh = secrets.token_urlsafe(24)
        with self._lock:
            self._known[fresh] = visitor
            while len(self._known) > self.most:
                self._known.popitem(last=False)
        return fresh, visitor

    def at(self, word: str | None) -> Visitor:
        """The visitor that a call comes from.

        Raises:
            VisitError: if nobody is known by this word.
        """
        visitor = self._find(word)
        if visitor is None:
            raise VisitError("this page has been left alone for too long, or the program was started again: reload it")
        return visitor

    def _find(self, word: str | None) -> Visitor | None:
        now = self.clock()
        with self._lock:
            for old in [name for name, one in self._known.items() if now - one.seen > self.idle]:
                del self._known[old]
            if not isinstance(word, str) or word not in self._known:  # a browser sends what it likes
                return None
            visitor = self._known[word]
            visitor.seen = now
            self._known.move_to_end(word)
            return visitor

"""Who may use a model now: any number of threads that run it, or one that changes it (docs/concurrency.md).

An edit lives in the model itself, so that a thread that runs the model while another one changes or measures it would
see what is there for a moment only: half of an edit, a bypassed layer, the original weights. So an `EditableModel`
runs and saves its model inside `among_others`, and changes it inside `alone`; `frozen_eval`, inside which everything
is measured, is an `alone` too. Both may be nested in one thread, in any order. Whoever comes first is first, so that
neither a server full of requests nor a long series of edits keeps the other side waiting for ever.

Nothing here holds for calls that go past the `EditableModel`, straight to the stock model.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch

from ..anatomy.switching import Switch, deliver_interrupts
from ..errors import ModelBusyError

P = ParamSpec("P")
R = TypeVar("R")
OFF_SECONDS = 60.0
"""How long a change waits for a thread that has switched the edits off."""
_GLANCE_SECONDS = 0.1  # after which a thread that waits looks whether Ctrl-C was pressed


@dataclass(eq=False)
class _Ticket:
    """A thread that waits for its turn."""

    thread: int
    alone: bool
    edited: bool


class Access:
    """The lock of one model."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: list[_Ticket] = []  # in the order in which they came
        self._owner: int | None = None  # the thread that is alone
        self._depth = 0
        self._running: Counter[int] = Counter()  # thread → open calls
        self._off: Counter[int] = Counter()  # thread → open blocks of `disable_edits`

    def enter(self) -> None:
        """Begin to run the model."""
        me = threading.get_ident()
        with self._changed:
            if not self._running[me] and self._owner != me:  # else somebody would wait for us while we wait for them
                self._wait(_Ticket(me, alone=False, edited=False))
            self._running[me] += 1

    def leave(self) -> None:
        """The opposite of `enter`."""
        with self._changed:
            self._running -= Counter([threading.get_ident()])  # which drops what is zero
            self._changed.notify_all()

    def take(self, edited: bool = False) -> None:
        """Begin to change the model.

        Args:
            edited: wait until no other thread has the edits switched off.

        Raises:
            ModelBusyError: if this thread is running the model and another one that does, too, wants to be alone; or
                if the edits stay switched off.
        """
        me = threading.get_ident()
        with self._changed:
            if self._owner != me:
                if self._running[me] and any(t.alone and self._running[t.thread] for t in self._queue):
                    raise ModelBusyError(
                        "two threads want to change this model, and each is in the middle of a call of it: change a"
                        " model outside of what its own calls do (hooks, streamers, logits processors)"
                    )
                self._wait(_Ticket(me, True, edited))
                self._owner = me
            self._depth += 1

    def release(self) -> None:
        """The opposite of `take`."""
        with self._changed:
            self._depth -= 1
            if self._depth == 0:
                self._owner = None
                self._changed.notify_all()

    def switched_off(self, thread: int, step: int) -> None:
        """Note that a thread has switched the edits off (1), or on again (-1)."""
        with self._changed:
            self._off[thread] += step
            self._off += Counter()  # drops what is zero
            self._changed.notify_all()

    def _wait(self, ticket: _Ticket) -> None:
        """Wait for a turn.

        A call that goes on to change the model comes first: those that wait for its end cannot go before it.
        """
        if self._owner is None and not self._queue and not self._off and not (ticket.alone and self._running):
            return
        self._queue.insert(0 if self._running[ticket.thread] else len(self._queue), ticket)
        until = time.monotonic() + OFF_SECONDS
        try:
            while not self._has_turn(ticket):
                if self._is_held_up(ticket) and time.monotonic() >= until:
                    raise ModelBusyError(
                        f"another thread has had the edits of this model switched off (disable_edits) for"
                        f" {OFF_SECONDS:g} seconds; change the model when it has left that block"
                    )
                self._changed.wait(_GLANCE_SECONDS)
                deliver_interrupts()
        finally:
            self._queue.remove(ticket)
            self._changed.notify_all()  # somebody may have waited for this one only

    def _has_turn(self, ticket: _Ticket) -> bool:
        if self._owner is not None or self._is_held_up(ticket):
            return False
        if ticket.alone and any(self._running[thread] for thread in self._running if thread != ticket.thread):
            return False
        before = [t for t in self._queue[: self._queue.index(ticket)] if not self._is_held_up(t)]
        return not (before if ticket.alone else [t for t in before if t.alone])

    def _is_held_up(self, ticket: _Ticket) -> bool:
        """Whether a thread has to wait until another one switches the edits on, and lets others pass meanwhile."""
        return ticket.edited and any(count and thread != ticket.thread for thread, count in self._off.items())


_ACCESS: WeakKeyDictionary[torch.nn.Module, Access] = WeakKeyDictionary()

if hasattr(os, "register_at_fork"):  # the threads that held locks are not in a process that was forked
    os.register_at_fork(after_in_child=_ACCESS.clear)


def access_to(model: Any) -> Access:
    """The lock of a model, whatever is wrapped around it."""
    while callable(unwrap := getattr(model, "get_base_model", None)) and (inner := unwrap()) is not model:
        model = inner
    return _ACCESS.setdefault(model, Access())  # one step of the interpreter, which needs no lock of its own


class among_others(Switch[None]):
    """A block that runs a model, beside other threads that do; a thread that changes it is waited for."""

    def __init__(self, model: torch.nn.Module):
        self._access, self._has_turn = access_to(model), False

    def change(self) -> None:
        """Wait for it."""
        self._access.enter()
        self._has_turn = True

    def put_back(self, failed: bool) -> None:
        """Let others in."""
        if self._has_turn:
            self._has_turn = False
            self._access.leave()


class alone(Switch[None]):
    """A block that changes or measures a model: all other threads are waited for, and wait.

    Args:
        model: the model, or what is wrapped around it.
        edited: wait until no other thread has the edits switched off.

    Raises:
        ModelBusyError: on entering, see `Access.take`.
    """

    def __init__(self, model: torch.nn.Module, *, edited: bool = False):
        self._access, self._edited, self._has_turn = access_to(model), edited, False

    def change(self) -> None:
        """Wait for the others."""
        self._access.take(self._edited)
        self._has_turn = True

    def put_back(self, failed: bool) -> None:
        """Let others in."""
        if self._has_turn:
            self._has_turn = False
            self._access.release()


def exclusively(method: Callable[P, R]) -> Callable[P, R]:
    """Decorator of a method of an `EditedModel` that changes it: it is called inside `alone`, edits switched on."""

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with alone(args[0].base_model, edited=True):  # type: ignore[attr-defined]
            return method(*args, **kwargs)

    return call


def together_with_others(method: Callable[P, R]) -> Callable[P, R]:
    """Decorator of a method of an `EditedModel` that reads it: it is called inside `among_others`."""

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with among_others(args[0].base_model):  # type: ignore[attr-defined]
            return method(*args, **kwargs)

    return call

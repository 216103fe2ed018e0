"""Changes of a model that last for a block and are taken back behind it whatever happens, Ctrl-C included.

An interrupt is an exception that may come between any two steps of a Python program. Where it comes while a model is
being switched, it must not leave the model half way: with blocks bypassed, edits switched off for good, or a hook
that nobody remembers. Neither a ``finally`` clause nor a generator with `contextlib.contextmanager` is enough,
because the interrupt may come in the clause's own first step, or before the generator is resumed.

So, as long as a `Switch` is open, Ctrl-C comes to a handler of ours. It looks at what was interrupted: the body of
the block gets its `KeyboardInterrupt` at once, as ever; the steps that change the model and put it back are finished
first. Other threads cannot be interrupted and need none of this.
"""

from __future__ import annotations

import signal
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import CodeType, FrameType, TracebackType
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class _Interrupts:
    """The handler of SIGINT while a `Switch` is open in the main thread."""

    def __init__(self) -> None:
        self.shielded: set[CodeType] = set()  # functions that are finished before an interrupt is delivered
        self.held_back = 0  # open blocks of `uninterrupted`
        self._open = 0
        self._previous: Any = None
        self._waiting: list[int] = []

    def open(self) -> bool:
        """Take interrupts over, if that is possible here; the caller is shielded from now on."""
        if threading.current_thread() is not threading.main_thread():
            return False
        if self._open == 0:
            previous = signal.getsignal(signal.SIGINT)
            if not callable(previous):  # ignored, or left to the operating system
                return False
            if previous is not self:
                self._previous = previous
            self._waiting = []
            try:
                signal.signal(signal.SIGINT, self)
            except ValueError:  # not the main interpreter
                return False
        self._open += 1
        return True

    def close(self) -> None:
        """The opposite of `open`."""
        self._open -= 1
        # Inside another switch, as in every step of a training, nothing is asked: `signal.getsignal` takes its time.
        if self._open or threading.current_thread() is not threading.main_thread():
            return
        present: Any = signal.getsignal(signal.SIGINT)
        if present is self:  # the body may have chosen another one
            signal.signal(signal.SIGINT, self._previous)

    @property
    def is_waiting(self) -> bool:
        """Whether an interrupt came and was held back."""
        return bool(self._waiting)

    def deliver(self, frame: FrameType | None) -> None:
        """Deliver what came meanwhile, unless ``frame``, which is next, is itself to be finished first."""
        if self._waiting and not self.held_back and not self._is_shielded(frame):
            number, self._waiting = self._waiting[-1], []
            self._previous(number, frame)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.held_back or self._is_shielded(frame):
            self._waiting.append(number)
        else:
            self._previous(number, frame)

    def _is_shielded(self, frame: FrameType | None) -> bool:
        while frame is not None:
            if frame.f_code in self.shielded:
                return True
            frame = frame.f_back
        return False


_interrupts = _Interrupts()


class Switch(ABC, Generic[T]):
    """A context manager that changes something and puts it back, neither of which an interrupt cuts short or skips.

    Not a generator, and not to be wrapped into one: what comes between the end of a block and ``__exit__`` would not
    be shielded. Functions return it instead.
    """

    _entered = False
    _shielded = False

    @abstractmethod
    def change(self) -> T:
        """Make the change; what it returns is the block's ``as`` value."""

    @abstractmethod
    def put_back(self, failed: bool) -> None:
        """Put back whatever `change` did, also if it did not come to its end.

        Args:
            failed: whether `change` or the block raised.
        """

    def __enter__(self) -> T:
        self._shielded = _interrupts.open()
        self._entered = True
        try:
            value = self.change()
            if self._shielded:
                _interrupts.deliver(sys._getframe(1))
            return value
        except BaseException:
            self._close(failed=True)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(failed=kind is not None)
        if self._shielded:
            _interrupts.deliver(sys._getframe(1))

    def __del__(self) -> None:
        # A block that was left without its end: a generator that nobody finished, a debugger that jumped out.
        if self._entered and not sys.is_finalizing():
            self._close(failed=True)

    def _close(self, failed: bool) -> None:
        self._entered = False
        try:
            self.put_back(failed)
        finally:
            if self._shielded:
                _interrupts.close()


_interrupts.shielded |= {f.__code__ for f in (Switch.__enter__, Switch.__exit__, Switch.__del__)}


def interrupted() -> bool:
    """Whether an interrupt waits to be delivered here, for a `Switch` that only undoes what has failed."""
    return _interrupts.is_waiting and threading.current_thread() is threading.main_thread()


def deliver_interrupts() -> None:
    """Deliver what is held back now, for the change of a `Switch` that waits and has changed nothing yet.

    Not inside another one's steps, which have to be finished.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code not in _interrupts.shielded:
        frame = frame.f_back
    if frame is not None and threading.current_thread() is threading.main_thread():
        _interrupts.deliver(frame.f_back)


class _Switched(Switch[T]):
    def __init__(self, change: Callable[[], T], put_back: Callable[[], None]):
        self._change, self._put_back = change, put_back

    def change(self) -> T:
        return self._change()

    def put_back(self, failed: bool) -> None:
        self._put_back()


def switched(change: Callable[[], T], put_back: Callable[[], None]) -> Switch[T]:
    """A `Switch` of two functions; ``put_back`` is called even if ``change`` did not come to its end."""
    return _Switched(change, put_back)


class together(Switch[None]):
    """Several switches as one: the first is entered first and left last."""

    def __init__(self, *switches: Switch[Any]):
        self._switches, self._inside = switches, list[Switch[Any]]()

    def change(self) -> None:
        """Enter them in order."""
        for switch in self._switches:
            switch.__enter__()
            self._inside.append(switch)

    def put_back(self, failed: bool) -> None:
        """Leave those that were entered, in reverse order."""
        while self._inside:
            switch = self._inside.pop()
            try:
                switch.__exit__(RuntimeError if failed else None, None, None)
            except BaseException:
                self.put_back(failed=True)
                raise


class uninterrupted(Switch[None]):
    """A block that Ctrl-C waits for: a group of weights that is written, the undoing that follows a failure."""

    def change(self) -> None:
        """Hold interrupts back."""
        _interrupts.held_back += self._shielded

    def put_back(self, failed: bool) -> None:
        """Let them through again."""
        _interrupts.held_back -= self._shielded


class Passable:
    """What stands between a model and its callers, and can let everything pass."""

    _passing = 0  # blocks that are open

    def passing(self) -> Switch[None]:
        """Every call inside the block goes to the model as it is."""

        def count(step: int) -> None:
            self._passing += step

        return switched(lambda: count(1), lambda: count(-1))

    @property
    def is_passing(self) -> bool:
        """Whether calls go to the model as they are now."""
        return self._passing > 0

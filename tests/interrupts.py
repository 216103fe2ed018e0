"""Ctrl-C at a chosen line: the signal is raised by a trace function, not by the clock."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import hf_kedit

PACKAGE = str(Path(hf_kedit.__file__).parent)


def _counts(frame: FrameType, within: str) -> bool:
    """Python itself ignores what is raised in a ``__del__``."""
    return frame.f_code.co_filename.startswith(within) and frame.f_code.co_name != "__del__"


def interrupted_at(number: int, run: Callable[[], object], *, within: str = PACKAGE) -> bool:
    """Call ``run`` and send SIGINT to this process at the ``number``-th step of code below a path.

    A step is the beginning of a function or of a line.

    Returns:
        Whether there were so many steps. The `KeyboardInterrupt`, if it came out, is swallowed.
    """
    steps = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal steps
        if not _counts(frame, within):
            return None
        if event in ("call", "line"):
            steps += 1
            if steps == number:
                signal.raise_signal(signal.SIGINT)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return steps >= number


def steps_of(run: Callable[[], object]) -> int:
    """Number of steps of ``run``, see `interrupted_at`."""
    steps = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal steps
        if not _counts(frame, PACKAGE):
            return None
        steps += event in ("call", "line")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(before)
    return steps


def at_every_step(run: Callable[[], object], check: Callable[[int], object], *, within: str = PACKAGE) -> int:
    """Interrupt ``run`` at one step after the other and call ``check`` with its number each time.

    Returns:
        How many steps there were.
    """
    number = 1
    while interrupted_at(number, run, within=within):
        check(number)
        number += 1
    check(number)
    return number - 1

"""The library's one logger, with the same switches as transformers'.

Everything goes through the logger ``hf_kedit``; nothing is printed. Progress bars appear on anything
that may take longer than a few seconds, in the logs of jobs as a line a minute, and can be switched off here as well.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from contextvars import ContextVar
from typing import Any, TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")
FORMAT = "[%(name)s] %(levelname)s: %(message)s"
_ROOT = "hf_kedit"
_OTHERS = ("bitsandbytes", "torch.utils._pytree", "torchao")
"""Loggers of libraries that transformers and PEFT import where they are installed, whether or not a model is
quantised: what they say about kernels that they lack concerns no user of a command, and neither do their warnings."""
_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}
_said: set[str] = set()
StepReport = Callable[[str, int, int | None], None]
"""Is told what goes on, how many steps of it are done, and of how many."""
_told: ContextVar[StepReport | None] = ContextVar("told", default=None)
_losses: ContextVar[list[float] | None] = ContextVar("losses", default=None)
_wanted_here: ContextVar[bool] = ContextVar("bars_wanted_here", default=True)


def bars_unwanted() -> bool:
    """Whether the environment asks for no progress bars (``HF_KEDIT_DISABLE_PROGRESS_BARS=1``)."""
    return os.environ.get("HF_KEDIT_DISABLE_PROGRESS_BARS", "0") in ("1", "true", "True")


_progress_bars = not bars_unwanted()
_in_lines = False
_BETWEEN_LINES = 60.0
"""Seconds."""


def get_logger(name: str | None = None) -> logging.Logger:
    """Return the library's logger, or its child for the module ``name``."""
    _configure()
    if name is None or name == _ROOT:
        return logging.getLogger(_ROOT)
    return logging.getLogger(name if name.startswith(_ROOT) else f"{_ROOT}.{name}")


def _configure() -> None:
    root = logging.getLogger(_ROOT)
    if root.level == logging.NOTSET:
        root.setLevel(_LEVELS.get(os.environ.get("HF_KEDIT_VERBOSITY", "warning").lower(), logging.WARNING))
    if not root.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(FORMAT))
        root.addHandler(handler)


def set_verbosity(level: int | str) -> None:
    """Set the level of the library's logger: a ``logging`` constant or ``"debug"`` … ``"critical"``."""
    if isinstance(level, str):
        if level.lower() not in _LEVELS:
            raise ValueError(f"unknown verbosity {level!r}; use one of {', '.join(_LEVELS)}")
        level = _LEVELS[level.lower()]
    get_logger().setLevel(level)


def get_verbosity() -> int:
    """Return the level of the library's logger."""
    return get_logger().getEffectiveLevel()


def set_verbosity_info() -> None:
    """Show informational messages."""
    set_verbosity(logging.INFO)


def set_verbosity_debug() -> None:
    """Show everything."""
    set_verbosity(logging.DEBUG)


def set_verbosity_warning() -> None:
    """Show warnings and errors (the default)."""
    set_verbosity(logging.WARNING)


def set_verbosity_error() -> None:
    """Show errors only."""
    set_verbosity(logging.ERROR)


def hush_others(debug: bool = False) -> None:
    """For programs that are ours alone: what libraries say that are imported on the way is not shown.

    Args:
        debug: it is, after all.
    """
    for name in _OTHERS:
        logging.getLogger(name).setLevel(logging.NOTSET if debug else logging.ERROR)
    if not debug and not sys.warnoptions:  # ours are logged
        warnings.simplefilter("ignore")


def warn_once(logger: logging.Logger, message: str) -> None:
    """Log ``message`` as a warning the first time it is seen in this process."""
    if message not in _said:
        _said.add(message)
        logger.warning(message)


def info_once(logger: logging.Logger, message: str) -> None:
    """Log ``message`` as information the first time it is seen in this process."""
    if message not in _said:
        _said.add(message)
        logger.info(message)


def disable_progress_bars() -> None:
    """Switch all progress bars of the library off."""
    global _progress_bars
    _progress_bars = False


def enable_progress_bars(*, lines: bool = False) -> None:
    """Switch the progress bars of the library on again.

    Args:
        lines: for logs and jobs, where nobody watches: what takes over a minute writes a line every minute instead.
    """
    global _progress_bars, _in_lines
    _progress_bars, _in_lines = True, lines


@contextlib.contextmanager
def bars_here(wanted: bool) -> Iterator[None]:
    """Show bars inside the block, if they are enabled, or none at all; inner blocks can only show fewer."""
    before = _wanted_here.set(wanted and _wanted_here.get())
    try:
        yield
    finally:
        _wanted_here.reset(before)


def progress(items: Iterable[T], description: str, *, show: bool | None = None, **kwargs: Any) -> Iterable[T]:
    """Iterate over ``items`` under a progress bar on standard error.

    Args:
        items: what to iterate over.
        description: label of the bar.
        show: force the bar on or off; ``None`` shows it when there is more than one item and bars are enabled.
        kwargs: passed to ``tqdm``.
    """
    if show is None:
        show = not (isinstance(items, Sized) and len(items) <= 1)
    return tqdm(items, **_looks(description, show, kwargs))


class _Lines(io.TextIOBase):
    """Where a bar writes that nobody watches: standard error gets its state once in a while, as a line of its own."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def write(self, text: str) -> int:
        """Take what would overwrite the bar on a screen."""
        shown = text.strip("\r\n\x1b[A ")
        if shown and time.monotonic() - self.last >= _BETWEEN_LINES:
            self.last = time.monotonic()
            sys.stderr.write(f"{shown}\n")
        return len(text)

    def flush(self) -> None:
        """See `io.IOBase`."""
        sys.stderr.flush()


def _looks(description: str, show: bool, given: dict[str, Any]) -> dict[str, Any]:
    """How ``tqdm`` shows progress.

    Args:
        description: label of the bar.
        show: if bars are enabled.
        given: for ``tqdm``.
    """
    shown = show and _progress_bars and _wanted_here.get()
    looks = {**given, "desc": description, "disable": not shown, "leave": False}
    if _in_lines:
        line = "{desc}: {n_fmt} of {total_fmt} in {elapsed}, {remaining} to go"
        looks |= {"file": _Lines(), "bar_format": line, "miniters": 1, "position": 0, "mininterval": 1.0}
    return looks


class _Bar(tqdm):
    """A bar that also tells whoever has asked for it with `steps_told`, whether or not it is shown."""

    told: tuple[str, int | None] = ("", None)
    steps = 0

    def update(self, n: float | None = 1) -> bool | None:
        """See tqdm."""
        report, (what, total) = _told.get(), self.told
        self.steps += int(n or 0)
        if total is not None:  # a bar that is not shown is taken to its end from anywhere
            self.steps = min(self.steps, total)
        if report is not None:
            report(what, self.steps, total)
        shown: bool | None = super().update(n)
        return shown


def progress_bar(total: int | None, description: str, *, show: bool = True, **kwargs: Any) -> tqdm[Any]:
    """Return a manual progress bar (``update``/``close``; usable as a context manager)."""
    bar = _Bar(total=total, **_looks(description, show, kwargs))
    bar.told = (description, total)
    return bar


@contextlib.contextmanager
def steps_told(report: StepReport, losses: list[float] | None = None) -> Iterator[None]:
    """Call ``report`` at every step of the manual bars of this thread, inside the block.

    Args:
        report: what is called.
        losses: a list that gets the loss of every step of methods that tell it (`tell_loss`), before the report.
    """
    before, kept = _told.set(report), _losses.set(losses)
    try:
        yield
    finally:
        _losses.reset(kept)
        _told.reset(before)


def tell_loss(loss: float) -> None:
    """Tell whoever has asked with `steps_told` the loss of a step."""
    losses = _losses.get()
    if losses is not None:
        losses.append(loss)

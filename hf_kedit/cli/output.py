"""What all commands share: the three output formats, where text goes, and what becomes of an error.

Data goes to standard output; progress, logs and errors go to standard error, so that ``kedit … --format json | jq``
always works. Exit codes: 0 done, 1 failure, 2 wrong usage, 3 an edit below ``--min-success``,
4 harm under ``--strict``, 130 interrupted.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import logging
import sys
from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import Annotated, Any, TextIO, get_type_hints

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from .. import logging as kedit_logging
from ..errors import KeditError
from ..storage.display import printable, printable_json
from ..storage.files import json_ready

FAILURE, BELOW_MIN_SUCCESS, HARM, INTERRUPTED = 1, 3, 4, 130


class Format(StrEnum):
    """How results are written."""

    human = "human"
    json = "json"
    quiet = "quiet"


FormatOption = Annotated[
    Format,
    typer.Option(
        "--format",
        "-f",
        help="human: tables; json: one JSON value on standard output; quiet: only the essential value.",
        rich_help_panel="Output",
    ),
]
ReportToOption = Annotated[
    list[str] | None,
    typer.Option(
        "--report-to",
        help="Tell tensorboard (folder runs), wandb or trackio; all: those that are installed. May be repeated.",
    ),
]
DebugOption = Annotated[
    bool,
    typer.Option("--debug", help="Log everything, and show the traceback of an error.", rich_help_panel="Output"),
]


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Decorator of all commands: set the loggers up, and turn errors into one line and an exit code.

    The command must have the parameters ``format`` and ``debug``. A parameter that is a dataclass is a block of
    options: the command has an option for each of its fields, and is given them in one.
    """
    parameters: list[inspect.Parameter] = []
    blocks: dict[str, Any] = {}
    for parameter in _parameters(function):
        if dataclasses.is_dataclass(parameter.annotation):
            blocks[parameter.name] = parameter.annotation
            parameters += _parameters(parameter.annotation)
        else:
            parameters.append(parameter)

    @functools.wraps(function)
    def run(**given: Any) -> None:
        for name, kind in blocks.items():
            given[name] = kind(**{field.name: given.pop(field.name) for field in dataclasses.fields(kind)})
        debug = bool(given["debug"])
        try:
            set_up(given["format"], debug)
            function(**given)
        except KeditError as error:
            fail(error, debug)
        except BrokenPipeError:  # the reader has gone (kedit … | head); typer ends quietly
            raise
        except (OSError, MemoryError) as error:
            fail(error, debug)
        except KeyboardInterrupt:
            if debug:
                raise
            error_console().print("kedit: interrupted", style="red")
            raise typer.Exit(INTERRUPTED) from None

    # Typer reads these instead of the wrapped function's own.
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _parameters(taker: Any) -> list[inspect.Parameter]:
    """The parameters of a function, or the fields of a dataclass, by keyword and with their annotations evaluated."""
    hints = get_type_hints(taker, include_extras=True)
    found = inspect.signature(taker).parameters.values()
    return [each.replace(annotation=hints[each.name], kind=inspect.Parameter.KEYWORD_ONLY) for each in found]


def set_up(output_format: Format, debug: bool) -> None:
    """Set verbosity and progress bars, before heavy libraries are imported; make the streams take any character."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure") and not _is_utf8(stream):
            stream.reconfigure(errors="replace")
    if debug:
        kedit_logging.set_verbosity_debug()
    elif output_format is Format.quiet:
        kedit_logging.set_verbosity_error()
    else:
        kedit_logging.set_verbosity_warning()
    for handler in kedit_logging.get_logger().handlers:
        handler.setFormatter(SafeFormatter(kedit_logging.FORMAT))
    kedit_logging.hush_others(debug)
    if output_format is Format.quiet or kedit_logging.bars_unwanted():
        kedit_logging.disable_progress_bars()
    else:
        kedit_logging.enable_progress_bars(lines=not sys.stderr.isatty())


def fail(error: BaseException, debug: bool) -> None:
    """Write one line to standard error and leave with exit code 1; with ``debug`` show the traceback instead."""
    if debug:
        raise error
    text = " ".join(str(error).split()) or type(error).__name__
    error_console().print(f"kedit: error: {text}", style="red", soft_wrap=True)
    raise typer.Exit(FAILURE) from None


class SafeConsole(Console):
    """A console on which no text moves the cursor, sets a title or turns the direction of writing."""

    def render_str(self, text: str, **options: Any) -> Text:
        """See `Console.render_str`: every string that is printed passes here, in tables too."""
        return super().render_str(printable(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """See `Console.render`: what was no string, but a `Text`, passes here."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


class SafeFormatter(logging.Formatter):
    """Logs in which no text of others acts on the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter.format`."""
        return printable(super().format(record))


def console() -> Console:
    """Standard output. Made on each call, because tests and pipes change ``sys.stdout``."""
    return SafeConsole(file=sys.stdout, highlight=False, markup=False, emoji=False)


def error_console() -> Console:
    """Standard error."""
    return SafeConsole(file=sys.stderr, highlight=False, markup=False, emoji=False)


def emit(
    output_format: Format,
    data: Any,
    *,
    human: Callable[[Console], None],
    quiet: Iterable[str] = (),
) -> None:
    """Write a result to standard output.

    Args:
        output_format: the user's choice.
        data: JSON-ready value.
        human: prints it for people.
        quiet: the essential values, one a line.
    """
    if output_format is Format.json:
        text = json.dumps(json_ready(data), ensure_ascii=not _is_utf8(sys.stdout), indent=2, allow_nan=False)
        sys.stdout.write(printable_json(text) + "\n")
    elif output_format is Format.quiet:
        for line in quiet:
            sys.stdout.write(printable(line, keep="") + "\n")
    else:
        human(console())


def _is_utf8(stream: TextIO) -> bool:
    return (stream.encoding or "").lower().replace("-", "") == "utf8"


def counted(number: int, noun: str) -> str:
    """``1 edit``, ``2 edits``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def size_of(size: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(size) < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError("unreachable")


def moments_line(moments: Any) -> str:
    """Which text an edit's second moments were taken over, as its diagnostics (of any origin) tell."""
    known = isinstance(moments, dict) and isinstance(moments.get("tokens"), int)
    if not known:
        return "second moments of unknown origin"
    return printable(f"second moments over {moments['tokens']:,} tokens of {moments.get('corpus')}", keep="")

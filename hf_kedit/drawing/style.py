"""The look of every picture: colours, type, and how texts of others get into it.

Pictures have a white ground of their own, because no ink is dark enough for a white page and light enough for a dark
one. The colours are told apart by people with colour blindness, and in print by their lightness.
"""

from __future__ import annotations

import functools
import re
import textwrap
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unicodedata import east_asian_width

from ..errors import DataError, require_extra
from ..storage.display import printable
from ..storage.files import named_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which people with colour blindness can tell apart, without black and yellow.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f7f7f")
INK, SOFT, LINE, PAPER = "#1d2430", "#566170", "#d9dee6", "#ffffff"
HURT, PALE = COLOURS[1], "#9cc4de"
"""Where something was lost; what matters less."""
WIDTH = 7.6
"""Inches of a picture on a page."""
SMALL, MEDIUM, LARGE = 7.5, 9.0, 11.5
"""Sizes of type in points."""
_DPI = 150
_OWN_GROUPS = (
    *("axes.", "errorbar.", "figure.", "font.", "grid.", "hatch.", "image.", "legend.", "lines.", "mathtext."),
    *("patch.", "path.", "scatter.", "text.", "xaxis.", "xtick.", "yaxis.", "ytick."),
)
"""Settings of matplotlib that a picture depends on; the others say where and how things are shown and saved."""
_SETTINGS: dict[str, Any] = {
    "axes.edgecolor": LINE,
    "axes.facecolor": PAPER,
    "axes.labelcolor": SOFT,
    "axes.labelsize": MEDIUM - 0.5,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": MEDIUM + 0.5,
    "figure.facecolor": PAPER,
    "figure.titleweight": "bold",
    "font.size": MEDIUM,
    "text.color": INK,
    "text.parse_math": False,  # a $ in a prompt is a $
    "xtick.color": LINE,
    "xtick.labelcolor": SOFT,
    "xtick.labelsize": SMALL + 0.5,
    "ytick.color": LINE,
    "ytick.labelcolor": INK,
    "ytick.labelsize": MEDIUM - 0.5,
}
# DejaVu Sans comes with matplotlib. The others, as far as a machine has them, give what it lacks.
_FAMILIES = (
    *("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "PingFang SC", "Microsoft YaHei"),
    *("WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Hiragino Sans GB", "Heiti TC", "SimHei", "Malgun Gothic"),
    *("Noto Serif CJK SC", "Noto Serif CJK JP", "Droid Sans Fallback", "Arial Unicode MS", "Noto Sans Devanagari"),
    *("Noto Sans Bengali", "Noto Sans Thai", "Noto Sans Hebrew", "Noto Sans Arabic"),
)
_NO_GLYPH = "\u25a1"


@contextmanager
def house_style(what: str) -> Iterator[None]:
    """A block in which matplotlib draws as this library does; afterwards the user's settings are as they were.

    Settings that a user or a style sheet has changed have no effect inside.

    Args:
        what: is to be drawn, for the message.

    Raises:
        MissingExtraError: without matplotlib.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise require_extra("matplotlib", "viz", f"drawing {what}") from error
    settings: Any = {k: v for k, v in matplotlib.rcParamsDefault.items() if k.startswith(_OWN_GROUPS)}
    settings |= _SETTINGS | {"font.family": list(_installed())}
    with matplotlib.rc_context(settings):
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, made without pyplot; inside a `house_style`."""
    from .picture import Plot

    figure: Any = Plot(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.09)
    return figure


def name_figure(figure: Figure, title: str, note: str = "", axes: Axes | None = None) -> None:
    """Put a title above a figure, and what its marks mean below; both are cut into lines that fit.

    Args:
        figure: to name.
        title: in plain words.
        note: smaller, and grey.
        axes: of a user, whose figure may hold more: they get the title, and nothing else is written.
    """
    if axes is not None:
        axes.set_title(title)
        return
    width = figure.get_size_inches()[0]
    lines = textwrap.wrap(title, max(20, int(width * 11)))
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=LARGE)
    if note:
        lines = textwrap.wrap(note, max(30, int(width * 17.5)))
        figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=SMALL, color=SOFT)


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure (folders are made), in the format that its name ends with: PNG, SVG, PDF; returns the path.

    Raises:
        DataError: if matplotlib does not know the format, or the file cannot be written.
    """
    path = named_path(path, "the picture", DataError)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=_DPI)
    except (OSError, ValueError, RuntimeError) as error:  # the last: a format that needs TeX, and there is none
        raise DataError(f"cannot write the picture {str(path)!r}: {error}") from error
    return path


# ---------------------------------------------------------------------- texts of others


def as_label(text: str, most: int = 48) -> str:
    """A text of any origin as one line that can be drawn: whatever it holds, it is shown and does nothing.

    Characters that no font on this machine has are shown as an empty box.

    Args:
        text: of a user or a model.
        most: characters, of which those of Chinese, Japanese and Korean count twice, because they are as wide; of a
            longer text, the middle is left out.
    """
    line = printable(re.sub(r"\s+", " ", text).strip(), keep="")
    ends = list(accumulate(1 + (east_asian_width(c) in "WF") for c in line))
    if ends and ends[-1] > most:
        front = bisect_right(ends, most // 2)
        back = bisect_left(ends, ends[-1] - (most - most // 2 - 3)) + 1
        line = f"{line[:front].rstrip()} … {line[back:].lstrip()}"
    return "".join(c if c.isspace() or _has_glyph(c) else _NO_GLYPH for c in line)


@functools.cache
def _installed() -> tuple[str, ...]:
    from matplotlib import font_manager

    known = {font.name for font in font_manager.fontManager.ttflist}
    return tuple(name for name in _FAMILIES if name in known)


@functools.cache
def _has_glyph(character: str) -> bool:
    from matplotlib import font_manager

    fonts = (font_manager.get_font(font_manager.findfont(name)) for name in _installed())
    return any(font.get_char_index(ord(character)) for font in fonts)

"""What pictures are made of: bars with what they rest on, lines with their names beside them, heat maps, shifts.

Every function draws plain numbers on axes that the caller made, inside `style.house_style`. All ticks are fixed here,
with their texts: matplotlib makes others when a figure is drawn, which is after the block, in the user's style.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from .style import HURT, INK, LINE, MEDIUM, PAPER, SMALL, SOFT

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

_HEAT = ("#f6f8fb", "#bcd6ea", "#5a9fce", "#0072b2", "#08335a")
_MOST_TICKS = 12
_APART = 0.075
"""Share of the height of a chart that a name beside a line takes."""


@dataclass(frozen=True)
class Line:
    """A line of `draw_lines`.

    Args:
        name: written at its end; empty for one of a bundle, which has no marks at its points either.
        points: (x, y), in order.
        colour: of line and name.
        band: for each point the lowest and highest value that it may stand for; ``None`` where there is none.
        dashed: whether it is one.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: str
    band: Sequence[tuple[float, float] | None] = ()
    dashed: bool = False


# ---------------------------------------------------------------------- axes


def percent_axis(axes: Axes, *, across: bool = True, most: float = 100, few: bool = False) -> None:
    """An axis from 0 to 100 percent with its grid.

    Args:
        axes: to change.
        across: the x axis, else the y axis.
        most: last value of the axis.
        few: leave out the quarters, in small charts.
    """
    axis = axes.xaxis if across else axes.yaxis
    (axes.set_xlim if across else axes.set_ylim)(0, most)
    ticks = (0, 50, 100) if few else (0, 25, 50, 75, 100)
    axis.set_ticks(ticks, [f"{tick}" if tick < 100 else "100 %" for tick in ticks])
    quiet(axes, grid="x" if across else "y")


def quiet(axes: Axes, grid: Literal["x", "y"]) -> None:
    """Take away strokes that say nothing; a grid stays behind what is drawn."""
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.grid(axis=grid, color=LINE, linewidth=0.7)
    axes.spines["bottom" if grid == "x" else "left"].set_visible(False)


def ticks_at(axes: Axes, values: Sequence[float]) -> None:
    """Ticks of the x axis where something was measured, as far as their numbers do not touch."""
    span = (max(values) - min(values)) or 1
    kept: list[float] = []
    for value in sorted(set(values), reverse=True):
        if not kept or kept[-1] - value >= 0.055 * span:
            kept.append(value)
    axes.set_xticks(kept, [f"{value:,.0f}" for value in kept])


# ---------------------------------------------------------------------- bars


def draw_bar(
    axes: Axes,
    y: float,
    value: float,
    colour: str,
    before: float | None = None,
    interval: tuple[float, float] | None = None,
    height: float = 0.62,
) -> None:
    """A horizontal bar: its value, where it was before, and between which values it may lie.

    Args:
        axes: to draw on.
        y: place of its middle.
        value: its length.
        colour: of the bar.
        before: drawn as a stroke across.
        interval: drawn as a thin line.
        height: of the bar.
    """
    axes.barh(y, value, height, color=colour)
    if interval is not None:
        # A white line below the dark one keeps both ends visible, on the bar and off it.
        axes.plot(interval, (y, y), color=PAPER, linewidth=3.2, solid_capstyle="butt", zorder=3)
        axes.plot(interval, (y, y), color=INK, linewidth=1.3, solid_capstyle="butt", zorder=4)
    if before is not None:
        ends = (y - 0.6 * height, y + 0.6 * height)
        axes.plot((before, before), ends, color=INK, linewidth=1.6, solid_capstyle="butt", zorder=5, clip_on=False)


def beside(axes: Axes, y: float, text: str, points: float = 6, *, right: bool = False, soft: bool = False) -> None:
    """A text to the right of the bars.

    Args:
        axes: the bars.
        y: place of the bar.
        text: to write.
        points: from the end of the axis to the text.
        right: these are to its right end, so that numbers stand in a column.
        soft: small and grey.
    """
    axes.annotate(
        text,
        (1, y),
        xycoords=axes.get_yaxis_transform(),
        xytext=(points, 0),
        textcoords="offset points",
        ha="right" if right else "left",
        va="center",
        fontsize=SMALL if soft else MEDIUM - 0.5,
        color=SOFT if soft else INK,
        annotation_clip=False,
    )


def heading(axes: Axes, y: float, text: str) -> None:
    """A line of text above the bars of a group."""
    line = axes.text(
        0, y, text, transform=axes.get_yaxis_transform(), ha="left", va="center", color=INK, weight="bold"
    )
    line.set_in_layout(False)  # a long one would take the width from the bars


# ---------------------------------------------------------------------- lines


def draw_lines(axes: Axes, lines: Sequence[Line], low: float, high: float) -> None:
    """Lines with their bands, and their names at their right ends.

    Args:
        axes: to draw on.
        lines: what is drawn.
        low: smallest value of the y axis.
        high: its largest.
    """
    axes.set_ylim(low, high)
    for line in lines:
        xs, ys = zip(*line.points, strict=True)
        known = [(x, *band) for x, band in zip(xs, line.band, strict=False) if band is not None]
        if len(known) > 1:
            at, lows, highs = zip(*known, strict=True)
            axes.fill_between(at, lows, highs, color=line.colour, alpha=0.13, linewidth=0)
        style = "--" if line.dashed else "-"
        marker = "o" if len(xs) <= 2 * _MOST_TICKS and line.name else None
        axes.plot(xs, ys, style, color=line.colour, linewidth=1.8, marker=marker, markersize=4, clip_on=False)
    ends = [(line.points[-1][1] - low) / ((high - low) or 1) for line in lines]
    for line, y in zip(lines, spread_out(ends, _APART), strict=True):
        axes.annotate(
            line.name,
            (1, y),
            xycoords="axes fraction",
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=line.colour,
            fontsize=SMALL + 0.5,
        )


def spread_out(places: Sequence[float], apart: float) -> list[float]:
    """Places of texts in [0, 1], moved as little as needed, so that neighbours are so far apart; in their order."""
    order = sorted(range(len(places)), key=places.__getitem__)
    moved = [min(max(places[i], 0.0), 1.0) for i in order]
    for k in range(1, len(moved)):
        moved[k] = max(moved[k], moved[k - 1] + apart)
    top = 1 + apart / 3  # the last one may stand a little above the chart
    for k in reversed(range(len(moved))):
        moved[k] = min(moved[k], top)
        top = moved[k] - apart
    result = [0.0] * len(moved)
    for i, place in zip(order, moved, strict=True):
        result[i] = place
    return result


# ---------------------------------------------------------------------- heat maps


def heat_map(axes: Axes, table: torch.Tensor, low: float, high: float, rows: Sequence[str] | None) -> AxesImage:
    """A table as shades of one colour; its largest cell is framed.

    Args:
        axes: to draw on.
        table: ``[rows, columns]``, any number type.
        low: value of the lightest shade.
        high: value of the darkest.
        rows: their names; ``None`` where a neighbour shows them.

    Returns:
        The image, for a colour bar.
    """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    shades = LinearSegmentedColormap.from_list("kedit", _HEAT)
    values: Any = table.float().numpy()
    image = axes.imshow(values, cmap=shades, vmin=low, vmax=high, aspect="auto")
    count = table.shape[1]
    step = max(1, -(-count // _MOST_TICKS))
    axes.set_xticks(range(0, count, step), [str(i) for i in range(0, count, step)])
    axes.set_yticks(range(len(table)), rows if rows is not None else [""] * len(table))
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    row, column = divmod(int(table.float().argmax()), count)
    axes.add_patch(
        Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=HURT, linewidth=1.6, clip_on=False)
    )
    return image


# ---------------------------------------------------------------------- shifts


def draw_shift(axes: Axes, y: float, before: float | None, after: float | None, colour: str) -> None:
    """Where a number was (a ring) and where it is now (a dot), with an arrow between them.

    Args:
        axes: to draw on.
        y: place of both.
        before: the first; ``None``: there is none.
        after: the second.
        colour: of all.
    """
    if before is not None and after is not None and abs(after - before) > 3:
        axes.annotate(
            "",
            (after, y),
            (before, y),
            arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1.6, "shrinkA": 3, "shrinkB": 3},
        )
    for value, filled in ((before, PAPER), (after, colour)):
        if value is not None:
            axes.plot([value], [y], "o", markersize=6.5, color=filled, markeredgecolor=colour, zorder=5, clip_on=False)

"""Small charts: bars of several runs for one number, and curves over the number of edits as inline SVG."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from ...drawing.style import COLOURS
from ..measures.catalogue import SHARE, Metric
from .estimates import Estimate


def colour(index: int) -> str:
    """Colour of the run with this index."""
    return COLOURS[index % len(COLOURS)]


@dataclass(frozen=True)
class Bar:
    """One bar.

    Args:
        label: name of the run.
        before: value before the edits, a stroke across the bar; ``None``: there is none.
        after: its length; ``None`` draws no bar.
        rests_on: number of edits and interval.
        mark: classes of the number, such as ``best``.
    """

    label: str
    before: float | None
    after: float | None
    rests_on: Estimate | None = None
    mark: str = ""


def bars(rows: Sequence[Bar], *, metric: Metric = SHARE, colours: Mapping[str, int] | None = None) -> str:
    """One horizontal bar per run, below its name, its interval, n and value.

    Args:
        rows: what is shown.
        metric: what the values are.
        colours: label → index of its colour, so that a run has the same one in all charts; default: the row. With
            more runs than colours, all bars have the same.
    """
    alike = len(colours if colours is not None else rows) > len(COLOURS)
    known = [abs(v) for row in rows for v in (row.before, row.after) if v is not None]
    top = max([*known, 1e-9]) * 1.05 if metric.unit != "percent" or any(v > 1 for v in known) else 1.0

    def place(value: float) -> float:
        return 100 * max(0.0, min(1.0, value / top))

    parts = []
    for index, row in enumerate(rows):
        drawn, number, about = "", "–", ""
        if row.after is not None:
            number = metric.text(row.after)
            ink = colour(0 if alike else _place(colours, row.label, index))
            drawn = f'<span class="fill" style="width:{place(row.after):.1f}%;background:{ink}"></span>'
        if row.rests_on is not None:
            about = f"n {row.rests_on.n}"
            if row.rests_on.interval is not None:
                low, high = row.rests_on.interval
                about = f"{metric.text(low)} to {metric.text(high)}, {about}"
                width = place(high) - place(low)
                drawn += f'<span class="sure" style="left:{place(low):.1f}%;width:{width:.1f}%"></span>'
        old = ""
        if row.before is not None:
            drawn += f'<span class="before" style="left:{place(row.before):.1f}%"></span>'
            old = f' title="before: {metric.text(row.before)}"'
        value = f'<span class="{row.mark}">{number}</span>' if row.mark else number
        parts.append(
            f'<div class="bar"{old}><span class="words"><span class="name">{escape(row.label)}</span>'
            f'<span class="range">{about}</span><span class="value">{value}</span></span>'
            f'<span class="track">{drawn}</span></div>'
        )
    return "".join(parts)


def curves(
    lines: Mapping[str, Sequence[tuple[int, float]]], colours: Mapping[str, int] | None = None, key: bool = True
) -> str:
    """One line per run over the number of edits; values are fractions of 1.

    Args:
        lines: label → (number of edits, value), each with at least two points.
        colours: as in `bars`.
        key: name the lines below the chart.
    """
    left, top, width, height = 34, 10, 300, 150
    last = max(n for points in lines.values() for n, _ in points)
    first = min(n for points in lines.values() for n, _ in points)
    span = max(1, last - first)

    def place(n: int, value: float) -> tuple[float, float]:
        return left + (n - first) / span * width, top + (1 - max(0.0, min(1.0, value))) * height

    parts = []
    for step in (0.0, 0.5, 1.0):
        y = top + (1 - step) * height
        parts.append(f'<line class="grid" x1="{left}" x2="{left + width}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="soft" x="{left - 6}" y="{y + 4}" text-anchor="end">{100 * step:.0f}</text>')
    marks = sorted({n for points in lines.values() for n, _ in points})
    drawn = -1e9
    for n in marks:
        x = place(n, 0)[0]
        if x - drawn >= 34:  # no label over another
            parts.append(f'<text class="soft" x="{x:.1f}" y="{top + height + 16}" text-anchor="middle">{n}</text>')
            drawn = x
    parts.append(f'<text class="soft" x="{left + width}" y="{top + height + 32}" text-anchor="end">edits</text>')
    for index, (label, points) in enumerate(lines.items()):
        ink = colour(_place(colours, label, index))
        spots = [place(n, value) for n, value in sorted(points)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        parts.append(f'<polyline fill="none" stroke="{ink}" stroke-width="2" points="{path}"/>')
        for (x, y), (n, value) in zip(spots, sorted(points), strict=True):
            note = f"{escape(label)}, {n} edits: {100 * value:.1f}"
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{ink}"><title>{note}</title></circle>')
    svg = f'<svg viewBox="0 0 {left + width + 16} {top + height + 40}" role="img">{"".join(parts)}</svg>'
    return svg + legend(lines, colours) if key else svg


def legend(labels: Iterable[str], colours: Mapping[str, int] | None = None) -> str:
    """The colours of the lines of `curves`."""
    inks = {label: colour(_place(colours, label, index)) for index, label in enumerate(labels)}
    names = (
        f'<span class="key"><span style="color:{ink}">●</span> {escape(label)}</span>' for label, ink in inks.items()
    )
    return f'<div class="soft">{" ".join(names)}</div>'


def _place(colours: Mapping[str, int] | None, label: str, index: int) -> int:
    return index if colours is None else colours.get(label, index)

"""Small charts as inline SVG: bars of several runs for one number, and curves over the number of edits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

# Okabe and Ito's colours, which people with colour blindness can tell apart, without black and yellow.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f7f7f")
_BAR_WIDTH, _ROW = 190, 24
LONG_LABEL = 30
"""Letters from which on a label needs a wide chart."""
_LONGEST_LABEL = 64


def colour(index: int) -> str:
    """Colour of the run with this index."""
    return COLOURS[index % len(COLOURS)]


def bars(
    rows: Sequence[tuple[str, float | None, float | None]],
    *,
    bits: bool = False,
    places: Mapping[str, int] | None = None,
) -> str:
    """One horizontal bar per run; a stroke marks the value before the edits.

    Args:
        rows: label, value before (or ``None``), value after (``None`` draws no bar).
        bits: the values are entropies, not fractions of 1.
        places: label → index of its colour, so that a run has the same one in all charts; default: the row. With
            more runs than colours, all bars have the same.
    """
    alike = len(places if places is not None else rows) > len(COLOURS)
    known = [abs(v) for _, before, after in rows for v in (before, after) if v is not None]
    top = max([*known, 1e-9]) * 1.05 if bits or any(v > 1 for v in known) else 1.0
    height = _ROW * len(rows) + 4
    letters = min(_LONGEST_LABEL, max(17, *(len(label) for label, _, _ in rows)))
    margin = 7 * letters
    width = margin + _BAR_WIDTH + 60
    parts = []
    for step in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = margin + step * _BAR_WIDTH
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}"/>')
    for index, (label, before, after) in enumerate(rows):
        y = index * _ROW + 4
        text = _short(label, letters)
        parts.append(f'<text x="{margin - 8}" y="{y + 13}" text-anchor="end">{escape(text)}</text>')
        if after is not None:
            length = max(0.0, min(1.0, after / top)) * _BAR_WIDTH
            number = f"{after:.2f}" if bits else f"{100 * after:.1f}"
            old = "" if before is None else f"; before {before:.2f}" if bits else f"; before {100 * before:.1f}"
            ink = colour(0 if alike else _place(places, label, index))
            parts.append(
                f'<rect x="{margin}" y="{y + 1}" width="{length:.1f}" height="{_ROW - 8}" rx="2"'
                f' fill="{ink}"><title>{escape(label)}: {number}{old}</title></rect>'
            )
            parts.append(f'<text x="{margin + _BAR_WIDTH + 8}" y="{y + 13}">{number}</text>')
        if before is not None:
            x = margin + max(0.0, min(1.0, before / top)) * _BAR_WIDTH
            parts.append(f'<line class="before" x1="{x:.1f}" x2="{x:.1f}" y1="{y - 1}" y2="{y + _ROW - 5}"/>')
    return f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>'


def curves(
    lines: Mapping[str, Sequence[tuple[int, float]]], places: Mapping[str, int] | None = None, key: bool = True
) -> str:
    """One line per run over the number of edits; values are fractions of 1.

    Args:
        lines: label → (number of edits, value), each with at least two points.
        places: as in `bars`.
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
        ink = colour(_place(places, label, index))
        spots = [place(n, value) for n, value in sorted(points)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        parts.append(f'<polyline fill="none" stroke="{ink}" stroke-width="2" points="{path}"/>')
        for (x, y), (n, value) in zip(spots, sorted(points), strict=True):
            note = f"{escape(label)}, {n} edits: {100 * value:.1f}"
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{ink}"><title>{note}</title></circle>')
    svg = f'<svg viewBox="0 0 {left + width + 16} {top + height + 40}" role="img">{"".join(parts)}</svg>'
    return svg + legend(lines, places) if key else svg


def legend(labels: Iterable[str], places: Mapping[str, int] | None = None) -> str:
    """The colours of the lines of `curves`."""
    names = (
        f'<span class="key"><span style="color:{colour(_place(places, label, index))}">●</span> {escape(label)}</span>'
        for index, label in enumerate(labels)
    )
    return f'<div class="soft">{" ".join(names)}</div>'


def _short(label: str, length: int) -> str:
    return label if len(label) <= length else label[: length - 1] + "…"


def _place(places: Mapping[str, int] | None, label: str, index: int) -> int:
    return index if places is None else places.get(label, index)

"""Reports as pictures: bars with their intervals, and curves over the number of edits.

The numbers are those of `Results.summary` and `Results.curve`, the intervals those of the HTML page.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ...drawing.marks import Line, beside, draw_bar, draw_lines, heading, percent_axis, ticks_at
from ...drawing.style import COLOURS, PALE, SMALL, SOFT, WIDTH, as_label, house_style, name_figure, new_figure
from ...errors import EvaluationError, check_choice
from ..measures.catalogue import metric_of
from .estimates import Estimate, estimates
from .figures import protocol_name
from .groups import Runs
from .results import Results
from .summaries import LABELS, AxisKey, in_charts, label_of, means_by_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PlotKind = Literal["bars", "curves"]
_READING = "Line in a bar: 95 % interval. Stroke across: before the edits. n: edits with such questions."
_MOST_BANDS = 3
"""Lines with bands in one chart; more of them hide each other."""
_TITLE = 24
"""Characters in a line of the title of one of several charts side by side; longer ones reach into the next chart."""


@dataclass(frozen=True)
class _Mean:
    """A mean as it is drawn, in percent.

    Args:
        protocol: under which it was measured.
        before: the edits; ``None``: it does not exist then.
        after: the edits.
        rests_on: number of edits, and interval.
        text: the number for people.
    """

    protocol: str
    before: float | None
    after: float
    rests_on: Estimate | None
    text: str

    def draw(self, axes: Axes, y: float, *, pale: bool, height: float = 0.62) -> None:
        interval = _percents(self.rests_on)
        draw_bar(axes, y, self.after, PALE if pale else COLOURS[0], self.before, interval, height)


def plot_report(
    report: Results, kind: PlotKind | None, protocol: str | None, when: str | None, axes: Axes | None
) -> Figure:
    """One report; see `EvaluationReport.plot`."""
    runs = Runs([report])
    protocols = _protocols(runs, protocol)
    if _kind(runs, kind) == "curves":
        return _curves(runs, protocols, axes)
    means = _means(report, protocols, when)
    rows = sum(map(len, means.values()))
    several = len({mean.protocol for found in means.values() for mean in found}) > 1
    with house_style("a report"):
        height = 1.0 + (0.27 * rows + 0.3 * len(means) if several else 0.35 * rows)
        figure: Any = axes.get_figure() if axes else new_figure(WIDTH, height)
        given, axes = axes, axes or figure.subplots()
        y, labels = 0.0, {}
        for key, found in means.items():
            if several:
                heading(axes, y, label_of(*key).capitalize())
                y += 0.95
            for mean in found:
                mean.draw(axes, y, pale=several and not report.writes(mean.protocol))
                beside(axes, y, mean.text, 44, right=True)
                if mean.rests_on is not None:
                    beside(axes, y, f"n {mean.rests_on.n}", 76, right=True, soft=True)
                labels[y] = protocol_name(mean.protocol).lower() if several else label_of(*key)
                y += 1
            y += 0.35 if several else 0
        axes.set_yticks(list(labels), list(labels.values()))
        if several:
            axes.tick_params(axis="y", labelcolor=SOFT, labelsize=SMALL + 0.5)
        axes.set_ylim(y - 0.3, -0.7)
        percent_axis(axes)
        name_figure(figure, _title(runs, protocols, when), _READING, given)
    return figure


def plot_runs(runs: Runs[Any], kind: PlotKind | None, protocol: str | None, axes: Axes | None) -> Figure:
    """Several reports; see `Comparison.plot`."""
    protocols = _protocols(runs, protocol)
    if _kind(runs, kind) == "curves":
        return _curves(runs, protocols, axes)
    groups = [(g.title, {n: _means(r, protocols, None) for n, r in g.reports.items()}) for g in runs.groups]
    keys = list(dict.fromkeys(key for _, by_run in groups for means in by_run.values() for key in means))
    if axes is not None:
        raise EvaluationError("a comparison has a chart for each number, and ax= takes one; leave it out")
    thin = len(protocols) > 1
    names_of = {key: textwrap.fill(label_of(*key).replace("_", " "), _TITLE) for key in keys}
    with house_style("a report"):
        counts = [len(by_run) for _, by_run in groups]
        height = 1.3 + 0.17 * max(name.count("\n") for name in names_of.values())
        height += 0.35 * (len(groups) - 1) + (0.42 if thin else 0.32) * sum(counts)
        figure = new_figure(max(WIDTH, 1.5 + 1.5 * len(keys)), height)
        grid = figure.subplots(len(groups), len(keys), squeeze=False, sharex=True, height_ratios=counts)
        for number, (group, by_run) in enumerate(groups):
            for place, key in enumerate(keys):
                cell = grid[number][place]
                means = [found.get(key, []) for found in by_run.values()]
                _bars_of_runs(cell, means, protocols)
                names = [as_label(name, 26) for name in by_run] if place == 0 else [""] * len(by_run)
                cell.set_yticks(range(len(by_run)), names)
                n = {mean.rests_on.n for found in means for mean in found if mean.rests_on is not None}
                about = f"n {_span(n)}" if n else ""
                title = f"{names_of[key]}\n{about}" if number == 0 else about
                cell.set_title(title, fontsize=8.5, linespacing=1.4)
            grid[number][0].set_ylabel(as_label(group, 28))
        dark = f"Dark: {_said(protocols[:1])}. Pale: {_said(protocols[1:])}. " if thin else ""
        name_figure(figure, _title(runs, protocols, None), dark + _READING)
    return figure


def _bars_of_runs(axes: Axes, means: Sequence[Sequence[_Mean]], protocols: Sequence[str]) -> None:
    """One number of all runs: a bar for each, and a pale one below it for each further protocol."""
    height = 0.76 / len(protocols)
    for row, found in enumerate(means):
        for mean in found:
            place = protocols.index(mean.protocol)
            y = row + (place - (len(protocols) - 1) / 2) * height
            mean.draw(axes, y, pale=place > 0, height=height if len(protocols) > 1 else 0.62)
            beside(axes, y, mean.text, 4, soft=place > 0)
    axes.set_ylim(len(means) - 0.45, -0.55)
    percent_axis(axes, few=True)


# ---------------------------------------------------------------------- curves


def _curves(runs: Runs[Any], protocols: Sequence[str], axes: Axes | None) -> Figure:
    """One report: a chart per protocol with a line per number. Several: a chart per number with a line per report."""
    charts = _charts(runs.reports, protocols)
    if axes is not None and len(charts) > 1:
        names = ", ".join(charts)
        raise EvaluationError(f"there are {len(charts)} charts ({names}), and ax= takes one; leave it out")
    with house_style("a report"):
        columns = min(2, len(charts))
        rows = -(-len(charts) // columns)
        figure: Any = axes.get_figure() if axes else new_figure(WIDTH + 1.9 * (columns - 1), 0.9 + 2.4 * rows)
        cells = [axes] if axes else list(figure.subplots(rows, columns, squeeze=False).flat)
        bands = all(len(lines) <= _MOST_BANDS for lines in charts.values())
        for (title, lines), cell in zip(charts.items(), cells, strict=False):
            draw_lines(cell, lines if bands else [Line(li.name, li.points, li.colour) for li in lines], 0, 103)
            percent_axis(cell, across=False, most=103)
            ticks_at(cell, [x for line in lines for x, _ in line.points])
            cell.set_xlabel("edits in the model")
            if len(charts) > 1:
                cell.set_title(title)
        for cell in cells[len(charts) :]:
            cell.set_axis_off()
        note = "Means over all edits made until then." + (" Band: 95 % interval." if bands else "")
        name_figure(figure, _title(runs, protocols if len(charts) == 1 else (), None), note, axes)
    return figure


def _charts(reports: Mapping[str, Results], protocols: Sequence[str]) -> dict[str, list[Line]]:
    """Title → lines."""
    charts: dict[str, list[Line]] = {}

    def add(
        title: str, number: str, place: int, run: int, points: Iterable[tuple[int, float]], band: Any = ()
    ) -> None:
        """A line of one run's number, named after whichever of the two the chart does not name."""
        drawn = [(n, 100 * value) for n, value in points]
        if len(drawn) > 1:
            name, index = (number, place) if len(reports) == 1 else (as_label(list(reports)[run], 22), run)
            charts.setdefault(title, []).append(Line(name, drawn, COLOURS[index % len(COLOURS)], band))

    for run, report in enumerate(reports.values()):
        for protocol in protocols:
            if protocol not in report.protocols:
                continue
            times = [when for when in report.times if when != "immediate" and report.has(protocol, when)]
            chosen = [report.chosen(protocol, when) for when in times]
            rests = {len(results): estimates(results) for results in chosen}
            behind = f", {protocol_name(protocol).lower()}" if len(protocols) > 1 else ""
            for place, name in enumerate(LABELS):
                points, number = report.curve(name, protocol), label_of("", name)
                band = [_percents(rests[n].get(("", name))) for n, _ in points]
                title = protocol_name(protocol) if len(reports) == 1 else number + behind
                add(title, number, place, run, points, band)
        for place, name in enumerate(report.abilities):
            title = "General abilities" if len(reports) == 1 else f"general: {name}"
            add(title, name, place, run, report.curve(f"abilities/{name}"))
    if not charts:
        raise EvaluationError(
            "there is nothing to draw along the number of edits: evaluate with setting='sequential', at=[10, 100]"
        )
    return charts


# ---------------------------------------------------------------------- what is drawn


def _kind(runs: Runs[Any], kind: PlotKind | None) -> PlotKind:
    """Curves where there are any, else bars."""
    if kind is not None:
        check_choice("kind", kind, ("bars", "curves"))
        return kind
    return "curves" if any(w.startswith("at ") for r in runs.reports.values() for w in r.times) else "bars"


def _protocols(runs: Runs[Any], protocol: str | None) -> list[str]:
    """The protocols that are drawn, those under which the model writes its answers first."""
    if protocol is None:
        return runs.written_first
    if protocol not in runs.protocols:
        next(iter(runs.reports.values())).chosen(protocol)  # which says what there is
    return [protocol]


def _means(report: Results, protocols: Sequence[str], when: str | None) -> dict[AxisKey, list[_Mean]]:
    """The means that are drawn as bars: percentages that have a chart on the page, by number.

    Raises:
        EvaluationError: if there is none.
    """
    found: dict[AxisKey, list[_Mean]] = {}
    for protocol in protocols:
        if protocol not in report.protocols:
            continue
        rests = estimates(report.chosen(protocol, when))
        for key, (before, after) in means_by_name(report.summary(protocol, when)).items():
            metric = metric_of(*key)
            if metric.unit == "percent" and in_charts(*key):
                old = None if before is None else 100 * before
                found.setdefault(key, []).append(_Mean(protocol, old, 100 * after, rests.get(key), metric.text(after)))
    if not found:
        raise EvaluationError("none of its numbers is a percentage that could be drawn as a bar; see the table")
    return found


def _percents(estimate: Estimate | None) -> tuple[float, float] | None:
    if estimate is None or estimate.interval is None:
        return None
    low, high = estimate.interval
    return 100 * low, 100 * high


def _title(runs: Runs[Any], protocols: Sequence[str], when: str | None) -> str:
    """What was measured on what; one protocol is named here, several are where their numbers stand."""
    time = {"final": "", "immediate": "right after each edit", None: ""}.get(when, when)
    return ", ".join(filter(None, [as_label(runs.title, 120), time, _said(protocols) if len(protocols) == 1 else ""]))


def _said(protocols: Sequence[str]) -> str:
    return ", ".join(protocol_name(p).lower() for p in protocols)


def _span(counts: set[int]) -> str:
    return str(min(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"

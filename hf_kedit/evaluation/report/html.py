"""The HTML form of reports: one page without anything to load, with charts, and every case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ...drawing.style import COLOURS
from .charts import curves, legend
from .figures import MARKS, READING, mean_cell, means, seconds
from .groups import Group, Runs
from .html_cases import run_cases, side_by_side
from .lead import lead
from .page import number_table, page, scrolling
from .results import Results
from .summaries import LABELS, SHORT

_MANY_RUNS = 4
"""Runs from which on their cases are behind a line that opens them."""
_SATURATED = "teacher_forced"


def render(runs: Runs[Any], title: str | None, max_cases: int) -> str:
    """The page as text.

    Args:
        runs: what was measured.
        title: of the page; ``None``: what was compared.
        max_cases: cases of each run that are shown one by one; 0 for none.
    """
    title = runs.title if title is None else title
    parts = [
        f'<header><p class="above">Knowledge editing report</p><h1>{escape(title)}</h1>{_failures(runs)}</header>',
        lead(runs),
        _reading(len(runs.reports) > 1),
    ]
    groups = runs.groups
    # A run keeps its colour in all charts, and a method in all groups.
    colours = {name: place for place, name in enumerate(dict.fromkeys(n for g in groups for n in g.reports))}
    behind = []
    for group in groups:
        for protocol in runs.written_first:
            figures = [means(group, protocol, when, colours) for when in runs.times]
            figures.append(_curves(group, protocol, colours))
            if protocol == _SATURATED and runs.writes(runs.written_first[0]):
                behind += figures
            else:
                parts += figures
    parts.append(_health(runs))
    parts += [_abilities(group, colours) for group in groups]
    if any(behind):
        parts.append(
            '<details class="behind"><summary>Teacher forced <span class="soft">(the same edits, scored token by token'
            f" behind the right answer; saturates)</span></summary>{''.join(behind)}</details>"
        )
    parts.append(_runs(runs))
    if max_cases:
        parts += [side_by_side(number, group) for number, group in enumerate(groups)]
    closed = len(runs.reports) > _MANY_RUNS
    if closed and max_cases:
        parts.append("<h2>Run by run <span class='soft'>every probe and text</span></h2>")
    for number, (label, report) in enumerate(runs.reports.items()):
        parts.append(run_cases(number, label, report, max_cases, closed))
    return page(title, parts)


def _failures(runs: Runs[Any]) -> str:
    lost = [f"{label}: no edit could be made ({_first_reason(report)})" for label, report in runs.empty.items()]
    lost += [f"{label}: failed ({reason})" for label, reason in runs.failed.items()]
    return "".join(f'<p class="warning">{escape(line)}</p>' for line in lost)


def _reading(several: bool) -> str:
    """What the numbers and marks mean, behind a line that opens it."""
    return (
        '<details class="more"><summary>How to read this page</summary><p class="note">Reliability: does the edited'
        " prompt give the new answer? Generalization: do other wordings? Locality: does everything else stay as the"
        " unedited model had it (agreement; whether it was right plays no role)? Portability: do facts that follow"
        " hold? An axis is a kind of such questions. Numbers of different protocols are not comparable.</p>"
        f'<p class="note">{READING}{" " + MARKS if several else ""}</p></details>'
    )


def _first_reason(report: Results) -> str:
    return next((str(failed["reason"]) for failed in report.failed), "nothing was measured")


def _curves(group: Group[Any], protocol: str, colours: Mapping[str, int]) -> str:
    """The means along the number of edits."""
    points = {
        SHORT[name]: {
            label: report.curve(name, protocol)
            for label, report in group.reports.items()
            if protocol in report.protocols and any(when.startswith("at ") for when in report.times)
        }
        for name in LABELS
    }
    panels = _line_panels(points, colours)
    title = f"{group.title}: along" if group.title else "Along"
    return (
        f"<h2>{escape(title)} the number of edits <span class='soft'>({escape(protocol)})</span></h2>{panels}"
        if (panels)
        else ""
    )


def _line_panels(points: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]], colours: Mapping[str, int]) -> str:
    """Charts of curves: one per number with a line per run, or, with many runs, one per run with a line per number.

    Args:
        points: number → run → points; runs with less than two points are left out.
        colours: run → index of its colour.
    """
    lines = {name: {run: p for run, p in runs.items() if len(p) > 1} for name, runs in points.items()}
    lines = {name: runs for name, runs in lines.items() if runs}
    runs = list(dict.fromkeys(run for by_run in lines.values() for run in by_run))
    if not lines:
        return ""
    if len(runs) <= len(COLOURS):
        panels = [(name, curves(by_run, colours)) for name, by_run in lines.items()]
        key = ""
    else:
        # Where nothing but right answers was kept, it runs under the line of the locality.
        lines.pop(SHORT["locality_accuracy"], None)
        colours = {name: place for place, name in enumerate(lines)}
        key = legend(lines, colours)
        panels = [
            (run, curves({name: by_run[run] for name, by_run in lines.items() if run in by_run}, colours, key=False))
            for run in runs
        ]
    boxes = "".join(f'<div class="panel"><strong>{escape(name)}</strong>{chart}</div>' for name, chart in panels)
    return f'{key}<div class="panels{" small" if key else ""}">{boxes}</div>'


def _health(runs: Runs[Any]) -> str:
    """Weight drift and perplexity where edits pile up: at the end, and at every checkpoint."""
    ends, all_points = [], []
    for label, report in runs.reports.items():
        points = [p for p in report.checkpoints if p.get("drift") or "perplexity" in p]
        all_points += [(label, _wear_cells(point)) for point in points]
        ends += [(label, _wear_cells(point)) for point in points[-1:]]
    if not ends:
        return ""
    head = ["edits", "relative weight drift", "spectral norm", "changed weights"]
    if any("perplexity" in p for r in runs.reports.values() for p in r.checkpoints):
        head += ["activations", "perplexity", "before", "state"]
    more = ""
    if len(all_points) > len(ends):
        more = (
            f'<details class="more"><summary>At every checkpoint</summary>{number_table(head, all_points)}</details>'
        )
    return (
        "<h2>Wear of the model</h2><p class='note'>Largest change of a weight matrix relative to its own norm. Where a"
        " fixed text was given: the norm of what the edited layers put out on it, relative to the unedited model, and"
        " its perplexity (more than 2 times that before is a warning, more than 10 times a collapse). Methods that"
        " leave the weights alone have no drift.</p>"
        f"{number_table(head, ends)}{more}"
    )


def _wear_cells(point: Mapping[str, Any]) -> str:
    drift, state = point.get("drift") or {}, point.get("state")
    numbers = [point.get("n_edits"), *(drift.get(name) for name in ("relative", "spectral", "changed"))]
    if "perplexity" not in point:
        return "".join(f'<td class="n">{_number(value)}</td>' for value in numbers)
    numbers += [point.get("activation_norm_ratio"), point["perplexity"], point.get("perplexity_before")]
    css = "n" if state == "ok" else "n warning"
    return (
        "".join(f'<td class="n">{_number(value)}</td>' for value in numbers)
        + f'<td class="{css}">{escape(str(state))}</td>'
    )


def _abilities(group: Group[Any], colours: Mapping[str, int]) -> str:
    """General abilities before and at every checkpoint: charts, and the table with the same numbers."""
    names = list(dict.fromkeys(name for report in group.reports.values() for name in report.abilities))
    if not names:
        return ""
    points = {
        name: {label: report.curve(f"abilities/{name}") for label, report in group.reports.items()} for name in names
    }
    rows = []
    for label in group.reports:
        scores = {name: dict(points[name][label]) for name in names}
        for count in sorted({n for by_count in scores.values() for n in by_count} - {0}):
            cells = "".join(
                mean_cell("abilities", name, scores[name].get(0), scores[name].get(count)) for name in names
            )
            rows.append((label, f'<td class="n">{count}</td>{cells}'))
    title = f"{group.title}: general" if group.title else "General"
    return (
        f"<h2>{escape(title)} abilities</h2><p class='note'>Percentages on tasks that have nothing to do with the"
        " edits; in brackets: before them. After several batches of one size: their mean.</p>"
        f"{_line_panels(points, colours)}{number_table(['edits', *names], rows)}"
    )


def _number(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _runs(runs: Runs[Any]) -> str:
    """What was run, and what it cost; what is the same for all runs is said once."""
    table: dict[str, dict[str, str]] = {}
    for label, report in runs.reports.items():
        meta, cost, size = report.meta, report.efficiency(), report.meta.get("batch_size") or 1
        together = "one by one" if size == 1 else f"batches of {size}"
        memory = cost["peak_memory_bytes"]
        table[label] = {
            "model": str(meta.get("model") or "–"),
            "method": str(meta.get("method") or "–"),
            "data set": str(meta.get("dataset") or "–"),
            "setting": f"{meta.get('setting')}, {together}",
            "dtype": str(meta.get("dtype") or "–"),
            "device": str(meta.get("device") or "–"),
            "s / edit": seconds(cost["seconds_edit"]),
            "s setup": seconds(cost["seconds_setup"]),
            "s in all": seconds(meta.get("seconds")),
            "peak memory": "–" if memory is None else f"{memory / 1e9:.2f} GB",
        }
    names = list(next(iter(table.values())))
    same = [n for n in names if len(table) > 1 and len({row[n] for row in table.values()}) == 1]
    first = next(iter(table.values()))
    common = ", ".join(f"{n} {first[n]}" for n in same if first[n] != "–")
    columns = [n for n in names if n not in same]
    body = [(label, "".join(f"<td>{escape(row[n])}</td>" for n in columns)) for label, row in table.items()]
    head = "".join(f"<th>{escape(n)}</th>" for n in columns)
    rows = "".join(f"<tr><td>{escape(label)}</td>{cells}</tr>" for label, cells in body)
    note = f'<p class="note">All runs: {escape(common)}.</p>' if common else ""
    return f"<h2>Runs</h2>{note}{scrolling(f'<tr><th>run</th>{head}</tr>{rows}')}"

"""The HTML form of reports: one page without anything to load, with charts as inline SVG and every case."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from ...storage.display import percent
from .charts import COLOURS, LONG_LABEL, bars, curves, legend
from .groups import Group, Runs
from .html_cases import run_cases, side_by_side
from .results import Results
from .summaries import LABELS, SHORT, formatted, in_charts, label_of, means_by_axis, means_by_name

_MANY_RUNS = 4
"""Runs from which on their cases are behind a line that opens them."""
_STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5b6675; --line: #d9dee6; --paper: #ffffff;
  --panel: #f5f7fa; --good: #0b7a4b; --bad: #b3261e; --mark: #fff3c4; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7ebf0; --soft: #9aa5b4; --line: #37404d; --paper: #14181f;
  --panel: #1d232c; --good: #5fd39c; --bad: #ff8a80; --mark: #4a3f12; } }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 1180px; padding: 24px }
h1 { font-size: 1.6rem; margin: 0 0 .25rem } h2 { font-size: 1.2rem; margin: 2.2rem 0 .5rem }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem } p.note, .soft { color: var(--soft) } p.note { max-width: 75ch }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .9rem }
th, td { text-align: left; padding: .3rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums } td.n { white-space: nowrap }
th.n { max-width: 9em }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 14px }
.panels.wide { grid-template-columns: repeat(auto-fill, minmax(540px, 1fr)) }
.panel { background: var(--panel); border-radius: 8px; padding: 10px 12px } .panel svg { width: 100%; height: auto }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif } svg .soft { fill: var(--soft) }
svg .grid { stroke: var(--line); stroke-width: 1 } svg .before { stroke: var(--ink); stroke-width: 2 }
.panels.small { grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)) }
.key { white-space: nowrap; margin-right: .8em }
details.more { margin: .6rem 0 } details.more > summary, details.run > summary { cursor: pointer; padding: .3rem 0 }
details.run { border-bottom: 1px solid var(--line) } details.run[open] { padding-bottom: 1rem }
details.run > summary { font-weight: 600 } details.case .scroll { margin-bottom: .9rem }
details.case { border-bottom: 1px solid var(--line) } details.case > summary { padding: .35rem 0; cursor: pointer }
details.case[open] { background: var(--panel); padding: 0 .8rem .8rem; border-radius: 8px }
.up { color: var(--good) } .down { color: var(--bad) } .target { background: var(--mark); padding: 0 .25em;
  border-radius: 3px } .text { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 16em; max-width: 46ch }
input[type=search] { font: inherit; padding: .35rem .6rem; width: min(26rem, 100%); border: 1px solid var(--line);
  border-radius: 6px; background: var(--paper); color: inherit; margin: .3rem 0 .6rem }
.warning { color: var(--bad); font-weight: 600 } code { font-size: .9em }
"""
_SCRIPT = """
document.querySelectorAll('input[type=search]').forEach(function (field) {
  field.addEventListener('input', function () {
    var typed = field.value.toLowerCase();
    document.getElementById(field.dataset.list).querySelectorAll('details.case').forEach(function (entry) {
      entry.hidden = entry.textContent.toLowerCase().indexOf(typed) < 0;
    });
  });
});
"""


def render(runs: Runs[Any], title: str, max_cases: int) -> str:
    """The page as text."""
    parts = [f"<h1>{escape(title)}</h1>", _subtitle(runs)]
    groups = runs.groups
    # A run keeps its colour in all charts, and a method in all groups.
    places = {name: place for place, name in enumerate(dict.fromkeys(n for g in groups for n in g.reports))}
    for group in groups:
        for protocol in runs.protocols:
            for when in runs.times:
                parts.append(_means(group, protocol, when, places))
        for protocol in runs.protocols:
            parts.append(_curves(group, protocol, places))
    parts.append(_health(runs))
    parts += [_abilities(group, places) for group in groups]
    parts.append(_runs(runs))
    if max_cases:
        parts += [side_by_side(number, group) for number, group in enumerate(groups)]
    closed = len(runs.reports) > _MANY_RUNS
    if closed and max_cases:
        parts.append("<h2>Run by run <span class='soft'>(every probe and text)</span></h2>")
    for number, (label, report) in enumerate(runs.reports.items()):
        parts.append(run_cases(number, label, report, max_cases, closed))
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n{body}\n"
        f"<script>{_SCRIPT}</script>\n</body></html>\n"
    )


def _subtitle(runs: Runs[Any]) -> str:
    models = dict.fromkeys(str(r.meta.get("model") or "a model in memory") for r in runs.reports.values())
    number = len(runs.reports)
    count = "1 run" if number == 1 else f"{number} runs"
    lost = [f"{label}: no edit could be made ({_first_reason(report)})" for label, report in runs.empty.items()]
    lost += [f"{label}: failed ({reason})" for label, reason in runs.failed.items()]
    return (
        f'<p class="soft">{count} on {escape(", ".join(models))}</p>'
        + "".join(f'<p class="warning">{escape(line)}</p>' for line in lost)
        + '<p class="note">Reliability: does the edited prompt give the new answer? Generalization: do other wordings?'
        " Locality: does everything else stay as the unedited model had it (agreement; whether it was right plays no"
        " role)? Portability: do facts that follow hold? Numbers of different protocols are not comparable.</p>"
    )


def _first_reason(report: Results) -> str:
    return next((str(failed["reason"]) for failed in report.failed), "nothing was measured")


# ---------------------------------------------------------------------- means


def _means(group: Group[Any], protocol: str, when: str, places: Mapping[str, int]) -> str:
    """Charts, one per mean with one bar per report, and the tables with the same numbers."""
    summaries = group.column(protocol, when)
    if not summaries:
        return ""
    means = {label: means_by_name(summary) for label, summary in summaries.items()}
    columns = list(dict.fromkeys(key for row in means.values() for key in row))
    panels = []
    for key in columns:
        if not in_charts(*key):
            continue
        rows = [(label, *row.get(key, (None, None))) for label, row in means.items()]
        chart = bars(rows, bits=key[0] == "fluency", places=places)
        panels.append(f'<div class="panel"><strong>{escape(label_of(*key))}</strong>{chart}</div>')
    wide = " wide" if any(len(label) > LONG_LABEL for label in means) else ""
    unit = "Bits." if all(section == "fluency" for section, _ in columns) else "Percentages."
    body = []
    for label, row in means.items():
        summary = summaries[label]
        failed = f' <span class="warning">{summary["n_failed"]} failed</span>' if summary["n_failed"] else ""
        cells = [f'<td class="n">{summary["n"]}{failed}</td>']
        cells += [_mean_cell(key[0], *row.get(key, (None, None))) for key in columns]
        cells.append(f'<td class="n">{_seconds(summary["seconds_edit"])}</td>')
        body.append((label, "".join(cells)))
    head = ["edits", *(label_of(*key) for key in columns), "s / edit"]
    return (
        f"<h2>{_heading(group, protocol, next(iter(summaries.values()))['scorer'], when)}</h2>"
        f'<div class="panels{wide}">{"".join(panels)}</div>'
        f'<p class="note">{unit} The stroke across a bar, and the number in brackets: before the edits.</p>'
        f"{_table(head, body)}{_axes(summaries)}"
    )


def _heading(group: Group[Any], protocol: str, scorer: object, when: str) -> str:
    about = f"<span class='soft'>({escape(str(scorer))}), {escape(when)}</span>"
    return (f"{escape(group.title)}: " if group.title else "") + f"{escape(protocol)} {about}"


def _axes(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """The means of the axes one by one."""
    means = means_by_axis(summaries)
    names = list(dict.fromkeys(key for row in means.values() for key in row))
    if not names:
        return ""
    body = [
        (label, "".join(f'<td class="n">{percent(row.get(key))}</td>' for key in names))
        for label, row in means.items()
    ]
    head = [f"{SHORT[section]}: {axis.replace('_', ' ')}" for section, axis in names]
    return f'<details class="more"><summary>Axis by axis</summary>{_table(head, body)}</details>'


def _table(head: Sequence[str], rows: Iterable[tuple[str, str]]) -> str:
    """A table of numbers with a name in front of each row.

    Args:
        head: names of the columns.
        rows: name and cells, these as HTML.
    """
    names = "".join(f'<th class="n">{escape(name)}</th>' for name in head)
    body = "".join(f"<tr><td>{escape(label)}</td>{cells}</tr>" for label, cells in rows)
    return f'<div class="scroll"><table><tr><th></th>{names}</tr>{body}</table></div>'


def _mean_cell(section: str, before: float | None, after: float | None) -> str:
    old = "" if before is None else f' <span class="soft">({formatted(section, before)})</span>'
    return f'<td class="n">{formatted(section, after)}{old}</td>'


def _curves(group: Group[Any], protocol: str, places: Mapping[str, int]) -> str:
    """The means along the number of edits."""
    points = {
        SHORT[name]: {
            label: report.curve(name, protocol)
            for label, report in group.reports.items()
            if protocol in report.protocols and any(when.startswith("at ") for when in report.times)
        }
        for name in LABELS
    }
    panels = _line_panels(points, places)
    title = f"{group.title}: along" if group.title else "Along"
    return (
        f"<h2>{escape(title)} the number of edits <span class='soft'>({escape(protocol)})</span></h2>{panels}"
        if (panels)
        else ""
    )


def _line_panels(points: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]], places: Mapping[str, int]) -> str:
    """Charts of curves: one per number with a line per run, or, with many runs, one per run with a line per number.

    Args:
        points: number → run → points; runs with less than two points are left out.
        places: run → index of its colour.
    """
    lines = {name: {run: p for run, p in runs.items() if len(p) > 1} for name, runs in points.items()}
    lines = {name: runs for name, runs in lines.items() if runs}
    runs = list(dict.fromkeys(run for by_run in lines.values() for run in by_run))
    if not lines:
        return ""
    if len(runs) <= len(COLOURS):
        panels = [(name, curves(by_run, places)) for name, by_run in lines.items()]
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
        more = f'<details class="more"><summary>At every checkpoint</summary>{_table(head, all_points)}</details>'
    return (
        "<h2>Wear of the model</h2><p class='note'>Largest change of a weight matrix relative to its own norm. Where a"
        " fixed text was given: the norm of what the edited layers put out on it, relative to the unedited model, and"
        " its perplexity (more than 2 times that before is a warning, more than 10 times a collapse). Methods that"
        " leave the weights alone have no drift.</p>"
        f"{_table(head, ends)}{more}"
    )


def _wear_cells(point: Mapping[str, Any]) -> str:
    drift, state = point.get("drift") or {}, point.get("state")
    numbers = [point.get("n_edits"), *(drift.get(name) for name in ("relative", "spectral", "changed"))]
    if "perplexity" not in point:
        return "".join(f'<td class="n">{_number(value)}</td>' for value in numbers)
    numbers += [point.get("activation_norm_ratio"), point["perplexity"], point["perplexity_before"]]
    css = "n" if state == "ok" else "n warning"
    return (
        "".join(f'<td class="n">{_number(value)}</td>' for value in numbers)
        + f'<td class="{css}">{escape(str(state))}</td>'
    )


def _abilities(group: Group[Any], places: Mapping[str, int]) -> str:
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
            cells = "".join(_mean_cell("abilities", scores[name].get(0), scores[name].get(count)) for name in names)
            rows.append((label, f'<td class="n">{count}</td>{cells}'))
    title = f"{group.title}: general" if group.title else "General"
    return (
        f"<h2>{escape(title)} abilities</h2><p class='note'>Percentages on tasks that have nothing to do with the"
        " edits; in brackets: before them. After several batches of one size: their mean.</p>"
        f"{_line_panels(points, places)}{_table(['edits', *names], rows)}"
    )


def _number(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3g}"


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
            "s / edit": _seconds(cost["seconds_edit"]),
            "s setup": _seconds(cost["seconds_setup"]),
            "s in all": _seconds(meta.get("seconds")),
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
    return f'<h2>Runs</h2>{note}<div class="scroll"><table><tr><th>run</th>{head}</tr>{rows}</table></div>'

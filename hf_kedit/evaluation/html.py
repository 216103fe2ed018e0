"""The HTML form of reports: one page without anything to load, with charts as inline SVG and every case."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from . import metrics
from .charts import LONG_LABEL, bars, curves
from .report import EvaluationReport
from .summaries import LABELS, extra_sections, percent, shown

if TYPE_CHECKING:
    from .comparison import Comparison

_SECTIONS = {
    "rewrite": "reliability",
    "rephrase": "generalization",
    "locality": "locality",
    "portability": "portability",
    "fluency": "fluency",
}
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
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 14px }
.panels.wide { grid-template-columns: repeat(auto-fill, minmax(540px, 1fr)) }
.panel { background: var(--panel); border-radius: 8px; padding: 10px 12px } .panel svg { width: 100%; height: auto }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif } svg .soft { fill: var(--soft) }
svg .grid { stroke: var(--line); stroke-width: 1 } svg .before { stroke: var(--ink); stroke-width: 2 }
details.case .scroll { margin-bottom: .9rem }
details.case { border-bottom: 1px solid var(--line) } details.case > summary { padding: .35rem 0; cursor: pointer }
details.case[open] { background: var(--panel); padding: 0 .8rem .8rem; border-radius: 8px }
.up { color: var(--good) } .down { color: var(--bad) } .target { background: var(--mark); padding: 0 .25em;
  border-radius: 3px } .text { white-space: pre-wrap; overflow-wrap: anywhere; max-width: 46ch }
input[type=search] { font: inherit; padding: .35rem .6rem; width: min(26rem, 100%); border: 1px solid var(--line);
  border-radius: 6px; background: var(--paper); color: inherit; margin: .3rem 0 .6rem }
.warning { color: var(--bad); font-weight: 600 } code { font-size: .9em }
"""
_SCRIPT = """
document.querySelectorAll('input[type=search]').forEach(function (field) {
  field.addEventListener('input', function () {
    var words = field.value.toLowerCase();
    document.getElementById(field.dataset.list).querySelectorAll('details.case').forEach(function (entry) {
      entry.hidden = entry.textContent.toLowerCase().indexOf(words) < 0;
    });
  });
});
"""


def render(comparison: Comparison, title: str, max_cases: int) -> str:
    """The page as text."""
    parts = [f"<h1>{escape(title)}</h1>", _subtitle(comparison)]
    for protocol in comparison.protocols:
        for when in comparison.moments:
            parts.append(_means(comparison, protocol, when))
    for protocol in comparison.protocols:
        parts.append(_curves(comparison, protocol))
    parts.append(_health(comparison))
    parts.append(_abilities(comparison))
    parts.append(_runs(comparison))
    for number, (label, report) in enumerate(comparison.reports.items()):
        parts.append(_cases(number, label, report, max_cases))
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n{body}\n"
        f"<script>{_SCRIPT}</script>\n</body></html>\n"
    )


def _subtitle(comparison: Comparison) -> str:
    models = dict.fromkeys(str(r.meta.get("model") or "a model in memory") for r in comparison.reports.values())
    count = len(comparison.reports)
    runs = "1 run" if count == 1 else f"{count} runs"
    empty = "".join(
        f'<p class="warning">{escape(label)}: no edit could be made ({escape(_first_reason(report))})</p>'
        for label, report in comparison.empty.items()
    )
    return (
        f'<p class="soft">{runs} on {escape(", ".join(models))}</p>{empty}'
        '<p class="note">Reliability: does the edited prompt give the new answer? Generalization: do other wordings?'
        " Locality: does everything else stay as the unedited model had it (agreement; whether it was right plays no"
        " role)? Portability: do facts that follow hold? Numbers of different protocols are not comparable.</p>"
    )


def _first_reason(report: EvaluationReport) -> str:
    return next((str(failed["reason"]) for failed in report.meta.get("failed") or ()), "nothing was measured")


# ---------------------------------------------------------------------- means


def _means(comparison: Comparison, protocol: str, when: str) -> str:
    """Charts, one per mean with one bar per report, and the table with the same numbers."""
    from .comparison import in_charts, label_of, means_by_name

    summaries = comparison.column(protocol, when)
    if not summaries:
        return ""
    found = {label: means_by_name(summary) for label, summary in summaries.items()}
    columns = list(dict.fromkeys(key for row in found.values() for key in row))
    scorer = next(iter(summaries.values()))["scorer"]
    places = {label: place for place, label in enumerate(comparison.reports)}
    panels = []
    for key in columns:
        if not in_charts(*key):
            continue
        rows = [(label, *row.get(key, (None, None))) for label, row in found.items()]
        chart = bars(rows, bits=key[0] == "fluency", places=places)
        panels.append(f'<div class="panel"><strong>{escape(label_of(*key))}</strong>{chart}</div>')
    wide = " wide" if any(len(label) > LONG_LABEL for label in found) else ""
    unit = "Bits." if all(section == "fluency" for section, _ in columns) else "Percentages."
    head = "".join(f'<th class="n">{escape(label_of(*key))}</th>' for key in columns)
    body = []
    for label, row in found.items():
        summary = summaries[label]
        cells = "".join(_mean_cell(key[0], *row.get(key, (None, None))) for key in columns)
        seconds = summary["seconds_edit"]
        cells += f'<td class="n">{"–" if seconds is None else format(seconds, ".3g")}</td>'
        failed = f' <span class="warning">{summary["n_failed"]} failed</span>' if summary["n_failed"] else ""
        body.append(f'<tr><td>{escape(label)}</td><td class="n">{summary["n"]}{failed}</td>{cells}</tr>')
    return (
        f"<h2>{escape(protocol)} <span class='soft'>({escape(str(scorer))}), {escape(when)}</span></h2>"
        f'<div class="panels{wide}">{"".join(panels)}</div>'
        f'<p class="note">{unit} The stroke across a bar, and the number in brackets: before the edits.</p>'
        f'<div class="scroll"><table><tr><th></th><th class="n">edits</th>{head}<th class="n">s / edit</th></tr>'
        f"{''.join(body)}</table></div>"
    )


def _mean_cell(section: str, before: float | None, after: float | None) -> str:
    old = "" if before is None else f' <span class="soft">({shown(section, before)})</span>'
    return f'<td class="n">{shown(section, after)}{old}</td>'


def _curves(comparison: Comparison, protocol: str) -> str:
    """The means along the number of edits, one chart per mean with one line per report."""
    from .comparison import SHORT

    places = {label: place for place, label in enumerate(comparison.reports)}
    panels = []
    for name in LABELS:
        lines = {
            label: report.curve(name, protocol)
            for label, report in comparison.reports.items()
            if protocol in report.protocols and any(w.startswith("at ") for w in report.moments)
        }
        lines = {label: points for label, points in lines.items() if len(points) > 1}
        if lines:
            panels.append(f'<div class="panel"><strong>{escape(SHORT[name])}</strong>{curves(lines, places)}</div>')
    if not panels:
        return ""
    return (
        f"<h2>Along the number of edits <span class='soft'>({escape(protocol)})</span></h2>"
        f'<div class="panels">{"".join(panels)}</div>'
    )


def _health(comparison: Comparison) -> str:
    """Weight drift and perplexity of sequential runs."""
    rows = []
    for label, report in comparison.reports.items():
        for point in report.meta.get("checkpoints") or ():
            drift = point.get("drift") or {}
            state = point.get("state")
            cells = [
                _number(point.get("n_edits")),
                _number(drift.get("relative")),
                _number(drift.get("spectral")),
                _number(drift.get("changed")),
                _number(point.get("perplexity")),
                _number(point.get("perplexity_before")),
            ]
            css = "" if state in (None, "ok") else ' class="warning"'
            tail = f"<td{css}>{escape(state or '–')}</td>"
            rows.append(f"<tr><td>{escape(label)}</td>{''.join(f'<td class=n>{c}</td>' for c in cells)}{tail}</tr>")
    if not rows:
        return ""
    names = ("edits", "relative weight drift", "spectral norm", "changed weights", "perplexity", "before")
    head = "".join(f'<th class="n">{name}</th>' for name in names)
    return (
        "<h2>Wear of the model</h2><p class='note'>Largest change of a weight matrix relative to its own norm, and"
        " perplexity on a fixed text where one was given (more than 2 times the unedited model's is a warning, more"
        " than 10 times a collapse).</p>"
        f'<div class="scroll"><table><tr><th></th>{head}<th>state</th></tr>{"".join(rows)}</table></div>'
    )


def _abilities(comparison: Comparison) -> str:
    """General abilities before and at every checkpoint: a line per run, and the table with the same numbers."""
    names = list(dict.fromkeys(name for report in comparison.reports.values() for name in report.abilities))
    if not names:
        return ""
    places = {label: place for place, label in enumerate(comparison.reports)}
    panels, rows = [], []
    for name in names:
        lines = {label: report.curve(f"abilities/{name}") for label, report in comparison.reports.items()}
        lines = {label: points for label, points in lines.items() if len(points) > 1}
        if lines:
            panels.append(f'<div class="panel"><strong>{escape(name)}</strong>{curves(lines, places)}</div>')
    for label, report in comparison.reports.items():
        for point in report.meta.get("checkpoints") or ():
            cells = "".join(f'<td class="n">{_ability_cell(point, name)}</td>' for name in names)
            if point.get("abilities"):
                rows.append(f'<tr><td>{escape(label)}</td><td class="n">{point["n_edits"]}</td>{cells}</tr>')
    head = "".join(f'<th class="n">{escape(name)}</th>' for name in names)
    return (
        "<h2>General abilities</h2><p class='note'>Percentages on tasks that have nothing to do with the edits; in"
        " brackets: before them.</p>"
        f'<div class="panels">{"".join(panels)}</div>'
        f'<div class="scroll"><table><tr><th></th><th class="n">edits</th>{head}</tr>{"".join(rows)}</table></div>'
    )


def _ability_cell(point: Mapping[str, Any], name: str) -> str:
    if name not in (point.get("abilities") or {}):
        return "–"
    after, before = point["abilities"][name]["score"], point["abilities_before"][name]["score"]
    return f'{percent(after)} <span class="soft">({percent(before)})</span>'


def _number(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _runs(comparison: Comparison) -> str:
    """What was run, and what it cost."""
    rows = []
    for label, report in comparison.reports.items():
        meta, cost = report.meta, report.efficiency()
        cells = [
            label,
            meta.get("model"),
            meta.get("method"),
            meta.get("dataset"),
            f"{meta.get('setting')}, batches of {meta.get('batch_size') or 1}",
            meta.get("dtype"),
            meta.get("device"),
            _number(cost["seconds_edit"]),
            _number(cost["seconds_setup"]),
            "–" if cost["peak_memory_bytes"] is None else f"{cost['peak_memory_bytes'] / 1e9:.2f} GB",
        ]
        rows.append("<tr>" + "".join(f"<td>{escape(str(c if c is not None else '–'))}</td>" for c in cells) + "</tr>")
    names = "run,model,method,data set,setting,dtype,device,s / edit,s setup,peak memory".split(",")
    head = "".join(f"<th>{name}</th>" for name in names)
    return f'<h2>Runs</h2><div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


# ---------------------------------------------------------------------- cases


def _cases(number: int, label: str, report: EvaluationReport, max_cases: int) -> str:
    if not max_cases:
        return ""
    moment = report.moments[-1]
    by_case: dict[int, list[Mapping[str, Any]]] = {}
    for record in report.records:
        if record["when"] == moment:
            by_case.setdefault(record["case_id"], []).append(record)
    chosen = list(by_case.values())[:max_cases]
    failed = report.meta.get("failed") or ()
    entries = [_case(records) for records in chosen]
    entries += [
        f'<details class="case"><summary><span class="warning">failed</span> case {f["case_id"]}</summary>'
        f"<p>{escape(str(f['reason']))}</p></details>"
        for f in failed
    ]
    more = f", the first {len(chosen)} of {len(by_case)}" if len(chosen) < len(by_case) else ""
    return (
        f"<h2>{escape(label)}: cases <span class='soft'>({escape(moment)}{more})</span></h2>"
        f'<input type="search" placeholder="Filter: subject, answer, text …" data-list="cases-{number}"'
        ' aria-label="Filter the cases">'
        f'<div id="cases-{number}">{"".join(entries)}</div>'
    )


def _case(records: Sequence[Mapping[str, Any]]) -> str:
    """One case with the records of all protocols."""
    first = records[0]
    request = first["requested_rewrite"]
    line = "".join(_badge(record) for record in records)
    inside = []
    for record in records:
        rows = list(_score_rows(record))
        if rows:
            inside.append(
                f"<h3>{escape(record['protocol'])}</h3><div class='scroll'><table><tr><th>asked</th><th>axis</th>"
                f'<th class="n">before</th><th class="n">after</th></tr>{"".join(rows)}</table></div>'
            )
        inside.append(_text_table(record.get("texts") or ()))
        inside.append(_skipped(record.get("skipped") or ()))
    old = request.get("ground_truth")
    was = f' <span class="soft">(was: {escape(str(old))})</span>' if old else ""
    return (
        f'<details class="case"><summary>{escape(str(request["prompt"]))} '
        f'<span class="target">{escape(str(request["target_new"]))}</span>{was} {line}</summary>{"".join(inside)}'
        "</details>"
    )


def _badge(record: Mapping[str, Any]) -> str:
    before = metrics.case_mean(record["pre"].get("rewrite_acc"))
    after = metrics.case_mean(record["post"].get("rewrite_acc"))
    if after is None:
        return ""
    css = "up" if after >= 1 else "down" if after < 0.5 else ""
    return (
        f' <span class="soft">{escape(record["protocol"])}</span>'
        f' <span class="{css}">{percent(before)} → {percent(after)}</span>'
    )


def _score_rows(record: Mapping[str, Any]) -> Iterable[str]:
    pre, post = record["pre"], record["post"]
    for name, label in LABELS.items():
        after = post.get(name)
        if isinstance(after, Mapping):
            for axis, scores in after.items():
                before = (pre.get(name) or {}).get(axis) if name != "locality" else None
                yield _score_row(label, axis.removesuffix("_acc"), before, scores)
        elif after:
            yield _score_row(label, "", pre.get(name), after)
    for section in extra_sections(post):
        for key, scores in post[section].items():
            yield _score_row(section, key, (pre.get(section) or {}).get(key), scores, section)


def _score_row(
    label: str, axis: str, before: Sequence[float] | None, after: Sequence[float], section: str = ""
) -> str:
    def text(scores: Sequence[float] | None) -> str:
        return "–" if not scores else ", ".join(shown(section, s) for s in scores)

    return (
        f"<tr><td>{escape(label)}</td><td>{escape(axis)}</td>"
        f'<td class="n">{text(before)}</td><td class="n">{text(after)}</td></tr>'
    )


def _text_table(texts: Sequence[Mapping[str, Any]]) -> str:
    if not texts:
        return ""
    rows = "".join(
        f"<tr><td>{escape(_SECTIONS.get(t['section'], t['section']))}"
        f"{' · ' + escape(str(t['axis'])) if t.get('axis') else ''}</td>"
        + "".join(f'<td class="text">{escape(str(t[key]))}</td>' for key in ("prompt", "pre", "post"))
        + "</tr>"
        for t in texts
    )
    head = "<tr><th></th><th>prompt</th><th>written before</th><th>written after</th></tr>"
    return f'<div class="scroll"><table>{head}{rows}</table></div>'


def _skipped(skipped: Sequence[Mapping[str, Any]]) -> str:
    if not skipped:
        return ""
    items = "".join(f"<li>{escape(str(s['prompt']))}: {escape(str(s['reason']))}</li>" for s in skipped)
    return f'<p class="soft">Not scored:</p><ul class="soft">{items}</ul>'

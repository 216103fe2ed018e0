"""The drill-down of an HTML report: every edit under every method, and every run with all its probes and texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from ...storage.display import percent
from ..measures import metrics
from .case_result import CaseResult
from .groups import Group
from .results import Results
from .summaries import LABELS, NAMES, SHORT, exists, flat_row, formatted

EditKey = tuple[str, str]
"""Prompt and new answer."""
_SIDE_BY_SIDE = 100
"""Edits that are shown under every method; their tables are small."""
_SECTIONS = {
    "rewrite": "reliability",
    "rephrase": "generalization",
    "locality": "locality",
    "portability": "portability",
    "fluency": "fluency",
}


def search_field(list_id: str) -> str:
    """A field that hides the entries of a list that do not hold the words typed."""
    return (
        f'<input type="search" placeholder="Filter: subject, answer, text …" data-list="{list_id}"'
        ' aria-label="Filter the cases">'
    )


# ---------------------------------------------------------------------- one edit under every method


def side_by_side(number: int, group: Group[Any]) -> str:
    """The first edits, each with what every run of a group made of it; nothing for fewer than two runs.

    Args:
        number: of the group, for its id.
        group: runs on the same edits.
    """
    if len(group.reports) < 2:
        return ""
    by_edit: dict[EditKey, dict[str, CaseResult]] = {}
    for label, report in group.reports.items():
        for result in report.chosen():
            by_edit.setdefault(_edit(result), {})[label] = result
    written = {label: _written_after(report) for label, report in group.reports.items()}
    shared = [(edit, results) for edit, results in by_edit.items() if len(results) > 1]
    if not shared:
        return ""
    entries = [_compared(edit, results, written) for edit, results in shared[:_SIDE_BY_SIDE]]
    more = f", the first {len(entries)} of {len(shared)}" if len(entries) < len(shared) else ""
    title = f"{group.title}: edit by edit" if group.title else "Edit by edit"
    protocol = next(iter(group.reports.values())).protocols[0]
    return (
        f"<h2>{escape(title)} <span class='soft'>({escape(protocol)}{more})</span></h2>"
        f'{search_field(f"edits-{number}")}<div id="edits-{number}">{"".join(entries)}</div>'
    )


def _edit(result: CaseResult) -> EditKey:
    return str(result.request["prompt"]), str(result.request["target_new"])


def _written_after(report: Results) -> dict[EditKey, str]:
    """Edit → what the model writes behind its prompt at the end, where a protocol generates."""
    return {
        _edit(result): str(text["post"])
        for result in report.results
        if result.when == report.times[-1]
        for text in result.texts
        if text["section"] == "rewrite"
    }


def _compared(edit: EditKey, results: Mapping[str, CaseResult], written: Mapping[str, Mapping[EditKey, str]]) -> str:
    flat = {label: flat_row(result) for label, result in results.items()}
    names = [n for n in LABELS if any(row[f"post_{n}"] is not None for row in flat.values())]
    texts = {label: written[label][edit] for label in results if edit in written[label]}
    right = sum(1 for row in flat.values() if (row["post_rewrite_acc"] or 0) >= 1)
    before = next(iter(flat.values()))["pre_rewrite_acc"]
    head = "".join(f'<th class="n">{escape(SHORT[n])}</th>' for n in names)
    head += "<th>writes</th>" if texts else ""
    rows = []
    for label, row in flat.items():
        cells = "".join(f'<td class="n">{percent(row[f"post_{n}"])}</td>' for n in names)
        cells += f'<td class="text">{escape(texts.get(label, ""))}</td>' if texts else ""
        rows.append(f"<tr><td>{escape(label)}</td>{cells}</tr>")
    request = next(iter(results.values())).request
    return (
        f'<details class="case"><summary>{asked(request)} '
        f'<span class="soft">{percent(before)} before; right with</span> {right} of {len(flat)}</summary>'
        f'<div class="scroll"><table><tr><th></th>{head}</tr>{"".join(rows)}</table></div></details>'
    )


def asked(request: Mapping[str, Any]) -> str:
    """Prompt, new answer and old answer of an edit."""
    old = request.get("ground_truth")
    was = f' <span class="soft">(was: {escape(str(old))})</span>' if old else ""
    return f'{escape(str(request["prompt"]))} <span class="target">{escape(str(request["target_new"]))}</span>{was}'


# ---------------------------------------------------------------------- one run with everything


def run_cases(number: int, label: str, report: Results, max_cases: int, closed: bool) -> str:
    """All probes and texts of the edits of one run.

    Args:
        number: of the run, for its id.
        label: its name.
        report: what was measured.
        max_cases: edits that are shown; 0 for nothing.
        closed: put them behind a line that opens them.
    """
    if not max_cases:
        return ""
    when = report.times[-1]
    by_case: dict[int, list[CaseResult]] = {}
    for result in report.results:
        if result.when == when:
            by_case.setdefault(result.number, []).append(result)
    chosen = list(by_case.values())[:max_cases]
    entries = [_case(results) for results in chosen]
    entries += [
        f'<details class="case"><summary><span class="warning">failed</span> case {f["case_id"]}</summary>'
        f"<p>{escape(str(f['reason']))}</p></details>"
        for f in report.failed
    ]
    more = f", the first {len(chosen)} of {len(by_case)}" if len(chosen) < len(by_case) else ""
    about = f"<span class='soft'>({escape(when)}{more})</span>"
    inside = f'{search_field(f"cases-{number}")}<div id="cases-{number}">{"".join(entries)}</div>'
    if closed:
        return f'<details class="run"><summary>{escape(label)} {about}</summary>{inside}</details>'
    return f"<h2>{escape(label)}: cases {about}</h2>{inside}"


def _case(results: Sequence[CaseResult]) -> str:
    """One case with the results of all protocols."""
    line = "".join(map(_badge, results))
    inside = []
    for result in results:
        rows = list(_score_rows(result))
        if rows:
            inside.append(
                f"<h3>{escape(result.protocol)}</h3><div class='scroll'><table><tr><th>asked</th><th>axis</th>"
                f'<th class="n">before</th><th class="n">after</th></tr>{"".join(rows)}</table></div>'
            )
        inside.append(_text_table(result.texts))
        inside.append(_skipped(result.skipped))
    return f'<details class="case"><summary>{asked(results[0].request)} {line}</summary>{"".join(inside)}</details>'


def _badge(result: CaseResult) -> str:
    before, after = (metrics.case_mean(half.scores.get("rewrite")) for half in (result.pre, result.post))
    if after is None:
        return ""
    css = "up" if after >= 1 else "down" if after < 0.5 else ""
    return (
        f' <span class="soft">{escape(result.protocol)}</span>'
        f' <span class="{css}">{percent(before)} → {percent(after)}</span>'
    )


def _score_rows(result: CaseResult) -> Iterable[str]:
    for section, name in NAMES.items():
        old = result.pre.scores.get(section, {}) if exists("pre", section) else {}
        for axis, scores in result.post.scores.get(section, {}).items():
            yield _score_row(LABELS[name], axis or "", old.get(axis), scores)
    for section, numbers in result.post.numbers.items():
        for key, values in numbers.items():
            yield _score_row(section, key, result.pre.numbers.get(section, {}).get(key), values, section)


def _score_row(
    label: str, axis: str, before: Sequence[float] | None, after: Sequence[float], section: str = ""
) -> str:
    def text(scores: Sequence[float] | None) -> str:
        return "–" if not scores else ", ".join(formatted(section, s) for s in scores)

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

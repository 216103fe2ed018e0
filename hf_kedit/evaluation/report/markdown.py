"""The Markdown form of reports: tables of means, curves, abilities, and the first cases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...storage.display import markdown_text, percent
from ..measures import metrics
from .groups import Group, Runs
from .results import Results
from .summaries import LABELS, SHORT, formatted, label_of, means_by_axis, means_by_name


def render(runs: Runs[Any], max_cases: int) -> str:
    """The report as text.

    Args:
        runs: what was measured.
        max_cases: cases of each run that are shown one by one; 0 for none.
    """
    lines = ["# Knowledge editing report", ""]
    for label, reason in runs.failed.items():
        lines += [f"**{markdown_text(label)}** failed: {markdown_text(reason)}", ""]
    for group in runs.groups:
        for protocol in runs.protocols:
            for when in runs.times:
                lines += _means(group, protocol, when)
    lines += [
        "Percentages; entropies in bits. In brackets: before the edits. Locality is agreement with the unedited model,"
        " so that there is no value before. Numbers of different protocols are not comparable.",
        "",
    ]
    for label, report in runs.reports.items():
        if len([when for when in report.times if when != "immediate"]) > 1:
            lines += _curves(label, report)
    lines += _abilities(runs)
    for label, report in runs.reports.items():
        lines += _cases(label, report, max_cases)
    return "\n".join(lines).rstrip() + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table of plain texts."""
    lines = ["| " + " | ".join(map(markdown_text, cells)) + " |" for cells in [head, *rows]]
    return [lines[0], "|" + " --- |" * len(head), *lines[1:], ""]


def _means(group: Group[Any], protocol: str, when: str) -> list[str]:
    summaries = group.column(protocol, when)
    if not summaries:
        return []
    means = {label: means_by_name(summary) for label, summary in summaries.items()}
    columns = dict.fromkeys(key for row in means.values() for key in row)
    body = []
    for label, summary in summaries.items():
        cells = [label, str(summary["n"])]
        for section, name in columns:
            before, after = means[label].get((section, name), (None, None))
            text = formatted(section, name, after)
            cells.append(text if before is None else f"{text} ({formatted(section, name, before)})")
        seconds = summary["seconds_edit"]
        body.append([*cells, "–" if seconds is None else f"{seconds:.3g}"])
    head = ["", "edits", *(label_of(s, n) for s, n in columns), "s / edit"]
    scorer = next(iter(summaries.values()))["scorer"]
    title = f"{group.title}: {protocol}" if group.title else protocol
    lines = [f"## {markdown_text(f'{title} ({scorer}), {when}')}", "", *_table(head, body)]
    axes = means_by_axis(summaries)
    names = list(dict.fromkeys(key for row in axes.values() for key in row))
    if names:
        head = ["axis by axis", *(f"{SHORT[section]}: {axis}" for section, axis in names)]
        lines += _table(head, [[label, *(percent(row.get(key)) for key in names)] for label, row in axes.items()])
    return lines


def _curves(label: str, report: Results) -> list[str]:
    lines = []
    for protocol in report.protocols:
        curves = {name: dict(report.curve(name, protocol)) for name in LABELS}
        curves = {name: points for name, points in curves.items() if points}
        counts = sorted({n for points in curves.values() for n in points})
        if not curves:
            continue
        body = [[str(n), *(percent(points.get(n)) for points in curves.values())] for n in counts]
        lines += [f"## {markdown_text(f'{label}: along the number of edits ({protocol})')}", ""]
        lines += _table(["edits", *(SHORT[name] for name in curves)], body)
    return lines


def _abilities(runs: Runs[Any]) -> list[str]:
    names = list(dict.fromkeys(name for report in runs.reports.values() for name in report.abilities))
    if not names:
        return []
    body = []
    for label, report in runs.reports.items():
        curves = {name: dict(report.curve(f"abilities/{name}")) for name in report.abilities}
        for count in sorted({n for points in curves.values() for n in points}):
            body.append([label, str(count), *(percent(curves.get(name, {}).get(count)) for name in names)])
    return ["## General abilities", "", *_table(["", "edits", *names], body)]


def _cases(label: str, report: Results, max_cases: int) -> list[str]:
    results = report.chosen()
    rows = []
    for result in results[:max_cases]:
        scores = (metrics.case_mean(half.scores.get("rewrite")) for half in result.halves.values())
        text = next((t for t in result.texts if t["section"] == "rewrite"), {"pre": "", "post": ""})
        request = result.request
        rows.append([request["prompt"], request["target_new"], *map(percent, scores), text["pre"], text["post"]])
    if not rows:
        return []
    more = f" (first {len(rows)} of {len(results)})" if len(results) > len(rows) else ""
    head = ["prompt", "new answer", "before %", "after %", "wrote before", "wrote after"]
    return [f"## {markdown_text(label)}: cases{more}", "", *_table(head, rows)]

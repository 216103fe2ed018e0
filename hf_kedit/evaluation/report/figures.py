"""The means of an HTML report: one protocol at one time, as bars with intervals and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ...storage.display import percent
from ..measures.catalogue import metric_of
from .charts import Bar, bars
from .estimates import destroyed, estimates, places
from .groups import Group
from .page import number_table
from .results import Results
from .summaries import SHORT, AxisKey, formatted, in_charts, label_of, means_by_axis, means_by_name

_PROTOCOLS = {
    "generation": ("By generation", "The model writes freely, and its text is compared with the answer."),
    "teacher_forced": (
        "Teacher forced",
        "Each token of the answer is scored behind the right ones before it, so that most methods come close to 100;"
        " what a person would read is the part by generation.",
    ),
    "likelihood": ("By likelihood", "Which of two answers the model holds for more likely."),
    "fluency": ("Fluency", "Entropy of the n-grams of longer texts: low where the model repeats itself."),
}
"""Protocol → heading, and what its numbers are."""
READING = (
    "Percentages, and other numbers with their unit; ↓: less is better. n is the number of edits with such probes. The"
    " thin line in a bar, and the grey range, hold the true value 95 times in 100 (Wilson's interval for shares, a"
    " bootstrap over the edits for all else). The stroke across a bar, and the number in brackets: before the edits."
)
MARKS = (
    "▲ best, ▼ worst; green only where no axis of the locality was destroyed, which is where less than half of it is"
    " left under any protocol."
)


def means(group: Group[Any], protocol: str, when: str, colours: Mapping[str, int]) -> str:
    """Charts, one per mean with one bar per run, and the tables with the same numbers.

    Args:
        group: the runs.
        protocol: only this one's numbers.
        when: only those of this time.
        colours: run → index of its colour.
    """
    summaries = group.column(protocol, when)
    if not summaries:
        return ""
    by_run = {label: means_by_name(summary) for label, summary in summaries.items()}
    rests = {label: estimates(group.reports[label].chosen(protocol, when)) for label in summaries}
    lost = {label: list(destroyed_axes(group.reports[label], when)) for label in summaries}
    columns = list(dict.fromkeys(key for row in by_run.values() for key in row))
    marks = {
        key: places({label: row[key][1] for label, row in by_run.items() if key in row}, metric_of(*key).better)
        for key in columns
        if in_charts(*key)
    }
    panels = []
    for key in marks:
        rows = []
        for label, row in by_run.items():
            before, after = row.get(key, (None, None))
            mark = _mark(marks[key].get(label), lost[label])
            rows.append(Bar(label, before, after, rests[label].get(key), mark))
        chart = bars(rows, metric=metric_of(*key), colours=colours)
        panels.append(f'<div class="panel"><strong>{escape(label_of(*key))}</strong>{chart}</div>')
    body = []
    for label, row in by_run.items():
        summary = summaries[label]
        failed = f' <span class="warning">{summary["n_failed"]} failed</span>' if summary["n_failed"] else ""
        cells = [f'<td class="n">{summary["n"]}{failed}</td>']
        for key in columns:
            mark = _mark(marks.get(key, {}).get(label), lost[label])
            before, after = row.get(key, (None, None))
            cells.append(mean_cell(*key, before, after, mark))
        cells.append(f'<td class="n">{seconds(summary["seconds_edit"])}</td>')
        if any(lost.values()):
            cells.append(f'<td class="down">{escape(", ".join(map(axis_name, lost[label])))}</td>')
        body.append((label, "".join(cells)))
    head = ["edits", *(label_of(*key) for key in columns), "s / edit"]
    last = "destroyed axes" if any(lost.values()) else ""
    return (
        f"<h2>{_heading(group, protocol, next(iter(summaries.values()))['scorer'], when)}</h2>"
        f'<p class="note">{_PROTOCOLS.get(protocol, ("", _explained(columns)))[1]}</p>'
        f'<div class="panels">{"".join(panels)}</div>{number_table(head, body, last)}{_axes(summaries)}'
    )


def _explained(columns: Sequence[AxisKey]) -> str:
    """What the numbers are that say so themselves, each meaning once."""
    about: dict[str, str] = {}
    for key in columns:
        about.setdefault(metric_of(*key).about, label_of(*key))
    return "<br>".join(f"<strong>{escape(label)}</strong>: {escape(text)}." for text, label in about.items() if text)


def destroyed_axes(report: Results, when: str) -> dict[str, float]:
    """Axes that were destroyed under any protocol → what is left: what is lost when the model writes is lost."""
    left: dict[str, float] = {}
    for protocol in report.protocols:
        if report.has(protocol, when):
            summary = report.summary(protocol, when)
            before, after = summary["pre"]["per_axis"], summary["post"]["per_axis"]
            for axis in destroyed(before, after):
                shares = (after[s][axis] for s in ("locality", "locality_accuracy") if axis in after.get(s, {}))
                left[axis] = min(left.get(axis, 1.0), *shares)
    return left


def _mark(place: str | None, lost: list[str]) -> str:
    """Class of a value: green only where it did not cost the model an axis of its locality."""
    return "best up" if place == "best" and not lost else place or ""


def protocol_name(protocol: str) -> str:
    """A protocol in words, as a heading."""
    return _PROTOCOLS.get(protocol, (protocol.replace("_", " ").capitalize(), ""))[0]


def _heading(group: Group[Any], protocol: str, scorer: object, when: str) -> str:
    name = protocol_name(protocol)
    time = {"final": "after all edits", "immediate": "right after each edit"}.get(when, when)
    about = f"<span class='soft'>{escape(time)} · scorer: {escape(str(scorer))}</span>"
    return (f"{escape(group.title)}: " if group.title else "") + f"{escape(name)} {about}"


def _axes(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """The means of the axes one by one."""
    by_run = means_by_axis(summaries)
    names = list(dict.fromkeys(key for row in by_run.values() for key in row))
    if not names:
        return ""
    body = []
    for label, row in by_run.items():
        lost = destroyed({}, {"locality": {axis: value for (s, axis), value in row.items() if s == "locality"}})
        cells = (
            f'<td class="n{" down" if section == "locality" and axis in lost else ""}">'
            f"{percent(row.get((section, axis)))}</td>"
            for section, axis in names
        )
        body.append((label, "".join(cells)))
    head = [f"{SHORT[section]}: {axis_name(axis)}" for section, axis in names]
    return f'<details class="more"><summary>Axis by axis</summary>{number_table(head, body)}</details>'


def axis_name(axis: str) -> str:
    """An axis in words."""
    return axis.replace("_", " ")


def mean_cell(section: str, name: str, before: float | None, after: float | None, mark: str = "") -> str:
    """A cell with a mean, and in brackets what it was before the edits."""
    old = "" if before is None else f' <span class="soft">({formatted(section, name, before)})</span>'
    number = formatted(section, name, after)
    return f'<td class="n">{f"<span class={chr(34)}{mark}{chr(34)}>{number}</span>" if mark else number}{old}</td>'


def seconds(value: float | None) -> str:
    """A duration for people."""
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3g}"

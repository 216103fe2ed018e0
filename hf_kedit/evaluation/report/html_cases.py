"""The drill-down of an HTML report: every edit under every method, and every run with all its probes and texts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from html import escape
from typing import Any

from ...storage.display import percent
from ..measures import metrics
from .case_result import CaseResult
from .estimates import destroyed_by
from .groups import Group
from .page import scrolling
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
    first = next(iter(group.reports.values()))
    protocol = next((p for p in first.protocols if first.writes(p)), first.protocols[0])
    by_edit: dict[EditKey, dict[str, CaseResult]] = {}
    for label, report in group.reports.items():
        for result in report.chosen(protocol) if protocol in report.protocols else ():
            by_edit.setdefault(_edit(result), {})[label] = result
    written = {label: _written(report) for label, report in group.reports.items()}
    shared = [(edit, results) for edit, results in by_edit.items() if len(results) > 1]
    if not shared:
        return ""
    entries = [_compared(edit, results, written) for edit, results in shared[:_SIDE_BY_SIDE]]
    more = f", the first {len(entries)} of {len(shared)}" if len(entries) < len(shared) else ""
    title = f"{group.title}: edit by edit" if group.title else "Edit by edit"
    return (
        f"<h2>{escape(title)} <span class='soft'>{escape(protocol)}{more}</span></h2>"
        f'{search_field(f"edits-{number}")}<div id="edits-{number}">{"".join(entries)}</div>'
    )


def _edit(result: CaseResult) -> EditKey:
    return str(result.request["prompt"]), str(result.request["target_new"])


def _written(report: Results) -> dict[EditKey, Mapping[str, Any]]:
    """Edit → what the model wrote behind its prompt before, and at the end, where a protocol generates."""
    return {
        _edit(result): text
        for result in report.results
        if result.when == report.times[-1]
        for text in result.texts
        if text["section"] == "rewrite"
    }


def _compared(
    edit: EditKey, results: Mapping[str, CaseResult], written: Mapping[str, Mapping[EditKey, Mapping[str, Any]]]
) -> str:
    flat = {label: flat_row(result) for label, result in results.items()}
    names = [n for n in LABELS if any(row[f"post_{n}"] is not None for row in flat.values())]
    texts = {label: written[label][edit] for label in results if edit in written[label]}
    right = sum(1 for row in flat.values() if (row["post_rewrite_acc"] or 0) >= 1)
    before = next(iter(flat.values()))["pre_rewrite_acc"]
    head = "".join(f'<th class="n">{escape(SHORT[n])}</th>' for n in names)
    head += "<th>writes</th>" if texts else ""
    rows = []
    for label, row in flat.items():
        lost = bool(destroyed_by(results[label]))
        cells = ""
        for n in names:
            css = {"rewrite_acc": _success(row[f"post_{n}"], lost), "locality": "down" if lost else ""}.get(n, "")
            cells += f'<td class="n {css}">{percent(row[f"post_{n}"])}</td>'
        if texts:
            text = texts.get(label)
            cells += f'<td class="text">{changed(str(text["pre"]), str(text["post"])) if text else ""}</td>'
        rows.append(f"<tr><td>{escape(label)}</td>{cells}</tr>")
    request = next(iter(results.values())).request
    return (
        f'<details class="case"><summary>{asked(request)} '
        f'<span class="soft">{percent(before)} before; right with</span> {right} of {len(flat)}</summary>'
        f"{scrolling(f'<tr><th></th>{head}</tr>{chr(10).join(rows)}')}</details>"
    )


def _success(after: float | None, broken: bool) -> str:
    """Class of an edit's success: green only where no axis of the locality was destroyed for it."""
    if after is None:
        return ""
    return "down" if after < 0.5 else "up" if after >= 1 and not broken else ""


def changed(before: str, after: str, css: str = "") -> str:
    """The second text with the words marked that the first has not at their place.

    Args:
        before: the first.
        after: the second.
        css: class of the marks.
    """
    old, new = (re.findall(r"\s+|\w+|[^\w\s]+", text) for text in (before, after))
    start = f'<mark class="{css}">' if css else "<mark>"
    parts = []
    for kind, _, _, first, last in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        text = escape("".join(new[first:last]))
        parts.append(text if kind == "equal" or not text.strip() else f"{start}{text}</mark>")
    return "".join(parts)


def asked(request: Mapping[str, Any]) -> str:
    """Picture, prompt, new answer and old answer of an edit."""
    old = request.get("ground_truth")
    was = f' <span class="soft">(was: {escape(str(old))})</span>' if old else ""
    prompt, target = (escape(str(request[key])) for key in ("prompt", "target_new"))
    return f'{_thumbnails(request)}{prompt} <span class="target">{target}</span>{was}'


def _thumbnails(about: Mapping[str, Any]) -> str:
    """The pictures of an edit or a question, as they stand in the report; nothing that a page would have to fetch."""
    given = about.get("image")
    uris = [uri for uri in given if str(uri).startswith("data:image/")] if isinstance(given, list) else []
    return "".join(f'<img class="thumb" alt="" src="{escape(str(uri), quote=True)}"> ' for uri in uris)


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
    chosen = [sorted(r, key=lambda one: report.writes(one.protocol), reverse=True) for r in by_case.values()]
    chosen = chosen[:max_cases]
    entries = [_case(results) for results in chosen]
    entries += [
        f'<details class="case"><summary><span class="warning">failed</span> case {f["case_id"]}</summary>'
        f"<p>{escape(str(f['reason']))}</p></details>"
        for f in report.failed
    ]
    more = f", the first {len(chosen)} of {len(by_case)}" if len(chosen) < len(by_case) else ""
    about = f"<span class='soft'>{escape(when)}{more}</span>"
    inside = f'{search_field(f"cases-{number}")}<div id="cases-{number}">{"".join(entries)}</div>'
    if closed:
        return f'<details class="run"><summary>{escape(label)} {about}</summary>{inside}</details>'
    return f"<h2>{escape(label)}: cases {about}</h2>{inside}"


def _case(results: Sequence[CaseResult]) -> str:
    """One case with the results of all protocols."""
    lost = {result.protocol: destroyed_by(result) for result in results}
    line = "".join(_badge(result, lost[result.protocol], any(lost.values())) for result in results)
    inside = []
    for result in results:
        rows = list(_score_rows(result))
        if rows:
            inside.append(
                f"<h3>{escape(result.protocol)}</h3>"
                + scrolling(
                    "<tr><th>asked</th><th>axis</th>"
                    f'<th class="n">before</th><th class="n">after</th></tr>{"".join(rows)}'
                )
            )
        inside.append(_text_table(result))
        inside.append(_skipped(result.skipped))
    return f'<details class="case"><summary>{asked(results[0].request)} {line}</summary>{"".join(inside)}</details>'


def _badge(result: CaseResult, lost: Sequence[str], broken: bool) -> str:
    """The success of an edit under one protocol.

    Args:
        result: of the case.
        lost: the axes that were destroyed under its protocol.
        broken: whether any was, under any protocol.
    """
    before, after = (metrics.case_mean(half.scores.get("rewrite")) for half in (result.pre, result.post))
    if after is None:
        return ""
    cost = f' <span class="down">destroyed: {_words(", ".join(lost))}</span>' if lost else ""
    return (
        f' · <span class="soft">{_words(result.protocol)}</span>'
        f' <span class="{_success(after, broken)}">{percent(before)} → {percent(after)}</span>{cost}'
    )


def _words(name: str) -> str:
    return escape(name.replace("_", " "))


def _score_rows(result: CaseResult) -> Iterable[str]:
    for section, name in NAMES.items():
        old = result.pre.scores.get(section, {}) if exists("pre", section) else {}
        for axis, scores in result.post.scores.get(section, {}).items():
            yield _score_row(LABELS[name], axis or "", old.get(axis), scores)
    for section, numbers in result.post.numbers.items():
        for key, values in numbers.items():
            yield _score_row(section, key, result.pre.numbers.get(section, {}).get(key), values, key)


def _score_row(label: str, axis: str, before: Sequence[float] | None, after: Sequence[float], key: str = "") -> str:
    def text(scores: Sequence[float] | None) -> str:
        return "–" if not scores else ", ".join(formatted(label, key, s) for s in scores)

    return (
        f"<tr><td>{escape(label)}</td><td>{_words(axis)}</td>"
        f'<td class="n">{text(before)}</td><td class="n">{text(after)}</td></tr>'
    )


def texts_of(result: CaseResult) -> Iterator[tuple[Mapping[str, Any], bool]]:
    """What the model wrote, each with whether it should have stayed and is wrong now."""
    seen = Counter[tuple[str, str]]()
    for text in result.texts:
        section, axis = str(text["section"]), str(text.get("axis") or "")
        yield text, section == "locality" and _lost(result, axis, seen[section, axis])
        seen[section, axis] += 1


def _text_table(result: CaseResult) -> str:
    """What the model wrote, changed words marked; in red where it should have stayed and is wrong now."""
    if not result.texts:
        return ""
    rows = []
    for text, lost in texts_of(result):
        section, axis = str(text["section"]), str(text.get("axis") or "")
        css = "lost" if lost else ""
        about = f"{escape(_SECTIONS.get(section, section))}{f' · {_words(axis)}' if axis else ''}"
        post = changed(str(text["pre"]), str(text["post"]), css)
        rows.append(
            f'<tr class="{css}"><td>{about}{": lost" if css else ""}</td>'
            + f'<td class="text">{_thumbnails(text)}{escape(str(text["prompt"]))}</td>'
            + f'<td class="text">{escape(str(text["pre"]))}</td>'
            + f'<td class="text">{post}</td></tr>'
        )
    head = "<tr><th></th><th>prompt</th><th>written before</th><th>written after</th></tr>"
    return scrolling(f"{head}{''.join(rows)}")


def _lost(result: CaseResult, axis: str, place: int) -> bool:
    """Whether a neighbour that was right is wrong now; one without a known answer: whether its text is another."""
    before, after = (half.scores.get("locality_accuracy", {}).get(axis, []) for half in (result.pre, result.post))
    if place < min(len(before), len(after)):
        return after[place] < before[place]
    agreement = result.post.scores.get("locality", {}).get(axis, [])
    return place < len(agreement) and agreement[place] < 1


def _skipped(skipped: Sequence[Mapping[str, Any]]) -> str:
    if not skipped:
        return ""
    items = "".join(f"<li>{escape(str(s['prompt']))}: {escape(str(s['reason']))}</li>" for s in skipped)
    return f'<p class="soft">Not scored:</p><ul class="soft">{items}</ul>'

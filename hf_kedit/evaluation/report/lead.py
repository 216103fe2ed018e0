"""What a report begins with: what was asked, what changed, and where it hurts; the numbers behind it follow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from ...storage.display import percent
from ...text.sentences import OPENING, opening
from ..measures.catalogue import metric_of
from .case_result import CaseResult
from .figures import axis_name, destroyed_axes
from .groups import Runs
from .html_cases import asked, changed, texts_of
from .results import Results
from .summaries import AxisKey, formatted, label_of, means_by_name

_EXAMPLES, _MOST_RUNS, _NUMBERS = 3, 8, 3
_WORDS = {
    "rewrite_acc": "the edited prompts give the new answer",
    "rephrase_acc": "other wordings give it too",
    "portability": "what follows from the edits holds",
}
"""Name of a mean that is to change → what it says."""


def lead(runs: Runs[Any]) -> str:
    """Three boxes: what was asked, what changed, where it hurts."""
    shown = dict(list(runs.reports.items())[:_MOST_RUNS])
    more = len(runs.reports) - len(shown)
    rest = f'<p class="soft">{more} more runs are below.</p>' if more else ""
    several = len(shown) > 1
    said: dict[str, list[str]] = {}  # what hurts → the runs of which that is all there is to say
    for label, report in shown.items():
        said.setdefault(_harm(report, several), []).append(escape(label))
    harm = [(f"<p><b>{', '.join(labels)}</b></p>" if several else "") + text for text, labels in said.items()]
    boxes = {
        "Asked": _asked(next(iter(shown.values()))),
        "Changed": _changes(shown, runs.written_first[0]) + rest,
        "Where it hurts": "".join(harm) + rest,
    }
    panels = "".join(f'<div class="panel"><strong>{name}</strong>{inside}</div>' for name, inside in boxes.items())
    return f'<div class="panels lead">{panels}</div>'


def _asked(report: Results) -> str:
    """The first edits."""
    results = list({result.number: result for result in report.results}.values())
    examples = "".join(f"<p>{asked(result.request)}</p>" for result in results[:_EXAMPLES])
    more = len(results) - _EXAMPLES
    return examples + (f'<p class="soft">and {more} more edits</p>' if more > 0 else "")


def _changes(reports: Mapping[str, Results], protocol: str) -> str:
    """The first means that edits are to change, before and after."""
    by_run = {}
    for label, report in reports.items():
        means = means_by_name(report.summary(protocol if protocol in report.protocols else None))
        by_run[label] = {key: pair for key, pair in means.items() if not key[1].startswith("locality")}
    lines = []
    for key in list(dict.fromkeys(key for means in by_run.values() for key in means))[:_NUMBERS]:
        said = escape(label_of(*key) if key[0] else _WORDS[key[1]])
        values = []
        for label, means in by_run.items():
            if key in means:
                before, after = means[key]
                old = "" if before is None else f'<span class="soft">{_number(key, before)} → </span>'
                value = f"{old}<b>{_number(key, after)}</b>"
                if len(reports) > 1:
                    value = f'<span class="of"><span>{escape(label)}</span> <span class="key">{value}</span></span>'
                values.append(value)
        lines.append(f"<p>{said}: {' '.join(values)}</p>")
    for label, report in reports.items():
        if report.failed:
            lines.append(f'<p class="warning">{escape(label)}: {len(report.failed)} edits could not be made</p>')
    return "".join(lines)


def _number(key: AxisKey, value: float) -> str:
    return formatted(*key, value) + (" %" if metric_of(*key).unit == "percent" else "")


def _harm(report: Results, several: bool) -> str:
    """The axes that were destroyed, with answers that were lost; and the state of the model."""
    when = report.times[-1]
    lost = destroyed_axes(report, when)
    lines = [
        f'<p class="down">{escape(axis_name(axis))}: {percent(share, " %")} left</p>' for axis, share in lost.items()
    ]
    texts = [text for result in report.results if result.when == when for text in _lost_texts(result, lost)]
    for text in texts[: 1 if several else _EXAMPLES]:
        before, after = (opening(str(text[half]), OPENING) for half in ("pre", "post"))
        new = changed(before, after, "lost")
        lines.append(f'<p>{escape(str(text["prompt"]))} <span class="soft">{escape(before)} →</span> {new}</p>')
    states = {str(point["state"]) for point in report.checkpoints if point.get("state") not in (None, "ok")}
    lines += [f'<p class="warning">The model: {escape(state)}</p>' for state in sorted(states)]
    posts = [result.post.scores for result in report.results]
    kept = any(any(scores.get(s, {}).values()) for scores in posts for s in ("locality", "locality_accuracy"))
    none = "At least half of each kind of other answers stayed." if kept else "What else changed was not measured."
    return "".join(lines) or f"<p>{none}</p>"


def _lost_texts(result: CaseResult, axes: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    return (text for text, lost in texts_of(result) if lost and text.get("axis") in axes)

"""`Comparison`: several reports side by side, and their Markdown, HTML and table forms."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import DataError, EvaluationError
from .report import EvaluationReport
from .summaries import LABELS, SHORT, data_frame, extra_sections, percent, shown

Value = tuple[str, str, float | None, float | None]
"""Section of an extra number (else empty), name, before, after."""


@dataclass(frozen=True)
class Group:
    """Reports that belong into one chart.

    Args:
        title: what they have in common and others have not; empty if there is one group.
        reports: name inside the group → report.
    """

    title: str
    reports: dict[str, EvaluationReport]

    def column(self, protocol: str, when: str) -> dict[str, dict[str, Any]]:
        """Name → summary, of the reports that have records of this protocol at this moment."""
        return {n: r.summary(protocol, when) for n, r in self.reports.items() if r.has(protocol, when)}


class Comparison:
    """Reports by label.

    Args:
        reports: label (such as the method's name) → report; or reports, labelled by method.
        failed: label → why there is no report of this run.

    Raises:
        EvaluationError: if there is none, or two have the same label.
    """

    def __init__(
        self,
        reports: Mapping[str, EvaluationReport] | Iterable[EvaluationReport],
        failed: Mapping[str, str] | None = None,
    ):
        self.failed = dict(failed or {})
        if isinstance(reports, Mapping):
            self.reports = dict(reports)
        else:
            self.reports = {}
            for report in reports:
                label = str(report.meta.get("method") or "edits")
                if label in self.reports:
                    raise EvaluationError(f"two reports are of {label!r}; give a dict of labels → reports")
                self.reports[label] = report
        if not self.reports or not any(r.records for r in self.reports.values()):
            raise EvaluationError("there is nothing to compare: no report has a record")
        self.empty = {label: report for label, report in self.reports.items() if not report.records}
        """Reports without a record, because no edit could be made."""
        self.reports = {label: report for label, report in self.reports.items() if report.records}

    @property
    def protocols(self) -> list[str]:
        """All protocols that occur."""
        return list(dict.fromkeys(p for r in self.reports.values() for p in r.protocols))

    @property
    def moments(self) -> list[str]:
        """All moments that occur, without checkpoints."""
        found = dict.fromkeys(w for r in self.reports.values() for w in r.moments if not w.startswith("at "))
        return [w for w in ("immediate", "final") if w in found]

    @property
    def groups(self) -> list[Group]:
        """The reports as they are shown together.

        The runs of a sweep over several models, data sets or settings are grouped by these, so that a chart compares
        methods under equal conditions; anything else is one group.
        """
        abouts = {label: report.meta.get("label") for label, report in self.reports.items()}
        if not all(isinstance(about, Mapping) for about in abouts.values()):
            return [Group("", dict(self.reports))]
        differ = [k for k in ("model", "dataset", "setting") if len({about[k] for about in abouts.values()}) > 1]
        if not differ or len({about["method"] for about in abouts.values()}) == 1:
            return [Group("", dict(self.reports))]
        found: dict[str, dict[str, EvaluationReport]] = {}
        for label, report in self.reports.items():
            about = abouts[label]
            found.setdefault(" · ".join(about[k] for k in differ), {})[about["method"]] = report
        return [Group(title, reports) for title, reports in found.items()]

    def rows(self) -> list[dict[str, Any]]:
        """One flat row per report, protocol and moment, with the means before and after."""
        rows = []
        for label, report in self.reports.items():
            for protocol in report.protocols:
                for when in report.moments:
                    if not report.has(protocol, when):
                        continue
                    summary = report.summary(protocol, when)
                    row: dict[str, Any] = {"label": label}
                    row |= {k: report.meta.get(k) for k in ("model", "method", "dataset")}
                    row |= {k: summary[k] for k in ("protocol", "scorer", "setting", "when", "n", "n_failed")}
                    for section, name, before, after in values(summary):
                        key = f"{section}_{name}" if section else name
                        row |= {f"pre_{key}": before, f"post_{key}": after}
                    rows.append({**row, "seconds_edit": summary["seconds_edit"]})
        return rows

    def to_pandas(self) -> Any:
        """The `rows` as a ``pandas.DataFrame``.

        Raises:
            MissingExtraError: if pandas is not installed.
        """
        return data_frame(self.rows())

    def to_json(self, path: str | Path | None = None) -> str:
        """The `rows` as JSON text; also written to ``path`` if one is given."""
        return _written(json.dumps(self.rows(), ensure_ascii=False, indent=1, allow_nan=False) + "\n", path)

    def to_markdown(self, path: str | Path | None = None, *, max_cases: int = 20) -> str:
        """A table per protocol and moment, and the first cases; also written to ``path`` if one is given."""
        return _written(_markdown(self, max_cases), path)

    def to_html(
        self, path: str | Path | None = None, *, title: str = "Knowledge editing report", max_cases: int = 200
    ) -> str:
        """One self-contained HTML page; also written to ``path`` if one is given.

        Args:
            path: file to write (overwriting it).
            title: of the page.
            max_cases: cases per report that are shown one by one; 0 for none.
        """
        from .html import render

        return _written(render(self, title, max_cases), path)


def values(summary: Mapping[str, Any]) -> list[Value]:
    """All means of a summary, in order: the usual sections, then those that only some protocols have."""
    pre, post = summary["pre"], summary["post"]
    # Under the likelihood protocol ES, PS and NS are these same numbers under the names that papers use.
    again = ("rewrite_acc", "rephrase_acc", "locality_accuracy") if "counterfact" in post else ()
    found: list[Value] = [
        ("", name, pre.get(name), post[name]) for name in LABELS if name in post and name not in again
    ]
    for section in extra_sections(post):
        found += [(section, key, pre.get(section, {}).get(key), value) for key, value in post[section].items()]
    return found


def means_by_name(summary: Mapping[str, Any]) -> dict[tuple[str, str], tuple[float | None, float | None]]:
    """The `values` of a summary as (section, name) → (before, after)."""
    return {(section, name): (before, after) for section, name, before, after in values(summary)}


def axis_means(summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[tuple[str, str], float]]:
    """Name of a run → (section, axis) → mean after the edits, of sections that have several axes in some run."""
    found = {name: summary["post"].get("per_axis", {}) for name, summary in summaries.items()}
    several = {
        section for axes in found.values() for section, means in axes.items() if section in SHORT and len(means) > 1
    } - {"locality_accuracy"}
    return {
        name: {(s, axis): mean for s, means in axes.items() if s in several for axis, mean in means.items()}
        for name, axes in found.items()
    }


def label_of(section: str, name: str) -> str:
    """Name of a mean for people."""
    if section in ("counterfact", "fluency"):
        return name.replace("_", " ")
    return f"{section} {name}" if section else SHORT[name]


def in_charts(section: str, name: str) -> bool:
    """Whether a mean gets a chart of its own; the magnitudes and exact matches stand in the table only."""
    return section != "counterfact" or name in ("ES", "PS", "NS", "S")


def model_index(
    report: EvaluationReport, model_name: str, dataset_name: str, dataset_type: str | None
) -> list[dict[str, Any]]:
    """The means of a report as the content of ``model-index`` in a model card.

    Every protocol and moment is an entry of its own, so that numbers that are not comparable never share one.
    """
    from huggingface_hub.repocard_data import EvalResult, eval_results_to_model_index

    results = []
    for protocol in report.protocols:
        for when in report.moments:
            summary = report.summary(protocol, when)
            about = {"protocol": protocol, "scorer": summary["scorer"], "setting": summary["setting"], "when": when}
            for section, name, _, value in values(summary):
                results.append(
                    EvalResult(
                        task_type="text-generation",
                        task_name="Knowledge editing",
                        dataset_type=dataset_type or dataset_name.lower().replace(" ", "-"),
                        dataset_name=dataset_name,
                        dataset_config=f"{summary['setting']}, {when}, {protocol}",
                        dataset_args={k: v for k, v in about.items() if v is not None} | {"edits": summary["n"]},
                        metric_type=f"{section}_{name}" if section else name,
                        metric_name=f"{label_of(section, name)} after editing ({protocol})",
                        metric_value=round(float(value or 0.0), 6),
                    )
                )
    return eval_results_to_model_index(model_name, results)


# ---------------------------------------------------------------------- Markdown


def _markdown(comparison: Comparison, max_cases: int) -> str:
    lines = ["# Knowledge editing report", ""]
    for label, reason in comparison.failed.items():
        lines += [f"**{_cell(label)}** failed: {_cell(reason)}", ""]
    for group in comparison.groups:
        for protocol in comparison.protocols:
            for when in comparison.moments:
                lines += _markdown_table(group, protocol, when)
    lines += [
        "Percentages; entropies in bits. In brackets: before the edits. Locality is agreement with the unedited model,"
        " so that there is no value before. Numbers of different protocols are not comparable.",
        "",
    ]
    curves = [(label, report) for label, report in comparison.reports.items() if len(_curve_moments(report)) > 1]
    for label, report in curves:
        lines += _markdown_curve(label, report)
    lines += _markdown_abilities(comparison)
    for label, report in comparison.reports.items():
        lines += _markdown_cases(label, report, max_cases)
    return "\n".join(lines).rstrip() + "\n"


def _curve_moments(report: EvaluationReport) -> list[str]:
    return [w for w in report.moments if w != "immediate"]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(_cell(c) for c in cells) + " |" for cells in [head, *rows]]
    return [lines[0], "|" + " --- |" * len(head), *lines[1:], ""]


def _cell(text: str) -> str:
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").split())


def _markdown_table(group: Group, protocol: str, when: str) -> list[str]:
    summaries = group.column(protocol, when)
    if not summaries:
        return []
    means = {label: means_by_name(summary) for label, summary in summaries.items()}
    columns = dict.fromkeys(key for found in means.values() for key in found)
    body = []
    for label, summary in summaries.items():
        cells = [label, str(summary["n"])]
        for section, name in columns:
            before, after = means[label].get((section, name), (None, None))
            text = shown(section, after)
            cells.append(text if before is None else f"{text} ({shown(section, before)})")
        seconds = summary["seconds_edit"]
        body.append([*cells, "–" if seconds is None else f"{seconds:.3g}"])
    head = ["", "edits", *(label_of(s, n) for s, n in columns), "s / edit"]
    scorer = next(iter(summaries.values()))["scorer"]
    title = f"{group.title}: {protocol}" if group.title else protocol
    lines = [f"## {title} ({scorer}), {when}", "", *_table(head, body)]
    axes = axis_means(summaries)
    names = list(dict.fromkeys(key for row in axes.values() for key in row))
    if names:
        head = ["axis by axis", *(f"{SHORT[section]}: {axis}" for section, axis in names)]
        lines += _table(head, [[label, *(percent(row.get(key)) for key in names)] for label, row in axes.items()])
    return lines


def _markdown_curve(label: str, report: EvaluationReport) -> list[str]:
    lines = []
    for protocol in report.protocols:
        curves = {name: dict(report.curve(name, protocol)) for name in LABELS}
        curves = {name: points for name, points in curves.items() if points}
        counts = sorted({n for points in curves.values() for n in points})
        if not curves:
            continue
        body = [[str(n), *(percent(points.get(n)) for points in curves.values())] for n in counts]
        lines += [f"## {label}: along the number of edits ({protocol})", ""]
        lines += _table(["edits", *(SHORT[name] for name in curves)], body)
    return lines


def _markdown_abilities(comparison: Comparison) -> list[str]:
    names = list(dict.fromkeys(name for report in comparison.reports.values() for name in report.abilities))
    if not names:
        return []
    body = []
    for label, report in comparison.reports.items():
        curves = {name: dict(report.curve(f"abilities/{name}")) for name in report.abilities}
        for count in sorted({n for points in curves.values() for n in points}):
            body.append([label, str(count), *(percent(curves.get(name, {}).get(count)) for name in names)])
    return ["## General abilities", "", *_table(["", "edits", *names], body)]


def _markdown_cases(label: str, report: EvaluationReport, max_cases: int) -> list[str]:
    cases = report.cases[:max_cases]
    if not cases:
        return []
    rows = []
    for case in cases:
        request = case["requested_rewrite"]
        before, after = case["pre"].get("rewrite_acc"), case["post"].get("rewrite_acc")
        text = next((t for t in case.get("texts") or () if t["section"] == "rewrite"), None)
        row = [request["prompt"], request["target_new"], percent(_first(before)), percent(_first(after))]
        rows.append([*row, text["pre"] if text else "", text["post"] if text else ""])
    more = f" (first {len(cases)} of {len(report.cases)})" if len(report.cases) > len(cases) else ""
    head = ["prompt", "new answer", "before %", "after %", "wrote before", "wrote after"]
    return [f"## {label}: cases{more}", "", *_table(head, rows)]


def _first(scores: list[float] | None) -> float | None:
    return scores[0] if scores else None


def _written(text: str, path: str | Path | None) -> str:
    if path is not None:
        try:
            Path(path).write_text(text, encoding="utf-8")
        except OSError as error:
            raise DataError(f"cannot write {str(path)!r}: {error}") from error
    return text

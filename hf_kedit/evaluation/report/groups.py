"""Several runs side by side: which of them belong into one chart, and one row for each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ...errors import EvaluationError
from .results import Results
from .summaries import means_by_name

R = TypeVar("R", bound=Results)
_NAMED = 6
"""Methods up to which the title names each."""


@dataclass(frozen=True)
class Group(Generic[R]):
    """Runs that belong into one chart.

    Args:
        title: what they have in common and others have not; empty if there is one group.
        reports: name inside the group → what was measured.
    """

    title: str
    reports: dict[str, R]

    def column(self, protocol: str, when: str) -> dict[str, dict[str, Any]]:
        """Name → summary, of the runs that were measured under this protocol at this time."""
        return {name: r.summary(protocol, when) for name, r in self.reports.items() if r.has(protocol, when)}


class Runs(Generic[R]):
    """Runs by label.

    Args:
        reports: label (such as the method's name) → what was measured; or these alone, labelled by method.
        failed: label → why there is no result of this run.

    Raises:
        EvaluationError: if nothing was measured, or two have the same label.
    """

    def __init__(self, reports: Mapping[str, R] | Iterable[R], failed: Mapping[str, str] | None = None):
        self.failed = dict(failed or {})
        given: dict[str, R] = dict(reports) if isinstance(reports, Mapping) else {}
        for report in () if isinstance(reports, Mapping) else reports:
            if report.label in given:
                raise EvaluationError(f"two reports are of {report.label!r}; give a dict of labels → reports")
            given[report.label] = report
        if not any(r.results for r in given.values()):
            raise EvaluationError("there is nothing to compare: no report has a record")
        self.empty: dict[str, R] = {label: r for label, r in given.items() if not r.results}
        """Runs without a result, because no edit could be made."""
        self.reports: dict[str, R] = {label: r for label, r in given.items() if r.results}

    @property
    def protocols(self) -> list[str]:
        """All protocols that occur."""
        return list(dict.fromkeys(p for r in self.reports.values() for p in r.protocols))

    def writes(self, protocol: str) -> bool:
        """Whether the model writes its answers under this protocol."""
        return any(report.writes(protocol) for report in self.reports.values())

    @property
    def written_first(self) -> list[str]:
        """The protocols, those under which the model writes its answers before others."""
        return sorted(self.protocols, key=self.writes, reverse=True)

    @property
    def times(self) -> list[str]:
        """``immediate`` and ``final``, where they occur."""
        known = {when for r in self.reports.values() for when in r.times}
        return [when for when in ("immediate", "final") if when in known]

    @property
    def groups(self) -> list[Group[R]]:
        """The runs as they are shown together.

        The runs of a sweep over several models, data sets or settings are grouped by these, so that a chart compares
        methods under equal conditions; anything else is one group.
        """
        abouts = {n: about for n, r in self.reports.items() if isinstance(about := r.meta.get("label"), Mapping)}
        if len(abouts) < len(self.reports):
            return [Group("", dict(self.reports))]
        differ = [k for k in ("model", "dataset", "setting") if len({about[k] for about in abouts.values()}) > 1]
        if not differ or len({about["method"] for about in abouts.values()}) == 1:
            return [Group("", dict(self.reports))]
        by_title: dict[str, dict[str, R]] = {}
        for label, report in self.reports.items():
            about = abouts[label]
            by_title.setdefault(" · ".join(about[k] for k in differ), {})[about["method"]] = report
        return [Group(title, reports) for title, reports in by_title.items()]

    @property
    def title(self) -> str:
        """What was compared, on what, in one line."""
        reports = list(self.reports.values())
        names = list(dict.fromkeys(name for group in self.groups for name in group.reports))
        if len(reports) == 1:
            names = [reports[0].label]
        methods = listed(names) if len(names) <= _NAMED else f"{len(names)} methods"
        models = dict.fromkeys(str(r.meta.get("model") or "a model in memory") for r in reports)
        counts = {len({result.number for result in r.results}) for r in reports}
        settings = dict.fromkeys(str(r.meta["setting"]) for r in reports if r.meta.get("setting"))
        data = dict.fromkeys(str(r.meta["dataset"]) for r in reports if r.meta.get("dataset"))
        many = f"{next(iter(counts))} " if len(counts) == 1 else ""
        edits = f"{many}{listed(settings)} edit{'' if many == '1 ' else 's'}".replace("  ", " ")
        about = "".join(f"{name}, " for name in dict.fromkeys(r.scenario for r in reports) if name)
        return f"{methods} on {listed(models)}: {about}{edits}{' of ' + listed(data) if data else ''}"

    def rows(self) -> list[dict[str, Any]]:
        """One flat row per run, protocol and time, with the means before and after."""
        rows = []
        for label, report in self.reports.items():
            for protocol in report.protocols:
                for when in report.times:
                    if not report.has(protocol, when):
                        continue
                    summary = report.summary(protocol, when)
                    row: dict[str, Any] = {"label": label}
                    row |= {k: report.meta.get(k) for k in ("model", "method", "dataset")}
                    row |= {k: summary[k] for k in ("protocol", "scorer", "setting", "when", "n", "n_failed")}
                    for (section, name), (before, after) in means_by_name(summary).items():
                        key = f"{section}_{name}" if section else name
                        row |= {f"pre_{key}": before, f"post_{key}": after}
                    rows.append({**row, "seconds_edit": summary["seconds_edit"]})
        return rows


def listed(names: Iterable[str]) -> str:
    """Names as in a sentence."""
    *most, last = list(names) or [""]
    return f"{', '.join(most)} and {last}" if most else last

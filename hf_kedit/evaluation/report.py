"""`EvaluationReport`: what an evaluation found, per case and in summary, and its other forms.

A report is plain data: records (one per case, protocol and moment) and what was run (``meta``). Every number carries
its protocol; means are formed within one protocol and one moment only. Nothing is written to disk unless asked.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, EvaluationError, nearest, require_extra
from ..requests import EditRequest, Probe
from . import metrics

if TYPE_CHECKING:
    import datasets
    from rich.console import Console
    from rich.table import Table

FORMAT_VERSION = 1
LISTS = {"rewrite_acc": "rewrite_acc", "rephrase_acc": "rephrase_acc"}
"""Summary key → key of a plain list of scores in a record."""
AXES = {"locality": "locality", "locality_accuracy": "locality_accuracy", "portability": "portability"}
"""Summary key → key of a dict of axis → scores in a record."""
_LABELS = {
    "rewrite_acc": "reliability (rewrite)",
    "rephrase_acc": "generalization (rephrase)",
    "locality": "locality (agreement)",
    "locality_accuracy": "locality (accuracy)",
    "portability": "portability",
}


@dataclass
class EvaluationReport:
    """The outcome of `evaluate_edits`.

    Args:
        records: one dict per case, protocol and moment; the layout is described in the documentation.
        meta: what was run: setting, protocols with their settings and scorers, method, model, seconds.
    """

    records: list[dict[str, Any]]
    meta: dict[str, Any] = field(default_factory=dict)

    # ------------------------------------------------------------------ selecting

    @property
    def protocols(self) -> list[str]:
        """Names of the protocols, in the order in which they were asked for."""
        return list(self.meta.get("protocols") or dict.fromkeys(r["protocol"] for r in self.records))

    @property
    def moments(self) -> list[str]:
        """The moments of measurement: ``immediate``, ``final`` or both."""
        return list(dict.fromkeys(self.meta.get("when") or (r["when"] for r in self.records)))

    @property
    def cases(self) -> list[dict[str, Any]]:
        """The records of the first protocol at the last moment: one per edit."""
        return self.select()

    def select(self, protocol: str | None = None, when: str | None = None) -> list[dict[str, Any]]:
        """Return the records of one protocol (default: the first) and one moment (default: the last).

        Raises:
            EvaluationError: if the report has no such protocol or moment.
        """
        protocol = self._one("protocol", protocol, self.protocols, 0)
        when = self._one("moment", when, self.moments, -1)
        return [r for r in self.records if r["protocol"] == protocol and r["when"] == when]

    @staticmethod
    def _one(what: str, value: str | None, known: Sequence[str], default: int) -> str:
        if not known:
            raise EvaluationError("the report is empty")
        if value is None:
            return known[default]
        if value not in known:
            raise EvaluationError(
                f"this report has no {what} {value!r}.{nearest(str(value), known)} It has: {', '.join(known)}."
            )
        return value

    # ------------------------------------------------------------------ summarising

    def summary(self, protocol: str | None = None, when: str | None = None) -> dict[str, Any]:
        """Means over the cases, as fractions of 1.

        Per case the probes of an axis are averaged, then the axes; then the cases that have the section at all. A
        section that no case has is absent.

        Args:
            protocol: default: the first of the report.
            when: default: the last moment of the report.

        Returns:
            ``{"pre": {...}, "post": {"rewrite_acc", "rephrase_acc", "locality", "locality_accuracy",
            "portability", "per_axis": {"locality": {axis: mean}, "portability": {axis: mean}}}, "n": cases,
            "n_per_entry": {...}, "protocol", "scorer", "setting", "when"}``.

        Raises:
            EvaluationError: if the report has no such protocol or moment, or mixes what must not be averaged.
        """
        records = self.select(protocol, when)
        _refuse_mixture(records)
        counts: dict[str, Any] = {}
        result: dict[str, Any] = {}
        for moment in ("pre", "post"):
            result[moment], counts[moment] = _means([r[moment] for r in records], pre=moment == "pre")
        first = records[0]
        return {
            **result,
            "n": len(records),
            "n_per_entry": counts["post"],
            "n_skipped_probes": sum(len(r.get("skipped") or ()) for r in records),
            "protocol": first["protocol"],
            "scorer": _scorer(first),
            "setting": first.get("setting"),
            "when": first["when"],
            "seconds_edit": metrics.mean(r["seconds_edit"] for r in records if r.get("seconds_edit") is not None),
            "seconds_eval": metrics.mean(r["seconds_eval"] for r in records if r.get("seconds_eval") is not None),
        }

    def retention(self, protocol: str | None = None) -> dict[str, float]:
        """How much of each mean is left after all edits: final minus immediate.

        Raises:
            EvaluationError: if not both moments were measured.
        """
        if set(self.moments) != {"immediate", "final"}:
            raise EvaluationError(
                "retention compares both moments; evaluate with setting='sequential', when=('immediate', 'final')"
            )
        first, last = (self.summary(protocol, when)["post"] for when in ("immediate", "final"))
        return {key: last[key] - first[key] for key in last if key != "per_axis" and key in first}

    # ------------------------------------------------------------------ other forms

    def to_easyedit(self, protocol: str | None = None, when: str | None = None) -> list[dict[str, Any]]:
        """The dictionary layout of EasyEdit's result files, without what this library adds."""
        known = ("rewrite_acc", "rephrase_acc", "locality", "portability")
        rows = []
        for record in self.select(protocol, when):
            row = {"case_id": record["case_id"], "requested_rewrite": record["requested_rewrite"]}
            for moment in ("pre", "post"):
                # Its scripts expect both dicts to exist, even when a case has no probe in them.
                row[moment] = {
                    "locality": {},
                    "portability": {},
                    **{k: v for k, v in record[moment].items() if k in known},
                }
            rows.append({**row, "time": record.get("time")})
        return json.loads(json.dumps(rows))

    def rows(self, protocol: str | None = None, when: str | None = None) -> list[dict[str, Any]]:
        """One flat row per case: texts, per-case means before and after, seconds. Missing values are ``None``.

        Without arguments: all protocols and moments.
        """
        records = self.records if protocol is None and when is None else self.select(protocol, when)
        return [_flat(record) for record in records]

    def to_dataset(self, protocol: str | None = None, when: str | None = None) -> datasets.Dataset:
        """The `rows` as a ``datasets.Dataset``, with the scores per axis and probe in the column ``axes``."""
        import datasets

        text, number = datasets.Value("string"), datasets.Value("float64")
        features: dict[str, Any] = {"case_id": datasets.Value("int64")}
        features |= dict.fromkeys(("id", "protocol", "scorer", "setting", "when"), text)
        features |= dict.fromkeys(("prompt", "subject", "target_new"), text)
        for name in _LABELS:
            features |= {f"{moment}_{name}": number for moment in ("pre", "post") if _exists(moment, name)}
        features |= {"seconds_edit": number, "seconds_eval": number, "peak_memory_bytes": datasets.Value("int64")}
        features["n_skipped_probes"] = datasets.Value("int64")
        features["axes"] = [{"section": text, "axis": text, "pre": [number], "post": [number]}]
        return datasets.Dataset.from_list(self.rows(protocol, when), features=datasets.Features(features))

    def to_pandas(self, protocol: str | None = None, when: str | None = None) -> Any:
        """The `rows` as a ``pandas.DataFrame``.

        Raises:
            MissingExtraError: if pandas is not installed.
        """
        try:
            pandas = importlib.import_module("pandas")
        except ImportError as error:
            raise require_extra("pandas", "eval", "EvaluationReport.to_pandas") from error
        return pandas.DataFrame(self.rows(protocol, when))

    def to_json(self, path: str | Path | None = None) -> str:
        """The whole report as JSON text; also written to ``path`` if one is given (overwriting it)."""
        content = {"format_version": FORMAT_VERSION, "meta": self.meta, "records": self.records}
        text = json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, path: str | Path) -> EvaluationReport:
        """Read a report that `to_json` wrote.

        Raises:
            DataError: if the file is missing or not such a report.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content["format_version"] > FORMAT_VERSION:
                raise DataError(f"{str(path)!r} was written by a newer version of the library; upgrade to read it")
            return cls(content["records"], content["meta"])
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(f"{str(path)!r} is not an evaluation report: {error}") from error

    # ------------------------------------------------------------------ tables

    def table_rows(self, protocol: str | None = None, when: str | None = None) -> list[tuple[str, str, str, str]]:
        """Rows of the summary table: metric, before, after, number of cases. Percentages with one decimal."""
        summary = self.summary(protocol, when)
        pre, post, counts = summary["pre"], summary["post"], summary["n_per_entry"]
        rows = []
        for name, label in _LABELS.items():
            if name not in post:
                continue
            rows.append((label, _percent(pre.get(name)), _percent(post[name]), str(counts[name])))
            axes = post["per_axis"].get(name, {})
            for axis, value in axes.items() if len(axes) > 1 else ():
                before = pre["per_axis"].get(name, {}).get(axis)
                rows.append((f"  {axis}", _percent(before), _percent(value), str(counts[f"{name}/{axis}"])))
        return rows

    def title(self, protocol: str | None = None, when: str | None = None) -> str:
        """One line that says what the numbers of the summary are."""
        s = self.summary(protocol, when)
        method = self.meta.get("method") or "edits"
        model = self.meta.get("model") or "model"
        return (
            f"{method} on {model}: {s['n']} edits, setting {s['setting']}, {s['when']},"
            f" protocol {s['protocol']} ({s['scorer']})"
        )

    def table(self, protocol: str | None = None, when: str | None = None) -> Table:
        """The summary as a ``rich`` table (``str(report)`` gives plain text)."""
        from rich.table import Table

        table = Table(title=self.title(protocol, when), title_justify="left")
        table.add_column("metric")
        for name in ("pre %", "post %", "cases"):
            table.add_column(name, justify="right")
        for row in self.table_rows(protocol, when):
            table.add_row(*row)
        return table

    def print_table(self, console: Console | None = None) -> None:
        """Show the summary of every protocol and moment in the terminal."""
        from rich.console import Console

        console = Console() if console is None else console
        for protocol in self.protocols:
            for when in self.moments:
                console.print(self.table(protocol, when))

    def __str__(self) -> str:
        """The summary of every protocol and moment as plain text."""
        blocks = []
        for protocol in self.protocols:
            for when in self.moments:
                rows = [("metric", "pre %", "post %", "cases"), *self.table_rows(protocol, when)]
                widths = [max(len(row[i]) for row in rows) for i in range(4)]
                lines = [
                    "  ".join(
                        cell.ljust(width) if i == 0 else cell.rjust(width)
                        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
                    ).rstrip()
                    for row in rows
                ]
                blocks.append("\n".join([self.title(protocol, when), *lines]))
        return "\n\n".join(blocks)

    def __repr__(self) -> str:
        return f"EvaluationReport({self.title()})" if self.records else "EvaluationReport(empty)"


# ---------------------------------------------------------------------- helpers


def easyedit_request(request: EditRequest) -> dict[str, Any]:
    """A request in the dictionary layout of EasyEdit; what is missing is ``None`` or ``{}``."""

    def section(axes: Mapping[str, Sequence[Probe]]) -> dict[str, Any]:
        return {
            axis: {
                "prompt": [probe.prompt for probe in probes],
                "ground_truth": [next(iter(probe.answers), None) for probe in probes],
            }
            for axis, probes in axes.items()
        }

    return {
        "prompt": request.filled_prompt,
        "target_new": request.target_new,
        "ground_truth": next(iter(request.ground_truth), None),
        "subject": request.subject,
        "rephrase_prompt": next(iter(request.rephrase_prompts), None),
        "locality": section(request.locality),
        "portability": section(request.portability),
    }


def _exists(moment: str, name: str) -> bool:
    """Whether a mean exists before the edit: agreement with oneself does not."""
    return not (moment == "pre" and name == "locality")


def _axis_scores(scores: Mapping[str, Sequence[float]] | None) -> dict[str, Sequence[float]] | None:
    """Axis → scores of a record's section, without the suffix of the keys; outputs are left out."""
    if scores is None:
        return None
    return {k.removesuffix("_acc"): v for k, v in scores.items() if k.endswith("_acc")}


def _means(halves: Sequence[Mapping[str, Any]], *, pre: bool) -> tuple[dict[str, Any], dict[str, int]]:
    """Means over the cases of one half ("pre" or "post") of the records, and the number of cases behind each."""
    means: dict[str, Any] = {}
    counts: dict[str, int] = {}
    per_axis: dict[str, dict[str, float]] = {}
    for name, key in LISTS.items():
        value, n = metrics.dataset_mean(half.get(key) for half in halves)
        if value is not None:
            means[name], counts[name] = value, n
    for name, key in AXES.items():
        if pre and not _exists("pre", name):
            continue
        cases = [_axis_scores(half.get(key)) for half in halves]
        value, n = metrics.dataset_mean(cases)
        if value is None:
            continue
        means[name], counts[name] = value, n
        axes = metrics.axis_means(cases)
        per_axis[name] = {axis: mean for axis, (mean, _) in axes.items()}
        counts |= {f"{name}/{axis}": n for axis, (_, n) in axes.items()}
    return {**means, "per_axis": per_axis}, counts


def _refuse_mixture(records: Sequence[Mapping[str, Any]]) -> None:
    if not records:
        raise EvaluationError("there are no records to summarise")
    groups: dict[str, set[str]] = {}
    for record in records:
        for section, meta in record["post"].get("metric_meta", {}).items():
            groups.setdefault(section, set()).add(meta["comparable_group"])
    for section, found in groups.items():
        if len(found) > 1:
            raise EvaluationError(f"'{section}' mixes numbers that are not comparable: {', '.join(sorted(found))}")


def _scorer(record: Mapping[str, Any]) -> str | None:
    meta = record["post"].get("metric_meta", {})
    return next((m["scorer"] for section, m in meta.items() if section != "locality"), None)


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """One record as a row without nesting (but for the axes)."""
    request = record["requested_rewrite"]
    row: dict[str, Any] = {
        "case_id": record["case_id"],
        "id": record.get("id"),
        "protocol": record["protocol"],
        "scorer": _scorer(record),
        "setting": record.get("setting"),
        "when": record["when"],
        "prompt": request["prompt"],
        "subject": request["subject"],
        "target_new": request["target_new"],
    }
    for moment in ("pre", "post"):
        half = record[moment]
        for name in _LABELS:
            if _exists(moment, name):
                scores = half.get(LISTS[name]) if name in LISTS else _axis_scores(half.get(AXES[name]))
                row[f"{moment}_{name}"] = metrics.case_mean(scores)
    row |= {name: record.get(name) for name in ("seconds_edit", "seconds_eval", "peak_memory_bytes")}
    row["n_skipped_probes"] = len(record.get("skipped") or ())
    row["axes"] = []
    for name in AXES:
        before = _axis_scores(record["pre"].get(name)) or {}
        for axis, scores in (_axis_scores(record["post"].get(name)) or {}).items():
            pre = list(before.get(axis, ()))
            row["axes"].append({"section": name, "axis": axis, "pre": pre, "post": list(scores)})
    return row


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"

"""`EvaluationReport`: what an evaluation found, per case and in summary, and its other forms.

A report is plain data: records (one per case, protocol and moment) and what was run (``meta``). Every number carries
its protocol; means are formed within one protocol and one moment only. Nothing is written to disk unless asked.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import DataError, EvaluationError, nearest
from ..measures import metrics
from ..measures.cost import efficiency
from .summaries import (
    LABELS,
    data_frame,
    exists,
    extra_sections,
    flat_row,
    is_extra,
    look_up,
    means_of,
    percent,
    refuse_mixture,
    scorer_of,
    shown,
)

if TYPE_CHECKING:
    import datasets
    from rich.console import Console
    from rich.table import Table

FORMAT_VERSION = 1


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
        """The moments of measurement: ``immediate``, ``at N`` for checkpoints, ``final``."""
        return list(dict.fromkeys(self.meta.get("when") or (r["when"] for r in self.records)))

    @property
    def cases(self) -> list[dict[str, Any]]:
        """The records of the first protocol at the last moment: one per edit."""
        return self.select()

    def has(self, protocol: str, when: str) -> bool:
        """Whether there is a record of this protocol at this moment."""
        return any(r["protocol"] == protocol and r["when"] == when for r in self.records)

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
        refuse_mixture(records)
        counts: dict[str, Any] = {}
        result: dict[str, Any] = {}
        for moment in ("pre", "post"):
            result[moment], counts[moment] = means_of([r[moment] for r in records], pre=moment == "pre")
        first = records[0]
        return {
            **result,
            "n": len(records),
            "n_per_entry": counts["post"],
            "n_failed": len(self.meta.get("failed") or ()),
            "n_skipped_probes": sum(len(r.get("skipped") or ()) for r in records),
            "protocol": first["protocol"],
            "scorer": scorer_of(first),
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
        if not {"immediate", "final"} <= set(self.moments):
            raise EvaluationError(
                "retention compares both moments; evaluate with setting='sequential', when=('immediate', 'final')"
            )
        first, last = (self.summary(protocol, when)["post"] for when in ("immediate", "final"))
        return {key: last[key] - first[key] for key in last if key in first and isinstance(last[key], float)}

    def curve(self, name: str, protocol: str | None = None) -> list[tuple[int, float]]:
        """One mean along the number of edits: the checkpoints of ``at=[…]``, and the end of the sequence.

        Args:
            name: key of ``summary()["post"]`` (``rewrite_acc``), or ``section/key`` (``counterfact/S``,
                ``locality/Neighborhood``); ``abilities/NAME`` is the score of a general ability, from 0 edits on.
            protocol: default: the first of the report.

        Returns:
            (number of edits, mean over all edits made until then), in order. Moments without the mean are left out.
        """
        if name.startswith("abilities/"):
            return self._ability_curve(name.removeprefix("abilities/"))
        points = []
        for when in self.moments:
            if when == "immediate":
                continue
            value = look_up(self.summary(protocol, when)["post"], name)
            if value is not None:
                points.append((len(self.select(protocol, when)), value))
        return sorted(points)

    @property
    def abilities(self) -> list[str]:
        """Names of the general abilities that were measured."""
        return list(dict.fromkeys(name for p in self.meta.get("checkpoints") or () for name in p.get("abilities", ())))

    def _ability_curve(self, name: str) -> list[tuple[int, float]]:
        """Several batches of one size are one point: their mean."""
        points: dict[int, list[float]] = {}
        for point in self.meta.get("checkpoints") or ():
            if name in point.get("abilities", ()):
                before, after = point["abilities_before"][name]["score"], point["abilities"][name]["score"]
                points[0] = [before] if before is not None else []
                if after is not None:
                    points.setdefault(point["n_edits"], []).append(after)
        return sorted((n, sum(scores) / len(scores)) for n, scores in points.items() if scores)

    def efficiency(self) -> dict[str, Any]:
        """What the edits cost: seconds, edits per second, memory; see `cost.efficiency`."""
        return {**efficiency(self.cases), "seconds_setup": self.meta.get("seconds_setup")}

    # ------------------------------------------------------------------ other forms

    def to_easyedit(self, protocol: str | None = None, when: str | None = None) -> list[dict[str, Any]]:
        """The dictionary layout of EasyEdit's result files, without what this library adds."""
        known = ("rewrite_acc", "rephrase_acc", "locality", "portability")
        fluent = {
            (r["case_id"], r["when"], moment): r[moment].get("fluency", {}).get("ngram_entropy")
            for r in self.records
            if r["protocol"] == "fluency"
            for moment in ("pre", "post")
        }
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
                entropies = record[moment].get("fluency", {}).get("ngram_entropy") or fluent.get(
                    (record["case_id"], record["when"], moment)
                )
                if entropies:
                    row[moment]["fluency"] = {"ngram_entropy": sum(entropies) / len(entropies)}
            rows.append({**row, "time": record.get("time")})
        return json.loads(json.dumps(rows))

    def rows(self, protocol: str | None = None, when: str | None = None) -> list[dict[str, Any]]:
        """One flat row per case: texts, per-case means before and after, seconds. Missing values are ``None``.

        Without arguments: all protocols and moments.
        """
        records = self.records if protocol is None and when is None else self.select(protocol, when)
        return [flat_row(record) for record in records]

    def to_dataset(self, protocol: str | None = None, when: str | None = None) -> datasets.Dataset:
        """The `rows` as a ``datasets.Dataset``, with the scores per axis and probe in the column ``axes``."""
        import datasets

        text, number = datasets.Value("string"), datasets.Value("float64")
        features: dict[str, Any] = {"case_id": datasets.Value("int64")}
        features |= dict.fromkeys(("id", "protocol", "scorer", "setting", "when"), text)
        features |= dict.fromkeys(("prompt", "subject", "target_new"), text)
        for name in LABELS:
            features |= {f"{moment}_{name}": number for moment in ("pre", "post") if exists(moment, name)}
        rows = self.rows(protocol, when)
        features |= {key: number for row in rows for key in row if key not in features and is_extra(key)}
        features |= {"seconds_edit": number, "seconds_eval": number, "peak_memory_bytes": datasets.Value("int64")}
        features["extra_memory_bytes"] = datasets.Value("int64")
        features["n_skipped_probes"] = datasets.Value("int64")
        features["axes"] = [{"section": text, "axis": text, "pre": [number], "post": [number]}]
        rows = [{key: row.get(key) for key in features} for row in rows]
        return datasets.Dataset.from_list(rows, features=datasets.Features(features))

    def to_pandas(self, protocol: str | None = None, when: str | None = None) -> Any:
        """The `rows` as a ``pandas.DataFrame``.

        Raises:
            MissingExtraError: if pandas is not installed.
        """
        return data_frame(self.rows(protocol, when))

    def to_json(self, path: str | Path | None = None) -> str:
        """The whole report as JSON text; also written to ``path`` if one is given (overwriting it)."""
        content = {"format_version": FORMAT_VERSION, "meta": self.meta, "records": self.records}
        text = json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    def to_markdown(self, path: str | Path | None = None, *, max_cases: int = 20) -> str:
        """The summary tables and the first cases as Markdown; also written to ``path`` if one is given."""
        from .comparison import Comparison

        return Comparison({_own_label(self): self}).to_markdown(path, max_cases=max_cases)

    def to_html(self, path: str | Path | None = None, *, max_cases: int = 200) -> str:
        """One self-contained HTML page with charts and every case; also written to ``path`` if one is given.

        Args:
            path: file to write (overwriting it).
            max_cases: cases that are shown one by one; 0 for none.
        """
        from .comparison import Comparison

        return Comparison({_own_label(self): self}).to_html(path, max_cases=max_cases)

    def to_model_index(
        self, model_name: str | None = None, dataset_name: str = "knowledge edits", dataset_type: str | None = None
    ) -> list[dict[str, Any]]:
        """The means as entries for the ``model-index`` of a model card on the Hub, fractions of 1.

        Args:
            model_name: default: the edited model's.
            dataset_name: for people.
            dataset_type: id of the data set on the Hub; default: derived from the name.
        """
        from .comparison import model_index

        return model_index(self, model_name or str(self.meta.get("model") or "model"), dataset_name, dataset_type)

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
        for name, label in LABELS.items():
            if name not in post:
                continue
            rows.append((label, percent(pre.get(name)), percent(post[name]), str(counts[name])))
            axes = post["per_axis"].get(name, {})
            for axis, value in axes.items() if len(axes) > 1 else ():
                before = pre["per_axis"].get(name, {}).get(axis)
                rows.append((f"  {axis}", percent(before), percent(value), str(counts[f"{name}/{axis}"])))
        for section in extra_sections(post):
            for key, value in post[section].items():
                before = pre.get(section, {}).get(key)
                number = str(counts.get(f"{section}/{key}", ""))
                rows.append((f"{section} {key}", shown(section, before), shown(section, value), number))
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


def _own_label(report: EvaluationReport) -> str:
    return str(report.meta.get("method") or "edits")

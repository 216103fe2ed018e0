"""`EvaluationReport`: what an evaluation measured, and its other forms. Nothing is written to disk unless asked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import TypedDict

from ...errors import ArtifactError, DataError
from ...storage.display import percent, printable
from ...storage.files import json_ready, named_path, write_text
from ...storage.shapes import of_type
from ..measures.catalogue import metric_of
from . import html, markdown
from .case_result import CaseResult
from .groups import Runs
from .layout import MetaLayout, read_json
from .model_index import model_index
from .plots import PlotKind, plot_report
from .results import Results
from .summaries import LABELS, NAMES, data_frame, exists, extra_sections, flat_row, formatted, is_extra

if TYPE_CHECKING:
    import datasets
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.table import Table

_FORMAT_VERSION = 1


class _ReportFile(TypedDict):
    """What `EvaluationReport.to_json` writes."""

    meta: MetaLayout
    records: list[dict[str, Any]]


class EvaluationReport(Results):
    """The outcome of `evaluate_edits`.

    Args:
        records: one dict per case, protocol and time; the layout is described in the documentation.
        meta: what was run: setting, protocols with their settings and scorers, method, model, seconds.

    Raises:
        DataError: if a record is none.
    """

    def __init__(self, records: Sequence[Mapping[str, Any]], meta: dict[str, Any] | None = None):
        super().__init__([CaseResult.from_dict(record) for record in records], {} if meta is None else meta)

    @classmethod
    def of(cls, results: list[CaseResult], meta: dict[str, Any]) -> EvaluationReport:
        """A report of results that are plain data already."""
        report = cls([], meta)
        report.results = results
        return report

    @property
    def records(self) -> list[dict[str, Any]]:
        """All results in EasyEdit's layout; made anew on each call."""
        return [result.to_dict() for result in self.results]

    @property
    def moments(self) -> list[str]:
        """`times`, under the name of version 0.1.0."""
        return self.times

    @property
    def cases(self) -> list[dict[str, Any]]:
        """The records of the first protocol at the last time: one per edit."""
        return self.select()

    def select(self, protocol: str | None = None, when: str | None = None) -> list[dict[str, Any]]:
        """Return the records of one protocol (default: the first) and one time (default: the last).

        Raises:
            EvaluationError: if the report has no such protocol or time.
        """
        return [result.to_dict() for result in self.chosen(protocol, when)]

    # ------------------------------------------------------------------ data

    def to_easyedit(self, protocol: str | None = None, when: str | None = None) -> list[dict[str, Any]]:
        """The dictionary layout of EasyEdit's result files, without what this library adds."""
        known = ("rewrite_acc", "rephrase_acc", "locality", "portability")
        fluent = {
            (r.number, r.when, name): half.numbers.get("fluency", {}).get("ngram_entropy")
            for r in self.results
            if r.protocol == "fluency"
            for name, half in r.halves.items()
        }
        rows = []
        for result in self.chosen(protocol, when):
            record = result.to_dict()
            row: dict[str, Any] = {"case_id": result.number, "requested_rewrite": result.request}
            for name, half in result.halves.items():
                # Its scripts expect both dicts to exist, even when a case has no probe in them.
                scores = {key: value for key, value in record[name].items() if key in known}
                row[name] = {"locality": {}, "portability": {}, **scores}
                entropies = half.numbers.get("fluency", {}).get("ngram_entropy") or fluent.get(
                    (result.number, result.when, name)
                )
                if entropies:
                    row[name]["fluency"] = {"ngram_entropy": sum(entropies) / len(entropies)}
            rows.append({**row, "time": record["time"]})
        return json.loads(json.dumps(rows))

    def rows(self, protocol: str | None = None, when: str | None = None) -> list[dict[str, Any]]:
        """One flat row per case: texts, per-case means before and after, seconds. Missing values are ``None``.

        Without arguments: all protocols and times.
        """
        everything = protocol is None and when is None
        return [flat_row(result) for result in (self.results if everything else self.chosen(protocol, when))]

    def to_dataset(self, protocol: str | None = None, when: str | None = None) -> datasets.Dataset:
        """The `rows` as a ``datasets.Dataset``, with the scores per axis and probe in the column ``axes``."""
        import datasets

        text, number = datasets.Value("string"), datasets.Value("float64")
        features: dict[str, Any] = {"case_id": datasets.Value("int64")}
        features |= dict.fromkeys(("id", "protocol", "scorer", "setting", "when"), text)
        features |= dict.fromkeys(("prompt", "subject", "target_new"), text)
        for section, name in NAMES.items():
            features |= {f"{half}_{name}": number for half in ("pre", "post") if exists(half, section)}
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
        content = {"format_version": _FORMAT_VERSION, "meta": self.meta, "records": self.records}
        text = json.dumps(json_ready(content), ensure_ascii=False, indent=1, allow_nan=False)
        written(text + "\n", path)
        return text

    @classmethod
    def from_json(cls, path: str | Path) -> EvaluationReport:
        """Read a report that `to_json` wrote.

        Raises:
            DataError: if the file is missing or not such a report.
        """
        content = read_json(Path(path), "an evaluation report", _FORMAT_VERSION)
        of_type(_ReportFile, content, repr(str(path)), DataError)
        return cls(content["records"], content["meta"])

    # ------------------------------------------------------------------ pages

    def to_markdown(self, path: str | Path | None = None, *, max_cases: int = 20) -> str:
        """The summary tables and the first cases as Markdown; also written to ``path`` if one is given."""
        return written(markdown.render(Runs([self]), max_cases), path)

    def to_html(self, path: str | Path | None = None, *, max_cases: int = 200) -> str:
        """One self-contained HTML page with charts and every case; also written to ``path`` if one is given.

        Args:
            path: file to write (overwriting it).
            max_cases: cases that are shown one by one; 0 for none.
        """
        return written(html.render(Runs([self]), None, max_cases), path)

    def plot(
        self,
        kind: PlotKind | None = None,
        *,
        protocol: str | None = None,
        when: str | None = None,
        ax: Axes | None = None,
    ) -> Figure:
        """Draw the means: as bars with intervals and n, or as curves over the number of edits.

        Args:
            kind: ``"bars"`` or ``"curves"``; ``None``: curves if it was measured along a sequence (``at=``).
            protocol: only this one; ``None``: all, those under which the model writes its answers first.
            when: of bars: default: the last time at which it was measured.
            ax: draw on these axes; curves of several protocols need a figure of their own.

        Returns:
            The figure, which notebooks show; nothing is opened, and pyplot knows nothing of it.

        Raises:
            EvaluationError: if there is nothing to draw.
            MissingExtraError: without matplotlib (the extra ``viz``).
        """
        return plot_report(self, kind, protocol, when, ax)

    def to_model_index(
        self, model_name: str | None = None, dataset_name: str = "knowledge edits", dataset_type: str | None = None
    ) -> list[dict[str, Any]]:
        """The means as entries for the ``model-index`` of a model card on the Hub, fractions of 1.

        Args:
            model_name: default: the edited model's.
            dataset_name: for people.
            dataset_type: id of the data set on the Hub; default: derived from the name.
        """
        return model_index(self, model_name or str(self.meta.get("model") or "model"), dataset_name, dataset_type)

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
                less = " ↓" if metric_of(section, key).better == "lower" else ""
                texts = formatted(section, key, before), formatted(section, key, value)
                rows.append((f"{section} {key}{less}", *texts, number))
        return rows

    def title(self, protocol: str | None = None, when: str | None = None) -> str:
        """One line that says what the numbers of the summary are."""
        s = self.summary(protocol, when)
        about = f"{self.scenario}, " if self.scenario else ""
        return (
            f"{self.label} on {self.meta.get('model') or 'model'}: {about}{s['n']} edits, setting {s['setting']},"
            f" {s['when']}, protocol {s['protocol']} ({s['scorer']})"
        )

    def table(self, protocol: str | None = None, when: str | None = None) -> Table:
        """The summary as a ``rich`` table (``str(report)`` gives plain text)."""
        from rich.table import Table
        from rich.text import Text

        def shown(text: str) -> Text:  # a string would be read as markup, whoever prints the table
            return Text(printable(text))

        table = Table(title=shown(self.title(protocol, when)), title_justify="left")
        table.add_column("metric")
        for name in ("pre %", "post %", "cases"):
            table.add_column(name, justify="right")
        for row in self.table_rows(protocol, when):
            table.add_row(*map(shown, row))
        return table

    def print_table(self, console: Console | None = None) -> None:
        """Show the summary of every protocol and time in the terminal."""
        from rich.console import Console

        console = Console() if console is None else console
        for protocol in self.protocols:
            for when in self.times:
                console.print(self.table(protocol, when))

    def __str__(self) -> str:
        """The summary of every protocol and time as plain text."""
        blocks = []
        for protocol in self.protocols:
            for when in self.times:
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
        return printable("\n\n".join(blocks))

    def __repr__(self) -> str:
        return f"EvaluationReport({printable(self.title())})" if self.results else "EvaluationReport(empty)"


def written(text: str, path: str | Path | None) -> str:
    """Return the text; write it first if a path is given.

    Raises:
        DataError: if it cannot be written.
    """
    if path is not None:
        try:
            # Half a character, which UTF-8 lacks, stands as \ud83d: JSON reads it again, and people see it.
            write_text(named_path(path, "the file"), text, errors="backslashreplace")
        except ArtifactError as error:
            raise DataError(f"cannot write the report: {error}") from error
    return text

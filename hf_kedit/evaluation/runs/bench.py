"""A sweep that can be interrupted, shared out and collected: every run has a folder of its own (see `folder`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...config import EditConfig, config_class
from ...data import load_edit_dataset
from ...errors import DataError, EvaluationError, KeditError
from ...logging import get_logger
from ...model import EditableModel
from ...storage.files import named_path
from ..measures.abilities import Ability
from ..report.comparison import Comparison
from ..report.report import EvaluationReport
from .evaluate import evaluate_edits
from .folder import RUN_FILE, collect_report
from .plan import parse_shard
from .sweep import BenchPlan, BenchRun, Part, ability_of

logger = get_logger(__name__)
ERROR = "error.txt"
"""File in the folder of a run that failed."""


@dataclass
class BenchResult:
    """The state of a sweep.

    Args:
        reports: the finished runs with their reports.
        failed: run → what went wrong.
        missing: runs that are not finished yet.
    """

    reports: list[tuple[dict[str, str], EvaluationReport]] = field(default_factory=list)
    failed: list[tuple[dict[str, str], str]] = field(default_factory=list)
    missing: list[dict[str, str]] = field(default_factory=list)

    def add(self, run: BenchRun, report: EvaluationReport | None, folder: Path) -> None:
        """Take in a run: finished if it has a report, failed if its folder holds an error."""
        if report is not None:
            report.meta |= {"dataset": run.dataset.label, "label": run.about}
            self.reports.append((run.about, report))
        elif (folder / ERROR).exists():
            self.failed.append((run.about, (folder / ERROR).read_text(encoding="utf-8").strip()))
        else:
            self.missing.append(run.about)

    def comparison(self) -> Comparison:
        """All finished runs side by side, labelled by what differs between them; failed ones by name and reason.

        Raises:
            EvaluationError: if no run is finished.
        """
        known = [about for about, _ in [*self.reports, *self.failed]]
        names = [k for k in ("method", "model", "dataset", "setting") if len({a[k] for a in known}) > 1] or ["method"]

        def label(about: dict[str, str]) -> str:
            return " · ".join(about[k] for k in names)

        return Comparison(
            {label(about): report for about, report in self.reports},
            {label(about): reason for about, reason in self.failed},
        )


def run_bench(
    plan: BenchPlan, output_dir: str | Path | None = None, shard: str | None = None, progress: bool = True
) -> BenchResult:
    """Carry out the runs of a sweep that are not finished yet.

    A run that fails, in whatever way, is noted and the sweep goes on; repeating the call tries it again.

    Args:
        plan: the sweep.
        output_dir: instead of the plan's.
        shard: ``"2/4"``: only every fourth run, beginning with the second.
        progress: show a progress bar for each run.

    Returns:
        The state of the runs of this shard.

    Raises:
        EvaluationError: for a bad ``shard``.
    """
    root = named_path(output_dir or plan.output_dir, "output_dir", EvaluationError)
    number, count = parse_shard(shard, "single")
    mine = [run for index, run in enumerate(plan.runs) if index % count == number - 1]
    result = BenchResult()
    model: EditableModel | None = None
    loaded: Part | None = None
    datasets: dict[Part, Any] = {}
    abilities: list[Ability] | None = None
    for index, run in enumerate(mine, start=1):
        folder = root / run.folder
        report = _finished(folder)
        if report is None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ERROR).unlink(missing_ok=True)
            logger.info("run %d of %d: %s", index, len(mine), ", ".join(run.about.values()))
            try:
                if model is None or loaded != run.model:
                    model = None  # the old one goes before the new one comes
                    model, loaded = _load(run), run.model
                if run.dataset not in datasets:
                    datasets[run.dataset] = load_edit_dataset(run.dataset.name, **run.dataset.options)
                if abilities is None:
                    abilities = [ability_of(entry) for entry in plan.abilities]
                report = _carry_out(plan, run, model, datasets[run.dataset], abilities, folder, progress)
            except Exception as error:  # whatever one run meets, the others go on
                expected = isinstance(error, KeditError)
                logger.warning("%s failed: %s", ", ".join(run.about.values()), error, exc_info=not expected)
                (folder / ERROR).write_text(f"{type(error).__name__}: {error}\n", encoding="utf-8")
        result.add(run, report, folder)
    return result


def _config(method: Part) -> EditConfig | str:
    return config_class(method.name).from_dict(method.options) if method.options else method.name


def _load(run: BenchRun) -> EditableModel:
    """With the method of the run from the start: the default one has nothing to say about models it does not edit."""
    return EditableModel.from_pretrained(run.model.name, _config(run.method), **run.model.options)


def _carry_out(
    plan: BenchPlan,
    run: BenchRun,
    model: EditableModel,
    dataset: Any,
    abilities: Sequence[Ability],
    folder: Path,
    progress: bool,
) -> EvaluationReport:
    model.set_method(_config(run.method))
    piles_up = run.setting.name != "single"  # else there is nothing that could wear the model down
    return evaluate_edits(
        model,
        dataset,
        protocol=list(plan.protocols),
        on_error=plan.on_error,  # type: ignore[arg-type]
        output_dir=folder,
        progress=progress,
        collapse_text=plan.collapse_text if piles_up else None,
        abilities=abilities if piles_up else (),
        **run.setting.options,
    )


def collect_bench(plan: BenchPlan, output_dir: str | Path | None = None) -> BenchResult:
    """Read what the runs of a sweep have found, from the output folder, without running anything."""
    root = named_path(output_dir or plan.output_dir, "output_dir", EvaluationError)
    result = BenchResult()
    for run in plan.runs:
        result.add(run, _finished(root / run.folder), root / run.folder)
    return result


def _finished(folder: Path) -> EvaluationReport | None:
    """The report of a run; ``None`` if it is not complete."""
    if not (folder / RUN_FILE).exists():
        return None
    try:
        return collect_report(folder)
    except (DataError, EvaluationError):
        return None

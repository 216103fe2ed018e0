"""A sweep: methods × models × data sets × settings from one YAML file, that can be interrupted, shared out, collected.

Every combination is a run with its own folder (see `runfolder`), so that nothing is measured twice and several
machines can work into one output folder.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...config import config_class, read_mapping
from ...data import load_edit_dataset
from ...errors import DataError, EvaluationError, KeditError, check_choice
from ...logging import get_logger
from ...model import EditableModel
from ..measures.abilities import ABILITIES as ABILITIES
from ..measures.abilities import Ability, load_ability
from ..measures.harness import HarnessTask
from ..measures.judges import ExactMatchJudge, OpenAICompatibleJudge
from ..protocols.base import PROTOCOLS, Protocol
from ..report.comparison import Comparison
from ..report.report import EvaluationReport
from .evaluate import evaluate_edits
from .folder import collect_report
from .plan import parse_shard

logger = get_logger(__name__)
ERROR = "error.txt"
"""File in the folder of a run that failed."""
_KEYS = tuple("models methods datasets settings protocols output_dir on_error collapse_text abilities".split())
_MODEL_KEYS = ("name", "label", "dtype", "device", "revision")
_ABILITY_KEYS = ("task", "source", "split", "config", "limit", "max_new_tokens", "name")
_HARNESS_KEYS = ("harness", "metric", "limit", "num_fewshot", "include_path", "batch_size")
_SETTING_OPTIONS = ("batch_size", "when", "at", "limit")
_SETTING_KEYS = ("name", "label", "setting", *_SETTING_OPTIONS)


@dataclass(frozen=True)
class Part:
    """A model, method, data set or setting of a sweep: its name, what it is called, and its options."""

    name: str
    label: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class BenchRun:
    """One combination."""

    model: Part
    method: Part
    dataset: Part
    setting: Part

    @property
    def about(self) -> dict[str, str]:
        """The labels of its parts."""
        return {k: getattr(self, k).label for k in ("model", "method", "dataset", "setting")}

    @property
    def folder(self) -> str:
        """Name of its folder: readable, and different for different options."""
        parts = (self.model, self.method, self.dataset, self.setting)
        content = json.dumps([[p.name, p.label, p.options] for p in parts], sort_keys=True, default=str)
        readable = "-".join(re.sub(r"[^A-Za-z0-9]+", "_", p.label).strip("_") for p in parts)
        return f"{readable[:80]}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class BenchPlan:
    """What a sweep consists of.

    Args:
        models: names or paths.
        methods: names, with hyperparameters as options.
        datasets: registered names or files, with ``split``, ``limit`` … as options.
        settings: ``single``, ``batch`` or ``sequential``, with ``batch_size``, ``when``, ``at`` and ``limit`` (the
            first so many rows of the data set only) as options.
        protocols: asked in every run.
        output_dir: where the runs go; relative to the file that the plan was read from.
        on_error: ``skip`` leaves out edits that fail.
        collapse_text: texts for the perplexity of runs in batches or sequences.
        abilities: general tasks, measured in the same runs: arguments of `load_ability`, or of `HarnessTask` with the
            task under ``harness``.
    """

    models: tuple[Part, ...]
    methods: tuple[Part, ...]
    datasets: tuple[Part, ...]
    settings: tuple[Part, ...]
    protocols: tuple[Protocol, ...]
    output_dir: Path
    on_error: str = "skip"
    collapse_text: tuple[str, ...] | None = None
    abilities: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def from_file(cls, path: str | Path) -> BenchPlan:
        """Read a plan from a YAML or JSON file.

        Raises:
            ConfigError: if the file cannot be read.
            EvaluationError: for an unknown key or name; the nearest known one is given.
        """
        file = Path(path)
        plan = cls.from_dict(read_mapping(file))
        return replace(plan, output_dir=file.parent / plan.output_dir)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> BenchPlan:
        """Build a plan from plain data; see `from_file`."""
        _known_keys("the sweep", content, _KEYS)
        for key in ("models", "methods", "datasets"):
            if not content.get(key):
                raise EvaluationError(f"the sweep has no '{key}'; give a list of names")
        settings = tuple(_setting(entry) for entry in _listed(content.get("settings") or ["single"]))
        plan = cls(
            models=tuple(_part(e, "models", _MODEL_KEYS) for e in _listed(content["models"])),
            methods=tuple(_part(e, "methods", None) for e in _listed(content["methods"])),
            datasets=tuple(_part(e, "datasets", None) for e in _listed(content["datasets"])),
            settings=settings,
            protocols=tuple(
                _protocol(e) for e in _listed(content.get("protocols") or ["teacher_forced", "generation"])
            ),
            output_dir=Path(content.get("output_dir") or "bench-results"),
            on_error=str(content.get("on_error") or "skip"),
            collapse_text=tuple(_listed(content["collapse_text"])) if content.get("collapse_text") else None,
            abilities=tuple(_ability_entry(entry) for entry in _listed(content.get("abilities") or [])),
        )
        for method in plan.methods:
            config_class(method.name)  # an unknown name is an error now, not after the first runs
        for key in ("models", "methods", "datasets", "settings"):
            labels = [part.label for part in getattr(plan, key)]
            double = next((label for label in labels if labels.count(label) > 1), None)
            if double is not None:
                raise EvaluationError(f"'{key}' has two entries called {double!r}; give them a 'label'")
        return plan

    @property
    def runs(self) -> list[BenchRun]:
        """All combinations; runs on one model and data set follow one another."""
        return [
            BenchRun(model, method, dataset, setting)
            for model, dataset, method, setting in itertools.product(
                self.models, self.datasets, self.methods, self.settings
            )
        ]


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

    A run that fails is noted and the sweep goes on; repeating the call tries it again.

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
    root = Path(output_dir or plan.output_dir)
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
                    model, loaded = EditableModel.from_pretrained(run.model.name, **run.model.options), run.model
                if run.dataset not in datasets:
                    datasets[run.dataset] = load_edit_dataset(run.dataset.name, **run.dataset.options)
                if abilities is None:
                    abilities = [_ability(entry) for entry in plan.abilities]
                report = _carry_out(plan, run, model, datasets[run.dataset], abilities, folder, progress)
            except KeditError as error:
                logger.warning("%s failed: %s", ", ".join(run.about.values()), error)
                (folder / ERROR).write_text(f"{type(error).__name__}: {error}\n", encoding="utf-8")
        result.add(run, report, folder)
    return result


def _carry_out(
    plan: BenchPlan,
    run: BenchRun,
    model: EditableModel,
    dataset: Any,
    abilities: Sequence[Ability],
    folder: Path,
    progress: bool,
) -> EvaluationReport:
    method = run.method
    model.set_method(config_class(method.name).from_dict(method.options) if method.options else method.name)
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
    root = Path(output_dir or plan.output_dir)
    result = BenchResult()
    for run in plan.runs:
        result.add(run, _finished(root / run.folder), root / run.folder)
    return result


def _finished(folder: Path) -> EvaluationReport | None:
    """The report of a run; ``None`` if it is not complete."""
    if not (folder / "run.json").exists():
        return None
    try:
        return collect_report(folder)
    except (DataError, EvaluationError):
        return None


# ---------------------------------------------------------------------- reading the file


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _known_keys(what: str, content: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in content:
        check_choice(f"key in {what}", key, known)


def _part(entry: Any, where: str, known: Sequence[str] | None) -> Part:
    if isinstance(entry, str):
        return Part(entry, entry)
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
        raise EvaluationError(f"an entry of '{where}' must be a name, or a mapping with 'name', not {entry!r}")
    if known is not None:
        _known_keys(f"'{where}'", entry, known)
    options = {str(k): v for k, v in entry.items() if k not in ("name", "label")}
    return Part(entry["name"], str(entry.get("label") or entry["name"]), options)


def _setting(entry: Any) -> Part:
    if isinstance(entry, Mapping):
        _known_keys("'settings'", entry, _SETTING_KEYS)
        name = str(entry.get("setting") or entry.get("name"))
        options = {str(k): v for k, v in entry.items() if k in _SETTING_OPTIONS}
        batches = f", batches of {options['batch_size']}" if "batch_size" in options else ""
        return Part(name, str(entry.get("label") or name + batches), {"setting": name, **options})
    return Part(str(entry), str(entry), {"setting": str(entry)})


def _ability_entry(entry: Any) -> dict[str, Any]:
    """Check what can be checked before data are loaded."""
    options = {"task": entry} if isinstance(entry, str) else dict(entry) if isinstance(entry, Mapping) else {}
    if "harness" in options:
        _known_keys("a harness task", options, _HARNESS_KEYS)
    else:
        _known_keys("an ability", options, _ABILITY_KEYS)
        check_choice("ability", options.get("task"), ABILITIES)
    return options


def _ability(options: Mapping[str, Any]) -> Ability:
    if "harness" in options:
        return HarnessTask(options["harness"], **{k: v for k, v in options.items() if k != "harness"})
    return load_ability(**options)


def _protocol(entry: Any) -> Protocol:
    name, options = (entry, {}) if isinstance(entry, str) else (None, {})
    if isinstance(entry, Mapping):
        options = dict(entry)
        name = options.pop("name", None)
    check_choice("protocol", name, PROTOCOLS)
    assert name is not None
    judge = options.pop("judge", None)
    if judge == "exact":
        options["scorer"] = ExactMatchJudge()
    elif isinstance(judge, Mapping):
        options["scorer"] = OpenAICompatibleJudge(**judge)
    elif judge is not None:
        raise EvaluationError("'judge' must be 'exact', or a mapping with 'base_url' and 'model'")
    try:
        return PROTOCOLS[name](**options)
    except TypeError as error:
        raise EvaluationError(f"protocol {name!r}: {error}") from error

"""The folder of a run: what was run (``run.json``) and its results, step by step, so that a killed run can go on.

Each measurement ends with a line that says it is complete. What stands before such a line is never lost, what has
none is measured again. Several processes may write shards of one run into one folder, each into its own file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from ...config import EditConfig
from ...errors import DataError, EvaluationError, KeditError
from ...logging import get_logger
from ...storage.files import json_ready, named_path
from ...storage.parsing import as_mapping, parse_json
from ...storage.shapes import of_type
from ..report.case_result import CaseResult
from ..report.layout import CheckpointLayout, FailedLayout, MetaLayout, read_json
from ..report.report import EvaluationReport
from .plan import Step, StepResult

logger = get_logger(__name__)
RUN_FILE = "run.json"
_FORMAT_VERSION = 1
PlanEntry = tuple[str, list[int], int, int]
"""When, numbers of the cases, unit, and number of edits."""


class _RunFile(TypedDict):
    """What `RUN_FILE` holds."""

    shards: int
    settings: dict[str, Any]
    plan: list[list[Any]]


class RunFolder:
    """Results on disk of one shard of a run.

    Args:
        path: the folder; made if it is missing.
        settings: everything that decides the results, JSON-ready.
        plan: the measurements of the whole run.
        shard: number and count.

    Raises:
        EvaluationError: if the folder holds another run.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any], plan: Sequence[Step], shard: tuple[int, int]):
        self.path = named_path(path, "output_dir", EvaluationError)
        self.file = self.path / (
            "results.jsonl" if shard[1] == 1 else f"results-{shard[0]:04d}-of-{shard[1]:04d}.jsonl"
        )
        self.done: dict[int, StepResult] = {}
        if self.path.exists() and not self.path.is_dir():
            raise EvaluationError(f"output_dir {str(self.path)!r} is a file; name a folder")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:  # ValueError: a name that no folder can have
            raise EvaluationError(f"the folder {str(self.path)!r} cannot be made: {error}") from error
        content = {
            "format_version": _FORMAT_VERSION,
            "shards": shard[1],
            "settings": json.loads(json.dumps(settings)),
            "plan": [[s.when, list(s.cases), s.unit, s.n_edits] for s in plan],
        }
        existing = self.path / RUN_FILE
        if existing.exists():
            self._check(_read_run(self.path), content)
        else:
            _write_atomically(existing, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
        if self.file.exists():
            self.done = read_steps(self.file)
            # Lines of an unfinished step, and a line cut off in the middle, go: the step is measured again.
            _write_atomically(self.file, "".join(line for step in self.done.items() for line in _lines(*step)))

    def _check(self, existing: dict[str, Any], wanted: dict[str, Any]) -> None:
        old, new = _comparable(existing["settings"]), _comparable(wanted["settings"])
        names = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
        names += [k for k in ("format_version", "shards", "plan") if existing.get(k) != wanted[k]]
        if not names:
            return
        raise EvaluationError(
            f"{str(self.path)!r} holds another run (it differs in {', '.join(names)}); choose another output_dir,"
            " or repeat the same call to continue that run"
        )

    def write(self, step: int, result: StepResult) -> None:
        """Add the results of a complete step."""
        try:
            with self.file.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write("".join(_lines(step, result)))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise EvaluationError(f"cannot write {str(self.file)!r}: {error}") from error

    def finish(self, meta: dict[str, Any]) -> None:
        """Note what the shard as a whole was like; the last run counts."""
        _write_atomically(self._meta_file, json.dumps(meta, ensure_ascii=False, indent=1) + "\n")

    def read_meta(self) -> dict[str, Any]:
        """What `finish` noted; empty if the run never came to its end."""
        return _read_meta(self._meta_file) if self._meta_file.exists() else {}

    @property
    def _meta_file(self) -> Path:
        return self.path / self.file.name.replace("results", "meta", 1).replace(".jsonl", ".json")


def _comparable(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings in the words of this version: fields of configs have had other names."""
    settings = {key: value for key, value in settings.items() if key != "version"}
    try:
        settings["config"] = json_ready(EditConfig.from_dict(settings["config"], saved=True).to_dict())
    except (KeditError, KeyError, TypeError):  # saved edits have none; one that is damaged differs
        pass
    return settings


def _lines(step: int, result: StepResult) -> Iterator[str]:
    """The lines of a complete step."""
    entries: list[dict[str, Any]] = [{"failed": failed} for failed in result.failed]
    entries += [{"record": r.to_dict()} for r in result.results]
    if result.checkpoint is not None:
        entries.append({"checkpoint": result.checkpoint})
    for entry in (*entries, {"done": True}):
        yield json.dumps(json_ready({"step": step, **entry}), ensure_ascii=False, allow_nan=False) + "\n"


def read_steps(file: Path) -> dict[int, StepResult]:
    """Step → its results, of the steps that are complete; a step with a damaged line is not.

    Raises:
        DataError: if the file cannot be read at all.
    """
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"the results in {str(file)!r} cannot be read: {error}") from error
    begun: dict[int, StepResult] = {}
    complete: dict[int, StepResult] = {}
    damaged: set[int] = set()
    for line in text.split("\n"):
        try:
            entry = as_mapping(parse_json(line, "a line", DataError), "a line", DataError)
        except DataError:
            continue  # the end of a killed process; or a damaged line, and its step lacks a result
        step = entry.get("step")
        if isinstance(step, bool) or not isinstance(step, int):
            continue
        result = begun.setdefault(step, StepResult())
        try:
            if "record" in entry:
                result.results.append(CaseResult.from_dict(entry["record"]))
            elif "failed" in entry:
                result.failed.append(of_type(FailedLayout, entry["failed"], "'failed'", DataError))
            elif "checkpoint" in entry:
                result.checkpoint = of_type(CheckpointLayout, entry["checkpoint"], "'checkpoint'", DataError)
            elif entry.get("done"):
                complete[step] = result
        except DataError as error:
            logger.warning("%s: step %d is measured again: %s", file, step, error)
            damaged.add(step)
    return {step: result for step, result in complete.items() if step not in damaged}


def collect_report(path: str | Path) -> EvaluationReport:
    """Put the report of a run together from its folder, whatever the number of shards.

    Raises:
        DataError: if there is no run in the folder.
        EvaluationError: if parts of the run are missing or were measured twice.
    """
    folder = named_path(path, "the folder of the run", DataError)
    run = _read_run(folder)
    steps: dict[int, StepResult] = {}
    for file in sorted(folder.glob("results*.jsonl")):
        for number, result in read_steps(file).items():
            if number in steps:
                raise EvaluationError(f"{str(folder)!r}: step {number} was measured by two shards; run it again")
            steps[number] = result
    missing = [n for n in range(len(run["plan"])) if n not in steps]
    if missing:
        raise EvaluationError(
            f"{str(folder)!r}: the run is not complete, {len(missing)} of {len(run['plan'])} measurements are missing;"
            f" repeat the call that began it{' (all its shards)' if run['shards'] > 1 else ''}"
        )
    metas = [_read_meta(file) for file in sorted(folder.glob("meta*.json"))]
    return assemble(steps, metas, [entry[0] for entry in run["plan"]])


def assemble(steps: dict[int, StepResult], metas: Sequence[dict[str, Any]], whens: Sequence[str]) -> EvaluationReport:
    """A report of the results of all steps.

    Args:
        steps: step → its results.
        metas: what each shard noted about itself.
        whens: when each step of the plan was measured.
    """
    in_order = [steps[number] for number in sorted(steps)]
    results = sorted((r for step in in_order for r in step.results), key=lambda result: result.number)
    failed = {entry["case_id"]: entry for step in in_order for entry in step.failed}
    meta = dict(metas[0]) if metas else {}
    for name in ("seconds", "seconds_pre", "seconds_setup"):
        shares = [m.get(name) for m in metas]
        if metas and None not in shares:
            meta[name] = sum(shares)
    if metas:
        meta["n"] = sum(m.get("n", 0) for m in metas)
    meta["when"] = list(dict.fromkeys(whens))
    meta["failed"] = [failed[n] for n in sorted(failed)]
    meta["checkpoints"] = [step.checkpoint for step in in_order if step.checkpoint is not None]
    return EvaluationReport.of(results, meta)


def _read_run(folder: Path) -> dict[str, Any]:
    """What the folder says about its run."""
    try:
        run = read_json(folder / RUN_FILE, "a run", _FORMAT_VERSION)
    except DataError as error:
        raise DataError(f"there is no readable run in {str(folder)!r}: {error}") from error
    of_type(_RunFile, run, repr(str(folder / RUN_FILE)), DataError)
    for entry in run["plan"]:
        of_type(PlanEntry, tuple(entry), f"{str(folder / RUN_FILE)!r}, plan", DataError)
    return run


def _read_meta(file: Path) -> dict[str, Any]:
    """What a shard noted about itself."""
    meta = read_json(file, "the description of a run", _FORMAT_VERSION)
    return of_type(MetaLayout, meta, repr(str(file)), DataError)


def _write_atomically(file: Path, text: str) -> None:
    """Write a file so that it is never seen half written, also by other processes."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(temporary, file)
    except OSError as error:
        raise EvaluationError(f"cannot write {str(file)!r}: {error}") from error

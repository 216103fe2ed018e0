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

from ...errors import DataError, EvaluationError
from ..report.case_result import CaseResult
from ..report.report import EvaluationReport
from .plan import Step, StepResult

RUN_FILE = "run.json"
_FORMAT_VERSION = 1


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
        self.path = Path(path)
        self.file = self.path / (
            "results.jsonl" if shard[1] == 1 else f"results-{shard[0]:04d}-of-{shard[1]:04d}.jsonl"
        )
        self.done: dict[int, StepResult] = {}
        if self.path.exists() and not self.path.is_dir():
            raise EvaluationError(f"output_dir {str(self.path)!r} is a file; name a folder")
        self.path.mkdir(parents=True, exist_ok=True)
        content = {
            "format_version": _FORMAT_VERSION,
            "shards": shard[1],
            "settings": json.loads(json.dumps(settings)),
            "plan": [[s.when, list(s.cases), s.unit, s.n_edits] for s in plan],
        }
        existing = self.path / RUN_FILE
        if existing.exists():
            self._check(_read_json(existing), content)
        else:
            _write_atomically(existing, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
        if self.file.exists():
            self.done = read_steps(self.file)
            # Lines of an unfinished step, and a line cut off in the middle, go: the step is measured again.
            _write_atomically(self.file, "".join(line for step in self.done.items() for line in _lines(*step)))

    def _check(self, existing: dict[str, Any], wanted: dict[str, Any]) -> None:
        if existing == wanted:
            return
        old, new = existing.get("settings", {}), wanted["settings"]
        names = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
        names += [k for k in ("format_version", "shards", "plan") if existing.get(k) != wanted[k]]
        raise EvaluationError(
            f"{str(self.path)!r} holds another run (it differs in {', '.join(names)}); choose another output_dir,"
            " or repeat the same call to continue that run"
        )

    def write(self, step: int, result: StepResult) -> None:
        """Add the results of a complete step."""
        with self.file.open("a", encoding="utf-8") as file:
            file.write("".join(_lines(step, result)))
            file.flush()
            os.fsync(file.fileno())

    def finish(self, meta: dict[str, Any]) -> None:
        """Note what the shard as a whole was like; the last run counts."""
        _write_atomically(self._meta_file, json.dumps(meta, ensure_ascii=False, indent=1) + "\n")

    def read_meta(self) -> dict[str, Any]:
        """What `finish` noted; empty if the run never came to its end."""
        return _read_json(self._meta_file) if self._meta_file.exists() else {}

    @property
    def _meta_file(self) -> Path:
        return self.path / self.file.name.replace("results", "meta", 1).replace(".jsonl", ".json")


def _lines(step: int, result: StepResult) -> Iterator[str]:
    """The lines of a complete step."""
    entries: list[dict[str, Any]] = [{"failed": failed} for failed in result.failed]
    entries += [{"record": r.to_dict()} for r in result.results]
    if result.checkpoint is not None:
        entries.append({"checkpoint": result.checkpoint})
    for entry in (*entries, {"done": True}):
        yield json.dumps({"step": step, **entry}, ensure_ascii=False, allow_nan=False) + "\n"


def read_steps(file: Path) -> dict[int, StepResult]:
    """Step → its results, of the steps that are complete.

    Raises:
        DataError: if a complete line is not what `RunFolder.write` writes.
    """
    begun: dict[int, StepResult] = {}
    complete: dict[int, StepResult] = {}
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue  # the end of a killed process
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            continue
        step = entry["step"]
        result = begun.setdefault(step, StepResult())
        if "record" in entry:
            result.results.append(CaseResult.from_dict(entry["record"]))
        elif "failed" in entry:
            result.failed.append(entry["failed"])
        elif "checkpoint" in entry:
            result.checkpoint = entry["checkpoint"]
        elif entry.get("done"):
            complete[step] = result
    return complete


def collect_report(path: str | Path) -> EvaluationReport:
    """Put the report of a run together from its folder, whatever the number of shards.

    Raises:
        DataError: if there is no run in the folder.
        EvaluationError: if parts of the run are missing or were measured twice.
    """
    folder = Path(path)
    run = _read_json(folder / RUN_FILE)
    if run.get("format_version", 0) > _FORMAT_VERSION:
        raise DataError(f"{str(folder)!r} was written by a newer version of the library; upgrade to read it")
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
    metas = [_read_json(file) for file in sorted(folder.glob("meta*.json"))]
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
        if all(name in m for m in metas) and metas:
            meta[name] = sum(m[name] for m in metas)
    if metas:
        meta["n"] = sum(m.get("n", 0) for m in metas)
    meta["when"] = list(dict.fromkeys(whens))
    meta["failed"] = [failed[n] for n in sorted(failed)]
    meta["checkpoints"] = [step.checkpoint for step in in_order if step.checkpoint is not None]
    return EvaluationReport.of(results, meta)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"there is no readable run in {str(file.parent)!r}: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{str(file)!r} does not hold a run")
    return content


def _write_atomically(file: Path, text: str) -> None:
    """Write a file so that it is never seen half written, also by other processes."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)

"""The folder of a run: what was run (``run.json``) and its results, step by step, so that a killed run can go on.

Each measurement ends with a line that says it is complete. What stands before such a line is never lost, what has
none is measured again. Several processes may write shards of one run into one folder, each into its own file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ...errors import DataError, EvaluationError
from ..report.report import EvaluationReport
from .plan import Step

RUN_FILE = "run.json"
FORMAT_VERSION = 1


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
        self.done: dict[int, list[dict[str, Any]]] = {}
        if self.path.exists() and not self.path.is_dir():
            raise EvaluationError(f"output_dir {str(self.path)!r} is a file; name a folder")
        self.path.mkdir(parents=True, exist_ok=True)
        content = {
            "format_version": FORMAT_VERSION,
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
            lines = [json.dumps(entry, ensure_ascii=False) for entries in self.done.values() for entry in entries]
            _write_atomically(self.file, "".join(line + "\n" for line in lines))

    def _check(self, found: dict[str, Any], wanted: dict[str, Any]) -> None:
        if found == wanted:
            return
        old, new = found.get("settings", {}), wanted["settings"]
        names = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
        names += [k for k in ("format_version", "shards", "plan") if found.get(k) != wanted[k]]
        raise EvaluationError(
            f"{str(self.path)!r} holds another run (it differs in {', '.join(names)}); choose another output_dir,"
            " or repeat the same call to continue that run"
        )

    def write(self, step: Step, entries: Iterable[dict[str, Any]]) -> None:
        """Add the results of a complete step."""
        lines = [{"step": step.number, **entry} for entry in entries]
        lines.append({"step": step.number, "done": True})
        self.done[step.number] = lines
        with self.file.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines))
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


def read_steps(file: Path) -> dict[int, list[dict[str, Any]]]:
    """Step → its lines, of the steps that are complete."""
    steps: dict[int, list[dict[str, Any]]] = {}
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue  # the end of a killed process
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            steps.setdefault(entry["step"], []).append(entry)
    return {number: lines for number, lines in steps.items() if lines[-1].get("done")}


def collect_report(path: str | Path) -> EvaluationReport:
    """Put the report of a run together from its folder, whatever the number of shards.

    Raises:
        DataError: if there is no run in the folder.
        EvaluationError: if parts of the run are missing or were measured twice.
    """
    folder = Path(path)
    run = _read_json(folder / RUN_FILE)
    if run.get("format_version", 0) > FORMAT_VERSION:
        raise DataError(f"{str(folder)!r} was written by a newer version of the library; upgrade to read it")
    steps: dict[int, list[dict[str, Any]]] = {}
    for file in sorted(folder.glob("results*.jsonl")):
        for number, lines in read_steps(file).items():
            if number in steps:
                raise EvaluationError(f"{str(folder)!r}: step {number} was measured by two shards; run it again")
            steps[number] = lines
    missing = [n for n in range(len(run["plan"])) if n not in steps]
    if missing:
        raise EvaluationError(
            f"{str(folder)!r}: the run is not complete, {len(missing)} of {len(run['plan'])} measurements are missing;"
            f" repeat the call that began it{' (all its shards)' if run['shards'] > 1 else ''}"
        )
    metas = [_read_json(file) for file in sorted(folder.glob("meta*.json"))]
    return assemble(steps, metas, [entry[0] for entry in run["plan"]])


def assemble(
    steps: dict[int, list[dict[str, Any]]], metas: Sequence[dict[str, Any]], moments: Sequence[str]
) -> EvaluationReport:
    """A report from the lines of all steps."""
    records: list[dict[str, Any]] = []
    failed: dict[int, dict[str, Any]] = {}
    checkpoints = []
    for number in sorted(steps):
        for entry in steps[number]:
            if "record" in entry:
                records.append(entry["record"])
            elif "failed" in entry:
                failed[entry["failed"]["case_id"]] = entry["failed"]
            elif "checkpoint" in entry:
                checkpoints.append(entry["checkpoint"])
    records.sort(key=lambda r: r["case_id"])
    meta = dict(metas[0]) if metas else {}
    for name in ("seconds", "seconds_pre", "seconds_setup"):
        if all(name in m for m in metas) and metas:
            meta[name] = sum(m[name] for m in metas)
    if metas:
        meta["n"] = sum(m.get("n", 0) for m in metas)
    meta["when"] = list(dict.fromkeys(moments))
    meta["failed"] = [failed[n] for n in sorted(failed)]
    meta["checkpoints"] = checkpoints
    return EvaluationReport(records, meta)


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

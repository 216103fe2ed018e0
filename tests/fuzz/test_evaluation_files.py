"""Damaged sweeps, reports and run folders: whatever stands in them, an error of ours or none at all.

A short run with fixed seeds always; a long one with ``-m slow`` (``KEDIT_FUZZ`` says how long).
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_kedit.errors import KeditError
from hf_kedit.evaluation import BenchPlan, Comparison, EvaluationReport, collect_report

from .mutations import FIRST, LONG, Tally, attempt, damage_bytes, damage_folder, damage_json, mutate

FILES = Path(__file__).parents[1] / "evaluation" / "runs" / "data_0_1_0"
PLAN: dict[str, Any] = {
    "models": [{"name": "kedit/world-gpt2", "label": "world", "dtype": "float32", "device": "cpu"}],
    "methods": ["rome", {"name": "ft-m", "label": "slow", "lr": 1e-4}],
    "datasets": [{"name": "world", "split": "test", "limit": 2}],
    "settings": ["single", {"setting": "sequential", "when": ["final"], "at": [1], "batch_size": 2, "limit": 2}],
    "protocols": [
        "teacher_forced",
        {"name": "generation", "max_new_tokens": 4, "stop_strings": ["."], "prompt_format": "raw", "scorer": "f1"},
        {"name": "judge", "judge": {"base_url": "http://h/v1", "model": "m", "api_key_env": None, "timeout": 1}},
        {"name": "fluency", "tokenizer": "words", "top_k": 2, "seed": 1},
    ],
    "output_dir": "results",
    "on_error": "skip",
    "collapse_text": ["some text"],
    "abilities": ["nli", {"task": "ner", "source": "f.jsonl", "limit": 3, "name": "n"}, {"harness": "boolq"}],
}
numbers = pytest.mark.parametrize("number", [60, pytest.param(LONG, marks=pytest.mark.slow)])


def use(report: EvaluationReport, folder: Path) -> None:
    """Everything that is made of a report."""
    if not report.results:
        return
    str(report), repr(report), report.rows(), report.to_easyedit(), report.efficiency()
    report.to_model_index(), report.abilities, report.curve("rewrite_acc")
    comparison = Comparison({"one": report, "two": report}, {"three": "failed"})
    for made in (report, comparison):
        made.to_markdown(folder / "out.md"), made.to_html(folder / "out.html"), made.to_json(folder / "out.json")
    assert json.loads((folder / "out.json").read_text()) is not None


def damaged(number: int, case: Callable[[random.Random], None]) -> None:
    """Run a case with so many seeds: some are refused, some work, none ends in anything else."""
    tally = Tally()
    for seed in range(FIRST, FIRST + number):

        def call(seed: int = seed) -> bool:
            case(random.Random(seed))
            return True

        tally.worked += bool(attempt(tally, f"seed {seed}", call))
    tally.check(number)
    assert tally.refused and tally.worked


@numbers
def test_plans(number: int) -> None:
    damaged(number, lambda rng: BenchPlan.from_dict(mutate(PLAN, rng)[0]))


@numbers
def test_reports(number: int, tmp_path: Path) -> None:
    def case(rng: random.Random) -> None:
        file = tmp_path / "report.json"
        shutil.copy(FILES / "report.json", file)
        if rng.random() < 0.8:
            damage_json(file, rng)
        else:
            file.write_bytes(damage_bytes(file.read_bytes(), rng)[0])
        use(EvaluationReport.from_json(file), tmp_path)

    damaged(number, case)


@numbers
def test_run_folders(number: int, tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    report = json.loads((FILES / "report.json").read_text())
    whole.mkdir()
    shutil.copy(FILES / "run.json", whole)
    steps = (0, 0, 0, 0, 1, 1, 1, 1, *[2] * 8)
    lines: list[Any] = [{"step": i, "record": record} for i, record in zip(steps, report["records"], strict=False)]
    lines.append({"step": 2, "checkpoint": report["meta"]["checkpoints"][0]})
    lines += [{"step": i, "done": True} for i in range(3)]
    (whole / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    meta = {key: value for key, value in report["meta"].items() if key not in ("failed", "checkpoints")}
    (whole / "meta.json").write_text(json.dumps(meta))
    assert collect_report(whole).summary() == EvaluationReport.from_json(FILES / "report.json").summary()

    def case(rng: random.Random) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        damage_folder(folder, rng)
        use(collect_report(folder), tmp_path)

    damaged(number, case)


@pytest.mark.parametrize("text", ["", "[", "[" * 100_000, '{"a": ' + "1" * 5_000 + "}", "[1]", '"x"', "\ufeff{", "{}"])
def test_files_that_are_no_json(text: str, tmp_path: Path) -> None:
    for name in ("report.json", "run.json", "plan.json", "plan.yaml"):
        (tmp_path / name).write_text(text)
    for read in (
        lambda: EvaluationReport.from_json(tmp_path / "report.json"),
        lambda: collect_report(tmp_path),
        lambda: BenchPlan.from_file(tmp_path / "plan.json"),
        lambda: BenchPlan.from_file(tmp_path / "plan.yaml"),
    ):
        with pytest.raises(KeditError):
            read()

"""Damaged sweeps, reports and run folders: whatever stands in them, an error of ours or none at all.

A short run with fixed seeds always; a long one with ``-m slow`` (``KEDIT_FUZZ`` says how long).
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_kedit.errors import DataError, KeditError
from hf_kedit.evaluation import BenchPlan, Comparison, EvaluationReport, collect_report
from hf_kedit.evaluation.runs.folder import RunFolder
from hf_kedit.evaluation.runs.plan import Step

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
@pytest.mark.parametrize("kind", ["0.1.0", "with everything"])
def test_reports(number: int, kind: str, tmp_path: Path) -> None:
    content = json.loads((FILES / "report.json").read_text())
    if kind == "with everything":
        scores = {"nli": {"score": 0.5}, "ner": {"score": None}}
        content["meta"]["checkpoints"][0] |= {"abilities": scores, "abilities_before": scores}
        content["meta"]["label"] = {"model": "m", "method": "x", "dataset": "d", "setting": "s"}
        content["meta"]["failed"] = [{"case_id": 1, "id": None, "reason": "EditFailedError: no"}]
        for half in ("pre", "post"):
            content["records"][0][half]["fluency"] = {"ngram_entropy": [6.5]}
        content["records"][0]["edit"] = {"edit_id": "e", "method": "rome", "diagnostics": {"a": 1.0}, "changed": 3}

    def case(rng: random.Random) -> None:
        file = tmp_path / "report.json"
        file.write_text(json.dumps(content))
        if rng.random() < 0.8:
            damage_json(file, rng)
        else:
            file.write_bytes(damage_bytes(file.read_bytes(), rng)[0])
        use(EvaluationReport.from_json(file), tmp_path)

    damaged(number, case)


def finished_run(folder: Path) -> None:
    """Write the folder of a run that came to its end."""
    report = json.loads((FILES / "report.json").read_text())
    folder.mkdir()
    shutil.copy(FILES / "run.json", folder)
    steps = (0, 0, 0, 0, 1, 1, 1, 1, *[2] * 8)
    lines: list[Any] = [{"step": i, "record": record} for i, record in zip(steps, report["records"], strict=False)]
    lines.append({"step": 2, "checkpoint": report["meta"]["checkpoints"][0]})
    lines += [{"step": i, "done": True} for i in range(3)]
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    meta = {key: value for key, value in report["meta"].items() if key not in ("failed", "checkpoints")}
    (folder / "meta.json").write_text(json.dumps(meta))


@numbers
def test_run_folders(number: int, tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    finished_run(whole)
    assert collect_report(whole).summary() == EvaluationReport.from_json(FILES / "report.json").summary()

    def case(rng: random.Random) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        damage_folder(folder, rng)
        use(collect_report(folder), tmp_path)

    damaged(number, case)


@pytest.mark.parametrize("key", ["perplexity_before", "abilities_before"])
def test_reports_that_do_not_know_the_unedited_model(key: str, tmp_path: Path) -> None:
    content = json.loads((FILES / "report.json").read_text())
    scores = {"nli": {"score": 0.5}}
    content["meta"]["checkpoints"][0] |= {"abilities": scores, "abilities_before": scores}
    del content["meta"]["checkpoints"][0][key]
    (tmp_path / "report.json").write_text(json.dumps(content))
    report = EvaluationReport.from_json(tmp_path / "report.json")
    use(report, tmp_path)
    assert report.curve("abilities/nli")[-1] == (2, 0.5)


def test_plans_with_deep_values_are_refused() -> None:
    deep: Any = 0
    for _ in range(3000):
        deep = [deep]
    for name in ("name", "setting", "label", "when", "at", "batch_size", "limit"):
        with pytest.raises(KeditError):
            BenchPlan.from_dict({**PLAN, "settings": [{"name": "single", name: deep}]})
    names = ("scorer", "aliases", "prompt_format", "stop_strings", "max_new_tokens", "cut_at_newline", "tokenizer")
    for name in names:
        for protocol in ("teacher_forced", "generation", "likelihood", "fluency", "judge"):
            with pytest.raises(KeditError):
                BenchPlan.from_dict({**PLAN, "protocols": [{"name": protocol, name: deep}]})


@pytest.mark.parametrize("half", ["pre", "post"])
@pytest.mark.parametrize(
    "sections",
    [
        {"rewrite_acc": {"value": [1.0]}},
        {"portability_acc": {"value": [1.0]}},
        {"per_axis": {"locality": [1.0]}},
        {"locality": [1.0]},
        {"locality": {"value": [1.0]}},
        {"locality": {"near_acc": {"value": [1.0]}}},
        {"rewrite_acc": [True, "1"]},
    ],
)
def test_what_stands_in_the_place_of_a_mean(half: str, sections: dict[str, Any], tmp_path: Path) -> None:
    content = json.loads((FILES / "report.json").read_text())
    content["records"][0][half] |= sections
    (tmp_path / "report.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=next(iter(sections))):
        EvaluationReport.from_json(tmp_path / "report.json")


@pytest.mark.parametrize("name", ["run.json", "meta.json", "results.jsonl"])
def test_run_folders_with_a_folder_in_place_of_a_file(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    finished_run(folder)
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(KeditError, match=re.escape(name)):
        collect_report(folder)
    if name != "meta.json":  # which is written last
        run = json.loads((FILES / "run.json").read_text())
        plan = [Step(i, when, tuple(cases), unit, n) for i, (when, cases, unit, n) in enumerate(run["plan"])]
        with pytest.raises(KeditError, match=re.escape(name)):
            RunFolder(folder, run["settings"], plan, (1, 1))


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

"""Damaged sweeps, reports and run folders: whatever stands in them, an error of ours or none at all.

A short run with fixed seeds always; a long one with ``-m slow``.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_kedit.errors import KeditError
from hf_kedit.evaluation import BenchPlan, Comparison, EvaluationReport, collect_report
from hf_kedit.evaluation.report.results import Results

FILES = Path(__file__).parents[1] / "evaluation" / "runs" / "data_0_1_0"
ODD: list[Any] = [
    None,
    True,
    -1,
    7,
    0.5,
    float("nan"),
    10**400,
    "",
    "x",
    "\ud83d",
    "<b>\x1b[31m",
    [],
    ["x"],
    [[1]],
    {},
    {"x": 1},
    {"name": 5},
]
PLAN: dict[str, Any] = {
    "models": [{"name": "kedit/world-gpt2", "label": "world", "dtype": "float32", "device": "cpu"}],
    "methods": ["rome", {"name": "ft-m", "label": "slow", "lr": 1e-4}],
    "datasets": [{"name": "world", "split": "test", "limit": 2}],
    "settings": ["single", {"setting": "sequential", "when": ["final"], "at": [1], "batch_size": 2, "limit": 2}],
    "protocols": [
        "teacher_forced",
        {"name": "generation", "max_new_tokens": 4, "stop_strings": ["."], "prompt_format": "raw", "scorer": "f1"},
        {
            "name": "judge",
            "judge": {"base_url": "http://h/v1", "model": "m", "api_key_env": None, "timeout": 1},
        },
        {"name": "fluency", "tokenizer": "words", "top_k": 2, "seed": 1},
    ],
    "output_dir": "results",
    "on_error": "skip",
    "collapse_text": ["some text"],
    "abilities": ["nli", {"task": "ner", "source": "f.jsonl", "limit": 3, "name": "n"}, {"harness": "boolq"}],
}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values inside a value."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield (*path, key)
        yield from places(inner, (*path, key))


def damaged(value: Any, path: tuple[Any, ...], odd: Any) -> Any:
    """A copy with an odd value in a place; ``...`` takes the place away."""
    value = copy.deepcopy(value)
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    if odd is ...:
        del holder[path[-1]]
    else:
        holder[path[-1]] = odd
    return value


def mutations(value: Any, number: int, seed: int) -> Iterator[Any]:
    """Damaged copies: all places once, then at random."""
    rng = random.Random(seed)
    everywhere = list(places(value))
    for path in [*rng.sample(everywhere, min(number, len(everywhere))), *rng.choices(everywhere, k=number)][:number]:
        yield damaged(value, path, rng.choice([..., *ODD]))


def use(report: Results, folder: Path) -> None:
    """Everything that is made of a report."""
    assert isinstance(report, EvaluationReport)
    if not report.results:
        return
    str(report), repr(report), report.rows(), report.to_easyedit(), report.efficiency()
    report.to_model_index(), report.abilities, report.curve("rewrite_acc")
    comparison = Comparison({"one": report, "two": report}, {"three": "failed"})
    for made in (report, comparison):
        made.to_markdown(folder / "out.md"), made.to_html(folder / "out.html"), made.to_json(folder / "out.json")
    assert json.loads((folder / "out.json").read_text()) is not None


def check(value: Any, seed: int, number: int, read: Any) -> None:
    survived = 0
    for mutated in mutations(value, number, seed):
        try:
            read(mutated)
            survived += 1
        except KeditError as error:
            assert str(error)
    assert 0 < survived < number  # something was damaged in earnest, and something not


LONG = pytest.param(3000, marks=pytest.mark.slow)


@pytest.mark.parametrize("number", [150, LONG])
def test_plans(number: int) -> None:
    check(PLAN, 1, number, BenchPlan.from_dict)


@pytest.mark.parametrize("number", [60, LONG])
def test_reports(number: int, tmp_path: Path) -> None:
    def read(content: Any) -> None:
        (tmp_path / "report.json").write_text(json.dumps(content))
        use(EvaluationReport.from_json(tmp_path / "report.json"), tmp_path)

    check(json.loads((FILES / "report.json").read_text()), 2, number, read)


@pytest.mark.parametrize("number", [60, LONG])
def test_run_folders(number: int, tmp_path: Path) -> None:
    report = json.loads((FILES / "report.json").read_text())
    run = json.loads((FILES / "run.json").read_text())
    numbers = (0, 0, 0, 0, 1, 1, 1, 1, *[2] * 8)
    lines: list[Any] = [{"step": i, "record": r} for i, r in zip(numbers, report["records"], strict=False)]
    lines.append({"step": 2, "checkpoint": report["meta"]["checkpoints"][0]})
    lines += [{"step": i, "done": True} for i in range(3)]
    meta = {key: value for key, value in report["meta"].items() if key not in ("failed", "checkpoints")}

    def read(content: dict[str, Any]) -> None:
        (tmp_path / "run.json").write_text(json.dumps(content.get("run")))
        (tmp_path / "meta.json").write_text(json.dumps(content.get("meta")))
        lines = content.get("lines") if isinstance(content.get("lines"), list) else [content.get("lines")]
        (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        use(collect_report(tmp_path), tmp_path)

    whole = {"run": run, "meta": meta, "lines": lines}
    read(whole)
    check(whole, 3, number, read)


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

"""The benchmarks run, and both sides agree. How fast they are is no matter of tests."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import pytest

import benchmarks
from benchmarks import edit_speed, evaluation_speed, routing

NAMES = sorted(path.stem for path in Path(benchmarks.__file__).parent.glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_can_be_imported(name: str) -> None:
    assert importlib.import_module(f"benchmarks.{name}").__doc__


@pytest.mark.parametrize("method", [pytest.param("rome", marks=pytest.mark.slow), "memit"])
def test_edits_agree_with_the_straightforward_path(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = _row(edit_speed, tmp_path, monkeypatch, "--method", method, "--edits", "2", "--steps", "3")
    assert row["value_difference"] < 1e-4 and row["largest_difference"] < 1e-4
    assert set(row["stages"]) >= {"first pass", "steps", "writing"}


def test_evaluations_agree_with_one_prompt_per_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = _row(evaluation_speed, tmp_path, monkeypatch, "--cases", "3")
    assert row["identical"] == 1.0 and row["difference"] < 1e-4


def _row(benchmark, folder, monkeypatch, *options):  # type: ignore[no-untyped-def]
    out = folder / "rows.jsonl"
    shape = ["--shape", "gpt2-tiny", "--pairs", "1", "--device", "cpu", "--json", str(out)]
    monkeypatch.setattr("sys.argv", ["benchmark", *shape, *options])
    benchmark.main()
    (line,) = out.read_text().splitlines()
    return json.loads(line)


def test_routing_finds_its_edits_and_leaves_other_lines_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The weather was fine today, and the people went out to the fields.\nToo short.\n")
    options = ["--model", "kedit/world-llama", "--encoder", "words", "--edits", "20", "--pairs", "1"]
    monkeypatch.setattr("sys.argv", ["benchmark", *options, "--text", str(text)])
    routing.main()
    found = json.loads(capsys.readouterr().out)
    assert (found["edits"], found["text"]["lines"]) == (20, 1)
    assert (found["text"]["claimed"], found["text"]["others that differ"]) == (0, 0)


SMALL = {
    "codebook_search": "--keys 100 --width 64 --queries 5 --pairs 1",
    "scale": "--edits 100 --gpus 1",
    "solves": "--width 64 --keys 1 --batches 2 --pairs 1",
    "statistics_tokens": "--multiples 1 --truth 2 --keys 1 --weight 100 --pairs 1",
}
"""What each of the others is asked for here: as little as it takes to run all of its code."""
SLOWER = {
    "attribution": "--shape gpt2-tiny --facts 1 --steps 2 --pairs 1",
    "codebook_lookup": "--entries 10 --rows 2 --added 2 --pairs 1",
    "codebook_training": "--edits 2 --steps 2 --pairs 1",
    "covariance": "--shape gpt2-tiny --layers 2 --texts 5 --length 20 --pairs 1",
    "history": "--older . --method memit --batch 2 --edits 2 --pairs 1",
    "malmen_memory": "--facts 4 --micro-batch 2",
    "resolve_all": "--shape llama-tiny --edits 20 --real 2 --steps 2 --pairs 1",
}
ELSEWHERE = {"device_memory", "long_text"}  # need an accelerator, and a model that reads pages
PRINTING = {"malmen_memory", "scale"}  # a table, and no file
TESTED_ABOVE = {"edit_speed", "evaluation_speed", "routing"}
PARTS = {"quality", "reference", "shapes", "timing"}  # of the others


def test_no_benchmark_is_forgotten() -> None:
    assert set(NAMES) == set(SMALL) | set(SLOWER) | ELSEWHERE | TESTED_ABOVE | PARTS


@pytest.mark.parametrize(
    ("name", "options"),
    [*SMALL.items(), *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOWER.items())],
)
def test_every_benchmark_runs_and_prints_numbers(
    name: str, options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    kept = [] if name in PRINTING else ["--json", str(out)]
    monkeypatch.setattr("sys.argv", [name, *options.split(), *kept])
    importlib.import_module(f"benchmarks.{name}").main()
    printed = capsys.readouterr().out.split()
    assert any(word.replace(".", "", 1).isdigit() for word in printed)
    if kept:
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        numbers = [value for row in rows for value in row.values() if isinstance(value, float)]
        assert numbers and all(math.isfinite(number) for number in numbers)

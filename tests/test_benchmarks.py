"""The benchmarks run, and both sides agree. How fast they are is no matter of tests."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

import benchmarks
from benchmarks import edit_speed, evaluation_speed, routing

NAMES = sorted(path.stem for path in Path(benchmarks.__file__).parent.glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_can_be_imported(name: str) -> None:
    assert importlib.import_module(f"benchmarks.{name}").__doc__


@pytest.mark.parametrize("method", ["rome", "memit"])
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

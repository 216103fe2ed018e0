"""Scenarios on the command line: listed, run from a file to a report, and erasing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_kedit import EditableModel
from hf_kedit.evaluation import SCENARIOS, EvaluationReport
from hf_kedit.requests import ERASED

from .conftest import FACT, Run, data

MODEL = ("--model", "kedit/world-gpt2", "--method", "ft-m")
PROMPT = "By profession Tarosk Boayond is a"


def test_scenarios_are_listed(kedit: Run) -> None:
    rows = data(kedit("eval", "--list-scenarios", "-f", "json"))["scenarios"]
    assert (
        set(rows)
        == set(SCENARIOS)
        >= {"safety", "erasure", "sentiment", "hallucination", "chinese", "concept", "personality"}
    )
    assert "judge" in rows["safety"]["options"] and rows["safety"]["standin"]
    shown = kedit("eval", "--list-scenarios").stdout
    assert all(name in shown and about["question"] in " ".join(shown.split()) for name, about in rows.items())
    assert kedit("eval", "--list-scenarios", "-f", "quiet").stdout.split() == sorted(SCENARIOS)


def test_a_scenario_from_a_file_to_a_report(kedit: Run, tmp_path: Path) -> None:
    file, report = tmp_path / "erase.json", tmp_path / "report.json"
    row = {k: v for k, v in FACT.items() if k not in ("target_new", "id")} | {"erase": True}
    file.write_text(json.dumps([row]), encoding="utf-8")
    words = ["--scenario", "erasure", "--scenario-option", "samples=2", "-d", file]
    result = data(kedit("eval", *MODEL, *words, "-o", report, "-f", "json"))
    assert result["scenario"] == {**result["scenario"], "name": "erasure", "samples": 2}
    assert result["pre"]["erasure"]["leakage"] == 1.0 > result["post"]["erasure"]["leakage"]
    assert result["results"][0]["metrics"]["erasure/leakage"]["better"] == "lower"
    assert EvaluationReport.from_json(report).scenario == "erasure"
    quiet = kedit("eval", *MODEL, *words, "-f", "quiet").stdout.split()
    assert f"erasure/leakage={result['post']['erasure']['leakage']}" in quiet
    assert "erasure leakage ↓" in kedit("eval", *MODEL, *words).stdout


@pytest.mark.parametrize(
    ("name", "sample", "number"),
    [("concept", "concepts_inter", "concept/consistency"), ("personality", "personality", "personality/ES")],
)
def test_a_sample_gives_a_report(name: str, sample: str, number: str, kedit: Run) -> None:
    file = Path(__file__).parents[2] / "docs" / "scenarios" / "data" / f"{sample}.json"
    words = ["--scenario", name, "-d", file, "--limit", "2"]
    result = data(kedit("eval", *MODEL, *words, "--set", "num_steps=2", "-f", "json"))
    assert result["scenario"]["name"] == name and result["n"] == 2
    assert number in result["results"][0]["metrics"]


def test_what_does_not_go_together(kedit: Run, tmp_path: Path) -> None:
    unknown = kedit("eval", *MODEL, "--scenario", "erasur", "-d", "world")
    assert unknown.exit_code == 1 and "Did you mean 'erasure'" in unknown.stderr
    option = kedit("eval", *MODEL, "--scenario", "erasure", "--scenario-option", "sample=2", "-d", "world")
    assert option.exit_code == 1 and "samples" in option.stderr
    alone = kedit("eval", *MODEL, "--judge", "x", "-d", "world")
    assert alone.exit_code == 2 and "--scenario" in alone.stderr
    missing = kedit("eval", *MODEL, "--scenario", "erasure")
    assert missing.exit_code == 2 and "--dataset" in missing.stderr
    both = kedit("edit", *MODEL, "--erase", "--requests", tmp_path / "x.json")
    assert both.exit_code == 2 and "--erase" in both.stderr


def test_an_answer_is_erased(kedit: Run, tmp_path: Path) -> None:
    folder = tmp_path / "edits"
    words = ["--erase", "-p", PROMPT, "--no-eval", "--no-side-effects", "-o", folder]
    data(kedit("edit", *MODEL, *words, "-f", "json"))
    (edit,) = EditableModel.from_pretrained(folder).edits
    assert edit.request.target_new == ERASED and edit.request.unlearns
    assert edit.request.unwanted[0].startswith("sculptor")  # what it said

"""``kedit trace`` on an embedded model: files, formats, and wrong usage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from hf_kedit.cli.trace import trace

MODEL = ("--model", "kedit/world-gpt2", "--samples", "2")
FACT = ("--prompt", "By profession {} is a", "--subject", "Tarosk Boayond")


def run(*words: Any) -> Result:
    app = typer.Typer()
    app.command()(trace)
    return CliRunner().invoke(app, [str(w) for w in words])


def test_one_fact_with_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = run(*MODEL, *FACT, "--output", tmp_path / "out", "--plot", tmp_path / "one.png", "--format", "json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["kinds"] == ["hidden", "mlp", "attn"] and data["facts"] == 1
    assert data["traces"][0]["answer"].strip() and data["suggestion"] is None
    assert [Path(f).name for f in data["files"]] == ["trace.json", "fact-1.png", "one.png"]
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "out" / "fact-1.png").read_bytes()
    saved = json.loads((tmp_path / "out" / "trace.json").read_text())
    assert saved["traces"] == data["traces"]


def test_requests_kinds_and_a_suggestion(tmp_path: Path) -> None:
    facts = [
        {"prompt": FACT[1], "subject": FACT[3], "target_new": "plumber", "ground_truth": "sculptor"},
        {"prompt": FACT[1], "subject": FACT[3], "target_new": "plumber", "ground_truth": "nonsense"},
        {"prompt": FACT[1], "subject": FACT[3], "target_new": "plumber", "ground_truth": "sculptor"},
    ]
    file = tmp_path / "facts.json"
    file.write_text(json.dumps(facts))
    words = (*MODEL, "--requests", file, "--limit", 2, "--kind", "hidden", "--suggest", "rome")
    result = run(*words, "--output", tmp_path / "o", "--no-plots", "--format", "json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["facts"] == 1 and len(data["skipped"]) == 1
    assert data["suggestion"]["method"] == "rome" and data["suggestion"]["layers"][0] in range(4)
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["layers.json", "trace.json"]
    quiet = run(*words, "--format", "quiet")
    assert quiet.stdout == ",".join(map(str, data["suggestion"]["layers"])) + "\n"


def test_for_people() -> None:
    result = run(*MODEL, *FACT, "--kind", "hidden", "--ground-truth", "plumber", "--all")
    assert result.exit_code == 0, result.output
    assert "average indirect effect" in result.stdout and "last subject" in result.stdout
    skipped = run(*MODEL, *FACT, "--kind", "hidden", "--ground-truth", "plumber")
    assert "no fact was traced" in skipped.stdout and "skipped" in skipped.stdout


@pytest.mark.parametrize(
    "words",
    [
        FACT[:2],
        ("--prompt", FACT[1], "--requests", "x.json"),
        ("--requests", "x.json", "--subject", "x"),
        (*FACT, "--kind", "residual"),
        (*FACT, "--samples", "0"),
        (*FACT, "--plot", "trace.json"),
    ],
)
def test_wrong_usage(words: tuple[str, ...]) -> None:
    assert run(*MODEL, *words).exit_code == 2


def test_failures_are_one_line() -> None:
    result = run(*MODEL, "--prompt", "By profession he is a", "--subject", "Nobody")
    assert result.exit_code == 1 and "neither a slot" in result.stderr and "Traceback" not in result.stderr

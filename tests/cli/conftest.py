"""What the tests of the command line share: a runner, a file of requests, and saved edits to work on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from hf_kedit import EditableModel
from hf_kedit.cli import app

FACT = {
    "id": "first",
    "prompt": "By profession {} is a",
    "subject": "Tarosk Boayond",
    "target_new": "plumber",
    "ground_truth": ["sculptor"],
    "rephrase_prompts": ["For many years Tarosk Boayond has been a"],
    "locality": {"Neighborhood": [{"prompt": "By profession Fulex Tudias is a", "ground_truth": "sculptor"}]},
}
SECOND = {"id": "second", "prompt": "{} is employed by", "subject": "Gukir Tudias", "target_new": "Heidork"}

Run = Callable[..., Result]


@pytest.fixture
def kedit() -> Run:
    """Run a command line in this process: ``kedit("edit", "--model", …)``."""
    runner = CliRunner()

    def run(*words: Any) -> Result:
        return runner.invoke(app, [str(word) for word in words])

    return run


@pytest.fixture(scope="session")
def requests_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two requests about different people of the embedded world."""
    path = tmp_path_factory.mktemp("requests") / "facts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (FACT, SECOND)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def _saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "edits"
    model = EditableModel.from_pretrained("kedit/world-gpt2", "rome")
    model.edit([FACT, SECOND], show_progress=False)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def saved(_saved: Path, tmp_path: Path) -> Path:
    """A folder of one's own with two saved ROME edits, ``first`` and ``second``."""
    folder = tmp_path / "edits"
    folder.mkdir()
    for file in _saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def data(result: Result) -> Any:
    """The JSON value on standard output; fails if anything else stands there."""
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)

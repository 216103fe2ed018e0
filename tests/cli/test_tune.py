"""``kedit tune`` from end to end on an embedded model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from hf_kedit import EditableModel
from hf_kedit.config.hparams import user_hparams

from .conftest import Run

SMALL = "--candidates 2 --first-facts 1 --search-facts 2 --held-out 2 --facts world --no-packaged".split()


def test_tune_writes_what_is_found_by_name(kedit: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KEDIT_HOME", str(tmp_path))
    done = kedit("tune", "kedit/world-gpt2", "--method", "grace", *SMALL, "--format", "json")
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    file = user_hparams() / "GRACE" / "world-gpt2.yaml"
    assert data["file"] == str(file) and data["method"] == "GRACE" and len(data["tried"]) == 2
    assert data["facts"]["search"] == data["facts"]["held_out"] == 2
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert values.pop("match") == ["world-gpt2"]
    shown = json.loads(kedit("inspect", "kedit/world-gpt2", "--method", "grace", "--format", "json").stdout)
    assert shown["hparams_file"] == str(file)
    assert {name: shown["config"][name] for name in values} == values
    assert EditableModel.from_pretrained("kedit/world-gpt2", "grace").edit_config.to_dict() == data["config"]
    other = tmp_path / "mine.yaml"
    again = kedit("tune", "kedit/world-gpt2", "-M", "grace", *SMALL, "-o", other)
    assert (
        again.exit_code == 0 and "harmonic mean" in again.stdout and data["verdict"] in " ".join(again.stdout.split())
    )
    assert yaml.safe_load(other.read_text(encoding="utf-8")) == {"match": ["world-gpt2"], **values}


def test_what_cannot_be_tuned_is_one_line(kedit: Run) -> None:
    refused = kedit("tune", "kedit/world-gpt2", "--method", "mend", *SMALL)
    assert refused.exit_code == 1 and "kedit train" in refused.stderr and "Traceback" not in refused.output

"""``kedit train``: a plan becomes an editor that edits; a plan with a mistake is told which."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_kedit import EditableModel, Editor
from hf_kedit.methods.mend import MENDConfig

PLAN: dict[str, Any] = {
    "model": "kedit/world-gpt2",
    "method": "mend",
    "data": {"dataset": "world", "train": "train", "eval": "validation", "eval_size": 2},
    "editor": {"rank": 4, "layers": [5]},
    "training": {"output_dir": "unused", "max_steps": 1, "report_to": [], "save_strategy": "no", "use_cpu": True},
}


def write(folder: Path, **changes: Any) -> str:
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump({**PLAN, **changes}), encoding="utf-8")
    return str(path)


def test_trains_and_saves(kedit: Any, tmp_path: Path) -> None:
    done = kedit("train", write(tmp_path), "-s", "max_steps=2", "-o", str(tmp_path / "editor"), "--format", "json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["steps"] == 2 and {"edit_success", "locality"} <= told["scores"].keys()
    assert Editor.from_pretrained(tmp_path / "editor").origin["base_model_name_or_path"] == "kedit/world-gpt2"
    model = EditableModel.from_pretrained("kedit/world-gpt2", MENDConfig(editor=str(tmp_path / "editor")))
    model.edit(prompt="The sky is", target_new="green")
    assert list(model.ledger.accounts) == ["transformer.h.5.mlp.c_fc.weight", "transformer.h.5.mlp.c_proj.weight"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"methodd": "mend"}, "methodd"),
        ({"training": {"output_dir": "x", "learning_rat": 1}}, "learning_rate"),
        ({"editor": {"rnak": 4}}, "rank"),
        ({"method": "rome", "editor": {}}, "no trained editor"),
    ],
)
def test_a_mistake_is_named(kedit: Any, tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    done = kedit("train", write(tmp_path, **changes))
    assert done.exit_code == 1
    assert named in done.stderr

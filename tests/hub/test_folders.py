"""Folders through the Hub: ``kedit push``, merged models, going back to an earlier version."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from typer.testing import CliRunner, Result

from hf_kedit import EditableModel
from hf_kedit.cli import app
from hf_kedit.errors import ArtifactError, HubError
from hf_kedit.hub import push_folder, restore_version
from hf_kedit.testing.hub import LoopbackHub

from .test_push import REPO, commits, facts, logits

pytestmark = pytest.mark.hub


def kedit(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def edited(hub: LoopbackHub) -> EditableModel:
    model = EditableModel.from_pretrained("kedit/world-gpt2", "rome")
    model.edit(facts(1))
    return model


@pytest.fixture
def folder(edited: EditableModel, tmp_path: Path) -> Path:
    edited.save_pretrained(tmp_path / "edits")
    return tmp_path / "edits"


def test_push_a_folder(folder: Path, edited: EditableModel) -> None:
    (folder / "notes.txt").write_text("mine")
    result = json.loads(kedit("push", folder, REPO, "--private", "--tag", "v1", "-f", "json").stdout)
    assert result["repository"] == REPO and result["commit"] == HfApi().model_info(REPO).sha
    assert "notes.txt" not in HfApi().list_repo_files(REPO)
    assert f'from_pretrained("{REPO}")' in ModelCard.load(REPO).text
    assert torch.equal(logits(EditableModel.from_pretrained(REPO, revision="v1")), logits(edited))
    assert kedit("push", folder, REPO, "-f", "quiet").stdout.strip() == result["commit"]
    edited.edit(facts(1, start=1))
    edited.save_pretrained(folder)
    pulled = json.loads(kedit("push", folder, REPO, "--create-pr", "--message", "again", "-f", "json").stdout)
    assert pulled["pull_request"].endswith("/discussions/1") and commits()[0] == "edits from edits"


def test_what_is_not_pushed(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nothing to push"):
        push_folder(tmp_path, REPO)
    (folder / "edits.jsonl").write_text("")
    with pytest.raises(ArtifactError, match="interrupted save"):
        push_folder(folder, REPO)
    assert not HfApi().repo_exists(REPO)
    assert kedit("push", folder, REPO, "--create-pr", "--tag", "v1").exit_code == 2
    assert kedit("push", folder, REPO).exit_code == 1


def test_back_to_a_version(edited: EditableModel, tmp_path: Path) -> None:
    one = logits(edited)
    edited.push_to_hub(REPO, tag="edits-0001")
    edited.edit(facts(1, start=1))
    edited.push_to_hub(REPO, tag="edits-0002")
    assert kedit("rollback", REPO, "--to", "edits-0001", "--output", tmp_path / "old").exit_code == 0
    assert torch.equal(logits(EditableModel.from_pretrained(tmp_path / "old")), one)
    result = json.loads(kedit("rollback", REPO, "--to", "edits-0001", "-f", "json").stdout)
    assert result["commit"] == HfApi().model_info(REPO).sha
    assert commits() == ["Back to edits-0001", "2 edits with rome", "1 edit with rome", "initial commit"]
    assert torch.equal(logits(EditableModel.from_pretrained(REPO)), one)
    assert torch.equal(logits(EditableModel.from_pretrained(REPO, revision="edits-0002")), logits(edited))
    with pytest.raises(HubError, match="edits-0009"):
        restore_version(REPO, "edits-0009")
    for words, code in (
        ((REPO, "--to", "edits-0009"), 1),
        ((tmp_path / "old", "--to", "edits-0001"), 1),
        ((REPO, "--to", "edits-0001", "--all"), 2),
        ((REPO, "--all"), 2),
    ):
        assert kedit("rollback", *words).exit_code == code
    assert len(commits()) == 4


def test_a_merged_model(folder: Path, edited: EditableModel, tmp_path: Path, hub: LoopbackHub) -> None:
    merged = tmp_path / "merged"
    assert kedit("merge", folder, "--output", merged).exit_code == 0
    assert kedit("merge", folder, "--output", merged).exit_code == 0  # over itself
    config = json.loads((merged / "edit_config.json").read_text())
    assert config["artifact"] == "merged" and config["base_model_name_or_path"] == "kedit/world-gpt2"
    assert edited.edits[0].request.target_new in (merged / "README.md").read_text()
    assert kedit("push", merged, "org/merged").exit_code == 0
    ModelCard.load("org/merged").validate()
    again = EditableModel.from_pretrained("org/merged", "rome")  # a model like any other, whose edits are its own
    assert torch.equal(logits(again), logits(edited)) and not again.edits
    plain = "import sys; sys.modules['hf_kedit'] = None\nfrom transformers import AutoModelForCausalLM as A\n"
    run = "import torch\nprint(float(A.from_pretrained('org/merged')(torch.tensor([[5, 6]])).logits.sum()))"
    done = subprocess.run(
        [sys.executable, "-c", plain + run], capture_output=True, text=True, timeout=300, check=False
    )
    with torch.no_grad():
        expected: Any = edited(input_ids=torch.tensor([[5, 6]])).logits.sum()
    assert float(done.stdout) == float(expected), done.stderr
    edited.push_to_hub(REPO)
    (merged / "old.bin").write_bytes(b"")
    with pytest.raises(ArtifactError, match="unpickled"):
        push_folder(merged, "org/merged")
    with pytest.raises(HubError, match="applied twice"):
        edited.push_to_hub("org/merged")

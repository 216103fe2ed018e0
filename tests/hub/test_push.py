"""Edits through the Hub: pushed as one commit, loaded by name and version, with errors that say what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard, constants, parse_eval_result_entries
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_kedit import EditableModel, EditRequest, FTMConfig, embedded, evaluate_edits, load_edit_dataset
from hf_kedit.artifact.layout import CONFIG, JOURNAL, WEIGHTS
from hf_kedit.engine.weights import model_digest
from hf_kedit.errors import BaseModelMismatchError, ConfigError, HubError, HubUnreachableError
from hf_kedit.testing.hub import LoopbackHub

pytestmark = pytest.mark.hub
PROBE = torch.tensor([[5, 6, 7, 8, 9]])
REPO = "org/edits"


def facts(count: int, start: int = 0) -> list[EditRequest]:
    rows = load_edit_dataset("world", split="test", limit=start + count)
    return [EditRequest.from_dict(rows[i]) for i in range(start, start + count)]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=PROBE).logits


def commits(repo: str = REPO) -> list[str]:
    return [commit.title for commit in HfApi().list_repo_commits(repo)]


@pytest.fixture
def base(hub: LoopbackHub) -> str:
    """The embedded model as a repository like any other."""
    for auto in (AutoModelForCausalLM, AutoTokenizer):
        auto.from_pretrained(embedded.path("world-gpt2")).push_to_hub("org/base")
    return "org/base"


@pytest.fixture
def edited(hub: LoopbackHub) -> EditableModel:
    model = EditableModel.from_pretrained("kedit/world-gpt2", "rome")
    model.edit(facts(2))
    return model


def test_push_and_load_by_name(base: str, hub: LoopbackHub) -> None:
    model = EditableModel.from_pretrained(base, "rome")
    digest = model_digest(model.base_model)
    model.edit(facts(2))
    info = model.push_to_hub(REPO)
    assert commits() == ["2 edits with rome", "initial commit"]
    config = json.loads(Path(HfApi().hf_hub_download(REPO, CONFIG)).read_text())
    assert config["base_model_name_or_path"] == base
    assert config["base_model_revision"] == HfApi().model_info(base).sha
    hub.requests.clear()
    loaded = EditableModel.from_pretrained(REPO, cache_dir=os.environ["HF_HOME"] + "/fresh")
    asked = [path for method, path in hub.requests if method == "GET" and "/resolve/" in path]
    assert len([path for path in asked if path.endswith(CONFIG) and f"/{REPO}/" in path]) == 1
    assert {path.split("/resolve/")[1].split("/")[0] for path in asked if f"/{REPO}/" in path} <= {"main", info.oid}
    assert torch.equal(logits(loaded), logits(model)) and loaded.edits == model.edits
    loaded.rollback("all")
    assert model_digest(loaded.base_model) == digest


def test_the_same_edits_make_no_commit(edited: EditableModel) -> None:
    first = edited.push_to_hub(REPO)
    again = EditableModel.from_pretrained(REPO)
    assert edited.push_to_hub(REPO).oid == again.push_to_hub(REPO).oid == first.oid
    edited.edit(facts(1, start=2))
    assert edited.push_to_hub(REPO, commit_message="one more").oid != first.oid
    assert commits() == ["one more", "2 edits with rome", "initial commit"]


def test_a_fresh_process_pushes_the_same_bytes(edited: EditableModel, hub: LoopbackHub, tmp_path: Path) -> None:
    first = edited.push_to_hub(REPO)
    script = f"from hf_kedit import EditableModel as E; print(E.from_pretrained({REPO!r}).push_to_hub({REPO!r}).oid)"
    environment = {**os.environ, **hub.environment(str(tmp_path))}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout.strip() == first.oid, done.stderr


def test_versions(edited: EditableModel) -> None:
    two = logits(edited)
    edited.push_to_hub(REPO, tag="edits-0002")
    edited.edit(facts(1, start=2))
    with pytest.raises(HubError, match="edits-0002"):
        edited.push_to_hub(REPO, tag="edits-0002")
    assert len(commits()) == 2
    edited.push_to_hub(REPO, tag="edits-0003", revision="experiment")
    for revision, number in (("edits-0002", 2), ("edits-0003", 3), ("experiment", 3), (None, 2)):
        loaded = EditableModel.from_pretrained(REPO, revision=revision)
        assert len(loaded.edits) == number
        assert torch.equal(logits(loaded), two if number == 2 else logits(edited))


def test_a_pull_request(edited: EditableModel) -> None:
    edited.push_to_hub(REPO)
    edited.edit(facts(1, start=2))
    pull = edited.push_to_hub(REPO, create_pr=True)
    assert len(EditableModel.from_pretrained(REPO).edits) == 2
    assert len(EditableModel.from_pretrained(REPO, revision=pull.pr_revision).edits) == 3
    HfApi().merge_pull_request(REPO, pull.pr_num)
    assert len(EditableModel.from_pretrained(REPO).edits) == 3
    with pytest.raises(ConfigError, match="tag"):
        edited.push_to_hub(REPO, create_pr=True, tag="x")


def test_files_of_edits_that_are_no_more_go(edited: EditableModel) -> None:
    report = evaluate_edits(edited, facts(1, start=3), progress=False)
    edited.push_to_hub(REPO, report=report)
    HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo="notes.txt", repo_id=REPO)
    assert ".eval_results/kedit.yaml" in HfApi().list_repo_files(REPO)
    edited.push_to_hub(REPO)
    files = set(HfApi().list_repo_files(REPO))
    assert ".eval_results/kedit.yaml" not in files and {"notes.txt", CONFIG, WEIGHTS, JOURNAL, "README.md"} <= files


def test_where_edits_cannot_be_pushed(base: str, edited: EditableModel) -> None:
    with pytest.raises(HubError, match="applied twice"):
        edited.push_to_hub(base)
    with pytest.raises(HubError, match="must not change"):
        edited.push_to_hub("stranger/edits")
    with pytest.raises(HubError, match="token"):
        edited.push_to_hub(REPO, token="hf_wrong")
    with pytest.raises(HubError, match="neither"):
        edited.push_to_hub("not/an/id")
    edited.push_to_hub(REPO)
    with pytest.raises(HubError, match="public"):
        edited.push_to_hub(REPO, private=True)
    edited.push_to_hub("org/secret", private=True)
    assert HfApi().model_info("org/secret").private and len(commits(base)) == 3


def test_repositories_that_cannot_be_read(edited: EditableModel) -> None:
    edited.push_to_hub("org/secret", private=True)
    edited.push_to_hub("org/gated")
    HfApi().update_repo_settings("org/gated", gated="manual")
    for name, token, message in (
        ("org/nothing", None, "no repository"),
        ("org/secret", False, "private"),
        ("org/gated", False, "restricted"),
        ("org/secret", "hf_wrong", "does not accept your token"),
        ("a/b/c", None, "neither"),
    ):
        with pytest.raises(HubError, match=message):
            EditableModel.from_pretrained(name, token=token, cache_dir=os.environ["HF_HOME"] + "/other")
    with pytest.raises(HubError, match="revision 'v7'"):
        EditableModel.from_pretrained("org/secret", revision="v7")


def test_offline(base: str, edited: EditableModel, monkeypatch: pytest.MonkeyPatch, hub: LoopbackHub) -> None:
    edited.push_to_hub(REPO, tag="v1")
    AutoModelForCausalLM.from_pretrained(base)  # into the cache, without a question about edits
    AutoTokenizer.from_pretrained(base)
    EditableModel.from_pretrained(REPO, revision="v1")
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(logits(EditableModel.from_pretrained(REPO, revision="v1")), logits(edited))
    assert EditableModel.from_pretrained(base, "rome").base_model_id == base
    with pytest.raises(HubUnreachableError, match="cache"):
        EditableModel.from_pretrained("org/never-seen")
    with pytest.raises(HubUnreachableError, match="HF_HUB_OFFLINE"):
        edited.push_to_hub(REPO)
    assert not hub.requests


def test_another_base_is_refused(base: str) -> None:
    model = EditableModel.from_pretrained(base, "rome")
    model.edit(facts(1))
    model.push_to_hub(REPO)
    merged = model.merge_and_unload()
    merged.push_to_hub(base)  # the base has changed since, and the edits still find the one that they were made on
    assert len(EditableModel.from_pretrained(REPO).edits) == 1
    with pytest.raises(BaseModelMismatchError, match="not the one"):
        EditableModel.from_pretrained(REPO, base_model_revision="main")


def test_the_card(edited: EditableModel, base: str) -> None:
    model = EditableModel.from_pretrained(base, FTMConfig(layers=[1], lr=1e-3, num_steps=2))
    model.edit(facts(1))
    report = evaluate_edits(model, facts(2, start=3), progress=False)
    model.push_to_hub(REPO, report=report)
    card = ModelCard.load(REPO)
    card.validate()  # asks the Hub
    data = card.data
    assert data.library_name == "hf_kedit" and data.base_model == base and data.base_model_relation == "adapter"
    assert {"knowledge-editing", "ft-m"} <= set(data.tags) and data.pipeline_tag == "text-generation"
    means = report.summary()["post"]
    found = {r.metric_type: r.metric_value for r in data.eval_results}
    assert found["rewrite_acc"] == pytest.approx(means["rewrite_acc"], abs=1e-6)
    assert found["locality"] == pytest.approx(means["locality"], abs=1e-6)
    entries = parse_eval_result_entries(
        yaml.safe_load(Path(HfApi().hf_hub_download(REPO, ".eval_results/kedit.yaml")).read_text())
    )
    assert sorted(e.value for e in entries) == sorted(r.metric_value for r in data.eval_results)
    for text in (facts(1)[0].target_new, f'from_pretrained("{REPO}")', "rollback", "edits.jsonl", base):
        assert text in card.text

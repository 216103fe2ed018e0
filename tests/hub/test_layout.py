"""What lies in a repository of edits: an adapter per edit, what the configuration says, the base model's licence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_kedit import EditableModel, FTMConfig, ROMEConfig, embedded
from hf_kedit.artifact.layout import CONFIG
from hf_kedit.errors import ExportError
from hf_kedit.hub import pull_folder, push_folder
from hf_kedit.testing.hub import LoopbackHub

from .test_folders import kedit
from .test_push import PROBE, REPO, commits, facts, logits

ROME = ROMEConfig(mom2_adjustment=False, context_templates=["{}"])
FTM = FTMConfig(layers=[1], lr=1e-3, num_steps=1)
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
CARD = """---
license: other
license_name: world-licence
license_link: LICENCE.md
---
# A base
"""


@pytest.fixture
def base(hub: LoopbackHub) -> str:
    for auto in (AutoModelForCausalLM, AutoTokenizer):
        auto.from_pretrained(embedded.path("world-gpt2")).push_to_hub("org/base")
    HfApi().upload_file(path_or_fileobj=CARD.encode(), path_in_repo="README.md", repo_id="org/base")
    return "org/base"


def described(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text())


@pytest.mark.hub
def test_every_edit_alone_is_an_adapter(base: str, tmp_path: Path) -> None:
    """In a process without the library: one edit by ``subfolder=``, and all of them from the root."""
    model = EditableModel.from_pretrained(base, ROME)
    expected = []
    for number, request in enumerate(facts(2)):  # each made on the unedited model, as it then stands alone
        alone = EditableModel.from_pretrained(base, ROME)
        alone.edit(request)
        expected.append(float(logits(alone)[0, -1, :50].double().sum()))
        alone.save_pretrained(tmp_path / str(number))
        model.load_edits(tmp_path / str(number), f"pack{number}")
    expected.append(float(logits(model)[0, -1, :50].double().sum()))
    assert len({round(number, 3) for number in expected}) == 3
    commit = model.push_to_hub(REPO, per_edit=True)
    folders = described(Path(HfApi().hf_hub_download(REPO, CONFIG)).parent)["edit_folders"]
    assert list(folders) == [e.id for e in model.edits] and all("/" in edit_id for edit_id in folders)
    assert {f"{place}/{name}" for place in folders.values() for name in ADAPTER} <= set(HfApi().list_repo_files(REPO))
    script = f"""
import sys
sys.modules["hf_kedit"] = None
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
for place in {[list(folders.values())[1], None]!r}:
    base = AutoModelForCausalLM.from_pretrained("{base}")
    model = PeftModel.from_pretrained(base, "{REPO}", subfolder=place)
    with torch.no_grad():
        print(float(model(input_ids=torch.tensor({PROBE.tolist()})).logits[0, -1, :50].double().sum()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert [float(line) for line in done.stdout.split()] == pytest.approx(expected[1:], abs=1e-3), done.stderr
    assert f'subfolder="{next(iter(folders.values()))}"' in ModelCard.load(REPO).text
    assert model.push_to_hub(REPO, per_edit=True).oid == commit.oid, "the same bytes"
    pull_folder(REPO, tmp_path / "pulled")
    assert (tmp_path / "pulled" / next(iter(folders.values())) / ADAPTER[0]).is_file()
    assert push_folder(tmp_path / "pulled", REPO).oid == commit.oid
    model.push_to_hub(REPO)  # without: they go
    assert not [name for name in HfApi().list_repo_files(REPO) if name.startswith("edits/")]
    assert len(commits()) == 3


def test_adapters_of_single_edits_in_a_folder(tmp_path: Path) -> None:
    model = EditableModel.from_pretrained("kedit/world-gpt2", ROME)
    model.edit([{**facts(2)[i].to_dict(), "id": edit_id} for i, edit_id in enumerate(("a/b", "a b"))])
    (tmp_path / "out" / "edits").mkdir(parents=True)
    (tmp_path / "out" / "edits" / "mine.txt").write_text("keep me")
    model.save_pretrained(tmp_path / "out", per_edit=True)
    assert described(tmp_path / "out")["edit_folders"] == {"a/b": "edits/a-b", "a b": "edits/a-b-1"}
    assert (tmp_path / "out" / "edits" / "a-b" / ADAPTER[1]).is_file()
    model.save_pretrained(tmp_path / "out")
    assert {p.name for p in (tmp_path / "out" / "edits").rglob("*") if p.is_file()} == {"mine.txt"}
    model.set_method(FTM)
    model.edit(facts(3)[2])
    with pytest.raises(ExportError, match="low-rank"):
        model.save_pretrained(tmp_path / "other", per_edit=True)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("method", "artifact", "mergeable"),
    [
        (ROME, "lora", True),
        (FTM, "dense", True),
        ("prompt", "stateful", False),
    ],
)
def test_what_a_folder_says_it_is(method: Any, artifact: str, mergeable: bool, tmp_path: Path) -> None:
    model = EditableModel.from_pretrained("kedit/world-gpt2", method)
    model.edit(facts(1))
    model.save_pretrained(tmp_path)
    said = described(tmp_path)
    assert (said["artifact"], said["mergeable"], said["task_type"]) == (artifact, mergeable, "CAUSAL_LM")
    assert (tmp_path / ADAPTER[0]).exists() == (artifact == "lora")
    assert torch.equal(logits(EditableModel.from_pretrained(tmp_path)), logits(model))


@pytest.mark.hub
def test_the_licence_of_the_base_is_that_of_the_edits(base: str, tmp_path: Path) -> None:
    """On the card of the edits, of the adapter, and of the merged model; read at the commit of the base."""
    model = EditableModel.from_pretrained(base, ROME)
    HfApi().delete_file("README.md", base)
    model.edit(facts(1))
    model.push_to_hub(REPO)
    model.export_lora(tmp_path / "lora")
    model.save_pretrained(tmp_path / "edits")
    assert kedit("merge", tmp_path / "edits", "--adapter", "--output", tmp_path / "merged").exit_code == 0
    cards = [ModelCard.load(REPO), *(ModelCard.load(tmp_path / name / "README.md") for name in ("lora", "merged"))]
    for card in cards:
        assert (card.data.license, card.data.license_name) == ("other", "world-licence")
        assert card.data.license_link == "LICENCE.md" and card.data.base_model == base
        card.validate()
    assert cards[2].data.base_model_relation == "finetune"
    later = EditableModel.from_pretrained(base, ROME)  # at the commit without a card
    later.edit(facts(1))
    later.save_pretrained(tmp_path / "later")
    assert ModelCard.load(tmp_path / "later" / "README.md").data.license is None


@pytest.mark.hub
def test_an_adapter_in_a_merged_repository(base: str, tmp_path: Path) -> None:
    """The whole model at the root, the same edits for the base model in ``adapter/``: neither is applied twice."""
    from peft import PeftModel

    model = EditableModel.from_pretrained(base, ROME)
    model.edit(facts(1))
    model.save_pretrained(tmp_path / "edits")
    assert kedit("merge", tmp_path / "edits", "--adapter", "--output", tmp_path / "merged").exit_code == 0
    assert kedit("push", tmp_path / "merged", "org/merged").exit_code == 0
    whole = AutoModelForCausalLM.from_pretrained("org/merged")
    assert torch.equal(logits(whole), logits(model))
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert (logits(plain) - logits(model)).abs().max() > 0.1
    stacked = PeftModel.from_pretrained(plain, "org/merged", subfolder="adapter")
    assert torch.allclose(logits(stacked), logits(model), atol=1e-5)

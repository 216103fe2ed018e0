"""What else is shared: adapters that load without the library, edits beside the weights, trained editors."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_kedit import EditableModel, MENDConfig, embedded
from hf_kedit.errors import PackError
from hf_kedit.hub import push_folder
from hf_kedit.testing.hub import LoopbackHub

from .test_push import PROBE, REPO, facts, logits

pytestmark = pytest.mark.hub
PLAIN = f"""
import sys, warnings
sys.modules["hf_kedit"] = None
warnings.simplefilter("ignore")
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained("org/base")
for model in (
    PeftModel.from_pretrained(base, "{REPO}", revision="v1"),
    AutoModelForCausalLM.from_pretrained("{REPO}", adapter_kwargs={{"revision": "v1"}}),
):
    with torch.no_grad():
        print(float(model(input_ids=torch.tensor({PROBE.tolist()})).logits[0, -1, :50].double().sum()))
"""


def test_low_rank_edits_load_without_the_library(hub: LoopbackHub) -> None:
    for auto in (AutoModelForCausalLM, AutoTokenizer):
        auto.from_pretrained(embedded.path("world-gpt2")).push_to_hub("org/base")
    model = EditableModel.from_pretrained("org/base", "rome")
    model.edit(facts(1))
    model.push_to_hub(REPO, tag="v1")
    expected = float(logits(model)[0, -1, :50].double().sum())
    with model.disable_edits():
        unedited = float(logits(model)[0, -1, :50].double().sum())
    model.edit(facts(1, start=1))
    model.push_to_hub(REPO)  # main is elsewhere meanwhile
    done = subprocess.run([sys.executable, "-c", PLAIN], capture_output=True, text=True, timeout=300, check=False)
    said = [float(line) for line in done.stdout.split()]
    assert said == pytest.approx([expected, expected], abs=1e-3), done.stderr
    assert abs(unedited - expected) > 0.1
    card = ModelCard.load(REPO)
    assert {"peft", "lora"} <= set(card.data.tags) and "PeftModel" in card.text


@pytest.mark.parametrize(
    ("method", "remark"), [("grace", "import hf_kedit\nfrom peft"), ("prompt", "computed while the model runs")]
)
def test_edits_beside_the_weights(hub: LoopbackHub, method: str, remark: str) -> None:
    model = EditableModel.from_pretrained("kedit/world-gpt2", method)
    model.edit(facts(1))
    model.push_to_hub(REPO)
    assert torch.equal(logits(EditableModel.from_pretrained(REPO)), logits(model))
    text = ModelCard.load(REPO).text
    assert remark in text and "kedit merge" not in text
    other = EditableModel.from_pretrained("kedit/world-gpt2", "rome")
    with pytest.raises(PackError, match="load it alone"):
        other.load_edits(REPO)
    assert not other.edits and not other.packs.names


def test_a_trained_editor(hub: LoopbackHub) -> None:
    folder = embedded.path("world-gpt2").parent / "editors" / "mend-world-gpt2"
    push_folder(folder, "org/mend")
    assert "editor.safetensors" in HfApi().list_repo_files("org/mend")
    ours, theirs = (
        EditableModel.from_pretrained("kedit/world-gpt2", c) for c in ("mend", MENDConfig(editor="org/mend"))
    )
    for model in (ours, theirs):
        model.edit(facts(1))
    assert torch.equal(logits(ours), logits(theirs))

"""MEND with the packaged editors: it edits, alone and in batches, and says clearly when there is no fitting editor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_kedit import EditableModel, Editor, evaluate_edits, load_edit_dataset
from hf_kedit.errors import ArtifactError, ConfigError, UnsupportedModelError
from hf_kedit.methods.mend import MENDConfig, MENDEditor

EDITOR = "kedit/mend-world-gpt2"


@pytest.fixture
def mend() -> EditableModel:
    return EditableModel.from_pretrained("kedit/world-gpt2", "mend")


def test_edits_facts_that_the_editor_never_saw(mend: EditableModel) -> None:
    facts = load_edit_dataset("world", split="test", limit=20)
    said = evaluate_edits(mend, facts, setting="single").summary()["post"]
    assert said["rewrite_acc"] >= 0.9 and said["rephrase_acc"] >= 0.85 and said["locality"] >= 0.9


def test_a_fact_of_a_batch_is_taken_back_alone(mend: EditableModel) -> None:
    facts = load_edit_dataset("world", split="test", limit=3)
    before = {n: p.detach().clone() for n, p in mend.base_model.named_parameters()}
    result = mend.edit(facts)
    assert len({e.batch_id for e in result.edits}) == 1
    mend.rollback(result.ids[1])
    assert [e.id for e in mend.edits] == [result.ids[0], result.ids[2]]
    mend.rollback("all")
    assert all(torch.equal(p, before[n]) for n, p in mend.base_model.named_parameters())


def test_saved_edits_come_back(mend: EditableModel, tmp_path: Path) -> None:
    mend.edit(load_edit_dataset("world", split="test", limit=1))
    ids = mend.tokenizer("The capital of", return_tensors="pt")["input_ids"]
    mend.save_pretrained(tmp_path / "edit")
    again = EditableModel.from_pretrained(tmp_path / "edit")
    assert torch.equal(again(ids).logits, mend(ids).logits)
    assert again.edit_config.editor == EDITOR


def test_editors_are_saved_and_loaded(tmp_path: Path) -> None:
    editor = Editor.from_pretrained(EDITOR)
    assert isinstance(editor, MENDEditor)
    editor.save_pretrained(tmp_path / "copy")
    again = Editor.from_pretrained(tmp_path / "copy")
    assert again.edit_config == editor.edit_config and again.origin == editor.origin
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in editor.state_dict().items())
    weights = tmp_path / "copy" / "editor.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(ArtifactError, match=r"editor\.safetensors"):
        Editor.from_pretrained(tmp_path / "copy")


def test_a_model_without_an_editor() -> None:
    from tests.models import tiny_model

    with pytest.raises(ConfigError, match="kedit train"):
        EditableModel(tiny_model("gpt2"), "mend")
    with pytest.raises(ConfigError, match=r"inputs and .* outputs|no module"):
        EditableModel(tiny_model("gpt2", n_layer=6), MENDConfig(editor=EDITOR))


def test_a_model_with_other_weights_is_told(caplog: Any) -> None:
    from hf_kedit.loading import load_base, load_tokenizer

    base = load_base("kedit/world-gpt2")
    with torch.no_grad():
        base.transformer.h[5].mlp.c_fc.weight.add_(0.01)
    with caplog.at_level("WARNING", logger="hf_kedit"):
        EditableModel(base, MENDConfig(editor=EDITOR), load_tokenizer("kedit/world-gpt2"))
    assert "trained on a model with another transformer.h.5.mlp.c_fc" in caplog.text


def test_a_model_in_fp16_carries_edits_but_is_not_edited(mend: EditableModel, tmp_path: Path) -> None:
    """Small gradients become zero in fp16, but not in bf16."""
    facts = load_edit_dataset("world", split="test", limit=2)
    mend.edit(facts.select([0]))
    mend.save_pretrained(tmp_path)
    half = EditableModel.from_pretrained(tmp_path, dtype=torch.float16, ignore_fingerprint=True)
    before = {n: p.detach().clone() for n, p in half.base_model.named_parameters()}
    with pytest.raises(UnsupportedModelError, match="bfloat16"):
        half.edit(facts.select([1]))
    assert len(half.edits) == 1
    assert all(torch.equal(p, before[n]) for n, p in half.base_model.named_parameters())
    with pytest.raises(UnsupportedModelError, match="bfloat16"):
        MENDEditor.for_model(half.base_model)
    brain = EditableModel.from_pretrained("kedit/world-gpt2", "mend", dtype=torch.bfloat16)
    assert brain.edit(facts.select([0])).edits[0].diagnostics["target_probability_after"] > 0.9


def test_an_edit_leaves_no_gradient_and_no_hook(mend: EditableModel) -> None:
    model = mend.base_model

    def hooks() -> int:
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        return sum(len(getattr(m, kind)) for m in model.modules() for kind in kinds)

    before = hooks()
    mend.edit(load_edit_dataset("world", split="test", limit=2))
    assert hooks() == before and all(p.grad is None for p in model.parameters())

"""`compile_edits`: what a LoRA of a chosen rank keeps of a set of edits, and which facts it loses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_kedit import EditableModel
from hf_kedit.engine.weights import get_module, get_weight, model_digest, set_weight
from hf_kedit.errors import ExportError
from hf_kedit.tokens import encode_pair
from tests.methods.test_family import deltas, facts

MODEL = "kedit/world-gpt2"


def probability(model: EditableModel, prompt: str, target: str) -> float:
    """Of the target, geometric mean per token."""
    pair = encode_pair(model.tokenizer, prompt, target)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([pair.ids])).logits[0].log_softmax(-1)
    first = pair.prompt_length - 1
    return float(logits[first:-1].gather(1, torch.tensor(pair.target_ids).unsqueeze(1)).mean().exp())


@pytest.fixture(scope="module")
def edited() -> EditableModel:
    model = EditableModel.from_pretrained(MODEL, "memit")
    model.edit(facts(12), show_progress=False)
    return model


def test_a_full_rank_loses_nothing(edited: EditableModel, tmp_path: Path) -> None:
    before = model_digest(edited.base_model)
    report = edited.compile_edits(tmp_path / "lora", rank=12)
    assert report.lost == () and min(report.kept.values()) > 1 - 1e-9
    assert report.export is not None and report.export.rank == report.rank == 12
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for key, change in deltas(edited).items():
        path = key.removesuffix(".weight")
        a, b = (tensors[f"base_model.model.{path}.lora_{x}.weight"] for x in "AB")
        assert torch.allclose(b @ a, change, atol=1e-5)
    assert model_digest(edited.base_model) == before


def test_a_small_rank_loses_facts_by_name(edited: EditableModel) -> None:
    report = edited.compile_edits(rank=2)
    assert report.export is None
    bare = EditableModel.from_pretrained(MODEL)
    for key, change in deltas(edited).items():
        u, sigma, vh = torch.linalg.svd(change.double())
        assert report.kept[key] == pytest.approx(float(sigma[:2].square().sum() / sigma.square().sum()), abs=1e-6)
        module = get_module(bare.base_model, key.removesuffix(".weight"))
        set_weight(module, get_weight(module) + (u[:, :2] * sigma[:2] @ vh[:2]).float())
    expected = []
    for edit in edited.edits:
        question = (edit.request.filled_prompt, edit.request.target_new)
        pair = (probability(edited, *question), probability(bare, *question))
        assert report.probabilities[edit.id] == pytest.approx(pair, abs=1e-4)
        expected += [edit.id] if pair[0] >= 0.5 > pair[1] else []
    assert report.lost == tuple(expected) and 0 < len(expected) < 12


def test_what_no_lora_can_hold(edited: EditableModel) -> None:
    with pytest.raises(ExportError, match="no edits"):
        EditableModel.from_pretrained(MODEL).compile_edits(rank=4)
    grace = EditableModel.from_pretrained(MODEL, "grace")
    grace.edit(facts(1), show_progress=False)
    with pytest.raises(ExportError, match="no changes of weights"):
        grace.compile_edits(rank=4)
    with pytest.raises(ExportError, match="rank"):
        edited.compile_edits(rank=0)
    silent = EditableModel(edited.base_model, "memit")
    silent.ledger.accounts = edited.ledger.accounts
    with pytest.raises(ExportError, match="tokenizer"):
        silent.compile_edits(rank=4)

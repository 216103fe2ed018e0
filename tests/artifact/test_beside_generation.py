"""Saving, pushing and fingerprints read the kept originals: the model is not touched, and may run meanwhile."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_kedit import EditableModel, FTMConfig, GRACEConfig
from hf_kedit.artifact.writing import artifact_files
from hf_kedit.books import ledger
from hf_kedit.engine.weights import model_fingerprint
from hf_kedit.testing.hub import LoopbackHub
from tests.models import tiny_model

from .test_files_of_0_1_0 import DATA

PROBE = torch.tensor([[5, 6, 7, 8, 9]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=PROBE).logits


def forbid_writing(monkeypatch: pytest.MonkeyPatch, model: EditableModel) -> None:
    """Any write of a weight, and any switch of a book, fails from now on."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the model was touched")

    monkeypatch.setattr(ledger, "set_weight", refuse)
    for book in model.books.values():
        monkeypatch.setattr(book, "disabled", refuse)


@pytest.mark.parametrize("name", ["rome_gpt2", "memit_llama_per_edit", "ft_m_gpt2_dense", "grace_gpt2", "ike_llama"])
def test_saving_does_not_touch_the_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: LoopbackHub
) -> None:
    model = EditableModel.from_pretrained(DATA / name)
    base = model_fingerprint(EditableModel.from_pretrained(model.base_model_id).base_model)
    forbid_writing(monkeypatch, model)
    model.save_pretrained(tmp_path)
    model.push_to_hub("org/edits")
    assert model.base_fingerprint() == base
    assert model.fingerprint() != base


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fingerprint_of_the_originals(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = EditableModel.from_pretrained("kedit/world-gpt2").tokenizer
    base = tiny_model(family, vocab_size=len(tokenizer)).to(dtype)
    before = model_fingerprint(base)
    modules = None if family == "gpt2" else ["model.layers.{}.self_attn.o_proj"]
    experts = {"expert_policy": "top1"} if family in ("mixtral", "gpt_oss") else {}
    config = FTMConfig(
        layers=[1], lr=0.05, num_steps=2, train_bias=family == "gpt2", modules=None if experts else modules, **experts
    )
    model = EditableModel(base, config, tokenizer)
    model.edit(prompt="The sky is", target_new="green", show_progress=False)
    assert model_fingerprint(base) != before
    with monkeypatch.context() as patch:
        forbid_writing(patch, model)
        assert model.base_fingerprint() == before == model.ledger.base_fingerprint()
    model.rollback("all")
    assert model_fingerprint(base) == before


def test_a_site_in_an_edited_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codebook and weight edit share a module: what is saved is the same as with the edits switched off."""
    model = EditableModel.from_pretrained("kedit/world-gpt2", FTMConfig(layers=[3], lr=1e-3, num_steps=2))
    model.edit(prompt="The sky is", target_new="green", show_progress=False)
    model.set_method(GRACEConfig(layers=[3]))
    model.edit(prompt="The sea is", target_new="red", show_progress=False)
    forbid_writing(monkeypatch, model)
    model.save_pretrained(tmp_path)
    monkeypatch.undo()
    again = EditableModel.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_generating_while_edits_are_saved(tmp_path: Path) -> None:
    model = EditableModel.from_pretrained(DATA / "packs_gpt2")
    expected, failures, stop = logits(model), [], threading.Event()

    def run() -> None:
        while not stop.is_set():
            if not torch.equal(logits(model), expected):
                failures.append("other logits")

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(5):
        model.save_pretrained(tmp_path / str(number))
        artifact_files(model)
        model.base_fingerprint()
        model._base_fingerprint = None
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures

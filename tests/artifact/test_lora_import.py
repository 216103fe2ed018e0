"""A plain adapter becomes an edit: the logits that PEFT gives, journalled, undone, saved; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from hf_kedit import EditableModel, EditRequest, FTMConfig
from hf_kedit.artifact.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from hf_kedit.engine.weights import model_digest
from hf_kedit.errors import ArtifactError, BaseModelMismatchError, NonFiniteError, RequestError
from tests.artifact.test_lora_export import facts, logits
from tests.models import tiny_model

FACT = EditRequest(prompt="The sky is", target_new="green", id="sky")


def foreign_adapter(family: str, folder: Path, **config: Any) -> torch.Tensor:
    """Save an adapter with random weights as PEFT does, and return its logits."""
    config = {"r": 4, "lora_alpha": 6, **config}
    peft_model: Any = get_peft_model(tiny_model(family), LoraConfig(init_lora_weights=False, **config))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
            elif parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    peft_model.eval().save_pretrained(folder, save_embedding_layers=False)
    return logits(peft_model)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}),
        ("llama", {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
        ("llama", {"target_modules": "all-linear", "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 3}}),
        ("gpt2", {"target_modules": ["c_proj"], "lora_bias": True, "fan_in_fan_out": True}),
        ("qwen2", {"target_modules": ["q_proj"], "bias": "lora_only"}),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["model.layers.1.mlp.down_proj"]}),
        ("mixtral", {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}),
        ("t5", {"target_modules": ["wo", "q"], "task_type": "SEQ_2_SEQ_LM"}),
    ],
)
def test_an_adapter_from_elsewhere(family: str, config: dict[str, Any], tmp_path: Path) -> None:
    wanted = foreign_adapter(family, tmp_path / "lora", **config)
    model = EditableModel(tiny_model(family), FTMConfig(layers=[0]))
    digest, before = model_digest(model.base_model), logits(model)
    with pytest.raises(RequestError, match="does not say what it changes"):
        model.import_lora(tmp_path / "lora")
    assert model_digest(model.base_model) == digest and not model.edits
    result = model.import_lora(tmp_path / "lora", FACT)
    assert (before - wanted).abs().max() > 1e-2 and torch.allclose(logits(model), wanted, atol=1e-5)
    assert result.ids == ["sky"] and model.edits[0].method == "lora-import"
    model.save_pretrained(tmp_path / "edits")
    loaded = EditableModel.from_pretrained(tmp_path / "edits", base_model=tiny_model(family))
    assert torch.equal(logits(loaded), logits(model))
    model.rollback("sky")
    assert model_digest(model.base_model) == digest


def test_an_own_export_brings_its_requests_along(tmp_path: Path) -> None:
    model = EditableModel.from_pretrained("kedit/world-gpt2", "rome")
    ids = model.edit(facts(2)).ids
    model.export_lora(tmp_path / "lora")
    other = EditableModel.from_pretrained("kedit/world-gpt2", "rome")
    digest = model_digest(other.base_model)
    assert other.import_lora(tmp_path / "lora").ids == ids
    assert torch.allclose(logits(other), logits(model), atol=1e-5)
    assert [e.request.filled_prompt for e in other.edits] == [e.request.filled_prompt for e in model.edits]
    own = other.edit(facts(3)[2]).ids
    other.rollback(ids)
    assert [e.id for e in other.edits] == own
    other.rollback("all")
    assert model_digest(other.base_model) == digest


def _change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    (folder / ADAPTER_CONFIG).write_text(json.dumps({**config, **values}))


def _drop_tensors(folder: Path, word: str) -> None:
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    save_file({k: v for k, v in tensors.items() if word not in k}, folder / ADAPTER_WEIGHTS)


def _change_tensors(folder: Path, change: Any) -> None:
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    save_file({k: change(v).contiguous() for k, v in tensors.items()}, folder / ADAPTER_WEIGHTS)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / ADAPTER_CONFIG).unlink(), "no PEFT adapter"),
        (lambda f: (f / ADAPTER_CONFIG).write_text("{"), "not JSON"),
        (lambda f: _change_config(f, peft_type="IA3"), "IA3"),
        (lambda f: _change_config(f, use_dora=True), "use_dora"),
        (lambda f: _change_config(f, init_lora_weights="pissa_niter_4"), "changes the base"),
        (lambda f: (f / ADAPTER_WEIGHTS).unlink(), "pickle"),
        (lambda f: (f / ADAPTER_WEIGHTS).write_bytes(b"\0" * 64), "damaged"),
        (lambda f: _drop_tensors(f, "lora_B"), "only one of its two factors"),
        (lambda f: _drop_tensors(f, "lora"), "no change"),
        (lambda f: _change_config(f, r="eight"), "damaged"),
        (lambda f: _change_config(f, r=0), "damaged"),
        (lambda f: _change_config(f, rank_pattern=[3]), "damaged"),
        (lambda f: _change_config(f, alpha_pattern={"(": 3}), "damaged"),
        (lambda f: _change_config(f, target_parameters=5), "damaged"),
        (lambda f: (f / ADAPTER_CONFIG).write_text("[" * 100_000), "nested"),
        (lambda f: _change_tensors(f, lambda t: t.reshape(-1)[0]), "damaged"),
        (lambda f: _change_tensors(f, lambda t: t[:-1]), "damaged|is .* the weight"),
        (lambda f: _change_tensors(f, lambda t: t[:-1] if t.shape[0] < t.shape[1] else t), "damaged.* ranks"),
        (lambda f: _change_tensors(f, lambda t: t if t.shape[0] < t.shape[1] else t[:, :-1]), "damaged.* ranks"),
    ],
)
def test_adapters_that_are_refused(damage: Any, message: str, tmp_path: Path) -> None:
    foreign_adapter("llama", tmp_path, target_modules=["q_proj"])
    damage(tmp_path)
    model = EditableModel(tiny_model("llama"), FTMConfig(layers=[0]))
    digest = model_digest(model.base_model)
    with pytest.raises(ArtifactError, match=message):
        model.import_lora(tmp_path, FACT)
    assert model_digest(model.base_model) == digest and not model.edits


def test_factors_whose_product_is_too_large(tmp_path: Path) -> None:
    foreign_adapter("llama", tmp_path, target_modules=["q_proj"])
    _change_tensors(tmp_path, lambda t: torch.full_like(t, 1e25))
    model = EditableModel(tiny_model("llama"), FTMConfig(layers=[0]))
    digest = model_digest(model.base_model)
    with pytest.raises(NonFiniteError, match="infinity"):
        model.import_lora(tmp_path, FACT)
    assert model_digest(model.base_model) == digest and not model.edits


def test_an_adapter_of_another_model(tmp_path: Path) -> None:
    foreign_adapter("llama", tmp_path / "llama", target_modules=["q_proj"])
    with pytest.raises(BaseModelMismatchError, match="another model"):
        EditableModel(tiny_model("gpt2"), FTMConfig(layers=[0])).import_lora(tmp_path / "llama", FACT)
    wider = EditableModel(tiny_model("llama", hidden_size=64), FTMConfig(layers=[0]))
    with pytest.raises(BaseModelMismatchError, match="weight"):
        wider.import_lora(tmp_path / "llama", FACT)

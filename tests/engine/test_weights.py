"""Reading and writing weights wherever they live."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model

from hf_kedit import EditableModel
from hf_kedit.engine.weights import (
    get_module,
    get_weight,
    model_digest,
    model_fingerprint,
    set_weight,
    tied_names,
    weight_shape,
)
from hf_kedit.errors import LayerError, WeightError
from hf_kedit.methods.ft import FTMConfig
from tests.models import tiny_model

IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_round_trip(family: str) -> None:
    model = tiny_model(family)
    path = "transformer.h.1.mlp.c_proj" if family == "gpt2" else "model.layers.1.mlp.down_proj"
    module = get_module(model, path)
    weight = get_weight(module)
    assert weight_shape(module) == tuple(weight.shape) == (32, 128 if family == "gpt2" else 80)
    x = torch.randn(2, weight.shape[1])
    bias = module.bias if getattr(module, "bias", None) is not None else 0
    assert torch.allclose(module(x), x @ weight.T + bias, atol=1e-5)
    storage = module.weight.data_ptr()
    set_weight(module, weight + 1)
    assert torch.equal(get_weight(module), weight + 1)
    assert module.weight.data_ptr() == storage, "in place, so that everything that holds the tensor sees it"
    weight[:] = 0  # a copy: does not reach the model
    assert not torch.equal(get_weight(module), weight)


@pytest.mark.parametrize("where", ["cpu", "disk", "mixed"])
def test_offloaded_weights(where: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    reference = tiny_model("llama")
    path = "model.layers.1.mlp.down_proj"
    if where == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    elif where == "disk":
        disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    else:
        device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
        device_map |= {f"model.layers.{i}": "disk" if i == 1 else "cpu" for i in range(len(model.model.layers))}
        model = dispatch_model(model, device_map, main_device="cpu", offload_dir=str(tmp_path))
    assert get_module(model, path).weight.device.type == "meta"
    before = get_weight(get_module(model, path))
    assert torch.equal(before, get_weight(get_module(reference, path)))
    change = torch.randn(before.shape) * 0.1
    for m in (model, reference):
        set_weight(get_module(m, path), get_weight(get_module(m, path)) + change)
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, reference(IDS).logits, atol=1e-6)
        set_weight(get_module(model, path), before)
        assert torch.equal(get_weight(get_module(model, path)), before)
        assert torch.allclose(model(IDS).logits, tiny_model("llama")(IDS).logits, atol=1e-6)


def test_missing_modules_and_parameters_are_named() -> None:
    model = tiny_model("llama")
    with pytest.raises(LayerError, match=r"Did you mean 'model\.layers\.1\.mlp\.down_proj'"):
        get_module(model, "model.layers.1.mlp.down_prj")
    with pytest.raises(WeightError, match="no parameter 'bias'"):
        get_weight(get_module(model, "model.layers.1.mlp.down_proj"), "bias")
    with pytest.raises(WeightError, match="cannot write"):
        set_weight(get_module(model, "model.layers.1.mlp.down_proj"), torch.ones(2, 2))


def test_ties_and_digests() -> None:
    model = tiny_model("gpt2")
    assert tied_names(model)["lm_head.weight"] == ["transformer.wte.weight"]
    before, full = model_fingerprint(model), model_digest(model)
    assert before == model_fingerprint(tiny_model("gpt2")) and full == model_digest(tiny_model("gpt2"))
    module = get_module(model, "transformer.h.0.mlp.c_proj")
    set_weight(module, get_weight(module) * 1.0001)
    assert before != model_fingerprint(model) and full != model_digest(model)


@pytest.mark.parametrize("part", [0.25, 0.5, 0.75, 0.97])
def test_a_fingerprint_looks_at_the_whole_of_a_matrix(part: float) -> None:
    model = tiny_model("gpt2")
    before = model_fingerprint(model)
    matrix = model.transformer.wte.weight  # 420 · 32 elements, far more than the 1,024 that are read
    with torch.no_grad():
        matrix[int(part * len(matrix))] += 1
    assert model_fingerprint(model) != before


def test_a_tied_head_is_not_edited_by_accident() -> None:
    from hf_kedit import embedded
    from hf_kedit.errors import TiedWeightError

    model = EditableModel.from_pretrained("kedit/world-gpt2", FTMConfig(layers=[0], lr=1e-3, modules=["lm_head"]))
    assert embedded.is_embedded("kedit/world-gpt2")
    digest = model_digest(model.base_model)
    with pytest.raises(TiedWeightError, match="wte"):
        model.edit(prompt="Anything is", target_new="possible")
    assert model_digest(model.base_model) == digest

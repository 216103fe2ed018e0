"""Editing where weights are not plain tensors in memory: offloaded, sharded, compiled, tied, of few bits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_kedit import (
    AdaLoRAConfig,
    CaliNetConfig,
    DINMConfig,
    EditableModel,
    EditRequest,
    FTMConfig,
    LoRAConfig,
    load_edit_dataset,
    untie_head,
)
from hf_kedit.engine.weights import get_module, get_weight, model_digest
from hf_kedit.errors import TiedWeightError

PROBE = torch.tensor([[5, 6, 7, 8, 9, 10]])


def fact() -> EditRequest:
    return EditRequest.from_dict(load_edit_dataset("world", split="test", limit=1)[0])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=PROBE).logits


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_an_edit_of_offloaded_weights(where: str, tmp_path: Path) -> None:
    """The same edit as in memory, in the weights map that accelerate reads at every forward; and back."""
    from accelerate import cpu_offload, disk_offload

    plain = EditableModel.from_pretrained("kedit/world-llama", "rome")
    plain.base_model.save_pretrained(tmp_path / "base")
    plain.edit(fact())
    model: Any = EditableModel.from_pretrained("kedit/world-llama", "rome").base_model
    if where == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, str(tmp_path / "offload"), execution_device=torch.device("cpu"))
    edited = EditableModel(model, "rome", plain.tokenizer, base_model_id="kedit/world-llama")
    before, digest = logits(model), model_digest(model)
    edited.edit(fact())
    assert next(model.parameters()).device.type == "meta", "it is still offloaded"
    assert torch.allclose(logits(edited), logits(plain), atol=1e-4)
    assert not torch.allclose(logits(edited), before, atol=1e-2)
    edited.save_pretrained(tmp_path / "edits")
    loaded = EditableModel.from_pretrained(tmp_path / "edits")
    assert torch.allclose(logits(loaded), logits(edited), atol=1e-5)
    edited.rollback("all")
    assert torch.equal(logits(edited), before) and model_digest(model) == digest


def in_memory_and_offloaded(config: Any) -> tuple[EditableModel, EditableModel, torch.Tensor]:
    """One edit of a model in memory and of the same one offloaded, which agree, and the latter's logits before it."""
    from accelerate import cpu_offload

    plain = EditableModel.from_pretrained("kedit/world-gpt2", config)
    plain.edit(fact())
    model: Any = EditableModel.from_pretrained("kedit/world-gpt2").base_model
    cpu_offload(model, execution_device=torch.device("cpu"))
    edited = EditableModel(model, config, plain.tokenizer, base_model_id="kedit/world-gpt2")
    before = logits(edited)
    edited.edit(fact())
    assert torch.allclose(logits(edited), logits(plain), atol=1e-4)
    assert not torch.allclose(logits(edited), before, atol=1e-3)
    return plain, edited, before


def test_neurons_beside_offloaded_layers(tmp_path: Path) -> None:
    """They are made where the layers compute, not where these have no values; PEFT's layers likewise."""
    from peft import PeftModel

    plain, edited, before = in_memory_and_offloaded(CaliNetConfig(num_steps=4))
    edited.save_pretrained(tmp_path)
    edited.rollback("all")
    assert torch.equal(logits(edited), before)
    peft = PeftModel.from_pretrained(edited.base_model, tmp_path)
    assert torch.allclose(logits(peft), logits(plain), atol=1e-4)


@pytest.mark.parametrize("config", [LoRAConfig(num_steps=3), AdaLoRAConfig(num_steps=3)])
def test_adapters_trained_beside_offloaded_layers(config: LoRAConfig) -> None:
    """PEFT puts an adapter where the weight is, and an offloaded weight is nowhere."""
    _, edited, before = in_memory_and_offloaded(config)
    edited.rollback("all")
    assert torch.equal(logits(edited), before)


def test_a_bias_trained_beside_an_offloaded_layer() -> None:
    """DINM trains a projection whole, its bias too, which cannot be multiplied with the layer's input."""
    _, edited, before = in_memory_and_offloaded(DINMConfig(layers=[2], num_steps=3))
    edited.rollback("all")
    assert torch.equal(logits(edited), before)


def test_an_edit_of_a_compiled_model() -> None:
    """Weights are written in place, so that a graph that was compiled before sees edits and rollbacks."""
    model = EditableModel.from_pretrained("kedit/world-gpt2", "rome")
    compiled: Any = torch.compile(model.base_model, backend="eager")
    before = logits(compiled)
    assert torch.equal(before, logits(model))
    model.edit(fact())
    assert torch.equal(logits(compiled), logits(model)) and not torch.allclose(logits(compiled), before, atol=1e-2)
    with model.disable_edits():
        assert torch.equal(logits(compiled), before)
    model.rollback("all")
    assert torch.equal(logits(compiled), before)


def test_a_tied_head_with_a_weight_of_its_own(tmp_path: Path) -> None:
    """Untying changes nothing by itself; then the head is edited, and the input embeddings are not."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tied = EditableModel.from_pretrained("kedit/world-gpt2")
    tied.base_model.save_pretrained(tmp_path / "base")
    tied.tokenizer.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = logits(base)
    assert untie_head(base) and not untie_head(base)
    assert torch.equal(logits(base), before)
    model = EditableModel(base, FTMConfig(layers=[0], lr=1e-3, num_steps=3, modules=["lm_head"]), tied.tokenizer)
    words = base.get_input_embeddings().weight.detach().clone()
    model.edit(fact())
    after = logits(model)
    assert not torch.allclose(after, before, atol=1e-3) and torch.equal(base.get_input_embeddings().weight, words)
    model.save_pretrained(tmp_path / "edits")
    assert torch.equal(logits(EditableModel.from_pretrained(tmp_path / "edits")), after)
    model.export_lora(tmp_path / "lora")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.allclose(logits(PeftModel.from_pretrained(plain, tmp_path / "lora")), after, atol=1e-5)
    model.base_model.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), after)
    model.rollback("all")
    assert torch.equal(logits(model), before)


def test_untie_as_an_argument(tmp_path: Path) -> None:
    """The error for a tied weight names it; it is saved with the edits and done again when they are loaded."""
    config = FTMConfig(layers=[0], lr=1e-3, num_steps=3, modules=["lm_head"])
    tied = EditableModel.from_pretrained("kedit/world-gpt2", config)
    with pytest.raises(TiedWeightError, match="untie=True"):
        tied.edit(fact())
    model = EditableModel.from_pretrained("kedit/world-gpt2", config, untie=True)
    before = logits(model)
    assert torch.equal(before, logits(tied))
    words = model.base_model.get_input_embeddings().weight.detach().clone()
    model.edit(fact())
    assert not torch.allclose(logits(model), before, atol=1e-3)
    assert torch.equal(model.base_model.get_input_embeddings().weight, words)
    model.save_pretrained(tmp_path)
    loaded = EditableModel.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    loaded.rollback("all")
    assert torch.equal(logits(loaded), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_rounding_loss_of_a_merge(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    """It is what a direct computation gives; half precision warns, and a rollback gives back every bit."""
    model = EditableModel.from_pretrained("kedit/world-gpt2", FTMConfig(layers=[4], lr=1e-3, num_steps=1), dtype=dtype)
    path = model.anatomy.down(4).path
    original, digest = get_weight(get_module(model.base_model, path)), model_digest(model.base_model)
    model.edit(fact())
    change = model.ledger.total(path)
    assert change is not None
    in_place = get_weight(get_module(model.base_model, path)).double()
    direct = float((in_place - original.double() - change.double()).norm() / change.double().norm())
    (loss,) = model.ledger.rounding_losses().values()
    assert loss == pytest.approx(direct, rel=1e-3, abs=1e-7)
    exact = original.float() + change
    (coarse,) = model.ledger.rounding_losses(torch.bfloat16).values()
    assert coarse == pytest.approx(float((exact.bfloat16().float() - exact).norm() / change.norm()), rel=1e-6)
    model.rollback("all")
    assert model_digest(model.base_model) == digest
    model.edit(fact())
    with caplog.at_level("WARNING", logger="hf_kedit"):
        model.merge_and_unload()
    assert ("rounding to its number format loses" in caplog.text) == (dtype is torch.bfloat16), loss


def test_a_device_map_with_layers_on_disk(tmp_path: Path) -> None:
    """Loaded by transformers with some layers on disk: edited, saved, put on a model in memory, and undone."""
    base = EditableModel.from_pretrained("kedit/world-gpt2")
    base.base_model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    config = FTMConfig(layers=[1, 4], lr=1e-3, num_steps=3)
    plain = EditableModel.from_pretrained(tmp_path / "base", config)
    plain.edit(fact())
    places = {"transformer.wte": "cpu", "transformer.wpe": "cpu", "transformer.ln_f": "cpu", "lm_head": "cpu"}
    places |= {f"transformer.h.{i}": "disk" if i >= 3 else "cpu" for i in range(6)}
    model = EditableModel.from_pretrained(
        tmp_path / "base", config, device_map=places, offload_folder=str(tmp_path / "offload")
    )
    before = logits(model)
    assert get_module(model.base_model, "transformer.h.4.mlp.c_proj").weight.device.type == "meta"
    model.edit(fact())
    assert torch.allclose(logits(model), logits(plain), atol=1e-4)
    assert not torch.allclose(logits(model), before, atol=1e-2)
    model.save_pretrained(tmp_path / "edits")
    assert torch.allclose(logits(EditableModel.from_pretrained(tmp_path / "edits")), logits(model), atol=1e-4)
    model.rollback("all")
    assert torch.equal(logits(model), before)


SHARDED = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from hf_kedit.books.deltas import WeightDelta
from hf_kedit.books.ledger import Ledger
from hf_kedit.engine.weights import get_module, get_weight, model_digest
from tests.models import tiny_model

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
path, probe = "model.layers.1.mlp.down_proj", torch.tensor([[5, 6, 7, 8, 9, 10]])
generator = torch.Generator().manual_seed(0)
delta = WeightDelta(path, left=torch.randn(32, 2, generator=generator), right=torch.randn(80, 2, generator=generator))
whole = tiny_model("llama")
with torch.no_grad():
    before = whole(input_ids=probe).logits
    expected = Ledger(whole)
    expected.apply("batch", [delta], ["edit"])
    after = whole(input_ids=probe).logits
    model = tiny_model("llama")
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert get_module(model, path).weight.to_local().shape[0] == 16, "each process holds one half"
    ledger = Ledger(model)
    ledger.apply("batch", [delta], ["edit"])
    assert torch.equal(get_weight(get_module(model, path)), get_weight(get_module(whole, path)))
    assert torch.allclose(model(input_ids=probe).logits, after, atol=1e-5)
    with ledger.disabled():
        assert torch.allclose(model(input_ids=probe).logits, before, atol=1e-5)
    ledger.remove(["edit"])
    assert model_digest(model) == model_digest(tiny_model("llama"))
dist.destroy_process_group()
"""


def test_sharded_weights(tmp_path: Path) -> None:
    """FSDP2 over two processes: each writes its own shard, together the edited weight, and back to the bits."""
    (tmp_path / "sharded.py").write_text(SHARDED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*command, str(tmp_path / "sharded.py")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]

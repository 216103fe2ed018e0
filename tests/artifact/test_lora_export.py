"""An exported adapter gives the edited model's logits, in PEFT and transformers, without this library."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from hf_kedit import EditableModel, EditRequest, FTMConfig, load_edit_dataset
from hf_kedit.anatomy import resolve_anatomy
from hf_kedit.artifact.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from hf_kedit.artifact.lora_tensors import VLLM_RANKS
from hf_kedit.books.ledger import WeightDelta
from hf_kedit.engine.lowrank import shorten
from hf_kedit.engine.weights import get_module, get_weight, model_digest
from hf_kedit.errors import ArtifactError, ExportError
from hf_kedit.journal import Edit
from tests.models import tiny_model

PROBE = torch.tensor([[5, 6, 7, 8, 9, 10]])


def facts(count: int) -> list[EditRequest]:
    rows = load_edit_dataset("world", split="test", limit=count)
    return [EditRequest.from_dict(row) for row in rows]


def logits(model: Any) -> torch.Tensor:
    extra = {"decoder_input_ids": PROBE} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=PROBE, **extra).logits


def edited(family: str, deltas: Callable[[EditableModel], list[WeightDelta]]) -> tuple[EditableModel, Any]:
    """A tiny model with the given changes on it, and its base."""
    base = tiny_model(family)
    model = EditableModel(copy.deepcopy(base), FTMConfig(layers=[0]))
    model.ledger.apply("batch", deltas(model), ["edit"])
    request = EditRequest(prompt="The sky is", target_new="green", id="edit")
    model.journal.add([Edit("edit", request, "ft-m", "batch", "2026-01-01T00:00:00")])
    return model, base


def random_factors(model: EditableModel, module: str, rank: int, seed: int = 0) -> WeightDelta:
    d_out, d_in = get_weight(get_module(model.base_model, module)).shape
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(d, rank, generator=generator) for d in (d_out, d_in))
    return WeightDelta(module, left=0.1 * left, right=right / d_in**0.5)


def assert_same_as_peft(model: EditableModel, base: Any, folder: Path) -> Any:
    """The adapter on the base equals the edited model; switched off it is the base, bit for bit."""
    before, after = logits(base), logits(model)
    loaded = PeftModel.from_pretrained(base, folder)
    assert (before - after).abs().max() > 1e-2, "the edit must matter"
    assert torch.allclose(logits(loaded), after, atol=1e-5)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), before)
    return loaded


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "falcon", "llava"])
@pytest.mark.parametrize("ranks", [(1, 1), (2, 5), (40, 1)])
def test_factors_of_any_rank_and_layout(family: str, ranks: tuple[int, int], tmp_path: Path) -> None:
    """Also with other ranks per layer, and with a rank above the width of 32."""

    def deltas(model: EditableModel) -> list[WeightDelta]:
        return [random_factors(model, model.anatomy.down(i).path, rank) for i, rank in enumerate(ranks)]

    model, base = edited(family, deltas)
    report = model.export_lora(tmp_path / "lora")
    assert report.rank == min(max(ranks), 32) and not report.losses and not report.whole
    merged = assert_same_as_peft(model, base, tmp_path / "lora").merge_and_unload()
    if max(ranks) <= 32:
        assert model_digest(merged) == model_digest(model.base_model), "merging gives the edited bits"


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_fused_experts(family: str, tmp_path: Path) -> None:
    """One expert with a change of rank two, another with rank one, the others untouched; both orientations."""

    def deltas(model: EditableModel) -> list[WeightDelta]:
        bank = resolve_anatomy(model.base_model).layer(1).experts
        assert bank is not None
        return [random_factors(model, f"{bank.path}.{bank.down_param}[{e}]", rank) for e, rank in ((0, 2), (2, 1))]

    model, base = edited(family, deltas)
    report = model.export_lora(tmp_path / "lora")
    assert report.rank == 2 and not report.whole
    config = json.loads((tmp_path / "lora" / ADAPTER_CONFIG).read_text())
    assert len(config["target_parameters"]) == 1 and sorted(report.needed.values()) == [1, 2]
    assert_same_as_peft(model, base, tmp_path / "lora")
    again = EditableModel(tiny_model(family), FTMConfig(layers=[0]))
    again.import_lora(tmp_path / "lora")
    assert torch.allclose(logits(again), logits(model), atol=1e-5)


def full_rank(model: EditableModel) -> list[WeightDelta]:
    path = model.anatomy.down(1).path
    module = get_module(model.base_model, path)
    generator = torch.Generator().manual_seed(0)
    weight = 0.1 * torch.randn(get_weight(module).shape, generator=generator)
    bias = [WeightDelta(path, "bias", dense=torch.ones(weight.shape[0]))] if module.bias is not None else []
    return [WeightDelta(path, dense=weight), *bias]


@pytest.mark.parametrize("family", ["gpt2", "llama", "bart"])
def test_full_rank_changes_are_stored_whole(family: str, tmp_path: Path) -> None:
    model, base = edited(family, full_rank)
    report = model.export_lora(tmp_path / "lora")
    assert report.whole == (model.anatomy.down(1).path,) and not report.needed
    assert_same_as_peft(model, base, tmp_path / "lora")
    names = load_file(tmp_path / "lora" / ADAPTER_WEIGHTS)
    assert any(n.endswith("lora_A.weight") and not t.any() for n, t in names.items()), "PEFT wants one target"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_full_rank_changes_by_their_singular_vectors(family: str, tmp_path: Path) -> None:
    model, base = edited(family, full_rank)
    assert not model.export_lora(tmp_path / "full", rank=32).losses
    assert_same_as_peft(model, base, tmp_path / "full")
    report = model.export_lora(tmp_path / "cut", rank=8)
    (key, loss), change = next(iter(report.losses.items())), model.ledger.total(model.anatomy.down(1).path)
    assert change is not None and report.needed == {key: 8}
    sigma = torch.linalg.svdvals(change)
    assert loss == pytest.approx(float(sigma[8:].norm() / sigma.norm()), rel=1e-4)
    assert f"{100 * loss:.1f} %" in (tmp_path / "cut" / "README.md").read_text()


@pytest.mark.parametrize("columns", [2, 5, 6, 8, 30])
@pytest.mark.parametrize("rank", [None, 3])
def test_the_fewest_columns_with_the_same_product(columns: int, rank: int | None) -> None:
    """Fewer columns than rows of both factors, of one, and of none."""
    draw = torch.Generator().manual_seed(columns)
    left, right = (torch.randn(size, columns, generator=draw) for size in (5, 8))
    product = (left.double() @ right.double().T).float()
    u, sigma, vh = torch.linalg.svd(product.double(), full_matrices=False)
    kept = min(columns, 5, rank or 5)
    best = (u[:, :kept] * sigma[:kept] @ vh[:kept]).float()
    short = shorten(left, right, rank)
    assert short.rank == kept
    assert torch.allclose(short.left @ short.right.T, best, atol=1e-5)
    assert short.loss == pytest.approx(float((product - best).norm() / product.norm()), abs=1e-6)


def test_a_change_of_a_bias_alone(tmp_path: Path) -> None:
    def deltas(model: EditableModel) -> list[WeightDelta]:
        return [
            random_factors(model, model.anatomy.down(0).path, 2),
            WeightDelta(model.anatomy.down(1).path, "bias", dense=torch.ones(32)),
        ]

    model, base = edited("gpt2", deltas)
    model.export_lora(tmp_path / "lora")
    loaded = assert_same_as_peft(model, base, tmp_path / "lora")
    assert torch.allclose(logits(loaded.merge_and_unload()), logits(model), atol=1e-5)


@pytest.mark.parametrize(("method", "name"), [("rome", "gpt2"), ("memit", "llama"), ("kn", "gpt2")])
def test_without_this_library(method: str, name: str, tmp_path: Path) -> None:
    """PeftModel, AutoModel on the adapter and a pipeline, in a process that cannot import hf_kedit."""
    original = EditableModel.from_pretrained(f"kedit/world-{name}")
    original.base_model.save_pretrained(tmp_path / "base")
    original.tokenizer.save_pretrained(tmp_path / "base")
    model = EditableModel.from_pretrained(tmp_path / "base", method)
    model.edit(facts(2))
    model.export_lora(tmp_path / "lora")
    model.save_pretrained(tmp_path / "edits")  # the same adapter lies beside the edits
    save_file({"logits": logits(model)}, tmp_path / "expected.safetensors")
    prompt = facts(1)[0].filled_prompt
    said = model.generate(**model.tokenizer(prompt, return_tensors="pt"), max_new_tokens=4, do_sample=False)
    script = f"""
import sys
sys.modules["hf_kedit"] = None
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, pipeline
expected = load_file({str(tmp_path / "expected.safetensors")!r})["logits"]
base = AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r})
lora, edits = {str(tmp_path / "lora")!r}, {str(tmp_path / "edits")!r}
for model in (
    AutoModelForCausalLM.from_pretrained(lora),
    AutoModelForCausalLM.from_pretrained(edits),
    AutoPeftModelForCausalLM.from_pretrained(edits),
    PeftModel.from_pretrained(base, lora),
):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor({PROBE.tolist()})).logits
    assert torch.allclose(logits, expected, atol=1e-5), (logits - expected).abs().max()
pipe = pipeline("text-generation", model=lora, tokenizer={str(tmp_path / "base")!r}, device="cpu")
said = pipe({prompt!r}, max_new_tokens=4, do_sample=False)[0]["generated_text"]
assert said == {model.tokenizer.decode(said[0], skip_special_tokens=True)!r}, said
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_for_vllm(tmp_path: Path) -> None:
    def two_layers(model: EditableModel) -> list[WeightDelta]:
        return [random_factors(model, model.anatomy.down(i).path, 2 + i) for i in range(2)]

    model, base = edited("llama", two_layers)
    report = model.export_lora(tmp_path / "lora", target="vllm")
    assert report.rank == 8 and max(report.needed.values()) == 3
    config = json.loads((tmp_path / "lora" / ADAPTER_CONFIG).read_text())
    assert config["r"] == config["lora_alpha"] == 8 and config["r"] in VLLM_RANKS
    assert config["modules_to_save"] is None and config["bias"] == "none" and "rank_pattern" not in config
    assert {t.shape[0] for n, t in load_file(tmp_path / "lora" / ADAPTER_WEIGHTS).items() if "lora_A" in n} == {8}
    assert_same_as_peft(model, base, tmp_path / "lora")
    with pytest.raises(ExportError, match="takes the ranks"):
        model.export_lora(tmp_path / "other", target="vllm", rank=3)
    dense, _ = edited("gpt2", full_rank)
    with pytest.raises(ExportError, match="full-rank"):
        dense.export_lora(tmp_path / "other", target="vllm")
    with pytest.raises(ExportError, match="biases"):
        dense.export_lora(tmp_path / "other", target="vllm", rank=8)
    assert not (tmp_path / "other").exists()


def test_hot_swap_between_adapters_of_one_layout(tmp_path: Path) -> None:
    from peft.utils.hotswap import hotswap_adapter

    models = []
    for number, layer in enumerate((0, 2)):
        model, base = edited("llama", lambda m, i=layer: [random_factors(m, m.anatomy.down(i).path, 1 + i, seed=i)])
        every = [layer.down.path for layer in model.anatomy.layers if layer.down is not None]
        model.export_lora(tmp_path / str(number), rank=4, modules=every)
        models.append(model)
    loaded = PeftModel.from_pretrained(base, tmp_path / "0", adapter_name="edit")
    for number in (1, 0, 1):
        hotswap_adapter(loaded, tmp_path / str(number), adapter_name="edit")
        assert torch.allclose(logits(loaded), logits(models[number]), atol=1e-5)


def test_stacking_by_cat_and_taking_away(tmp_path: Path) -> None:
    model = EditableModel(tiny_model("llama"), FTMConfig(layers=[0]))
    deltas = [random_factors(model, model.anatomy.down(i).path, 2, seed=i) for i in (0, 1)]
    loaded: Any = tiny_model("llama")
    for number, delta in enumerate(deltas):
        one, _ = edited("llama", lambda m, d=delta: [d])
        one.export_lora(tmp_path / str(number))
        if number:
            loaded.load_adapter(tmp_path / "1", adapter_name="edit-1")
        else:
            loaded = PeftModel.from_pretrained(loaded, tmp_path / "0", adapter_name="edit-0")
    loaded.add_weighted_adapter(["edit-0", "edit-1"], [1.0, 1.0], "sum", combination_type="cat")
    loaded.add_weighted_adapter(["edit-0", "edit-0"], [1.0, -1.0], "nothing", combination_type="cat")
    both, base = edited("llama", lambda m: deltas)
    loaded.set_adapter("sum")
    assert torch.allclose(logits(loaded), logits(both), atol=1e-5)
    loaded.set_adapter("nothing")
    assert torch.allclose(logits(loaded), logits(base), atol=1e-5)
    with torch.no_grad():
        rows = loaded(input_ids=PROBE.repeat(2, 1), adapter_names=["edit-0", "__base__"]).logits
    one, _ = edited("llama", lambda m: deltas[:1])
    assert torch.allclose(rows, torch.cat([logits(one), logits(base)]), atol=1e-5)


def test_the_same_edits_give_the_same_bytes(tmp_path: Path) -> None:
    model, _ = edited("gpt2", lambda m: [random_factors(m, m.anatomy.down(i).path, 1) for i in range(3)])
    model.export_lora(tmp_path / "a")
    model.export_lora(tmp_path / "b")
    model.export_lora(tmp_path / "b")  # over the first
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    model, _ = edited("gpt2", lambda m: [random_factors(m, m.anatomy.down(0).path, 1)])
    for wrong in ({"rank": 0}, {"rank": True}, {"target": "tgi"}, {"modules": ["transformer.wte"]}):
        with pytest.raises(ExportError):
            model.export_lora(tmp_path / "lora", **wrong)
    model.save_pretrained(tmp_path / "edits")
    with pytest.raises(ArtifactError, match="twice"):
        model.export_lora(tmp_path / "edits")
    model.base_model.save_pretrained(tmp_path / "model")
    with pytest.raises(ArtifactError, match="complete model"):
        model.export_lora(tmp_path / "model")
    model.rollback("all")
    with pytest.raises(ExportError, match="nothing to export"):
        model.export_lora(tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize(("family", "stored_transposed"), [("gpt2", True), ("llama", False)])
def test_how_the_base_stores_its_matrices_is_said(family: str, stored_transposed: bool, tmp_path: Path) -> None:
    """PEFT transposes for a Conv1D only if the config says so; it merges into the wrong places otherwise."""
    module = "transformer.h.1.attn.c_attn" if family == "gpt2" else "model.layers.1.mlp.up_proj"
    model, base = edited(family, lambda m: [random_factors(m, module, 2)])
    model.export_lora(tmp_path)
    assert json.loads((tmp_path / ADAPTER_CONFIG).read_text())["fan_in_fan_out"] is stored_transposed
    expected = get_weight(get_module(model.base_model, module))
    merged = PeftModel.from_pretrained(base, tmp_path).merge_and_unload()
    torch.testing.assert_close(get_weight(get_module(merged, module)), expected)

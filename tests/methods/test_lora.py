"""LoRA and AdaLoRA as edits: what they say, keep, undo and save, and that nothing of PEFT stays in the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_kedit import AdaLoRAConfig, EditableModel, EditRequest, LoRAConfig
from hf_kedit.engine.weights import get_module, model_digest
from hf_kedit.errors import ConfigError, EditFailedError, LayerError, RollbackError, UnsupportedModelError
from hf_kedit.methods.lora import ADAPTER, LoRA, injected, target_paths
from tests.golden_cases import load_model
from tests.methods.test_family import facts, neighbours, says
from tests.models import tiny_model

FACTS = [
    EditRequest(prompt="Mira Halvorsen plays the sport of", target_new="tennis", id="a"),
    EditRequest(prompt="The mother tongue of Tobias Renner is", target_new="Italian", id="b"),
]
# Families and what the attention's query and value are called in their first layer.
ATTENTION = {
    "gpt2": ["c_attn"],
    "gpt_neox": ["query_key_value"],
    "phi3": ["qkv_proj"],
    "opt": ["v_proj", "q_proj"],
    "gptj": ["v_proj", "q_proj"],
    "qwen3": ["q_proj", "v_proj"],
    "t5": ["q", "v"],
}


def everything(model: nn.Module) -> dict[str, Any]:
    """All that an edit must leave as it is: modules, flags, attributes and the generator."""
    return {
        "modules": [(n, id(m), m.training) for n, m in model.named_modules()],
        "parameters": [(n, id(p), p.requires_grad, p.grad is None) for n, p in model.named_parameters()],
        "attributes": sorted(model.__dict__),
        "config": model.config.to_dict(),
        "random": torch.get_rng_state().tolist(),
    }


@pytest.mark.parametrize("method", ["lora", "adalora"])
@pytest.mark.parametrize("name", ["kedit/world-gpt2", "kedit/world-llama"])
def test_it_says_the_new_object_and_everything_can_be_undone(method: str, name: str, tmp_path: Path) -> None:
    model = EditableModel.from_pretrained(name, method)
    digest, requests = model_digest(model.base_model), facts(3)
    assert not any(says(model, r.filled_prompt, r.target_new) for r in requests)
    ids = model.edit(requests, batch_size=1).ids
    assert all(says(model, r.filled_prompt, r.target_new) for r in requests)
    kept = [says(model, prompt, answer) for r in requests for prompt, answer in neighbours(r)]
    assert sum(kept) >= 0.8 * len(kept)
    for edit in model.edits:
        assert edit.diagnostics["target_probability_after"] > 0.9 > edit.diagnostics["target_probability_before"]

    model.save_pretrained(tmp_path / "edits")
    loaded = EditableModel.from_pretrained(tmp_path / "edits")
    assert model_digest(loaded.base_model) == model_digest(model.base_model) != digest
    for copy in (model, loaded):
        copy.rollback(ids[1])
        assert not says(copy, requests[1].filled_prompt, requests[1].target_new)
        assert says(copy, requests[2].filled_prompt, requests[2].target_new)
    assert model_digest(loaded.base_model) == model_digest(model.base_model)
    with model.disable_edits():
        assert model_digest(model.base_model) == digest
    model.rollback("all")
    assert model_digest(model.base_model) == digest


def test_a_batch_is_one_adapter() -> None:
    model = EditableModel.from_pretrained("kedit/world-gpt2", LoRAConfig(rows_per_step=3))
    requests = facts(3)
    ids = model.edit(requests).ids
    assert all(says(model, r.filled_prompt, r.target_new) for r in requests)
    ranks = {p.delta.left.shape[1] for a in model.ledger.accounts.values() for p in a.pieces}
    assert ranks == {8}, "the rank of the adapter, whatever the number of facts"
    with pytest.raises(RollbackError, match="together"):
        model.rollback(ids[0])


@pytest.mark.parametrize("config", [LoRAConfig(num_steps=3, lora_dropout=0.1), AdaLoRAConfig(num_steps=5)])
def test_nothing_of_it_stays_in_the_model(config: Any) -> None:
    model = EditableModel.from_pretrained("kedit/world-llama", config)
    model.base_model.train()
    before = everything(model.base_model)
    model.edit(facts(1))
    assert everything(model.base_model) == before

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    model._method.penalty = interrupted  # type: ignore[attr-defined]
    digest = model_digest(model.base_model)
    with pytest.raises(KeyboardInterrupt):
        model.edit(facts(1, start=1))
    assert everything(model.base_model) == before and model_digest(model.base_model) == digest


def test_the_weights_do_what_the_adapter_did() -> None:
    """Logits under PEFT's layers at the end of the training, and under the weights that the ledger wrote."""
    for config in (LoRAConfig(num_steps=6), AdaLoRAConfig(num_steps=6)):
        model = EditableModel.from_pretrained("kedit/world-gpt2", config)
        ids, seen = torch.tensor([[7, 8, 9, 10]]), []
        method = model._method
        factors = method.factors  # type: ignore[attr-defined]

        def looking(layer: Any, model: Any = model, factors: Any = factors, seen: Any = seen, ids: Any = ids) -> Any:
            with torch.no_grad():
                seen.append(model(input_ids=ids).logits)
            return factors(layer)

        method.factors = looking  # type: ignore[attr-defined]
        with torch.no_grad():
            original = model(input_ids=ids).logits
        model.edit(facts(1))
        with torch.no_grad():
            edited = model(input_ids=ids).logits
        assert (edited - seen[0]).abs().max() < 1e-4 < 3e-3 < (edited - original).abs().max()


def test_the_seed_decides_and_dropout_ends_with_the_training() -> None:
    totals = []
    for seed in (0, 0, 1):
        model = EditableModel.from_pretrained("kedit/world-gpt2", LoRAConfig(seed=seed, lora_dropout=0.2, num_steps=4))
        torch.manual_seed(len(totals))  # the caller's generator has no say
        model.edit(facts(1))
        totals.append(next(iter(model.ledger.accounts.values())).total)
        ids = torch.tensor([[7, 8, 9]])
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    assert torch.equal(totals[0], totals[1]) and not torch.equal(totals[0], totals[2])


def test_adalora_spends_its_rank_unevenly_and_within_its_budget() -> None:
    config = AdaLoRAConfig(target_modules=["attention", "down_proj"], rank=4, num_steps=20, stop_loss=None, lr=2e-3)
    model = EditableModel.from_pretrained("kedit/world-llama", config)
    model.edit(facts(1))
    ranks = [p.delta.left.shape[1] for a in model.ledger.accounts.values() for p in a.pieces]
    assert sum(ranks) <= 4 * len(model._method.edited_modules()), "the mean rank is at most the one that was asked for"
    assert max(ranks) > 4 and len(set(ranks)) > 1, "it was shared out by importance"


def test_adalora_keeps_its_bases_orthogonal() -> None:
    found = []
    for weight in (0.0, 2.0):
        config = AdaLoRAConfig(orth_reg_weight=weight, num_steps=25, stop_loss=None)
        model = EditableModel.from_pretrained("kedit/world-gpt2", config)
        method, gaps = model._method, []
        factors = method.factors  # type: ignore[attr-defined]

        def measuring(layer: Any, factors: Any = factors, gaps: Any = gaps) -> Any:
            q = layer.lora_A[ADAPTER].detach()
            gaps.append(float((q @ q.T - torch.eye(len(q))).norm()))
            return factors(layer)

        method.factors = measuring  # type: ignore[attr-defined]
        model.edit(facts(1))
        found.append(sum(gaps))
    assert found[1] < 0.7 * found[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adalora_trains_no_count_of_ranks(dtype: torch.dtype) -> None:
    """PEFT copies its layers to the base's device and dtype, and what it copies comes back trainable."""
    model = EditableModel.from_pretrained("kedit/world-gpt2", AdaLoRAConfig(rank=4), dtype=dtype)
    paths = model._method.edited_modules()
    with injected(model.base_model, model._method.peft_config(paths, 9), paths) as tuner:  # type: ignore[attr-defined]
        trained = {name.rsplit(".", 2)[-2] for name, p in tuner.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B", "lora_E"}


@pytest.mark.parametrize("family", ATTENTION)
def test_the_attention_is_found_by_structure(family: str) -> None:
    _, tokenizer = load_model("llama")
    model = tiny_model(family, vocab_size=max(len(tokenizer), 420))
    editable = EditableModel(model, LoRAConfig(num_steps=4, layers=[0, -1]), tokenizer)
    paths = editable._method.edited_modules()
    assert [p.rsplit(".", 1)[-1] for p in paths] == ATTENTION[family] * 2
    digest = model_digest(model)
    losses = editable.edit(FACTS[0]).edits[0].diagnostics["loss"]
    assert losses[-1] < losses[0]
    assert set(editable.ledger.accounts) == {f"{p}.weight" for p in paths}
    editable.rollback("all")
    assert model_digest(model) == digest


def test_half_precision_trains_in_single() -> None:
    model = EditableModel.from_pretrained("kedit/world-llama", "lora", dtype=torch.bfloat16)
    digest = model_digest(model.base_model)
    path = model._method.edited_modules()[0]
    with injected(model.base_model, model._method.peft_config([path], 1), [path]):  # type: ignore[attr-defined]
        assert get_module(model.base_model, path).lora_A[ADAPTER].weight.dtype == torch.float32
    request = facts(1)[0]
    model.edit(request)
    assert says(model, request.filled_prompt, request.target_new)
    model.rollback("all")
    assert model_digest(model.base_model) == digest


def test_what_cannot_work_is_said_before_anything_changes() -> None:
    model = EditableModel.from_pretrained("kedit/world-gpt2", LoRAConfig(target_modules=["q_proj"]))
    digest = model_digest(model.base_model)
    with pytest.raises(LayerError, match=r"q_proj.*\n.*attn.c_attn"):
        model.edit(facts(1))
    model.set_method(LoRAConfig(lr=1e30))
    with pytest.raises(EditFailedError):
        model.edit(facts(1))
    assert model_digest(model.base_model) == digest and not model.edits
    for wrong in ({"rank": 0}, {"lora_dropout": 1.0}, {"target_modules": []}, {"stop_loss": 0.0}):
        with pytest.raises(ConfigError):
            LoRAConfig(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="leave no steps"):
        AdaLoRAConfig(warmup=0.5, cooldown=0.5)


def test_a_model_with_an_adapter_is_refused() -> None:
    model, tokenizer = load_model("llama")
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    editable = EditableModel(adapted, LoRAConfig(num_steps=2), tokenizer)
    with pytest.raises(UnsupportedModelError, match="merge"):
        editable.edit(FACTS)


def test_names_match_whole_components_only() -> None:
    model = EditableModel.from_pretrained("kedit/world-gpt2", LoRAConfig(target_modules=["c_proj"]))
    assert isinstance(model._method, LoRA)
    both = target_paths(model.anatomy, [0], ["c_proj"])
    assert [p.rsplit(".", 2)[-2] for p in both] == ["attn", "mlp"]
    assert target_paths(model.anatomy, [0], ["mlp.c_proj"]) == both[1:]
    with pytest.raises(LayerError):
        target_paths(model.anatomy, [0], ["proj"])

"""Single experts of mixtures: linear memories that are edited, undone, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_kedit import (
    AlphaEditConfig,
    EditableModel,
    EMMETConfig,
    FTMConfig,
    KNConfig,
    MEMITConfig,
    PMETConfig,
    ROMEConfig,
)
from hf_kedit.anatomy import check_anatomy, resolve_anatomy
from hf_kedit.anatomy.experts import expert_keys, routing_of
from hf_kedit.engine.capture import Tap, capture_at, listen
from hf_kedit.engine.forward import frozen_eval, model_inputs
from hf_kedit.engine.replay import added_at
from hf_kedit.engine.rows import rewrite_row
from hf_kedit.engine.weights import get_module, get_weight, model_digest, set_weight
from hf_kedit.errors import ConfigError, LayerError, UnsupportedModelError
from hf_kedit.tokens import pad_rows
from tests.models import tiny_model
from tests.test_families import FACTS, build, residual_ratios

BANKS = ["mixtral", "qwen3_moe", "gpt_oss", "qwen2_moe", "deepseek_v3"]
ROME: dict[str, Any] = {
    "layers": [1],
    "v_num_grad_steps": 10,
    "v_lr": 0.5,
    "v_weight_decay": 1e-3,
    "clamp_norm_factor": 4,
    "context_templates": ["{}", "The city is old. {}"],
    "expert_policy": "top1",
}
MEMIT = ROME | {"layers": [1, 2], "context_templates": [["{}"], ["The city is old. {}"]]}
TEXTS = [f"{a} {b} said that the {c} of {b} was old." for a in "ABCDEF" for b in "GHIJ" for c in ("house", "city")]


def with_corpus(family: str, config: Any) -> EditableModel:
    made = build(family, config)
    return EditableModel(made.base_model, config, made.tokenizer, corpus=TEXTS)


def logits(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits


@pytest.mark.parametrize("family", BANKS)
def test_a_bank_is_the_sum_of_its_experts(family: str) -> None:
    model = tiny_model(family)
    anatomy = check_anatomy(model, resolve_anatomy(model))
    bank = anatomy.layer(1).experts
    assert bank is not None and bank.linear and bank.residual_scale is not None
    batch = pad_rows([list(range(5, 17)), list(range(20, 29))])
    taps = [Tap(bank.down(e).path, kind) for e in range(bank.num_experts) for kind in ("input", "output")]
    seen: dict[Tap, torch.Tensor] = {}
    calls: list[Any] = []
    module = model.get_submodule(bank.path)
    handle = module.register_forward_hook(lambda m, a, k, o: calls.append((routing_of(a, k), o)), with_kwargs=True)
    with torch.no_grad(), listen(model, taps, lambda tap, state: seen.__setitem__(tap, state.clone())):
        watched = model(**model_inputs(model, batch)).logits
    handle.remove()
    routing, output = calls[0]
    total = sum(seen[tap] for tap in taps if tap.kind == "output")
    for e in range(bank.num_experts):
        routed = (routing.experts == e).any(dim=1)
        keys = seen[Tap(bank.down(e).path, "input")]
        assert torch.equal((keys != 0).any(dim=1), routed), "a key is zero exactly where a token goes elsewhere"
        if module.has_bias:
            weight = (routing.weights * (routing.experts == e)).sum(dim=1, keepdim=True)
            total = total + weight * module.down_proj_bias[e]
    assert torch.allclose(total, output, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(watched, model(**model_inputs(model, batch)).logits), "looking changes nothing"
    assert not module._forward_hooks and not module._forward_pre_hooks


def test_what_is_added_to_an_expert_reaches_the_bank() -> None:
    model = tiny_model("mixtral")
    bank = resolve_anatomy(model).layer(1).experts
    assert bank is not None
    batch, at = pad_rows([list(range(5, 15)), list(range(30, 40))]), torch.tensor([3, 6])
    offset = torch.randn(2, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    gradients = []
    for site in (bank.down(2).path, bank.path):
        with frozen_eval(model), added_at(model, [site], {site: offset}, at, 2):
            out = model(**model_inputs(model, batch)).logits
        gradients.append((out, *torch.autograd.grad(out.square().sum(), offset)))
    for slices, whole in zip(*gradients, strict=True):
        assert torch.allclose(slices, whole, atol=1e-4)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_slice_is_read_and_written_in_functional_orientation(family: str) -> None:
    model = tiny_model(family)
    bank = resolve_anatomy(model).layer(0).experts
    assert bank is not None
    before = model.get_parameter(f"{bank.path}.down_proj").detach().clone()
    owner = get_module(model, bank.down(3).path)
    value = get_weight(owner)
    assert value.shape == (32, bank.in_features)
    stored = before[3].t() if bank.transposed else before[3]
    assert torch.equal(value, stored)
    set_weight(owner, value + 1)
    after = model.get_parameter(f"{bank.path}.down_proj").detach()
    assert torch.equal(after[3], before[3] + 1) and torch.equal(after[:3], before[:3])
    with pytest.raises(LayerError, match="experts 0 … 3"):
        get_module(model, bank.down(4).path)


@pytest.mark.parametrize("family", BANKS)
def test_rome_puts_a_fact_into_the_expert_that_reads_it(family: str) -> None:
    model = build(family, ROMEConfig(**ROME, mom2_adjustment=False))
    before = {n: p.detach().clone() for n, p in model.base_model.named_parameters()}
    digest, fingerprint = model_digest(model.base_model), model.base_fingerprint()
    model.trace = {}
    (edit,) = model.edit(FACTS[0]).edits
    (account,) = model.ledger.accounts.values()
    expert = edit.diagnostics["experts"]["1"]
    assert account.module.endswith(f"experts.down_proj[{expert['expert']}]") and 0 < expert["routed"] <= 1
    name = account.module.rsplit("[", 1)[0]
    for key, parameter in model.base_model.named_parameters():
        changed = (parameter != before[key]).nonzero()[:, 0].unique().tolist()
        assert changed == ([expert["expert"]] if key == name else []), key
    row = rewrite_row(model.tokenizer, FACTS[0], "{}")
    tap = Tap(account.module)
    reached = capture_at(model.base_model, pad_rows([row.ids]), torch.tensor([row.fact]), [tap])[tap][0]
    assert torch.allclose(reached, model.trace["v_star.0"], atol=1e-3), "the expert must now give v*"
    assert edit.diagnostics["loss"][-1] < edit.diagnostics["loss"][0]
    assert model.ledger.base_fingerprint() == fingerprint != model.fingerprint()
    model.rollback("all")
    assert model_digest(model.base_model) == digest


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen3_moe"])
@pytest.mark.parametrize("kind", [MEMITConfig, AlphaEditConfig, EMMETConfig])
def test_a_batch_is_spread_over_the_experts_of_its_facts(family: str, kind: Any, tmp_path: Path) -> None:
    values = {AlphaEditConfig: {"L2": 1e-4, "nullspace_fraction": 0.5}, EMMETConfig: {"mom2_update_weight": 1.0}}
    layers = {EMMETConfig: [1]}.get(kind, MEMIT["layers"])
    model = with_corpus(family, kind(**MEMIT | {"layers": layers}, **values.get(kind, {"mom2_update_weight": 0.01})))
    digest = model_digest(model.base_model)
    model.trace = {}
    edits = model.edit(FACTS).edits
    found = [edit.diagnostics["residual_ratio"] for edit in edits]
    assert found == pytest.approx(residual_ratios(model, layers[-1]), rel=1e-2, abs=1e-5) and max(found) < 0.9
    written = {
        model.anatomy.layer(int(layer)).experts.down(found["expert"]).path
        for edit in edits
        for layer, found in edit.diagnostics["experts"].items()
    }
    assert {a.module for a in model.ledger.accounts.values()} == written
    ids = model.tokenizer(FACTS[0].filled_prompt)["input_ids"]
    edited = logits(model, ids)

    model.save_pretrained(tmp_path / "edits")
    fresh = build(family, "ft-m")
    assert not torch.allclose(logits(fresh.base_model, ids), edited)
    again = EditableModel.from_pretrained(tmp_path / "edits", base_model=fresh.base_model, tokenizer=model.tokenizer)
    assert torch.equal(logits(again, ids), edited)
    again.rollback("a")
    again.rollback("b")
    model.rollback("b")
    model.rollback("a")
    assert model_digest(model.base_model) == digest == model_digest(again.base_model)


def test_fine_tuning_of_two_experts() -> None:
    experts = ["model.layers.{}.mlp.experts.down_proj[0]", "model.layers.{}.mlp.experts.down_proj[2]"]
    model = build("gpt_oss", FTMConfig(layers=[1], lr=1e-2, num_steps=10, modules=experts))
    digest = model_digest(model.base_model)
    losses = model.edit(FACTS[0]).edits[0].diagnostics["loss"]
    assert losses[-1] < losses[0] and len(model.ledger.accounts) == 2
    model.rollback("all")
    assert model_digest(model.base_model) == digest


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_fine_tuning_of_the_expert_that_reads_the_answer(family: str, tmp_path: Path) -> None:
    """Each fact trains one expert of the bank, the others keep their bits; saved, loaded, undone."""
    model = build(family, FTMConfig(layers=[1], lr=1e-2, num_steps=5, expert_policy="top1"))
    digest, ids = model_digest(model.base_model), [5, 6, 7, 8]
    before = logits(model, ids)
    bank = model.anatomy.layer(1).experts
    old = get_module(model.base_model, bank.path).down_proj.detach().clone()
    for edit in model.edit(FACTS).edits:
        assert edit.diagnostics["loss"][-1] < edit.diagnostics["loss"][0]
    new = get_module(model.base_model, bank.path).down_proj.detach()
    changed = {e for e in range(bank.num_experts) if not torch.equal(old[e], new[e])}
    assert changed == {int(a.module.rpartition("[")[2][:-1]) for a in model.ledger.accounts.values()}
    assert 1 <= len(changed) <= len(FACTS) < bank.num_experts
    model.save_pretrained(tmp_path)
    loaded = EditableModel.from_pretrained(
        tmp_path, base_model=build(family, "ft-m").base_model, tokenizer=model.tokenizer
    )
    assert torch.equal(logits(loaded, ids), logits(model, ids)) and not torch.equal(logits(model, ids), before)
    model.rollback("all")
    assert model_digest(model.base_model) == digest


def test_second_moments_are_those_of_what_an_expert_reads() -> None:
    model = with_corpus("mixtral", ROMEConfig(**ROME))
    bank = model.anatomy.layer(1).experts
    assert bank is not None
    paths = [bank.down(e).path for e in range(bank.num_experts)]
    found = model.statistics.moments(paths)
    rows = [model.tokenizer(text)["input_ids"] for text in TEXTS]
    totals = torch.zeros(bank.num_experts, bank.in_features, bank.in_features, dtype=torch.float64)
    module = model.base_model.get_submodule(bank.path)

    def add(owner: Any, args: Any, kwargs: Any) -> None:
        routing = routing_of(args, kwargs)
        assert routing is not None
        for e in range(bank.num_experts):
            keys = expert_keys(owner, routing, e).double()
            totals[e] += keys.T @ keys

    handle = module.register_forward_pre_hook(add, with_kwargs=True)
    for row in rows:
        logits(model.base_model, row)
    handle.remove()
    for e, path in enumerate(paths):
        assert found[path].count == sum(map(len, rows))
        assert torch.allclose(found[path].total, totals[e], rtol=1e-4, atol=1e-5)


def test_where_single_experts_cannot_be_edited() -> None:
    with pytest.raises(ConfigError, match="expert_policy"):
        PMETConfig(expert_policy="top1")
    model = build("mixtral", ROMEConfig(**ROME | {"expert_policy": "shared"}, mom2_adjustment=False))
    with pytest.raises(UnsupportedModelError, match="expert_policy='top1'"):
        model.edit(FACTS[0])
    model.set_method(KNConfig())
    with pytest.raises(UnsupportedModelError, match="mixture of experts"):
        model.edit(FACTS[0].with_id("k"))

    base = tiny_model("mixtral", vocab_size=model.base_model.config.vocab_size)
    for layer in base.model.layers:  # experts that do something else with what they read
        layer.mlp.experts._apply_gate = lambda up: up.chunk(2, dim=-1)[0]
        layer.mlp.experts.register_forward_hook(lambda m, a, o: o.tanh())
    odd = EditableModel(base, ROMEConfig(**ROME, mom2_adjustment=False), model.tokenizer)
    with pytest.raises(UnsupportedModelError, match=r"layer 1 .* one by one.*experts does not compute"):
        odd.edit(FACTS[0])


def test_dense_layers_are_edited_as_ever_under_either_policy() -> None:
    changes = []
    for policy in ("shared", "top1"):
        model = build("llama", ROMEConfig(**ROME | {"expert_policy": policy}, mom2_adjustment=False))
        (edit,) = model.edit(FACTS[0]).edits
        assert "experts" not in edit.diagnostics
        changes.append(get_weight(get_module(model.base_model, model.anatomy.down(1).path)))
    assert torch.equal(*changes)

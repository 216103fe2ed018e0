"""UnKE and AnyEdit: long answers on the embedded world; states, chunks and updates against plain computations."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_kedit import AnyEditConfig, EditableModel, EditRequest, UnKEConfig
from hf_kedit.config import ModelProfile
from hf_kedit.config.easyedit import convert_hparams
from hf_kedit.engine.capture import ModuleCall, first
from hf_kedit.engine.forward import frozen_eval
from hf_kedit.engine.rows import Row
from hf_kedit.engine.weights import get_weight, model_digest
from hf_kedit.errors import ConfigError, EditFailedError, TargetTooLongError
from hf_kedit.methods.anyedit import AnyEdit
from hf_kedit.methods.unke import UnKE
from hf_kedit.tokens import encode_pair, pad_rows
from hf_kedit.values.optimise import optimise_values
from hf_kedit.values.settings import ValueSettings
from tests.methods.test_family import facts, neighbours, says
from tests.models import tiny_model

MODELS = ("kedit/world-gpt2", "kedit/world-llama")
LONG = {
    "prompt": "Q: What is known of Tarosk Boayond? A:",
    "target_new": "The favourite sport of Famoul Droanos is rowing. He works for Geten. The home town of Drutusk"
    " Poabro is Noget. Fulex Moflu is a native of Rabriport.",
}


@pytest.mark.parametrize("name", [MODELS[0], pytest.param(MODELS[1], marks=pytest.mark.slow)])
def test_unke_says_the_new_object_and_changes_one_layer(name: str, tmp_path: Path) -> None:
    model = EditableModel.from_pretrained(name, "unke")
    digest = model_digest(model.base_model)
    before = {n: p.clone() for n, p in model.base_model.named_parameters()}
    request = facts(1)[0]
    assert not says(model, request.filled_prompt, request.target_new)
    (edit,) = model.edit(request).edits
    assert says(model, request.filled_prompt, request.target_new)
    kept = [says(model, prompt, answer) for prompt, answer in neighbours(request)]
    assert sum(kept) >= len(kept) - 1
    numbers = edit.diagnostics
    assert numbers["target_probability_after"] > 0.7 > 0.1 > numbers["target_probability_before"]
    assert 0 < numbers["residual_ratio"] < 0.5 < numbers["value_probability"]
    changed = {n for n, p in model.base_model.named_parameters() if not torch.equal(p, before[n])}
    block = model.anatomy.block(3)
    assert changed == {n for n, p in before.items() if n.startswith(f"{block}.") and p.dim() == 2}

    logits = model(input_ids=torch.tensor([[5, 6, 7]])).logits
    model.save_pretrained(tmp_path / "edits")
    torch.save(logits, tmp_path / "logits.pt")
    code = (
        "import torch, hf_kedit; m = hf_kedit.EditableModel.from_pretrained('edits');"
        "assert torch.equal(m(input_ids=torch.tensor([[5, 6, 7]])).logits, torch.load('logits.pt'));"
        "assert m.edit_config.edit_type == 'unke'"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    model.rollback("all")
    assert model_digest(model.base_model) == digest


@pytest.mark.parametrize("base", ["unke", "memit", pytest.param("alphaedit", marks=pytest.mark.slow)])
def test_anyedit_teaches_a_text_chunk_by_chunk(base: str, tmp_path: Path) -> None:
    """Thirty tokens, beside a second text, which is taken back where every column has an owner."""
    config = AnyEditConfig(base=base, window_size=4)
    if base == "alphaedit":
        config.base |= {"nullspace_fraction": 0.9}
    model = EditableModel.from_pretrained("kedit/world-llama", config)
    digest = model_digest(model.base_model)
    pair = encode_pair(model.tokenizer, LONG["prompt"], LONG["target_new"])
    assert len(pair.target_ids) >= 30
    result = model.edit([{**LONG, "id": "long"}, {**LONG, "prompt": "Q: Who is Gokelm? A:", "id": "other"}])
    numbers = result.edits[0].diagnostics
    assert numbers["chunks"] == -(-len(pair.target_ids) // 4)
    assert numbers["target_probability_after"] > 1.5 * numbers["target_probability_before"]
    assert 0 < numbers["residual_ratio"] < 1
    assert numbers["target_probability_after"] > 0.5 or base != "unke"
    logits = model(input_ids=torch.tensor([[5, 6, 7]])).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(EditableModel.from_pretrained(tmp_path)(input_ids=torch.tensor([[5, 6, 7]])).logits, logits)
    if base != "unke":
        model.rollback("other")
        assert [edit.id for edit in model.edits] == ["long"]
    model.rollback("all")
    assert model_digest(model.base_model) == digest


# ---------------------------------------------------------------------- layers


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "opt", "qwen3", "phi3", "gpt_neox", "falcon"])
def test_a_module_is_called_again_as_its_model_calls_it(family: str) -> None:
    model = tiny_model(family)
    editable = EditableModel(model, UnKEConfig(), None)
    batch = pad_rows([[5, 6, 7, 8], [9, 10]])
    for layer in range(editable.anatomy.num_layers):
        block = editable.anatomy.block(layer)
        with frozen_eval(model), torch.no_grad():
            call = ModuleCall.of(model, block, batch)
            again = call.of_module(model.get_submodule(block))
            plain: list[torch.Tensor] = []
            hook = model.get_submodule(block).register_forward_hook(
                lambda _, __, out, plain=plain: plain.append(out[0] if isinstance(out, tuple) else out)
            )
            model(input_ids=torch.tensor([[5, 6, 7, 8]]))
            hook.remove()
        assert torch.equal(again[call.mask], call.output[call.mask])
        assert torch.allclose(call.output[0], plain[0].view(-1, call.output.shape[-1]), atol=1e-5)
        assert call.mask.tolist() == [[True] * 4, [True, True, False, False]]


def test_a_step_of_the_training_is_that_of_the_paper() -> None:
    """One step of AdamW on one layer, against the same written down with plain modules."""
    config = UnKEConfig(
        layers=[2], num_steps=1, lr=1e-2, weight_decay=0.05, held_texts=3, held_weight=2.0, train_vectors=True
    )
    model = EditableModel.from_pretrained("kedit/world-llama", replace(config, v_num_grad_steps=3, v_stop_loss=0.0))
    method = model._method
    assert isinstance(method, UnKE)
    request = EditRequest(**LONG)
    base, block = model.base_model, model.anatomy.block(2)
    with frozen_eval(base):
        (row,) = method._rows([request])
        values = method.values([[row]])
        held = method._held()
    assert len(held) == 3 and row.fact == row.prompt_length - 1

    other = EditableModel.from_pretrained("kedit/world-llama", "ft-m")
    layer = other.base_model.get_submodule(block)
    groups = [
        {"params": [p for p in layer.parameters() if p.dim() > 1], "weight_decay": 0.05},
        {"params": [p for p in layer.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    for parameter in layer.parameters():
        parameter.requires_grad_(True)
    optimiser = torch.optim.AdamW(groups, lr=1e-2)
    loss: Any = 0.0
    for rows, factor in (([row.ids[: row.prompt_length]], 1.0), (held, 2.0)):
        squares = []
        for ids in rows:
            outputs: list[torch.Tensor] = []
            hook = layer.register_forward_hook(lambda _, __, out, kept=outputs: kept.append(first(out)))
            other.base_model(input_ids=torch.tensor([list(ids)]))
            hook.remove()
            states = outputs[0].view(len(ids), -1)
            wanted = states.detach().clone()
            if factor == 1.0:
                wanted[-1] = values.value[0]
            squares.append((states - wanted).square().mean(-1))
        loss = loss + factor * torch.cat(squares).mean()
    loss.backward()
    optimiser.step()

    model.edit(request)
    for name, parameter in layer.named_parameters():
        found = base.get_submodule(block).get_parameter(name)
        # Adam divides by the gradient's size: entries whose gradient is rounding alone may go either way
        assert ((found - parameter).abs() > 1e-4).float().mean() < 5e-3, name
    for parameter in layer.parameters():
        parameter.requires_grad_(False)


@pytest.mark.slow
def test_several_layers_share_what_is_missing() -> None:
    one, two = (
        EditableModel.from_pretrained(
            "kedit/world-llama", UnKEConfig(layers=layers, num_steps=60, stop_probability=None, drift_bound=None)
        )
        for layers in ([3], [2, 3])
    )
    request = facts(1)[0]
    for model in (one, two):
        assert model.edit(request).edits[0].diagnostics["residual_ratio"] < 0.2
    touched = {key.split(".self_attn")[0].split(".mlp")[0] for key in two.ledger.accounts if "norm" not in key}
    assert touched == {two.anatomy.block(2), two.anatomy.block(3)}


def test_training_ends_within_the_bound() -> None:
    usual = {"held_texts": 0, "num_steps": 60, "stop_probability": None, "lr": 3e-3}
    for bound in (1.0, 1e-3):
        model = EditableModel.from_pretrained("kedit/world-llama", UnKEConfig(drift_bound=bound, **usual))
        drift = model.edit(facts(1)[0]).edits[0].diagnostics["drift"]
        assert (drift > 1e-3) == (bound == 1.0) and drift <= bound


# ---------------------------------------------------------------------- chunks


def _chunks(window: int, objective: Any = "window") -> tuple[EditableModel, AnyEdit, Row, list[Row]]:
    model = EditableModel.from_pretrained("kedit/world-llama", AnyEditConfig(window_size=window, objective=objective))
    method = model._method
    assert isinstance(method, AnyEdit)
    (row,) = method._rows([EditRequest(**LONG)])
    return model, method, row, method._chunks(row)


def test_chunks_cover_the_answer_once() -> None:
    _, _, row, chunks = _chunks(7)
    assert sum((chunk.targets for chunk in chunks), ()) == row.targets
    assert sum((chunk.positions for chunk in chunks), ()) == row.positions
    assert {len(chunk.targets) for chunk in chunks[:-1]} == {7}
    for chunk in chunks:
        assert chunk.fact == chunk.positions[0] and len(chunk.ids) == chunk.positions[-1] + 1
        assert chunk.ids == row.ids[: len(chunk.ids)]


def test_a_state_is_optimised_with_those_before_it_in_place() -> None:
    """The loss at δ = 0 of the second chunk is that of a model to whose block the first δ is added."""
    model, method, _, chunks = _chunks(7)
    base = model.base_model
    with frozen_eval(base):
        values = method._values([chunks])[0]
        assert len(values) == len(chunks)
        block = base.get_submodule(model.anatomy.block(method.base.layers[-1]))

        def add(_: Any, __: Any, output: Any) -> Any:
            states = (output[0] if isinstance(output, tuple) else output).clone()
            for chunk, value in zip(chunks[:1], values, strict=False):
                states[0, chunk.fact] += value.offset[0]
            return (states, *output[1:]) if isinstance(output, tuple) else states

        hook = block.register_forward_hook(add)
        with torch.no_grad():
            log_p = base(input_ids=torch.tensor([chunks[1].ids])).logits[0].log_softmax(-1)
        hook.remove()
    nll = -sum(log_p[p, t].item() for p, t in zip(chunks[1].positions, chunks[1].targets, strict=True)) / 7
    assert values[1].loss[0][0][0] == pytest.approx(nll, rel=1e-4)
    assert values[0].offset.norm() > 0


def test_matryoshka_counts_what_follows_as_nested_targets() -> None:
    model, _, row, chunks = _chunks(7, "matryoshka")
    count = len(chunks)
    for k, chunk in enumerate(chunks):
        assert chunk.ids == row.ids and chunk.targets == row.targets[7 * k :]
        nested = [0.0] * len(chunk.targets)
        for end in [min(7 * (i + 1), len(row.targets)) - 7 * k for i in range(k, count)]:
            nested = [w + (j < end) / (count - k) for j, w in enumerate(nested)]
        assert chunk.weights == pytest.approx(nested)
    # and the engine weighs its loss so
    with frozen_eval(model.base_model), torch.no_grad():
        log_p = model.base_model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
        settings = ValueSettings(steps=1, lr=0.5, weight_decay=0.0, clamp=1.0, kl_factor=0.0)
        found = optimise_values(model.base_model, model.anatomy, [[chunks[1]]], 3, "block", settings)
    terms = zip(chunks[1].weights, chunks[1].positions, chunks[1].targets, strict=True)
    wanted = -sum(w * log_p[p, t].item() for w, p, t in terms) / len(chunks[1].targets)
    assert found.loss[0][0][0] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("hold", [True, False])
def test_the_update_of_matrices_is_memits_with_the_other_tokens_held(hold: bool) -> None:
    """``R Kᵀ (λ C + K_o K_oᵀ + K Kᵀ)⁻¹`` in float64, one layer."""
    base = {"edit_type": "memit", "layers": [2], "v_num_grad_steps": 4, "mom2_update_weight": 50.0}
    base |= {"keep_edited_keys": False}
    model = EditableModel.from_pretrained("kedit/world-llama", AnyEditConfig(base=base, window_size=9, hold_text=hold))
    method, tokenizer = model._method, model.tokenizer
    assert isinstance(method, AnyEdit) and tokenizer is not None
    down = model.anatomy.down(2).path
    module = model.base_model.get_submodule(down)
    (row,) = method._rows([EditRequest(**LONG)])
    chunks = method._chunks(row)
    original = get_weight(module)
    method.prepare()
    with frozen_eval(model.base_model):
        values = method._values([chunks])[0]
    with frozen_eval(model.base_model), torch.no_grad():
        seen: list[torch.Tensor] = []
        hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].double()))
        model.base_model(input_ids=torch.tensor([row.ids]))
        hook.remove()
    anchors = [chunk.fact for chunk in chunks]
    others = [i for i in range(len(row.ids)) if i not in anchors]
    k, rest = seen[0][anchors].T, seen[0][others].T
    moment = method.bench.statistics.estimate(down).double()
    system = 50.0 * moment + k @ k.T + (rest @ rest.T if hold else 0)
    r = torch.cat([v.offset for v in values]).double().T
    expected = r @ torch.linalg.solve(system, k).T
    model.edit(EditRequest(**LONG))
    found = (get_weight(module) - original).double()
    assert (found - expected).norm() < 2e-3 * expected.norm()


# ---------------------------------------------------------------------- what cannot work


@pytest.mark.parametrize("method", ["unke", "anyedit"])
def test_a_failure_half_way_changes_nothing(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = EditableModel.from_pretrained("kedit/world-gpt2", method)
    digest = model_digest(model.base_model)
    with pytest.raises(TargetTooLongError):
        model.edit(prompt="Tarosk Boayond", target_new="plumber " * 2000)

    def fails(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_kedit.methods.unke.target_probabilities", fails)
    with pytest.raises(KeyboardInterrupt):
        model.edit(**LONG)
    monkeypatch.undo()
    settings = UnKEConfig(lr=1e30, layers=[3])
    model.set_method(settings if method == "unke" else AnyEditConfig(base=settings))
    with pytest.raises(EditFailedError):
        model.edit(**LONG)
    assert model_digest(model.base_model) == digest and not model.edits
    assert all(not p.requires_grad or p.grad is None for p in model.base_model.parameters())


def test_bad_values() -> None:
    for wrong in ({"lr": 0.0}, {"held_texts": -1}, {"held_weight": 0.0}, {"num_steps": 0}):
        with pytest.raises(ConfigError):
            UnKEConfig(**wrong)  # type: ignore[arg-type]
    for wrong in ({"base": "rome"}, {"base": {"edit_type": "memit", "sequence": "joint"}}, {"window_size": 0}):
        with pytest.raises(ConfigError):
            AnyEditConfig(**wrong)  # type: ignore[arg-type]
    assert AnyEditConfig(layers=[1]).base == {"edit_type": "unke", "layers": [1]}
    with pytest.raises(ConfigError, match="names other layers"):
        AnyEditConfig(layers=[1], base=UnKEConfig(layers=[2]))


def test_chunks_have_derived_settings_of_their_own() -> None:
    profile = ModelProfile("somebody/new-model", 30, 576)
    config = AnyEditConfig().complete(profile)
    alone = UnKEConfig().complete(profile)
    assert config.window_size == 8 and config.base["held_weight"] == 4.0 and alone.held_weight == 30.0
    assert {**config.base, "held_weight": 30.0} == {**alone.to_dict(), **{"seed": config.base["seed"]}}
    mine = AnyEditConfig(window_size=30, base=UnKEConfig(held_weight=2.0, layers=[3])).complete(profile)
    assert (mine.window_size, mine.base["held_weight"], mine.base["layers"]) == (30, 2.0, [3])
    assert "held_weight" not in AnyEditConfig(base="memit").complete(profile).base


def test_files_of_easyedit_are_read() -> None:
    source = {"model_name": "x", "layers": [7], "lr": "2e-4", "v_lr": 0.5, "optim_num_step": 50, "ex_data_num": 20}
    source |= {"clamp_norm_factor": 4, "v_loss_layer": 31, "fact_token": "last"}
    converted = convert_hparams({**source, "alg_name": "unke"})
    config = converted.config
    assert isinstance(config, UnKEConfig)
    assert (config.layers, config.lr, config.num_steps, config.held_texts, config.weight_decay) == (
        [7], 2e-4, 50, 20, 0.01,
    )  # fmt: skip
    assert {"v_loss_layer", "fact_token"} <= converted.ignored.keys()
    chunked = convert_hparams({**source, "alg_name": "unke_ARE", "window_size": 40, "overlap": 0}).config
    assert isinstance(chunked, AnyEditConfig) and chunked.window_size == 40
    assert chunked.base["edit_type"] == "unke" and chunked.base["num_steps"] == 50
    assert convert_hparams({"alg_name": "FT_uns", "layers": [3]}).config.edit_type == "ft-m"
    assert math.isclose(convert_hparams({"alg_name": "LoRA_uns", "lr": 1e-3}).config.lr, 1e-3)

"""The relatives of ROME and MEMIT on the embedded models: what they change, keep, undo and save."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_kedit import (
    AlphaEditConfig,
    AutoEditConfig,
    COREConfig,
    EditableModel,
    EditRequest,
    EMMETConfig,
    FTMConfig,
    MEMITConfig,
    NAMETConfig,
    PMETConfig,
    RROMEConfig,
    load_edit_dataset,
)
from hf_kedit.artifact.layout import CONFIG, WEIGHTS
from hf_kedit.config import EditConfig, ModelProfile
from hf_kedit.engine.weights import get_module, get_weight, model_digest
from hf_kedit.errors import ArtifactError, ConfigError, RequestError, RollbackError, StatisticsError
from hf_kedit.methods.memit import MEMIT
from hf_kedit.statistics.moments import SecondMoment
from hf_kedit.tokens import encode_pair

MODELS = ("kedit/world-gpt2", "kedit/world-llama")
METHODS = ("r-rome", "emmet", "pmet", "alphaedit", "sphere", "memit-fe", "core", "eamet", "namet")
BATCH_METHODS = METHODS[1:]


def facts(count: int, start: int = 0) -> list[EditRequest]:
    rows = load_edit_dataset("world", split="test", limit=start + count)
    return [EditRequest.from_dict(rows[i]) for i in range(start, start + count)]


def says(model: EditableModel, prompt: str, answer: str) -> bool:
    """Whether every token of the answer is the model's first choice."""
    pair = encode_pair(model.tokenizer, prompt, answer)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([pair.ids])).logits[0]
    first = pair.prompt_length - 1
    return logits[first:-1].argmax(-1).tolist() == list(pair.target_ids)


def neighbours(request: EditRequest) -> list[tuple[str, str]]:
    """Prompts of the same relation about other people, with the answer before the edit."""
    return [(p.prompt, p.ground_truth[0][0]) for p in request.locality["Neighborhood"]]


def deltas(model: EditableModel) -> dict[str, torch.Tensor]:
    return {k: a.total for k, a in model.ledger.accounts.items() if a.total is not None}


# ---------------------------------------------------------------------- every method


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_it_says_the_new_object_and_everything_can_be_undone(method: str, name: str, tmp_path: Path) -> None:
    model = EditableModel.from_pretrained(name, method)
    digest = model_digest(model.base_model)
    requests = facts(3)
    assert all(says(model, r.filled_prompt, r.ground_truth[0]) for r in requests)
    assert not any(says(model, r.filled_prompt, r.target_new) for r in requests)
    result = model.edit(requests)
    assert all(says(model, r.filled_prompt, r.target_new) for r in requests)
    kept = [says(model, prompt, answer) for r in requests for prompt, answer in neighbours(r)]
    assert sum(kept) >= len(kept) - 1
    for edit in result.edits:
        assert edit.diagnostics["target_probability_after"] > edit.diagnostics["target_probability_before"]
        json.dumps(edit.diagnostics)

    model.save_pretrained(tmp_path / "edits")
    loaded = EditableModel.from_pretrained(tmp_path / "edits")
    assert model_digest(loaded.base_model) == model_digest(model.base_model) != digest
    assert loaded.edit_config == model.edit_config

    for copy in (model, loaded):
        copy.rollback(result.ids[1])
        assert not says(copy, requests[1].filled_prompt, requests[1].target_new)
        assert says(copy, requests[0].filled_prompt, requests[0].target_new)
    assert model_digest(loaded.base_model) == model_digest(model.base_model)
    with model.disable_edits():
        assert model_digest(model.base_model) == digest
    model.rollback("all")
    assert model_digest(model.base_model) == digest


@pytest.mark.parametrize("method", BATCH_METHODS)
def test_a_batch_is_solved_together(method: str) -> None:
    model = EditableModel.from_pretrained("kedit/world-gpt2", method)
    requests = facts(4)
    model.edit(requests)
    one_by_one = EditableModel.from_pretrained("kedit/world-gpt2", method)
    one_by_one.edit(requests, batch_size=1)
    assert len({e.batch_id for e in model.edits}) == 1
    assert len({e.batch_id for e in one_by_one.edits}) == 4
    for model_ in (model, one_by_one):
        assert all(says(model_, r.filled_prompt, r.target_new) for r in requests)
        ranks = [p.delta.left.shape[1] for a in model_.ledger.accounts.values() for p in a.pieces]
        assert set(ranks) == ({4} if model_ is model else {1})
    assert any(not torch.equal(d, deltas(one_by_one)[k]) for k, d in deltas(model).items())


# ---------------------------------------------------------------------- R-ROME


def test_the_three_keys_of_r_rome() -> None:
    request = facts(1)[0]
    found = {}
    for method, config in {
        "rome": "rome",
        "as rome": RROMEConfig(key_mode="rome"),
        "mean": RROMEConfig(),
        "prompt": RROMEConfig(key_mode="prompt"),
    }.items():
        model = EditableModel.from_pretrained("kedit/world-gpt2", config)
        model.edit(request)
        (found[method],) = deltas(model).values()
    assert torch.equal(found["rome"], found["as rome"])
    for a, b in (("rome", "mean"), ("rome", "prompt"), ("mean", "prompt")):
        assert (found[a] - found[b]).norm() > 1e-3 * found[a].norm()


def test_p_rome_needs_a_key_of_the_subject() -> None:
    with pytest.raises(ConfigError, match="prompt"):
        RROMEConfig(key_mode="prompt", fact_token="last")


# ---------------------------------------------------------------------- EMMET


@pytest.mark.parametrize("count", [1, 3])
def test_emmet_stores_pairs_exactly_without_a_ridge(count: int) -> None:
    model = EditableModel.from_pretrained("kedit/world-llama", EMMETConfig(emmet_lambda=0.0))
    model.trace = {}
    model.edit(facts(count))
    (layer,) = model.edit_config.layers
    stored = model.trace[f"left.{layer}"].T @ model.trace[f"k_star.{layer}"]
    assert torch.allclose(stored, torch.eye(count), atol=1e-5)


def test_the_ridge_of_emmet_is_for_batches_only() -> None:
    alone = []
    for ridge in (0.0, 50.0):
        model = EditableModel.from_pretrained("kedit/world-gpt2", EMMETConfig(emmet_lambda=ridge))
        model.edit(facts(1))
        alone.append(deltas(model))
        model.edit(facts(2, start=1))
        alone.append(deltas(model))
    (key,) = alone[0]
    assert torch.equal(alone[0][key], alone[2][key])
    assert not torch.allclose(alone[1][key], alone[3][key], rtol=1e-2)


def test_emmet_can_penalise_the_size_of_the_update() -> None:
    norms = []
    for penalty in (0.0, 10.0):
        model = EditableModel.from_pretrained("kedit/world-gpt2", EMMETConfig(update_norm_lambda=penalty))
        model.edit(facts(2))
        norms.append(sum(float(d.norm()) for d in deltas(model).values()))
    assert norms[1] < norms[0]


# ---------------------------------------------------------------------- AlphaEdit


def test_alphaedit_keeps_the_facts_of_earlier_batches() -> None:
    model = EditableModel.from_pretrained("kedit/world-gpt2", "alphaedit")
    requests = facts(12)
    model.edit(requests, batch_size=3)
    assert len({e.batch_id for e in model.edits}) == 4
    assert sum(says(model, r.filled_prompt, r.target_new) for r in requests) >= 11
    for module in model._method.edited_modules():
        keys, space = model.ledger.keys(module), model._method.space(module).space
        assert keys is not None and keys.shape[1] == 12
        total = model.ledger.total(module).double()
        assert (space.project(total.T).T - total).norm() <= 1e-5 * total.norm()  # nothing outside the free directions


def test_later_batches_know_the_keys_of_earlier_ones() -> None:
    """The second batch moves what the first one stored less than a fresh batch would."""
    first, second = facts(4), facts(4, start=4)
    model = EditableModel.from_pretrained("kedit/world-llama", "alphaedit")
    model.edit(first)
    modules = model._method.edited_modules()
    before = {m: model.ledger.total(m) for m in modules}
    keys = {m: model.ledger.keys(m) for m in modules}
    model.edit(second)
    aware = {m: model.ledger.total(m) - before[m] for m in modules}

    model.rollback([e.id for e in model.edits[4:]])
    for account in model.ledger.accounts.values():
        for piece in account.pieces:
            piece.delta.keys = None
    model.edit(second)
    for m in modules:
        blind = model.ledger.total(m) - before[m]
        assert (aware[m] @ keys[m]).norm() < 0.9 * (blind @ keys[m]).norm()


@pytest.mark.parametrize("method", ["alphaedit", "memit"])
def test_rolling_back_takes_the_keys_away_too(method: str) -> None:
    model = EditableModel.from_pretrained("kedit/world-gpt2", method)
    first, second = facts(3), facts(2, start=3)
    ids = model.edit(first).ids
    (module, *_) = model._method.edited_modules()
    keys = model.ledger.keys(module)
    model.rollback(ids[1])
    assert torch.equal(model.ledger.keys(module), keys[:, [0, 2]])
    model.rollback("all")
    assert model.ledger.keys(module) is None

    model.edit(second)
    fresh = EditableModel.from_pretrained("kedit/world-gpt2", method)
    fresh.edit(second)
    assert model_digest(model.base_model) == model_digest(fresh.base_model)


@pytest.mark.parametrize("method", ["alphaedit", "memit"])
def test_a_failed_call_leaves_no_keys(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = EditableModel.from_pretrained("kedit/world-gpt2", method)
    (module, *_) = model._method.edited_modules()
    compute, calls = model._method.compute, []

    def failing(requests: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return compute(requests)

    monkeypatch.setattr(model._method, "compute", failing)
    with pytest.raises(KeyboardInterrupt):
        model.edit(facts(4), batch_size=2)
    assert len(calls) == 2 and model.ledger.keys(module) is None and not model.edits


@pytest.mark.parametrize("config", ["alphaedit", "memit"])
def test_keys_survive_saving_and_a_change_of_method(config: Any, tmp_path: Path) -> None:
    model = EditableModel.from_pretrained("kedit/world-gpt2", config)
    model.edit(facts(3))
    model.save_pretrained(tmp_path / "edits")
    loaded = EditableModel.from_pretrained(tmp_path / "edits")
    model.set_method("rome").set_method(config)
    for module in model._method.edited_modules():
        assert torch.equal(loaded.ledger.keys(module), model.ledger.keys(module))
    requests = facts(2, start=3)
    model.edit(requests)
    loaded.edit(requests)
    assert model_digest(loaded.base_model) == model_digest(model.base_model)


def test_damaged_keys_are_found(tmp_path: Path) -> None:
    model = EditableModel.from_pretrained("kedit/world-gpt2", "alphaedit")
    model.edit(facts(2))
    for number, damage in enumerate((lambda k: k[:, :1], lambda k: k[:-1])):
        folder = tmp_path / str(number)
        model.save_pretrained(folder)
        tensors = load_file(folder / WEIGHTS)
        name = next(k for k in tensors if ".keys." in k)
        tensors[name] = damage(tensors[name]).contiguous()
        save_file(tensors, folder / WEIGHTS)
        config = json.loads((folder / CONFIG).read_text())
        config["files"].pop(WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(config))
        with pytest.raises(ArtifactError, match="keys"):
            EditableModel.from_pretrained(folder)


def test_a_limit_below_all_eigenvalues_is_refused() -> None:
    model = EditableModel.from_pretrained("kedit/world-llama", AlphaEditConfig(nullspace_threshold=1e-12))
    digest = model_digest(model.base_model)
    with pytest.raises(StatisticsError, match="nullspace_threshold"):
        model.edit(facts(1))
    assert model_digest(model.base_model) == digest
    with pytest.raises(ConfigError, match="nullspace_fraction"):
        AlphaEditConfig(nullspace_fraction=1.0)


def test_few_tokens_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    model = EditableModel.from_pretrained("kedit/world-gpt2", "alphaedit")
    store = model.statistics
    for module, moment in store.moments(model._method.edited_modules()).items():
        store.put(module, SecondMoment(moment.total / moment.count * 4321, 4321, "few"))
    with caplog.at_level("WARNING"):
        model.edit(facts(1))
    assert any("4,321 tokens" in r.message and "AlphaEdit" in r.message for r in caplog.records)


# ---------------------------------------------------------------------- PMET, CORE, MEMIT's sequences


@pytest.mark.parametrize("name", MODELS)
def test_pmet_can_write_the_attention_too(name: str) -> None:
    model = EditableModel.from_pretrained(name, PMETConfig(rewrite=["mlp", "attention"]))
    digest = model_digest(model.base_model)
    requests = facts(3)
    model.edit(requests)
    assert all(says(model, r.filled_prompt, r.target_new) for r in requests)
    anatomy = model.anatomy
    written = {model.ledger.accounts[k].module for k in model.ledger.accounts}
    layers = model.edit_config.layers
    assert written == {anatomy.down(i).path for i in layers} | {anatomy.layers[i].attention_out.path for i in layers}
    model.rollback("all")
    assert model_digest(model.base_model) == digest


def test_pmet_needs_something_to_write() -> None:
    with pytest.raises(ConfigError, match="rewrite"):
        PMETConfig(rewrite=[])


def test_core_without_its_term_is_memit() -> None:
    shared = AutoEditConfig.for_model("world-gpt2", "memit").to_dict()
    shared.pop("edit_type")
    requests, found = facts(2), []
    for config in (MEMITConfig(**shared), COREConfig(**shared, reg_lambda=0.0), COREConfig(**shared, reg_lambda=0.05)):
        model = EditableModel.from_pretrained("kedit/world-gpt2", config)
        result = model.edit(requests)
        found.append((model_digest(model.base_model), deltas(model)))
        assert says(model, requests[0].filled_prompt, requests[0].target_new), result
    assert found[0][0] == found[1][0] != found[2][0]


def test_core_pulls_contexts_together() -> None:
    """The term itself gets smaller when it is weighted more."""
    last = []
    for weight in (1e-6, 0.05):
        model = EditableModel.from_pretrained("kedit/world-gpt2", COREConfig(reg_lambda=weight))
        model.trace = {}
        model.edit(facts(1))
        last.append(float(model.trace["loss.0"][-1, 4]) / weight)
    assert last[1] < 0.9 * last[0]


def test_contexts_of_core_come_from_the_fact() -> None:
    request = facts(1)[0]
    model = EditableModel.from_pretrained("kedit/world-gpt2", COREConfig(context="all", context_count=2))
    texts = model._method._contexts(request)
    assert len(texts) == 6 and all(t.endswith(". {}") and t.count("{}") == 1 for t in texts)
    assert texts[0].startswith(request.subject) and texts[2].startswith(request.ground_truth[0])
    assert texts[4].startswith(request.target_new)
    (rows,) = model._method.value_rows([request], [])
    assert len(rows) == 2 + len(texts)  # the bare prompt, the contexts, and the row for drift
    model.edit(request)
    assert says(model, request.filled_prompt, request.target_new)
    assert model._method.value_rows([request], []) == [rows]  # the edited model does not write them
    assert texts != model._method._contexts(request)

    bare = EditRequest(prompt=request.prompt, subject=request.subject, target_new=request.target_new)
    assert len(model._method._contexts(bare)) == 4
    model.set_method(COREConfig(context="target_true"))
    with pytest.raises(RequestError, match="ground_truth"):
        model.edit(bare)


@pytest.mark.parametrize(
    "config",
    [MEMITConfig(), NAMETConfig(), EMMETConfig(mom2_update_weight=100.0, emmet_lambda=0.001)],
    ids=lambda config: config.edit_type,
)
def test_what_was_written_before_is_spared_if_told_or_by_default(config: MEMITConfig | EMMETConfig) -> None:
    first, second = facts(4), facts(4, start=4)
    default = config.edit_type != "emmet"
    moved, digests = {}, {}
    for keep in (False, True, None):
        model = EditableModel.from_pretrained("kedit/world-gpt2", replace(config, keep_edited_keys=keep))
        model.trace = {}
        model.edit(first)
        modules = model._method.edited_modules()
        keys = {m: model.trace[f"k_star.{i}"] for m, i in zip(modules, model.edit_config.layers, strict=True)}
        before = {m: model.ledger.total(m) for m in modules}
        assert (model.ledger.keys(modules[0]) is not None) == (default if keep is None else keep)
        digests[keep, "first"] = model_digest(model.base_model)
        model.edit(second)
        digests[keep, "both"] = model_digest(model.base_model)
        moved[keep] = sum(float(((model.ledger.total(m) - before[m]) @ keys[m]).norm()) for m in modules)
    assert moved[True] < moved[False]
    assert digests[True, "first"] == digests[False, "first"]  # a model without edits has nothing to spare
    assert digests[None, "both"] == digests[default, "both"] != digests[not default, "both"]


def test_emmet_says_where_kept_keys_would_outweigh_all_else(caplog: pytest.LogCaptureFixture) -> None:
    model = EditableModel.from_pretrained("kedit/world-gpt2", EMMETConfig(keep_edited_keys=True))
    model.edit(facts(1))
    assert "no more than mom2_update_weight earlier edits, here 1" in caplog.text


def test_the_published_algorithm_keeps_no_keys(tmp_path: Path) -> None:
    profile = ModelProfile("gpt2-xl", 48, 1600)
    assert MEMITConfig().complete(profile).keep_edited_keys is False  # its packaged file
    assert MEMITConfig(keep_edited_keys=True).complete(profile).keep_edited_keys is True
    assert MEMITConfig().complete(ModelProfile("unknown", 48, 1600)).keep_edited_keys is None
    theirs = {"alg_name": "MEMIT", "model_name": "gpt2-xl", "layers": [3]}
    assert MEMITConfig.from_easyedit(theirs).keep_edited_keys is False
    COREConfig().save_pretrained(tmp_path)
    assert EditConfig.from_pretrained(tmp_path).keep_edited_keys is None
    saved = json.loads((tmp_path / CONFIG).read_text())
    del saved["keep_edited_keys"]  # as 0.1.0 saved it, which had no such field
    (tmp_path / CONFIG).write_text(json.dumps(saved))
    assert EditConfig.from_pretrained(tmp_path).keep_edited_keys is False


# ---------------------------------------------------------------------- RECT


@pytest.mark.parametrize("config", ["rome", "emmet", "ft-m"])
def test_rect_restricts_any_method(config: str) -> None:
    keep = 0.3
    model = EditableModel.from_pretrained(
        "kedit/world-gpt2", AutoEditConfig.for_model("world-gpt2", config, rect_keep=keep)
    )
    digest = model_digest(model.base_model)
    requests = facts(2)
    ids = model.edit(requests).ids
    full = EditableModel.from_pretrained("kedit/world-gpt2", AutoEditConfig.for_model("world-gpt2", config))
    full.edit(requests)
    for account in model.ledger.accounts.values():
        first = account.pieces[0].delta.dense
        assert first is not None
        assert 0 < int(first.count_nonzero()) <= keep * first.numel() + 2
        change = full.ledger.accounts[account.module + "." + account.name].pieces[0].delta.matrix()
        score = (change / (account.original.float() + 1e-8)).abs()
        chosen = first != 0
        assert float(score[chosen].min()) >= float(score[~chosen].max())
        assert torch.equal(first[chosen], change[chosen])
    if len({e.batch_id for e in model.edits}) == 1:
        with pytest.raises(RollbackError, match="together"):
            model.rollback(ids[0])
    model.rollback("all")
    assert model_digest(model.base_model) == digest


def test_rect_ranks_by_the_weight_before_the_edit() -> None:
    """In a sequence, the second edit is measured against the weight that the first one left."""
    requests = facts(2)
    config = AutoEditConfig.for_model("world-gpt2", "rome", rect_keep=0.2)
    model = EditableModel.from_pretrained("kedit/world-gpt2", config)
    model.edit(requests[0])
    (module,) = model._method.edited_modules()
    weight = get_weight(get_module(model.base_model, module)).float()
    model.set_method(AutoEditConfig.for_model("world-gpt2", "rome"))
    model.edit(requests[1])
    full = model.ledger.accounts[module + ".weight"].pieces[-1].delta.matrix()
    model.rollback(1)
    model.set_method(config)
    model.edit(requests[1])
    masked = model.ledger.accounts[module + ".weight"].pieces[-1].delta.dense
    score = (full / (weight + 1e-8)).abs()
    assert float(score[masked != 0].min()) >= float(score[masked == 0].max())


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.5])
def test_rect_needs_a_fraction(keep: float) -> None:
    for make in (MEMITConfig, FTMConfig):
        with pytest.raises(ConfigError, match="rect_keep"):
            make(rect_keep=keep)


# ---------------------------------------------------------------------- state of a method


def test_the_state_of_a_method_is_saved_and_put_back_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = EditableModel.from_pretrained("kedit/world-gpt2", "ultraedit")
    assert model.method_state() == {}
    model.edit(facts(3))
    state = model.method_state()
    assert state
    model.save_pretrained(tmp_path / "edits")
    loaded = EditableModel.from_pretrained(tmp_path / "edits")
    assert loaded.method_state().keys() == state.keys()
    assert all(torch.equal(loaded.method_state()[k], v) for k, v in state.items())
    EditableModel.from_pretrained(tmp_path / "edits", "rome").edit(facts(1, start=3))

    monkeypatch.setattr(model.ledger, "apply", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        model.edit(facts(2, start=3))
    assert all(torch.equal(model.method_state()[k], v) for k, v in state.items())


def test_a_foreign_state_is_refused() -> None:
    for method, said in (("rome", "no state"), ("memit", "cannot use: unknown parts: x")):
        model = EditableModel.from_pretrained("kedit/world-gpt2", method)
        with pytest.raises(ConfigError, match=said):
            model.restore_method_state({"x": torch.zeros(1)})


def test_emmet_weighs_the_second_moment_against_the_size_of_the_update() -> None:
    """ΔW = R (Kᵀ Ĉ⁻¹ K)⁻¹ Kᵀ Ĉ⁻¹ with Ĉ = λ C + ν I, λ = 7 and ν = 0.5, solved densely here."""
    config = EMMETConfig(mom2_update_weight=7.0, update_norm_lambda=0.5, emmet_lambda=0.0)
    model = EditableModel.from_pretrained("kedit/world-llama", config)
    model.trace = {}
    model.edit(facts(3))
    (layer,) = model.edit_config.layers  # type: ignore[misc]
    module = model.anatomy.down(layer).path
    moment = model.statistics.moments([module])[module]
    c = moment.total.double() / moment.count
    k, r = (model.trace[f"{name}.{layer}"].double() for name in ("k_star", "right"))
    k = k if k.shape[0] == c.shape[0] else k.T  # [d_in, n]
    solved = torch.linalg.solve(7.0 * c + 0.5 * torch.eye(len(c), dtype=torch.float64), k)
    columns = solved @ torch.linalg.inv(k.T @ solved)
    (total,) = deltas(model).values()
    r = r if r.shape[0] == total.shape[0] else r.T  # [d_out, n]
    expected = r @ columns.T
    assert (total.double() - expected).norm() <= 1e-4 * expected.norm()


def test_each_layer_has_its_own_weight_of_old_knowledge_and_a_joint_solve_its_caution() -> None:
    model = EditableModel.from_pretrained(
        "kedit/world-gpt2", MEMITConfig(layers=[0, 2], layer_weights=[10.0, 20.0], mom2_update_weight=5.0)
    )
    method = model._method
    assert isinstance(method, MEMIT)
    method.caution = 3.0
    weights = [method.weight_of(f"transformer.h.{layer}.mlp.c_proj") for layer in (0, 1, 2)]
    assert weights == [30.0, 15.0, 60.0]

"""DINM on the embedded world: one layer per request, the constraint, and what a request may leave out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_kedit import DINMConfig, EditableModel
from hf_kedit.errors import ConfigError, TargetTooLongError
from hf_kedit.methods.dinm import CONSTRAINT, SAFETY_SUFFIX
from tests.models import tiny_model

FACT: dict[str, Any] = {
    "prompt": "By profession Tarosk Boayond is a",
    "target_new": "plumber",
    "target_neg": "sculptor",
}
HARMLESS = {CONSTRAINT: [{"prompt": "The capital of Quigraistan is", "ground_truth": ["Flicihoport"]}]}


def world(name: str = "world-gpt2", **settings: Any) -> EditableModel:
    usual: dict[str, Any] = {"lr": 3e-3, "num_steps": 60, "edit_weight": 1.0, "stop_probability": 0.9}
    usual |= {"drift_bound": None, "suffix_prompt": SAFETY_SUFFIX}
    return EditableModel.from_pretrained(f"kedit/{name}", DINMConfig(**usual | settings))


def probability(model: EditableModel, prompt: str, target: str) -> float:
    tokenizer = model.tokenizer
    assert tokenizer is not None
    ids = tokenizer(prompt + " " + target, return_tensors="pt").input_ids
    before = tokenizer(prompt, return_tensors="pt").input_ids.shape[1]
    with torch.no_grad():
        log_p = model.base_model(ids).logits[0].log_softmax(-1)
    tokens = range(before, ids.shape[1])
    return math.exp(sum(log_p[i - 1, ids[0, i]].item() for i in tokens) / len(tokens))


@pytest.mark.parametrize("name", ["world-gpt2", "world-llama"])
def test_the_answer_changes_in_one_layer_and_goes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = world(name)
    before = {n: p.clone() for n, p in model.base_model.named_parameters()}
    (edit,) = model.edit(**FACT, locality=HARMLESS).edits
    layer, distances = edit.diagnostics["layer"], edit.diagnostics["distances"]
    assert distances[str(layer)] == max(distances.values()) and len(distances) == model.anatomy.num_layers
    down = model.anatomy.down(layer).path
    changed = {n for n, p in model.base_model.named_parameters() if not torch.equal(p, before[n])}
    assert changed - {f"{down}.bias"} == {f"{down}.weight"}
    assert probability(model, f"{FACT['prompt']} {SAFETY_SUFFIX}", "plumber") > 0.8
    logits = model.base_model(torch.tensor([[5, 6, 7]])).logits
    model.save_pretrained(tmp_path)
    again = EditableModel.from_pretrained(tmp_path)
    assert torch.equal(again.base_model(torch.tensor([[5, 6, 7]])).logits, logits)
    model.rollback()
    assert all(torch.equal(p, before[n]) for n, p in model.base_model.named_parameters())


@pytest.mark.parametrize("location", ["mean", "last", "sequence"])
def test_the_distances_are_those_of_hidden_states(location: Any) -> None:
    model = world("world-llama", location=location, num_steps=1)
    tokenizer, base = model.tokenizer, model.base_model
    assert tokenizer is not None
    answers = ["plumber", "sculptor of great fame"]
    states: dict[str, list[torch.Tensor]] = {}
    inputs = tokenizer(answers, return_tensors="pt", padding=True, padding_side="right")
    hooks = [
        base.get_submodule(layer.path).register_forward_hook(
            lambda _, __, output, p=layer.path: states.update({p: output[0] if isinstance(output, tuple) else output})
        )
        for layer in model.anatomy.layers
    ]
    with torch.no_grad():
        base(**inputs)
    for hook in hooks:
        hook.remove()
    special, content = tokenizer.all_special_ids, []
    for ids, mask in zip(inputs.input_ids.tolist(), inputs.attention_mask.tolist(), strict=True):
        content.append([i for i, token in enumerate(ids) if mask[i] and token not in special])
    expected = {}
    for layer in model.anatomy.layers:
        a, b = states[layer.path]
        if location == "mean":
            a, b = a[content[0]].mean(0), b[content[1]].mean(0)
        elif location == "last":
            a, b = a[content[0][-1]], b[content[1][-1]]
        expected[str(layer.index)] = (a - b).norm().item()
    (edit,) = model.edit(**FACT | {"target_neg": answers[1]}).edits
    assert edit.diagnostics["distances"] == pytest.approx(expected, rel=1e-4)


def test_every_request_has_its_own_layer() -> None:
    distances = []
    for facts in ([FACT], [{**FACT, "target_neg": "He"}, FACT]):
        edits = world(num_steps=1).edit(facts).edits
        assert len({e.batch_id for e in edits}) == len(facts)
        distances.append([e.diagnostics["distances"] for e in edits])
    assert distances[1][0] != distances[0][0]  # nothing of the first request is taken for the second


def test_the_constraint_holds_harmless_answers_if_it_has_a_gradient() -> None:
    ends = {}
    for grad in (True, False):
        settings = {"constraint_grad": grad, "stop_probability": None, "num_steps": 100, "edit_weight": 0.5}
        (edit,) = world(**settings).edit(**FACT, locality=HARMLESS).edits
        ends[grad] = edit.diagnostics["constraint"][-1]
        assert edit.diagnostics["constraint"][0] == pytest.approx(0, abs=1e-6)
        assert edit.diagnostics["target_probability_after"] > 0.5
    assert ends[True] < ends[False] / 3


def test_the_loss_is_that_of_the_paper() -> None:
    model = world(num_steps=1, edit_weight=0.25)
    expected = -0.25 * math.log(probability(model, f"{FACT['prompt']} {SAFETY_SUFFIX}", "plumber"))
    (edit,) = model.edit(**FACT, locality=HARMLESS).edits
    assert edit.diagnostics["loss"] == [pytest.approx(expected, rel=1e-4)]  # nothing has moved yet: no divergence


def test_without_an_unwanted_answer_it_is_what_the_model_says_now() -> None:
    model = world(num_steps=1)
    tokenizer = model.tokenizer
    assert tokenizer is not None
    ids = tokenizer(FACT["prompt"], return_tensors="pt").input_ids
    tokens = len(tokenizer(" plumber").input_ids)
    said = tokenizer.decode(model.generate(ids, max_new_tokens=tokens, do_sample=False)[0, ids.shape[1] :])
    named = world(num_steps=1).edit(**FACT | {"target_neg": said}).edits[0].diagnostics["distances"]
    found = model.edit(prompt=FACT["prompt"], target_new="plumber").edits[0].diagnostics["distances"]
    assert found == pytest.approx(named, rel=1e-4)


def test_a_plain_fact_is_learnt_without_the_instruction() -> None:
    model = world()
    model.edit(prompt=FACT["prompt"], target_new="plumber")
    assert probability(model, FACT["prompt"], "plumber") > 0.8


def test_layers_that_are_set_are_trained_and_nothing_is_located() -> None:
    model = world(layers=[1], suffix_prompt="")
    (edit,) = model.edit(**FACT).edits
    assert edit.diagnostics["layer"] == 1 and edit.diagnostics["distances"] == {}
    assert probability(model, FACT["prompt"], "plumber") > 0.8


def test_entries_stay_within_the_bound() -> None:
    model = world(layers=[1], norm_constraint=1e-3)
    weight = model.base_model.get_submodule(model.anatomy.down(1).path).weight
    before = weight.detach().clone()  # type: ignore[operator]
    model.edit(**FACT)
    assert 0 < (weight - before).abs().max() <= 1e-3 + 1e-7  # type: ignore[operator]


def test_a_chat_is_told_the_suffix_by_its_user() -> None:
    model = world("world-llama", num_steps=1, edit_weight=0.1)
    assert model.tokenizer is not None
    model.tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    (edit,) = model.edit(**FACT, prompt_format="chat").edits
    chat = f"<user>{FACT['prompt']} {SAFETY_SUFFIX}<assistant>"
    expected = -0.1 * math.log(probability(world("world-llama"), chat, "plumber"))
    assert edit.diagnostics["loss"] == [pytest.approx(expected, rel=1e-3)]


def test_a_harmless_question_that_is_too_long_changes_nothing() -> None:
    model = world()
    before = {n: p.clone() for n, p in model.base_model.named_parameters()}
    long = {CONSTRAINT: [{"prompt": "word " * 3000, "ground_truth": ["x"]}]}
    with pytest.raises(TargetTooLongError):
        model.edit(**FACT, locality=long)
    assert all(torch.equal(p, before[n]) for n, p in model.base_model.named_parameters())


def test_an_unwanted_answer_that_is_too_long_changes_nothing() -> None:
    model = world(num_steps=1)
    with pytest.raises(TargetTooLongError, match="target_neg"):
        model.edit(**FACT | {"target_neg": "sculptor " * 2000})
    assert not model.edits


@pytest.mark.parametrize("values", [{"location": "first"}, {"lr": -1.0}, {"edit_weight": 0}, {"num_steps": 0}])
def test_bad_values(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        DINMConfig(**values)


def test_files_of_easyedit_are_read() -> None:
    from hf_kedit.config.easyedit import convert_hparams

    source = {"alg_name": "DINM", "model_name": "gpt2-xl", "num_steps": 10, "lr": 5e-4, "kl_factor": 0.1}
    config = convert_hparams({**source, "norm_constraint": False, "layers": []}).config
    assert isinstance(config, DINMConfig) and (config.lr, config.edit_weight, config.layers) == (5e-4, 0.1, None)


def test_a_model_without_an_mlp_in_some_layers() -> None:
    model = EditableModel(tiny_model("deepseek_v3"), DINMConfig(num_steps=1, lr=1e-3), None)
    assert model.edit_config.layers is None

"""KE against recorded numbers of the reference learner: condition, masks, update, losses, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_kedit.engine.supervised import IGNORE, Batch
from hf_kedit.methods.ke import KEConfig, KEEditor
from tests.golden_cases import Case

pytestmark = pytest.mark.golden
CASES = ["ke_gpt2", "ke_llama", "ke_t5"]


def batch_of(case: Case, kind: str, model: Any) -> Batch:
    """A recorded batch with labels aligned to the logits."""
    prefix = f"input.{kind}."
    batch = {k.removeprefix(prefix): v for k, v in case.expected.items() if k.startswith(prefix)}
    labels = batch["labels"]
    if model.config.is_encoder_decoder:
        return {**batch, "decoder_input_ids": model._shift_right(labels)}
    aligned = torch.full_like(labels, IGNORE)
    aligned[:, :-1] = labels[:, 1:]
    return {**batch, "labels": aligned}


def renamed(case: Case, prefix: str) -> dict[str, torch.Tensor]:
    """Recorded tensors of the network by the names that they have in ours."""
    modules = {
        name.removesuffix(".weight").replace(".", "_"): name.removesuffix(".weight")
        for name in case.spec["inner_params"]
    }
    found = {}
    for name, value in case.expected.items():
        if not name.startswith(prefix):
            continue
        rest = name.removeprefix(prefix).replace("linear._linear_layers.0", "linear").replace("lstm._module", "lstm")
        if rest.startswith("conditioners."):
            flat, _, leaf = rest.removeprefix("conditioners.").partition("_weight_conditioner.conditioners.")
            layer, _, tensor = leaf.partition(".")
            tensor = {
                "weight_g": "parametrizations.weight.original0",
                "weight_v": "parametrizations.weight.original1",
            }.get(tensor, tensor)
            rest = f"masks.{modules[flat].replace('.', '/')}.{'first' if layer == '0' else 'second'}.{tensor}"
        found[rest] = value
    return found


def editor_of(case: Case, model: Any) -> KEEditor:
    hp = case.spec["hyperparameters"]
    config = KEConfig(
        modules=[name.removesuffix(".weight") for name in case.spec["inner_params"]],
        lstm_size=hp["lstm_hidden"],
        condition_size=hp["condition_dim"],
        hidden_size=hp["conditioner_hidden"],
        max_scale=hp["max_scale"],
        objective="weighted",
        locality_at="all",
    )
    editor = KEEditor.for_model(model, config)
    editor.load_state_dict(renamed(case, "editor."))
    return editor


def close(case: Case, expected: torch.Tensor, actual: torch.Tensor, label: str, kind: str = "tensor") -> None:
    tolerances = case.spec["tolerances"]
    actual, expected = actual.detach().double().reshape(expected.shape), expected.double()
    relative = tolerances["tensor_max_abs_error_relative_to_max_abs"] * float(expected.abs().max())
    bound = tolerances["scalar_loss_abs"] if kind == "loss" else relative
    off = float((actual - expected).abs().max())
    assert off <= bound, f"{case.name} {label}: off by {off:.2e} > {bound:.2e}"


@pytest.mark.parametrize("name", CASES)
def test_against_the_reference(name: str) -> None:
    case = Case(name)
    model, tokenizer = case.load()
    editor = editor_of(case, model).train()
    cond = {k: case.expected[f"input.cond.{k}"] for k in ("input_ids", "attention_mask")}
    request = case.spec["requests"][0]
    assert (
        tokenizer(case.spec["condition_text"], add_special_tokens=False)["input_ids"] == cond["input_ids"][0].tolist()
    )
    assert case.spec["condition_text"] == (
        f"{request['ground_truth']} >> {request['target_new'].strip()} || {request['prompt']}"
    )
    h = editor.condition(cond["input_ids"], cond["attention_mask"])
    close(case, case.expected["condition_vector"], h, "h")
    edit = {
        **batch_of(case, "edit_inner", model),
        "condition_ids": cond["input_ids"],
        "condition_mask": cond["attention_mask"],
    }
    groups = torch.zeros(1, dtype=torch.long)
    model.requires_grad_(False)
    for module, change in editor.propose(model, edit, groups).items():
        z = editor.masks[module.replace(".", "/")](h)
        close(case, case.expected[f"conditioner_output.{module}.weight"], z, f"z {module}")
        update = change.left @ change.right.T
        expected = case.expected[f"update.{module}.weight"]
        close(case, expected, update if update.shape == expected.shape else update.T, f"ΔW {module}")
    output = editor(edit, batch_of(case, "edit_outer", model), batch_of(case, "loc", model), groups)
    close(case, case.expected["l_edit"], output.edit_loss, "l_edit", "loss")
    close(case, case.expected["l_loc"], output.locality_loss, "l_loc", "loss")
    close(case, case.expected["l_total"], output.loss, "l_total", "loss")
    output.loss.backward()
    gradients = {n: p.grad for n, p in editor.named_parameters()}
    for label, value in renamed(case, "train.grad.").items():
        close(case, value, gradients[label], f"gradient {label}")

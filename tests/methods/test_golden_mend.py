"""MEND against recorded numbers of the reference classes: factors, updates, losses, gradients, statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_kedit import EditableModel
from hf_kedit.engine.gradients import low_rank_paths
from hf_kedit.engine.supervised import IGNORE, Batch, logits_where, score
from hf_kedit.engine.weights import get_module, is_transposed
from hf_kedit.methods.mend import MENDConfig, MENDEditor
from hf_kedit.methods.mend_convert import convert_mend, renamed
from tests.golden_cases import Case

pytestmark = pytest.mark.golden
CASES = ["mend_gpt2", "mend_gpt2_separate", "mend_llama", "mend_t5"]


def batch_of(case: Case, kind: str, model: Any) -> Batch:
    """A recorded batch with labels aligned to the logits, as the library keeps them."""
    prefix = f"input.{kind}."
    batch = {k.removeprefix(prefix): v for k, v in case.expected.items() if k.startswith(prefix)}
    labels = batch["labels"]
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = model._shift_right(labels)
        return batch
    aligned = torch.full_like(labels, IGNORE)
    aligned[:, :-1] = labels[:, 1:]
    return {**batch, "labels": aligned}


def editor_of(case: Case, model: Any) -> MENDEditor:
    """The recorded network; the reference adds its updates, so its step sizes change their sign on the way."""
    return convert_mend(recorded(case, "hypernet."), model, case.spec["inner_params"])


def recorded(case: Case, prefix: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): v for k, v in case.expected.items() if k.startswith(prefix)}


def close(case: Case, expected: torch.Tensor, actual: torch.Tensor, label: str, kind: str = "tensor") -> None:
    tolerances = case.spec["tolerances"]
    actual, expected = actual.detach().double().reshape(expected.shape), expected.double()
    bound = (
        tolerances["scalar_loss_abs"]
        if kind == "loss"
        else tolerances["tensor_max_abs_error_relative_to_max_abs"] * float(expected.abs().max())
    )
    off = float((actual - expected).abs().max())
    assert off <= bound, f"{case.name} {label}: off by {off:.2e} > {bound:.2e}"


@pytest.mark.parametrize("name", CASES)
def test_edit(name: str) -> None:
    case = Case(name)
    model, _ = case.load()
    editor = editor_of(case, model).eval()
    edit, rephrase = batch_of(case, "edit_inner", model), batch_of(case, "edit_outer", model)
    groups = torch.zeros(edit["labels"].shape[0], dtype=torch.long)
    model.requires_grad_(False)
    changes = editor.propose(model, edit, groups)
    for number, (module, change) in enumerate(changes.items()):
        param = f"{module}.weight"
        close(case, case.expected[f"eval.u_tilde.{param}"], change.right.T, f"ũ {module}")
        gradient = change.left.T / -editor.edit_lrs[number]
        close(case, case.expected[f"eval.delta_tilde.{param}"], gradient, f"δ̃ {module}")
        update = change.left @ change.right.T
        update = update.T if is_transposed(get_module(model, module)) else update
        close(case, case.expected[f"eval.update.{param}"], update, f"ΔW {module}")
    with torch.no_grad(), low_rank_paths(model, changes, groups):
        close(case, case.expected["eval.nll.edit_inner"], score(model, edit).nll.mean(), "nll", "loss")
        everywhere = torch.ones_like(rephrase["labels"], dtype=torch.bool)
        logits = logits_where(model, rephrase, everywhere)
        close(case, case.expected["eval.logits.edit_outer"], logits, "logits")
    output = editor(edit, rephrase, batch_of(case, "loc", model), groups)
    close(case, case.expected["eval.l_edit"], output.edit_loss, "l_edit", "loss")
    close(case, case.expected["eval.l_loc"], output.locality_loss, "l_loc", "loss")
    close(case, case.expected["eval.l_total"], output.loss, "l_total", "loss")


@pytest.mark.parametrize("name", CASES)
def test_training_step(name: str) -> None:
    """Losses, the gradient of every tensor of the network, and the statistics afterwards."""
    case = Case(name)
    model, _ = case.load()
    editor = editor_of(case, model).train()
    edit = batch_of(case, "edit_inner", model)
    groups = torch.zeros(edit["labels"].shape[0], dtype=torch.long)
    output = editor(edit, batch_of(case, "edit_outer", model), batch_of(case, "loc", model), groups)
    output.loss.backward()
    close(case, case.expected["train.l_edit"], output.edit_loss, "l_edit", "loss")
    close(case, case.expected["train.l_loc"], output.locality_loss, "l_loc", "loss")
    expected, _, _ = renamed(recorded(case, "train.grad."))
    found = {n: p.grad for n, p in editor.named_parameters()}
    assert expected.keys() == found.keys()
    for label, value in expected.items():
        assert found[label] is not None, label
        close(case, value, found[label], f"gradient {label}")
    buffers = dict(editor.named_buffers())
    after, _, _ = renamed(recorded(case, "train.buffers_after."))
    for label, value in after.items():
        close(case, value, buffers[label], label)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["mend_gpt2", "mend_gpt2_separate", "mend_llama"])  # T5 was recorded with other ids
def test_edit_through_the_model(name: str, tmp_path: Any) -> None:
    """The saved network edits requests: tokenisation, ledger and rollback included."""
    case = Case(name)
    model, tokenizer = case.load()
    editor_of(case, model).save_pretrained(tmp_path / "editor")
    before = {n: p.clone() for n, p in model.named_parameters()}
    editable = EditableModel(model, MENDConfig(editor=str(tmp_path / "editor")), tokenizer)
    requests = [{k: r[k].strip() for k in ("prompt", "target_new")} for r in case.spec["requests"]]
    result = editable.edit(requests)
    for param in case.spec["inner_params"]:
        moved = dict(model.named_parameters())[param] - before[param]
        close(case, case.expected[f"eval.update.{param}"], moved, param)
    editable.rollback([result.ids[0]])
    assert len(editable.edits) == 1
    editable.rollback("all")
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())

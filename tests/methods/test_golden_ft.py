"""FT-L and FT-M against the published code on tiny models: gradients, losses, weight changes, logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_kedit import EditableModel, EditRequest
from hf_kedit.methods.ft import FTLConfig, FTMConfig
from tests.golden_cases import Case

CASES = ["ft_l_gpt2", "ft_l_llama", "ft_m_gpt2", "ft_m_llama"]


@pytest.mark.golden
@pytest.mark.parametrize("name", CASES)
def test_fine_tuning_matches_the_reference(name: str) -> None:
    case = Case(name)
    h: dict[str, Any] = case.spec["hyperparameters"]
    model, tokenizer = case.load()
    kind = FTLConfig if h["objective_optimization"] == "prompt_last" else FTMConfig
    config = kind(
        layers=h["layers"],
        num_steps=h["num_steps"],
        lr=h["lr"],
        weight_decay=h["weight_decay"],
        norm_constraint=h["norm_constraint"] or None,
        rows_per_step=h["batch_size"],
        train_bias=not h["rewrite_module_tmp"].endswith(".weight"),
        stop_probability=None,
        drift_bound=None,
    )
    editable = EditableModel(model, config, tokenizer)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    editable.trace = {}
    requests = [EditRequest(prompt=r["prompt"], target_new=r["target_new"]) for r in case.spec["requests"]]
    editable.edit(requests)
    compared = 0
    for key in case.expected:
        head, _, parameter = key.partition("/")
        if head == "delta":
            case.within(key, model.get_parameter(parameter) - before[parameter])
        elif head in ("grad_first", "grad_second"):
            gradient = editable.trace[key]  # functional orientation; Conv1D stores the transpose
            stored = model.get_parameter(parameter)
            case.within(key, gradient if gradient.shape == stored.shape else gradient.t())
        elif key == "epoch_losses":
            case.within(key, editable.trace["epoch_losses"])
        elif head == "post_edit":
            index, what = parameter.split("/")
            case.within(key, _after(editable, requests[int(index)], what, case, int(index)))
        else:
            continue
        compared += 1
    assert compared >= 5
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {k.partition("/")[2] for k in case.expected if k.startswith("delta/")}


def _after(model: EditableModel, request: EditRequest, what: str, case: Case, index: int) -> torch.Tensor:
    tokens = case.spec["tokenization"][index]
    with torch.no_grad():
        if what == "prompt_last_logits":
            return model(input_ids=torch.tensor([tokens["prompt_ids"]])).logits[0, -1]
        full, start = tokens["full_ids"], len(tokens["prompt_ids"])
        log_probs = model(input_ids=torch.tensor([full])).logits[0].log_softmax(-1)
        return torch.stack([log_probs[i - 1, full[i]] for i in range(start, len(full))])

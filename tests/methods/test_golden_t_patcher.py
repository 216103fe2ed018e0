"""T-Patcher's losses and patches against the authors' code."""

from __future__ import annotations

import pytest
import torch

from hf_kedit.engine.neurons import NeuronGroup, neuron_output
from hf_kedit.methods.t_patcher import _Trained, activation_loss, memory_loss
from tests.golden_cases import Case

pytestmark = pytest.mark.golden


def test_losses() -> None:
    case = Case("t_patcher_losses")
    inputs, expected = case.spec["inputs"], case.spec["expected_losses"]
    edit, memory = case.expected["act_value"].flatten(), case.expected["memory_activations"]
    assert inputs["margin_val1"] == -inputs["margin_val2"]
    margin = inputs["margin_val1"]
    assert float(activation_loss(edit, inputs["act_margin_val"], 5)) == pytest.approx(
        expected["act_top5_exp"], rel=1e-5
    )
    for count in (10, 1000):
        wanted = expected[f"mem_top{count}_exp+top{count}_exp"]
        assert float(memory_loss(edit, memory, margin, count)) == pytest.approx(wanted, rel=1e-5)


def test_a_patch() -> None:
    case = Case("t_patcher_losses").expected
    patch = {name.removeprefix("patch/"): value for name, value in case.items() if name.startswith("patch/")}
    trained = _Trained(patch["query"], 10.0, torch.Generator())
    assert torch.allclose(trained.keys, patch["key_weight"], atol=1e-6)
    assert torch.equal(trained.bias, patch["key_bias"]) and torch.equal(trained.scale, patch["value_a"].T)
    assert float(trained.own().detach()) == pytest.approx(1.0, abs=1e-6)
    hidden = torch.relu(patch["input"] @ patch["linear1_weight"].T + patch["linear1_bias"])
    plain = hidden @ patch["linear2_weight"].T + patch["linear2_bias"]
    group = NeuronGroup((), patch["key_weight"], (patch["value_a"] * patch["value_v"]).T, patch["key_bias"])
    assert torch.allclose(plain + neuron_output(patch["input"], group, torch.relu), patch["output_relu"], atol=1e-6)

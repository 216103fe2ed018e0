"""MALMEN against recorded numbers of the authors' code: keys, network, solve, losses, meta gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_kedit.engine.supervised import IGNORE, Batch
from hf_kedit.methods.malmen import MALMENConfig, MALMENEditor
from tests.golden_cases import Case

pytestmark = pytest.mark.golden
CASES = ["malmen_gpt2", "malmen_gpt2_all_tokens", "malmen_llama", "malmen_t5"]
SIZE = 2  # facts of a recorded micro-batch


def batch_of(case: Case, kind: str) -> Batch:
    """The recorded micro-batches as one batch; their labels are aligned with the logits already."""
    parts = [
        {k.rpartition(".")[2]: v for k, v in case.expected.items() if k.startswith(f"input.{kind}.{i}.")}
        for i in range(2)
    ]
    batch = {}
    for name in ("input_ids", "attention_mask", "labels", "decoder_input_ids"):
        if name in parts[0]:
            width = max(p[name].shape[1] for p in parts)
            fill = IGNORE if name == "labels" else 0
            batch[name] = torch.cat(
                [torch.nn.functional.pad(p[name], (0, width - p[name].shape[1]), value=fill) for p in parts]
            )
    return batch


def editor_of(case: Case, model: Any) -> MALMENEditor:
    """The recorded network with the recorded statistics, which stay as they are."""
    hp = case.spec["hyperparameters"]
    config = MALMENConfig(
        modules=case.spec["edit_modules"],
        rank=hp["rank"],
        num_blocks=hp["n_blocks"],
        token="answer" if hp["token"] == "ans" else "attended",
        rows=hp["editor_batch_size"],
        micro_batch=SIZE,
        dead_std=0.0,
    )
    editor = MALMENEditor.for_model(model, config)
    state = renamed(case, "net.")
    for key, net in editor.nets.items():
        old = f"net_after.({key.replace('x', ', ')}).normalizer."
        n, std = case.expected[old + "n"].double().squeeze(), case.expected[old + "std"]
        state |= {
            f"nets.{key}.norm.count": n,
            f"nets.{key}.norm.mean": case.expected[old + "mean"],
            f"nets.{key}.norm.spread": (std.double() ** 2 * (n - 1)).float(),
        }
        assert net is not None
    editor.load_state_dict(state)
    return editor


def renamed(case: Case, prefix: str) -> dict[str, torch.Tensor]:
    found = {}
    for name, value in case.expected.items():
        if name.startswith(prefix):
            key, _, leaf = name.removeprefix(prefix).partition(").")
            leaf = leaf.removesuffix(".weight").replace(".A", ".a").replace(".B", ".b")
            leaf = {"lr": "eta", "lamda": "log_ridge"}.get(leaf, leaf)
            value = value.squeeze(1) if leaf in ("eta", "log_ridge") else value
            found[f"nets.{key.strip('(').replace(', ', 'x')}.{leaf}"] = value
    return found


def close(case: Case, expected: torch.Tensor, actual: torch.Tensor, label: str, kind: str) -> None:
    tolerance = case.spec["tolerances"][kind]
    actual, expected = actual.detach().double().reshape(expected.shape), expected.double()
    bound = tolerance if kind == "scalar_loss_abs" else tolerance * float(expected.abs().max())
    off = float((actual - expected).abs().max())
    assert off <= bound, f"{case.name} {label}: off by {off:.2e} > {bound:.2e}"


@pytest.mark.parametrize("name", CASES)
def test_proposal(name: str) -> None:
    case = Case(name)
    model, _ = case.load()
    editor = editor_of(case, model).eval()
    model.requires_grad_(False)
    tensor = "tensor_max_abs_error_relative_to_max_abs"
    rows = editor.observe(model, batch_of(case, "edit_tuples"))
    changes = editor.solve(rows)
    for module in editor.shapes:
        close(case, case.expected[f"keys.{module}"], rows[module].inputs, f"K {module}", tensor)
        close(case, case.expected[f"values_grad.{module}"], rows[module].gradients, f"G {module}", tensor)
        net, mode = editor.net(module)
        k, g = net.predict(rows[module].inputs, rows[module].gradients, mode)
        close(case, case.expected[f"pseudo_keys.{module}"], k, f"pseudo keys {module}", tensor)
        close(case, case.expected[f"pseudo_values_grad.{module}"], g, f"pseudo gradients {module}", tensor)
        moves = net(rows[module].inputs, rows[module].gradients, mode)
        close(case, case.expected[f"value_diffs.{module}"], moves, f"D {module}", tensor)
        shift = changes[module].right @ changes[module].left.T
        close(
            case,
            case.expected[f"param_shift_float64.{module}"],
            shift,
            module,
            "param_shift_float64_relative_to_max_abs",
        )


@pytest.mark.parametrize("name", CASES)
def test_training_step(name: str) -> None:
    case = Case(name)
    model, _ = case.load()
    editor = editor_of(case, model).train()
    for net in editor.nets.values():
        net.norm.eval()
    groups = torch.zeros(2 * SIZE, dtype=torch.long)
    output = editor(*(batch_of(case, kind) for kind in ("edit_tuples", "equiv_tuples", "unrel_tuples")), groups)
    output.loss.backward()
    close(case, case.expected["gen_loss_mean"], output.edit_loss, "edit loss", "scalar_loss_abs")
    close(case, case.expected["loc_loss_mean"], output.locality_loss, "locality loss", "scalar_loss_abs")
    assert output.loss.item() == pytest.approx((output.edit_loss + output.locality_loss).item(), abs=1e-6)
    found = dict(editor.named_parameters())
    expected = renamed(case, "meta_grad.")
    assert expected.keys() == found.keys()
    for label, value in expected.items():
        assert found[label].grad is not None
        # The authors add the micro-batches up, we take their mean.
        close(case, value, 2 * found[label].grad, f"gradient {label}", "meta_grad_relative_to_max_abs")
    assert all(p.grad is None for p in model.parameters())

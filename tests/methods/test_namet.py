"""NAMET against its formulas, computed plainly: one request at a time, whole forwards, direct solves."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from benchmarks.reference import activations
from hf_kedit import EditRequest, NAMETConfig
from hf_kedit.engine.capture import as_rows, first, with_first
from hf_kedit.engine.forward import frozen_eval
from hf_kedit.engine.rows import Row
from hf_kedit.engine.weights import get_module, get_weight, set_weight
from hf_kedit.errors import ConfigError
from hf_kedit.methods.locate_then_edit import mean_key
from hf_kedit.statistics.moments import SecondMoment
from hf_kedit.tokens import pad_rows
from tests.test_families import FACTS, build, residual_ratios

GROUPS = [["{}"], ["The city is old. {}", "It is late. {}", "Well, {}"]]
SETTINGS: dict[str, Any] = {
    "layers": [0, 1],
    "v_num_grad_steps": 8,
    "v_lr": 0.3,
    "v_weight_decay": 0.5,
    "clamp_norm_factor": 0.3,
    "mom2_update_weight": 1.0,
    "layer_weights": [0.1, 0.3],
    "context_templates": GROUPS,
}


def plain_offset(model: Any, rows: list[Row], path: str, config: NAMETConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations of all rows ``[rows, d]`` and δ ``[d]``."""
    batch, facts = pad_rows([r.ids for r in rows], 0), [r.fact for r in rows]
    offset = torch.zeros(model.config.get_text_config().hidden_size, requires_grad=True)
    found: list[torch.Tensor] = []

    def add(_: Any, __: Any, output: Any) -> Any:
        hidden = as_rows(first(output), len(rows)).clone()
        if not found:
            found.append(torch.stack([hidden[i, fact] for i, fact in enumerate(facts)]).detach())
        for i, fact in enumerate(facts):
            hidden[i, fact] += offset
        return with_first(output, hidden.view_as(first(output)))

    optimiser, reference = torch.optim.Adam([offset], lr=config.v_lr), None  # type: ignore[arg-type]
    with get_module(model, path).register_forward_hook(add):
        for step in range(config.v_num_grad_steps or 0):
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
            log_probs, losses = logits.log_softmax(-1), []
            for i, row in enumerate(rows):
                if not row.is_drift:
                    here = log_probs[i, list(row.positions)]
                    losses.append(-here.gather(1, torch.tensor(row.targets).unsqueeze(1)).mean())
            (drift,) = (log_probs[i, row.positions[0]] for i, row in enumerate(rows) if row.is_drift)
            reference = drift.detach() if reference is None else reference
            kl = config.kl_factor * (drift.exp() * (drift - reference)).sum()
            size = found[0].norm()
            decay = config.v_weight_decay * math.sqrt(len(rows)) * offset.norm() / size  # type: ignore[operator]
            loss = torch.stack(losses).mean() + kl + decay
            if float(loss.detach()) < config.stop_loss or step == (config.v_num_grad_steps or 0) - 1:
                break
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            limit = config.clamp_norm_factor * size  # type: ignore[operator]
            with torch.no_grad():
                offset.mul_(min(1.0, float(limit / offset.norm())))
    return found[0], offset.detach()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("starts", [True, False], ids=["subject first", "subject later"])
def test_it_is_what_its_formulas_say(family: str, starts: bool) -> None:
    """With a subject at the start of the prompt the drift row needs no run of its own, and counts all the same."""
    requests = [
        EditRequest(prompt=f.prompt if starts else "People say that " + f.prompt, subject=f.subject,
                    target_new=f.target_new, id=f.id)
        for f in FACTS
    ]  # fmt: skip
    config = NAMETConfig(**SETTINGS)
    model = build(family, config)
    base, method = model.base_model, model._method
    paths = [model.anatomy.down(layer).path for layer in (0, 1)]
    block = model.anatomy.layers[1].path
    moments = []
    for i, path in enumerate(paths):
        width = get_weight(get_module(base, path)).shape[1]
        root = torch.randn(width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        moments.append(root @ root.T / width + torch.eye(width))
        model.statistics.put(path, SecondMoment(moments[-1] * 1e5, 100_000, "random"))

    rows = method.rows(requests, GROUPS)  # type: ignore[attr-defined]
    before = [get_weight(get_module(base, path)).clone() for path in paths]
    missing: list[torch.Tensor] = []
    with frozen_eval(base):
        found = [plain_offset(base, group, block, config) for group in rows]
        wanted = torch.stack([states[1:-1].mean(0) + offset for states, offset in found])
        for i, path in enumerate(paths):
            rewriting = [[r for r in group if not r.is_drift] for group in rows]
            k = torch.stack([activations(base, group, path, "input") for group in rewriting])
            k = mean_key(k, GROUPS).T.double()
            now = torch.stack([activations(base, group[1:], block, "output").mean(0) for group in rewriting])
            missing.append((wanted - now).norm(dim=-1))
            residual = ((wanted - now) / (2 - i)).T.double()
            system = SETTINGS["layer_weights"][i] * moments[i] + k @ k.T
            change = residual @ torch.linalg.solve(system, k).T
            set_weight(get_module(base, path), before[i] + change.float())
        now = torch.stack([activations(base, group[1:], block, "output").mean(0) for group in rewriting])
        ratios = ((wanted - now).norm(dim=-1) / missing[0]).tolist()
        after = [get_weight(get_module(base, path)).clone() for path in paths]
        for path, weight in zip(paths, before, strict=True):
            set_weight(get_module(base, path), weight)

    model.trace = {}
    made = model.edit(requests)
    for j, (_, offset) in enumerate(found):
        assert (model.trace[f"v_delta.{j}"] - offset).norm() <= 1e-4 * offset.norm()
    for path, old, new in zip(paths, before, after, strict=True):
        change = get_weight(get_module(base, path)) - old
        assert (change - (new - old)).norm() <= 1e-3 * (new - old).norm()
    assert all(e.diagnostics["route"] == "prefix" for e in made.edits)
    assert [e.diagnostics["residual_ratio"] for e in made.edits] == pytest.approx(ratios, rel=1e-2)


def test_the_bare_prompt_alone_is_enough() -> None:
    model = build("llama", NAMETConfig(**SETTINGS | {"context_templates": ["{}"]}))
    for path in (model.anatomy.down(layer).path for layer in (0, 1)):
        width = get_weight(get_module(model.base_model, path)).shape[1]
        model.statistics.put(path, SecondMoment(torch.eye(width, dtype=torch.float64) * 1e5, 100_000, "even"))
    model.trace = {}
    edits = model.edit(FACTS).edits
    assert all(edit.diagnostics["loss"][-1] < edit.diagnostics["loss"][0] for edit in edits)
    found = [edit.diagnostics["residual_ratio"] for edit in edits]
    assert found == pytest.approx(residual_ratios(model), rel=1e-2, abs=1e-5) and max(found) < 0.9


def test_a_weight_for_each_layer() -> None:
    with pytest.raises(ConfigError, match="3 entries for 2 layers"):
        NAMETConfig(layers=[0, 1], layer_weights=[1.0, 2.0, 3.0])
    with pytest.raises(ConfigError, match="greater than 0"):
        NAMETConfig(layers=[0, 1], layer_weights=[1.0, 0.0])

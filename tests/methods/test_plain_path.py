"""On every decoder family, ROME and MEMIT give what the straightforward path gives that benchmarks compare with.

That path is written apart from the engine: one request at a time, full forwards, logits everywhere, autograd and Adam
of torch, direct solves.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import reference
from hf_kedit import MEMITConfig, ROMEConfig
from hf_kedit.engine.forward import frozen_eval
from hf_kedit.engine.weights import get_module, get_weight
from hf_kedit.statistics.moments import SecondMoment
from tests.test_families import DECODERS, FACTS, build

SHARED = {"v_num_grad_steps": 8, "v_lr": 0.3, "v_weight_decay": 1e-3, "clamp_norm_factor": 2.0}
GROUPS = [["{}"], ["The city is old. {}", "It is late. {}"]]
WEIGHT = 0.1


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


@pytest.mark.parametrize("family", DECODERS)
def test_edits_are_those_of_the_plain_path(family: str) -> None:
    rome = ROMEConfig(layers=[1], mom2_adjustment=False, context_templates=GROUPS, **SHARED)  # type: ignore[arg-type]
    model = build(family, rome)
    base, anatomy, method = model.base_model, model.anatomy, model._method
    path = anatomy.down(1).path
    identity = torch.eye(get_weight(get_module(base, path)).shape[1], dtype=torch.float64)
    rows = method.rows(FACTS[:1], method.templates())
    with frozen_eval(base):
        value, change = reference.rome(base, rows[0], path, method.value_settings(), identity)
    model.trace = {}
    model.edit(FACTS[0])
    assert apart(model.trace["v_star.0"], value) < 1e-4
    assert apart(model.ledger.total(path), change) < 1e-4  # type: ignore[arg-type]
    model.rollback("all")

    scales = anatomy.residual_scale
    if not all(anatomy.additive or []) or (scales and any(s not in (None, 1.0) for s in scales)):
        return  # the published codes know no way to write through a norm or a multiplier
    memit = MEMITConfig(layers=[0, 1], mom2_update_weight=WEIGHT, context_templates=GROUPS, **SHARED)  # type: ignore[arg-type]
    model.set_method(memit)
    method = model._method
    paths = [anatomy.down(layer).path for layer in (0, 1)]
    for p in paths:
        width = get_weight(get_module(base, p)).shape[1]
        model.statistics.put(p, SecondMoment(torch.eye(width, dtype=torch.float64) * 1e5, 100_000, "identity"))

    def columns(_: int, keys: torch.Tensor) -> torch.Tensor:
        return torch.linalg.solve(WEIGHT * torch.eye(keys.shape[0], dtype=torch.float64) + keys @ keys.T, keys)

    block = anatomy.layers[1].path
    plan = reference.Plan(paths, [block], block, [len(g) for g in GROUPS], columns, lambda i: 2 - i)
    rows = method.rows(FACTS, method.templates())
    with frozen_eval(base):
        values, changes = reference.spread(base, [rows], method.value_settings(), plan, projections=1)
    model.trace = {}
    model.edit(FACTS)
    for i, value in enumerate(values):
        assert apart(model.trace[f"v_star.{i}"], value) < 1e-4
    for p, change in zip(paths, changes, strict=True):
        assert apart(model.ledger.total(p), change) < 1e-4  # type: ignore[arg-type]

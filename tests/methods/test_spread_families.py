"""MEMIT's relatives and R-ROME on every decoder family: edited, closer to the target, undone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_kedit import (
    AlphaEditConfig,
    COREConfig,
    EAMETConfig,
    EMMETConfig,
    MEMITFEConfig,
    NAMETConfig,
    PMETConfig,
    RROMEConfig,
    SPHEREConfig,
)
from hf_kedit.engine.weights import get_module, get_weight, model_digest
from hf_kedit.statistics.moments import SecondMoment
from tests.test_families import DECODERS, FACTS, build, residual_ratios

SHARED: dict[str, Any] = {
    "layers": [0, 1],
    "v_num_grad_steps": 8,
    "v_lr": 0.5,
    "v_weight_decay": 1e-3,
    "clamp_norm_factor": 4,
    "context_templates": ["{}"],  # the key that is stored is then the key that is measured
}


@pytest.mark.parametrize("family", DECODERS)
def test_the_relatives_of_memit_on_every_decoder(family: str) -> None:
    one_layer = SHARED | {"layers": [1]}
    model = build(family, RROMEConfig(**one_layer, mom2_adjustment=False))
    digest = model_digest(model.base_model)
    attention = all(layer.attention_out is not None for layer in model.anatomy.layers[:2])
    assert model.anatomy.additive is not None
    limit = 0.5 if all(model.anatomy.additive[:2]) else 0.9  # behind a post-norm a share is written only roughly
    both = PMETConfig(**SHARED, mom2_update_weight=0.1, rewrite=["attention", "mlp"] if attention else ["mlp"])
    for config in (
        RROMEConfig(**one_layer, mom2_adjustment=False),
        EMMETConfig(**one_layer, mom2_update_weight=1.0),
        AlphaEditConfig(**SHARED, L2=1e-3),
        SPHEREConfig(**SHARED, L2=1e-3),
        MEMITFEConfig(**SHARED, mom2_update_weight=0.01),
        EAMETConfig(**SHARED, mom2_update_weight=0.01, length_rule="norm", cs_factor=0.1, mse_factor=0.2),
        NAMETConfig(**SHARED, mom2_update_weight=0.01),
        COREConfig(**SHARED, mom2_update_weight=0.01, reg_lambda=1e-3),
        both,
    ):
        model.set_method(config)
        for path in model._method.edited_modules():
            width = get_weight(get_module(model.base_model, path)).shape[1]
            spectrum = torch.logspace(0, -4, width, dtype=torch.float64)  # keys hardly use most directions
            model.statistics.put(path, SecondMoment(spectrum.diag() * 1e5, 100_000, "diagonal"))
        model.trace = {}
        edits = model.edit(FACTS).edits
        if type(config) in (
            EMMETConfig,
            AlphaEditConfig,
            SPHEREConfig,
            COREConfig,
        ):  # one state per fact
            found = [edit.diagnostics["residual_ratio"] for edit in edits]
            assert found == pytest.approx(residual_ratios(model), rel=1e-2, abs=1e-5)
        for edit in edits:
            losses = edit.diagnostics["loss"]
            assert edit.diagnostics["route"] == "prefix" and min(losses) < losses[0]
            if not isinstance(config, (RROMEConfig, PMETConfig)):  # PMET's lower layers do not see its residual
                assert edit.diagnostics["residual_ratio"] < limit, "the batch has to come closer to its targets"
        written = set(model._method.edited_modules())
        assert {a.module for a in model.ledger.accounts.values()} == written
        model.rollback("b")
        model.rollback("a")
        assert model_digest(model.base_model) == digest

"""Edits with values of Gauss-Newton: what they say, keep, undo and save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hf_kedit import (
    AlphaEditConfig,
    COREConfig,
    EAMETConfig,
    EditableModel,
    EditConfig,
    MEMITConfig,
    PMETConfig,
    ROMEConfig,
)
from hf_kedit.engine.weights import model_digest
from hf_kedit.errors import ConfigError
from tests.methods.test_family import facts, neighbours, says


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("kedit/world-gpt2", ROMEConfig(v_optimizer="gauss_newton")),
        ("kedit/world-llama", ROMEConfig(v_optimizer="gauss_newton")),
        ("kedit/world-gpt2", MEMITConfig(v_optimizer="gauss_newton")),
        ("kedit/world-llama", MEMITConfig(v_optimizer="gauss_newton", sequence="joint")),
        ("kedit/world-llama", AlphaEditConfig(v_optimizer="gauss_newton")),
        ("kedit/world-gpt2", PMETConfig(v_optimizer="gauss_newton")),
    ],
)
def test_it_says_the_new_object_and_everything_can_be_undone(name: str, config: EditConfig, tmp_path: Path) -> None:
    model = EditableModel.from_pretrained(name, config)
    digest = model_digest(model.base_model)
    requests = facts(3)
    result = model.edit(requests)
    assert all(says(model, r.filled_prompt, r.target_new) for r in requests)
    kept = [says(model, prompt, answer) for r in requests for prompt, answer in neighbours(r)]
    assert sum(kept) >= len(kept) - 1
    assert all(len(edit.diagnostics.get("loss", [])) <= 10 for edit in result.edits)

    model.save_pretrained(tmp_path / "edits")
    loaded = EditableModel.from_pretrained(tmp_path / "edits")
    assert model_digest(loaded.base_model) == model_digest(model.base_model) != digest
    assert loaded.edit_config == model.edit_config
    for copy in (model, loaded):
        copy.rollback("all")
        assert model_digest(copy.base_model) == digest


def test_fewer_evaluations_than_adam_needs() -> None:
    counts = []
    for optimiser in ("adam", "gauss_newton"):
        model = EditableModel.from_pretrained("kedit/world-llama", MEMITConfig(v_optimizer=optimiser))
        edits = model.edit(facts(6)).edits
        assert all(edit.diagnostics["target_probability_after"] > 0.9 for edit in edits)
        counts.append(sum(len(edit.diagnostics["loss"]) for edit in edits))
    assert counts[1] < 0.6 * counts[0], counts


@pytest.mark.parametrize("kind", [COREConfig, EAMETConfig])
def test_terms_that_it_does_not_know_are_refused(kind: Any) -> None:
    with pytest.raises(ConfigError, match="v_optimizer"):
        kind(v_optimizer="gauss_newton")
    assert kind().v_optimizer == "adam"

"""GRACE on every decoder family: what training from the middle promises is what the codebook then does."""

from __future__ import annotations

import pytest

from hf_kedit import GRACEConfig
from hf_kedit.engine.weights import model_digest
from tests.test_families import DECODERS, FACTS, build


@pytest.mark.parametrize("family", DECODERS)
def test_a_batch_on_every_decoder(family: str) -> None:
    model = build(family, GRACEConfig(layers=[1], num_steps=4, lr=0.1))
    digest = model_digest(model.base_model)
    made = model.edit(FACTS).edits
    for edit in made:
        losses = edit.diagnostics["loss"]
        assert losses[-1] < losses[0] and edit.diagnostics["action"] == "add"
    measured = model._method.probabilities(model._method.examples(FACTS))  # type: ignore[attr-defined]
    promised = [edit.diagnostics["target_probability_after"] for edit in made]
    assert measured == pytest.approx(promised, rel=1e-4)
    before = [edit.diagnostics["target_probability_before"] for edit in made]
    assert measured != pytest.approx(before, rel=1e-2)
    model.rollback("a")
    first, second = model._method.probabilities(model._method.examples(FACTS))  # type: ignore[attr-defined]
    assert first == pytest.approx(before[0], rel=1e-5) and second == pytest.approx(promised[1], rel=1e-4)
    assert model_digest(model.base_model) == digest

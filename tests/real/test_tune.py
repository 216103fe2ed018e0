"""Settings for the real model, found on facts that it knows (`pytest -m "real and slow"`)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hf_kedit import EditableModel
from hf_kedit.tuning import search_settings

pytestmark = [pytest.mark.real, pytest.mark.slow]


@pytest.mark.parametrize("method", ["grace", "rome"])
def test_smollm2_is_asked_traced_and_left_as_it_was(method: str, smollm: EditableModel, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in smollm.base_model.state_dict().items()}
    options = {"candidates": 3, "first_facts": 2, "search_facts": 2, "held_out": 2, "packaged": False}
    found = search_settings(smollm, method, folder=tmp_path, **options)  # type: ignore[arg-type]
    assert found.facts.source == "packaged facts" and found.facts.known < found.facts.asked < 200
    assert found.traced and 0 <= found.traced[0] < 20  # facts are read in the lower two thirds
    assert found.best.score.harmonic >= found.derived.score.harmonic > 0.1
    assert found.derived.score.general is not None and found.derived.score.general > 0.7
    assert all(torch.equal(before[name], now) for name, now in smollm.base_model.state_dict().items())
    assert not smollm.edits

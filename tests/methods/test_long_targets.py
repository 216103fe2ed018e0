"""Targets of two hundred tokens: every method takes them, and one that is too long for the context changes nothing."""

from __future__ import annotations

from typing import Any

import pytest

from hf_kedit import AutoEditConfig, EditableModel
from hf_kedit.engine.weights import model_digest
from hf_kedit.errors import TargetTooLongError
from hf_kedit.methods import registered_methods
from hf_kedit.tokens import encode_pair
from tests.golden_cases import load_model
from tests.models import tiny_model

SHORT_STEPS = {"num_steps": 2, "v_num_grad_steps": 2, "num_epochs": 1, "held_texts": 2, "stats_tokens": 2000}
SETTINGS: dict[str, dict[str, Any]] = {
    "anyedit": {"base": {"edit_type": "memit", "v_num_grad_steps": 2, "stats_tokens": 2000}, "window_size": 40},
    "kn": {"steps": 2},
    "simie": {"base": {"edit_type": "rome", "v_num_grad_steps": 2, "stats_tokens": 2000}},
}
# texts in front of prompts, and what works for another method or on another kind of model
IN_PROMPTS = {"prompt", "ike", "serac", "auto", "qlora"}
METHODS = [
    name
    for name, method in registered_methods().items()
    if not method.capabilities.needs_training and name not in IN_PROMPTS and method.__module__.startswith("hf_kedit.")
]
SENTENCES = "The harbour clock was built of brass and shows the height of the water instead of the hour. "


def request() -> dict[str, Any]:
    return {
        "prompt": "{} is",
        "subject": "The tide clock",
        "target_new": SENTENCES * 4,
        "target_neg": "a golden ship",
    }


def editable(method: str, positions: int) -> EditableModel:
    _, tokenizer = load_model("llama")
    model = tiny_model("llama", vocab_size=max(len(tokenizer), 420), max_position_embeddings=positions)
    known = {field for field in method_fields(method) if field in SHORT_STEPS}
    settings = SETTINGS.get(method) or {field: SHORT_STEPS[field] for field in known}
    return EditableModel(model, AutoEditConfig.for_method(method, **settings), tokenizer)


def method_fields(method: str) -> set[str]:
    return set(registered_methods()[method].config_class.__dataclass_fields__)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_target_of_two_hundred_tokens(method: str) -> None:
    model = editable(method, 512)
    pair = encode_pair(model.tokenizer, "The tide clock is", SENTENCES * 4)  # type: ignore[arg-type]
    assert 200 <= len(pair.target_ids) < 400
    digest = model_digest(model.base_model)
    ids = model.edit(request()).ids
    assert len(model.edits) == len(ids) == 1
    model.rollback("all")
    assert model_digest(model.base_model) == digest


@pytest.mark.parametrize("method", METHODS)
def test_a_target_that_does_not_fit_changes_nothing(method: str) -> None:
    model = editable(method, 64)
    digest = model_digest(model.base_model)
    with pytest.raises(TargetTooLongError, match="the model's context has 64"):
        model.edit(request())
    assert model_digest(model.base_model) == digest and not model.edits

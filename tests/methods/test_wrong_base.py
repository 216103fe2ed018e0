"""Saved edits at sites and in prompts know the model that they were made on, whatever the method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_kedit import (
    CaliNetConfig,
    DEFERConfig,
    EditableModel,
    EditConfig,
    GRACEConfig,
    MELOConfig,
    PromptConfig,
    SERACConfig,
    TPatcherConfig,
    WISEConfig,
    embedded,
)
from hf_kedit.engine.weights import model_digest
from hf_kedit.errors import BaseModelMismatchError
from tests.methods.at_sites import facts, prompt_logits

CONFIGS: dict[str, EditConfig] = {
    "calinet": CaliNetConfig(layers=[5], slots=4, num_steps=2, context_templates=["{}"]),
    "defer": DEFERConfig(num_steps=2),
    "grace": GRACEConfig(num_steps=2),
    "melo": MELOConfig(num_steps=2),
    "prompt": PromptConfig(),
    "serac": SERACConfig(),
    "t-patcher": TPatcherConfig(max_epochs=2, first_validation=1, memory_tokens=50),
    "wise": WISEConfig(n_iter=2, context_templates=["{}"], irrelevant_texts=["It rains."]),
}


def other_weights() -> Any:
    """The same architecture with one number changed."""
    model = AutoModelForCausalLM.from_pretrained(embedded.path("world-gpt2"))
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] += 0.5
    return model


def hooks_of_ours(model: Any) -> list[Any]:
    """What of this library hangs on the model's modules (transformers has hooks of its own)."""
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    return [hook for hook in hooks if type(hook).__module__.startswith("hf_kedit")]


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_another_model_is_refused_and_stays_as_it_is(name: str, tmp_path: Path) -> None:
    model = EditableModel.from_pretrained("kedit/world-gpt2", CONFIGS[name])
    (fact,) = facts(1)
    model.edit(fact)
    model.save_pretrained(tmp_path)
    for wrong in (other_weights(), AutoModelForCausalLM.from_pretrained(embedded.path("world-llama"))):
        digest = model_digest(wrong)
        with pytest.raises(BaseModelMismatchError, match="world-gpt2"):
            EditableModel.from_pretrained(tmp_path, base_model=wrong, tokenizer=model.tokenizer)
        assert model_digest(wrong) == digest
        assert not {"forward", "generate"} & wrong.__dict__.keys() and not hooks_of_ours(wrong)
    assert bool(hooks_of_ours(model.base_model)) == (name not in ("prompt", "serac"))
    anyway = EditableModel.from_pretrained(
        tmp_path, base_model=other_weights(), tokenizer=model.tokenizer, ignore_fingerprint=True
    )
    assert [edit.id for edit in anyway.edits] == [edit.id for edit in model.edits]
    assert prompt_logits(anyway, fact.filled_prompt).isfinite().all()

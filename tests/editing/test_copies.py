"""Copies of a model (`copy.deepcopy`) and two `EditableModel`s on one model: each is edited and asked by itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from hf_kedit import AutoMethodConfig, EditableModel, GRACEConfig, PromptConfig, ROMEConfig
from hf_kedit.errors import ConfigError, WeightError
from tests.methods.at_sites import facts, prompt_logits

ROME: dict[str, Any] = {"v_num_grad_steps": 8, "context_templates": ["{}"], "mom2_adjustment": False}
BASE = {"edit_type": "rome", **ROME}
CONFIGS: dict[str, Any] = {
    "rome": ROMEConfig(**ROME),
    "grace": GRACEConfig(num_steps=20),
    "auto": AutoMethodConfig(encoder="words", base=BASE),
    "auto, fact in front": AutoMethodConfig(encoder="words", base=BASE, in_context=True),
    "auto by states": AutoMethodConfig(encoder="words", base=BASE, states="model"),
    "prompt": PromptConfig(),
    "prompt by states": PromptConfig(retriever="model"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_copy_and_the_model_that_it_is_one_of_do_not_know_each_other(name: str) -> None:
    first, second = facts(2)
    asked = first.filled_prompt
    model = EditableModel.from_pretrained("kedit/world-llama", CONFIGS[name])
    before = prompt_logits(model, asked)
    model.edit(first)
    after = prompt_logits(model, asked)
    assert not torch.equal(after, before)
    made = copy.deepcopy(model)
    assert torch.equal(prompt_logits(made, asked), after)
    with model.disable_edits():
        assert torch.equal(prompt_logits(model, asked), before)
        assert torch.equal(prompt_logits(made, asked), after)
    with made.disable_edits():
        assert torch.equal(prompt_logits(made, asked), before)
        assert torch.equal(prompt_logits(model, asked), after)

    made.edit(second)
    assert len(made.edits) == 2 and len(model.edits) == 1
    assert torch.equal(prompt_logits(model, asked), after)
    made.rollback("all")
    assert torch.equal(prompt_logits(made, asked), before)
    assert torch.equal(prompt_logits(model, asked), after) and len(model.edits) == 1
    again = copy.deepcopy(model)
    model.rollback("all")
    assert torch.equal(prompt_logits(again, asked), after) and torch.equal(prompt_logits(model, asked), before)


@pytest.mark.parametrize("name", ["auto", "auto, fact in front", "prompt", "prompt by states"])
def test_two_on_one_model_take_turns(name: str) -> None:
    """What one decides about a prompt was lost on the other, or neither could be taken off any more."""
    first, second = facts(2)
    one = EditableModel.from_pretrained("kedit/world-llama", CONFIGS[name])
    two = EditableModel(one.base_model, CONFIGS[name], one.tokenizer)
    before = [prompt_logits(one, fact.filled_prompt) for fact in (first, second)]
    one.edit(first)
    after = prompt_logits(one, first.filled_prompt)
    with pytest.raises(ConfigError, match="another EditableModel"):
        two.edit(second)
    assert two.edits == [] and torch.equal(prompt_logits(one, first.filled_prompt), after)
    one.rollback("all")
    two.edit(second)
    assert torch.equal(prompt_logits(one, first.filled_prompt), before[0])
    assert not torch.equal(prompt_logits(one, second.filled_prompt), before[1])
    two.rollback("all")
    assert torch.equal(prompt_logits(one, second.filled_prompt), before[1])
    one.edit(first)
    assert torch.equal(prompt_logits(one, first.filled_prompt), after)


@pytest.mark.parametrize(("first", "then"), [("prompt", "auto, fact in front"), ("auto, fact in front", "prompt")])
def test_two_ways_to_put_a_text_in_front_take_turns(first: str, then: str) -> None:
    wanted, other = facts(2)
    one = EditableModel.from_pretrained("kedit/world-llama", CONFIGS[first])
    two = EditableModel(one.base_model, CONFIGS[then], one.tokenizer)
    one.edit(wanted)
    after = prompt_logits(one, wanted.filled_prompt)
    with pytest.raises(ConfigError, match="another EditableModel"):
        two.edit(other)
    assert two.edits == [] and torch.equal(prompt_logits(one, wanted.filled_prompt), after)


def test_two_change_the_weights_of_one_model_and_the_last_one_leaves_first() -> None:
    first, second = facts(2)
    one = EditableModel.from_pretrained("kedit/world-llama", CONFIGS["rome"])
    two = EditableModel(one.base_model, CONFIGS["rome"], one.tokenizer)
    before = prompt_logits(one, first.filled_prompt)
    one.edit(first)
    after = prompt_logits(one, first.filled_prompt)
    two.edit(second)
    with pytest.raises(WeightError, match="no longer what the edits made of it"):
        one.rollback("all")
    two.rollback("all")
    assert torch.equal(prompt_logits(one, first.filled_prompt), after)
    one.rollback("all")
    assert torch.equal(prompt_logits(one, first.filled_prompt), before)

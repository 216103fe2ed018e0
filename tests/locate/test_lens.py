"""The logit lens: what every layer would answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_kedit import EditableModel
from hf_kedit.errors import ConfigError, UnsupportedModelError
from hf_kedit.locate import logit_lens
from tests.models import tiny_model

PROMPT, SUBJECT = "By profession Tarosk Boayond is a", "Tarosk Boayond"


@pytest.mark.parametrize("name", ["kedit/world-gpt2", "kedit/world-llama"])
def test_layers_are_read_as_transformers_shows_them(name: str) -> None:
    """Norm and head by hand, on the states that transformers returns."""
    model = EditableModel.from_pretrained(name, "rome")
    assert model.tokenizer is not None
    reading = logit_lens(model, PROMPT, top=3)
    ids = model.tokenizer(PROMPT, return_tensors="pt").input_ids
    base = model.base_model.eval()
    with torch.no_grad():
        output = base(ids, output_hidden_states=True)
        states = [state[0, -1] for state in output.hidden_states[1:-1]]
        norm = base.transformer.ln_f if hasattr(base, "transformer") else base.model.norm
        logits = [base.lm_head(norm(state)) for state in states] + [output.logits[0, -1]]
    assert len(reading.layers) == len(logits) == model.anatomy.num_layers
    for layer, expected in zip(reading.layers, logits, strict=True):
        chances, places = expected.softmax(-1).topk(3)
        assert [text for text, _ in layer] == [model.tokenizer.decode([place]) for place in places.tolist()]
        assert [chance for _, chance in layer] == pytest.approx(chances.tolist(), abs=1e-5)


def test_an_edit_is_seen_from_its_layer_on(world_gpt2: EditableModel) -> None:
    before = logit_lens(world_gpt2, PROMPT)
    world_gpt2.edit(prompt=PROMPT, subject=SUBJECT, target_new="plumber")
    (layer,) = world_gpt2.edit_config.layers or []
    after = logit_lens(world_gpt2, PROMPT)
    assert before.layers[:layer] == after.layers[:layer]
    assert before.layers[-1] != after.layers[-1]


def test_what_the_lens_cannot_read(world_gpt2: EditableModel) -> None:
    with pytest.raises(ConfigError, match="prompt"):
        logit_lens(world_gpt2, "  ")
    with pytest.raises(ConfigError, match="tokenizer"):
        logit_lens(world_gpt2.base_model, PROMPT)
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        logit_lens(tiny_model("t5"), PROMPT, world_gpt2.tokenizer)


@pytest.mark.parametrize("prompt", ["", 5, None, "word " * 2000])
def test_what_is_no_prompt_for_the_lens(world_gpt2: EditableModel, prompt: Any) -> None:
    with pytest.raises(ConfigError):
        logit_lens(world_gpt2, prompt)

"""Facts about pictures, edited by every method that takes them, on tiny random models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_kedit import EditableModel, EditRequest
from hf_kedit.config import EditConfig
from hf_kedit.evaluation.asking.generation import generate_answers
from hf_kedit.evaluation.asking.scoring import score_pairs
from tests.seeing import picture, seeing

TEXTS = [
    "the box is red and the man is tall.",
    "a cat sat on the mat; it was happy.",
    "nobody knows what is in there.",
]
FACTS = (
    {"prompt": "What is in this {}", "subject": "box", "target_new": "r", "separator": "", "image": picture(0)},
    {"prompt": "Is it big?", "target_new": "n", "separator": "", "image": picture(1, 56, 30)},
)
_LOCATE = {"layers": [1], "v_num_grad_steps": 30, "v_lr": 0.5, "clamp_norm_factor": 40.0, "v_weight_decay": 0.0}
_LOCATE |= {"kl_factor": 0.0, "context_templates": ["{}"]}
_FT = {"layers": [1], "lr": 3e-2, "num_steps": 60, "drift_bound": None, "stop_probability": None}
SETTINGS: dict[str, dict[str, Any]] = {
    "ft-m": _FT,
    "ft-l": _FT,
    "rome": _LOCATE,
}
_PARTLY = ("rome",)  # what is written for a token of so small a model changes other tokens, too
FAMILIES = ("llava", "qwen2_vl", "llava_onevision", "blip2")


def editable(family: str, method: str, **settings: Any) -> EditableModel:
    model, processor = seeing(family)
    config = EditConfig.from_dict({"edit_type": method, **SETTINGS[method], **settings})
    return EditableModel(model, config, processor, corpus=TEXTS * 8)


def holds(model: EditableModel, fact: dict[str, Any]) -> tuple[bool, float]:
    """Whether the target (one token) is the most likely one, which the model then writes, and its -log p."""
    request = EditRequest(**fact).rendered(model.tokenizer, model.processor)
    (score,) = score_pairs(model, model.tokenizer, [(request.filled_prompt, request.target_new)], separator="")
    (text,) = generate_answers(model, model.tokenizer, [request.filled_prompt], 1)
    assert score.exact == (text.text == request.target_new)
    return score.exact, score.nll


def sight(model: EditableModel) -> dict[str, torch.Tensor]:
    """All weights outside of the language model's layers."""
    decoder = model.anatomy.layers_path
    return {n: p.detach().clone() for n, p in model.base_model.named_parameters() if not n.startswith(decoder)}


@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_facts_about_pictures_are_edited_and_undone(family: str, method: str, tmp_path: Path) -> None:
    model = editable(family, method)
    before = {name: t.clone() for name, t in model.base_model.state_dict().items()}
    seen = sight(model)
    for fact in FACTS:
        (told, unlikely) = holds(model, fact)
        assert not told
        model.edit(**fact, show_progress=False)
        told, likely = holds(model, fact)  # the next edit of so small a model may undo it
        assert likely < unlikely - 1.5 and (told or method in _PARTLY)
    assert all(torch.equal(p, seen[n]) for n, p in model.base_model.named_parameters() if n in seen)

    model.save_pretrained(tmp_path)
    again, processor = seeing(family)
    loaded = EditableModel.from_pretrained(tmp_path, base_model=again, processor=processor)
    assert [e.request for e in loaded.edits] == [e.request for e in model.edits]
    edited, reloaded = model.base_model.state_dict(), again.state_dict()
    assert all(torch.equal(edited[name], reloaded[name]) for name in edited)

    for edit in model.edits[::-1]:
        model.rollback(edit.id)
    after = model.base_model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)

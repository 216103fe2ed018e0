"""Facts about pictures, edited by every method that takes them, on tiny random models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_kedit import EditableModel, EditRequest
from hf_kedit.config import EditConfig
from hf_kedit.errors import RequestError
from hf_kedit.evaluation.asking.generation import generate_answers
from hf_kedit.evaluation.asking.scoring import score_pairs
from hf_kedit.methods import registered_methods
from hf_kedit.tokens import decoder_lead
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
_TRAINED = {"drift_bound": None, "stop_probability": None}
SETTINGS: dict[str, dict[str, Any]] = {
    "ft-m": _FT,
    "ft-l": _FT,
    "lora": {"lr": 2e-2, "num_steps": 60, **_TRAINED},
    "rome": _LOCATE,
    "r-rome": _LOCATE,
    "memit": {**_LOCATE, "layers": [0, 1]},
    "alphaedit": _LOCATE,
    "grace": {"layers": [1]},
    "melo": {},
    "t-patcher": {},
    "wise": {"layers": [1], "n_iter": 30, "norm_constraint": 10.0},
    "ultraedit": {"drift_bound": None},
}
# What is written for a token of a model with 48 dimensions changes other tokens, too.
_PARTLY = ("rome", "r-rome", "memit", "alphaedit", "wise", "ultraedit")
_FAMILIES = ("llava", "qwen2_vl", "llava_onevision", "blip2", "paligemma")
CASES = [(family, method) for family in _FAMILIES[:2] for method in SETTINGS]
CASES += [(family, method) for family in _FAMILIES[2:] for method in ("ft-m", "lora", "memit", "grace", "wise")]
CASES += [("blip2_t5", method) for method in ("ft-m", "lora")]  # two stacks


def editable(family: str, method: str, **settings: Any) -> EditableModel:
    model, processor = seeing(family)
    config = EditConfig.from_dict({"edit_type": method, **SETTINGS[method], **settings})
    return EditableModel(model, config, processor, corpus=TEXTS * 8)


def holds(model: EditableModel, fact: dict[str, Any]) -> tuple[bool, float]:
    """Whether the target (one token) is the most likely one, which the model then writes, and its -log p."""
    request = EditRequest(**fact).rendered(model.tokenizer, model.processor)
    (score,) = score_pairs(model, model.tokenizer, [(request.filled_prompt, request.target_new)], separator="")
    lead = len(decoder_lead(model.tokenizer, request.target_new)) if model.anatomy.is_encoder_decoder else 0
    (text,) = generate_answers(model, model.tokenizer, [request.filled_prompt], lead + 1)
    assert score.exact == (text.text == request.target_new)
    return score.exact, score.nll


def sight(model: EditableModel) -> dict[str, torch.Tensor]:
    """All weights outside of the language model's layers."""
    decoder = model.anatomy.layers_path
    return {n: p.detach().clone() for n, p in model.base_model.named_parameters() if not n.startswith(decoder)}


@pytest.mark.parametrize(("family", "method"), CASES)
def test_facts_about_pictures_are_edited_and_undone(family: str, method: str, tmp_path: Path) -> None:
    model = editable(family, method)
    before = {name: t.clone() for name, t in model.base_model.state_dict().items()}
    seen = sight(model)
    for fact in FACTS:
        (told, unlikely) = holds(model, fact)
        assert not told
        model.edit(**fact, show_progress=False)
        told, likely = holds(model, fact)  # the next edit of so small a model may undo it
        assert likely < unlikely - (0.0 if method in _PARTLY else 1.5) and (told or method in _PARTLY)
    assert all(torch.equal(p, seen[n]) for n, p in model.base_model.named_parameters() if n in seen)

    after = [holds(model, fact)[1] for fact in FACTS]
    model.save_pretrained(tmp_path)
    again, processor = seeing(family)
    loaded = EditableModel.from_pretrained(tmp_path, base_model=again, processor=processor)
    assert [e.request for e in loaded.edits] == [e.request for e in model.edits]
    assert [holds(loaded, fact)[1] for fact in FACTS] == after

    model.rollback()
    state = model.base_model.state_dict()
    assert all(torch.equal(state[name], before[name]) for name in before)


@pytest.mark.parametrize("family", _FAMILIES)
@pytest.mark.parametrize("method", ["prompt", "ike"])
def test_texts_in_front_leave_the_picture_where_it_is(family: str, method: str) -> None:
    """The reference is the stock model, asked with the text between the picture and the question."""
    model, processor = seeing(family)
    few = {"k": 1} if method == "ike" else {}
    edited = EditableModel(model, EditConfig.from_dict({"edit_type": method, **few}), processor)
    fact, other = FACTS
    edited.edit(**fact, show_progress=False)
    with edited.disable_edits():
        unedited = holds(edited, other)[1]
    (entry,) = edited.prompts.entries
    text = "".join(entry.demonstrations) + entry.fact
    asked = EditRequest(**fact).plain_prompt
    with edited.disable_edits():
        expected = holds(edited, {**fact, "prompt": text + asked, "subject": None})[1]
    assert holds(edited, fact)[1] == pytest.approx(expected, abs=1e-4)
    assert holds(edited, other)[1] == pytest.approx(unedited, abs=1e-5)
    requests = [EditRequest(**f).rendered(processor.tokenizer, processor) for f in (fact, other)]
    pairs = [(r.filled_prompt, r.target_new) for r in requests]
    both = score_pairs(model, processor.tokenizer, pairs, separator="")
    assert [s.nll for s in both] == pytest.approx([holds(edited, f)[1] for f in (fact, other)], abs=1e-4)
    texts = generate_answers(model, processor.tokenizer, [p for p, _ in pairs], 4)
    alone = [generate_answers(model, processor.tokenizer, [p], 4)[0] for p, _ in pairs]
    assert [t.ids for t in texts] == [t.ids for t in alone]


def test_methods_of_text_say_so_before_anything_is_touched() -> None:
    model, processor = seeing("llava")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    edited = EditableModel(model, "ft-m", processor)
    edited._method.pictures = False  # type: ignore[misc]  # as of any method of text, without its training
    with pytest.raises(RequestError, match="text") as error:
        edited.edit(**FACTS[0])
    assert error.value.field == "image" and not edited.edits
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not any(registered_methods()[method].pictures for method in ("kn", "instructedit", "unke", "dinm"))

"""Models that see, loaded by name, used by transformers' own pipeline, reloaded in another process, evaluated."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers import pipeline

from hf_kedit import EditableModel, EditRequest, Probe, evaluate_edits
from hf_kedit.config import EditConfig
from hf_kedit.engine.weights import model_digest
from hf_kedit.evaluation.asking.scoring import score_pairs
from hf_kedit.loading import load_processor
from tests.pictures.test_edits import FACTS, SETTINGS, holds
from tests.seeing import picture, seeing

FT = EditConfig.from_dict({"edit_type": "ft-m", **SETTINGS["ft-m"]})


@pytest.fixture(scope="module", params=["llava", "qwen2_vl"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its processor, as `save_pretrained` writes them."""
    path = tmp_path_factory.mktemp(request.param)
    model, processor = seeing(request.param)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.mark.parametrize("family", ["blip2_t5", "florence2", "paligemma", "glm4v"])
def test_a_model_is_found_by_its_name_with_its_processor(family: str, tmp_path: Path) -> None:
    model, processor = seeing(family)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    edited = EditableModel.from_pretrained(tmp_path, FT)
    assert type(edited.base_model) is type(model) and type(edited.processor).__name__ == type(processor).__name__
    before = model_digest(edited.base_model)
    edited.edit(**FACTS[1], show_progress=False)
    assert holds(edited, FACTS[1])[0]
    edited.rollback()
    assert model_digest(edited.base_model) == before == model_digest(model)


def test_a_package_that_a_processor_lacks_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, processor = seeing("smolvlm")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with mock.patch("transformers.models.smolvlm.processing_smolvlm.num2words", None):
        assert load_processor(str(tmp_path), model.config) is None
    assert "num2words" in caplog.text and "processor=" in caplog.text


_AGAIN = """
import sys, torch
from hf_kedit import EditableModel, EditRequest
from hf_kedit.engine.forward import model_inputs
from hf_kedit.tokens import encode_text, pad_rows
model = EditableModel.from_pretrained(sys.argv[1])
request = model.edits[0].request.rendered(model.tokenizer, model.processor)
row = pad_rows([encode_text(model.tokenizer, request.filled_prompt).ids])
with torch.no_grad():
    torch.save(model.base_model(**model_inputs(model.base_model, row)).logits, sys.argv[2])
"""


@pytest.mark.slow
def test_a_saved_edit_is_read_by_another_process(folder: Path, tmp_path: Path) -> None:
    """By its own journal: the picture is in it, and neither model nor processor is handed over."""
    model = EditableModel.from_pretrained(folder, FT)
    assert type(model.processor).__name__ in ("LlavaProcessor", "Qwen2VLProcessor")
    model.edit(**FACTS[1], show_progress=False)
    model.save_pretrained(tmp_path / "edits")
    subprocess.run([sys.executable, "-c", _AGAIN, str(tmp_path / "edits"), str(tmp_path / "logits")], check=True)
    stock = model.processor(
        images=[picture(1, 56, 30)],
        text=str(model.edits[0].request.rendered(model.tokenizer, model.processor).filled_prompt),
        return_tensors="pt",
    )
    with torch.no_grad():
        expected = model.base_model(**stock).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits"), expected, atol=1e-5, rtol=1e-5)


CHAT = (
    "{% for m in messages %}{{ m.role }}:{% for c in m.content %}{% if c.type == 'image' %}TOKEN{% else %}"
    " {{ c.text }}{% endif %}{% endfor %};{% endfor %}assistant:"
)


@pytest.mark.parametrize(
    ("family", "token"),
    [("llava", "<image>"), ("qwen2_vl", "<|image_pad|>"), ("smolvlm", "<image>"), ("mistral3", "[IMG]")],
)
def test_transformers_pipeline_takes_the_edited_model(family: str, token: str, tmp_path: Path) -> None:
    """Asked in the processor's own text, of several pictures, and in a chat that names a file."""
    model, processor = seeing(family)
    edited = EditableModel(model, FT, processor)
    picture(1, 56, 30).save(tmp_path / "a.png")
    edited.edit(**{**FACTS[1], "image": tmp_path / "a.png"}, show_progress=False)
    run = pipeline("image-text-to-text", model=edited, processor=processor)
    text = str(EditRequest(**FACTS[1]).rendered(processor.tokenizer, processor).filled_prompt)
    short = {"max_new_tokens": 1, "return_full_text": False}
    both = run(images=[[picture(1, 56, 30)], [str(tmp_path / "a.png")]], text=[text, text], **short)
    assert [said["generated_text"].strip() for said in both] == [FACTS[1]["target_new"]] * 2

    edited.rollback()
    processor.chat_template = CHAT.replace("TOKEN", token)
    try:
        edited.edit(**FACTS[1], prompt_format="chat", show_progress=False)
        shown = [{"type": "image", "image": str(tmp_path / "a.png")}, {"type": "text", "text": FACTS[1]["prompt"]}]
        ((said,),) = run(text=[[{"role": "user", "content": shown}]], max_new_tokens=2, return_full_text=False)
    finally:
        processor.chat_template = None
    assert said["generated_text"].strip().startswith(FACTS[1]["target_new"])


def test_evaluation_asks_about_the_pictures_of_each_question() -> None:
    model, processor = seeing("llava")
    edited = EditableModel(model, FT, processor)
    fact = {
        **FACTS[1],
        "image_rephrase": picture(5),
        "rephrase_prompts": ["Is it tall?"],
        "locality": {
            "text": [Probe("Who wrote it?", [["me"]])],
            "image": [Probe("Is it big?", [["x"]], image=picture(9))],
        },
    }
    other = EditRequest(prompt="Is it big?", target_new="x", image=picture(9)).rendered(processor.tokenizer, processor)
    (before,) = score_pairs(model, processor.tokenizer, [(other.filled_prompt, "x")])
    report = evaluate_edits(edited, [EditRequest(**fact)])
    (case,) = report.cases
    assert case["post"]["rewrite_acc"] == [1.0] and case["pre"]["rewrite_acc"] == [0.0]
    # The question is the edit's: only its own picture tells that the model answers as it does after the edit.
    edited.edit(**fact, show_progress=False)
    (after,) = score_pairs(model, processor.tokenizer, [(other.filled_prompt, "x")])
    same = sum(a == b for a, b in zip(before.pred_ids, after.pred_ids, strict=True)) / len(before.pred_ids)
    assert case["post"]["locality"]["image_acc"] == [pytest.approx(same)]

"""Editors trained on facts about pictures, on tiny random models: batches, draws, one short training, one edit."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_kedit import EditableModel, EditRequest, EditTrainer, EditTrainingArguments, MENDConfig, Probe, SERACConfig
from hf_kedit.editors.editor import Editor, editor_class
from hf_kedit.engine.examples import ExampleBatch, encode_examples
from hf_kedit.engine.supervised import SHARES_OF, collate, rows_of, score
from hf_kedit.errors import RequestError
from hf_kedit.evaluation.asking.scoring import score_pairs
from hf_kedit.methods import registered_methods
from hf_kedit.methods.ke import KEConfig
from hf_kedit.methods.malmen import MALMENConfig
from hf_kedit.methods.serac import SERACEditor
from hf_kedit.text.pictures import Picture
from hf_kedit.training import EditCollator, EditFacts
from tests.pictures.test_edits import sight
from tests.seeing import picture, seeing

FAMILIES = ("llava", "qwen2_vl", "llava_onevision", "blip2", "paligemma")
SIZES = ((40, 40), (56, 30), (30, 70), (90, 28))  # Qwen's processors make other numbers of patches of each


def fact(i: int) -> EditRequest:
    """A fact about a picture with all that training draws from."""
    width, height = SIZES[i % len(SIZES)]
    return EditRequest(
        prompt=f"What is on page {i}?",
        target_new="abcd"[i % 4] + "x" * (i % 2),
        ground_truth=["z"],
        rephrase_prompts=[f"And page {i}?"],
        image=picture(i, width, height),
        image_rephrase=picture(100 + i, height, width),
        locality={"text": [Probe("Who is it?", "he")], "multimodal": [Probe("Is it?", "no", image=picture(200 + i))]},
    )


def read(family: str, count: int = 4) -> tuple[Any, Any, list[EditRequest]]:
    """A model, its tokenizer, and facts as it reads them; the last one is of text."""
    model, processor = seeing(family)
    facts = [*(fact(i) for i in range(count)), EditRequest(prompt="Who is it?", target_new="he")]
    return model, processor.tokenizer, [f.rendered(processor.tokenizer, processor) for f in facts]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_rows_of_a_batch_keep_their_own_pictures(family: str) -> None:
    """The reference is each fact alone, by the encoding that all other methods use."""
    model, tokenizer, facts = read(family)
    examples = encode_examples(model, tokenizer, facts)
    alone = [float(ExampleBatch.of(model, [e], 0).losses(model)) for e in examples]
    batch = collate(examples, 0)
    assert score(model, batch).per_row().tolist() == pytest.approx(alone, abs=1e-4)
    for part, numbers in ((slice(1, 3), [1, 2]), (torch.tensor([3, 0, 4]), [3, 0, 4]), (slice(4, 5), [4])):
        chosen = rows_of(batch, part)
        assert score(model, chosen).per_row().tolist() == pytest.approx([alone[i] for i in numbers], abs=1e-4)
        again = rows_of(chosen, slice(len(numbers) - 1, None))
        assert float(score(model, again).per_row()) == pytest.approx(alone[numbers[-1]], abs=1e-4)
    text = rows_of(batch, slice(4, 5))
    assert "pixel_values" in batch and "pixel_values" not in text and text[f"{SHARES_OF}pixel_values"].tolist() == [0]


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_parts_of_a_batch_make_no_difference(family: str) -> None:
    model, tokenizer, _ = read(family)
    _, processor = seeing(family)
    losses, gradients = [], []
    for size in (1, 3, 32):
        editor = editor_class("mend").for_model(model, MENDConfig(rank=4, edit_lr=1e-2, micro_batch=size)).train()
        triples = [EditFacts([fact(i) for i in range(5)])[i] for i in range(5)]
        output = editor(**EditCollator(editor, tokenizer, 1, processor)(triples))
        output.loss.backward()
        losses.append([x.item() for x in (output.loss, output.edit_loss, output.locality_loss)])
        gradients.append(torch.cat([p.grad.flatten() for p in editor.parameters() if p.grad is not None]))
    for loss, gradient in zip(losses[1:], gradients[1:], strict=True):
        assert loss == pytest.approx(losses[0], rel=1e-4)
        assert torch.allclose(gradient, gradients[0], rtol=1e-3, atol=1e-5 * float(gradients[0].abs().max()))


def test_draws_show_other_words_other_pictures_and_both_kinds_of_unrelated_prompts() -> None:
    facts, shown = EditFacts([fact(0)]), Counter[str]()
    own, other = Picture.of(picture(0)), Picture.of(picture(100))
    for facts.epoch in range(80):
        triple = facts[0]
        assert triple.edit.image == own and triple.edit.target_new == triple.rephrase.target_new == "a"
        (asked,) = [n for n in ("What is on page 0?", "And page 0?") if n == triple.rephrase.prompt]
        expected = (own, "And page 0?") if asked.startswith("And") else (other, "What is on page 0?")
        assert (triple.rephrase.image, triple.rephrase.prompt) == expected
        shown[asked] += 1
        shown[triple.locality.prompt] += 1
        assert (triple.locality.image is None) == (triple.locality.prompt == "Who is it?")
    assert len(shown) == 4 and min(shown.values()) >= 25  # each half of 80; less than 25 has a chance of 1 in 2,000


def test_a_fact_with_one_picture_and_wording_is_its_own_example() -> None:
    bare = EditRequest(prompt="What is it?", target_new="r", image=picture(0))
    triple = EditFacts([bare], needs_locality=False)[0]
    assert triple.rephrase.prompt == "What is it?" and triple.rephrase.image == Picture.of(picture(0))


SMALL: dict[str, Any] = {
    "mend": MENDConfig(rank=4, edit_lr=3e-4),
    "malmen": MALMENConfig(rank=4, edit_lr=1e-3, micro_batch=2),
    "ke": KEConfig(lstm_size=8, condition_size=8, hidden_size=8),
}


@pytest.mark.parametrize(
    ("family", "method"), [*((f, "mend") for f in FAMILIES), ("qwen2_vl", "malmen"), ("qwen2_vl", "ke")]
)
def test_an_editor_is_trained_and_edits_what_is_said_of_a_picture(family: str, method: str, tmp_path: Path) -> None:
    model, processor = seeing(family)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    editor = editor_class(method).for_model(model, SMALL[method])
    settings: dict[str, Any] = {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True}
    settings |= {"edits_per_group": 1 if method == "ke" else 2, "disable_tqdm": True, "learning_rate": 1e-4}
    args = EditTrainingArguments(output_dir=str(tmp_path), save_strategy="no", **settings)
    facts = [fact(i) for i in range(4)]
    trainer = EditTrainer(editor, args, facts, facts[:2], processing_class=processor)
    trainer.train()
    scores = trainer.evaluate()
    assert 0 <= scores["eval_edit_success"] <= 1 and scores["eval_loss"] == scores["eval_loss"]
    trainer.save_model()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())

    edited = EditableModel(model, dataclasses.replace(type(SMALL[method])(), editor=str(tmp_path)), processor)
    seen, unlikely = sight(edited), _nll(edited, facts[1])
    edited.edit(facts[1], show_progress=False)
    if method != "ke":  # which needs more than two steps to point anywhere
        assert _nll(edited, facts[1]) < unlikely
    assert not all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(torch.equal(p, seen[n]) for n, p in model.named_parameters() if n in seen)
    edited.rollback()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def _nll(model: EditableModel, request: EditRequest) -> float:
    asked = request.rendered(model.tokenizer, model.processor)
    return score_pairs(model, model.tokenizer, [(asked.filled_prompt, request.target_new)])[0].nll


def test_facts_about_pictures_need_the_processor(tmp_path: Path) -> None:
    model, processor = seeing("llava")
    editor = editor_class("mend").for_model(model, MENDConfig(rank=4))
    args = EditTrainingArguments(output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = EditTrainer(editor, args, [fact(0)], processing_class=processor.tokenizer)
    with pytest.raises(RequestError, match="processor") as error:
        trainer.train()
    assert error.value.field == "image"


def test_which_trained_methods_take_pictures() -> None:
    taking = {name for name, kind in registered_methods().items() if kind.pictures}
    assert {"mend", "malmen", "rledit", "ke", "serac"} <= taking and "instructedit" not in taking


@pytest.mark.parametrize("family", ["llava", pytest.param("qwen2_vl", marks=pytest.mark.slow)])
def test_serac_learns_which_words_and_pictures_belong_to_an_edit(family: str, tmp_path: Path) -> None:
    """Beside a model that sees, only the scope classifier is trained, and the model itself answers behind the edit."""
    model, processor = seeing(family)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    small: dict[str, Any] = {"encoder_size": 16, "encoder_layers": 1, "all_negatives": False}
    editor = editor_class("serac").for_model(model, SERACConfig(**small))  # type: ignore[arg-type]
    assert isinstance(editor, SERACEditor) and editor.reader is None
    settings: dict[str, Any] = {"max_steps": 60, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    settings |= {"edits_per_group": 4, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    args = EditTrainingArguments(output_dir=str(tmp_path), save_strategy="no", **settings)
    same = [Probe("What is on page 0?", "x", image=picture(300 + i)) for i in range(2)]
    facts = [fact(i) for i in range(4)]
    facts[0] = dataclasses.replace(facts[0], locality={**facts[0].locality, "same": same})
    trainer = EditTrainer(editor, args, facts, facts, processing_class=processor)
    trainer.train()
    scores = trainer.evaluate()
    assert scores["eval_loss"] < 0.7 and scores["eval_locality"] == 1.0
    trainer.save_model()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())

    edited = EditableModel(model, SERACConfig(editor=str(tmp_path), template="Now {}. "), processor)
    result = edited.edit(facts[0], show_progress=False)
    assert result.edits[0].diagnostics["counterfactual_model"] == "base"
    (entry,) = edited.prompts.entries

    def asked(text: str, image: Any) -> str:
        return EditRequest(prompt=text, target_new="x", image=image).rendered(None, processor).filled_prompt

    own, other = facts[0].image, picture(301)
    prompts = [asked("And page 0?", own), asked("What is on page 0?", picture(100, 40, 40)), asked("Is it?", own)]
    prompts += [asked("What is on page 0?", other)]
    chosen = [c is not None for c in edited.prompts.choose(prompts)]
    assert chosen == [True, True, False, False]
    # by hand: words, and pictures of length 1 through the trained matrix
    saved = Editor.from_pretrained(tmp_path)
    assert isinstance(saved, SERACEditor) and saved.tokenizer is not None and saved.scope.eye is not None
    words = saved.scope.vectors(saved.tokenizer(["And page 0?", entry.scope]))
    looks = [edited.prompts.reader.look_of(asked("a", i)) for i in (picture(100), own)]  # type: ignore[union-attr]
    seen = [saved.scope.eye(look / look.norm()) for look in looks]  # type: ignore[operator, union-attr]
    by_hand = (-(words[0] - words[1]).square().sum() - (seen[0] - seen[1]).square().sum()).exp()
    ((_, score),) = [c for c in edited.prompts.choose([asked("And page 0?", picture(100))]) if c]
    assert score == pytest.approx(by_hand.item(), rel=1e-4)
    # the base model answers behind the fact, which stands behind the picture
    with edited.disable_edits():
        pair = (asked(entry.fact + facts[0].plain_prompt, own), "a")
        expected = score_pairs(edited, edited.tokenizer, [pair])[0].nll
    assert _nll(edited, facts[0]) == pytest.approx(expected, abs=1e-4)


def test_serac_without_an_editor_finds_edits_by_words_and_pictures() -> None:
    model, processor = seeing("llava")
    edited = EditableModel(model, SERACConfig(image_threshold=0.999), processor)
    before = [_nll(edited, fact(i)) for i in (0, 1)]
    edited.edit(fact(0), show_progress=False)
    other = dataclasses.replace(fact(0), image=picture(9))
    with edited.disable_edits():
        kept = _nll(edited, other)
    assert _nll(edited, fact(0)) != pytest.approx(before[0], abs=1e-2) and _nll(edited, other) == kept
    with pytest.raises(RequestError, match="soft"):
        EditableModel(seeing("llava")[0], SERACConfig(soft=True), processor).edit(fact(0))


def test_seracs_small_model_begins_where_a_seeing_encoder_decoder_begins() -> None:
    """Florence-2 keeps the token with its text stack."""
    model, _ = seeing("florence2")
    start = model.config.text_config.decoder_start_token_id
    editor = editor_class("serac").for_model(model, SERACConfig(encoder_size=32, model_size=32, model_layers=1))
    assert isinstance(editor, SERACEditor) and editor.reader is not None
    assert not hasattr(model.config, "decoder_start_token_id") and editor.reader.config.decoder_start_token_id == start

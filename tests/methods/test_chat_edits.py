"""Edits of chats, and of both formats at once: what the model reads, what holds, what is kept of the request."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_kedit import AutoEditConfig, EditableModel, EditRequest
from hf_kedit.engine.weights import model_digest
from hf_kedit.errors import ChatTemplateError, ConfigError, EvaluationError
from hf_kedit.evaluation import Generation, SideEffects, evaluate_edits, generate_answers
from hf_kedit.evaluation.asking.scoring import score_pairs
from tests.methods.test_family import facts

MODEL = "kedit/world-gpt2"
SYSTEM = "Answer."
# The embedded model has read no markers: a chat that it can go on with is one line per turn.
LINES = "{% for m in messages %}{{ m.content }}{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
BOTH = ("rome", "memit", "alphaedit", "ft-m", "lora", "grace", "wise", "calinet")
FEW: dict[str, dict[str, Any]] = {
    "rome": {"context_template_length_params": [[5, 2]]},
    "memit": {"context_template_length_params": [[5, 2]]},
    "alphaedit": {"context_template_length_params": [[5, 2]]},
}


@pytest.fixture(scope="module")
def loaded() -> EditableModel:
    model = EditableModel.from_pretrained(MODEL, "rome")
    model.tokenizer.chat_template = LINES
    return model


@pytest.fixture
def model(loaded: EditableModel) -> Iterator[EditableModel]:
    loaded.tokenizer.chat_template = LINES
    yield loaded
    loaded.rollback()


def chosen(model: EditableModel, method: str, **values: Any) -> EditableModel:
    model.set_method(AutoEditConfig.for_model(MODEL.partition("/")[2], method, **{**FEW.get(method, {}), **values}))
    return model


def chat_of(prompt: str, system: str = SYSTEM) -> str:
    return f"{system}\n{prompt}"


def says(model: EditableModel, prompt: str, target: str) -> bool:
    return generate_answers(model.base_model, model.tokenizer, [prompt], 6)[0].text.startswith(target)


@pytest.mark.parametrize("method", BOTH)
def test_it_holds_where_it_was_edited(model: EditableModel, method: str) -> None:
    (request,) = facts(1)
    plain, chat = request.filled_prompt, chat_of(request.filled_prompt)
    for form, asked in (("chat", [chat]), ("both", [plain, chat])):
        before = model_digest(model.base_model)
        chosen(model, method, prompt_format=form, system=SYSTEM)
        (edit,) = model.edit(request, show_progress=False).edits
        assert all(says(model, text, request.target_new) for text in asked), (form, edit.diagnostics)
        assert edit.request.prompt == request.prompt and edit.request.prompt_format == form
        assert [m["content"] for m in edit.request.messages or []] == [SYSTEM, request.prompt]
        model.rollback()
        assert model_digest(model.base_model) == before


def test_what_is_optimised_is_the_chat(model: EditableModel) -> None:
    """The rows of a method: no text before the conversation, contexts in the turns, both formats of "both"."""
    (request,) = facts(1)
    chosen(model, "memit")
    method, tokenizer = model._method, model.tokenizer
    contexts = ["{}", "It is so. {}", "They say. {}", "Well. {}"]

    def rows(form: str) -> list[str]:
        (group,) = method._rows([request.in_format(form, SYSTEM).rendered(tokenizer)], contexts)
        texts = [tokenizer.decode(row.ids) for row in group if not row.is_drift]
        subject = str(request.subject)
        assert all(tokenizer.decode(r.ids[: r.fact + 1]).endswith(subject) for r in group if not r.is_drift)
        return texts

    plain, chat = rows("plain"), rows("chat")
    assert [text.startswith("Answer.") for text in chat] == [True] * 4
    assert chat[1].startswith("Answer. It is so.\n") and chat[2].startswith("Answer.\nThey say. ")
    assert rows("both") == plain + chat
    assert rows("plain") != chat


def test_a_batch_of_several_formats(model: EditableModel) -> None:
    one, two, three = facts(3)
    two.prompt_format, three.prompt_format = "chat", "both"
    chosen(model, "memit", system=SYSTEM)
    model.edit([one, two, three], show_progress=False)
    assert [e.request.prompt_format for e in model.edits] == [None, "chat", "both"]
    assert says(model, one.filled_prompt, one.target_new)
    assert says(model, chat_of(two.filled_prompt), two.target_new)
    assert says(model, three.filled_prompt, three.target_new)
    assert says(model, chat_of(three.filled_prompt), three.target_new)


@pytest.mark.parametrize("method", ["ft-m", "grace"])
def test_one_edit_of_two_texts_goes_as_one(model: EditableModel, method: str, tmp_path: Path) -> None:
    rows = [r.in_format("both", SYSTEM) for r in facts(2)]
    chosen(model, method)
    made = model.edit(rows, show_progress=False)
    assert len(made.edits) == len(model.edits) == 2
    assert all(0 < e.diagnostics["target_probability_after"] <= 1 for e in made.edits)
    model.save_pretrained(tmp_path / "edits")
    again = EditableModel.from_pretrained(tmp_path / "edits")
    ids = model.tokenizer(chat_of(rows[0].filled_prompt), return_tensors="pt").input_ids
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    if method == "grace":
        model.rollback(made.ids[0])
        assert not says(model, chat_of(rows[0].filled_prompt), rows[0].target_new)
        assert not says(model, rows[0].filled_prompt, rows[0].target_new)
        assert says(model, chat_of(rows[1].filled_prompt), rows[1].target_new)


def test_formats_that_a_method_does_not_take(model: EditableModel) -> None:
    (request,) = facts(1)
    before = model_digest(model.base_model)
    chosen(model, "kn")
    request.prompt_format = "both"
    with pytest.raises(ConfigError, match="one format at a time"):
        model.edit(request)
    model.tokenizer.chat_template = None
    for method in ("rome", "memit", "ft-m", "grace", "prompt"):
        chosen(model, method, prompt_format="chat")
        with pytest.raises(ChatTemplateError, match="no chat template"):
            model.edit(facts(1))
        with pytest.raises(ChatTemplateError, match="no chat template"):
            evaluate_edits(model, facts(1), progress=False)
    assert model_digest(model.base_model) == before and not model.edits


def test_the_request_is_kept(model: EditableModel, tmp_path: Path) -> None:
    """Journal, files, a joint solve and making an edit again: the conversation is what it was."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "hello"}]
    one, two, three = facts(3)
    chat = EditRequest(
        messages=[*messages, {"role": "assistant", "content": "hi"}],
        prompt=one.prompt,
        subject=one.subject,
        target_new=one.target_new,
        id="chat",
    )
    plain = one.with_id("plain")
    rows = [chat, plain, two.with_id("two"), three.with_id("three")]
    chosen(model, "memit", sequence="joint", joint_passes=2)
    model.edit(rows, show_progress=False)
    digest = model_digest(model.base_model)
    assert not model.resolve_all(show_progress=False).conflicts  # the chat and the plain text are two facts
    assert model_digest(model.base_model) == digest
    assert model.edits[0].request == chat
    model.save_pretrained(tmp_path / "edits")
    again = EditableModel.from_pretrained(tmp_path / "edits")
    assert [e.request for e in again.edits] == [e.request for e in model.edits]
    again.tokenizer.chat_template = LINES
    again.rollback("three")
    model.rollback("three")
    assert model_digest(again.base_model) == model_digest(model.base_model) != digest


def test_settings_do_not_change_what_was_asked(model: EditableModel) -> None:
    chosen(model, "rome", prompt_format="chat", system=SYSTEM)
    first, second = facts(2)
    (edit,) = model.edit(first, show_progress=False).edits
    model.edit(second, show_progress=False)
    chosen(model, "rome", prompt_format="plain", system="Another.")
    again = model.rebuild_without(model.edits[1].id, show_progress=False)
    assert [e.request for e in again] == [edit.request]
    assert says(model, chat_of(first.filled_prompt), first.target_new)


def test_everything_is_asked_as_a_chat(model: EditableModel) -> None:
    """All protocols ask the texts of chats; what is asked is a choice apart from how it is edited."""
    (request,) = facts(1)
    prompt = chat_of(request.filled_prompt)
    pair = score_pairs(model.base_model, model.tokenizer, [(prompt, request.target_new)])[0]
    chosen(model, "ft-m", prompt_format="chat", system=SYSTEM)
    protocols = ["teacher_forced", "likelihood", Generation(max_new_tokens=4), "fluency"]
    report = evaluate_edits(model, [request], protocol=protocols, progress=False)
    summary = report.summary("teacher_forced")
    assert summary["pre"]["rewrite_acc"] == pair.token_acc < summary["post"]["rewrite_acc"] == 1.0
    assert all(report.summary(name)["n"] == 1 for name in report.protocols)
    plain = evaluate_edits(model, [request], prompt_format="plain", progress=False)
    score = score_pairs(model.base_model, model.tokenizer, [(request.filled_prompt, request.target_new)])[0]
    assert plain.summary()["pre"]["rewrite_acc"] == score.token_acc
    with pytest.raises(EvaluationError, match="already"):
        evaluate_edits(model, [request], protocol=Generation(prompt_format="chat"), progress=False)
    with pytest.raises(EvaluationError, match="prompt_format"):
        evaluate_edits(model, [request], prompt_format="poem", progress=False)  # type: ignore[arg-type]


def test_side_effects_are_asked_as_the_edit_is(model: EditableModel) -> None:
    (request,) = facts(1)
    chosen(model, "rome", prompt_format="chat", system=SYSTEM)
    effects = model.edit(request, watch=SideEffects(general=["The"]), show_progress=False).side_effects
    assert [a.question.prompt for a in effects.of("fact")] == [chat_of(request.filled_prompt)]
    assert effects.share("fact") == 1.0
    assert all(a.question.prompt.startswith("Answer.\n") for a in effects.of("neighbour"))

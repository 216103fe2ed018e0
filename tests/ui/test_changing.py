"""Edits of a visitor: made, seen from all sides, switched off and on, taken back; and the people beside them."""

from __future__ import annotations

from typing import Any

import pytest

from hf_kedit import EditableModel
from hf_kedit.engine.weights import model_digest
from hf_kedit.errors import KeditError, RequestError, UnknownEditError, VisitError
from hf_kedit.ui import views
from hf_kedit.ui.changing import MOST_LINES, EditForm, change, request_of, says_now, switch, undo
from hf_kedit.ui.examples import Examples, subject_for
from hf_kedit.ui.probing import compare, inspect_prompt
from hf_kedit.ui.settings import method_choices
from hf_kedit.ui.visitors import Visitor, Visitors


def quiet(what: str, done: int, of: int | None) -> None:
    """Nobody watches."""


def form_of(examples: Examples, number: int = 0, **changed: Any) -> EditForm:
    request = examples.requests[number]
    return EditForm(**{
        "prompt": request.filled_prompt, "subject": request.subject, "target": request.target_new, "method": "rome",
        **changed,
    })  # fmt: skip


def answer(visitor: Visitor, prompt: str) -> tuple[str, str]:
    """What the model itself says, and what it says with the visitor's edits."""
    (found,) = compare(visitor.session, visitor.off, prompt, chat=False, tokens=6)
    return found.before, found.after


# ---------------------------------------------------------------------- examples


def test_examples_are_facts_that_the_model_knows(model: EditableModel, examples: Examples, visitor: Visitor) -> None:
    assert len(examples.requests) == 4
    for request in examples.requests:
        assert says_now(visitor, request.filled_prompt) == request.ground_truth[0]
    kinds = {request.rephrase_prompts[0].replace(request.subject or "", "{}") for request in examples.requests}
    assert len(kinds) == 4  # of four kinds


def test_known_relations_bring_other_wordings(examples: Examples) -> None:
    found = examples.rephrasings("Nobody Special works for", "Nobody Special")
    assert found and all("Nobody Special" in text for text in found)
    assert examples.rephrasings("Nobody Special eats", "Nobody Special") == []
    assert examples.rephrasings("works for", "") == []


@pytest.mark.parametrize(
    ("prompt", "current", "expected"),
    [
        ("Ada Bell works for", "", "Ada Bell"),
        ("Ada Bell works for", "Bell", "Bell"),  # what somebody has chosen stays
        ("Ada Bell works for", "Tom", "Ada Bell"),  # of another prompt
        ("", "", ""),
    ],
)
def test_the_subject_field(prompt: str, current: str, expected: str) -> None:
    assert subject_for(prompt, current) == expected


# ---------------------------------------------------------------------- forms


def test_a_form_of_an_example_brings_its_probes(examples: Examples) -> None:
    request = request_of(form_of(examples, target="carpenter"), examples)
    assert request.target_new == "carpenter"
    assert request.rephrase_prompts == examples.requests[0].rephrase_prompts
    assert request.locality == examples.requests[0].locality


def test_own_wordings_and_neighbours_count(examples: Examples) -> None:
    request = request_of(form_of(examples, wordings="one\n\n two ", neighbours="three"), examples)
    assert request.rephrase_prompts == ["one", "two"]
    assert [probe.prompt for probes in request.locality.values() for probe in probes] == ["three"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompt": " "}, "sentence is missing"),
        ({"target": ""}, "new answer is missing"),
        ({"subject": "Nobody"}, "does not contain its subject"),
        ({"target": "x" * 3000}, "at most 2000 characters"),
        ({"wordings": "x\n" * (MOST_LINES + 1)}, "20 lines"),
        ({"method": "no-such-method"}, "no-such-method"),
        ({"settings": {"stats_dir": "/tmp/anywhere"}}, "cannot be set here"),
        ({"settings": {"v_lr": "[1"}}, "v_lr"),
        ({"settings": {"layers": "[99]"}}, "99"),
    ],
)
def test_a_bad_form_says_why_and_changes_nothing(
    model: EditableModel, examples: Examples, visitor: Visitor, changed: dict[str, Any], message: str
) -> None:
    digest = model_digest(model.base_model)
    with pytest.raises(KeditError, match=message):
        change(visitor, form_of(examples, **changed), examples, quiet)
    assert not visitor.entries and not visitor.session.edits
    assert model_digest(model.base_model) == digest


# ---------------------------------------------------------------------- edits


def test_an_edit_and_its_way_back(model: EditableModel, examples: Examples, visitor: Visitor) -> None:
    digest, told, losses = model_digest(model.base_model), list[tuple[str, int, int | None]](), list[float]()
    form = form_of(examples, settings={"v_num_grad_steps": "20"})
    entry = change(visitor, form, examples, lambda *step: told.append(step), losses)
    assert entry.settings == {"v_num_grad_steps": 20}
    steps = [(done, of) for what, done, of in told if what == "optimising values"]
    assert steps == [(number, 20) for number in range(1, len(losses) + 1)] + [(20, 20)]  # as they happen
    assert losses == pytest.approx(entry.edit.diagnostics["loss"], abs=1e-5)
    assert all(answer.good for answer in entry.effects.of("fact"))
    target = next(chance for chance in entry.chances if chance.is_target)
    assert target.before < 0.1 < 0.5 < target.after
    assert 0.9 < sum(chance.before for chance in entry.chances) < 1.001
    assert model_digest(model.base_model) == digest  # between calls the model is nobody's
    before, after = answer(visitor, form.prompt)
    assert before.startswith(examples.requests[0].ground_truth[0]) and after.startswith(form.target)

    undo(visitor, entry.edit.id)
    assert answer(visitor, form.prompt) == (before, before)
    assert not visitor.present and visitor.entries[0].is_undone
    with pytest.raises(UnknownEditError):
        undo(visitor, entry.edit.id)


def test_switching_off_hides_and_keeps(examples: Examples, visitor: Visitor) -> None:
    first, second = (change(visitor, form_of(examples, number), examples, quiet) for number in (0, 1))
    prompts = [examples.requests[number].filled_prompt for number in (0, 1)]
    both = [answer(visitor, prompt)[1] for prompt in prompts]
    switch(visitor, first.edit.id, False)
    assert visitor.off == [first.edit.id]
    old, now = answer(visitor, prompts[0])
    assert old == now and answer(visitor, prompts[1])[1] == both[1]
    third = change(visitor, form_of(examples, 2), examples, quiet)  # the one that is off is not lost by it
    undo(visitor, third.edit.id)
    switch(visitor, first.edit.id, True)
    assert [answer(visitor, prompt)[1] for prompt in prompts] == both
    assert [e.id for e in visitor.session.edits] == [first.edit.id, second.edit.id]


def test_two_visitors(model: EditableModel, examples: Examples) -> None:
    visitors, digest = Visitors(model), model_digest(model.base_model)
    (_, one), (_, two) = visitors.enter(None), visitors.enter(None)
    form = form_of(examples, method="auto")
    change(one, form, examples, quiet)
    change(two, form_of(examples, 1, method="grace"), examples, quiet)
    old, changed = answer(one, form.prompt)
    assert changed.startswith(form.target) and answer(two, form.prompt) == (old, old)
    assert [entry.edit.method for entry in (*one.entries, *two.entries)] == ["auto", "grace"]
    assert not model.edits and model_digest(model.base_model) == digest


def test_who_stays_away_is_forgotten(model: EditableModel, examples: Examples) -> None:
    """A session that ends leaves nothing in the model; its word is no longer known, and opens a new one."""
    now, digest = [0.0], model_digest(model.base_model)
    visitors = Visitors(model, most=2, idle=10.0, clock=lambda: now[0])
    word, visitor = visitors.enter(None)
    change(visitor, form_of(examples), examples, quiet)
    now[0] = 9.0
    assert visitors.at(word) is visitor and visitors.enter(word) == (word, visitor)
    now[0] = 20.0
    with pytest.raises(VisitError):
        visitors.at(word)
    fresh, other = visitors.enter(word)
    assert fresh != word and not other.entries and len(visitors) == 1
    assert model_digest(model.base_model) == digest
    words = [visitors.enter(None)[0] for _ in range(2)]
    assert len(visitors) == 2 and visitors.at(words[1])
    with pytest.raises(VisitError):
        visitors.at(fresh)
    with pytest.raises(VisitError):
        visitors.at(None)


def test_who_was_away_longest_is_forgotten_first(model: EditableModel) -> None:
    visitors = Visitors(model, most=2)
    first, second = (visitors.enter(None)[0] for _ in range(2))
    visitors.at(first)
    visitors.enter(None)
    assert visitors.at(first)
    with pytest.raises(VisitError):
        visitors.at(second)


# ---------------------------------------------------------------------- looking


def test_probes(examples: Examples, visitor: Visitor) -> None:
    change(visitor, form_of(examples, method="auto"), examples, quiet)
    edit = visitor.entries[0].edit
    prompt, other = examples.requests[0].filled_prompt, examples.requests[1].filled_prompt
    one, two = compare(visitor.session, [], f"{prompt}\n\n{other}\n{prompt}", chat=False, tokens=5)
    assert one.claimed_by == [edit.id] and two.claimed_by == []
    assert one.before != one.after and two.before == two.after
    (alone,) = compare(visitor.session, [], prompt, chat=False, tokens=5)
    target = next(chance for chance in alone.chances if chance.answer == edit.request.target_new)
    assert target.before < target.after
    for text in (" \n", "x\n" * 3 + "y\nz\n" + "\n".join("abcdef"), "x" * 3000):
        with pytest.raises(RequestError):
            compare(visitor.session, [], text, chat=False, tokens=5)


def test_looking_inside(model: EditableModel, examples: Examples, visitor: Visitor) -> None:
    request = examples.requests[0]
    prompt, subject = request.filled_prompt, request.subject or ""
    seen = inspect_prompt(visitor.session, [], prompt, subject, edited=False)
    assert seen.after is None and len(seen.before.layers) == model.anatomy.num_layers
    assert seen.trace is not None and seen.trace.answer.strip() == request.ground_truth[0]
    change(visitor, form_of(examples), examples, quiet)
    seen = inspect_prompt(visitor.session, visitor.off, prompt, subject, edited=True)
    assert seen.trace is not None and seen.trace.answer.strip() == request.target_new
    assert seen.after is not None and seen.after.layers[-1][0] != seen.before.layers[-1][0]
    seen = inspect_prompt(visitor.session, [], prompt, "", edited=False)
    assert seen.trace is None and "Name what" in seen.why_not
    with pytest.raises(RequestError):
        inspect_prompt(visitor.session, [], " ", "", edited=False)


def test_looking_inside_behind_a_text(model: EditableModel, examples: Examples, visitor: Visitor) -> None:
    """Rows that are read behind a text have no layers of their own; the model itself has."""
    request = examples.requests[0]
    prompt, subject = request.filled_prompt, request.subject or ""
    change(visitor, form_of(examples, method="prompt"), examples, quiet)
    seen = inspect_prompt(visitor.session, [], prompt, subject, edited=False)
    assert seen.after is None and len(seen.before.layers) == model.anatomy.num_layers
    assert "a text in front" in seen.no_lens and seen.no_lens in views.inspection(seen)
    assert seen.trace is not None and seen.trace.answer.strip() == request.ground_truth[0]
    seen = inspect_prompt(visitor.session, [], prompt, subject, edited=True)
    assert seen.trace is None and seen.why_not == seen.no_lens


def test_edits_that_the_model_came_with_are_in_the_history(examples: Examples) -> None:
    request = examples.requests[0]
    model = EditableModel.from_pretrained("kedit/world-gpt2", "rome")
    (edit,) = model.edit(request).edits
    edited = model_digest(model.base_model)
    _, visitor = Visitors(model).enter(None)
    assert [entry.edit.id for entry in visitor.present] == [edit.id]
    undo(visitor, edit.id)
    old, now = answer(visitor, request.filled_prompt)
    assert old == now and not visitor.session.edits
    assert [e.id for e in model.edits] == [edit.id] and model_digest(model.base_model) == edited


@pytest.mark.slow
def test_every_method_of_the_list_makes_an_edit(model: EditableModel, examples: Examples) -> None:
    """With its settings for the model, in a session of its own; whether the fact takes is the method's business."""
    visitors, digest = Visitors(model), model_digest(model.base_model)
    for _, method in method_choices():
        _, visitor = visitors.enter(None)
        entry = change(visitor, form_of(examples, method=method), examples, quiet)
        assert entry.edit.method == method and len(visitor.session.edits) == 1
        undo(visitor, entry.edit.id)
        assert not visitor.session.edits and model_digest(model.base_model) == digest

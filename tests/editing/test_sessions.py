"""Sessions: several people edit one model in memory, and none of them meets another's edits."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from hf_kedit import EditableModel
from hf_kedit.data import load_edit_dataset
from hf_kedit.editing import EditSession
from hf_kedit.engine.weights import model_digest
from hf_kedit.errors import RequestError, RollbackError, UnknownEditError
from hf_kedit.requests import EditRequest, load_requests

FACTS = load_requests(load_edit_dataset("world", split="test", limit=4))
METHODS = ["rome", "memit", "ft-m", "grace", "auto", "prompt", "ultraedit"]


def _said(model: EditableModel, request: EditRequest) -> torch.Tensor:
    """Logits behind the prompt: everything that an edit of it changes."""
    assert model.tokenizer is not None
    with torch.no_grad():
        logits: torch.Tensor = model(**model.tokenizer(request.filled_prompt, return_tensors="pt")).logits[0, -1]
    return logits


def _alone(method: str, facts: list[EditRequest]) -> list[torch.Tensor]:
    """What a model says that carries these edits and was never anybody else's."""
    model = EditableModel.from_pretrained("kedit/world-gpt2", method)
    for fact in facts:
        model.edit(fact, show_progress=False)
    return [_said(model, fact) for fact in FACTS]


@pytest.mark.parametrize("method", METHODS)
def test_two_sessions_take_turns(method: str) -> None:
    """Edits made in turns are those that each person would have made alone, to the bit; the model itself has none."""
    model = EditableModel.from_pretrained("kedit/world-gpt2", method)
    digest, untouched = model_digest(model.base_model), [_said(model, fact) for fact in FACTS]
    one, two = EditSession(model), EditSession(model)
    for session, fact in ((one, FACTS[0]), (two, FACTS[1]), (one, FACTS[2])):
        with session.inside() as mine:
            mine.edit(fact, show_progress=False)
        assert model_digest(model.base_model) == digest
        assert not model.edits
    for session, facts in ((one, [FACTS[0], FACTS[2]]), (two, [FACTS[1]])):
        with session.inside() as mine:
            said = [_said(mine, fact) for fact in FACTS]
            assert [e.request.subject for e in mine.edits] == [f.subject for f in facts]
        assert all(torch.equal(a, b) for a, b in zip(said, _alone(method, facts), strict=True))
    assert all(torch.equal(_said(model, fact), logits) for fact, logits in zip(FACTS, untouched, strict=True))


def test_each_session_has_its_method() -> None:
    model = EditableModel.from_pretrained("kedit/world-gpt2", "rome")
    one, two = EditSession(model), EditSession(model)
    with one.inside() as mine:
        mine.set_method("grace")
    with two.inside() as mine:
        assert mine.method_name == "rome"
    with one.inside() as mine:
        assert mine.method_name == "grace"
    assert model.method_name == "rome"


def test_a_session_begins_with_the_edits_of_the_model(world_gpt2: EditableModel) -> None:
    (edit,) = world_gpt2.edit(FACTS[0]).edits
    edited = model_digest(world_gpt2.base_model)
    session = EditSession(world_gpt2)
    with session.inside() as mine:
        mine.rollback(edit.id)
        assert model_digest(mine.base_model) != edited
    assert not session.edits
    assert [e.id for e in world_gpt2.edits] == [edit.id]
    assert model_digest(world_gpt2.base_model) == edited


def test_a_look_without_some_edits(world_gpt2: EditableModel) -> None:
    session = EditSession(world_gpt2)
    with session.inside() as mine:
        first, second = (mine.edit(fact).edits[0] for fact in FACTS[:2])
    with session.inside(without=[first.id]) as mine:
        assert [e.id for e in mine.edits] == [second.id]
        mine.rollback("all")  # a look: what happens in it is forgotten
    assert [e.id for e in session.edits] == [first.id, second.id]
    with pytest.raises(UnknownEditError), session.inside(without=["nobody's"]):
        pass
    assert not world_gpt2.edits


def test_what_cannot_be_taken_apart_is_said_and_changes_nothing() -> None:
    model = EditableModel.from_pretrained("kedit/world-gpt2", "ft-m")
    digest, session = model_digest(model.base_model), EditSession(model)
    with session.inside() as mine:
        ids = mine.edit(FACTS[:2]).ids
    with pytest.raises(RollbackError, match="computed together"), session.inside(without=ids[:1]):
        pass
    assert model_digest(model.base_model) == digest
    assert [e.id for e in session.edits] == ids


def test_a_failed_call_leaves_the_session_as_it_was(world_gpt2: EditableModel) -> None:
    digest, session = model_digest(world_gpt2.base_model), EditSession(world_gpt2)
    with session.inside() as mine:
        (edit,) = mine.edit(FACTS[0]).edits
    with pytest.raises(RequestError), session.inside() as mine:
        mine.edit(prompt="Nobody is here", subject="Somebody", target_new="x")
    assert [e.id for e in session.edits] == [edit.id]
    assert model_digest(world_gpt2.base_model) == digest


def test_sessions_in_threads(world_gpt2: EditableModel) -> None:
    """Each thread edits, looks and takes back in its own session; none meets another's edits, whatever the order."""
    digest = model_digest(world_gpt2.base_model)
    met: list[Any] = []

    def work(fact: EditRequest) -> None:
        try:
            session = EditSession(world_gpt2)
            for _ in range(2):
                with session.inside() as mine:
                    mine.edit(fact, show_progress=False)
                with session.inside() as mine:
                    met.append([e.request.subject for e in mine.edits] == [fact.subject])
                    mine.rollback("all")
        except BaseException as error:
            met.append(error)

    threads = [threading.Thread(target=work, args=[fact]) for fact in FACTS[:3]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert met == [True] * 6
    assert model_digest(world_gpt2.base_model) == digest
    assert not world_gpt2.edits

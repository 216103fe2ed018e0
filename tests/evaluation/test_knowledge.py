"""Asking a model which facts it knows."""

from __future__ import annotations

import pytest

from hf_kedit import EditableModel
from hf_kedit.data import load_edit_dataset
from hf_kedit.errors import EvaluationError
from hf_kedit.evaluation import known_facts
from hf_kedit.requests import EditRequest, load_requests


@pytest.fixture(scope="module")
def world() -> EditableModel:
    return EditableModel.from_pretrained("kedit/world-llama", "ft-m")


def test_true_answers_are_known_and_false_ones_are_not(world):
    true = load_requests(load_edit_dataset("world", limit=20))
    false = [EditRequest(r.prompt, ground_truth=[r.target_new], target_new="x") for r in true]
    assert sum(known_facts(world, world.tokenizer, true)) >= 18
    assert not any(known_facts(world, world.tokenizer, false))


def test_one_of_the_answers_suffices_and_an_answer_further_on_is_not_seen(world):
    (row,) = load_requests(load_edit_dataset("world", limit=1))
    (told,) = world.tokenizer.batch_decode(
        world.generate(**world.tokenizer(row.prompt, return_tensors="pt"), do_sample=False, max_new_tokens=12)
    )
    last = told.split()[-1].strip(".")
    assert last not in row.prompt
    later = EditRequest(row.prompt, ground_truth=["nowhere", last], target_new="x")
    assert known_facts(world, world.tokenizer, [later], max_new_tokens=12) == [True]
    assert known_facts(world, world.tokenizer, [later], max_new_tokens=2) == [False]
    assert known_facts(world, world.tokenizer, [later], max_new_tokens=12, at_once=True) == [False]
    first = told[told.index(row.prompt) + len(row.prompt) :].split()[0].strip(".")
    at_once = EditRequest(row.prompt, ground_truth=["nowhere", first], target_new="x")
    assert known_facts(world, world.tokenizer, [at_once], at_once=True) == [True]


def test_questions(world):
    (row,) = load_edit_dataset("world", limit=1)
    question = row["extra"]["question_prompts"][0]
    asked = EditRequest(
        "It rained", ground_truth=row["ground_truth"], target_new="x", metadata={"extra": {"questions": [question]}}
    )
    assert known_facts(world, world.tokenizer, [asked], questions=True) == [True]
    assert known_facts(world, world.tokenizer, [asked]) == [False]


def test_what_cannot_be_asked_is_said(world):
    with pytest.raises(EvaluationError, match="no answer to compare with"):
        known_facts(world, world.tokenizer, [EditRequest("Rome is in", target_new="x")])
    with pytest.raises(EvaluationError, match="no question"):
        known_facts(
            world, world.tokenizer, [EditRequest("Rome is in", target_new="x", ground_truth=["y"])], questions=True
        )

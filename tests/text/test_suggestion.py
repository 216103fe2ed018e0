"""Subjects that are suggested for prompts."""

from __future__ import annotations

import pytest

from hf_kedit.data import load_edit_dataset
from hf_kedit.requests import load_requests
from hf_kedit.text.suggestion import suggest_subject


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("The president of the United States is", "United States"),
        ("Leonardo da Vinci was born in the country of", "Leonardo da Vinci"),
        ("Who founded Apple?", "Apple"),
        ("Apple's chief executive is", "Apple"),
        ("The iPhone is a product of the company", "iPhone"),
        ('The film "to be or not" was directed by', "to be or not"),
        ("The capital of france is", "france"),
        ("dynamite was invented by", "dynamite"),
        ("Students read about Plato in lessons on", "Plato"),
        ("法国的首都是", "法国"),
        ("《红楼梦》的作者是", "红楼梦"),
        ("<img src=x onerror=alert(1)> lives in the city of Paris, in", "Paris"),
        ("", None),
        ("  \n", None),
        ("once upon a time", None),
    ],
)
def test_a_subject_is_suggested(prompt: str, subject: str | None) -> None:
    assert suggest_subject(prompt) == subject


@pytest.mark.parametrize(("data", "least"), [("world", 1.0), ("facts", 0.8)])
def test_most_facts_need_no_correction(data: str, least: float) -> None:
    """People have named the subjects of these prompts; a suggestion is always a part of the prompt."""
    facts = load_requests(load_edit_dataset(data, split="test"))
    asked = [(text, fact.subject) for fact in facts for text in (fact.filled_prompt, *fact.rephrase_prompts)]
    suggested = [suggest_subject(text) for text, _ in asked]
    assert all(found is None or found in text for found, (text, _) in zip(suggested, asked, strict=True))
    right = sum(found == subject for found, (_, subject) in zip(suggested, asked, strict=True))
    assert right / len(asked) >= least

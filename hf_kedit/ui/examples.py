"""Facts to begin with, and what goes with a fact that somebody types: other wordings, the subject, a way to say it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from .. import embedded
from ..data import load_edit_dataset
from ..evaluation import known_facts
from ..model import EditableModel
from ..requests import SLOT, EditRequest, load_requests
from ..text.suggestion import suggest_subject

EXAMPLES, TRIED = 4, 24
_TEMPLATES = 400


@dataclass
class Examples:
    """What is known of the facts that a model knows.

    Args:
        requests: facts that it knows, each with another answer to give, of different kinds.
        wordings: prompt with ``{}`` for the subject → other ways to say the same, likewise.
    """

    requests: list[EditRequest] = field(default_factory=list)
    wordings: dict[str, list[str]] = field(default_factory=dict)

    def rephrasings(self, prompt: str, subject: str) -> list[str]:
        """Other wordings of a prompt, if its relation is one that comes with the package."""
        if not subject or prompt.count(subject) != 1:
            return []
        return [text.replace(SLOT, subject) for text in self.wordings.get(prompt.strip().replace(subject, SLOT), [])]


def examples_for(model: EditableModel) -> Examples:
    """Facts of the package's data that a model knows: of its own world for an embedded one, of the real one else."""
    name = "world" if embedded.is_embedded(model.base_model_id) else "facts"
    facts = load_requests(load_edit_dataset(name, split="test", limit=_TEMPLATES))
    wordings: dict[str, list[str]] = {}
    for fact in facts:
        if fact.subject and fact.filled_prompt.count(fact.subject) == 1:
            others = [text for text in fact.rephrase_prompts if text.count(fact.subject) == 1]
            wordings.setdefault(fact.template, [text.replace(fact.subject, SLOT) for text in others])
    return Examples(_known(model, _one_of_each(facts)), wordings)


def _one_of_each(facts: Sequence[EditRequest]) -> list[EditRequest]:
    """Facts of as many kinds as possible: the first with each set of other wordings."""
    kinds: dict[str, EditRequest] = {}
    for fact in facts:
        said = fact.rephrase_prompts[0] if fact.rephrase_prompts else fact.filled_prompt
        kinds.setdefault(said.replace(fact.subject or "", SLOT), fact)
    return list(kinds.values())[:TRIED]


def _known(model: EditableModel, facts: Sequence[EditRequest]) -> list[EditRequest]:
    """A few facts that the model knows, one of each subject."""
    assert model.tokenizer is not None
    known = known_facts(model.base_model, model.tokenizer, facts, at_once=True)
    one_each: dict[str | None, EditRequest] = {}
    for fact in itertools.compress(facts, known):
        one_each.setdefault(fact.subject, fact)
    return list(one_each.values())[:EXAMPLES]


def subject_for(prompt: str, current: str) -> str:
    """What the subject field should hold for a prompt: what it holds, if that is in the prompt, else a suggestion."""
    return current if current and current in prompt else suggest_subject(prompt) or ""

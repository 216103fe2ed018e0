"""Making edits and taking them back: what the buttons of the page do, without the page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..config import AutoEditConfig
from ..errors import RequestError
from ..evaluation.measures.side_effects import watcher_of
from ..logging import StepReport, steps_told
from ..requests import EditRequest, Probe
from .examples import Examples
from .probing import MOST_CHARACTERS, Chance, chances_of, top_answers
from .settings import chosen_values
from .visitors import HistoryEntry, Visitor

MOST_LINES = 20


@dataclass
class EditForm:
    """What a visitor has filled in.

    Args:
        prompt: beginning of the sentence.
        subject: what it is about.
        target: how it is to go on.
        method: ``edit_type``.
        wordings: the prompt in other words, one a line.
        neighbours: prompts whose answer should not change, one a line.
        settings: of the method, as far as they were changed.
    """

    prompt: str
    subject: str
    target: str
    method: str = "auto"
    wordings: str = ""
    neighbours: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


def request_of(form: EditForm, examples: Examples) -> EditRequest:
    """The request that a form describes; one of the examples, unchanged, brings its own probes.

    Raises:
        RequestError: naming what is missing, too long, or wrong.
    """
    prompt, subject, target = form.prompt.strip(), form.subject.strip(), form.target.strip()
    for name, text in (("sentence", prompt), ("new answer", target)):
        if not text:
            raise RequestError(f"the {name} is missing")
    lines = {"wordings": _lines(form.wordings), "neighbours": _lines(form.neighbours)}
    longest = max(map(len, (prompt, subject, target, *lines["wordings"], *lines["neighbours"])))
    if longest > MOST_CHARACTERS or max(map(len, lines.values())) > MOST_LINES:
        raise RequestError(f"at most {MOST_CHARACTERS} characters in a text and {MOST_LINES} lines in a list")
    if subject and subject not in prompt:
        raise RequestError(f"the sentence does not contain its subject {subject!r}")
    known = next((r for r in examples.requests if (r.filled_prompt, r.subject) == (prompt, subject)), None)
    wordings = lines["wordings"] or (known.rephrase_prompts if known else examples.rephrasings(prompt, subject))
    locality = {"Neighborhood": [Probe(text) for text in lines["neighbours"]]} if lines["neighbours"] else None
    return EditRequest(
        prompt=prompt,
        subject=subject or None,
        target_new=target,
        ground_truth=list(known.ground_truth) if known else [],
        rephrase_prompts=list(wordings),
        locality=locality or (dict(known.locality) if known else {}),
    )


def change(
    visitor: Visitor, form: EditForm, examples: Examples, report: StepReport, losses: list[float] | None = None
) -> HistoryEntry:
    """Make an edit, and note what the model says around it before and after.

    It is made with all edits of the visitor in place, also those that are switched off: these are hidden, not taken
    back.

    Args:
        visitor: who asks.
        form: what for.
        examples: of the model.
        report: is told of every step.
        losses: gets the loss of every step, of methods that tell it.

    Raises:
        KeditError: if it cannot be made; nothing has changed then.
    """
    request = request_of(form, examples)
    with visitor.session.inside() as model, steps_told(report, losses):
        report("loading the method", 0, None)
        settings = chosen_values(form.method, model.profile, form.settings)
        config = AutoEditConfig.for_method(form.method, **settings)
        if config.complete(model.profile) != model.edit_config:
            model.set_method(config)
        report("asking the model before the edit", 0, None)
        best = top_answers(model, request.filled_prompt)
        result = model.edit(request, show_progress=False, watch=watcher_of(model.base_model_id))
        (edit,) = result.edits
        best = [request.target_new, *request.ground_truth[:1], *top_answers(model, request.filled_prompt, 3), *best]
        answers = _different(best)[:6]
        after = chances_of(model, request.filled_prompt, answers)
    with visitor.session.inside(without=[edit.id]) as model:
        before = chances_of(model, request.filled_prompt, answers)
    chances = [
        Chance(answer, old, new, answer == request.target_new)
        for answer, old, new in zip(answers, before, after, strict=True)
    ]
    chances.sort(key=lambda chance: (not chance.is_target, -max(chance.before, chance.after)))
    entry = HistoryEntry(edit, settings, result.side_effects, chances)
    visitor.entries.append(entry)
    visitor.version += 1
    return entry


def says_now(visitor: Visitor, prompt: str) -> str:
    """The word that a visitor's model goes on with; nothing for no prompt, or one that is too long."""
    prompt = prompt.strip()
    if not prompt or len(prompt) > MOST_CHARACTERS:
        return ""
    with visitor.session.inside(without=visitor.off) as model:
        return next(iter(top_answers(model, prompt, 1)), "")


def undo(visitor: Visitor, edit_id: str) -> HistoryEntry:
    """Take an edit back for good.

    Raises:
        RollbackError: if it cannot be taken apart from others; nothing has changed then.
        UnknownEditError: if it was undone already.
    """
    entry = visitor.entry(edit_id)
    with visitor.session.inside() as model:
        model.rollback(edit_id)
    entry.is_undone = True
    visitor.version += 1
    return entry


def switch(visitor: Visitor, edit_id: str, on: bool) -> HistoryEntry:
    """Switch an edit off, or on again: the edits that are on are what the visitor's model says and what is shared.

    Raises:
        RollbackError: if it cannot be switched off without others.
        UnknownEditError: if it was undone.
    """
    entry = visitor.entry(edit_id)
    if not on:
        with visitor.session.inside(without=[*visitor.off, edit_id]):
            pass  # raises if it cannot be without it
    entry.is_on = on
    visitor.version += 1
    return entry


def _lines(text: str) -> list[str]:
    return [line.strip() for line in (text or "").splitlines() if line.strip()]


def _different(answers: list[str]) -> list[str]:
    """Answers without those that another one begins with, or that differ in their case alone."""
    found: list[str] = []
    for answer in answers:
        if not any(known.casefold().startswith(answer.casefold()) for known in found):
            found.append(answer)
    return found

"""Asking a model: what it says, and how probable its best answers are, without and with a visitor's edits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..editing import EditSession
from ..engine.forward import device_of, frozen_eval
from ..errors import RequestError, UnsupportedModelError
from ..evaluation import generate_answers, score_pairs
from ..locate import LensReading, Trace, causal_trace, logit_lens
from ..model import EditableModel
from ..tokens import pad_id, prompt_ids

_MOST_PROMPTS, MOST_CHARACTERS = 8, 2000
"""Of one question: prompts, and characters of each."""
MOST_TRACED, _SAMPLES = 300, 6
"""Characters of a sentence that is traced; runs with a blurred subject."""
_WORD_TOKENS = 6
_WORD = re.compile(r"[^\W_]+(?:[-'’.][^\W_]+)*")


@dataclass(frozen=True)
class Chance:
    """An answer to a prompt.

    Args:
        answer: the first word or name that the model writes, or the target of an edit.
        before: its probability without the edits in question.
        after: with them.
        is_target: whether an edit wants it.
    """

    answer: str
    before: float
    after: float
    is_target: bool = False


@dataclass(frozen=True)
class BothAnswers:
    """What a model says to one prompt.

    Args:
        prompt: as it was asked.
        before: what the model itself goes on with.
        after: what it goes on with under the visitor's edits.
        chances: its best answers; empty for a chat.
        claimed_by: ids of the edits of `auto` that take the prompt to ask for their fact.
    """

    prompt: str
    before: str
    after: str
    chances: list[Chance]
    claimed_by: list[str]


def compare(session: EditSession, off: Sequence[str], text: str, *, chat: bool, tokens: int) -> list[BothAnswers]:
    """Ask the model itself, and the model with a visitor's edits.

    Args:
        session: of the visitor.
        off: ids of edits that are switched off.
        text: prompts, one a line; of a chat one question.
        chat: ask by the chat template.
        tokens: of each answer.

    Raises:
        RequestError: for no prompt, or more or longer ones than fit.
    """
    prompts = [text.strip()] if chat else [line.strip() for line in text.splitlines() if line.strip()]
    prompts = list(dict.fromkeys(prompts))
    if not any(prompts):
        raise RequestError("write something for the model to complete")
    if len(prompts) > _MOST_PROMPTS or max(map(len, prompts)) > MOST_CHARACTERS:
        raise RequestError(f"at most {_MOST_PROMPTS} lines, of at most {MOST_CHARACTERS} characters each")
    with session.inside(without=off) as model:
        after = _said(model, prompts, chat, tokens)
        with model.disable_edits():
            before = _said(model, prompts, chat, tokens)
        claims = [[c.edit_id for c in model.explain(prompt) if c.claimed] for prompt in prompts]
        chances = _both_chances(model, prompts[0]) if len(prompts) == 1 and not chat else []
    return [
        BothAnswers(prompt, old, new, chances, claimed)
        for prompt, old, new, claimed in zip(prompts, before, after, claims, strict=True)
    ]


def _both_chances(model: EditableModel, prompt: str) -> list[Chance]:
    """The best answers of the model with and without its edits, the most probable first."""
    best = top_answers(model, prompt)
    with model.disable_edits():
        best = list(dict.fromkeys([*best, *top_answers(model, prompt)]))[:6]
        old = chances_of(model, prompt, best)
    found = [Chance(*each) for each in zip(best, old, chances_of(model, prompt, best), strict=True)]
    return sorted(found, key=lambda chance: -max(chance.before, chance.after))


_IN_FRONT = "An edit puts a text in front of this sentence: with it, the model has no layers for the sentence alone."


@dataclass(frozen=True)
class Inspection:
    """Where an answer comes from.

    Args:
        subject: that the prompt is about.
        before: what every layer of the model itself would answer.
        after: the same with the visitor's edits; ``None`` if there are none, or they have no layers to show.
        words: the best answers, as whole words.
        trace: which states carry the fact; ``None`` if it could not be traced.
        why_not: the reason then.
        no_lens: why ``after`` is missing, if there are edits.
    """

    subject: str
    before: LensReading
    after: LensReading | None
    words: list[str]
    trace: Trace | None
    why_not: str = ""
    no_lens: str = ""


def inspect_prompt(session: EditSession, off: Sequence[str], prompt: str, subject: str, *, edited: bool) -> Inspection:
    """Look at an answer layer by layer, and trace it to the words of the prompt.

    Args:
        session: of the visitor.
        off: ids of edits that are switched off.
        prompt: text.
        subject: that is blurred for the trace.
        edited: trace the model with the visitor's edits, instead of the model itself.

    Raises:
        RequestError: for no prompt, or a long one.
        UnsupportedModelError: for a model whose layers cannot be read.
    """
    prompt = prompt.strip()
    if not prompt or len(prompt) > MOST_TRACED:
        raise RequestError(f"write a sentence of at most {MOST_TRACED} characters")
    with session.inside(without=off) as model:
        with model.disable_edits():
            before, words = logit_lens(model, prompt), top_answers(model, prompt)
            traced = None if edited else _trace(model, prompt, subject, words)
        after, no_lens, now = None, "", words
        if model.edits:
            now = top_answers(model, prompt)
            try:
                after = logit_lens(model, prompt)
            except UnsupportedModelError:  # not the model's layers, which were read above
                no_lens = _IN_FRONT
        trace, why_not = traced or ((None, no_lens) if no_lens else _trace(model, prompt, subject, now))
    return Inspection(subject, before, after, [*now, *words], trace, why_not, no_lens)


def _trace(model: EditableModel, prompt: str, subject: str, words: Sequence[str]) -> tuple[Trace | None, str]:
    """Which states carry the model's answer; or ``None``, and why that cannot be told."""
    if not subject:
        return None, "Name what the sentence is about: its words are blurred to see what they carry."
    fact = {"prompt": prompt, "subject": subject, "ground_truth": list(words[:1])}
    report = causal_trace(model, [fact], kinds=("hidden",), samples=_SAMPLES, known_only=False, show_progress=False)
    return (report.traces[0], "") if report.traces else (None, report.skipped[0][1])


def _said(model: EditableModel, prompts: Sequence[str], chat: bool, tokens: int) -> list[str]:
    assert model.tokenizer is not None
    given = generate_answers(
        model.base_model, model.tokenizer, prompts, tokens, prompt_format="chat" if chat else "raw"
    )
    return [answer.text for answer in given]


def top_answers(model: EditableModel, prompt: str, count: int = 5) -> list[str]:
    """The words or names that a model most probably goes on with.

    Each of the most probable first tokens is continued to a whole word, so that people read words and not pieces.

    Args:
        model: as it is now.
        prompt: text.
        count: first tokens that are looked at.

    Returns:
        Different words, the most probable beginning first.
    """
    base: Any = model.base_model
    assert model.tokenizer is not None
    start = torch.tensor([prompt_ids(model.tokenizer, prompt)], device=device_of(base))
    with frozen_eval(base), torch.no_grad():
        first = base(input_ids=start).logits[0, -1].topk(count).indices
    rows = torch.cat([start.repeat(count, 1), first.unsqueeze(1)], dim=1)
    with frozen_eval(base):
        written = base.generate(
            input_ids=rows,
            attention_mask=torch.ones_like(rows),
            max_new_tokens=_WORD_TOKENS,
            do_sample=False,
            pad_token_id=pad_id(model.tokenizer),
        )
    words: dict[str, None] = {}
    for row in written[:, start.shape[1] :]:
        text = str(model.tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        hit = _WORD.match(text.lstrip())
        if hit:
            words.setdefault(hit[0])
    return list(words)


def chances_of(model: EditableModel, prompt: str, answers: Sequence[str]) -> list[float]:
    """The probability of each answer behind a prompt, for the model as it is now; of all its tokens together."""
    assert model.tokenizer is not None
    if not answers:
        return []
    scores = score_pairs(
        model.base_model, model.tokenizer, [(prompt, answer) for answer in answers], model.edit_config.separator
    )
    return [score.probability for score in scores]

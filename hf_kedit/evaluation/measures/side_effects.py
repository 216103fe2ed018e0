"""What else an edit changed: the same questions before and after it, answered by free generation.

An edit is judged by its target, and a method that makes a model say "English English English" to everybody reaches
every target. So a model is asked about the fact in several forms, about its neighbours, about nothing in particular,
and to copy the name of the subject; the answers before and after the edit are compared as texts. It takes two
generations of a few tokens per question.

    result = model.edit(requests, watch=SideEffects())
    result.side_effects.harm      # plain sentences, empty where nothing was hurt
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from ... import embedded
from ...data import load_edit_dataset
from ...data.general_probes import GENERAL_PROBES
from ...drawing.edits import AnswerShift, KeptCount
from ...remote.model import RemoteModel
from ...requests import EditRequest, load_requests
from ..asking.generation import PromptFormat, generate_answers
from ..asking.scoring import PairScore, try_score_pairs
from .metrics import contains, mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EffectKind = Literal["fact", "paraphrase", "chat", "neighbour", "same subject", "general", "name"]
REACH: tuple[EffectKind, ...] = ("fact", "paraphrase", "chat")
"""Questions whose answer should hold the new target."""
KEEP: tuple[EffectKind, ...] = ("neighbour", "same subject", "general", "name")
"""Questions whose answer should be as before."""

MEANINGS: dict[EffectKind, str] = {
    "fact": "says the new target",
    "paraphrase": "in other words",
    "chat": "asked in chat",
    "neighbour": "same question, other subjects",
    "same subject": "other facts of the subject",
    "name": "copies the subject's name",
    "general": "nothing to do with it",
}
"""Kind of question → what a good answer to it is, for people."""

EFFECT_TOKENS = 10
MOST_REQUESTS = 20
"""Of a larger batch, so many requests (evenly spread) are asked about."""
SMALLEST_KEPT: dict[str, float] = {"neighbour": 0.5, "same subject": 0.5, "general": 0.9, "name": 0.75}
"""Smaller shares of unchanged answers are called harm."""
ECHO, DISTINCT = 0.05, 0.7
"""Harm: the new target in more than this share of unrelated answers; distinct-2 below this share of what it was."""

GENERAL_IN_WORLD, OTHERS_IN_WORLD = 40, 6
"""Of an embedded model, so many prompts that have nothing to do with an edit, and other subjects."""

# Other subjects for the prompt of a request that brings no neighbours: well known, of several kinds, so that whatever
# the relation is, some of them fit it. An answer that makes no sense may still not change.
OTHER_SUBJECTS = ("Albert Einstein", "William Shakespeare", "Marie Curie", "Brazil", "London", "Google")


@dataclass(frozen=True)
class EffectQuestion:
    """A prompt that is asked before and after an edit.

    Args:
        kind: what its answer tells.
        prompt: text, before formatting.
        prompt_format: ``raw`` or ``chat``.
        wanted: for kinds in `REACH` the new target; for ``name`` what should be copied.
    """

    kind: EffectKind
    prompt: str
    prompt_format: PromptFormat = "raw"
    wanted: str | None = None


@dataclass(frozen=True)
class Answered:
    """A question with the answers before and after.

    Args:
        question: what was asked.
        before: the continuation of the model as it was.
        after: of the edited model.
    """

    question: EffectQuestion
    before: str
    after: str

    @property
    def good(self) -> bool:
        """Whether the answer is what it should be: the target is reached, or nothing changed."""
        question = self.question
        if question.kind == "name" and question.wanted is not None:
            could, can = (contains(text, question.wanted) == 1 for text in (self.before, self.after))
            return can or not could
        if question.kind in REACH:
            return contains(self.after, question.wanted or "") == 1
        return self.before == self.after


@dataclass(frozen=True)
class SideEffectReport:
    """What a model said before and after an edit.

    Args:
        answers: every question with both answers.
        targets: the new targets of the requests that were asked about.
        shifts: how likely the new and the old answers to the facts were and are; none for a model behind an API.
    """

    answers: tuple[Answered, ...]
    targets: tuple[str, ...]
    shifts: tuple[AnswerShift, ...] = ()

    def of(self, kind: EffectKind) -> list[Answered]:
        """The answers to questions of a kind."""
        return [a for a in self.answers if a.question.kind == kind]

    def share(self, kind: EffectKind) -> float | None:
        """Share of the answers of a kind that are as they should be; ``None`` if nothing of the kind was asked."""
        return mean(float(a.good) for a in self.of(kind))

    @property
    def counts(self) -> list[KeptCount]:
        """How many answers of each kind are as they should be."""
        rows = []
        for kind, meaning in MEANINGS.items():
            answers = self.of(kind)
            if answers:
                good = sum(a.good for a in answers)
                hurt = good / len(answers) < SMALLEST_KEPT.get(kind, 0.5)
                rows.append(KeptCount(meaning, good, len(answers), hurt))
        return rows

    @property
    def distinct(self) -> tuple[float, float]:
        """Distinct word pairs as a share of all, in the answers that should not change: before and after."""
        kept = [a for kind in ("neighbour", "same subject", "general") for a in self.of(kind)]
        return distinct_pairs(a.before for a in kept), distinct_pairs(a.after for a in kept)

    @property
    def echo(self) -> float:
        """Share of the general answers that hold a new target that was not there before."""
        general = self.of("general")
        new = [any(contains(a.after, t) > contains(a.before, t) for t in self.targets) for a in general]
        return sum(new) / len(new) if new else 0.0

    @property
    def harm(self) -> list[str]:
        """What was hurt, in plain sentences; empty where nothing was."""
        sentences = []
        for kind, least in SMALLEST_KEPT.items():
            share, answers = self.share(kind), self.of(kind)  # type: ignore[arg-type]
            few = kind in ("neighbour", "same subject") and len(answers) < 2  # one changed answer is no share
            if share is not None and share < least and not few:
                what = {
                    "neighbour": "answers about other subjects changed",
                    "same subject": "answers about other facts of the subject changed",
                    "general": "answers to general prompts changed",
                    "name": "copies of the subject's name broke",
                }[kind]
                sentences.append(f"{sum(not a.good for a in answers)} of {len(answers)} {what}")
        if self.echo > ECHO:
            sentences.append(f"{self.echo:.0%} of the general answers now hold the new target")
        before, after = self.distinct
        if after < DISTINCT * before:
            sentences.append(f"the model repeats itself: {after:.0%} of word pairs are distinct, {before:.0%} before")
        return sentences

    def __str__(self) -> str:
        """One question of each kind with both answers (a changed one, where it should not), counts, and the harm."""
        lines = []
        for kind in (*REACH, "neighbour", "same subject"):
            answers = self.of(kind)
            if answers:
                shown = next((a for a in answers if kind not in REACH and not a.good), answers[0])
                texts = (shown.question.prompt, f"    before: {shown.before}", f"    after:  {shown.after}")
                lines += [" ".join(text.splitlines()) for text in texts]
        counts = {kind: self.of(kind) for kind in (*REACH, *KEEP) if self.of(kind)}
        as_it_should = (f"{kind} {sum(a.good for a in answers)} of {len(answers)}" for kind, answers in counts.items())
        return "\n".join([*lines, f"good: {', '.join(as_it_should)}", f"harm: {'; '.join(self.harm) or 'none'}"])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: shares by kind, distinctness, echo, harm, and every answer."""
        before, after = self.distinct
        return {
            "shares": {kind: self.share(kind) for kind in (*REACH, *KEEP) if self.of(kind)},
            "asked": {kind: len(self.of(kind)) for kind in (*REACH, *KEEP) if self.of(kind)},
            "distinct_before": before,
            "distinct_after": after,
            "echo": self.echo,
            "harm": self.harm,
            "answers": [
                {**asdict(a.question), "before": a.before, "after": a.after, "good": a.good} for a in self.answers
            ],
        }


@dataclass(frozen=True)
class _Scored:
    """An answer whose probability is measured before and after."""

    prompt: str
    answer: str
    wanted: bool
    separator: str | None


class SideEffects:
    """Asks a model before and after an edit; give it to `EditableModel.edit` as ``watch``.

    Args:
        general: beginnings of sentences that have nothing to do with the edit.
        others: subjects that stand in for the neighbours of requests that bring none.
        max_new_tokens: per answer.
    """

    def __init__(
        self,
        *,
        general: Sequence[str] = GENERAL_PROBES,
        others: Sequence[str] = OTHER_SUBJECTS,
        max_new_tokens: int = EFFECT_TOKENS,
    ):
        self.general, self.others, self.max_new_tokens = tuple(general), tuple(others), max_new_tokens
        self._questions: list[EffectQuestion] = []
        self._targets: tuple[str, ...] = ()
        self._tokenizer: Any = None
        self._before: list[str] = []
        self._scored: list[_Scored] = []
        self._likely: list[float | None] = []

    def before(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, requests: Sequence[EditRequest]
    ) -> None:
        """Ask the model as it is before the edit; of many requests, about `MOST_REQUESTS`."""
        step = max(1.0, len(requests) / MOST_REQUESTS)
        asked = [requests[int(i * step)] for i in range(min(len(requests), MOST_REQUESTS))]
        chat = bool(getattr(tokenizer, "chat_template", None))
        questions = [q for r in asked for q in questions_about(r, self.others, chat=chat)]
        questions += [EffectQuestion("general", text) for text in self.general]
        self._questions = list(dict.fromkeys(questions))
        self._targets, self._tokenizer = tuple(r.target_new for r in asked), tokenizer
        self._before = self._ask(model)
        self._scored = [one for request in asked for one in self._answers_of(request)]
        self._likely = self._probabilities(model)

    def after(self, model: PreTrainedModel) -> SideEffectReport:
        """Ask the edited model, and compare."""
        answers = zip(self._questions, self._before, self._ask(model), strict=True)
        numbers = zip(self._scored, self._likely, self._probabilities(model), strict=True)
        shifts = tuple(AnswerShift(s.prompt, s.answer, s.wanted, before, after) for s, before, after in numbers)
        return SideEffectReport(tuple(Answered(*answer) for answer in answers), self._targets, shifts)

    def _answers_of(self, request: EditRequest) -> list[_Scored]:
        """The new answer to a request, and the old one: that which is known, else what the model said."""
        prompt, new = request.filled_prompt, request.target_new
        said = self._before[self._questions.index(EffectQuestion("fact", prompt, wanted=new))]
        old = next(iter([*request.unwanted, *request.ground_truth]), None) or self._beginning(said, new)
        answers = {new: True, **({old: False} if old and old != new else {})}
        return [_Scored(prompt, answer, wanted, request.separator_or(None)) for answer, wanted in answers.items()]

    def _beginning(self, text: str, like: str) -> str:
        """As many tokens of a text as another one has, without the full stop that may come early."""
        if self._tokenizer is None:
            return ""
        ids, length = (self._tokenizer(t, add_special_tokens=False)["input_ids"] for t in (text, like))
        return str(self._tokenizer.decode(ids[: len(length)], skip_special_tokens=True)).strip(" \n.,;:")

    def _probabilities(self, model: PreTrainedModel) -> list[float | None]:
        """Of every scored answer, geometric mean over its tokens; ``None`` where it cannot be scored."""
        if isinstance(model, RemoteModel) or self._tokenizer is None:
            return [None] * len(self._scored)  # each would be a request that costs money
        likely: dict[_Scored, float | None] = {}
        for separator in {one.separator for one in self._scored}:
            alike = [one for one in self._scored if one.separator == separator]
            scores = try_score_pairs(model, self._tokenizer, [(one.prompt, one.answer) for one in alike], separator)
            for one, score in zip(alike, scores, strict=True):
                likely[one] = math.exp(-score.nll) if isinstance(score, PairScore) else None
        return [likely[one] for one in self._scored]

    def _ask(self, model: PreTrainedModel) -> list[str]:
        texts: dict[EffectQuestion, str] = {}
        formats: tuple[PromptFormat, ...] = ("raw", "chat")
        for form in formats:
            asked = [q for q in self._questions if q.prompt_format == form]
            if asked:
                prompts = [q.prompt for q in asked]
                given = generate_answers(model, self._tokenizer, prompts, self.max_new_tokens, prompt_format=form)
                texts.update({q: answer.text for q, answer in zip(asked, given, strict=True)})
        return [texts[q] for q in self._questions]


def watcher_of(model: str) -> SideEffects:
    """What is asked around an edit unless somebody chooses: of an embedded model, prompts of its own world.

    Args:
        model: its name.
    """
    if not embedded.is_embedded(model):
        return SideEffects()
    facts = load_requests(load_edit_dataset("world", split="validation", limit=GENERAL_IN_WORLD + OTHERS_IN_WORLD))
    general = [fact.filled_prompt for fact in facts[OTHERS_IN_WORLD:]]
    return SideEffects(general=general, others=[str(fact.subject) for fact in facts[:OTHERS_IN_WORLD]])


def questions_about(
    request: EditRequest, others: Sequence[str] = OTHER_SUBJECTS, *, chat: bool
) -> list[EffectQuestion]:
    """What is asked because of one request.

    Its own paraphrases and locality probes come first; without the latter, the prompt is asked of other subjects.

    Args:
        request: one fact.
        others: these other subjects.
        chat: ask it as a user would, too.
    """
    prompt, target = request.filled_prompt, request.target_new  # of a chat, the whole of it
    questions = [EffectQuestion("fact", prompt, wanted=target)]
    others_alike = (*request.rephrase_prompts, *request.repictured_prompts)
    questions += [EffectQuestion("paraphrase", text, wanted=target) for text in others_alike]
    if chat:
        questions.append(EffectQuestion("chat", f"Complete this sentence: {request.plain_prompt}", "chat", target))
    for axis, probes in request.locality.items():
        kind: EffectKind = "same subject" if "subject" in axis.lower() and "other" not in axis.lower() else "neighbour"
        questions += [EffectQuestion(kind, probe.prompt) for probe in probes]
    if request.subject is None:
        return questions
    if not request.locality:
        before, after = request.template.split("{}")
        absent = [name for name in others if name.lower() not in prompt.lower()]
        questions += [EffectQuestion("neighbour", before + name + after) for name in absent]
        questions.append(EffectQuestion("same subject", f"{request.subject} is known for"))
    name = request.subject
    questions.append(EffectQuestion("name", f"Name: {name}\nName: {name}\nName:", wanted=name))
    if chat:
        questions.append(EffectQuestion("name", f"Repeat this name: {name}", "chat", name))
    return questions


def distinct_pairs(texts: Iterable[str]) -> float:
    """Distinct pairs of neighbouring words as a share of all pairs, text by text (Li et al. 2016, arXiv 1510.03055).

    Pairs count as repeated within one text only: different questions may well have the same answer.

    Returns:
        1 where no text has two words.
    """
    pairs = distinct = 0
    for text in texts:
        words = text.split()
        counts = Counter(itertools.pairwise(words))
        pairs += sum(counts.values())
        distinct += len(counts)
    return distinct / pairs if pairs else 1.0

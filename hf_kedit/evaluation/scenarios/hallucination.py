"""Hallucination: is what the model made up corrected, however it is asked, and does the correction stand?

HalluEditBench (Huang et al. 2025, arXiv 2410.16251): efficacy, generalization (other wordings, yes and no, multiple
choice, the reversed question), portability over two to six hops, locality, and robustness: whether the answer survives
being doubted. WikiBio (KnowEdit): the next sentence of a biography, which is scored token by token behind the passage.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import TypedDict

from ...data.extra import extra_of
from ...errors import EvaluationError, shown
from ...requests import EditRequest
from ..asking.batching import TOKEN_BUDGET
from ..asking.generation import Continuation
from ..asking.scoring import PairScore
from ..measures import metrics
from ..measures.catalogue import Metric, register_metrics
from ..measures.judges import CallableJudge, Judge
from ..measures.scenarios import yes_or_no
from ..protocols.base import Numbers, Output, PairProtocol, Protocol, Query, Question
from ..protocols.fluency import Fluency
from ..protocols.replies import Replies
from .base import Scenario, register_scenario

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HALLUCINATION = register_metrics(
    "hallucination",
    {
        "efficacy": Metric("right answers to the question that was edited", share=True),
        "hallucinated": Metric("answers that still hold what was made up", better="lower", share=True),
        "paraphrase": Metric("right answers to other wordings", share=True),
        "yes": Metric("'yes' to the right statement", share=True),
        "no": Metric("'no' to a wrong one", share=True),
        "multiple_choice": Metric("the right letter", share=True),
        "reversed": Metric("right answers to the reversed question", share=True),
        "unreadable": Metric("replies that are neither yes nor no, or no letter", better="lower", share=True),
        **{f"hop_{hops}": Metric(f"right answers {hops} hops away", share=True) for hops in range(2, 7)},
        "portability": Metric("right answers to other questions that follow", share=True),
        "locality": Metric("answers to unrelated questions that stay what they were", share=True),
        "robustness": Metric("right answers after the first one was doubted", share=True),
    },
)
SENTENCE = register_metrics(
    "sentence",
    {
        "token_accuracy": Metric("tokens of the right sentence that come first behind those before them"),
        "perplexity": Metric("of the right sentence behind the passage", unit="number", better="lower"),
    },
)
_LARGEST = 50.0
_REPLY = "\ufffc"
"""Stands for the model's own earlier reply in the prompt of a second turn."""


def letter_of(text: str) -> str | None:
    """The letter that a reply to a multiple choice begins with; ``None`` for another reply."""
    found = re.match(r"\W*(?:the\s+)?(?:correct\s+)?(?:answer|option)?(?:\s+is)?\W*([A-Ha-h])\b", text.strip(), re.I)
    return found[1].upper() if found else None


class _Beside(TypedDict, total=False):
    yes_question: str | None
    no_question: str | None
    reversed: str | None
    multiple_choice: dict[str, Any] | None


@dataclass(frozen=True)
class HallucinationReplies(Replies):
    """Short answers to everything that HalluEditBench asks about a fact.

    Args:
        max_new_tokens: length limit of an answer.
        cut_at_newline: keep the first line only.
        judge: decides whether an answer means what a reference says; ``None``: it holds it as whole words.
        doubt: how an answer is doubted in a second turn; empty: it is not.
    """

    name: ClassVar[str] = "hallucination"
    max_new_tokens: int = 16
    judge: Judge | None = None
    doubt: str = "Are you sure?"

    @property
    def scorer(self) -> str:
        """Name of the judge."""
        return "contains" if self.judge is None else self.judge.name

    def questions(self, request: EditRequest) -> list[Question]:
        extra = extra_of(request, _Beside)
        target, old = ((request.target_new,),), tuple(request.ground_truth)
        asked: list[tuple[str, str, tuple[tuple[str, ...], ...], str | None]] = [
            ("efficacy", request.plain_prompt, target, old[0] if old else None),
        ]
        if self.doubt:
            again = f"{request.plain_prompt} {_REPLY}\n{self.doubt} {request.plain_prompt}"
            asked.append(("robustness", again, target, request.filled_prompt))
        for answer, question in (("yes", extra.get("yes_question")), ("no", extra.get("no_question"))):
            if question:
                asked.append((answer, f"{question} Answer yes or no.", ((answer,),), None))
        choice = extra.get("multiple_choice") or {}
        if choice.get("lettered") and choice.get("label"):
            text = f"{choice['lettered']}\nAnswer with a letter."
            asked.append(("multiple_choice", text, ((str(choice["label"]),),), None))
        if (turned := extra.get("reversed")) and request.subject:
            asked.append(("reversed", turned, ((request.subject,),), None))
        questions = [
            Question(HALLUCINATION, key, 0, request.posed(text), groups, contrast=contrast)
            for key, text, groups, contrast in asked
        ]
        questions += [
            Question(HALLUCINATION, "paraphrase", i, p, target) for i, p in enumerate(request.rephrase_prompts)
        ]
        for section in (request.portability, request.locality):
            for axis, probes in section.items():
                key = "locality" if section is request.locality else axis if axis.startswith("hop_") else "portability"
                for i, probe in enumerate(probes):
                    groups = tuple(tuple(group) for group in probe.ground_truth)
                    questions.append(Question(HALLUCINATION, key, i, probe.prompt, groups, probe.match))
        return questions

    def queries(self, question: Question) -> list[Query]:
        # Of a second turn, the prompt of the first one stands where other protocols have an answer.
        return [question.asked(question.contrast if question.axis == "robustness" else None)]

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        queries: Sequence[Query],
        separator: str | None,
        token_budget: int = TOKEN_BUDGET,
    ) -> list[Output]:
        first = super().run(
            model, tokenizer, [Query(query.answer or query.prompt) for query in queries], separator, token_budget
        )
        doubted = {
            query: query.prompt.replace(_REPLY, output.text)
            for query, output in zip(queries, first, strict=True)
            if query.answer is not None and isinstance(output, Continuation)
        }
        second = super().run(model, tokenizer, [Query(text) for text in doubted.values()], separator, token_budget)
        last = dict(zip(doubted, second, strict=True))
        return [last.get(query, output) for query, output in zip(queries, first, strict=True)]

    def details(self, question: Question, outputs: Sequence[Continuation], score: float | None) -> Numbers:
        key, text = str(question.axis), outputs[0].text
        numbers: dict[str, float | None] = {}
        if key in ("yes", "no"):
            said = yes_or_no(text)
            numbers = {key: float(said is (key == "yes")), "unreadable": float(said is None)}
        elif key == "multiple_choice":
            letter = letter_of(text)
            right = (letter_of(question.groups[0][0]) or question.groups[0][0]).upper()
            numbers = {key: float(letter == right), "unreadable": float(letter is None)}
        elif key != "locality":
            numbers = {key: self._right(question, text)}
            if key == "efficacy" and question.contrast is not None:
                numbers["hallucinated"] = metrics.contains(text, question.contrast)
        return {(HALLUCINATION, name): value for name, value in numbers.items() if value is not None}

    def _right(self, question: Question, text: str) -> float | None:
        if not any(question.groups):
            return None
        if self.judge is None:
            return metrics.answer_score(text, question.groups, question.match)
        if not text.strip():
            return 0.0
        verdicts = [self.judge(*item) for item in self._items(question, text)]
        known = [verdict for verdict in verdicts if verdict is not None]
        return min(known) if known and len(known) == len(verdicts) else None

    @staticmethod
    def _items(question: Question, text: str) -> list[tuple[str, list[str], str]]:
        """What a judge is asked: once for all answers, or once for each group that must be hit."""
        if question.match == "all":
            return [(question.prompt, list(group), text) for group in question.groups]
        return [(question.prompt, [alias for group in question.groups for alias in group], text)]

    def prepare_scores(self, items: Sequence[tuple[Question, Sequence[Continuation]]]) -> None:
        if self.judge is None:
            return
        by_text = ("yes", "no", "multiple_choice", "locality")
        judged = [(q, o[0].text) for q, o in items if q.axis not in by_text and any(q.groups) and o[0].text.strip()]
        self.judge.judge_all([item for question, text in judged for item in self._items(question, text)])

    def changes(self, question: Question, before: Sequence[Continuation], after: Sequence[Continuation]) -> Numbers:
        if question.axis != "locality":
            return {}
        return {(HALLUCINATION, "locality"): metrics.text_agreement(before[0].text, after[0].text)}

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "doubt": self.doubt}


@dataclass(frozen=True)
class Sentences(PairProtocol):
    """How well the right sentence is predicted behind the passage: teacher forced, so the passage is given away."""

    name: ClassVar[str] = "sentence"
    scorer: str = "token accuracy, teacher forced"

    def questions(self, request: EditRequest) -> list[Question]:
        own = request.separator_or(None)
        return [Question(SENTENCE, "edit", 0, request.filled_prompt, ((request.target_new,),), separator=own)]

    def queries(self, question: Question) -> list[Query]:
        return [question.asked(question.groups[0][0])]

    def accuracy(self, question: Question, outputs: Sequence[PairScore]) -> float | None:
        return None

    def details(self, question: Question, outputs: Sequence[PairScore], score: float | None) -> Numbers:
        (scored,) = outputs
        perplexity = math.exp(min(scored.nll, _LARGEST))
        return {(SENTENCE, "token_accuracy"): scored.token_acc, (SENTENCE, "perplexity"): perplexity}

    def agreement(self, before: Sequence[PairScore], after: Sequence[PairScore]) -> float:
        return metrics.agreement(before[0].pred_ids, after[0].pred_ids)

    def payload(self, outputs: Sequence[PairScore]) -> list[int]:
        return list(outputs[0].pred_ids)

    def settings(self) -> dict[str, Any]:
        return {}


@register_scenario
@dataclass(frozen=True)
class Hallucination(Scenario):
    """The scenario of corrected hallucinations.

    Args:
        judge: of answers: a `Judge`, or a function ``(question, references, prediction)``; ``None``: an answer that
            holds a reference as whole words is right.
        doubt: see `HallucinationReplies`.
        max_new_tokens: of each answer.
    """

    name: ClassVar[str] = "hallucination"
    question: ClassVar[str] = "My model makes something up, and should say what is true."
    reads: ClassVar[dict[str, str]] = {
        "prompt, target_new": "the question, or the passage so far; the right answer, or the right next sentence",
        "ground_truth": "what the model made up",
        "rephrase_prompts, portability, locality": "other wordings, questions that follow (hop_2 …), unrelated ones",
        "extra": "yes_question, no_question, multiple_choice, reversed",
    }
    layouts: ClassVar[dict[str, str]] = {
        "paraphrased_question": "halluedit/llama2",
        "labels": "knowedit/wikibio",
        "concept": "knowedit/wikibio",
    }
    standin: ClassVar[str] = "the answer as whole words"

    judge: Any = None
    doubt: str = "Are you sure?"
    max_new_tokens: int = 16

    def protocols(self) -> list[Protocol]:
        judge = self.judge
        if judge is not None and not isinstance(judge, Judge):
            if not callable(judge):
                raise EvaluationError(f"a judge must be a Judge or a function, not {shown(judge)}")
            judge = CallableJudge(judge)
        replies = HallucinationReplies(self.max_new_tokens, True, judge, self.doubt)
        return [replies, Sentences(), Fluency(tokenizer="words")]

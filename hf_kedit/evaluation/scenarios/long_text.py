"""Long and unstructured knowledge: does the model know the page that it was taught, and what follows from it?

UnKEBench (Deng et al. 2024, arXiv 2405.15349), AKEW (Wu et al. 2024, arXiv 2402.18909) and LEME (Rosati et al. 2024,
arXiv 2402.09394) ask for texts. The model writes them greedily, and they are compared with what they should say:

    answer, paraphrase    BLEU, ROUGE-1/2/L and similarity to the text; the share of its key points that they name
    sub-question          a question about one detail: whether its answer is there, and its ROUGE-L
    coupled               a text about the subject or an entity beside it: the share of known properties that it names
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from typing_extensions import TypedDict

from ... import embedded
from ...books.retrieval import DENSE_MODEL, LEXICAL, find_retriever
from ...data.extra import extra_of
from ...errors import check_choice
from ...requests import EditRequest
from ..asking.generation import Continuation
from ..measures import metrics
from ..measures.catalogue import Metric, register_metrics
from ..measures.texts import bleu, rouge
from ..protocols.base import Numbers, Protocol, Question, TeacherForced
from ..protocols.replies import Replies, similarity
from .base import Scenario, register_scenario

ANSWER, PARAPHRASE, SUB, COUPLED = "answer", "paraphrase", "sub", "coupled"
SUB_QUESTION = "Sub_Question"
"""Axis of the portability probes that ask for details."""
LONG_TEXT = register_metrics(
    "long_text",
    {
        f"{prefix}{key}": Metric(f"{about}{where}", chart=key in ("rougeL", "key_points"))
        for prefix, where in (("", ""), ("paraphrase_", ", asked in other words"))
        for key, about in (
            ("bleu", "BLEU of what is written against the text"),
            ("rouge1", "words of the text that are written"),
            ("rouge2", "pairs of words of the text that are written"),
            ("rougeL", "longest common run of words, with gaps"),
            ("similarity", "similarity of what is written and the text"),
            ("key_points", "share of the text's key points that are named"),
        )
    }
    | {
        "sub_answered": Metric("share of questions about details whose answer is there", share=True),
        "sub_rougeL": Metric("longest common run of words with the answers to questions about details"),
        "coupled": Metric("share of known properties that texts about the subject and entities beside it name"),
    },
)


@dataclass(frozen=True)
class LongReplies(Replies):
    """Greedy replies to the prompt, its paraphrases, questions about details, and prompts for coupled entities.

    The first group of a question's answers is the text; the others are its key points.

    Args:
        max_new_tokens: length limit of a reply. Published results have 512.
        similarity: name of a retriever that compares texts (`find_retriever`).
        rouge: ``recall``, as published, or ``f``, which counts words too many as well.
        bleu: ``word``, or ``char``, as published (a BLEU function that gets plain strings).
    """

    name: ClassVar[str] = "long_text"
    max_new_tokens: int = 200
    similarity: str = LEXICAL
    rouge: Literal["recall", "f"] = "recall"
    bleu: Literal["word", "char"] = "word"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("rouge", self.rouge, ("recall", "f"))
        check_choice("bleu", self.bleu, ("word", "char"))
        find_retriever(self.similarity)  # one that is missing is named now, not after the first edits

    @property
    def scorer(self) -> str:
        """What the numbers depend on."""
        return f"ROUGE {self.rouge}, BLEU of {self.bleu}s, similarity {self.similarity}"

    def questions(self, request: EditRequest) -> list[Question]:
        groups = ((request.target_new,), *((point,) for point in key_points(request)))
        asked = [Question(LONG_TEXT, ANSWER, 0, request.filled_prompt, groups)]
        asked += [Question(LONG_TEXT, PARAPHRASE, i, p, groups) for i, p in enumerate(request.rephrase_prompts)]
        asked += [
            Question(LONG_TEXT, SUB, i, probe.prompt, tuple(tuple(group) for group in probe.ground_truth), probe.match)
            for i, probe in enumerate(request.portability.get(SUB_QUESTION, ()))
        ]
        for i, entity in enumerate(_extra(request).get("coupled") or []):
            known = tuple(tuple(values) for values in entity["properties"].values() if values)
            if known:
                asked.append(Question(LONG_TEXT, COUPLED, i, request.posed(entity["prompt"]), known))
        return asked

    def details(self, question: Question, outputs: Sequence[Continuation], score: float | None) -> Numbers:
        said, groups = outputs[0].text, question.groups
        if question.axis == SUB:
            numbers = {} if not groups else {
                "sub_answered": metrics.answer_score(said, groups, question.match, "contains"),
                "sub_rougeL": max(rouge(said, a)["rougeL"][self.rouge] for group in groups for a in group),
            }  # fmt: skip
        elif question.axis == COUPLED:
            numbers = {"coupled": _named(said, groups)}
        else:
            numbers = self._compared(said, groups[0][0])
            if groups[1:]:
                numbers["key_points"] = _named(said, groups[1:])
            if question.axis == PARAPHRASE:
                numbers = {f"paraphrase_{key}": value for key, value in numbers.items()}
        return {(question.section, key): value for key, value in numbers.items()}

    def _compared(self, said: str, text: str) -> dict[str, float]:
        overlap = rouge(said, text)
        return {
            "bleu": bleu(said, text, level=self.bleu),
            **{key: overlap[key][self.rouge] for key in ("rouge1", "rouge2", "rougeL")},
            "similarity": similarity(self.similarity, said, text) if said.strip() else 0.0,
        }


def key_points(request: EditRequest) -> list[str]:
    """What a text has to name: ``extra.key_points``, the answers to its sub-questions, or AKEW's new object."""
    extra = _extra(request)
    given = extra.get("key_points") or extra.get("sub_answers") or extra.get("answer") or []
    if not given:
        given = [group[0] for probe in request.portability.get(SUB_QUESTION, ()) for group in probe.ground_truth[:1]]
    return [str(point) for point in ([given] if isinstance(given, str) else given) if str(point).strip()]


class _Entity(TypedDict):
    prompt: str
    properties: dict[str, list[str]]


class _Page(TypedDict, total=False):
    key_points: str | list[Any] | None
    sub_answers: str | list[Any] | None
    answer: str | list[Any] | None
    coupled: list[_Entity] | None


def _extra(request: EditRequest) -> _Page:
    return extra_of(request, _Page)


def _named(said: str, groups: Sequence[Sequence[str]]) -> float:
    """Share of the groups of which one alias occurs in a text as whole words."""
    return sum(max(metrics.contains(said, alias) for alias in group) for group in groups) / len(groups)


@register_scenario
@dataclass(frozen=True)
class LongText(Scenario):
    """The scenario of long and unstructured knowledge.

    Args:
        similarity: name of a retriever that compares texts; ``None``: the sentence encoder ``kedit/minilm-l6`` where
            it is on this machine, else ``lexical``, words in common; reports say which.
        rouge: see `LongReplies`.
        bleu: see `LongReplies`.
        max_new_tokens: see `LongReplies`.
    """

    name: ClassVar[str] = "long_text"
    question: ClassVar[str] = "My model should know this page."
    reads: ClassVar[dict[str, str]] = {
        "prompt": "a question that the page answers",
        "target_new": "the page",
        "rephrase_prompts": "the question in other words",
        "portability[Sub_Question]": "questions about details, with their answers",
        "extra.key_points": "what the page has to name; without it, the answers to the questions about details",
        "extra.coupled": "prompts for texts about entities beside the subject, with known properties (LEME)",
        "locality": "what must not change",
    }
    layouts: ClassVar[dict[str, str]] = {
        "para_question": "unke",
        "coupled_prompts_and_properties": "leme/counterfact",
        "requested_rewrite": "akew/counterfact",
    }
    standin: ClassVar[str] = "words in common, where the sentence encoder kedit/minilm-l6 is not on this machine"

    similarity: str | None = None
    rouge: str = "recall"
    bleu: str = "word"
    max_new_tokens: int = 200

    def protocols(self) -> list[Protocol]:
        dense = DENSE_MODEL if embedded.is_there(DENSE_MODEL) else LEXICAL
        options: dict[str, Any] = {"rouge": self.rouge, "bleu": self.bleu}
        return [LongReplies(self.max_new_tokens, False, self.similarity or dense, **options), TeacherForced()]

    def read(self, source: Any = None, path: Any = None, **options: Any) -> Any:
        """As every scenario; of AKEW the paragraphs, unless ``edit_input`` says otherwise."""
        file = Path(str(source if path is None else path))
        if str(source).startswith("akew/") or (os.path.isfile(file) and str(self._layout(file)).startswith("akew/")):
            options = {"edit_input": "unstructured", **options}
        return super().read(source, path, **options)

    def requests(self, requests: Sequence[EditRequest]) -> list[EditRequest]:
        """The requests as they are, checked for what they bring along."""
        for request in requests:
            _extra(request)
        return list(requests)

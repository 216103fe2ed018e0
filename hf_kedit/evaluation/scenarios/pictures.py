"""Pictures: does a model that sees say the new thing of a picture, and the old ones of everything else?

Cheng et al. 2023 ("Can We Edit Multimodal Large Language Models?", arXiv 2310.08475): reliability, generality in the
question and in the picture, locality in text and in pictures; Huang et al. 2024 (VLKEB, arXiv 2403.07350) add
portability. The published locality compares the ids that are ranked first at *all* positions, prompt and picture
included, rank by rank (1 for text, 10 for pictures), so that two ids which change places at the ninth rank count as a
change; here the positions of the answer count, unless that is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from ...errors import RequestError, check_choice, check_count
from ...requests import EditRequest
from ..asking.generation import Continuation
from ..asking.ranked import Ranked, ranked_predictions
from ..asking.scoring import PairScore
from ..measures.catalogue import Metric, register_metrics
from ..measures.scenarios import ranked_agreement
from ..protocols.base import (
    Generation,
    Numbers,
    Output,
    PairProtocol,
    Protocol,
    Query,
    Question,
    TeacherForced,
    register_protocol,
    standard_questions,
)
from .base import Scenario, register_scenario

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Mode = Literal["answer", "ranked_topk_all"]
PICTURES = register_metrics(
    "pictures",
    {
        "m_generality": Metric("the new answer about another picture of the same thing", label="M-generality"),
        "t_locality": Metric("answers to texts without a picture that stay what they were", label="T-locality"),
        "m_locality": Metric("answers about other pictures that stay what they were", label="M-locality"),
    },
)
_LOCALITY = {"t_locality": "text", "m_locality": "multimodal"}
"""Number → axis of the data sets whose probes it is made of; without it, all probes without (with) a picture."""
_RANKS = {"t_locality": 1, "m_locality": 10}
"""How many ids the published tables compare."""


def picture_questions(request: EditRequest) -> list[Question]:
    """What a rendered request is asked for beside the usual questions; the axis of each names its number."""
    standard = standard_questions(request)
    (edit,) = (q for q in standard if q.section == "rewrite")
    named = {"m_generality": [replace(edit, prompt=text) for text in request.repictured_prompts]}
    for name, axis in _LOCALITY.items():
        seen = name == "m_locality"
        chosen = {
            (key, i)
            for key, probes in request.locality.items()
            for i, probe in enumerate(probes)
            if (key == axis if axis in request.locality else (probe.image is not None) == seen)
        }
        named[name] = [q for q in standard if q.section == "locality" and (q.axis, q.index) in chosen]
    return [
        replace(question, section=PICTURES, axis=name, index=i)
        for name, questions in named.items()
        for i, question in enumerate(questions)
    ]


def _number(question: Question, score: float | None) -> Numbers:
    """The number of a question whose answer is known."""
    if question.section != PICTURES or question.axis in _LOCALITY or score is None:
        return {}
    return {(PICTURES, str(question.axis)): score}


@register_protocol
@dataclass(frozen=True)
class PictureScores(TeacherForced):
    """The numbers by feeding the answers; locality is agreement of the most probable ids where the answer stands.

    Reliability, generality in the question and portability are the usual sections (``rewrite``, ``rephrase``,
    ``portability``); the numbers of pictures stand in a section of their own.

    Args:
        compares: whether locality is measured here (not where `RankedLocality` does).
    """

    name: ClassVar[str] = "pictures"
    compares: bool = True

    def questions(self, request: EditRequest) -> list[Question]:
        return [*standard_questions(request), *picture_questions(request)]

    def details(self, question: Question, outputs: Sequence[PairScore], score: float | None) -> Numbers:
        return _number(question, score)

    def changes(self, question: Question, before: Sequence[PairScore], after: Sequence[PairScore]) -> Numbers:
        if question.axis not in _LOCALITY or not self.compares:
            return {}
        return {(PICTURES, str(question.axis)): self.agreement(before, after)}


@register_protocol
@dataclass(frozen=True)
class PictureReplies(Generation):
    """The numbers by what the model writes up to the end of its answer."""

    name: ClassVar[str] = "pictures_generated"
    max_new_tokens: int = 16
    cut_at_newline: bool | None = True
    stop_strings: tuple[str, ...] = (".",)

    def questions(self, request: EditRequest) -> list[Question]:
        return [*standard_questions(request), *picture_questions(request)]

    def details(self, question: Question, outputs: Sequence[Continuation], score: float | None) -> Numbers:
        return _number(question, score)

    def changes(self, question: Question, before: Sequence[Continuation], after: Sequence[Continuation]) -> Numbers:
        if question.axis not in _LOCALITY:
            return {}
        return {(PICTURES, str(question.axis)): self.agreement(before, after)}


@dataclass(frozen=True)
class RankedLocality(PairProtocol):
    """The published locality: the ids ranked first at all positions, compared rank by rank."""

    name: ClassVar[str] = "pictures_ranked"
    scorer: str = "ranked ids"

    def questions(self, request: EditRequest) -> list[Question]:
        return [question for question in picture_questions(request) if question.axis in _LOCALITY]

    def queries(self, question: Question) -> list[Query]:
        return [question.asked(answer) for group in question.groups[:1] for answer in group[:1]]

    def fed(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pairs: Sequence[tuple[str, str]],
        separator: str | None,
        token_budget: int,
    ) -> Sequence[Output]:
        # Ten ids are kept of every position, and cut where a number compares fewer.
        return ranked_predictions(model, tokenizer, pairs, max(_RANKS.values()), separator, token_budget)

    def accuracy(self, question: Question, outputs: Sequence[Ranked]) -> float | None:
        return None

    def agreement(self, before: Sequence[Ranked], after: Sequence[Ranked]) -> float:
        return self._compared(before, after, max(_RANKS.values()))

    def changes(self, question: Question, before: Sequence[Ranked], after: Sequence[Ranked]) -> Numbers:
        axis = str(question.axis)
        return {(PICTURES, axis): self._compared(before, after, _RANKS[axis])}

    @staticmethod
    def _compared(before: Sequence[Ranked], after: Sequence[Ranked], count: int) -> float:
        # A method that works through the prompt writes something in front of it: what both have is compared.
        last = min(len(before[0].ids), len(after[0].ids))
        old, new = ([ids[:count] for ids in outputs[0].ids[-last:]] for outputs in (before, after))
        return ranked_agreement(old, new, ordered=True)

    def payload(self, outputs: Sequence[Ranked]) -> list[list[int]]:
        return [list(ids) for ids in outputs[0].ids]

    def settings(self) -> dict[str, Any]:
        return {}


@register_scenario
@dataclass(frozen=True)
class Pictures(Scenario):
    """The scenario of models that see.

    Args:
        mode: what locality compares: the most probable ids where the ``answer`` stands, or ``ranked_topk_all``, as the
            published tables do (see the module), which costs a pass with logits at all positions.
        images: folder that relative paths of images start from; ``None``: the current one.
        generated: measure what the model writes by itself, too.
        max_new_tokens: of what it writes.
        stop: texts that an answer ends at, beside the end of its line.
    """

    name: ClassVar[str] = "pictures"
    question: ClassVar[str] = "My model says the wrong thing of a picture."
    reads: ClassVar[dict[str, str]] = {
        "image, prompt, target_new": "the picture, the question, and the new answer",
        "rephrase_prompts": "the question in other words, of the same picture",
        "image_rephrase": "another picture of the same thing, with the same question",
        "locality": "'text': probes without a picture; 'multimodal': others with one of their own",
        "portability": "what follows, with or without a picture",
    }
    layouts: ClassVar[dict[str, str]] = {
        "knowledge_type": "mmke/entity",  # one layout for its three parts
        "port_new": "vlkeb",
        "m_loc": "mmedit/vqa",
        "multimodal_locality_image": "comprehendedit",
    }

    mode: Mode = "answer"
    images: str | None = None
    generated: bool = True
    max_new_tokens: int = 16
    stop: tuple[str, ...] = (".",)

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, get_args(Mode))
        check_count("max_new_tokens", self.max_new_tokens)

    def requests(self, requests: Sequence[EditRequest]) -> list[EditRequest]:
        for request in requests:
            if request.image is None:
                raise RequestError(
                    "has no image, which scenario 'pictures' asks about", row=request.row, request_id=request.id
                )
        return [request.with_pictures(self.images) for request in requests]

    def protocols(self) -> list[Protocol]:
        ranked = self.mode != "answer"
        chosen: list[Protocol] = [PictureScores(compares=not ranked)]
        if ranked:
            chosen.append(RankedLocality())
        if self.generated:
            stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
            chosen.append(PictureReplies(max_new_tokens=self.max_new_tokens, stop_strings=stop))
        return chosen

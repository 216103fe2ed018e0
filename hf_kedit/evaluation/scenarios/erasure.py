"""Erasure: has the model lost an answer, or does it only no longer come behind the one prompt?

KnowEdit's Sanitation (Zhang et al. 2024, arXiv 2401.01286; TriviaQA): what is to be forgotten is answered with a
target such as "I don't know.", and what is to be kept is answered as before. Beyond that, whether the old answer
leaks: in greedy answers and in sampled ones, behind other wordings, and in what the model holds for likely.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ...errors import check_choice, check_count
from ...requests import EditRequest
from ..asking.batching import TOKEN_BUDGET
from ..asking.generation import Continuation, Sampling, generate_answers
from ..asking.scoring import PairScore
from ..measures import metrics
from ..measures.catalogue import Metric, register_metrics
from ..measures.scenarios import leaks
from ..protocols.base import Numbers, Output, PairProtocol, Protocol, Query, Question
from ..protocols.replies import Replies
from .base import Scenario, register_scenario

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PROMPT, _PARAPHRASE, _RETAINED = "prompt", "paraphrase", "retained"
ERASURE = register_metrics(
    "erasure",
    {
        "success": Metric("the model says the target", share=True),
        "paraphrase_success": Metric("it does so behind other wordings", share=True),
        "leakage": Metric("the old answer still comes", better="lower", share=True),
        "paraphrase_leakage": Metric("it comes behind other wordings", better="lower", share=True),
        "leakage_at_k": Metric("it comes in any of k sampled answers", better="lower", share=True),
        "paraphrase_leakage_at_k": Metric("the same behind other wordings", better="lower", share=True),
        "retained": Metric("tokens of other answers that stay what they were", share=True),
        "retained_accuracy": Metric("other answers that are right", share=True),
    },
)
LIKELIHOOD = register_metrics(
    "erasure likelihood",
    {
        "old_answer": Metric("probability of the old answer per token, geometric mean", better="lower"),
        "paraphrase_old_answer": Metric("the same behind other wordings", better="lower"),
        "target": Metric("probability of the target per token, geometric mean"),
        "preferred": Metric("share of questions whose target is likelier per token than any old answer", share=True),
    },
)


def old_answers(request: EditRequest) -> tuple[str, ...]:
    """What is to be forgotten."""
    return tuple(dict.fromkeys(request.unwanted or request.ground_truth))


def kept_share(before: Sequence[int], after: Sequence[int]) -> float:
    """Share of the tokens of a continuation that are the same after the edit, position by position.

    An empty one is kept by an empty one only.
    """
    if not before:
        return float(not after)
    return sum(a == b for a, b in zip(before, after, strict=False)) / len(before)


@dataclass(frozen=True)
class ErasureReplies(Replies):
    """Greedy and sampled answers to what is to be forgotten, greedy ones to what is to be kept.

    Args:
        max_new_tokens: length limit of an answer.
        cut_at_newline: keep the first line only.
        match: how the target is looked for: ``contains`` or ``exact``.
        samples: sampled answers per question; 0 for none.
        top_k: sample among so many tokens.
        seed: of the sampling.
    """

    name: ClassVar[str] = "erasure"
    max_new_tokens: int = 20
    match: str = "contains"
    samples: int = 5
    top_k: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("match", self.match, ("contains", "exact"))
        check_count("samples", self.samples, 0)
        check_count("top_k", self.top_k)

    @property
    def scorer(self) -> str:
        """How the target is looked for."""
        return self.match

    def questions(self, request: EditRequest) -> list[Question]:
        old = old_answers(request)
        groups = ((request.target_new,), old)
        asked = [Question(ERASURE, _PROMPT, 0, request.filled_prompt, groups)]
        asked += [Question(ERASURE, _PARAPHRASE, i, p, groups) for i, p in enumerate(request.rephrase_prompts)]
        kept = (probe for probes in request.locality.values() for probe in probes)
        for i, probe in enumerate(kept):
            answers = tuple(tuple(group) for group in probe.ground_truth)
            asked.append(Question(ERASURE, _RETAINED, i, probe.prompt, answers, probe.match))
        return asked

    def queries(self, question: Question) -> list[Query]:
        # Sampled answers are told apart by their number, which stands where other protocols have an answer.
        sampled = range(self.samples if question.axis != _RETAINED else 0)
        return [question.asked(), *(question.asked(f"sample {number}") for number in sampled)]

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        queries: Sequence[Query],
        separator: str | None,
        token_budget: int = TOKEN_BUDGET,
    ) -> list[Output]:
        outputs: dict[Query, Output] = {}
        for number in dict.fromkeys(query.answer for query in queries):
            part = [query for query in queries if query.answer == number]
            seed = None if number is None else self.seed + int(number.removeprefix("sample "))
            answers = generate_answers(
                model,
                tokenizer,
                [query.prompt for query in part],
                self.max_new_tokens,
                token_budget,
                cut_at_newline=self.cut_at_newline,
                sampling=None if seed is None else Sampling(self.top_k, seed),
            )
            outputs |= zip(part, answers, strict=True)
        return [outputs[query] for query in queries]

    def details(self, question: Question, outputs: Sequence[Continuation], score: float | None) -> Numbers:
        greedy, *sampled = (output.text for output in outputs)
        if question.axis == _RETAINED:
            if not question.groups:
                return {}
            right = metrics.answer_score(greedy, question.groups, question.match)
            return {(ERASURE, "retained_accuracy"): right}
        (target,), old = question.groups
        lead = "" if question.axis == _PROMPT else "paraphrase_"
        numbers = {f"{lead}success": metrics.answer_scorer(self.match)(greedy, target)}
        if old:
            numbers[f"{lead}leakage"] = leaks(greedy, old)
        if old and sampled:
            numbers[f"{lead}leakage_at_k"] = max(leaks(text, old) for text in sampled)
        return {(ERASURE, key): value for key, value in numbers.items()}

    def changes(self, question: Question, before: Sequence[Continuation], after: Sequence[Continuation]) -> Numbers:
        if question.axis != _RETAINED:
            return {}
        return {(ERASURE, "retained"): kept_share(before[0].ids, after[0].ids)}

    def settings(self) -> dict[str, Any]:
        own = {"match": self.match, "samples": self.samples, "top_k": self.top_k, "seed": self.seed}
        return {**super().settings(), **own}


@dataclass(frozen=True)
class ErasureLikelihood(PairProtocol):
    """How likely the old answers and the target are, teacher forced."""

    name: ClassVar[str] = "erasure_likelihood"
    scorer: str = "probability per token"

    def questions(self, request: EditRequest) -> list[Question]:
        groups = ((request.target_new,), old_answers(request))
        prompts = [(_PROMPT, request.filled_prompt), *((_PARAPHRASE, p) for p in request.rephrase_prompts)]
        own = request.separator_or(None)
        return [Question(LIKELIHOOD, axis, i, p, groups, separator=own) for i, (axis, p) in enumerate(prompts)]

    def queries(self, question: Question) -> list[Query]:
        return [question.asked(answer) for group in question.groups for answer in group]

    def accuracy(self, question: Question, outputs: Sequence[PairScore]) -> float | None:
        return None

    def details(self, question: Question, outputs: Sequence[PairScore], score: float | None) -> Numbers:
        (target,), old = question.groups
        nll = {output.target: output.nll for output in outputs}
        known = [nll[answer] for answer in old if answer in nll]
        numbers: dict[str, float] = {}
        if known:
            likely = math.exp(-min(known))
            numbers["old_answer" if question.axis == _PROMPT else "paraphrase_old_answer"] = likely
        if target in nll and question.axis == _PROMPT:
            numbers["target"] = math.exp(-nll[target])
            if known:
                numbers["preferred"] = float(nll[target] < min(known))
        return {(LIKELIHOOD, key): value for key, value in numbers.items()}

    def agreement(self, before: Sequence[PairScore], after: Sequence[PairScore]) -> float:
        return metrics.agreement(before[0].pred_ids, after[0].pred_ids)

    def payload(self, outputs: Sequence[PairScore]) -> list[float]:
        return [output.nll for output in outputs]

    def why_unscored(self, question: Question) -> str:
        return "neither the target nor an old answer could be scored"

    def settings(self) -> dict[str, Any]:
        return {}


@register_scenario
@dataclass(frozen=True)
class Erasure(Scenario):
    """The scenario of forgetting.

    Args:
        match: see `ErasureReplies`.
        max_new_tokens: of each answer. Published results have 10.
        samples: sampled answers per question, for leakage at k.
        top_k: of the sampling.
        seed: of the sampling.
        unlearn: take probability from the old answer itself, with methods that can
            (`UnlearningConfig.unlikelihood`); otherwise only the target is trained.
    """

    name: ClassVar[str] = "erasure"
    question: ClassVar[str] = "My model must not say a certain thing any more."
    reads: ClassVar[dict[str, str]] = {
        "prompt, rephrase_prompts": "questions that bring the answer out",
        "target_new": "what is to be said in its place",
        "ground_truth, target_neg or erase": "the answers that are to go",
        "locality": "questions that are to be answered as before",
    }
    layouts: ClassVar[dict[str, str]] = {"K_F": "knowedit/sanitation", "success": "knowedit/sanitation"}

    match: str = "contains"
    max_new_tokens: int = 20
    samples: int = 5
    top_k: int = 20
    seed: int = 0
    unlearn: bool = True

    def protocols(self) -> list[Protocol]:
        replies = ErasureReplies(self.max_new_tokens, True, self.match, self.samples, self.top_k, self.seed)
        return [replies, ErasureLikelihood()]

    def requests(self, requests: Sequence[EditRequest]) -> list[EditRequest]:
        return [
            replace(request, metadata={**request.metadata, "erase": request.metadata.get("erase") or True})
            if self.unlearn
            else request
            for request in requests
        ]

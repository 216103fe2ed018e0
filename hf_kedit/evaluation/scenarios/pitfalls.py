"""Two edits that concern each other: does the second one hold, and what is left of the first and of what was true?

Li et al. 2024, "Unveiling the Pitfalls of Knowledge Editing for Large Language Models", arXiv 2310.02129. The two
edits of a case are made one after the other, and the model is asked before, between and after them. Published
aggregation, as in the released code: the probability of an object per token is averaged over the prompts of its
relation; the numbers of a case (`measures.pitfalls`) come of these means; they are averaged over cases.
"""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from typing_extensions import TypedDict

from ...data.extra import extra_of
from ...data.pitfalls import CONFLICT, CONFLICT_TYPES, TIED_FACT, TRUE_OBJECTS
from ...errors import RequestError
from ...requests import EditRequest, Probe
from ..asking.scoring import PairScore
from ..measures import metrics
from ..measures.catalogue import Metric, register_metrics
from ..measures.pitfalls import conflict_scores, round_scores
from ..protocols.base import AFTER_EDITS, BEFORE_EDITS, Numbers, PairProtocol, Protocol, Query, Question
from .base import Scenario, register_scenario

CONFLICTS = register_metrics(
    "conflict",
    {
        "CS": Metric("share of cases in which what holds after both edits is likelier than the first", share=True),
        "CM": Metric("share of its probability that the first edit lost to the second; -1: it at least doubled"),
        "Succ": Metric("share of cases in which the second edit alone makes its object the likelier one", share=True),
        "TFD": Metric("share of its probability that the fact which ties the two edits lost", better="lower"),
    },
)  # fmt: skip
ROUNDS = register_metrics(
    "round",
    {
        "Succ": Metric("share of the two edits, there and back, that make their object the likelier one"),
        "D": Metric("divergence of the distributions over the true objects before and after", "nats", "lower"),
        "D_released": Metric("the same, divided by their number (released code)", "nats", "lower", chart=False),
        "IR": Metric("share of the other true objects that are less likely than before", better="lower"),
        "FR": Metric("share of cases in which more than half of them are", better="lower", share=True),
    },
)  # fmt: skip
FIRST_EDIT, SECOND_ALONE = "first edit", "second edit alone"
_EARLIER = "first_of_two"


@dataclass(frozen=True)
class FactsQuestion(Question):
    """A case of two edits: what is said of facts, by several prompts each.

    Args:
        facts: name → the prompts with the answer that is fed.
    """

    facts: tuple[tuple[str, tuple[Query, ...]], ...] = ()

    def likelihoods(self, outputs: Sequence[PairScore]) -> dict[str, float]:
        """Probability of each fact: per token, averaged over its prompts."""
        rest = iter(outputs)
        return {
            name: sum(math.exp(-next(rest).nll) for _ in queries) / len(queries) for name, queries in self.facts
        }  # fmt: skip


@dataclass(frozen=True)
class _Course(PairProtocol):
    """Base of the two protocols: teacher-forced answers at every stage of a case, asked of its second edit."""

    needs_all_outputs = True
    scorer: str = "probability per token"

    @abstractmethod
    def facts(self, prompts: list[str], target: str, second: EditRequest) -> dict[str, list[tuple[str, str]]]:
        """Name → the prompts of a fact, each with its answer.

        Args:
            prompts: of the first edit, as they are asked.
            target: of the first edit.
            second: the second edit.
        """

    def stages(self, requests: Sequence[EditRequest]) -> Mapping[str, tuple[int, ...]]:
        return {FIRST_EDIT: (0,)} if len(requests) == 2 else {}

    def questions(self, request: EditRequest) -> list[Question]:
        earlier = request.metadata.get(_EARLIER)
        if earlier is None:
            return []
        own, prompts = request.separator_or(None), [request.posed(prompt) for prompt in earlier["prompts"]]
        facts = [
            (name, tuple(Query(prompt, answer, own) for prompt, answer in pairs))
            for name, pairs in self.facts(prompts, earlier["target"], request).items()
        ]
        section = str(self.name)
        return [FactsQuestion(section, section, 0, request.filled_prompt, (), separator=own, facts=tuple(facts))]

    def queries(self, question: Question) -> list[Query]:
        assert isinstance(question, FactsQuestion)
        return [query for _, queries in question.facts for query in queries]

    def accuracy(self, question: Question, outputs: Sequence[PairScore]) -> float | None:
        return None

    def agreement(self, before: Sequence[PairScore], after: Sequence[PairScore]) -> float:
        return metrics.agreement(before[0].pred_ids, after[0].pred_ids)

    def payload(self, outputs: Sequence[PairScore]) -> list[float]:
        return [output.nll for output in outputs]

    def why_unscored(self, question: Question) -> str:
        return "the edits of the case were not made one after the other"

    def settings(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class ConflictAnswers(_Course):
    """What the edits of a case of ConflictEdit say, and what ties them."""

    name: ClassVar[str] = "conflict"

    def stages(self, requests: Sequence[EditRequest]) -> Mapping[str, tuple[int, ...]]:
        alone = {SECOND_ALONE: (1,)} if kind_of(requests[-1]) == "coverage" else {}
        return {**super().stages(requests), **alone} if len(requests) == 2 else {}

    def facts(self, prompts: list[str], target: str, second: EditRequest) -> dict[str, list[tuple[str, str]]]:
        found = {"first": _with(target, prompts), "holds": _probed(second.portability[CONFLICT])}
        if kind_of(second) == "coverage":
            found["second"] = _with(second.target_new, _prompts(second))
        if second.locality.get(TIED_FACT):
            found["tied"] = _probed(second.locality[TIED_FACT])
        return found

    def course(self, question: Question, states: Mapping[str, Sequence[Any]]) -> Numbers:
        assert isinstance(question, FactsQuestion)
        p = {name: question.likelihoods(outputs) for name, outputs in states.items()}
        if FIRST_EDIT not in p:
            return {}
        after = p[AFTER_EDITS]
        alone = (p[SECOND_ALONE]["second"], p[SECOND_ALONE]["first"]) if SECOND_ALONE in p else None
        tied = (p[BEFORE_EDITS]["tied"], after["tied"]) if "tied" in after else None
        numbers = conflict_scores(p[FIRST_EDIT]["first"], after["first"], after["holds"], alone=alone, tied=tied)
        return {(CONFLICTS, key): value for key, value in numbers.items()}


@dataclass(frozen=True)
class RoundAnswers(_Course):
    """What the edits of a case of RoundEdit say, and the other true objects."""

    name: ClassVar[str] = "round"

    def facts(self, prompts: list[str], target: str, second: EditRequest) -> dict[str, list[tuple[str, str]]]:
        found = {"new": _with(target, prompts), "old": _with(second.target_new, _prompts(second))}
        for prompt, answer in _probed(second.locality[TRUE_OBJECTS]):
            found.setdefault(f"other {answer}", []).append((prompt, answer))
        return found

    def course(self, question: Question, states: Mapping[str, Sequence[Any]]) -> Numbers:
        assert isinstance(question, FactsQuestion)
        p = {name: question.likelihoods(outputs) for name, outputs in states.items()}
        if FIRST_EDIT not in p:
            return {}
        there, before, after = p[FIRST_EDIT], p[BEFORE_EDITS], p[AFTER_EDITS]
        objects = [name for name in after if name != "new"]
        numbers = round_scores(
            (there["new"], there["old"]),
            (after["old"], after["new"]),
            [before[name] for name in objects],
            [after[name] for name in objects],
        )
        return {(ROUNDS, key): value for key, value in numbers.items()}


class _Pair(TypedDict, total=False):
    conflict: str | None


def kind_of(request: EditRequest) -> str | None:
    """How the second edit of a case contradicts the first: ``coverage``, ``reverse`` or ``composite``."""
    return extra_of(request, _Pair).get("conflict")


def _prompts(request: EditRequest) -> list[str]:
    return [request.filled_prompt, *request.rephrase_prompts]


def _with(answer: str, prompts: Sequence[str]) -> list[tuple[str, str]]:
    return [(prompt, answer) for prompt in prompts]


def _probed(probes: Sequence[Probe]) -> list[tuple[str, str]]:
    return [(probe.prompt, group[0]) for probe in probes for group in probe.ground_truth]


@dataclass(frozen=True)
class _Two(Scenario):
    """Base of the two scenarios: cases of two edits with certain probes on the second one."""

    needed: ClassVar[tuple[str, str]]

    def requests(self, requests: Sequence[EditRequest]) -> list[EditRequest]:
        """The second edit of a case gets to know the first.

        Raises:
            RequestError: if a case has not two edits, or its second one lacks the probes.
        """
        prepared: list[EditRequest] = []
        for _, members in itertools.groupby(enumerate(requests), key=lambda m: m[1].metadata.get("group_id") or m[0]):
            group = [request for _, request in members]
            last = group[-1]
            if len(group) != 2:
                raise _bad(last, "a case is two edits, one behind the other, with one group_id", "metadata")
            section, axis = self.needed
            if not getattr(last, section).get(axis):
                raise _bad(last, f"the second edit of a case needs probes {axis!r}", section)
            self.check(last)
            first = group[0]
            known = {"prompts": [first.plain_prompt, *first.rephrase_prompts], "target": first.target_new}
            prepared += [first, replace(last, metadata={**last.metadata, _EARLIER: known})]
        return prepared

    def check(self, second: EditRequest) -> None:
        """Raise for a second edit that the scenario cannot use."""


@register_scenario
@dataclass(frozen=True)
class ConflictEdit(_Two):
    """The scenario of edits that contradict each other (ConflictEdit)."""

    name: ClassVar[str] = "conflict"
    question: ClassVar[str] = "I corrected a fact twice, or turned it round: which one does my model believe?"
    reads: ClassVar[dict[str, str]] = {
        "group_id": "the case; its two edits are made one after the other",
        "prompt, rephrase_prompts": "prompts over which a fact's probability is averaged",
        f"portability[{CONFLICT}]": "on the second edit: prompts with what holds after both",
        f"locality[{TIED_FACT}]": "on the second edit: the fact that ties the two, if there is one",
        "extra.conflict": f"{', '.join(CONFLICT_TYPES)}",
    }
    layouts: ClassVar[Mapping[str, str]] = {"edits": "conflictedit/coverage"}
    needed: ClassVar[tuple[str, str]] = ("portability", CONFLICT)

    def protocols(self) -> list[Protocol]:
        return [ConflictAnswers()]

    def check(self, second: EditRequest) -> None:
        """The kind of the conflict must be known."""
        if kind_of(second) not in CONFLICT_TYPES:
            raise _bad(second, f"extra.conflict must be one of {', '.join(CONFLICT_TYPES)}", "metadata")


@register_scenario
@dataclass(frozen=True)
class RoundEdit(_Two):
    """The scenario of an edit that is taken back by another edit (RoundEdit)."""

    name: ClassVar[str] = "round"
    question: ClassVar[str] = "I edited a fact and edited it back: is my model what it was?"
    reads: ClassVar[dict[str, str]] = {
        "group_id": "the case; its two edits are made one after the other",
        "prompt, rephrase_prompts": "prompts over which an object's probability is averaged",
        f"locality[{TRUE_OBJECTS}]": "on the second edit: the same prompts with the other true objects",
    }
    layouts: ClassVar[Mapping[str, str]] = {"true_objects": "roundedit/easy"}
    needed: ClassVar[tuple[str, str]] = ("locality", TRUE_OBJECTS)

    def protocols(self) -> list[Protocol]:
        return [RoundAnswers()]


def _bad(request: EditRequest, message: str, field: str) -> RequestError:
    return RequestError(message, row=request.row, field=field, request_id=request.id)

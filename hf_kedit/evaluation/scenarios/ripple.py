"""Ripple effects: what an edit should change with it, and what it must leave alone.

RippleEdits (Cohen et al. 2024, arXiv 2307.12976): tests on six axes. A test is a set of queries joined by OR or AND,
and counts only if the unedited model knows what it takes for granted (its condition queries). Published aggregation:
the share of an edit's tests on an axis that are passed, then the mean over the edits that have one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NotRequired

from pydantic import NonNegativeInt
from typing_extensions import TypedDict

from ...data.extra import extra_of
from ...data.ripple import LOCALITY, PORTABILITY
from ...requests import EditRequest, Probe
from ..measures.catalogue import Metric, register_metrics
from ..protocols.base import Protocol, Question
from ..protocols.sets import AnswerSets, SetPart, set_of
from .base import Scenario, register_scenario

_ABOUT = {
    "Logical_Generalization": "tests passed of facts that follow by the relation's logic",
    "Compositionality_I": "tests passed of what is said of the new object",
    "Compositionality_II": "tests passed of what is asked through another entity",
    "Subject_Aliasing": "tests passed with other names of the subject",
    "Relation_Specificity": "tests passed of other facts of the subject",
    "Forgetfulness": "tests passed of older objects that stay true",
}
RIPPLE = register_metrics(
    "ripple",
    {
        "edit": Metric("share of edits whose prompt is completed with the target", share=True),
        **{axis: Metric(about) for axis, about in _ABOUT.items()},
        "mean": Metric("mean of the axes", parts=tuple(_ABOUT), combine=lambda m: sum(m) / len(m), needs_all=False),
    },
)


@dataclass(frozen=True)
class RippleAnswers(AnswerSets):
    """Continuations of the queries of RippleEdits' tests; every value must occur, by one of its aliases."""

    name: ClassVar[str] = "ripple"
    cut_at_newline: bool = False

    def questions(self, request: EditRequest) -> list[Question]:
        probes = {axis: list(request.locality.get(axis, [])) for axis in LOCALITY}
        probes |= {axis: list(request.portability.get(axis, [])) for axis in PORTABILITY}
        edit = SetPart(request.posed(request.plain_prompt), ((request.target_new,),))
        found: list[Question] = [set_of(RIPPLE, "edit", [edit])]
        for number, (axis, parts, test) in enumerate(_tests(request, probes)):
            need = "all" if str(test.get("condition", "OR")).upper() == "AND" else "any"
            known = [
                SetPart(request.posed(q["prompt"]), tuple(map(tuple, q["ground_truth"])), "all")
                for q in test.get("condition_queries") or ()
            ]
            found.append(set_of(RIPPLE, axis, parts, need, known, number))  # type: ignore[arg-type]
        return found


class _Known(TypedDict):
    prompt: str
    ground_truth: list[list[str]]


class _Test(TypedDict):
    name: str
    probes: list[NonNegativeInt]
    condition: NotRequired[str | None]
    condition_queries: NotRequired[list[_Known] | None]


class _Tests(TypedDict, total=False):
    tests: list[_Test] | None


def _tests(
    request: EditRequest, probes: Mapping[str, Sequence[Probe]]
) -> list[tuple[str, list[SetPart], Mapping[str, Any]]]:
    """Axis, queries and description of each test; without descriptions every probe is a test of its own.

    Descriptions (``extra["tests"]``) count the probes of all locality axes, or of all portability axes, in order.
    """
    described = extra_of(request, _Tests).get("tests")
    if not described:
        return [(axis, [_part(p)], {}) for axis, own in probes.items() for p in own if p.ground_truth]
    in_order = {side: [p for axis in axes for p in probes[axis]] for side, axes in ((0, LOCALITY), (1, PORTABILITY))}
    found: list[tuple[str, list[SetPart], Mapping[str, Any]]] = []
    for test in described:
        own = in_order[0 if test["name"] in LOCALITY else 1]
        parts = [_part(own[i]) for i in test["probes"] if i < len(own) and own[i].ground_truth]
        if parts:
            found.append((test["name"], parts, test))
    return found


def _part(probe: Probe) -> SetPart:
    return SetPart(probe.prompt, tuple(map(tuple, probe.ground_truth)), probe.match)


@register_scenario
@dataclass(frozen=True)
class Ripple(Scenario):
    """The scenario of ripple effects.

    Args:
        max_new_tokens: of a continuation.
        scorer: ``contains`` as published.
    """

    name: ClassVar[str] = "ripple"
    question: ClassVar[str] = "I changed one fact: which others went with it, and which went wrong?"
    reads: ClassVar[dict[str, str]] = {
        "locality": f"{', '.join(LOCALITY)}: queries",
        "portability": f"{', '.join(PORTABILITY)}: queries",
        "extra.tests": "which queries make a test, and what the unedited model must know for it",
    }
    layouts: ClassVar[Mapping[str, str]] = {"edit": "ripple_edits/random"}

    max_new_tokens: int = 20
    scorer: str = "contains"

    def protocols(self) -> list[Protocol]:
        return [RippleAnswers(self.max_new_tokens, False, self.scorer)]

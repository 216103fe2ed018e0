"""Sets of questions that are right together: any of several, all of them, under a condition on the unedited model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..asking.generation import Continuation
from ..measures import metrics
from .base import Numbers, Query, Question
from .replies import Replies


@dataclass(frozen=True)
class SetPart:
    """One question of a set.

    Args:
        prompt: what is asked.
        groups: accepted answers, each group the aliases of one value.
        match: ``any`` or ``all`` (groups).
    """

    prompt: str
    groups: tuple[tuple[str, ...], ...]
    match: str = "any"


@dataclass(frozen=True)
class SetQuestion(Question):
    """Questions that make one number together.

    Args:
        parts: the questions.
        need: how many of them must be right.
        conditions: what the unedited model must have right for the set to count.
    """

    parts: tuple[SetPart, ...] = ()
    need: Literal["any", "all"] = "any"
    conditions: tuple[SetPart, ...] = ()


def set_of(
    section: str,
    axis: str,
    parts: Sequence[SetPart],
    need: Literal["any", "all"] = "any",
    conditions: Sequence[SetPart] = (),
    index: int = 0,
) -> SetQuestion:
    """A set of questions for a number ``axis`` of a section of the protocol's own."""
    asked, known = tuple(parts), tuple(conditions)
    return SetQuestion(section, axis, index, asked[0].prompt, (), parts=asked, need=need, conditions=known)


@dataclass(frozen=True)
class AnswerSets(Replies):
    """Greedy answers to sets of questions, compared with the accepted answers.

    Args:
        max_new_tokens: length limit of an answer.
        cut_at_newline: keep the first line only.
        scorer: how an answer is compared: ``contains``, ``exact`` or ``f1`` (right from 1.0 on).
    """

    needs_all_outputs = True
    max_new_tokens: int = 20
    cut_at_newline: bool = True
    scorer: str = "contains"

    def __post_init__(self) -> None:
        super().__post_init__()
        metrics.answer_scorer(self.scorer)

    def queries(self, question: Question) -> list[Query]:
        assert isinstance(question, SetQuestion)
        return [Query(part.prompt) for part in (*question.parts, *question.conditions)]

    def details(self, question: Question, outputs: Sequence[Continuation], score: float | None) -> Numbers:
        assert isinstance(question, SetQuestion)
        return {(question.section, str(question.axis)): self._right(question, outputs)}

    def counts(self, question: Question, before: Sequence[Any]) -> bool:
        assert isinstance(question, SetQuestion)
        known = zip(question.conditions, before[len(question.parts) :], strict=True)
        return all(self._says(part, said) for part, said in known)

    def why_unscored(self, question: Question) -> str:
        return "the unedited model does not know what the test takes for granted"

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "scorer": self.scorer}

    def _right(self, question: SetQuestion, outputs: Sequence[Continuation]) -> float:
        """1.0 if as many of the set's answers are right as it needs."""
        right = [self._says(part, said) for part, said in zip(question.parts, outputs, strict=False)]
        return float(all(right) if question.need == "all" else any(right))

    def _says(self, part: SetPart, said: Continuation) -> bool:
        return metrics.answer_score(said.text, part.groups, part.match, self.scorer) >= 1.0

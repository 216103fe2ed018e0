"""The likelihood protocol: which of two answers does the model find more probable? Nothing is decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ...errors import EvaluationError, shown
from ..asking.scoring import PairScore
from ..measures.likelihoods import COUNTERFACT_NAMES, counterfact_pair
from .base import Numbers, PairProtocol, Query, Question, register_protocol

_KINDS = {"rewrite": "rewrite", "rephrase": "paraphrase", "locality": "neighborhood"}
SECTION = "counterfact"
"""Where the scores of this protocol stand in a record."""


@register_protocol
@dataclass(frozen=True)
class Likelihood(PairProtocol):
    """Compares the mean negative log-likelihood of the new answer with that of the old one (ROME, MEMIT).

    The scores of the CounterFact literature: ES, PS and NS (share of prompts where the right one of the two is
    strictly more probable; a tie is a failure), EM, PM and NM (by how much), and the share of prompts where all
    tokens of the right answer are the most probable ones. On locality probes, the probe's own answer must stay more
    probable than the new answer of the edit.

    A prompt of the edit without an old answer (``ground_truth``), and portability probes, cannot be asked.
    """

    name: ClassVar[str] = "likelihood"
    needs_all_outputs: ClassVar[bool] = True
    scorer: Literal["success"] = "success"

    def __post_init__(self) -> None:
        if self.scorer != "success":
            raise EvaluationError(f"Likelihood has the scorer 'success' only, not {shown(self.scorer)}")

    def queries(self, question: Question) -> list[Query]:
        answer = _answer(question)
        if self._problem(question) or answer is None:
            return []
        return [question.asked(answer), question.asked(question.contrast)]

    def accuracy(self, question: Question, outputs: Sequence[PairScore]) -> float | None:
        return _scores(question, outputs)[0]

    def details(self, question: Question, outputs: Sequence[PairScore], score: float | None) -> Numbers:
        if score is None:
            return {}
        kind = _KINDS[question.section]
        success, magnitude = COUNTERFACT_NAMES[kind]
        return {
            (SECTION, success): score,
            (SECTION, magnitude): _scores(question, outputs)[1],
            (SECTION, f"{kind}_exact"): float(outputs[0].exact),
        }

    def agreement(self, before: Sequence[PairScore], after: Sequence[PairScore]) -> float:
        return float((before[0].nll < before[1].nll) == (after[0].nll < after[1].nll))

    @property
    def agreement_name(self) -> str:
        """Locality: whether the same one of the two answers is preferred before and after."""
        return "same preference"

    def payload(self, outputs: Sequence[PairScore]) -> dict[str, float]:
        return {"answer": outputs[0].nll, "other": outputs[1].nll}

    def why_unscored(self, question: Question) -> str:
        return self._problem(question) or super().why_unscored(question)

    def settings(self) -> dict[str, Any]:
        return {}

    def _problem(self, question: Question) -> str | None:
        if question.section not in _KINDS:
            return "portability has no second answer to compare with, which protocol 'likelihood' needs"
        answer = _answer(question)
        if answer is None:
            return "there is no answer, which protocol 'likelihood' needs"
        if question.contrast is None:
            return "the edit has no old answer (ground_truth), which protocol 'likelihood' needs"
        if answer.strip() == question.contrast.strip():
            return "both answers are the same text, so that neither can be preferred"
        return None


def _answer(question: Question) -> str | None:
    return next((alias for group in question.groups for alias in group), None)


def _scores(question: Question, outputs: Sequence[PairScore]) -> tuple[float, float]:
    """Success and magnitude; the first output belongs to the answer that should be preferred."""
    wanted, other = outputs[0].nll, outputs[1].nll
    kind = _KINDS[question.section]
    new, true = (other, wanted) if kind == "neighborhood" else (wanted, other)
    return counterfact_pair(new, true, kind)  # type: ignore[arg-type]

"""`Asked`: one case under one protocol, from its questions to its result.

The questions of a case are computed once. Every measurement of it fills in the answers, and `Asked.result` scores
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...errors import EvaluationError
from ...logging import get_logger, warn_once
from ...requests import EditRequest
from ...text.pictures import PicturedText
from ...text.processors import shown_text
from ..asking.generation import Continuation
from ..asking.scoring import Unscored
from ..protocols.base import AFTER_EDITS, BEFORE_EDITS, Output, Protocol, Query, Question
from ..report.case_result import CaseResult, Cost, Half, easyedit_request
from .plan import Case

logger = get_logger(__name__)
STANDARD = ("rewrite", "rephrase", "locality", "portability")
"""Sections whose scores stand under their own name; other protocols name theirs in `Protocol.details`."""
Answers = Mapping[Query, Output]
PromptTransform = Callable[[EditRequest, str], str]


@dataclass
class Exchange:
    """A question, and what came back.

    Args:
        question: one probe of the case.
        queries: what has to be asked for it; may be empty.
        posed: what is asked after the edit in their place: other prompts, where a method works through the prompt.
        before: outputs of the unedited model, one per query.
        after: outputs of the edited model.
        between: stage of the unit (`Protocol.stages`) → outputs.
    """

    question: Question
    queries: list[Query]
    posed: list[Query]
    before: list[Output] = field(default_factory=list)
    after: list[Output] = field(default_factory=list)
    between: dict[str, list[Output]] = field(default_factory=dict)

    def usable(self, protocol: Protocol) -> tuple[dict[str, list[Any]], str]:
        """The outputs of each state of the queries that could be run; if there are none that count, the reason."""
        states = {BEFORE_EDITS: self.before, **self.between, AFTER_EDITS: self.after}
        answers = list(zip(*states.values(), strict=True))
        bad = [output.reason for answer in answers for output in answer if isinstance(output, Unscored)]
        good = [answer for answer in answers if not any(isinstance(output, Unscored) for output in answer)]
        if bad and protocol.needs_all_outputs:
            good = []
        reason = "" if good else bad[0] if bad else protocol.why_unscored(self.question)
        return {name: [answer[i] for answer in good] for i, name in enumerate(states)}, reason


class Asked:
    """One case under one protocol: its questions with their queries, and the answers before and after the edit.

    Args:
        case: the edit.
        protocol: decides what is asked, and scores the answers.
        request: of the case, as it is asked about (`EditRequest.rendered`); ``None``: as it is.
    """

    def __init__(self, case: Case, protocol: Protocol, request: EditRequest | None = None):
        self.case, self.protocol = case, protocol
        self.exchanges: list[Exchange] = []
        for question in protocol.questions(request or case.request):
            queries = protocol.queries(question)
            self.exchanges.append(Exchange(question, queries, queries))
            if not question.groups and (question.section == "portability" or not queries):
                _tell_unanswered(question, protocol)

    def pose(self, transform: PromptTransform) -> None:
        """Change what is asked after the edit."""
        request = self.case.request
        for exchange in self.exchanges:
            exchange.posed = [q._replace(prompt=transform(request, q.prompt)) for q in exchange.queries]

    def answer(self, before: Answers, after: Answers) -> None:
        """Fill in the answers of one measurement."""
        for exchange in self.exchanges:
            exchange.before = [before[query] for query in exchange.queries]
            exchange.after = [after[query] for query in exchange.posed]

    def answer_between(self, stage: str, now: Answers) -> None:
        """Fill in the answers at a stage of the unit."""
        for exchange in self.exchanges:
            exchange.between[stage] = [now[query] for query in exchange.posed]

    def to_score(self) -> Iterable[tuple[Question, list[Output]]]:
        """All that is scored, for `Protocol.prepare_scores`."""
        for exchange in self.exchanges:
            yield exchange.question, exchange.before
            yield exchange.question, exchange.after

    def result(self, when: str, setting: str | None = None, cost: Cost | None = None) -> CaseResult:
        """Score the answers.

        Args:
            when: at which time they were given.
            setting: how edits followed one another.
            cost: of the edit.
        """
        request = self.case.request
        result = CaseResult(
            number=self.case.number,
            id=request.id,
            request=easyedit_request(request),
            protocol=self.protocol.name,
            pre=Half(),
            post=Half(),
            when=when,
            setting=setting,
            cost=cost or Cost(),
        )
        for exchange in self.exchanges:
            question = exchange.question
            reason = self._score(exchange, result)
            if reason:
                where = {"section": question.section, "axis": question.axis, "index": question.index}
                result.skipped.append({**where, "prompt": question.prompt, "reason": reason})
            else:
                result.n_probes[question.section] = result.n_probes.get(question.section, 0) + 1
            if exchange.queries:
                old, new = exchange.before[0], exchange.after[0]
                if isinstance(old, Continuation) and isinstance(new, Continuation):
                    about: dict[str, Any] = {
                        "section": question.section,
                        "axis": question.axis,
                        "prompt": shown_text(question.prompt),
                    }
                    if isinstance(question.prompt, PicturedText):
                        about["image"] = [picture.thumbnail() for picture in question.prompt.pictures]
                    result.texts.append({**about, "pre": old.text, "post": new.text})
        for half in result.halves.values():
            half.about = {section: self.protocol.meta(section) for section in half.sections}
        return result

    def _score(self, exchange: Exchange, result: CaseResult) -> str:
        """Note the scores of a question in the result; returns why there are none, empty if there are."""
        protocol, question = self.protocol, exchange.question
        states, reason = exchange.usable(protocol)
        if reason:
            return reason
        old, new = states[BEFORE_EDITS], states[AFTER_EDITS]
        before, after = protocol.accuracy(question, old), protocol.accuracy(question, new)
        if question.section == "locality":
            try:
                agreement = protocol.agreement(old, new)
            except EvaluationError as error:  # a changed prompt may change how the answer is tokenised
                return str(error)
            axis = str(question.axis)
            result.pre.outputs.setdefault(axis, []).append(protocol.payload(old))
            result.post.add_score("locality", axis, agreement)
            if before is not None and after is not None:
                result.pre.add_score("locality_accuracy", axis, before)
                result.post.add_score("locality_accuracy", axis, after)
        elif question.section in STANDARD:
            if before is None or after is None:
                return protocol.why_unscored(question)
            result.pre.add_score(question.section, question.axis, before)
            result.post.add_score(question.section, question.axis, after)
        else:
            return self._count(exchange, result, states, (before, after))
        for half, outputs, score in ((result.pre, old, before), (result.post, new, after)):
            if score is not None:
                for (section, key), value in protocol.details(question, outputs, score).items():
                    half.add_number(section, key, value)
        return ""

    def _count(
        self,
        exchange: Exchange,
        result: CaseResult,
        states: Mapping[str, Sequence[Any]],
        scores: tuple[float | None, float | None],
    ) -> str:
        """`_score` for a question of a section of the protocol's own: its numbers before, after, and of all states."""
        protocol, question = self.protocol, exchange.question
        old, new = states[BEFORE_EDITS], states[AFTER_EDITS]
        if not protocol.counts(question, old):
            return protocol.why_unscored(question)
        before, after = (
            protocol.details(question, outputs, score) for outputs, score in zip((old, new), scores, strict=True)
        )
        changes = {**protocol.changes(question, old, new), **protocol.course(question, states)}
        both = [place for place in before if place in after]
        for place in both:
            result.pre.add_number(*place, before[place])
            result.post.add_number(*place, after[place])
        for place, value in changes.items():
            result.post.add_number(*place, value)
        return "" if both or changes else protocol.why_unscored(question)


def _tell_unanswered(question: Question, protocol: Protocol) -> None:
    """Say once per axis that probes without an answer give no number."""
    other = "; protocol 'generation' compares what is said before and after" if question.section == "locality" else ""
    warn_once(
        logger,
        f"{question.section} {question.axis!r}: probes without an answer (ground_truth) are not measured under"
        f" protocol {protocol.name!r}{other}",
    )


def queries_of(group: Iterable[Asked], *, posed: bool = False) -> list[Query]:
    """All queries of several cases, each once, in order.

    Args:
        group: the cases.
        posed: those for the edited model.
    """
    exchanges = (exchange for asked in group for exchange in asked.exchanges)
    return list(dict.fromkeys(query for e in exchanges for query in (e.posed if posed else e.queries)))

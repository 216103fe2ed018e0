"""One case's results as a record: the dictionary layout that EasyEdit users know, plus what the library adds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ...errors import EvaluationError
from ...requests import EditRequest
from ..asking.scoring import Unscored
from ..protocols.base import Output, Protocol, Query, Question
from ..report.summaries import easyedit_request
from .plan import Case

STANDARD = ("rewrite", "rephrase", "locality", "portability")
Answers = Mapping[Query, Output]


def queries_of(protocol: Protocol, cases: Iterable[Case]) -> list[Query]:
    """All queries of some cases, each once, in order."""
    questions = (question for case in cases for question in protocol.questions(case.request))
    return list(dict.fromkeys(query for question in questions for query in protocol.queries(question)))


def make_record(
    case: Case,
    protocol: Protocol,
    before: Answers,
    after: Answers,
    asked: Mapping[Query, Query] | None = None,
) -> dict[str, Any]:
    """Score one case before and after.

    Args:
        case: the edit.
        protocol: scores the outputs.
        before: outputs of the unedited model.
        after: outputs of the edited one.
        asked: query → the query that took its place after the edit (a method that works through the prompt).
    """
    pre: dict[str, Any] = {}
    post: dict[str, Any] = {}
    skipped: list[dict[str, Any]] = []
    counts: dict[str, int] = {}

    def skip(question: Question, reason: str) -> None:
        where = {"section": question.section, "axis": question.axis, "index": question.index}
        skipped.append({**where, "prompt": question.prompt, "reason": reason})

    for question in protocol.questions(case.request):
        pairs, reason = _outputs(protocol, question, before, after, asked)
        if not pairs:
            skip(question, reason)
            continue
        old, new = [o for o, _ in pairs], [n for _, n in pairs]
        scores = protocol.accuracy(question, old), protocol.accuracy(question, new)
        both = scores[0] is not None and scores[1] is not None
        if question.section == "locality":
            try:
                agreement = protocol.agreement(old, new)
            except EvaluationError as error:  # a changed prompt may change how the answer is tokenised
                skip(question, str(error))
                continue
            put(pre, "locality", f"{question.axis}_output", protocol.payload(old))
            put(post, "locality", f"{question.axis}_acc", agreement)
            if both:
                put(pre, "locality_accuracy", f"{question.axis}_acc", scores[0])
                put(post, "locality_accuracy", f"{question.axis}_acc", scores[1])
        elif not both:
            skip(question, protocol.why_unscored(question))
            continue
        elif question.section in STANDARD:
            axis = None if question.axis is None else f"{question.axis}_acc"
            section = question.section if axis else f"{question.section}_acc"
            put(pre, section, axis, scores[0])
            put(post, section, axis, scores[1])
        for half, outputs, score in ((pre, old, scores[0]), (post, new, scores[1])):
            if score is not None:
                for (section, key), value in protocol.details(question, outputs, score).items():
                    put(half, section, key, value)
        counts[question.section] = counts.get(question.section, 0) + 1
    for result in (pre, post):
        sections = [key.removesuffix("_acc") for key in result]
        result["metric_meta"] = {section: protocol.meta(section) for section in sections}
    return {
        "case_id": case.number,
        "id": case.request.id,
        "requested_rewrite": easyedit_request(case.request),
        "protocol": protocol.name,
        "pre": pre,
        "post": post,
        "n_probes": counts,
        "skipped": skipped,
        "texts": _texts(protocol, case.request, before, after, asked),
    }


def _outputs(
    protocol: Protocol, question: Question, before: Answers, after: Answers, asked: Mapping[Query, Query] | None
) -> tuple[list[tuple[Any, Any]], str]:
    """The outputs before and after for a question's queries; if there are none that count, the reason."""
    queries = protocol.queries(question)
    both = [(before[q], after[asked[q] if asked else q]) for q in queries]
    bad = [o.reason for pair in both for o in pair if isinstance(o, Unscored)]
    good = [(old, new) for old, new in both if not isinstance(old, Unscored) and not isinstance(new, Unscored)]
    if bad and protocol.needs_all_outputs:
        good = []
    return good, "" if good else bad[0] if bad else protocol.why_unscored(question)


def _texts(
    protocol: Protocol, request: EditRequest, before: Answers, after: Answers, asked: Mapping[Query, Query] | None
) -> list[dict[str, Any]]:
    """What the model wrote before and after, where the protocol lets it write."""
    texts = []
    for question in protocol.questions(request):
        for query in protocol.queries(question)[:1]:
            old, new = before[query], after[asked[query] if asked else query]
            if isinstance(getattr(old, "text", None), str) and isinstance(getattr(new, "text", None), str):
                where = {"section": question.section, "axis": question.axis, "prompt": question.prompt}
                texts.append({**where, "pre": old.text, "post": new.text})  # type: ignore[union-attr]
    return texts


def put(result: dict[str, Any], section: str, axis: str | None, value: Any) -> None:
    """Append a value to the list of a section, or of an axis in it."""
    if axis is None:
        result.setdefault(section, []).append(value)
    else:
        result.setdefault(section, {}).setdefault(axis, []).append(value)

"""Concepts: does a new definition of a concept reach its instances, and what the model says of it?

ConceptEdit (Wang et al. 2024, arXiv 2403.06259): the definition of a concept is replaced by that of another one, of
the same kind (*intra*) or of another (*inter*). Besides reliability, generalization and locality of the definition:

    Instance Change        mean over instances of  yes(f₀, q) − yes(f, q),   q: does it belong to the concept?
    Concept Consistency    −1, 0 or 1: what f writes as the definition is nearer to the old one, neither, the new one
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from typing_extensions import TypedDict

from ...books.retrieval import LEXICAL, find_retriever
from ...data.extra import extra_of
from ...errors import EvaluationError, RequestError, check_choice, check_count, shown
from ...requests import EditRequest
from ..asking.batching import TOKEN_BUDGET
from ..asking.generation import Continuation, generate_answers
from ..asking.scoring import Unscored
from ..measures.catalogue import Metric, register_metrics
from ..measures.scenarios import closer_definition, membership_prompt, yes_or_no
from ..protocols.base import Numbers, Output, PairProtocol, Protocol, Query, Question, TeacherForced
from ..protocols.replies import similarity
from .base import Scenario, register_scenario

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Consistency = Callable[[str, str, str], float]
"""What the model wrote, the new definition, the old one → 1 nearer to the new one, −1 to the old one, 0 neither."""
MEMBER, DEFINITION = "member", "definition"
YES, NO = "Yes", "No"
_SHORT, _SHORT_TOKENS = "", 2
"""In the place of an answer that is fed: the model writes one of so many tokens."""
CONCEPT = register_metrics(
    "concept",
    {
        MEMBER: Metric("share of instances that the model counts among the concept", better=None, share=True),
        "instance_change": Metric("by how much that share fell: how far the new definition reaches instances"),
        "yes_odds": Metric(
            "log p(yes) − log p(no) on instances: moves where neither side wins", unit="nats", better=None, chart=False
        ),
        "unparsable": Metric("share of answers that are neither yes nor no", better="lower", share=True, chart=False),
        "consistency": Metric("1: writes the new definition, -1: the old one, 0: neither", unit="number"),
    },
)


class _Instances(TypedDict, total=False):
    instance_prompts: str | list[str] | None


@dataclass(frozen=True)
class Concepts(PairProtocol):
    """Asks whether instances belong to the concept, and lets the model write its definition.

    Args:
        judge: of definitions; ``None``: `closer_definition` with ``similarity``.
        mode: ``logprob``: which of "Yes" and "No" is more probable behind the question, which always gives an answer;
            ``text``: what two new tokens say.
        parse_failures: of ``text``: an answer that is neither is left out, or counts as yes, as published.
        similarity: name of a retriever (`find_retriever`) that compares definitions.
        margin: smaller differences of similarity are 0.
        max_new_tokens: of a definition, of which the first sentence counts.
    """

    name: ClassVar[str] = "concept"
    judge: Consistency | None = None
    mode: Literal["logprob", "text"] = "logprob"
    parse_failures: Literal["exclude", "yes"] = "exclude"
    similarity: str = LEXICAL
    margin: float = 0.05
    max_new_tokens: int = 40

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, ("logprob", "text"))
        check_choice("parse_failures", self.parse_failures, ("exclude", "yes"))
        check_count("max_new_tokens", self.max_new_tokens)
        if isinstance(self.margin, bool) or not isinstance(self.margin, (int, float)) or not 0 <= self.margin <= 2:
            raise EvaluationError(f"margin must be a difference of similarities, 0 to 2, not {shown(self.margin)}")
        if self.judge is not None and not callable(self.judge):
            raise EvaluationError(f"a judge of definitions must be a function, not {shown(self.judge)}")
        if self.judge is None:
            find_retriever(self.similarity)  # one that is missing is named now, not after the first edits

    @property
    def scorer(self) -> str:
        """How memberships are read, and who judges definitions."""
        name = f"similarity ({self.similarity})" if self.judge is None else getattr(self.judge, "__name__", "judge")
        return f"{self.mode}, {name}"

    def questions(self, request: EditRequest) -> list[Question]:
        given = extra_of(request, _Instances).get("instance_prompts") or []
        prompts = [given] if isinstance(given, str) else list(given)
        asked = [
            Question(CONCEPT, MEMBER, i, request.posed(membership_prompt(prompt)), ())
            for i, prompt in enumerate(prompts)
        ]
        old = next(iter(request.ground_truth), None)
        groups = ((request.target_new,),)
        return [*asked, Question(CONCEPT, DEFINITION, 0, request.filled_prompt, groups, contrast=old)]

    def queries(self, question: Question) -> list[Query]:
        if question.axis == MEMBER:
            return [question.asked(answer) for answer in ((YES, NO) if self.mode == "logprob" else (_SHORT,))]
        return [question.asked()]

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        queries: Sequence[Query],
        separator: str | None,
        token_budget: int = TOKEN_BUDGET,
    ) -> list[Output]:
        outputs: dict[Query, Output] = {}
        fed = [query for query in queries if query.answer]
        outputs |= zip(fed, super().run(model, tokenizer, fed, separator, token_budget), strict=True)
        for length, answer in ((self.max_new_tokens, None), (_SHORT_TOKENS, _SHORT)):
            some = [query for query in queries if query.answer == answer]
            texts = generate_answers(model, tokenizer, [query.prompt for query in some], length, token_budget)
            outputs |= zip(some, texts, strict=True)
        return [outputs[query] for query in queries]

    def accuracy(self, question: Question, outputs: Sequence[Any]) -> float | None:
        return None

    def details(self, question: Question, outputs: Sequence[Any], score: float | None) -> Numbers:
        if question.axis == MEMBER:
            said = self._member(outputs)
            numbers = {"unparsable": float(said is None)}
            if (counted := self._counted(said)) is not None:
                numbers[MEMBER] = float(counted)
            if self.mode == "logprob" and said is not None:
                numbers["yes_odds"] = outputs[1].sum_nll - outputs[0].sum_nll
        elif question.contrast is not None:
            numbers = {"consistency": self._consistency(question, outputs[0].text, question.contrast)}
        else:
            numbers = {}
        return {(question.section, key): value for key, value in numbers.items()}

    def changes(self, question: Question, before: Sequence[Any], after: Sequence[Any]) -> Numbers:
        if question.axis == MEMBER:
            old, new = (self._counted(self._member(outputs)) for outputs in (before, after))
            if old is None or new is None:
                return {}
            return {(question.section, "instance_change"): float(old) - float(new)}
        if question.contrast is not None:
            return {}
        # What the unedited model writes is the old definition where the data name none.
        text = self._consistency(question, after[0].text, before[0].text)
        return {(question.section, "consistency"): text}

    def _member(self, outputs: Sequence[Any]) -> bool | None:
        """Whether an instance belongs to the concept, says the model; ``None`` if it says neither."""
        if isinstance(outputs[0], Continuation):
            return yes_or_no(outputs[0].text)
        if any(isinstance(output, Unscored) for output in outputs):
            return None
        yes, no = (output.sum_nll for output in outputs)
        return None if yes == no else bool(yes < no)

    def _counted(self, said: bool | None) -> bool | None:
        return True if said is None and self.parse_failures == "yes" else said

    def _consistency(self, question: Question, text: str, old: str) -> float:
        new = question.groups[0][0]
        if self.judge is None:
            return float(closer_definition(text, new, old, self._alike, self.margin))
        value = self.judge(text, new, old)
        if value not in (-1, 0, 1):
            raise EvaluationError(f"the judge of definitions returned {shown(value)}; return -1, 0 or 1")
        return float(value)

    def _alike(self, text: str, definition: str) -> float:
        return similarity(self.similarity, text, definition)

    def agreement(self, before: Sequence[Any], after: Sequence[Any]) -> float:
        return float(self.payload(before) == self.payload(after))

    def payload(self, outputs: Sequence[Any]) -> Any:
        return [o.text if isinstance(o, Continuation) else getattr(o, "sum_nll", None) for o in outputs]

    def why_unscored(self, question: Question) -> str:
        return "an answer before or after the edit is neither yes nor no"

    def settings(self) -> dict[str, Any]:
        return {"mode": self.mode, "max_new_tokens": self.max_new_tokens}


@register_scenario
@dataclass(frozen=True)
class Concept(Scenario):
    """The scenario of concepts.

    Args:
        judge: see `Concepts`.
        mode: see `Concepts`.
        parse_failures: see `Concepts`.
        similarity: see `Concepts`.
        margin: see `Concepts`.
        max_new_tokens: see `Concepts`.
    """

    name: ClassVar[str] = "concept"
    question: ClassVar[str] = "A word means something else now, and my model still counts the old things among it."
    reads: ClassVar[dict[str, str]] = {
        "prompt": "the beginning of the definition",
        "subject": "the concept",
        "target_new": "the new definition",
        "ground_truth": "the old one; without it, what the unedited model writes",
        "extra.instance_prompts": "whether an instance belongs to the concept",
        "locality": "definitions of other concepts",
    }
    layouts: ClassVar[dict[str, str]] = {"target_new_desc": "conceptedit/llama2chat_intra"}
    standin: ClassVar[str] = "words in common with the two definitions"

    judge: Any = None
    mode: str = "logprob"
    parse_failures: str = "exclude"
    similarity: str = LEXICAL
    margin: float = 0.05
    max_new_tokens: int = 40

    def protocols(self) -> list[Protocol]:
        options: dict[str, Any] = {"mode": self.mode, "parse_failures": self.parse_failures}
        options |= {"similarity": self.similarity, "margin": self.margin, "max_new_tokens": self.max_new_tokens}
        return [Concepts(self.judge, **options), TeacherForced()]

    def requests(self, requests: Sequence[EditRequest]) -> list[EditRequest]:
        """The requests as they are; each needs its concept."""
        for request in requests:
            if request.subject is None:
                raise RequestError(
                    "the concept whose definition changes is missing",
                    row=request.row,
                    field="subject",
                    request_id=request.id,
                )
        return list(requests)

    def _layout(self, file: Path) -> str | None:
        """Whether a file is about concepts of one kind or of two is said by its name alone."""
        found = super()._layout(file)
        return found and (found.replace("intra", "inter") if "inter" in file.stem else found)

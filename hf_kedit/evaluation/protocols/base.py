"""Protocols: what a model is asked for, and how its answer becomes a number.

A protocol turns a probe into queries, runs queries in batches, and scores outputs: against the accepted answers, or
against what the unedited model put out. Numbers of different protocols are never averaged together. A new protocol
is a subclass with the decorator `register_protocol`; the runner and the report need no change.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeVar

from ...errors import EvaluationError, RequestError, check_choice, check_count, shown
from ..asking.batching import TOKEN_BUDGET
from ..asking.generation import Continuation, PromptFormat, generate_answers
from ..asking.ranked import Ranked
from ..asking.scoring import PairScore, Predicted, Unscored, encode_row, try_score_pairs
from ..measures import metrics

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ...requests import EditRequest

BEFORE_EDITS, AFTER_EDITS = "before", "after"
"""The states that every edit has; a unit may have more between them (`Protocol.stages`)."""
PREFIX_TOKENS = "prefix_tokens"
"""Scorer of `Generation` that compares tokens, not texts."""
Output = PairScore | Continuation | Predicted | Ranked | Unscored


Numbers = dict[tuple[str, str], float]
"""(Section of the record, key in it) → number; `measures.catalogue` says what they are."""


class Query(NamedTuple):
    """What a model is asked.

    Attributes:
        prompt: text.
        answer: where the protocol feeds one.
        separator: between them, where the case brings its own.
    """

    prompt: str
    answer: str | None = None
    separator: str | None = None


@dataclass(frozen=True)
class Question:
    """One probe of one case.

    Args:
        section: ``rewrite``, ``rephrase``, ``locality`` or ``portability``.
        axis: name of the axis within locality and portability.
        index: place within the axis.
        prompt: filled prompt.
        groups: accepted answers, each group the aliases of one value; may be empty.
        match: ``any`` or ``all`` (groups).
        contrast: what the model must not prefer to the answer: on prompts of the edit the old answer, on locality
            probes the new one; ``None`` if there is none.
        separator: between prompt and answers, where the case brings its own.
    """

    section: str
    axis: str | None
    index: int
    prompt: str
    groups: tuple[tuple[str, ...], ...]
    match: str = "any"
    contrast: str | None = None
    separator: str | None = None

    def asked(self, answer: str | None = None) -> Query:
        """The question with one answer."""
        return Query(self.prompt, answer, self.separator)


def standard_questions(request: EditRequest) -> list[Question]:
    """The rewrite prompt, the rephrasings, and the locality and portability probes of a request."""
    target = ((request.target_new,),)
    old = next(iter(request.ground_truth), None)
    questions = [Question("rewrite", None, 0, request.filled_prompt, target, contrast=old)]
    questions += [
        Question("rephrase", None, i, p, target, contrast=old) for i, p in enumerate(request.rephrase_prompts)
    ]
    for section, axes in (("locality", request.locality), ("portability", request.portability)):
        new = request.target_new if section == "locality" else None
        for axis, probes in axes.items():
            for i, probe in enumerate(probes):
                groups = tuple(tuple(group) for group in probe.ground_truth)
                questions.append(Question(section, axis, i, probe.prompt, groups, probe.match, new))
    return [replace(question, separator=request.separator_or(None)) for question in questions]


class Protocol(ABC):
    """Base class of the protocols. Instances are immutable values; their settings are plain fields."""

    name: ClassVar[str]
    scorer: Any
    needs_all_outputs: ClassVar[bool] = False
    """Whether a question counts only if every one of its queries could be run (else those that could suffice)."""

    def questions(self, request: EditRequest) -> list[Question]:
        """What is asked about a request."""
        return standard_questions(request)

    @abstractmethod
    def queries(self, question: Question) -> list[Query]:
        """What has to be run for a question; empty if it cannot be asked under this protocol."""

    def misfit(self, questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase | None) -> str:
        """What to warn of: questions that these settings cannot do justice to. By default there are none."""
        return ""

    @abstractmethod
    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        queries: Sequence[Query],
        separator: str | None,
        token_budget: int,
    ) -> list[Output]:
        """Run queries in few batches; one output per query, in order."""

    @abstractmethod
    def accuracy(self, question: Question, outputs: Sequence[Any]) -> float | None:
        """Score of the outputs of a question's queries against its answers; ``None`` if it has no answers."""

    @abstractmethod
    def agreement(self, before: Sequence[Any], after: Sequence[Any]) -> float:
        """How far the outputs for one question before and after an edit agree."""

    @abstractmethod
    def payload(self, outputs: Sequence[Any]) -> Any:
        """JSON-ready form of the outputs for one question (what locality is compared with)."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything that decides the outputs, JSON-ready; part of the key under which outputs are cached."""

    def details(self, question: Question, outputs: Sequence[Any], score: float | None) -> Numbers:
        """Further numbers for a question whose `accuracy` is ``score``.

        Questions of the standard sections are asked for them where they have a score; questions of a section of the
        protocol's own always, and only what exists before and after the edit counts.
        """
        return {}

    def counts(self, question: Question, before: Sequence[Any]) -> bool:
        """Whether a question of a section of the protocol's own counts, by what the unedited model put out; if not, it
        has no numbers in either state, for the reason that `why_unscored` gives."""
        return True

    def changes(self, question: Question, before: Sequence[Any], after: Sequence[Any]) -> Numbers:
        """Further numbers that the outputs before and after an edit give together; they stand behind the edit."""
        return {}

    def stages(self, requests: Sequence[EditRequest]) -> Mapping[str, tuple[int, ...]]:
        """States on the way through a unit that are asked about as well: name → places of the edits made by then.

        Where there are any, the edits of a unit are made one after another, and `course` is told what came out.

        Args:
            requests: of the unit, in the order in which they are made.
        """
        return {}

    def course(self, question: Question, states: Mapping[str, Sequence[Any]]) -> Numbers:
        """Further numbers that the outputs of all states of a unit give together; they stand behind the edit.

        Args:
            question: of a section of the protocol's own.
            states: outputs of the question's queries `BEFORE_EDITS`, at every stage, and `AFTER_EDITS`.
        """
        return {}

    def why_unscored(self, question: Question) -> str:
        """Why a question has no queries or no score."""
        return f"there is no answer, which protocol '{self.name}' needs"

    def prepare_scores(self, items: Sequence[tuple[Question, Sequence[Any]]]) -> None:
        """Called with everything that is about to be scored, for protocols that can score many at once better."""
        return

    @property
    def scorer_name(self) -> str:
        """Name of the scorer for the report."""
        return self.scorer if isinstance(self.scorer, str) else getattr(self.scorer, "__name__", repr(self.scorer))

    @property
    def agreement_name(self) -> str:
        """Name of the comparison before/after for the report."""
        return "agreement"

    def meta(self, section: str) -> dict[str, str]:
        """How the numbers of a section came about; numbers of different groups are not comparable."""
        scorer = self.agreement_name if section == "locality" else self.scorer_name
        return {
            "protocol": self.name,
            "scorer": scorer,
            "comparable_group": f"{self.name}/{scorer}",
        }


class PairProtocol(Protocol):
    """Base of the protocols whose queries are prompts with an answer that is fed."""

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        queries: Sequence[Query],
        separator: str | None,
        token_budget: int = TOKEN_BUDGET,
    ) -> list[Output]:
        scores: dict[Query, Output] = {}
        for own in dict.fromkeys(query.separator for query in queries):
            part = [query for query in queries if query.separator == own]
            pairs = [(query.prompt, query.answer or "") for query in part]
            joint = separator if own is None else own
            scores |= zip(part, self.fed(model, tokenizer, pairs, joint, token_budget), strict=True)
        return [scores[query] for query in queries]

    def fed(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pairs: Sequence[tuple[str, str]],
        separator: str | None,
        token_budget: int,
    ) -> Sequence[Output]:
        """What comes out where prompts are fed with their answers; by default, how well the answers are predicted."""
        return try_score_pairs(model, tokenizer, pairs, separator, token_budget)


P = TypeVar("P", bound=type[Protocol])
PROTOCOLS: dict[str, type[Protocol]] = {}


def register_protocol(cls: P) -> P:
    """Class decorator: make a protocol known under its name."""
    PROTOCOLS[cls.name] = cls
    return cls


@register_protocol
@dataclass(frozen=True)
class TeacherForced(PairProtocol):
    """The answer is fed and the most probable token at each of its positions is compared with it.

    The usual protocol of the literature. It gives away the beginning and the length of the answer, so that a model
    which cannot produce an answer may still score high.

    Args:
        scorer: ``token``: share of right tokens; ``exact``: 1 if all are.
        aliases: ``best``: the best accepted answer counts; ``first``: only the first is fed.
    """

    name: ClassVar[str] = "teacher_forced"
    scorer: Literal["token", "exact"] = "token"
    aliases: Literal["best", "first"] = "best"

    def __post_init__(self) -> None:
        if self.scorer not in ("token", "exact"):
            raise EvaluationError(
                f"TeacherForced has the scorers 'token' and 'exact', not {shown(self.scorer)};"
                " 'contains' and 'f1' need protocol='generation'"
            )
        if self.aliases not in ("best", "first"):
            raise EvaluationError(f"TeacherForced.aliases must be 'best' or 'first', not {shown(self.aliases)}")

    def queries(self, question: Question) -> list[Query]:
        answers = [alias for group in question.groups for alias in group]
        return [question.asked(a) for a in (answers[:1] if self.aliases == "first" else answers)]

    def accuracy(self, question: Question, outputs: Sequence[PairScore]) -> float | None:
        return metrics.best_alias(float(o.exact) if self.scorer == "exact" else o.token_acc for o in outputs)

    def agreement(self, before: Sequence[PairScore], after: Sequence[PairScore]) -> float:
        return metrics.agreement(before[0].pred_ids, after[0].pred_ids)

    def payload(self, outputs: Sequence[PairScore]) -> list[int]:
        return list(outputs[0].pred_ids)

    def settings(self) -> dict[str, Any]:
        return {}  # the outputs hold all scores; `scorer` and `aliases` only choose among them


@register_protocol
@dataclass(frozen=True)
class Generation(Protocol):
    """The model continues greedily and its text is compared with the answers; nothing is given away.

    Args:
        scorer: ``contains`` (the answer occurs as whole words; a model that goes on talking is not punished),
            ``exact``, ``f1``, or a function ``(prediction, answer) -> float``; ``prefix_tokens``: share of the
            answer's tokens that the continuation has at the same place (what follows does not count), as GRACE is
            scored in the literature.
        max_new_tokens: length limit of the continuation.
        prompt_format: ``raw``, ``qa`` or ``chat``.
        cut_at_newline: keep the first line only; ``None``: yes unless ``chat``.
        stop_strings: cut before these, too.
        agreement_tokens: locality compares so many first tokens, position by position, instead of the whole
            normalised text. The text behind the answer drifts more easily than the answer.
    """

    name: ClassVar[str] = "generation"
    scorer: str | Callable[[str, str], float] = "contains"
    max_new_tokens: int = 50
    prompt_format: PromptFormat = "raw"
    cut_at_newline: bool | None = None
    stop_strings: tuple[str, ...] = ()
    agreement_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.scorer != PREFIX_TOKENS:
            metrics.answer_scorer(self.scorer)
        elif self.prompt_format != "raw":
            raise EvaluationError(
                f"scorer {PREFIX_TOKENS!r} needs prompt_format='raw', not {shown(self.prompt_format)}"
            )
        if self.prompt_format not in ("raw", "qa", "chat"):
            raise EvaluationError(f"unknown prompt_format {shown(self.prompt_format)}: use 'raw', 'qa' or 'chat'")
        check_count("max_new_tokens", self.max_new_tokens)
        if self.cut_at_newline not in (None, True, False):
            raise EvaluationError(f"cut_at_newline must be true or false, not {shown(self.cut_at_newline)}")
        if self.agreement_tokens is not None:
            check_count("agreement_tokens", self.agreement_tokens)
        if isinstance(self.stop_strings, str) or not all(isinstance(text, str) for text in self.stop_strings):
            raise EvaluationError(f"stop_strings must be a list of texts, not {shown(self.stop_strings)}")

    def queries(self, question: Question) -> list[Query]:
        if self.scorer == PREFIX_TOKENS and question.groups:
            return [question.asked(answer) for group in question.groups for answer in group]
        return [question.asked()]

    def misfit(self, questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase | None) -> str:
        if tokenizer is None or self.scorer not in ("contains", "exact"):
            return ""
        answers = [[f" {answer}" for group in q.groups for answer in group] for q in questions if any(q.groups)]
        ids = [tokenizer(texts, add_special_tokens=False)["input_ids"] for texts in answers]
        if all(min(map(len, accepted)) <= self.max_new_tokens for accepted in ids):
            return ""
        return (  # the same words for all cases, so that it is said once
            f"protocol {self.name!r}: the answers of some questions have more than"
            f" max_new_tokens={self.max_new_tokens} tokens and will count as wrong whatever the model knows"
        )

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        queries: Sequence[Query],
        separator: str | None,
        token_budget: int = TOKEN_BUDGET,
    ) -> list[Output]:
        if tokenizer is None and (self.scorer == PREFIX_TOKENS or self.agreement_tokens is not None):
            raise EvaluationError("tokens of a model behind an API are not known: compare texts ('contains', 'exact')")
        answers = generate_answers(
            model,
            tokenizer,
            [query.prompt for query in queries],
            self.max_new_tokens,
            token_budget,
            prompt_format=self.prompt_format,
            cut_at_newline=self.cut_at_newline,
            stop_strings=self.stop_strings,
        )
        return [
            answer if query.answer is None else self._with_target(model, tokenizer, answer, query, separator)
            for answer, query in zip(answers, queries, strict=True)
        ]

    def _with_target(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        answer: Continuation,
        query: Query,
        separator: str | None,
    ) -> Continuation | Unscored:
        """The continuation with the tokens that the answer has behind its prompt (not those that it has alone)."""
        target, own = str(query.answer), query.separator
        try:
            ids = encode_row(model, tokenizer, answer.prompt, target, separator if own is None else own).target
        except RequestError as error:
            return Unscored(answer.prompt, target, str(error))
        if len(ids) > self.max_new_tokens:
            reason = f"the answer has {len(ids)} tokens and max_new_tokens is {self.max_new_tokens}"
            return Unscored(answer.prompt, target, reason)
        return replace(answer, target=target, target_ids=ids)

    def accuracy(self, question: Question, outputs: Sequence[Continuation]) -> float | None:
        if not question.groups:
            return None
        if self.scorer == PREFIX_TOKENS:
            scores = {o.target: metrics.prefix_share(o.ids, o.target_ids) for o in outputs}
            best = [max((scores[a] for a in group if a in scores), default=0.0) for group in question.groups]
            return min(best) if question.match == "all" else max(best)
        return metrics.answer_score(outputs[0].text, question.groups, question.match, self.scorer)

    def agreement(self, before: Sequence[Continuation], after: Sequence[Continuation]) -> float:
        if self.agreement_tokens is None:
            return metrics.text_agreement(before[0].text, after[0].text)
        return metrics.prefix_agreement(before[0].ids, after[0].ids, self.agreement_tokens)

    @property
    def agreement_name(self) -> str:
        """Says how many tokens are compared, if not the whole text."""
        return "agreement" if self.agreement_tokens is None else f"agreement of {self.agreement_tokens} tokens"

    def payload(self, outputs: Sequence[Continuation]) -> str:
        return outputs[0].text

    def settings(self) -> dict[str, Any]:
        return {
            "max_new_tokens": self.max_new_tokens,
            "prompt_format": self.prompt_format,
            "cut_at_newline": self.cut_at_newline,
            "stop_strings": list(self.stop_strings),
        }


def resolve_protocols(protocol: str | Protocol | Sequence[str | Protocol]) -> list[Protocol]:
    """Turn names and protocol objects into a list of protocols with distinct names.

    Raises:
        EvaluationError: for an unknown name (the nearest is given), none at all, or one that is named twice.
    """
    entries = [protocol] if isinstance(protocol, (str, Protocol)) else list(protocol)
    chosen: list[Protocol] = []
    for entry in entries:
        if isinstance(entry, Protocol):
            chosen.append(entry)
        else:
            check_choice("protocol", entry, PROTOCOLS)
            chosen.append(PROTOCOLS[entry]())
    names = [p.name for p in chosen]
    if not names:
        raise EvaluationError(f"no protocol was given; choose from {', '.join(sorted(PROTOCOLS))}")
    if len(set(names)) < len(names):
        raise EvaluationError(f"a protocol was given twice: {', '.join(names)}; evaluate its variants in two calls")
    return chosen

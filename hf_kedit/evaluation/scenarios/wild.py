"""In the wild: does the edited model answer its users as its edit says, when nobody helps it?

WILD (Yang et al. 2025, "The Mirage of Model Editing", arXiv 2502.11177) asks an edited model as users do: the
question, in the model's chat where it has one; it writes until it ends by itself; and the whole text is judged. The
usual protocol gives away the beginning and the length of the answer, and its numbers (96.8 % on average in that paper,
where this one gives 38.5 %) stand beside it here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from ...errors import EvaluationError, check_choice
from ...loading import load_base, load_tokenizer
from ...text.subjects import last_user_turn
from ..asking.batching import TOKEN_BUDGET
from ..asking.generation import Continuation, PromptFormat, format_prompt
from ..measures import metrics
from ..measures.catalogue import Metric, register_metrics
from ..measures.judges import ExactMatchJudge, HFModelJudge, OpenAICompatibleJudge
from ..protocols.base import Numbers, Output, Protocol, Query, Question, TeacherForced
from ..protocols.judged import Judged
from .base import Scenario, register_scenario

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Context = Literal["auto", "question", "qa", "chat"]
_SCORED = {"rewrite": "", "rephrase": "_rephrase"}
WILD = register_metrics(
    "wild",
    {
        "exact": Metric("share of answers that are the target and nothing else", share=True),
        "exact_rephrase": Metric("the same to the question in other words", share=True),
        "contains": Metric("share of answers in which the target occurs", share=True),
        "contains_rephrase": Metric("the same to the question in other words", share=True),
        "ended": Metric("share of answers that the model ended by itself", better=None, share=True, chart=False),
    },
)


@dataclass(frozen=True)
class WildAnswers(Judged):
    """Answers as users get them, up to where the model ends by itself, judged as whole texts.

    Args:
        scorer: the judge.
        context: around a question: nothing (``question``), the instruction to answer it (``qa``), or that as what a
            user says in the model's chat (``chat``); ``auto``: ``chat`` where the tokenizer has a template, else
            ``question``. Questions that stand in a chat already are asked as they are.
    """

    name: ClassVar[str] = "wild"
    scorer: Any = None
    cut_at_newline: bool | None = False
    context: Context = "auto"

    def __post_init__(self) -> None:
        check_choice("context", self.context, get_args(Context))
        super().__post_init__()

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        queries: Sequence[Query],
        separator: str | None,
        token_budget: int = TOKEN_BUDGET,
    ) -> list[Output]:
        context = self.context
        if context == "auto":
            context = "chat" if getattr(tokenizer, "chat_template", None) else "question"
        asked: dict[Query, tuple[str, PromptFormat]] = {}
        for query in queries:
            alone = context == "question" or last_user_turn(query.prompt) is not None
            text = query.prompt if alone else format_prompt(query.prompt, "qa")
            asked[query] = text, "chat" if context == "chat" and not alone else "raw"
        given: dict[Query, Output] = {}
        for form in dict.fromkeys(form for _, form in asked.values()):
            part = [query for query in asked if asked[query][1] == form]
            posed = [query._replace(prompt=asked[query][0]) for query in part]
            answers = replace(self, prompt_format=form)._continue(model, tokenizer, posed, separator, token_budget)
            given |= {query: replace(answer, prompt=query.prompt) for query, answer in zip(part, answers, strict=True)}
        return [given[query] for query in queries]

    def _continue(self, *arguments: Any) -> list[Output]:
        return super().run(*arguments)

    def details(self, question: Question, outputs: Sequence[Continuation], score: float | None) -> Numbers:
        if question.section not in _SCORED:
            return {}
        ending, text = _SCORED[question.section], outputs[0].text
        said = {
            scorer: metrics.answer_score(text, question.groups, question.match, scorer)
            for scorer in ("exact", "contains")
        }
        numbers = {(WILD, scorer + ending): value for scorer, value in said.items()}
        return {**numbers, (WILD, "ended"): float(outputs[0].finished)}

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "context": self.context}


@register_scenario
@dataclass(frozen=True)
class Wild(Scenario):
    """The scenario of edits that are to hold in use.

    Args:
        judge: a `Judge` or a function; the address of an OpenAI-compatible server (with ``judge_model``); the name of
            a model that transformers loads; ``None``: equality after normalisation, the published alternative.
        judge_model: name of the judging model on the server.
        judge_key_env: environment variable with its key; ``None``: a server without keys.
        context: see `WildAnswers`.
        max_new_tokens: of an answer. Published results have 50.
        teacher_forced: measure the usual numbers, too; a model behind an API has none without log-probabilities.
    """

    name: ClassVar[str] = "wild"
    question: ClassVar[str] = "The paper said 98 %, my users say that it does not work."
    reads: ClassVar[dict[str, str]] = {
        "prompt": "the question",
        "target_new": "the right answer",
        "rephrase_prompts": "the question in other words",
        "locality": "other questions, whose answers should stay",
    }
    layouts: ClassVar[Mapping[str, str]] = {"source": "qaedit"}
    standin: ClassVar[str] = "equality with the target after normalisation"

    judge: Any = None
    judge_model: str | None = None
    judge_key_env: str | None = None
    context: Context = "auto"
    max_new_tokens: int = 50
    teacher_forced: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "judge", self._judge())  # once, and known by its name in reports

    def _judge(self) -> Any:
        judge = self.judge
        if judge is None:
            return ExactMatchJudge()
        if not isinstance(judge, str):
            return judge
        if judge.startswith(("http://", "https://")):
            if self.judge_model is None:
                raise EvaluationError("name the judging model on the server with judge_model=")
            return OpenAICompatibleJudge(judge, self.judge_model, self.judge_key_env)
        return HFModelJudge(load_base(judge), load_tokenizer(judge), judge)

    def protocols(self) -> list[Protocol]:
        answers = WildAnswers(self.judge, max_new_tokens=self.max_new_tokens, context=self.context)
        return [answers, *([TeacherForced()] if self.teacher_forced else [])]

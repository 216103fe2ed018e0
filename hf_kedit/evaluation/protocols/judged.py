"""The judge protocol: the model continues greedily, and a judge decides whether the text is a right answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ...errors import EvaluationError
from ..asking.generation import Continuation
from ..measures.judges import CallableJudge, Judge
from .base import Generation, Question, register_protocol


@register_protocol
@dataclass(frozen=True)
class Judged(Generation):
    """As `Generation`, with a `Judge` as the scorer. An empty answer is wrong without being judged.

    Args:
        scorer: a `Judge`, or a function ``(question, references, prediction) -> bool | float | None``.
        max_new_tokens: length limit of the continuation.
        prompt_format: ``raw``, ``qa`` or ``chat``.
        cut_at_newline: keep the first line only; ``None``: yes unless ``chat``.
        stop_strings: cut before these, too.
        agreement_tokens: as in `Generation`.
    """

    name: ClassVar[str] = "judge"
    scorer: Any = None

    def __post_init__(self) -> None:
        if self.scorer is None:
            raise EvaluationError(
                "protocol 'judge' needs a judge: Judged(judge), with a function, an ExactMatchJudge() or an"
                " OpenAICompatibleJudge(base_url, model)"
            )
        if not isinstance(self.scorer, Judge):
            if not isinstance(self.scorer, Callable):  # type: ignore[arg-type]
                raise EvaluationError(f"a judge must be a Judge or a function, not {type(self.scorer).__name__}")
            object.__setattr__(self, "scorer", CallableJudge(self.scorer))
        super().__post_init__()

    @property
    def judge(self) -> Judge:
        """The judge."""
        return self.scorer

    @property
    def scorer_name(self) -> str:
        """The judge's name; numbers of different judges are not comparable."""
        settings = dict(self.judge.settings())
        name = settings.pop("judge", self.judge.name)
        version = settings.get("prompt_version")
        return f"{name}, prompt {version}" if version else str(name)

    def accuracy(self, question: Question, outputs: Sequence[Continuation]) -> float | None:
        verdicts = [self.judge(*item) for item in self._items(question, outputs)]
        if not question.groups:
            return None
        if not outputs[0].text.strip():
            return 0.0
        known = [v for v in verdicts if v is not None]
        return min(known) if known and len(known) == len(verdicts) else None

    def prepare_scores(self, items: Sequence[tuple[Question, Sequence[Continuation]]]) -> None:
        self.judge.judge_all([item for question, outputs in items for item in self._items(question, outputs)])

    def why_unscored(self, question: Question) -> str:
        if not question.groups:
            return super().why_unscored(question)
        return "the judge's reply could not be read"

    @staticmethod
    def _items(question: Question, outputs: Sequence[Continuation]) -> list[tuple[str, list[str], str]]:
        """What the judge is asked: once for all answers, or once for each group that must be hit."""
        text = outputs[0].text
        if not question.groups or not text.strip():
            return []
        if question.match == "all":
            return [(question.prompt, list(group), text) for group in question.groups]
        return [(question.prompt, [alias for group in question.groups for alias in group], text)]

"""Base of the protocols of scenarios in which the model writes freely and its replies are measured one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...books.retrieval import Passage, find_retriever
from ...errors import check_count
from ..asking.batching import TOKEN_BUDGET
from ..asking.generation import Continuation, generate_answers
from ..measures import metrics
from .base import Output, Protocol, Query, Question

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def similarity(retriever: str, text: str, reference: str) -> float:
    """How alike two texts are to a retriever (`find_retriever`), 1 for equal ones.

    Args:
        retriever: its name.
        text: what a model wrote.
        reference: what it is compared with.
    """
    found = find_retriever(retriever)
    return float(found.similarity([text], [Passage(reference)], found.embed([reference]))[0, 0])


@dataclass(frozen=True)
class Replies(Protocol):
    """Greedy replies, cut by the number of tokens; a prompt that is too long for the context loses its beginning.

    What is measured of a reply stands in `details`, under sections of the protocol's own.

    Args:
        max_new_tokens: length limit of a reply.
        cut_at_newline: keep the first line only.
    """

    max_new_tokens: int = 100
    cut_at_newline: bool = False

    def __post_init__(self) -> None:
        check_count("max_new_tokens", self.max_new_tokens)

    def queries(self, question: Question) -> list[Query]:
        return [question.asked()]

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        queries: Sequence[Query],
        separator: str | None,
        token_budget: int = TOKEN_BUDGET,
    ) -> list[Output]:
        prompts = [query.prompt for query in queries]
        return list(
            generate_answers(
                model, tokenizer, prompts, self.max_new_tokens, token_budget, cut_at_newline=self.cut_at_newline
            )
        )

    def accuracy(self, question: Question, outputs: Sequence[Continuation]) -> float | None:
        return None

    def agreement(self, before: Sequence[Continuation], after: Sequence[Continuation]) -> float:
        return metrics.text_agreement(before[0].text, after[0].text)

    def payload(self, outputs: Sequence[Continuation]) -> str:
        return outputs[0].text

    def why_unscored(self, question: Question) -> str:
        return "nothing can be measured of the reply"

    def settings(self) -> dict[str, Any]:
        return {"max_new_tokens": self.max_new_tokens, "cut_at_newline": self.cut_at_newline}

"""Protocols of edited opinions: which of two kinds of texts a model would write, and how far another topic moved.

Edit success and drawdown of SERAC (Mitchell et al. 2022, arXiv 2206.06520), which ConvSent and PersonalityEdit are
scored by. Only the tokens of the texts count, not those of the question, each predicted from what stands before it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ...engine.forward import frozen_eval
from ...errors import EvaluationError, RequestError
from ...tokens import vocabulary_size
from ..asking.batching import TOKEN_BUDGET, make_batches, stock_model
from ..asking.scoring import LOGIT_BUDGET, PairScore, Predicted, Unscored, encode_row, target_logits
from ..measures import likelihoods, metrics
from ..measures.catalogue import Metric
from ..measures.scenarios import mean_log_probability, opinion_success
from .base import Numbers, Output, PairProtocol, Protocol, Query, Question

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ...requests import EditRequest

OPINION_METRICS = {
    "ES": Metric("σ(a − b)·min(1, e^(a−c)): the wanted texts are likelier than the others, and no less than before"),
    "preference": Metric("σ(a − b): how much likelier per token the wanted texts are than the others"),
    "wanted": Metric("negative log-likelihood of the wanted texts per token", unit="nats", better="lower"),
    "others": Metric("the same of the other texts", unit="nats", better="higher"),
}
"""What `Opinions` measures; enter them under the section that it is given."""
DRAWDOWN = {"DD": Metric("divergence on texts about another topic, per token", unit="nats", better="lower")}
"""What `Drawdown` measures."""


@dataclass(frozen=True)
class Opinions(PairProtocol):
    """Edit success (ES) on texts about the topic of an edit.

    Args:
        section: of a record, in which `OPINION_METRICS` were entered.
    """

    name: ClassVar[str] = "opinions"
    section: str = "opinions"
    scorer: str = "edit success"

    @abstractmethod
    def texts(self, request: EditRequest) -> tuple[Sequence[str], Sequence[str]]:
        """The texts that are wanted, and those that are not."""

    def questions(self, request: EditRequest) -> list[Question]:
        wanted, others = (tuple(dict.fromkeys(texts)) for texts in self.texts(request))
        own = request.separator_or(None)
        return [Question(self.section, "topic", 0, request.filled_prompt, (wanted, others), separator=own)]

    def queries(self, question: Question) -> list[Query]:
        if not all(question.groups):
            return []
        return [question.asked(text) for group in question.groups for text in group]

    def accuracy(self, question: Question, outputs: Sequence[PairScore]) -> float | None:
        return None

    def _sides(self, question: Question, outputs: Sequence[PairScore]) -> tuple[list[PairScore], list[PairScore]]:
        wanted, others = ([o for o in outputs if o.target in group] for group in question.groups)
        return wanted, others

    def details(self, question: Question, outputs: Sequence[PairScore], score: float | None) -> Numbers:
        sides = self._sides(question, outputs)
        if not all(sides):
            return {}
        a, b = map(mean_log_probability, sides)
        numbers = {"preference": likelihoods.edit_success(a, b, a), "wanted": -a, "others": -b}
        return {(self.section, key): value for key, value in numbers.items()}

    def changes(self, question: Question, before: Sequence[PairScore], after: Sequence[PairScore]) -> Numbers:
        (wanted, others), (wanted_before, _) = self._sides(question, after), self._sides(question, before)
        if not (wanted and others and wanted_before):
            return {}
        return {(self.section, "ES"): opinion_success(wanted, others, wanted_before)}

    def agreement(self, before: Sequence[PairScore], after: Sequence[PairScore]) -> float:
        return metrics.agreement(before[0].pred_ids, after[0].pred_ids)

    def payload(self, outputs: Sequence[PairScore]) -> list[float]:
        return [output.nll for output in outputs]

    def why_unscored(self, question: Question) -> str:
        return "there are no texts of both kinds to compare"

    def settings(self) -> dict[str, Any]:
        return {}


OTHER_TOPIC = "other_topic"
"""In the metadata of a request: ``{"prompt": …, "texts": […]}`` of a topic that an edit must not move."""


def with_other_topics(requests: Sequence[EditRequest], texts: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """For each request the topic of the next one, of the last the first; empty for a request that is alone."""
    if len(requests) < 2:
        return [{} for _ in requests]
    after = [*range(1, len(requests)), 0]
    return [{OTHER_TOPIC: {"prompt": requests[i].plain_prompt, "texts": list(texts[i])}} for i in after]


@dataclass(frozen=True)
class Drawdown(Protocol):
    """Drawdown (DD): ``KL(before ‖ after)`` of the next-token distributions on texts about another topic.

    What the unedited model predicts is kept in fp16, a row of the vocabulary for each token; hence few texts.

    Args:
        section: of a record, in which `DRAWDOWN` was entered.
        count: texts of a request, at most.
    """

    name: ClassVar[str] = "drawdown"
    section: str = "opinions"
    count: int = 4
    scorer: str = "divergence"

    def questions(self, request: EditRequest) -> list[Question]:
        other = request.metadata.get(OTHER_TOPIC) or {}
        texts = list(other.get("texts", ()))[: self.count]
        prompt = request.posed(str(other.get("prompt", "")))
        own = request.separator_or(None)
        return [Question(self.section, "other topic", i, prompt, ((t,),), separator=own) for i, t in enumerate(texts)]

    def queries(self, question: Question) -> list[Query]:
        return [question.asked(question.groups[0][0])]

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        queries: Sequence[Query],
        separator: str | None,
        token_budget: int = TOKEN_BUDGET,
    ) -> list[Output]:
        model = stock_model(model)
        outputs: dict[Query, Output] = {}
        rows = {}
        for query in dict.fromkeys(queries):
            joint = separator if query.separator is None else query.separator
            try:
                rows[query] = encode_row(model, tokenizer, query.prompt, str(query.answer), joint)
            except RequestError as error:
                outputs[query] = Unscored(query.prompt, query.answer, str(error))
        budget = min(token_budget, LOGIT_BUDGET // vocabulary_size(model))
        with frozen_eval(model), torch.inference_mode():
            for group in make_batches(rows, lambda query: rows[query].width, budget):
                log_probs = target_logits(model, tokenizer, [rows[query] for query in group]).log_softmax(-1)
                parts = log_probs.half().cpu().split([len(rows[query].target) for query in group])
                outputs |= {
                    query: Predicted(query.prompt, str(query.answer), rows[query].target, part.clone())
                    for query, part in zip(group, parts, strict=True)
                }
        return [outputs[query] for query in queries]

    def accuracy(self, question: Question, outputs: Sequence[Predicted]) -> float | None:
        return None

    def changes(self, question: Question, before: Sequence[Predicted], after: Sequence[Predicted]) -> Numbers:
        old, new = before[0], after[0]
        if old.target_ids != new.target_ids:
            return {}
        return {(self.section, "DD"): float(likelihoods.divergence(old.log_probs.float(), new.log_probs.float()))}

    def agreement(self, before: Sequence[Predicted], after: Sequence[Predicted]) -> float:
        raise EvaluationError("the drawdown has no probes of locality")

    def payload(self, outputs: Sequence[Predicted]) -> None:
        return None

    def why_unscored(self, question: Question) -> str:
        return "the text has other tokens after the edit"

    def settings(self) -> dict[str, Any]:
        return {}

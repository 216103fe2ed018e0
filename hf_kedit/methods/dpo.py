"""DPO: Direct Preference Optimization (Rafailov et al. 2023, arXiv 2305.18290) as an edit.

A low-rank change of some matrices is trained as LoRA's, on pairs: the new answer ``y⁺`` is preferred to the one that
is to go, ``y⁻``. What counts is how much more than before the model prefers it; ``p₀`` is of the model without it:

    L = c · (−(1/|y⁺|) log p(y⁺|x)) + (1 − c) · (−log σ(m))
    m = β [log p(y⁺|x)/p₀(y⁺|x) − log p(y⁻|x)/p₀(y⁻|x)]                      (eq. 7 of the paper)

The first term is LoRA's: preference alone is content with a new answer that becomes less likely, if only the old one
falls faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat

from ..config import ModelProfile
from ..config.spaces import times
from ..engine.examples import ExampleBatch, mean_of_open, present_answer, target_probabilities
from ..errors import EditFailedError, RequestError
from ..requests import EditRequest
from .base import Capabilities, Outcome, register_method
from .lora import ChunkLoss, LoRA, LoRAConfig

REJECTED = "target_neg"


@dataclass
class DPOConfig(LoRAConfig):
    """Hyperparameters of DPO: those of LoRA, and how the two answers are weighed.

    Which answer is to go: a request's ``target_neg``, else its first ``ground_truth``, else what the model says now.

    Args:
        beta: β, how much a nat of preference counts; the larger, the sooner the term is content.
        likelihood_weight: c, part of the loss that is the new answer's own (``alpha`` in the published files).
        per_token: compare mean log-probabilities per token instead of sums, so that answers of unlike lengths weigh
            alike.
    """

    edit_type: ClassVar[str] = "dpo"

    unlikelihood: NonNegativeFloat | None = 0.0  # the preference takes from the answer that is to go already
    beta: PositiveFloat = 0.1
    likelihood_weight: Annotated[float, Field(ge=0, lt=1)] = 0.5
    per_token: bool = False

    def search_space(self, profile: ModelProfile, traced: Sequence[int]) -> dict[str, list[Any]]:
        """Those of LoRA, and how much the preference counts."""
        return super().search_space(profile, traced) | {"beta": times(self.beta, 5.0), "likelihood_weight": [0.9, 0.2]}


@register_method
class DPO(LoRA):
    """DPO."""

    config_class = DPOConfig
    capabilities = Capabilities(
        name="DPO",
        kind="weights",
        batch=True,
        sequential=True,
        needs_subject=False,
        undo="call",
        encoder_decoder=True,
        paper="Rafailov et al. 2023, Direct Preference Optimization, arXiv 2305.18290",
        summary="LoRA on pairs of answers: the wanted one is preferred to the one that is to go",
    )
    config: DPOConfig

    def check(self, requests: Sequence[EditRequest]) -> None:
        """Check as LoRA does, and the answers that are to go as far as the requests name them."""
        super().check(requests)
        for request in requests:
            if str(request.metadata.get(REJECTED)).strip() == request.target_new:
                raise RequestError("is the new answer itself", row=request.row, field=REJECTED, request_id=request.id)
        self.examples([rejected for r in requests if (rejected := self._rejected(r)) is not None])

    def compute(self, requests: Sequence[EditRequest]) -> Outcome:
        """Train on a batch of pairs and return its factors."""
        pairs = [self._rejected(r) or self._said_now(r) for r in requests]
        bench, size = self.bench, self.config.rows_per_step or 1
        examples = self.examples(pairs)
        before = target_probabilities(bench.model, examples, bench.fill, size)
        named = [
            replace(r, metadata={**r.metadata, REJECTED: pair.target_new})
            for r, pair in zip(requests, pairs, strict=True)
        ]
        outcome = super().compute(named)
        with bench.ledger.provisional() as written:
            for delta in outcome.deltas:
                written.add(delta)
            after = target_probabilities(bench.model, examples, bench.fill, size)
        for i, numbers in enumerate(outcome.diagnostics):
            numbers |= {"rejected_probability_before": before[i], "rejected_probability_after": after[i]}
        return outcome

    def objective(
        self, requests: Sequence[EditRequest], chunks: Sequence[Sequence[int]], batches: Sequence[ExampleBatch]
    ) -> ChunkLoss:
        """The loss above; ``p₀`` is read here, as there is no adapter yet."""
        bench, config = self.bench, self.config
        likelihood = super().objective(requests, chunks, batches)
        examples = self.examples([r for request in requests if (r := self._rejected(request)) is not None])
        rejected = [ExampleBatch.of(bench.model, [examples[i] for i in chunk], bench.fill) for chunk in chunks]

        def log_p(batch: ExampleBatch, nll: torch.Tensor) -> torch.Tensor:
            """Log-probability of every answer, ``[requests]``: a sum over its tokens, or their mean."""
            lengths = torch.bincount(batch.positions.rows, minlength=batch.count).to(nll.device)
            return -batch.means(nll) * (1 if config.per_token else lengths)

        with torch.no_grad():
            reference = [
                log_p(good, good.token_losses(bench.model)) - log_p(bad, bad.token_losses(bench.model))
                for good, bad in zip(batches, rejected, strict=True)
            ]

        def loss(number: int, nll: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
            good, bad = batches[number], rejected[number]
            apart = log_p(good, nll) - log_p(bad, bad.token_losses(bench.model))
            preference = torch.nn.functional.softplus(-config.beta * (apart - reference[number]))
            c = config.likelihood_weight
            return c * likelihood(number, nll, held) + (1 - c) * mean_of_open(preference, held)

        return loss

    # ------------------------------------------------------------------ the answer that is to go

    def _rejected(self, request: EditRequest) -> EditRequest | None:
        """The request with the answer that is to go in place of the new one; ``None``: it names none."""
        named = request.metadata.get(REJECTED)
        old = [answer for answer in request.ground_truth if answer != request.target_new]
        answer = named or (old[0] if old else None)
        return None if answer is None else replace(request, target_new=str(answer))

    def _said_now(self, request: EditRequest) -> EditRequest:
        said = present_answer(self.bench.model, self.bench.tokenizer, request)
        if not said:
            raise EditFailedError(
                f"DPO: the model says nothing behind {request.filled_prompt!r}, so that there is no answer to train"
                f" away from; name one as {REJECTED}"
            )
        return replace(request, target_new=said)

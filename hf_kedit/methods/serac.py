"""SERAC at inference (Mitchell et al. 2022, "Memory-Based Model Editing at Scale", arXiv 2206.06520).

Edits are kept as texts. A scope classifier compares each prompt with them; a prompt in the scope of an edit is
answered by a counterfactual model, which reads the edit in front of the prompt, every other prompt by the base model:

    s = max_j similarity(edit_j, x);   s > 0.5: counterfactual("{edit_j} {x}"),   else: base(x)

Both parts are chosen by name: any retriever as the scope classifier (words in common, sentence embeddings, a trained
encoder with ``exp(−‖e_j − e_x‖²)``), any causal language model with the same tokens as the counterfactual one. Unless
others are given, these are the words in common and the base model itself; the edit's diagnostics say which it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..engine.counterfactuals import BASE, find_counterfactual
from ..engine.promptbook import PromptEntry
from ..engine.retrieval import LEXICAL, find_retriever
from ..errors import ConfigError
from ..requests import EditRequest
from .base import Capabilities, Outcome, register_method
from .ike import InContext, InContextConfig


@dataclass
class SERACConfig(InContextConfig):
    """Hyperparameters of SERAC; ``template`` is what the counterfactual model reads in front of a prompt.

    Args:
        scope: the scope classifier: ``"lexical"``, ``"model"`` or ``"model:<layer>"`` (the edited model's own states),
            the id of a sentence-transformers model, or a name given to `register_retriever`.
        counterfactual: the model that answers in scope: ``"base"`` for the edited model itself, the id or folder of a
            causal language model, or a name given to `register_counterfactual`.
        soft: mix both models' answers by the similarity, ``log((1 − s) p_base + s p_cf)``, instead of taking one.
            Every prompt is then changed a little, and nothing can be generated.
    """

    edit_type: ClassVar[str] = "serac"

    scope: str = LEXICAL
    counterfactual: str = BASE
    soft: bool = False
    template: str = "{} "

    def validate(self) -> None:
        """Check the threshold."""
        super().validate()
        if not 0 < self.threshold <= 1:
            raise ConfigError(f"SERACConfig.threshold must be above 0 and at most 1, not {self.threshold}")


@register_method
class SERAC(InContext):
    """SERAC."""

    config_class = SERACConfig
    capabilities = Capabilities(
        name="SERAC",
        kind="prompt",
        batch=True,
        sequential=True,
        needs_subject=False,
        low_rank=False,
        paper="Mitchell et al. 2022, arXiv 2206.06520",
        summary="a scope classifier sends prompts about an edit to a counterfactual model that reads the edit first",
    )
    config: SERACConfig

    def check(self, requests: Sequence[EditRequest]) -> None:
        """Check both models."""
        find_retriever(self.config.scope, self.bench.reader)
        if self.config.counterfactual != BASE:
            find_counterfactual(self.config.counterfactual, self.bench.model)

    def compute(self, requests: Sequence[EditRequest]) -> Outcome:
        """One record per request."""
        config = self.config
        entries = [
            PromptEntry(
                scope=request.filled_prompt,
                subject=request.subject,
                fact=self.text(request),
                demonstrations=(),
                nearest_last=True,
                retriever=config.scope,
                threshold=config.threshold,
                reader=config.counterfactual,
                soft=config.soft,
            )
            for request in requests
        ]
        numbers = {"scope_classifier": config.scope, "counterfactual_model": config.counterfactual}
        return Outcome([], [dict(numbers) for _ in requests], entries=entries)

"""Answers that a model is to lose, as a term of the loss of any method that trains on examples.

Unlikelihood (Welleck et al. 2020, arXiv 1908.04319, eq. 3): for an answer ``ȳ`` that is unwanted behind a prompt ``x``

    L_u = −(1/|ȳ|) Σ_t log(1 − p(ȳ_t | x, ȳ_<t))

Maximising the likelihood of another answer lowers that of ``ȳ`` only as far as the two share the first token's mass;
behind other wordings of the prompt the old answer may still come.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch

from ..requests import EditRequest
from .examples import Example, ExampleBatch, encode_examples, row_means

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GONE = 0.01
"""Probability of a whole answer from which on it counts as lost."""
_LEAST = 1e-6


@dataclass(frozen=True)
class Unlikelihood:
    """The unwanted answers of some requests, and the weight of their term.

    Args:
        batch: the answers behind their prompts; ``None``: there are none.
        weight: of the term.
    """

    batch: ExampleBatch | None
    weight: float = 1.0

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[EditRequest],
        *,
        weight: float | None,
        separator: str | None,
        fill: int,
    ) -> Unlikelihood:
        """Tokenise the unwanted answers of requests.

        Args:
            model: decoder-only or encoder-decoder.
            tokenizer: of the model.
            requests: what is edited.
            weight: ``None``: 1, and only requests that unlearn count (`EditRequest.unlearns`); otherwise all that name
                an unwanted answer.
            separator: as for `encode_examples`.
            fill: padding id.

        Raises:
            RequestError: naming the row, if an answer has no tokens of its own.
            TargetTooLongError: if one does not fit into the model's context.
        """
        examples: list[Example] = []
        for request in requests if weight != 0 else ():
            if weight is None and not request.unlearns:
                continue
            pairs = [request, *(replace(request, target_new=answer) for answer in request.unwanted)]
            wanted, *unwanted = encode_examples(model, tokenizer, pairs, separator=separator)
            examples += [e for example in unwanted if (e := _without_shared(example, wanted)).targets]
        batch = ExampleBatch.of(model, examples, fill) if examples else None
        return cls(batch, 1.0 if weight is None else weight)

    def term(self, model: Any) -> tuple[torch.Tensor | float, bool]:
        """The weighted loss, the mean over the answers, and whether all answers are lost already (`GONE`).

        Args:
            model: as `ExampleBatch.token_losses` takes it.
        """
        if self.batch is None:
            return 0.0, True
        nll = self.batch.token_losses(model)
        rows = self.batch.positions.rows.to(nll.device)
        whole = nll.new_zeros(self.batch.count).index_add(0, rows, nll.detach())
        gone = bool((whole > -math.log(GONE)).all())
        return self.weight * row_means(unlikelihoods(nll), rows, self.batch.count).mean(), gone


def unlikelihoods(nll: torch.Tensor) -> torch.Tensor:
    """``−log(1 − p)`` of each token from its ``−log p``; finite, with a gradient, also where ``p`` is 1."""
    return -torch.log(-torch.expm1(-nll.clamp_min(_LEAST)))


def _without_shared(example: Example, wanted: Example) -> Example:
    """The example without the first tokens that the wanted answer has too: these are not to be lost."""
    pairs = zip(example.targets, wanted.targets, strict=False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return replace(example, positions=example.positions[shared:], targets=example.targets[shared:])

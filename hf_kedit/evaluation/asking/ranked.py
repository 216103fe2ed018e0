"""The ids that a model ranks first at every position of a text with its answer: what multimodal locality compares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ...engine.forward import frozen_eval
from ...errors import EvaluationError, RequestError
from ...tokens import vocabulary_size
from .batching import TOKEN_BUDGET, is_encoder_decoder, make_batches, shown_batches, stock_model
from .scoring import LOGIT_BUDGET, TargetRow, Unscored, encode_row, target_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Ranked:
    """What a model ranks first at the positions of a prompt and its answer, placeholders of pictures included.

    Args:
        prompt: text before the answer.
        target: the text that was fed.
        ids: for each position that is fed, the most probable next ids, the best first.
    """

    prompt: str
    target: str
    ids: tuple[tuple[int, ...], ...]


def ranked_predictions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    k: int,
    separator: str | None = None,
    token_budget: int = TOKEN_BUDGET,
) -> list[Ranked | Unscored]:
    """Feed prompts with their answers, and return the ``k`` first ids at every position.

    Args:
        model: causal language model, or one that sees.
        tokenizer: of the model.
        pairs: (prompt, answer) texts.
        k: how many ids.
        separator: as for `score_pairs`.
        token_budget: padded tokens per forward pass.

    Raises:
        EvaluationError: for an encoder-decoder model, whose answer stands elsewhere than its prompt.
    """
    model = stock_model(model)
    if is_encoder_decoder(model):
        raise EvaluationError("ranked ids at all positions need a causal language model; take mode='answer'")
    found: dict[tuple[str, str], Ranked | Unscored] = {}
    rows: dict[tuple[str, str], TargetRow] = {}
    for prompt, target in dict.fromkeys(pairs):
        try:
            rows[prompt, target] = encode_row(model, tokenizer, prompt, target, separator)
        except RequestError as error:
            found[prompt, target] = Unscored(prompt, target, str(error))
    most = LOGIT_BUDGET // vocabulary_size(model)
    batches = make_batches(
        rows, lambda pair: rows[pair].width, token_budget, positions=lambda pair: rows[pair].width, max_positions=most
    )
    with frozen_eval(model), torch.inference_mode():
        for group in shown_batches(batches, len(rows), "ranking answers"):
            members = [rows[pair] for pair in group]
            best = target_logits(model, tokenizer, members, everywhere=True).topk(k, -1).indices.tolist()
            place = 0
            for pair, row in zip(group, members, strict=True):
                ids = tuple(map(tuple, best[place : place + len(row.inputs)]))
                place += len(row.inputs)
                found[pair] = Ranked(*pair, ids)
    return [found[pair] for pair in pairs]

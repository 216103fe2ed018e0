"""The logit lens: what a model would answer if it stopped behind an earlier block (nostalgebraist 2020).

The state of the prompt's last token behind each block goes through the final norm and the head, as the last one does.
The layers in which an answer appears are those that have brought it there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..anatomy.outputs import hooks
from ..decoding.premature import PrematureLogits
from ..engine.forward import device_of, frozen_eval
from ..errors import ConfigError
from ..tokens import context_length, prompt_ids
from .tracing import unpack

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class LensReading:
    """What one prompt looks like in every layer.

    Args:
        prompt: that was read.
        layers: for every block, from the first to the last, its most probable next tokens with their probabilities,
            the most probable first. The last block's are those of the model itself.
    """

    prompt: str
    layers: list[list[tuple[str, float]]]


def logit_lens(
    model: Any, prompt: str, tokenizer: PreTrainedTokenizerBase | None = None, *, top: int = 5
) -> LensReading:
    """Read the next token off every layer. The model is not changed.

    Args:
        model: an `EditableModel` (with its edits), or a transformers model together with its tokenizer.
        prompt: text that the model goes on with.
        tokenizer: of a transformers model.
        top: tokens of each layer.

    Raises:
        ConfigError: for an empty prompt, one that is longer than the context, a bad number, or a missing tokenizer.
        UnsupportedModelError: for an encoder-decoder, a model without head or final norm, one of several streams, or
            one whose edits live in prompts.
    """
    base, tokenizer, anatomy, _ = unpack(model, tokenizer, None)
    if not isinstance(prompt, str) or not prompt.strip() or not isinstance(top, int) or top < 1:
        raise ConfigError("the lens needs a prompt, and at least one token of each layer")
    numbers = list(range(1, anatomy.num_layers + 1))
    premature = PrematureLogits(base, anatomy, numbers, norm=True)
    ids, limit = torch.tensor([prompt_ids(tokenizer, prompt)]), context_length(base.config)
    if limit is not None and ids.shape[1] > limit:
        raise ConfigError(f"the prompt has {ids.shape[1]} tokens, the model's context has {limit}")
    with frozen_eval(base), torch.no_grad(), hooks(*premature.registrations):
        premature.begin()
        logits = base(input_ids=ids.to(device_of(base))).logits
        read = premature.read(logits, 0)[:, 0, -1]
    chances, places = read.softmax(-1).topk(min(top, read.shape[-1]), dim=-1)
    decode = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    return LensReading(
        prompt,
        [
            [(str(decode([place])), chance) for place, chance in zip(row, likely, strict=True)]
            for row, likely in zip(places.tolist(), chances.tolist(), strict=True)
        ],
    )

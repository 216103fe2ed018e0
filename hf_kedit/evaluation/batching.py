"""What scoring and generation share: facts about a model, fitting texts into its context, making batches."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import RequestError
from ..logging import get_logger, warn_once

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = get_logger(__name__)
H = TypeVar("H", bound=Hashable)

TOKEN_BUDGET = 8192
"""Padded tokens of one forward pass."""


def stock_model(model: Any) -> PreTrainedModel:
    """Return the transformers model inside an `EditableModel`, or ``model`` itself."""
    if hasattr(model, "rollback") and hasattr(model, "edit") and hasattr(model, "base_model"):
        model = model.base_model
    return model


def is_encoder_decoder(model: PreTrainedModel) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False))


def vocabulary_size(model: PreTrainedModel) -> int:
    config = model.config
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    return int(getattr(text, "vocab_size", None) or getattr(config, "vocab_size", None) or 1)


def make_batches(
    items: list[H], length: Callable[[H], int], packer: Callable[[], Callable[[H], bool]], max_rows: int | None
) -> Iterator[list[H]]:
    """Cut ``items``, longest first, into groups (a single item always makes one).

    ``packer()`` begins a group and returns what admits items to it. The longest batch comes first, so that too
    large a budget fails at once. Equal lengths keep the order of the input: the same items always give the same
    batches.
    """
    group: list[H] = []
    admits = packer()
    for item in sorted(items, key=lambda i: -length(i)):
        if group and ((max_rows is not None and len(group) >= max_rows) or not admits(item)):
            yield group
            group, admits = [], packer()
        if not group:
            admits(item)
        group.append(item)
    if group:
        yield group


def decoder_start(model: PreTrainedModel) -> int:
    for config in (model.config, getattr(model, "generation_config", None)):
        for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
            value = getattr(config, name, None)
            if isinstance(value, int):
                return value
    return 0


def stand_in_bos(tokenizer: PreTrainedTokenizerBase) -> int:
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(tokenizer, name, None)
        if isinstance(value, int):
            return value
    raise RequestError("no token stands before the target and the tokenizer has neither BOS nor EOS", field="prompt")


def cut_left(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], prompt_length: int, limit: int | None
) -> tuple[list[int], int]:
    """Drop prompt tokens at the left (behind a leading special token) until ``ids`` fits into ``limit``."""
    if limit is None or len(ids) <= limit:
        return ids, 0
    keep = 1 if prompt_length > 1 and ids[0] in tokenizer.all_special_ids else 0
    excess = len(ids) - limit
    if excess > prompt_length - keep - 1:
        raise RequestError(f"the target has too many tokens for the model's context of {limit}", field="target")
    warn_once(logger, f"prompts longer than the model's context of {limit} tokens are cut at the left")
    return ids[:keep] + ids[keep + excess :], excess

"""What scoring and generation share: facts about a model, fitting texts into its context, making batches."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ...errors import RequestError
from ...logging import get_logger, progress_bar, warn_once
from ...tokens import TokenIds

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = get_logger(__name__)
H = TypeVar("H", bound=Hashable)

TOKEN_BUDGET = 8192
"""Padded tokens of one forward pass."""
_SOON = 50
"""As many questions are answered before a bar could be read."""


def stock_model(model: Any) -> PreTrainedModel:
    """Return the transformers model inside an `EditableModel`, or ``model`` itself."""
    if hasattr(model, "rollback") and hasattr(model, "edit") and hasattr(model, "base_model"):
        model = model.base_model
    return model


def is_encoder_decoder(model: PreTrainedModel) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False))


def make_batches(
    items: Iterable[H],
    width: Callable[[H], int],
    token_budget: int,
    *,
    max_rows: int | None = None,
    positions: Callable[[H], int] | None = None,
    max_positions: int | None = None,
) -> Iterator[list[H]]:
    """Cut ``items``, longest first, into groups (a single item always makes one).

    The longest batch comes first, so that too large a budget fails at once. Equal lengths keep the order of the
    input: the same items always give the same batches.

    Args:
        items: what is run.
        width: padded tokens of a row, were it the longest of its group.
        token_budget: largest number of rows × width of a group.
        max_rows: largest number of rows.
        positions: of an item, how many positions its logits are computed at.
        max_positions: largest sum of them in a group.
    """
    group: list[H] = []
    computed = 0
    for item in sorted(items, key=lambda i: -width(i)):
        more = positions(item) if positions is not None else 0
        if group and (
            (len(group) + 1) * width(group[0]) > token_budget
            or (max_rows is not None and len(group) >= max_rows)
            or (max_positions is not None and computed + more > max_positions)
        ):
            yield group
            group, computed = [], 0
        group.append(item)
        computed += more
    if group:
        yield group


def shown_batches(batches: Iterable[list[H]], total: int, doing: str) -> Iterator[list[H]]:
    """Batches under a progress bar that counts their items.

    Args:
        batches: of `make_batches`.
        total: items of all of them.
        doing: what is done with them.
    """
    if total <= _SOON:
        yield from batches
        return
    with progress_bar(total, doing, unit="question") as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))


def stand_in_bos(tokenizer: PreTrainedTokenizerBase) -> int:
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(tokenizer, name, None)
        if isinstance(value, int):
            return value
    raise RequestError("no token stands before the target and the tokenizer has neither BOS nor EOS", field="prompt")


def cut_left(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], prompt_length: int, limit: int | None
) -> tuple[Sequence[int], int]:
    """Drop prompt tokens at the left (behind a leading special token) until ``ids`` fits into ``limit``."""
    if limit is None or len(ids) <= limit:
        return ids, 0
    keep = 1 if prompt_length > 1 and ids[0] in tokenizer.all_special_ids else 0
    excess = len(ids) - limit
    if excess > prompt_length - keep - 1:
        raise RequestError(f"the target has too many tokens for the model's context of {limit}", field="target")
    if isinstance(ids, TokenIds):
        raise RequestError(
            f"prompt and pictures have too many tokens for the model's context of {limit}", field="image"
        )
    warn_once(logger, f"prompts longer than the model's context of {limit} tokens are cut at the left")
    return [*ids[:keep], *ids[keep + excess :]], excess

"""The rows of a call of a model, as those who stand before it read them: padded ids, and what belongs to pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache
from transformers.modeling_utils import slice_logits_to_keep

from ..engine.forward import picture_inputs
from ..errors import UnsupportedModelError
from ..tokens import ALIGNED, TokenBatch, TokenIds

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class CallRows:
    """The rows of a call: padded ids, which of them are real; the real ones and their columns as lists; and what
    belongs to their pictures, of all rows together."""

    input_ids: torch.Tensor
    mask: torch.Tensor
    ids: list[list[int]]
    columns: list[list[int]]
    pictures: dict[str, torch.Tensor]

    @classmethod
    def read(cls, given: dict[str, Any]) -> CallRows | None:
        """``None`` for calls that cannot be routed: embeddings, 4-D masks, and those that go on from a cache."""
        ids, mask, cache = (given.get(n) for n in ("input_ids", "attention_mask", "past_key_values"))
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or given.get("inputs_embeds") is not None:
            return None
        if isinstance(cache, Cache) and cache.get_seq_length() > 0:
            return None
        if mask is None:
            mask = torch.ones_like(ids)
        if mask.shape != ids.shape:
            return None
        real = mask.bool()
        columns = [[column for column, on in enumerate(row) if on] for row in real.tolist()]
        tokens = [[row[c] for c in own] for row, own in zip(ids.tolist(), columns, strict=True)]
        pictures = {k: v for k, v in given.items() if isinstance(v, torch.Tensor) and k not in _OF_TEXT}
        return cls(ids, real, tokens, columns, pictures if "pixel_values" in pictures else {})

    def row(self, i: int) -> TokenIds:
        """The ids of a row, with what belongs to each of its tokens."""
        beside = {k: v[i : i + 1, self.columns[i]] for k, v in self.pictures.items() if k in ALIGNED}
        return TokenIds(self.ids[i], beside, None)

    def apart(self, pictures: set[int]) -> list[TokenIds]:
        """The ids of all rows, each with its own pictures.

        How many images a row has, its runs of placeholders tell. What a tensor's first axis counts, its length tells:
        images, rows, or patches, of which every image has as many per placeholder as the others.

        Args:
            pictures: ids of placeholders.

        Raises:
            UnsupportedModelError: if a tensor counts something else.
        """
        marks = [[i in pictures for i in row] for row in self.ids]
        places = [sum(row) for row in marks]
        runs = [sum(on and not before for before, on in pairwise([False, *row])) for row in marks]
        shares = {}
        for name, tensor in self.pictures.items():
            if name in ALIGNED:
                continue
            length = len(tensor)
            ratio = length // max(sum(places), 1)
            found = next((n for n in (runs, [1] * self.count, [ratio * n for n in places]) if sum(n) == length), None)
            if found is None:
                raise UnsupportedModelError(
                    f"{name}: it cannot be told which of the pictures of a batch belong to which text; ask one by one"
                )
            shares[name] = tensor.split(found)
        rows = []
        for i in range(self.count):
            own = {name: parts[i] for name, parts in shares.items() if len(parts[i])}
            rows.append(TokenIds(self.ids[i], {**self.row(i).beside, **own}, None))
        return rows

    def inputs(self) -> dict[str, torch.Tensor]:
        """Ids and mask, and what belongs to the pictures, as the call has them."""
        return {"input_ids": self.input_ids, "attention_mask": self.mask.long(), **self.pictures}

    def with_pictures(self, model: PreTrainedModel, batch: TokenBatch) -> dict[str, Any]:
        """Arguments of a call with the rows as they are now; the model counts positions itself."""
        now = batch.pictures()
        kept = {name: value for name, value in self.pictures.items() if name not in ALIGNED and name not in now}
        pictures = picture_inputs(model, batch.input_ids, {**kept, **now})
        return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, **pictures}

    @property
    def count(self) -> int:
        """Number of rows."""
        return int(self.input_ids.shape[0])

    @property
    def width(self) -> int:
        """Columns, padding included."""
        return int(self.input_ids.shape[1])


_OF_TEXT = frozenset(
    {"input_ids", "attention_mask", "position_ids", "labels", "logits_to_keep", "cache_position", "decoder_input_ids"}
)
"""What a call gives of text; its other tensors belong to pictures."""


def wanted_columns(keep: int | torch.Tensor, rows: CallRows) -> list[list[int]]:
    """The columns of each row whose logits a call wants by its ``logits_to_keep``."""
    if not isinstance(keep, torch.Tensor) or keep.dtype != torch.bool:
        table = torch.arange(rows.width).expand(rows.count, -1).unsqueeze(-1)
        kept = keep.cpu() if isinstance(keep, torch.Tensor) else keep
        columns: list[list[int]] = slice_logits_to_keep(table, kept).squeeze(-1).tolist()
        return columns
    return [[column for column, on in enumerate(row) if on] for row in keep.tolist()]


def moved(given: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Arguments of a call with its tensors on a device."""
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in given.items()}


def take_rows(value: Any, rows: Sequence[int], count: int) -> Any:
    """The rows of a per-row argument; anything else as it is."""
    if isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[0] == count:
        return value[list(rows)]
    return value

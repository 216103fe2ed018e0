"""Reading states layer by layer from below, while the layers below are being rewritten.

Methods that spread an edit over several layers measure keys at each of them, after the ones before were written.
What enters a layer does not change any more once everything below it is final, so each measurement goes on from the
hidden states that entered the last one, not from the tokens. Nothing behind the fact token can influence it: rows
end there.

As in `replay`, that a model can be restarted this way is checked once per model and layer, on one row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from ..anatomy.switching import Switch
from ..logging import get_logger
from ..tokens import TokenBatch, pad_rows
from .capture import Tap, capture_at, listen
from .forward import device_of, seen_from
from .replay import added_at, nearly_equal, passed_through, recorded_structures
from .rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..anatomy import Anatomy

logger = get_logger(__name__)
_CHECKED: WeakKeyDictionary[torch.nn.Module, dict[tuple[int, bool], bool]] = WeakKeyDictionary()
KEPT_BYTES = 2**31


@dataclass
class _Chunk:
    """Rows that run together: their places among all rows, the padded batch, and what enters block ``layer``."""

    places: list[int]
    batch: TokenBatch
    columns: torch.Tensor
    layer: int = 0
    entering: torch.Tensor | None = None
    structures: dict[int, Any] = field(default_factory=dict)


class Sweep:
    """Rows of a model, read at their fact tokens at one layer after the other.

    Args:
        model: in evaluation mode.
        anatomy: of the model.
        rows: what to run; each is cut behind its fact token.
        fill: padding id.
        chunk: rows per forward.
        restart: go on from the states that entered the last layer; otherwise always from the tokens.
        kept: bytes that these states may take; where they would take more, every reading begins at the tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        anatomy: Anatomy,
        rows: Sequence[Row],
        *,
        fill: int = 0,
        chunk: int = 64,
        restart: bool = True,
        kept: int = KEPT_BYTES,
    ):
        self.model, self.anatomy, self.count = model, anatomy, len(rows)
        device = device_of(model)
        order = sorted(range(len(rows)), key=lambda i: rows[i].fact)
        self._chunks = []
        for start in range(0, len(order), chunk):
            places = order[start : start + chunk]
            needed = [rows[i].ids[: seen_from(model, rows[i].ids, rows[i].fact)] for i in places]
            batch = pad_rows(needed, fill, side="right").to(device)
            self._chunks.append(_Chunk(places, batch, torch.tensor([rows[i].fact for i in places], device=device)))
        width = next(model.parameters()).element_size() * anatomy.hidden_size
        size = width * sum(chunk.batch.input_ids.numel() for chunk in self._chunks)
        restartable = not anatomy.is_encoder_decoder and anatomy.one_stream is not False
        self.restart = restart and restartable and size <= kept

    def read(
        self, taps: Sequence[Tap], layer: int, *, offsets: Mapping[str, torch.Tensor] | None = None
    ) -> dict[Tap, torch.Tensor]:
        """Read taps at the fact tokens on the model as it is now, ``[rows, d]`` fp32 each.

        Args:
            taps: what to read, at or above ``layer``.
            layer: from now on nothing below this layer changes any more; it must not fall from call to call, except
                to 0, which reads from the tokens.
            offsets: module name → vectors ``[rows, d]`` that are added to its output at the fact tokens meanwhile;
                needs ``layer`` 0.
        """
        if offsets:
            parts = [self._read_with(chunk, taps, offsets) for chunk in self._chunks]
        else:
            parts = [self._read(chunk, taps, layer) for chunk in self._chunks]
        inverse = torch.tensor([place for chunk in self._chunks for place in chunk.places]).argsort()
        return {tap: torch.cat([p[tap] for p in parts])[inverse.to(parts[0][tap].device)] for tap in taps}

    def _read_with(
        self, chunk: _Chunk, taps: Sequence[Tap], offsets: Mapping[str, torch.Tensor]
    ) -> dict[Tap, torch.Tensor]:
        here = {module: vectors[torch.tensor(chunk.places)] for module, vectors in offsets.items()}
        with added_at(self.model, list(here), here, chunk.columns, len(chunk.places)):
            return capture_at(self.model, chunk.batch, chunk.columns, taps)

    def _read(self, chunk: _Chunk, taps: Sequence[Tap], layer: int) -> dict[Tap, torch.Tensor]:
        if not self.restart or layer == 0:
            return capture_at(self.model, chunk.batch, chunk.columns, taps)
        if layer > chunk.layer or chunk.entering is None:
            entry = Tap(self.anatomy.layers[layer].path, "input")
            kept: list[torch.Tensor] = []

            def keep(_: Tap, tensor: torch.Tensor) -> None:
                kept.append(tensor.detach().clone())

            with (
                self._resumed(chunk),
                recorded_structures(self.model, self.anatomy, layer, chunk.structures),
                listen(self.model, [entry], keep),
            ):
                states = capture_at(self.model, chunk.batch, chunk.columns, taps)
            chunk.layer, chunk.entering = layer, kept[0]
            if not self._exact(chunk, taps):
                self.restart = False
                return capture_at(self.model, chunk.batch, chunk.columns, taps)
            return states
        with self._resumed(chunk):
            return capture_at(self.model, chunk.batch, chunk.columns, taps)

    def _resumed(self, chunk: _Chunk) -> Switch[None]:
        """The model begins at the layer whose entering states are kept."""
        return passed_through(self.model, self.anatomy, chunk.layer - 1, chunk.entering, chunk.structures)

    def _exact(self, chunk: _Chunk, taps: Sequence[Tap]) -> bool:
        """Whether a restart at the chunk's layer gives what the tokens give; tried once per model and layer."""
        known, place = _CHECKED.setdefault(self.model, {}), (chunk.layer, bool(chunk.batch.beside))
        if place not in known:
            known[place] = self._compare(chunk, taps)
            if not known[place]:
                logger.debug("%s cannot be restarted at layer %d", type(self.model).__name__, chunk.layer)
        return known[place]

    def _compare(self, chunk: _Chunk, taps: Sequence[Tap]) -> bool:
        """Read one row from the tokens and from the kept states."""
        place = slice(0, 1)
        one = chunk.batch.select(place)
        assert chunk.entering is not None
        expected = capture_at(self.model, one, chunk.columns[place], taps)
        try:
            with passed_through(self.model, self.anatomy, chunk.layer - 1, chunk.entering[place], chunk.structures):
                restarted = capture_at(self.model, one, chunk.columns[place], taps)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            logger.debug("%s does not run from layer %d on: %r", type(self.model).__name__, chunk.layer, error)
            return False
        # States of one layer have gone through less rounding than logits.
        return all(nearly_equal(self.model, restarted[tap], expected[tap], share=0.5) for tap in taps)

"""The edited model as its own retriever: prompts are alike if it is in the same state at their last token.

Words cannot tell two questions about one person apart. Two thirds up a decoder the last token of a prompt holds what
the prompt asks for, in whatever words: there, the cosine of two prompts follows subject *and* relation. This is where
GRACE looks too. States are always those of the unedited model, so that edits of any kind leave them alone.
Pictures are compared by what the model makes of them (`engine.looks`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..engine.capture import Tap, capture_at
from ..engine.forward import device_of, frozen_eval, model_inputs
from ..engine.looks import looks_of
from ..errors import ConfigError
from ..text.pictures import PicturedText
from ..tokens import context_length, encode_text, needed_tokenizer, pad_id, pad_rows
from .retrieval import MODEL, EmbeddingRetriever

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..anatomy import Anatomy

_ROWS = 64
"""Texts that share a forward pass."""


class StateReader:
    """Reads states of one model.

    Args:
        model: a decoder-only transformers model.
        anatomy: of the model.
        tokenizer: of the model, looked up when it is needed.
        unedited: a block inside which the model has no edits.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        anatomy: Anatomy,
        tokenizer: Callable[[], PreTrainedTokenizerBase | None],
        unedited: Callable[[], AbstractContextManager[None]],
    ):
        self.model, self.anatomy, self.tokenizer, self.unedited = model, anatomy, tokenizer, unedited

    def retriever(self, name: str) -> EmbeddingRetriever:
        """The retriever of a name: ``"model"``, or ``"model:<layer>"`` for the state behind a block of one's choice.

        Raises:
            ConfigError: if the name has no valid layer.
        """
        layer = self.layer_of(name)
        return EmbeddingRetriever(partial(self.states, layer=layer), name)

    def layer_of(self, name: str) -> int:
        """The block that a name means; raises as `retriever` does."""
        count = self.anatomy.num_layers
        _, _, chosen = name.partition(":")
        if name == MODEL:
            return min(round(0.66 * count), count - 1)
        if not chosen.isdecimal() or int(chosen) >= count:
            raise ConfigError(
                f"the retriever {name!r}: give 'model', or 'model:<layer>' with a layer from 0 to {count - 1}"
            )
        return int(chosen)

    def looks(self, inputs: Mapping[str, Any]) -> list[torch.Tensor | None]:
        """What the unedited model sees of the pictures of each row of a call, ``[d]`` fp32; ``None`` without any.

        Args:
            inputs: ids and mask, and what belongs to the pictures of all rows.
        """
        with self.unedited(), frozen_eval(self.model):
            return looks_of(self.model, self.anatomy, inputs)

    def look_of(self, text: str) -> torch.Tensor | None:
        """`looks` of one text.

        Raises:
            RequestError: if the processor cannot read its pictures.
        """
        tokenizer = self.tokenizer()
        if tokenizer is None or not isinstance(text, PicturedText) or self.model.config.is_encoder_decoder:
            return None
        batch = pad_rows([encode_text(tokenizer, text).ids]).to(device_of(self.model))
        return self.looks(model_inputs(self.model, batch))[0]

    def states(self, texts: Sequence[str], layer: int) -> torch.Tensor:
        """The unedited model's state at the last token of each text, behind a block.

        Args:
            texts: longer ones than the context lose their beginning.
            layer: index of the block.

        Returns:
            ``[texts, d]`` fp32.

        Raises:
            ConfigError: if the model has no tokenizer.
        """
        tokenizer = needed_tokenizer(self.tokenizer(), "the retriever 'model'")
        limit, fill = context_length(self.model.config) or 0, pad_id(tokenizer)
        ids = [encode_text(tokenizer, text).ids[-limit:] or [fill] for text in texts]
        tap = Tap(self.anatomy.layer(layer).path)
        found = [torch.empty(0, self.anatomy.hidden_size)]
        with self.unedited(), frozen_eval(self.model):
            for start in range(0, len(ids), _ROWS):
                rows = ids[start : start + _ROWS]
                batch = pad_rows(rows, fill).to(device_of(self.model))
                columns = torch.tensor([len(row) - 1 for row in rows])
                found.append(capture_at(self.model, batch, columns, [tap])[tap].cpu())
        return torch.cat(found)

"""Premature logits: what a model would say if its last blocks were left out.

The state behind an earlier block goes through the final norm (or not) and the head. What a model does to its logits
behind the head is done to these as well: dividing them (Granite), multiplying (Cohere), soft-capping (Gemma). It is
found in the model's config, and compared with what the model does to its own logits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.modeling_utils import slice_logits_to_keep

from ..anatomy import Anatomy
from ..anatomy.outputs import block_output, module_input
from ..errors import UnsupportedModelError


class PrematureLogits:
    """Reads the states of some layers in one forward pass of a model, and makes logits of them.

    Several threads may run the model at once: each has its own states.

    Args:
        model: a causal language model.
        anatomy: where its parts are.
        layers: as in ``hidden_states``: 0 for the embeddings, j for the output of block j - 1.
        norm: whether states go through the final norm.

    Raises:
        UnsupportedModelError: for an encoder-decoder, a model without a head, or one of several streams.
    """

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, layers: Sequence[int], *, norm: bool):
        kind = anatomy.model_class
        if anatomy.is_encoder_decoder:
            raise UnsupportedModelError(f"{kind} is an encoder-decoder; layers are contrasted in decoders only")
        if anatomy.head is None:
            raise UnsupportedModelError(f"{kind} has no head, so it has no logits")
        if norm and anatomy.final_norm is None:
            raise UnsupportedModelError(f"no norm was found behind the last block of {kind}")
        self._head = model.get_submodule(anatomy.head)
        self._norm = model.get_submodule(anatomy.final_norm) if norm and anatomy.final_norm else None
        self._after = _after_head(model)
        self._here = threading.local()
        self.registrations: list[Callable[[], RemovableHandle]] = [
            partial(self._head.register_forward_hook, self._see_head)
        ]
        for layer in layers:
            block = model.get_submodule(anatomy.block(max(layer - 1, 0)))
            if layer == 0:
                see: Any = partial(self._see_input, layer)
                self.registrations.append(partial(block.register_forward_pre_hook, see, with_kwargs=True))
            else:
                self.registrations.append(partial(block.register_forward_hook, partial(self._see_output, layer)))

    def begin(self) -> None:
        """Forget what this thread has seen; it is about to run the model."""
        self._here.states = {}
        self._here.head = None
        self._here.passes = 0

    def read(self, logits: torch.Tensor, logits_to_keep: Any) -> torch.Tensor:
        """Logits of the layers at the positions of the model's own.

        Args:
            logits: what the model returned.
            logits_to_keep: what its forward was called with.

        Returns:
            ``[layers, …]`` in the shape of ``logits``, float32, on their device, in the order of the layers.

        Raises:
            UnsupportedModelError: if the logits do not come from this pass, or the model does something to them that
                is not known.
        """
        states, own = self._here.states, self._here.head
        if own is None or self._here.passes != 1:
            raise UnsupportedModelError(
                "this call ran the model several times (edits that live in prompts do); layers are contrasted by"
                " generate() only"
            )
        if own.shape != logits.shape or not torch.allclose(
            self._after(own.float()), logits.to(own.device).float(), rtol=1e-2, atol=1e-3
        ):
            raise UnsupportedModelError("the model changes its logits behind the head in a way that is not known")
        self._here.states = self._here.head = None  # nothing is kept, and nothing of what the head does for us is seen
        found = []
        for layer in sorted(states):
            state = slice_logits_to_keep(states[layer], logits_to_keep).to(own.device)
            state = state if self._norm is None else self._norm(state)
            read = self._head(state)
            found.append(self._after(read.float()).to(logits.device))
        return torch.stack(found)

    def _see_head(self, _: nn.Module, __: Any, output: torch.Tensor) -> None:
        if getattr(self._here, "states", None):
            self._here.head = output

    def _see_input(self, layer: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._see(layer, module_input(args, kwargs))

    def _see_output(self, layer: int, _: nn.Module, __: Any, output: Any) -> None:
        self._see(layer, block_output(output))

    def _see(self, layer: int, state: torch.Tensor) -> None:
        states = getattr(self._here, "states", None)
        if states is None:
            return
        self._here.passes += layer in states or not states
        states[layer] = state


def _after_head(model: PreTrainedModel) -> Callable[[torch.Tensor], torch.Tensor]:
    """What the model does to its logits behind the head."""
    config = model.config.get_text_config(decoder=True)
    divisor = getattr(config, "logits_scaling", None) or 1.0
    factor = getattr(config, "logit_scale", None) or 1.0
    cap = getattr(config, "final_logit_softcapping", None)

    def after(logits: torch.Tensor) -> torch.Tensor:
        logits = logits if divisor == 1 else logits / divisor
        logits = logits if factor == 1 else logits * factor
        return cap * torch.tanh(logits / cap) if cap else logits

    return after

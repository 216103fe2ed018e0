"""Calling a stock model: which arguments it takes, and logits at chosen positions only."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from ..errors import ConfigError
from ..tokens import TokenBatch
from .weights import uninterrupted

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@lru_cache(maxsize=256)
def _parameters(forward_class: Any) -> frozenset[str]:
    return frozenset(inspect.signature(forward_class.forward).parameters)


def accepts(model: torch.nn.Module, name: str) -> bool:
    """Whether ``model.forward`` has an argument of this name (``**kwargs`` does not count)."""
    unwrap: Any = getattr(model, "get_base_model", None)
    inner: Any = unwrap() if callable(unwrap) else model
    kind: Any = type(inner)
    return name in _parameters(kind)


def device_of(model: torch.nn.Module) -> torch.device:
    """Device on which inputs are expected."""
    find: Any = getattr(model, "get_input_embeddings", None)
    for source in (find() if callable(find) else None, model):
        if source is not None:
            for parameter in source.parameters():
                if parameter.device.type != "meta":
                    return parameter.device
    return torch.device("cpu")


def model_inputs(model: PreTrainedModel, batch: TokenBatch) -> dict[str, Any]:
    """Arguments for a plain forward over a padded batch; positions are given wherever the model takes them."""
    kwargs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if accepts(model, "position_ids"):
        kwargs["position_ids"] = batch.position_ids
    if accepts(model, "use_cache"):
        kwargs["use_cache"] = False
    return kwargs


def gather_logits(
    model: PreTrainedModel, batch: TokenBatch, rows: torch.Tensor, columns: torch.Tensor, **extra: Any
) -> torch.Tensor:
    """Run the model and return logits at ``(rows[i], columns[i])``, ``[n, vocab]`` in the model's dtype.

    Where the model can, it computes the head only at the union of the columns.
    """
    kwargs = {**model_inputs(model, batch), **extra}
    return logits_at(model, kwargs, rows, columns, tuple(batch.input_ids.shape))


def keep_mask(rows: torch.Tensor, columns: torch.Tensor, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Which positions of a ``[rows, width]`` input are wanted (bool), and where each wanted one comes among them."""
    place, inverse = (rows * shape[1] + columns).unique(return_inverse=True)
    keep = torch.zeros(shape[0] * shape[1], dtype=torch.bool, device=rows.device)
    keep[place] = True
    return keep.view(shape[0], shape[1]), inverse


def logits_at(
    model: PreTrainedModel,
    kwargs: dict[str, Any],
    rows: torch.Tensor,
    columns: torch.Tensor,
    shape: tuple[int, ...],
    mask: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Call the model with ``kwargs`` and return logits at ``(rows[i], columns[i])`` of a ``[rows, width]`` input.

    ``mask`` is the `keep_mask` of these positions, for callers that ask for them many times.
    """
    if accepts(model, "logits_to_keep"):
        keep, inverse = mask or keep_mask(rows, columns, shape)
        logits = model(**kwargs, logits_to_keep=keep).logits
        if logits.dim() == 2:
            return cast(torch.Tensor, logits[inverse])
    else:
        logits = model(**kwargs).logits
    return cast(torch.Tensor, logits[rows, columns])


@contextlib.contextmanager
def recomputed_blocks(model: PreTrainedModel) -> Iterator[None]:
    """Blocks of a model in evaluation mode keep no activations inside; backward passes run them again.

    transformers checkpoints a block only while it is in training mode. The block alone is put into it, and its own
    rates of dropout are zero meanwhile; the modules in it stay in evaluation mode. The backward pass has to be made
    inside the context, and inside every hook that the forward pass ran under.

    Raises:
        ConfigError: if the model's class does not support it.
    """
    if not model.supports_gradient_checkpointing:
        raise ConfigError(f"{type(model).__name__} does not support activation_checkpointing; leave it off")
    blocks = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    rates = [(b, n, v) for b in blocks for n, v in vars(b).items() if "dropout" in n and isinstance(v, float)]
    was_on = model.is_activation_checkpointing
    try:
        if not was_on:
            model.activation_checkpointing_enable({"use_reentrant": False})
            model.disable_input_require_grads()  # nothing below the first edited module is to be differentiated
        for block in blocks:
            block.training = True
        for block, name, _ in rates:
            setattr(block, name, 0.0)
        yield
    finally:
        for block, name, rate in rates:
            setattr(block, name, rate)
        for block in blocks:
            block.training = False
        if not was_on:
            model.activation_checkpointing_disable()


@contextlib.contextmanager
def frozen_eval(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without weight gradients; every flag is put back afterwards.

    If the block fails, so are the hooks: Ctrl-C may land between the moment a hook is added and the one in which
    whoever removes it takes note.
    """
    training = [module for module in model.modules() if module.training]
    trainable = [p for p in model.parameters() if p.requires_grad]
    hooks = {id(held): set(held) for held in _hooks(model)}

    def put_back(*, failed: bool) -> None:
        with uninterrupted():
            for held in _hooks(model) if failed else ():
                for key in set(held) - hooks.get(id(held), set()):
                    del held[key]
            for module in training:
                module.training = True
            for parameter in trainable:
                parameter.requires_grad_(True)

    try:
        for module in training:
            module.training = False
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
        put_back(failed=False)
    except BaseException:
        try:
            put_back(failed=True)
        except KeyboardInterrupt:  # a second one, in the moment before it is held back
            put_back(failed=True)
        raise


def _hooks(model: torch.nn.Module) -> Iterator[dict[int, Any]]:
    """The dictionaries in which the modules keep their hooks, and what these are called with."""
    for module in model.modules():
        yield module._forward_hooks
        yield module._forward_hooks_with_kwargs
        yield module._forward_hooks_always_called
        yield module._forward_pre_hooks
        yield module._forward_pre_hooks_with_kwargs

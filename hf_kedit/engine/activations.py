"""The activation function of a model's feed-forward layers, and how far two outputs lie apart under it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from ..anatomy import resolve_anatomy
from ..errors import UnsupportedModelError

Activation = Callable[[torch.Tensor], torch.Tensor]
_FIELDS = (
    "hidden_act", "hidden_activation", "mlp_hidden_act", "activation_function", "feed_forward_proj", "ffn_act_fn",
    "activation", "mlp_activation_function", "ff_activation",
)  # fmt: skip
_ACTIVATION = re.compile(r"(gelu|silu|swish|relu)(act|activation)?$", re.IGNORECASE)


def hidden_activation(model: nn.Module) -> Activation:
    """Return the activation function of a model's feed-forward layers.

    Args:
        model: a transformers model. What its config names counts (of two stacks, the decoder's), else an activation
            among its modules, else SiLU for gated MLPs: what families that write the function into their code use.

    Raises:
        UnsupportedModelError: if none of this tells.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    for name in _FIELDS:
        value = getattr(text, name, None)
        value = value.get("name") if isinstance(value, dict) else value
        if isinstance(value, str):
            value = value.removeprefix("gated-")
            if value in ACT2FN:
                function: Activation = ACT2FN[value]
                return function
    module: Activation | None = next((m for m in model.modules() if _ACTIVATION.search(type(m).__name__)), None)
    if module is None and any(layer.gated for layer in resolve_anatomy(model).layers):
        return torch.nn.functional.silu
    if module is None:
        raise UnsupportedModelError(
            f"neither the config of this {getattr(text, 'model_type', 'model')} ({', '.join(_FIELDS)}) nor a module of"
            " it says what its activation function is"
        )
    return module


def activation_distance(changed: torch.Tensor, original: torch.Tensor, activation: Activation | None) -> torch.Tensor:
    """``‖σ(changed) − σ(original)‖₂`` per position; ``None`` for σ compares the outputs themselves.

    Args:
        changed: ``[..., d]``.
        original: ``[..., d]``.
        activation: σ.

    Returns:
        ``[...]`` fp32.
    """
    changed, original = changed.float(), original.float()
    if activation is not None:
        changed, original = activation(changed), activation(original)
    return (changed - original).norm(dim=-1)


def mean_over_tokens(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of each row over its real tokens.

    Args:
        values: ``[..., rows, width]``; what stands on padding may be anything, even NaN.
        mask: ``[rows, width]``, non-zero on real tokens; a row without any gives 0.

    Returns:
        ``[..., rows]``.
    """
    real = mask.to(device=values.device, dtype=torch.bool)
    kept = torch.where(real, values, torch.zeros((), dtype=values.dtype, device=values.device))
    return kept.sum(dim=-1) / real.sum(dim=-1).clamp(min=1)

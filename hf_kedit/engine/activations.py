"""The activation function of a model's feed-forward layers, and how far two outputs lie apart under it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.activations import ACT2FN

from ..errors import UnsupportedModelError

Activation = Callable[[torch.Tensor], torch.Tensor]
_FIELDS = ("hidden_act", "hidden_activation", "activation_function", "feed_forward_proj", "ffn_act_fn", "activation")


def hidden_activation(config: Any) -> Activation:
    """Return the activation function that a transformers config names.

    Args:
        config: of the model; the decoder's part counts.

    Raises:
        UnsupportedModelError: if it names none that transformers knows.
    """
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    for name in _FIELDS:
        value = getattr(text, name, None)
        value = value.get("name") if isinstance(value, dict) else value
        if isinstance(value, str):
            value = value.removeprefix("gated-")
            if value in ACT2FN:
                function: Activation = ACT2FN[value]
                return function
    raise UnsupportedModelError(
        f"the config of this {getattr(text, 'model_type', 'model')} names no activation function"
        f" ({', '.join(_FIELDS)}) that transformers knows"
    )


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

"""Quantised weights: what they are called, and what they stand for.

A quantised matrix can be read (its codes times their scales) and never written: adding an edit to it would round the
edit away. `engine.beside` lays edits on such a matrix as a path of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import WeightError

_REPACKED = "packing_format_for_cpu"
_LIBRARIES = ("bitsandbytes", "torchao", "hqq", "optimum.quanto")


def scheme(module: nn.Module, name: str = "weight") -> str | None:
    """What a parameter is quantised with (``"bitsandbytes nf4"``, ``"torchao Int8Tensor"``); ``None``: not at all."""
    value: Any = getattr(module, name, None)
    if value is None:
        return type(module).__name__ if hasattr(module, "qweight") or hasattr(module, "packed_weight") else None
    library = type(value).__module__.partition(".")[0]
    known = type(value).__module__.startswith(_LIBRARIES)
    if hasattr(value, "quant_state"):
        return f"{library} {getattr(value.quant_state, 'quant_type', None) or getattr(value, 'quant_type', '4 bit')}"
    if known:
        return f"{library} {'int8' if hasattr(value, 'SCB') else type(value).__name__}"
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return str(getattr(value, "dtype", type(value).__name__)).removeprefix("torch.")
    return None


def dequantise(module: nn.Module, name: str = "weight") -> torch.Tensor:
    """The matrix that the codes stand for, as the library itself computes it; the module stays as it is.

    Returns:
        ``[d_out, d_in]``, in the dtype that the library gives.

    Raises:
        WeightError: if the library gives no way back, or has repacked the codes.
    """
    value: Any = getattr(module, name)
    if hasattr(value, "quant_state"):
        return _four_bits(module, value)
    if hasattr(value, "SCB"):
        return _eight_bits(module, value)
    if type(value).__module__.startswith(_LIBRARIES) and callable(getattr(value, "dequantize", None)):
        try:
            return torch.as_tensor(value.dequantize()).detach()
        except (RuntimeError, NotImplementedError) as error:
            raise WeightError(f"the {name} of {type(module).__name__} cannot be dequantised: {error}") from error
    raise WeightError(
        f"the {name} of {type(module).__name__} is quantised ({scheme(module, name)}) in a way that cannot be read"
        " back; bitsandbytes (int8, nf4, fp4) and torchao (weight-only) can. Load the base model with one of them, or"
        " without quantisation"
    )


def keep_layout(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for the CPU at their first forward without gradients.

    The repacked form rounds the scales to bf16, for good, and lets no gradient through: nothing could be edited.
    Without it such a model is slower on a CPU; elsewhere nothing changes.

    Raises:
        WeightError: if that has happened already.
    """
    for name, module in model.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            if getattr(getattr(getattr(module, "weight", None), "quant_state", None), _REPACKED, False):
                raise WeightError(
                    f"bitsandbytes has repacked {name} for this CPU at its first forward; that rounds its scales and"
                    " lets no gradient through. Load the model again and make it an EditableModel before it runs"
                )
            module.support_avx512bf16_for_cpu = False


def _four_bits(module: nn.Module, value: Any) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    state = value.quant_state
    if state is None:
        raise WeightError(
            f"the weight of {type(module).__name__} is not quantised yet: move the model to its device first"
        )
    if getattr(state, _REPACKED, False):
        raise WeightError(
            f"bitsandbytes has repacked the weight of {type(module).__name__} for this CPU at its first forward. Load"
            " the model again and make it an EditableModel before it runs"
        )
    return torch.as_tensor(dequantize_4bit(value.data, state)).detach()


def _eight_bits(module: nn.Module, value: Any) -> torch.Tensor:
    """``codes · scale / 127`` by rows. The first forward moves both from the parameter to the module's state."""
    state: Any = getattr(module, "state", None)
    codes = getattr(state, "CB", None)
    scales = getattr(state, "SCB", None)
    codes, scales = (value.data if codes is None else codes), (value.SCB if scales is None else scales)
    if scales is None:
        raise WeightError(
            f"the weight of {type(module).__name__} has lost its scales (dequantised by another library after a"
            " forward); load the model again"
        )
    return (codes.float() * scales.float().view(-1, 1) / 127).detach()

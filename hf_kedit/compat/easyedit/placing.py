"""How EasyEdit's hyperparameters say that a model is loaded: number format, quantisation, and where it is put."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def loading_options(values: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Arguments of `EditableModel.from_pretrained`.

    Args:
        values: of the hyperparameters: ``fp16``, ``device``, ``model_parallel``, and QLoRA's.
        method: our name of the method.
    """
    options: dict[str, Any] = {"dtype": torch.float16 if values.get("fp16") else torch.float32}
    if method == "qlora":
        options["quantization_config"] = _quantisation(values)
    if (place := _place(values)) is not None:
        options["device_map"] = place
    return options


def _quantisation(values: Mapping[str, Any]) -> Any:
    """How their QLoRA loads its model: in 4 bits unless the file says 8."""
    from transformers import BitsAndBytesConfig

    if int(values.get("quantization_bit") or 4) == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=str(values.get("quant_type") or "nf4"),
        bnb_4bit_use_double_quant=bool(values.get("double_quant", True)),
        bnb_4bit_compute_dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
    )


def _place(values: Mapping[str, Any]) -> Any:
    """Where their editors put the model: on the GPU that ``device`` numbers or names, or on several.

    Returns:
        A ``device_map``; ``None`` without a GPU, where the model stays in the CPU's memory.
    """
    device = values.get("device")
    if not torch.cuda.is_available():
        return None
    if values.get("model_parallel"):
        return "auto"
    if device is None:
        return None
    return {"": f"cuda:{device}" if str(device).isdigit() else str(device)}

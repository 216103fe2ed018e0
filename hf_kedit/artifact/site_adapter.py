"""Edits at sites as the files of a PEFT adapter, written without PEFT; `site_adapters` is what reads them there.

adapter_config.json        the memory's description and the shapes of its tensors
adapter_model.safetensors  its tensors; `EditableModel` reads them from here too, they are saved once
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ..model import EditableModel

PREFIX = "base_model.model."
KINDS = ("grace", "defer", "melo", "wise", "tpatch", "calinet")
"""Kinds of memory that are PEFT types."""


def peft_type(kind: str) -> str:
    """Name of a memory's PEFT type."""
    return f"KEDIT_{kind.upper()}"


def adapter_config_of(model: EditableModel) -> dict[str, Any] | None:
    """Content of ``adapter_config.json``, or ``None`` where the model's edits are not one memory and nothing else."""
    holders = [kind for kind, book in model.books.items() if book.edit_ids]
    if holders != ["adapter"] or len(model.sites.memories) != 1:
        return None
    (memory,) = model.sites.memories.values()
    if memory.kind not in KINDS:
        return None
    shapes: dict[str, dict[str, list[int]]] = {path: {} for path in memory.paths}
    dtypes: dict[str, str] = {}
    for name, tensor in memory.tensors().items():
        path, _, leaf = name.rpartition(".")
        shapes[path][leaf] = list(tensor.shape)
        if not tensor.is_floating_point():
            dtypes[leaf] = str(tensor.dtype).removeprefix("torch.")
    return {
        "peft_type": peft_type(memory.kind),
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.base_model_id or None,
        "inference_mode": True,
        "target_modules": list(memory.paths),
        "kind": memory.kind,
        "paths": list(memory.paths),
        "state": memory.describe(),
        "tensor_shapes": shapes,
        "tensor_dtypes": dtypes,
    }


def as_adapter_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under the names that PEFT expects."""
    return {PREFIX + name: value for name, value in tensors.items()}


def from_adapter_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of `as_adapter_tensors`."""
    return {name.removeprefix(PREFIX): value for name, value in tensors.items()}


def config_bytes(config: Mapping[str, Any]) -> bytes:
    """The file."""
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode("utf-8")

"""Edits at sites as the files of a PEFT adapter, written without PEFT; `compat.peft_tuners` is what reads them there.

adapter_config.json        the memory's description and the shapes of its tensors
adapter_model.safetensors  its tensors; `EditableModel` reads them from here too, they are saved once
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save as dump_tensors

from .layout import ADAPTER_CONFIG, ADAPTER_PREFIX, ADAPTER_WEIGHTS

if TYPE_CHECKING:
    from ..editing.state import EditedModel

ADAPTER_KINDS = ("grace", "defer", "melo", "wise", "tpatch", "calinet")
"""Kinds of memory that are PEFT types."""


def peft_type(kind: str) -> str:
    """Name of a memory's PEFT type."""
    return f"KEDIT_{kind.upper()}"


def site_adapter_files(model: EditedModel) -> dict[str, bytes]:
    """The two files of the adapter; none where the model's edits are not one memory and nothing else."""
    holders = [kind for kind, book in model.books.items() if book.edit_ids]
    if holders != ["adapter"] or len(model.sites.memories) != 1:
        return {}
    (memory,) = model.sites.memories.values()
    if memory.kind not in ADAPTER_KINDS:
        return {}
    tensors = model.sites.tensors()
    shapes: dict[str, dict[str, list[int]]] = {path: {} for path in memory.paths}
    dtypes: dict[str, str] = {}
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        shapes[path][leaf] = list(tensor.shape)
        if not tensor.is_floating_point():
            dtypes[leaf] = str(tensor.dtype).removeprefix("torch.")
    config = {
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
    for_peft = {ADAPTER_PREFIX + name: value for name, value in tensors.items()}
    return {
        ADAPTER_CONFIG: (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode("utf-8"),
        ADAPTER_WEIGHTS: dump_tensors(for_peft, metadata={"format": "pt"}),
    }


def from_adapter_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of an adapter's file under the names that the memory gives them."""
    return {name.removeprefix(ADAPTER_PREFIX): value for name, value in tensors.items()}

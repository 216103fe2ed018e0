"""What a model is at one moment, and what lies in a folder, to compare with later."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_kedit.engine.weights import model_digest


def surface(model: nn.Module) -> dict[str, Any]:
    """Everything of a stock model that edits may change for a while: weights, ties, hooks, replaced methods."""
    modules = dict(model.named_modules())
    return {
        "weights": model_digest(model),
        "tied": sorted(map(sorted, _tied(model))),
        "kinds": {name: type(module).__qualname__ for name, module in modules.items()},
        "replaced": {
            name: sorted(n for n in ("forward", "generate", "__call__") if n in vars(module))
            for name, module in modules.items()
        },
        "hooks": {
            name: (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
            for name, module in modules.items()
        },
        "training": [name for name, module in modules.items() if module.training],
        "gradients": [name for name, p in model.named_parameters() if not p.requires_grad or p.grad is not None],
    }


def _tied(model: nn.Module) -> list[list[str]]:
    places: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    return [names for names in places.values() if len(names) > 1]


def difference(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """Which parts of two surfaces differ."""
    parts = [name for name in before if before[name] != after[name]]
    return ", ".join(parts) or None


def logits(model: Any, prompts: list[str]) -> torch.Tensor:
    """What a model with its tokenizer says at the end of prompts, ``[prompts, vocabulary]``."""
    rows = []
    for prompt in prompts:
        with torch.no_grad():
            rows.append(model(**model.tokenizer(prompt, return_tensors="pt")).logits[0, -1])
    return torch.stack(rows)


def contents(folder: Path) -> dict[str, str]:
    """Every file, link and folder under a folder, with a digest of what is in it."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link {path.readlink()}"
        elif path.is_dir():
            found[name] = "folder"
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def beside(folder: Path, *expected: str) -> set[str]:
    """What lies in a folder besides what belongs there (names, or their stems)."""
    return {path.name for path in folder.iterdir() if path.stem not in expected}

"""How far editing has moved a model, and whether it is collapsing.

The functions on tensors and numbers are pure. `weight_drift` reads the deltas that an edited model keeps, so it
needs no second model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch

from ...errors import EvaluationError

if TYPE_CHECKING:
    from ...model import EditableModel

PERPLEXITY_WARNING = 2.0
PERPLEXITY_COLLAPSE = 10.0
"""Perplexity relative to the unedited model's from which on a model is flagged. Our own choice: no standard exists."""

DRIFT_WARNING = 1.0
"""Relative change of a weight matrix from which on a model is flagged: the edits outweigh what was there."""


def matrix_drift(original: torch.Tensor, delta: torch.Tensor) -> dict[str, float]:
    """How far one weight matrix was moved.

    Args:
        original: the unedited weight W₀, any shape.
        delta: the change ΔW, same shape.

    Returns:
        ``relative`` ‖ΔW‖_F / ‖W₀‖_F; ``per_element`` ‖ΔW‖_F / numel; ``spectral`` ‖ΔW‖₂; ``stable_rank``
        ‖ΔW‖_F² / ‖ΔW‖₂² (0 for no change); ``changed`` the number of changed elements.

    Raises:
        EvaluationError: if the shapes differ.
    """
    if original.shape != delta.shape:
        raise EvaluationError(f"the change {tuple(delta.shape)} does not fit the weight {tuple(original.shape)}")
    weight, change = original.detach().float().cpu(), delta.detach().float().cpu()
    norm, base = float(change.norm()), float(weight.norm())
    finite = math.isfinite(norm)
    flat = change.reshape(change.shape[0], -1) if change.dim() > 1 else change[None]
    spectral = _spectral_norm(flat) if finite else math.nan
    return {
        "relative": norm / base if base else (0.0 if norm == 0 else math.inf),
        "per_element": norm / max(1, change.numel()),
        "spectral": spectral,
        "stable_rank": (norm / spectral) ** 2 if spectral else 0.0,
        "changed": int((change != 0).sum()),
    }


def _spectral_norm(matrix: torch.Tensor, exact_up_to: int = 1024, iterations: int = 60) -> float:
    """The largest singular value; of large matrices by power iteration, since an SVD would take minutes."""
    if min(matrix.shape) <= exact_up_to:
        return float(torch.linalg.matrix_norm(matrix, 2))
    vector = torch.randn(matrix.shape[1], generator=torch.Generator().manual_seed(0))
    for _ in range(iterations):
        vector = matrix.T @ (matrix @ vector)
        norm = vector.norm()
        if norm == 0:
            return 0.0
        vector = vector / norm
    return float((matrix @ vector).norm())


def weight_drift(model: EditableModel) -> dict[str, dict[str, float]]:
    """`matrix_drift` of every parameter that the edits of a model touch, from the deltas that it keeps.

    Returns:
        Full parameter name → measures; empty for a model without edits in its weights.
    """
    return {
        key: matrix_drift(account.original, account.total)
        for key, account in model.ledger.accounts.items()
        if account.total is not None
    }


def drift_summary(drift: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The largest relative drift, the largest spectral norm, and the number of changed parameters; ``{}`` for none."""
    if not drift:
        return {}
    return {
        "relative": max(d["relative"] for d in drift.values()),
        "spectral": max(d["spectral"] for d in drift.values()),
        "stable_rank": max(d["stable_rank"] for d in drift.values()),
        "changed": sum(int(d["changed"]) for d in drift.values()),
    }


def collapse_state(
    perplexity: float | None,
    base_perplexity: float | None,
    *,
    warning: float = PERPLEXITY_WARNING,
    collapse: float = PERPLEXITY_COLLAPSE,
) -> Literal["ok", "warning", "collapsed"]:
    """Judge a model by its perplexity on a fixed text.

    Args:
        perplexity: now; ``None`` or not finite counts as collapsed.
        base_perplexity: of the unedited model on the same text.
        warning: factor above which the state is ``warning``.
        collapse: factor above which it is ``collapsed``.
    """
    if perplexity is None or not math.isfinite(perplexity):
        return "collapsed"
    if base_perplexity is None or not math.isfinite(base_perplexity):
        return "ok"
    ratio = perplexity / base_perplexity
    return "collapsed" if ratio > collapse else "warning" if ratio > warning else "ok"


def nonfinite_share(logits: torch.Tensor) -> float:
    """Share of logits that are NaN or infinite."""
    return 1.0 - float(logits.isfinite().float().mean()) if logits.numel() else 0.0

"""Changes of finished weight deltas: which part of an update is written.

Pure functions of tensors in functional orientation; they know neither models nor methods.
"""

from __future__ import annotations

import torch

EPSILON = 1e-8
_DIRECT = 1 << 22


def keep_largest_relative(
    delta: torch.Tensor, weight: torch.Tensor, keep: float, *, epsilon: float = EPSILON
) -> torch.Tensor:
    """Keep the entries that change most relative to the weight and zero the others (RECT, arXiv 2401.04700).

    An entry's score is ``|ΔW / (W + ε)|``. Its rank decides, per matrix: entries below the value of rank
    ``(1 − keep) · numel`` (ascending) are dropped; ties with that value stay.

    Args:
        delta: the update, any shape.
        weight: the weight before this update, same shape.
        keep: fraction to keep, in (0, 1].
        epsilon: keeps the quotient finite where a weight is zero.

    Returns:
        The masked update, fp32.
    """
    if tuple(delta.shape) != tuple(weight.shape):
        raise ValueError(f"delta of shape {tuple(delta.shape)} and weight of shape {tuple(weight.shape)} differ")
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be above 0 and at most 1, not {keep!r}")
    change = delta.float()
    score = (change / (weight.float() + epsilon)).abs().nan_to_num(nan=0.0, posinf=torch.inf)  # 0 / 0: no change
    rank = int(score.numel() * (1 - keep) + 1e-6)
    if rank < 1:
        return change.clone()
    return torch.where(score >= kth_smallest(score.flatten(), rank), change, torch.zeros_like(change))


def kth_smallest(values: torch.Tensor, k: int) -> torch.Tensor:
    """The ``k``-th smallest (1-based) of non-negative fp32 numbers, exactly, in linear time for large tensors.

    Bit patterns of non-negative floats are ordered like the floats, so a histogram over their upper halves finds
    the bucket of the wanted rank, and only that bucket has to be searched.

    Args:
        values: ``[n]`` fp32, none negative or NaN.
        k: rank, from 1 to ``n``.
    """
    if values.numel() <= _DIRECT:
        return values.kthvalue(k).values
    bits = values.contiguous().view(torch.int32)
    upper = bits >> 15
    counts = torch.bincount(upper, minlength=1)
    below = counts.cumsum(0)
    bucket = int(torch.searchsorted(below, torch.tensor(k, device=below.device)))
    before = int(below[bucket - 1]) if bucket else 0
    return values[upper == bucket].kthvalue(k - before).values

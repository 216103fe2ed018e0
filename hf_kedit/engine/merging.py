"""Merging several changes of one matrix into one: TIES, DARE, magnitude, sign, linear and spherical.

Each algorithm is a choice of three answers: which entries of a change are kept (the largest, a random part, all),
whether entries must agree on a sign, and whether the sum is divided by the weights that took part.

    TIES   Yadav et al. 2023, "TIES-Merging: Resolving Interference When Merging Models", arXiv 2306.01708
    DARE   Yu et al. 2024, "Language Models are Super Mario", arXiv 2311.03099
    slerp  Shoemake 1985, "Animating Rotation with Quaternion Curves", along the matrices as vectors

This module knows nothing of models or methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from ..errors import ConfigError

MergeAlgorithm = Literal["ties", "magnitude", "magnitude_norm", "sign", "dare_ties", "dare_linear", "linear", "slerp"]
_PARALLEL = 1 - 1e-6


@dataclass(frozen=True)
class _Rule:
    """How the elementwise algorithms differ."""

    keep: Literal["largest", "random", "all"]
    consensus: bool
    normalise: bool


_RULES: dict[str, _Rule] = {
    "ties": _Rule("largest", consensus=True, normalise=True),
    "magnitude": _Rule("largest", consensus=False, normalise=False),
    "magnitude_norm": _Rule("largest", consensus=False, normalise=True),
    "sign": _Rule("all", consensus=True, normalise=True),
    "dare_ties": _Rule("random", consensus=True, normalise=False),
    "dare_linear": _Rule("random", consensus=False, normalise=False),
    "linear": _Rule("all", consensus=False, normalise=True),
}


def merge_deltas(
    deltas: Sequence[torch.Tensor],
    weights: Sequence[float],
    algorithm: MergeAlgorithm = "ties",
    *,
    density: float = 1.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Merge changes of one matrix.

    Args:
        deltas: the changes, all of one shape; floating point.
        weights: one positive number per change. Only their ratios matter where the sum is normalised (``ties``,
            ``magnitude_norm``, ``sign``, ``linear``) and for ``slerp``.
        algorithm: see the module.
        density: part of the entries that is kept of each change, in (0, 1]; of no effect on ``sign``, ``linear``
            and ``slerp``.
        generator: of the random choice of the DARE algorithms, on the CPU.

    Returns:
        The merged change, fp32, of the same shape.

    Raises:
        ConfigError: for an unknown algorithm, no change, weights that do not fit, or a density out of range.
    """
    _check(deltas, weights, algorithm, density)
    changes = [d.float() for d in deltas]
    if algorithm == "slerp":
        return _slerp_all(changes, weights)
    rule = _RULES[algorithm]
    if rule.keep == "largest":
        changes = [keep_largest(c, density) for c in changes]
    elif rule.keep == "random":
        changes = [keep_random(c, density, generator) for c in changes]
    total = torch.zeros_like(changes[0])
    for change, weight in zip(changes, weights, strict=True):
        total = total.add(change, alpha=weight)
    if not rule.consensus:
        return total / sum(weights) if rule.normalise else total
    elected = torch.where(total >= 0, 1.0, -1.0)
    agreed, part = torch.zeros_like(total), torch.zeros_like(total)
    for change, weight in zip(changes, weights, strict=True):
        agrees = change.sign() == elected
        agreed = agreed + torch.where(agrees, weight * change, 0.0)
        part = part + weight * agrees
    return agreed / torch.where(part > 0, part, 1.0) if rule.normalise else agreed


def keep_largest(change: torch.Tensor, density: float) -> torch.Tensor:
    """Return the change with all but the ``⌊density · numel⌋`` entries of largest magnitude set to zero."""
    count = int(density * change.numel())
    flat = change.flatten()
    kept = flat.abs().topk(count).indices
    return torch.zeros_like(flat).scatter(0, kept, flat[kept]).view_as(change)


def keep_random(change: torch.Tensor, density: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """Keep each entry with probability ``density``, divided by it, so that the expectation stays (DARE)."""
    drawn = torch.rand(change.shape, generator=generator).to(change.device)
    return torch.where(drawn < density, change / density, 0.0)


def _slerp_all(changes: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Fold the changes pairwise, each step at the fraction that its weight has of the weights so far."""
    merged, so_far = changes[0], weights[0]
    for change, weight in zip(changes[1:], weights[1:], strict=True):
        so_far += weight
        merged = slerp(merged, change, weight / so_far)
    return merged


def slerp(first: torch.Tensor, second: torch.Tensor, t: float) -> torch.Tensor:
    """Interpolate along the great circle between two tensors seen as vectors; ``t = 0`` is the first.

    Norms are interpolated linearly. Where no circle is defined (a zero vector, parallel or opposite vectors), the
    interpolation is linear.
    """
    sizes = first.norm(), second.norm()
    straight = (1 - t) * first + t * second
    if min(float(s) for s in sizes) == 0.0:
        return straight
    one, two = first / sizes[0], second / sizes[1]
    cosine = (one * two).sum()
    if float(cosine.abs()) > _PARALLEL:
        return straight
    angle = cosine.acos()
    direction = (((1 - t) * angle).sin() * one + (t * angle).sin() * two) / angle.sin()
    return ((1 - t) * sizes[0] + t * sizes[1]) * direction


def _check(deltas: Sequence[torch.Tensor], weights: Sequence[float], algorithm: str, density: float) -> None:
    if algorithm not in get_args(MergeAlgorithm):
        raise ConfigError(f"unknown merge algorithm {algorithm!r}; known: {', '.join(get_args(MergeAlgorithm))}")
    if not deltas:
        raise ConfigError("there is nothing to merge")
    if len({tuple(d.shape) for d in deltas}) > 1:
        raise ConfigError(f"changes of different shapes cannot be merged: {[tuple(d.shape) for d in deltas]}")
    if len(weights) != len(deltas) or any(not w > 0 for w in weights):
        raise ConfigError(f"merging {len(deltas)} changes needs as many positive weights, not {list(weights)}")
    if not 0 < density <= 1:
        raise ConfigError(f"the density of a merge must be above 0 and at most 1, not {density!r}")

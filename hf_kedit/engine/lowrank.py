"""Low-rank matrices as factors: shortening a stack of factors, factoring a dense matrix, padding to a rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch

STACK_TOLERANCE = 1e-10
"""Singular values below this part of the largest are rounding of the fp64 arithmetic, not part of a stack."""


@dataclass
class Factors:
    """``left rightᵀ ≈ Δ``, and how much of Δ they leave out.

    Args:
        left: ``[d_out, r]`` fp32.
        right: ``[d_in, r]`` fp32.
        loss: ``‖Δ − left rightᵀ‖ / ‖Δ‖`` (Frobenius) by the singular values that were left out; 0 if none was.
    """

    left: torch.Tensor
    right: torch.Tensor
    loss: float = 0.0

    @property
    def rank(self) -> int:
        """Number of columns."""
        return self.left.shape[1]

    def padded(self, rank: int) -> Factors:
        """The same product with zero columns up to ``rank``."""
        extra = rank - self.rank
        if extra < 0:
            raise ValueError(f"factors of rank {self.rank} cannot be padded to {rank}")
        pad = torch.nn.functional.pad
        return Factors(pad(self.left, (0, extra)), pad(self.right, (0, extra)), self.loss)


def shorten(left: torch.Tensor, right: torch.Tensor, rank: int | None = None) -> Factors:
    """The fewest columns with the same product, or the best approximation with ``rank`` of them.

    QR of both factors and the SVD of the small core ``R_U R_Vᵀ``, all in fp64; the product is never formed, unless
    there are more columns than rows. The singular values are split evenly between the factors.

    Args:
        left: ``[d_out, n]``.
        right: ``[d_in, n]``.
        rank: the most columns to return; ``None``: as many as the product needs.
    """
    q_left, r_left = _triangular(left.double())
    q_right, r_right = _triangular(right.double())
    u, sigma, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    u, v = (side if q is None else q @ side for q, side in ((q_left, u), (q_right, vh.T)))
    return _keep(u, sigma, v, rank, STACK_TOLERANCE)


def _triangular(factor: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
    """``Q`` and ``R``; ``None`` for the identity where QR makes nothing smaller: more columns than rows."""
    if factor.shape[1] >= factor.shape[0]:
        return None, factor
    q, r = torch.linalg.qr(factor)
    return q, r


def factorise(matrix: torch.Tensor, rank: int | None = None) -> Factors:
    """Factors of a dense matrix ``[d_out, d_in]`` by its SVD in fp64.

    Args:
        matrix: Δ, fp32.
        rank: the most columns to return; ``None``: all whose singular value is above fp32 rounding.
    """
    u, sigma, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return _keep(u, sigma, vh.T, rank, max(matrix.shape) * torch.finfo(torch.float32).eps)


def _keep(u: torch.Tensor, sigma: torch.Tensor, v: torch.Tensor, rank: int | None, tolerance: float) -> Factors:
    count = int((sigma > tolerance * sigma.max()).sum()) if sigma.numel() else 0
    kept = count if rank is None else min(count, rank)
    total = float(sigma.square().sum())
    loss = (float(sigma[kept:count].square().sum()) / total) ** 0.5 if total else 0.0
    root = sigma[:kept].sqrt()
    return Factors((u[:, :kept] * root).float(), (v[:, :kept] * root).float(), loss)

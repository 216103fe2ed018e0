"""Linear algebra of weight updates: factorisations of a second moment, rank-one and ridge updates.

Everything is float64. The second moment ``C`` is factored once per module; a batch of ``n`` keys then costs two
triangular solves and an ``n × n`` system (Woodbury), not a ``d × d`` one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from ..engine.devices import where_there_is_room
from ..errors import StatisticsError
from ..logging import get_logger, warn_once

logger = get_logger(__name__)
FALLBACK_RIDGE = 1e-4
_AT_ONCE = 1024
"""Keys that are held in float64 at a time where there are more of them than dimensions."""


@dataclass(frozen=True)
class MomentFactor:
    """A factored second moment, ready to solve ``C x = b`` on the device where the factor is.

    Args:
        kind: ``"identity"``, ``"cholesky"`` or ``"lu"``.
        factor: the factor, float64.
        pivots: of the LU decomposition.
        ridge: what was added to the diagonal, relative to the mean diagonal.
    """

    kind: Literal["identity", "cholesky", "lu"]
    factor: torch.Tensor | None = None
    pivots: torch.Tensor | None = None
    ridge: float = 0.0

    def take(self, vectors: torch.Tensor) -> torch.Tensor:
        """The vectors as they are solved with: float64, beside the factor (the CPU for the identity)."""
        device = self.factor.device if self.factor is not None else torch.device("cpu")
        return vectors.to(device).double()

    def matrix(self, width: int) -> torch.Tensor:
        """``C`` itself, ``[d, d]`` float64, put together again.

        Args:
            width: ``d`` (the identity knows none).
        """
        if self.kind == "identity" or self.factor is None:
            return torch.eye(width, dtype=torch.float64)
        if self.kind == "cholesky":
            return self.factor @ self.factor.mT
        assert self.pivots is not None
        pivot, lower, upper = torch.lu_unpack(self.factor, self.pivots)
        return pivot @ lower @ upper

    def solve(self, b: torch.Tensor) -> torch.Tensor:
        """Return ``C⁻¹ b`` for ``b`` ``[d, n]`` as `take` gives it."""
        if self.kind == "identity" or self.factor is None:
            return b
        if self.kind == "cholesky":  # two triangular solves: cholesky_solve copies the factor, which costs more
            half = torch.linalg.solve_triangular(self.factor, b, upper=False)
            return torch.linalg.solve_triangular(self.factor.mT, half, upper=True)
        assert self.pivots is not None
        return torch.linalg.lu_solve(self.factor, self.pivots, b)


IDENTITY = MomentFactor("identity")


def factor_beside(model: torch.nn.Module, moment: torch.Tensor, *, ridge: float, name: str) -> MomentFactor:
    """`factor_moment` on the model's accelerator, if it has one that knows float64 and has room, else on the CPU."""
    return where_there_is_room(model, partial(factor_moment, ridge=ridge, name=name), moment)


def factor_moment(moment: torch.Tensor, *, ridge: float = 0.0, name: str = "the second moment") -> MomentFactor:
    """Factor a symmetric second moment ``C [d, d]``.

    Cholesky first; where rounding made ``C`` slightly indefinite, LU gives the solution of the matrix as it is;
    where it is singular (neurons that never fire), a small ridge is added and the user is told.

    Args:
        moment: ``[d, d]``.
        ridge: added to the diagonal, relative to its mean.
        name: for messages.

    Raises:
        StatisticsError: if the matrix holds NaN or is zero.
    """
    matrix = moment.double()
    mean = float(matrix.diagonal().mean())
    if not bool(torch.isfinite(matrix).all()) or mean <= 0:
        raise StatisticsError(f"{name} is empty or not finite; compute the statistics again")
    if ridge:
        matrix = matrix + ridge * mean * torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) == 0:
        return MomentFactor("cholesky", factor, ridge=ridge)
    if bool((matrix.diagonal() > 1e-12 * mean).all()):
        lu, pivots, status = torch.linalg.lu_factor_ex(matrix)
        if int(status) == 0 and float(lu.diagonal().abs().min()) > 1e-12 * mean:
            warn_once(
                logger, f"{name} is not positive definite (rounding, or few tokens); using LU instead of Cholesky"
            )
            return MomentFactor("lu", lu, pivots, ridge)
    warn_once(
        logger,
        f"{name} is singular (neurons that never fire, or few tokens): {FALLBACK_RIDGE:g} of its mean diagonal is"
        " added. More tokens (stats_tokens) or your own stats_ridge avoid this.",
    )
    return factor_moment(moment, ridge=max(ridge * 10, FALLBACK_RIDGE), name=name)


def ridge_columns(factor: MomentFactor, keys: torch.Tensor, weight: float) -> torch.Tensor:
    """Return ``A = (λC + K Kᵀ)⁻¹ K`` ``[d, n]`` for keys ``[d, n]`` (MEMIT eq. 14).

    By Woodbury for fewer keys than dimensions: ``A = X (λ I + Kᵀ X)⁻¹`` with ``X = C⁻¹ K``, float64. Else from the
    ``d × d`` system, which no number of keys makes larger; float32, a part of the keys at a time.
    """
    if keys.shape[1] > keys.shape[0]:
        return _columns_of_many(factor, keys, weight)
    k = factor.take(keys)
    x = factor.solve(k)
    inner = weight * torch.eye(k.shape[1], dtype=k.dtype, device=k.device) + k.T @ x
    if factor.kind != "lu":  # symmetric and positive definite
        small, info = torch.linalg.cholesky_ex(inner)
        if int(info) == 0:
            return torch.cholesky_solve(x.T, small).T
    return torch.linalg.solve(inner, x, left=False)


def _columns_of_many(factor: MomentFactor, keys: torch.Tensor, weight: float) -> torch.Tensor:
    """`ridge_columns` for more keys than dimensions."""
    system, parts = weight * factor.matrix(keys.shape[0]), keys.split(_AT_ONCE, dim=1)
    for part in parts:
        k = factor.take(part)
        system += k @ k.T
    lower, info = torch.linalg.cholesky_ex((system + system.T) / 2)
    if int(info) == 0:
        return torch.cat([torch.cholesky_solve(factor.take(part), lower).float() for part in parts], dim=1)
    lu, pivots = torch.linalg.lu_factor(system)  # C is not positive definite
    return torch.cat([torch.linalg.lu_solve(lu, pivots, factor.take(part)).float() for part in parts], dim=1)


def equality_columns(
    factor: MomentFactor, keys: torch.Tensor, weight: float, ridge: float, spared: torch.Tensor | None = None
) -> torch.Tensor:
    """Return ``A = X (Kᵀ X + ridge · I)⁻¹`` with ``X = (λC)⁻¹ K``, ``[d, n]``: ``Aᵀ K = I`` without a ridge (EMMET).

    Where the ``n × n`` matrix is singular (equal keys, no ridge), its pseudo-inverse stands in.

    Args:
        factor: of ``C``.
        keys: ``K`` ``[d, n]``.
        weight: λ.
        ridge: added to the diagonal of ``Kᵀ X``.
        spared: further keys ``K_e`` ``[d, m]`` that weigh one each: ``X = (λC + K_e K_eᵀ)⁻¹ K``.
    """
    k = factor.take(keys)
    x = factor.solve(k) / weight
    if spared is not None:  # Woodbury
        x = x - ridge_columns(factor, spared, weight).to(x) @ (factor.take(spared).T @ x)
    inner = k.T @ x + ridge * torch.eye(k.shape[1], dtype=k.dtype, device=k.device)
    inner = (inner + inner.T) / 2
    solution, info = torch.linalg.solve_ex(inner, x, left=False)
    if int(info) == 0 and bool(torch.isfinite(solution).all()) and float(torch.linalg.cond(inner)) < 1e14:
        return solution
    return x @ torch.linalg.pinv(inner, hermitian=True)


def ridge_solve(keys: torch.Tensor, ridge: torch.Tensor | float, values: torch.Tensor) -> torch.Tensor:
    """``(K Kᵀ + λ I)⁻¹ V`` in float64, by a system of the smaller of the key matrix's sides.

    Args:
        keys: ``K`` ``[n, m]``.
        ridge: λ, a scalar above 0; differentiable, as are the others.
        values: ``V`` ``[n, d]``.
    """
    k, v = keys.double(), values.double()
    ridge = ridge.double() if isinstance(ridge, torch.Tensor) else ridge
    n, m = k.shape
    if n <= m:
        return torch.linalg.solve(k @ k.T + ridge * torch.eye(n, dtype=k.dtype, device=k.device), v)
    inner = k.T @ k + ridge * torch.eye(m, dtype=k.dtype, device=k.device)
    return (v - k @ torch.linalg.solve(inner, k.T @ v)) / ridge  # Woodbury's identity

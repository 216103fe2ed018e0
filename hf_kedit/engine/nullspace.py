"""The directions that old keys hardly use, and updates that stay inside them (AlphaEdit).

From the eigendecomposition of a second moment, the space of small eigenvalues is kept as an orthonormal basis, or
as that of its complement where this is thinner; the ``d × d`` projector itself is never formed. Updates are solved
for in the space of the keys: with ``P`` the projector and ``K_a = [K_old, K]`` all keys,

    A = (P K_a K_aᵀ P + λ I)⁻¹ P K = P K_a (λ I + K_aᵀ P K_a)⁻¹ E,   E the columns of K,

so a batch costs an ``m × m`` system, ``m`` the number of keys, and no ``d × d`` state is carried from batch to
batch. Everything is float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import NonFiniteError, StatisticsError


@dataclass(frozen=True)
class NullSpace:
    """An orthogonal projector ``P`` onto the directions of small second moment.

    Args:
        basis: orthonormal columns, ``[d, r]`` float64.
        complement: ``P = I − B Bᵀ`` instead of ``P = B Bᵀ``.
        kept: dimension of the space that ``P`` projects onto.
        threshold: eigenvalues below it were kept.
        energy: part of the trace of the second moment that lies inside.
    """

    basis: torch.Tensor
    complement: bool
    kept: int
    threshold: float
    energy: float

    @property
    def width(self) -> int:
        """``d``."""
        return self.basis.shape[0]

    def project(self, vectors: torch.Tensor) -> torch.Tensor:
        """``P x`` for the columns of ``vectors`` ``[d, n]``; float64, on the basis' device."""
        x = vectors.to(self.basis)
        inside = self.basis @ (self.basis.T @ x)
        return x - inside if self.complement else inside

    def matrix(self) -> torch.Tensor:
        """``P`` as a matrix ``[d, d]`` (tests)."""
        return self.project(torch.eye(self.width, dtype=self.basis.dtype, device=self.basis.device))


def null_space(
    moment: torch.Tensor,
    *,
    threshold: float | None = None,
    fraction: float | None = None,
    name: str = "the second moment",
) -> NullSpace:
    """Split the space of keys by the eigenvalues of their second moment.

    Args:
        moment: ``C`` ``[d, d]``, a mean.
        threshold: keep the directions with an eigenvalue below this absolute value (as published; depends on the
            scale of the keys).
        fraction: keep as many directions, from the smallest eigenvalue on, as together hold at most this part of
            the trace. Exactly one of both is given.
        name: for messages.

    Raises:
        StatisticsError: if nothing would be kept.
        NonFiniteError: if the matrix is not finite.
    """
    if (threshold is None) == (fraction is None):
        raise ValueError("give either a threshold or a fraction")
    matrix = moment.double()
    if not bool(torch.isfinite(matrix).all()):
        raise NonFiniteError(f"{name} is not finite; compute the statistics again")
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)  # ascending
    share = values.clamp_min(0).cumsum(0) / values.clamp_min(0).sum()
    if threshold is not None:
        kept = int((values < threshold).sum())
    else:
        kept = int((share <= fraction).sum())
    if kept == 0:
        raise StatisticsError(
            f"{name}: no direction is below the null-space limit (eigenvalues {float(values[0]):.3g} …"
            f" {float(values[-1]):.3g}); set a larger nullspace_threshold or nullspace_fraction"
        )
    width = values.numel()
    complement = kept > width / 2
    basis = vectors[:, kept:] if complement else vectors[:, :kept]
    limit = float(values[kept]) if kept < width else float("inf")
    return NullSpace(
        basis.contiguous(), complement, kept, limit if threshold is None else threshold, float(share[kept - 1])
    )


class KeySpace:
    """Solves for updates of one matrix inside a null space, beside the keys of earlier updates.

    Projections of earlier keys are remembered; a batch projects only the keys that came since.

    Args:
        space: the projector.
        ridge: λ.
    """

    def __init__(self, space: NullSpace, ridge: float):
        self.space, self.ridge = space, ridge
        self._seen: torch.Tensor | None = None
        self._projected: torch.Tensor | None = None

    def columns(self, keys: torch.Tensor, earlier: torch.Tensor | None = None) -> torch.Tensor:
        """Return ``A`` ``[d, n]`` float64, with ``ΔW = R Aᵀ``.

        Args:
            keys: ``K`` ``[d, n]`` of this batch.
            earlier: keys that must keep their values, ``[d, m]``.
        """
        new = self.space.project(keys)
        old = self._earlier(earlier)
        everything = new if old is None else torch.cat([old, new], dim=1)
        count, total = new.shape[1], everything.shape[1]
        if total > self.space.width:  # more keys than dimensions: the d × d system is the smaller one
            system = everything @ everything.T
            system.diagonal().add_(self.ridge)
            return torch.cholesky_solve(new, torch.linalg.cholesky(system))
        gram = everything.T @ everything
        gram.diagonal().add_(self.ridge)
        chosen = torch.zeros(total, count, dtype=gram.dtype, device=gram.device)
        chosen[total - count :] = torch.eye(count, dtype=gram.dtype, device=gram.device)
        return everything @ torch.cholesky_solve(chosen, torch.linalg.cholesky(gram))

    def _earlier(self, keys: torch.Tensor | None) -> torch.Tensor | None:
        if keys is None or not keys.shape[1]:
            self._seen = self._projected = None
            return None
        done = 0
        if self._seen is not None and self._seen.shape[1] <= keys.shape[1]:
            done = self._seen.shape[1] if torch.equal(self._seen, keys[:, : self._seen.shape[1]]) else 0
        if done < keys.shape[1]:
            fresh = self.space.project(keys[:, done:])
            assert done == 0 or self._projected is not None
            self._projected = torch.cat([self._projected, fresh], dim=1) if done else fresh  # type: ignore[list-item]
            self._seen = keys
        return self._projected

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

BLOCK = 128


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

    Earlier keys are taken in by blocks of `BLOCK`: each is projected, and the Cholesky factor of
    ``K_eᵀ P K_e + λ I`` extended by it, once. What is kept is a function of the keys alone, however many calls they
    came in: a run that is saved and continued gives the same bits as one that was not interrupted.

    Args:
        space: the projector.
        ridge: λ.
    """

    def __init__(self, space: NullSpace, ridge: float):
        self.space, self.ridge = space, ridge
        self._seen: torch.Tensor | None = None  # earlier keys that were taken in, [d, m], m a multiple of BLOCK
        self._projected: torch.Tensor | None = None  # P of them
        self._factor: torch.Tensor | None = None  # lower Cholesky factor of their Gram matrix + λ I, [m, m]

    def columns(self, keys: torch.Tensor, earlier: torch.Tensor | None = None) -> torch.Tensor:
        """Return ``A`` ``[d, n]`` float64, with ``ΔW = R Aᵀ``.

        Args:
            keys: ``K`` ``[d, n]`` of this batch.
            earlier: keys that must keep their values, ``[d, m]``.
        """
        count, before = keys.shape[1], 0 if earlier is None else earlier.shape[1]
        rest = keys
        if earlier is not None:
            whole = before - before % BLOCK
            self._take_in(earlier[:, :whole])
            rest = torch.cat([earlier[:, whole:].to(keys), keys], dim=1)
        else:
            self._forget(0)
        new, old = self.space.project(rest), self._projected
        if before + count > self.space.width:  # more keys than dimensions: the d × d system is the smaller one
            everything = new if old is None else torch.cat([old, new], dim=1)
            system = everything @ everything.T
            system.diagonal().add_(self.ridge)
            return torch.cholesky_solve(new[:, -count:], torch.linalg.cholesky(system))
        across, corner = self._extension(new)
        chosen = torch.zeros(new.shape[1], count, dtype=new.dtype, device=new.device)
        chosen[-count:] = torch.eye(count, dtype=new.dtype, device=new.device)
        weights = torch.cholesky_solve(chosen, corner)
        found = new @ weights
        if old is None or self._factor is None:
            return found
        return found - old @ torch.linalg.solve_triangular(self._factor.mT, across @ weights, upper=True)

    def _extension(self, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The blocks ``L₂₁ᵀ`` ``[m, n]`` and ``L₂₂`` ``[n, n]`` by which projected keys extend the Cholesky factor."""
        gram = new.T @ new
        gram.diagonal().add_(self.ridge)
        if self._projected is None or self._factor is None:
            return gram[:0], torch.linalg.cholesky(gram)
        across = torch.linalg.solve_triangular(self._factor, self._projected.T @ new, upper=False)
        return across, torch.linalg.cholesky(gram - across.T @ across)

    def _take_in(self, keys: torch.Tensor) -> None:
        """Bring what is kept up to date with these earlier keys, ``[d, m]``, ``m`` a multiple of `BLOCK`."""
        known = 0
        if self._seen is not None:
            limit = min(self._seen.shape[1], keys.shape[1])
            while known < limit and torch.equal(
                self._seen[:, known : known + BLOCK], keys[:, known : known + BLOCK].to(self._seen)
            ):
                known += BLOCK
        self._forget(known)
        for start in range(known, keys.shape[1], BLOCK):
            new = self.space.project(keys[:, start : start + BLOCK])
            across, corner = self._extension(new)
            if self._projected is None or self._factor is None:
                self._projected, self._factor = new, corner
                continue
            above = torch.zeros_like(across)
            top, bottom = torch.cat([self._factor, above], dim=1), torch.cat([across.T, corner], dim=1)
            self._factor = torch.cat([top, bottom])
            self._projected = torch.cat([self._projected, new], dim=1)
        self._seen = keys.clone() if keys.shape[1] else None

    def _forget(self, known: int) -> None:
        """Keep only the first ``known`` keys; the leading part of a Cholesky factor is the factor of that part."""
        if not known or self._projected is None or self._factor is None:
            self._seen = self._projected = self._factor = None
        elif known < self._projected.shape[1]:
            self._projected, self._factor = self._projected[:, :known], self._factor[:known, :known]

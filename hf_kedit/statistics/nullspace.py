"""The directions that old keys hardly use, and updates that stay inside them (AlphaEdit).

From the eigendecomposition of a second moment, the space of small eigenvalues is kept as an orthonormal basis, or
as that of its complement where this is thinner; the ``d × d`` projector itself is never formed. Updates are solved
for in the space of the keys: with ``P`` the projector and ``K_a = [K_old, K]`` all keys,

    A = (P K_a K_aᵀ P + λ I)⁻¹ P K = P K_a (λ I + K_aᵀ P K_a)⁻¹ E,   E the columns of K,

so a batch costs an ``m × m`` system, ``m`` the number of keys, and no ``d × d`` state is carried from batch to
batch. ``P`` itself is never applied to the keys: inner products need only their coordinates ``c = Bᵀ K`` in the basis,

    K_aᵀ P K_b = c_aᵀ c_b   or, with the basis of the complement,   K_aᵀ K_b − c_aᵀ c_b,

and one product with ``B`` at the end brings the answer back. Everything is float64.

A projector that is only nearly right lets old knowledge leak. `NullSpace.weighed` adds what the change does to old
keys inside the free directions (BetaEdit, arXiv 2605.09285; with ``P = I`` the system of RLSEdit, arXiv 2601.15686),

    A = (P (K_a K_aᵀ + λ₁ C) + λ₂ I)⁻¹ P K E = B' (I + c'_a c'_aᵀ)⁻¹ c',   c' = B'ᵀ K,

by another basis of the same directions: ``B' = B L⁻ᵀ`` with ``L Lᵀ = λ₁ Bᵀ C B + λ₂ I``. It is the solution above with
``B'`` in the place of ``B``, and a ridge of 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..errors import NonFiniteError, StatisticsError

BLOCK = 128
_AT_ONCE = 1024
PART = 64


@dataclass(frozen=True)
class NullSpace:
    """An orthogonal projector ``P`` onto the directions of small second moment.

    Args:
        basis: orthonormal columns, ``[d, r]`` float64.
        complement: ``P = I − B Bᵀ`` instead of ``P = B Bᵀ``.
        kept: dimension of the space that ``P`` projects onto.
        threshold: eigenvalues below it were kept.
        energy: part of the trace of the second moment that lies inside.
        orthonormal: whether the columns are orthonormal; they are not once the space is `weighed`.
    """

    basis: torch.Tensor
    complement: bool
    kept: int
    threshold: float
    energy: float
    orthonormal: bool = True

    @classmethod
    def everything(cls, moment: torch.Tensor) -> NullSpace:
        """All directions of a second moment ``[d, d]``: ``P = I``."""
        eye = torch.eye(moment.shape[0], dtype=torch.float64, device=moment.device)
        return cls(eye, False, len(eye), float("inf"), 1.0)

    @property
    def width(self) -> int:
        """``d``."""
        return self.basis.shape[0]

    def project(self, vectors: torch.Tensor) -> torch.Tensor:
        """``P x`` for the columns of ``vectors`` ``[d, n]``; float64, on the basis' device."""
        x = vectors.to(self.basis)
        inside = self.basis @ (self.basis.T @ x)
        return x - inside if self.complement else inside

    def weighed(self, moment: torch.Tensor, weight: float, ridge: float) -> NullSpace:
        """The same directions, measured by what a change along them does to old keys; to be solved with a ridge of 1.

        Args:
            moment: ``C`` ``[d, d]``.
            weight: λ₁.
            ridge: λ₂.
        """
        if self.complement:
            raise ValueError("weigh a basis of the free directions, not of their complement")
        inside = weight * self.basis.T @ (moment.to(self.basis) @ self.basis)
        lower = torch.linalg.cholesky(inside + ridge * torch.eye(len(inside)).to(inside))
        return replace(
            self,
            basis=torch.linalg.solve_triangular(lower, self.basis.T, upper=False).T.contiguous(),
            orthonormal=False,
        )

    def matrix(self) -> torch.Tensor:
        """``P`` as a matrix ``[d, d]`` (tests)."""
        return self.project(torch.eye(self.width, dtype=self.basis.dtype, device=self.basis.device))


def null_space(
    moment: torch.Tensor,
    *,
    threshold: float | None = None,
    fraction: float | None = None,
    name: str = "the second moment",
    thin: bool = True,
) -> NullSpace:
    """Split the space of keys by the eigenvalues of their second moment.

    Args:
        moment: ``C`` ``[d, d]``, a mean.
        threshold: keep the directions with an eigenvalue below this absolute value (as published; depends on the
            scale of the keys).
        fraction: keep as many directions, from the smallest eigenvalue on, as together hold at most this part of
            the trace. Exactly one of both is given.
        name: for messages.
        thin: keep the basis of the complement where it has fewer columns.

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
    complement = thin and kept > width / 2
    basis = vectors[:, kept:] if complement else vectors[:, :kept]
    limit = float(values[kept]) if kept < width else float("inf")
    return NullSpace(
        basis.contiguous(), complement, kept, limit if threshold is None else threshold, float(share[kept - 1])
    )


class KeySpace:
    """Solves for updates of one matrix inside a null space, beside the keys of earlier updates.

    Coordinates of keys are computed once, by parts of `PART` positions that are always run at full size, so that a
    key's bits depend on its place among the keys and on nothing else. Earlier keys are taken in by blocks of `BLOCK`:
    each extends the Cholesky factor of ``K_eᵀ P K_e + λ I``, once. What is kept is a function of the keys alone,
    however many calls they came in: a run that is saved and continued gives the same bits as one that was not
    interrupted.

    Args:
        space: the projector.
        ridge: λ.
    """

    def __init__(self, space: NullSpace, ridge: float):
        self.space, self.ridge = space, ridge
        self._seen: torch.Tensor | None = None  # keys whose coordinates are known, [d, m], as they were given
        self._rows: torch.Tensor = space.basis.new_zeros(0, space.width)  # the same, [m, d]; for a complement only
        self._coordinates: torch.Tensor = space.basis.new_zeros(0, space.basis.shape[1])  # [m, r]
        self._factor: torch.Tensor = space.basis.new_zeros(0, 0)  # of the first keys, a multiple of BLOCK

    def columns(self, keys: torch.Tensor, earlier: torch.Tensor | None = None) -> torch.Tensor:
        """Return ``A`` ``[d, n]`` float64, with ``ΔW = R Aᵀ``.

        Args:
            keys: ``K`` ``[d, n]`` of this batch.
            earlier: keys that must keep their values, ``[d, m]``.
        """
        count, before = keys.shape[1], 0 if earlier is None else earlier.shape[1]
        everything = keys if earlier is None else torch.cat([earlier.to(keys), keys], dim=1)
        if before + count > self.space.width:
            return self._columns_of_many(everything, count)
        self._read(everything, before)
        for start in range(self._factor.shape[0], before - before % BLOCK, BLOCK):
            self._take_in(start, start + BLOCK)
        total, taken = before + count, self._factor.shape[0]
        across, corner = self._extension(taken, total)
        chosen = torch.zeros(total - taken, count, dtype=corner.dtype, device=corner.device)
        chosen[-count:] = torch.eye(count, dtype=corner.dtype, device=corner.device)
        weights = torch.cholesky_solve(chosen, corner)
        if taken:
            old = torch.linalg.solve_triangular(self._factor.mT, across @ weights, upper=True)
            weights = torch.cat([-old, weights])
        return self._combined(weights)

    def _columns_of_many(self, keys: torch.Tensor, count: int) -> torch.Tensor:
        """The columns of the last ``count`` of more keys than there are dimensions, by the ``d × d`` system."""
        if not self.space.orthonormal:
            basis = self.space.basis
            coordinates = basis.T @ keys.to(basis)
            system = coordinates @ coordinates.T
            system.diagonal().add_(self.ridge)
            return basis @ torch.cholesky_solve(coordinates[:, -count:], torch.linalg.cholesky(system))
        system = self.ridge * torch.eye(self.space.width, dtype=torch.float64, device=self.space.basis.device)
        for part in keys.split(_AT_ONCE, dim=1):
            projected = self.space.project(part)
            system += projected @ projected.T
        lower = torch.linalg.cholesky(system)
        new = keys[:, -count:].split(_AT_ONCE, dim=1)
        return torch.cat([torch.cholesky_solve(self.space.project(part), lower) for part in new], dim=1)

    def _read(self, keys: torch.Tensor, before: int) -> None:
        """Bring coordinates up to date with all keys of a call, ``[d, m]``; those of other keys are forgotten.

        So is what the factor holds beyond the first ``before``: earlier keys that were taken back may be new ones now.
        """
        known = 0
        if self._seen is not None:
            limit = min(self._seen.shape[1], keys.shape[1])
            while known < limit:
                stop = min(known + PART, limit)
                if not torch.equal(self._seen[:, known:stop], keys[:, known:stop].to(self._seen)):
                    break
                known = stop
        still = min(known, before)
        taken = min(self._factor.shape[0], still - still % BLOCK)
        self._factor = self._factor[:taken, :taken]  # the leading part of a Cholesky factor is that part's factor
        basis, total = self.space.basis, keys.shape[1]
        coordinates = [self._coordinates[:known]]
        for start in range(known - known % PART, total, PART):
            part = basis.new_zeros(PART, self.space.width)
            stop = min(start + PART, total)
            part[: stop - start] = keys[:, start:stop].T
            coordinates.append((part @ basis)[max(known - start, 0) : stop - start])
        self._coordinates = torch.cat(coordinates)
        if self.space.complement:
            self._rows = torch.cat([self._rows[:known], keys[:, known:].T.to(basis)])
        self._seen = keys.clone()

    def _products(self, a: slice, b: slice) -> torch.Tensor:
        """``K_aᵀ P K_b``."""
        inside = self._coordinates[a] @ self._coordinates[b].T
        return self._rows[a] @ self._rows[b].T - inside if self.space.complement else inside

    def _combined(self, weights: torch.Tensor) -> torch.Tensor:
        """``P K W`` ``[d, n]`` for weights ``[m, n]`` of the keys."""
        inside = (weights.T @ self._coordinates) @ self.space.basis.T
        return (weights.T @ self._rows - inside).T if self.space.complement else inside.T

    def _extension(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The blocks ``L₂₁ᵀ`` ``[m, n]`` and ``L₂₂`` ``[n, n]`` by which keys extend the Cholesky factor."""
        new = slice(start, stop)
        gram = self._products(new, new)
        gram.diagonal().add_(self.ridge)
        across = torch.linalg.solve_triangular(self._factor, self._products(slice(start), new), upper=False)
        return across, torch.linalg.cholesky(gram - across.T @ across)

    def _take_in(self, start: int, stop: int) -> None:
        """Extend the factor by a block of keys."""
        across, corner = self._extension(start, stop)
        above = torch.cat([self._factor, torch.zeros_like(across)], dim=1)
        self._factor = torch.cat([above, torch.cat([across.T, corner], dim=1)])

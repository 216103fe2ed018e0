"""The null space of old keys, and the key-space solver against the dense formula."""

from __future__ import annotations

import pytest
import torch

from hf_kedit.errors import NonFiniteError, StatisticsError
from hf_kedit.statistics import solve
from hf_kedit.statistics.nullspace import KeySpace, NullSpace, null_space
from hf_kedit.statistics.solve import IDENTITY, equality_columns, factor_moment, ridge_columns, ridge_solve

D = 24


def moment(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(D, 400, generator=generator, dtype=torch.float64)
    keys *= torch.logspace(-2, 1, D, dtype=torch.float64).unsqueeze(1)
    rotation = torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64)).Q
    keys = rotation @ keys
    return keys @ keys.T / 400


def some_keys(count: int, seed: int) -> torch.Tensor:
    return torch.randn(D, count, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("threshold", [0.001, 0.1, 5.0])
def test_the_projector(threshold: float) -> None:
    c = moment()
    space = null_space(c, threshold=threshold)
    p = space.matrix()
    values, vectors = torch.linalg.eigh(c)
    free = vectors[:, values < threshold]
    assert space.kept == free.shape[1] and 0 < space.kept < D
    assert space.complement == (space.kept > D / 2)
    assert torch.allclose(p, free @ free.T, atol=1e-10)
    assert torch.allclose(p @ p, p, atol=1e-10)
    assert space.energy == pytest.approx(float((p @ c).trace() / c.trace()))


@pytest.mark.parametrize("fraction", [1e-4, 0.01, 0.3])
def test_a_fraction_means_the_same_at_every_scale(fraction: float) -> None:
    small, large = null_space(moment(), fraction=fraction), null_space(moment() * 1e4, fraction=fraction)
    assert small.kept == large.kept
    assert small.energy <= fraction
    assert torch.allclose(small.matrix(), large.matrix(), atol=1e-8)
    values = torch.linalg.eigvalsh(moment())
    assert float(values[: small.kept + 1].sum() / values.sum()) > fraction  # one more would be too many


def test_no_free_direction_and_bad_numbers_are_errors() -> None:
    with pytest.raises(StatisticsError, match="nullspace_threshold"):
        null_space(moment(), threshold=1e-9)
    with pytest.raises(NonFiniteError):
        null_space(moment() * torch.nan, threshold=1.0)
    for wrong in ({}, {"threshold": 1.0, "fraction": 0.1}):
        with pytest.raises(ValueError, match="either"):
            null_space(moment(), **wrong)


@pytest.mark.parametrize("earlier", [0, 3, 15, 40])
@pytest.mark.parametrize("threshold", [0.01, 3.0])
def test_the_key_space_solution_is_the_dense_one(earlier: int, threshold: float) -> None:
    space, ridge = null_space(moment(), threshold=threshold), 0.7
    new, old = some_keys(4, 1), some_keys(earlier, 2)
    found = KeySpace(space, ridge).columns(new, old if earlier else None)
    p, k, s = space.matrix(), new.double(), old.double()
    dense = torch.linalg.solve(p @ (k @ k.T + s @ s.T) + ridge * torch.eye(D, dtype=torch.float64), p @ k)
    assert torch.allclose(found, dense, atol=1e-9)


@pytest.mark.parametrize("earlier", [0, 3, 40])
@pytest.mark.parametrize("fraction", [0.1, 0.9])
def test_leaks_inside_the_null_space_are_weighed(earlier: int, fraction: float) -> None:
    """BetaEdit: ``(P (K Kᵀ + K_e K_eᵀ + λ₁ C) + λ₂ I)⁻¹ P K``."""
    c, weight, ridge = moment(), 5.0, 0.7
    space = null_space(c, fraction=fraction, thin=False)
    new, old = some_keys(4, 1), some_keys(earlier, 2)
    solver = KeySpace(space.weighed(c, weight, ridge), 1.0)
    found = solver.columns(new, old if earlier else None)
    p, k, s = space.matrix(), new.double(), old.double()
    system = p @ (k @ k.T + s @ s.T + weight * c.double()) + ridge * torch.eye(D, dtype=torch.float64)
    assert torch.allclose(found, torch.linalg.solve(system, p @ k), atol=1e-9)


def test_recursive_least_squares_are_the_solution_with_all_earlier_keys() -> None:
    """RLSEdit: C_t = C_{t−1} − F (I + Kᵀ F)⁻¹ Fᵀ with F = C_{t−1} K, and ΔWᵀ = C_t K Rᵀ, batch after batch."""
    c, anchor, ridge = moment(), 5.0, 0.7
    inverse = torch.linalg.inv(ridge * torch.eye(D, dtype=torch.float64) + anchor * c.double())
    solver, earlier = KeySpace(NullSpace.everything(c).weighed(c, anchor, ridge), 1.0), some_keys(0, 1)
    for batch in range(4):
        keys = some_keys(3, batch).double()
        f = inverse @ keys
        inverse = inverse - f @ torch.linalg.inv(torch.eye(3, dtype=torch.float64) + keys.T @ f) @ f.T
        found = solver.columns(keys, earlier if earlier.shape[1] else None)
        assert torch.allclose(found, inverse @ keys, atol=1e-9)
        earlier = torch.cat([earlier, keys], dim=1)


def test_projections_of_earlier_keys_are_reused_only_while_they_are_true() -> None:
    space = null_space(moment(), threshold=0.1)
    solver, old = KeySpace(space, 1.0), some_keys(6, 3)
    for earlier in (old[:, :2], old[:, :5], old, old[:, [0, 2, 3]], None, old[:, 1:4], old[:, 1:4], some_keys(6, 4)):
        new = some_keys(2, 5)
        assert torch.allclose(solver.columns(new, earlier), KeySpace(space, 1.0).columns(new, earlier), atol=1e-12)


def test_equality_columns_store_keys_exactly() -> None:
    c = moment()
    keys = some_keys(5, 6)
    columns = equality_columns(factor_moment(c), keys, 3.0, 0.0)
    assert torch.allclose(columns.T @ keys.double(), torch.eye(5, dtype=torch.float64), atol=1e-7)
    k = keys.double()
    x = torch.linalg.solve(3.0 * c, k)
    dense = x @ torch.linalg.inv(k.T @ x + 0.2 * torch.eye(5, dtype=torch.float64))
    assert torch.allclose(equality_columns(factor_moment(c), keys, 3.0, 0.2), dense, rtol=1e-6)


def test_equal_keys_share_what_they_store() -> None:
    keys = some_keys(1, 7).repeat(1, 2)
    columns = equality_columns(IDENTITY, keys, 1.0, 0.0)
    assert bool(torch.isfinite(columns).all())
    assert torch.allclose(columns.T @ keys.double(), torch.full((2, 2), 0.5, dtype=torch.float64), atol=1e-8)


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_equality_columns_spare_further_keys(ridge: float) -> None:
    c, old, new = moment(), some_keys(3, 8), some_keys(2, 9)
    found = equality_columns(factor_moment(c), new, 4.0, ridge, old)
    e, k = old.double(), new.double()
    x = torch.linalg.solve(4.0 * c + e @ e.T, k)
    expected = x @ torch.linalg.inv(k.T @ x + ridge * torch.eye(2, dtype=torch.float64))
    assert torch.allclose(found.double(), expected, rtol=1e-6, atol=1e-10)
    alone = equality_columns(factor_moment(c), new, 4.0, ridge).double()
    assert float((alone.T @ e).norm()) > 1.05 * float((expected.T @ e).norm())
    if not ridge:
        assert torch.allclose(found.double().T @ k, torch.eye(2, dtype=torch.float64), atol=1e-8)


def test_ridge_columns_with_more_keys_are_columns_of_the_larger_system() -> None:
    """What `keep_edited_keys` relies on: the last columns solve for the batch beside all keys."""
    c, old, new = moment(), some_keys(3, 8), some_keys(2, 9)
    both = torch.cat([old, new], dim=1)
    found = ridge_columns(factor_moment(c), both, 4.0)[:, 3:]
    k = both.double()
    assert torch.allclose(found, torch.linalg.solve(4.0 * c + k @ k.T, new.double()), rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("n", [3, 8, 40])
@pytest.mark.parametrize("ridge", [0.3, torch.tensor(0.3)])
def test_ridge_solve_takes_the_smaller_side(n: int, ridge: float | torch.Tensor) -> None:
    torch.manual_seed(n)
    keys, values = torch.randn(n, 8), torch.randn(n, 5)
    full = torch.linalg.solve(keys.double() @ keys.double().T + 0.3 * torch.eye(n).double(), values.double())
    assert torch.allclose(ridge_solve(keys, ridge, values), full, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["cholesky", "lu", "identity"])
def test_more_keys_than_dimensions(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The d × d system takes over, part by part, and gives what the formula says."""
    monkeypatch.setattr(solve, "_AT_ONCE", 7)
    c = moment() if kind != "identity" else torch.eye(moment().shape[0], dtype=torch.float64)
    if kind == "lu":  # symmetric, but not positive definite
        c = c - 3 * torch.linalg.eigvalsh(c)[0] * torch.eye(len(c), dtype=torch.float64)
    factor = IDENTITY if kind == "identity" else factor_moment(c)
    assert factor.kind == kind
    keys = 3 * some_keys(2 * len(c) + 3, 5)
    k = keys.double()
    expected = torch.linalg.solve(4.0 * c + k @ k.T, k)
    assert torch.allclose(ridge_columns(factor, keys, 4.0).double(), expected, rtol=1e-4, atol=1e-6)
    space = null_space(moment(), fraction=0.5)
    p = space.matrix()
    expected = torch.linalg.solve(p @ k @ k.T @ p + 2.0 * torch.eye(len(c), dtype=torch.float64), p @ k)
    assert torch.allclose(KeySpace(space, 2.0).columns(keys), expected, atol=1e-9)

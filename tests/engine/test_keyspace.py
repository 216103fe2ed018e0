"""AlphaEdit's solver carries earlier keys along: the direct system's answer, and the same bits after a restart."""

from __future__ import annotations

import pytest
import torch

from hf_kedit.statistics import nullspace
from hf_kedit.statistics.collecting import add_upper
from hf_kedit.statistics.nullspace import KeySpace, NullSpace, null_space

WIDTH, RIDGE = 60, 3.0


@pytest.fixture
def space(monkeypatch: pytest.MonkeyPatch) -> NullSpace:
    monkeypatch.setattr(nullspace, "BLOCK", 8)
    monkeypatch.setattr(nullspace, "PART", 3)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, WIDTH, generator=generator, dtype=torch.float64) * torch.logspace(0, -3, WIDTH)
    return null_space(x.T @ x / 400, fraction=0.1)


def batches(*sizes: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(WIDTH, n, generator=generator) for n in sizes]


def run(solver: KeySpace, parts: list[torch.Tensor], start: int = 0) -> list[torch.Tensor]:
    return [
        solver.columns(keys, torch.cat(parts[:i], dim=1) if i else None) for i, keys in enumerate(parts) if i >= start
    ]


def test_it_solves_the_direct_system(space: NullSpace) -> None:
    parts = batches(3, 8, 5, 16, 1, 20, 9)  # in the end more keys than dimensions
    p = space.matrix()
    for i, found in enumerate(run(KeySpace(space, RIDGE), parts)):
        everything = torch.cat(parts[: i + 1], dim=1).double()
        system = p @ everything @ everything.T @ p + RIDGE * torch.eye(WIDTH, dtype=torch.float64)
        expected = torch.linalg.solve(system, p @ parts[i].double())
        assert (found - expected).norm() <= 1e-10 * expected.norm()


def test_a_run_that_is_continued_elsewhere_gives_the_same_bits(space: NullSpace) -> None:
    parts = batches(3, 8, 5, 16, 1, 12)
    through = run(KeySpace(space, RIDGE), parts)
    for start in range(1, len(parts)):
        for a, b in zip(run(KeySpace(space, RIDGE), parts, start), through[start:], strict=True):
            assert torch.equal(a, b)


def test_keys_that_are_taken_back_are_forgotten(space: NullSpace) -> None:
    parts = batches(8, 8, 8, 6)
    solver = KeySpace(space, RIDGE)
    run(solver, parts)
    for kept in ([0], [0, 2], [1, 2], []):
        earlier = torch.cat([parts[i] for i in kept], dim=1) if kept else None
        assert torch.equal(solver.columns(parts[3], earlier), KeySpace(space, RIDGE).columns(parts[3], earlier))


def test_keys_that_were_earlier_ones_and_are_made_anew(space: NullSpace) -> None:
    """Facts that are rolled back and edited again, in larger batches than before."""
    parts = batches(8, 8, 8, 6)
    solver = KeySpace(space, RIDGE)
    run(solver, parts)
    for first, second in ((30, 0), (8, 22), (11, 19), (20, 10)):
        everything = torch.cat(parts, dim=1)
        again = [everything[:, :first], everything[:, first : first + second]] if second else [everything]
        for a, b in zip(run(solver, again), run(KeySpace(space, RIDGE), again), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("width", [1, 3, 16, 61])
def test_half_of_a_gram_matrix_is_enough(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    x, total = torch.randn(40, width, generator=generator), torch.zeros(width, width, dtype=torch.float64)
    add_upper(total, x[:25])
    add_upper(total, x[25:])
    upper = total.triu()
    assert torch.allclose(upper + upper.triu(1).mT, (x.double().T @ x.double()), atol=1e-4)

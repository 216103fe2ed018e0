"""Merging of matrix changes: small cases worked out by hand, and what each algorithm must keep."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from hf_kedit.engine.merging import MergeAlgorithm, keep_largest, keep_random, merge_deltas, slerp
from hf_kedit.errors import ConfigError

A = torch.tensor([[4.0, -1.0, 0.0, 2.0]])
B = torch.tensor([[-2.0, -3.0, 0.0, 1.0]])


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values])


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        ("ties", row(4, -3, 0, 2)),  # trimmed to (4,·,·,2) and (-2,-3,·,·); the second's -2 disagrees
        ("magnitude", row(2, -3, 0, 2)),
        ("magnitude_norm", row(1, -1.5, 0, 1)),
        ("sign", row(4, -2, 0, 1.5)),
        ("linear", row(1, -2, 0, 1.5)),
    ],
)
def test_by_hand(algorithm: MergeAlgorithm, expected: torch.Tensor) -> None:
    assert torch.equal(merge_deltas([A, B], [1.0, 1.0], algorithm, density=0.5), expected)


def test_weights_elect_the_sign_and_share_the_mean() -> None:
    assert torch.equal(merge_deltas([A, B], [1.0, 3.0], "ties"), row(-2, -2.5, 0, 1.25))
    assert torch.equal(merge_deltas([A, B], [2.0, 6.0], "ties"), row(-2, -2.5, 0, 1.25))
    assert torch.equal(merge_deltas([A, B], [1.0, 3.0], "linear"), row(-0.5, -2.5, 0, 1.25))


def test_a_tied_vote_elects_plus() -> None:
    assert torch.equal(merge_deltas([row(2.0), row(-2.0)], [1.0, 1.0], "ties"), row(2.0))


@pytest.mark.parametrize("algorithm", get_args(MergeAlgorithm))
def test_every_algorithm_uses_every_change(algorithm: MergeAlgorithm) -> None:
    one, two = torch.zeros(8, 8), torch.zeros(8, 8)
    one[0], two[1] = 1.0, 2.0
    merged = merge_deltas([one, two], [1.0, 1.0], algorithm, density=0.9, generator=torch.Generator().manual_seed(0))
    assert bool((merged[0] > 0).any()) and bool((merged[1] > 0).any())
    assert torch.equal(merged[2:], torch.zeros(6, 8))


def test_disjoint_changes_survive_ties_whole() -> None:
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(20, 20, generator=generator) < 0.3
    first = torch.randn(20, 20, generator=generator) * mask
    second = torch.randn(20, 20, generator=generator) * ~mask
    assert torch.equal(merge_deltas([first, second], [0.5, 0.5], "ties"), first + second)


def test_largest_counts_exactly() -> None:
    change = torch.randn(7, 9, generator=torch.Generator().manual_seed(2))
    kept = keep_largest(change, 0.53)
    assert int((kept != 0).sum()) == int(0.53 * 63)
    assert float(change[kept == 0].abs().max()) <= float(change[kept != 0].abs().min())


def test_random_keeps_the_expectation_and_follows_its_generator() -> None:
    change = torch.ones(400, 400)
    kept = keep_random(change, 0.25, torch.Generator().manual_seed(3))
    assert set(kept.unique().tolist()) == {0.0, 4.0}
    assert abs(float(kept.mean()) - 1) < 0.02
    assert torch.equal(kept, keep_random(change, 0.25, torch.Generator().manual_seed(3)))
    assert not torch.equal(kept, keep_random(change, 0.25, torch.Generator().manual_seed(4)))


def test_slerp_goes_along_the_circle() -> None:
    one, two = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0])
    assert torch.allclose(slerp(one, two, 0.0), one) and torch.allclose(slerp(one, two, 1.0), two)
    middle = slerp(one, two, 0.5)
    assert torch.allclose(middle, 2 * torch.tensor([0.5**0.5, 0.5**0.5]))
    assert torch.allclose(slerp(one, 2 * one, 0.5), 1.5 * one)  # parallel: straight
    assert torch.allclose(slerp(one, torch.zeros(2), 0.25), 0.75 * one)


def test_slerp_of_three_is_even() -> None:
    axes = [torch.eye(3)[i] for i in range(3)]
    merged = merge_deltas(axes, [1.0, 1.0, 1.0], "slerp")
    assert abs(float(merged.norm()) - 1) < 1e-6 and bool((merged > 0.4).all())


def test_one_change_is_itself() -> None:
    for algorithm in ("ties", "sign", "linear", "slerp", "magnitude"):
        assert torch.equal(merge_deltas([A], [1.0], algorithm), A)  # type: ignore[arg-type]


def test_bad_input_is_refused() -> None:
    for deltas, weights, algorithm, density in (
        ([A], [1.0], "tie", 1.0),
        ([], [], "ties", 1.0),
        ([A, B[:, :2]], [1.0, 1.0], "ties", 1.0),
        ([A, B], [1.0], "ties", 1.0),
        ([A, B], [1.0, 0.0], "ties", 1.0),
        ([A], [1.0], "ties", 0.0),
        ([A], [1.0], "ties", 1.5),
    ):
        with pytest.raises(ConfigError):
            merge_deltas(deltas, weights, algorithm, density=density)  # type: ignore[arg-type]

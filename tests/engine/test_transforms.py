"""Masking a finished update: what stays, and how the limit is found in large matrices."""

from __future__ import annotations

import pytest
import torch

from hf_kedit.engine import transforms
from hf_kedit.engine.transforms import keep_largest_relative, kth_smallest


def test_the_largest_relative_changes_stay() -> None:
    weight = torch.tensor([[1.0, -10.0, 0.1], [2.0, 0.0, 100.0]])
    delta = torch.tensor([[0.5, -1.0, 0.01], [-2.0, 0.001, 1.0]])  # relative: 0.5 0.1 0.1 1 huge 0.01
    kept = keep_largest_relative(delta, weight, 0.5)
    assert kept[1].tolist() == [-2.0, pytest.approx(0.001), 0.0]
    assert kept[0, 0] == 0.5
    assert torch.equal(keep_largest_relative(delta, weight, 1.0), delta)
    assert int(keep_largest_relative(delta, weight, 0.3).count_nonzero()) == 3  # the entry at the limit stays


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.4, 0.9])
def test_the_fraction_is_kept(keep: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, delta = torch.randn(40, 50, generator=generator), torch.randn(40, 50, generator=generator)
    kept = keep_largest_relative(delta, weight, keep)
    count = int(kept.count_nonzero())
    assert keep * delta.numel() <= count <= keep * delta.numel() + 2
    assert torch.equal(kept[kept != 0], delta[kept != 0])


def test_no_change_of_a_zero_weight_is_no_change() -> None:
    kept = keep_largest_relative(torch.tensor([0.0, 1.0]), torch.tensor([-1e-8, 1.0]), 0.5)
    assert kept.tolist() == [0.0, 1.0]


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        keep_largest_relative(torch.ones(2), torch.ones(3), 0.5)
    for keep in (0.0, 1.1):
        with pytest.raises(ValueError, match="keep"):
            keep_largest_relative(torch.ones(2), torch.ones(2), keep)


@pytest.mark.parametrize("kind", ["spread", "ties", "tiny", "infinite"])
def test_the_histogram_finds_the_exact_rank(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transforms, "_DIRECT", 10)
    generator = torch.Generator().manual_seed(1)
    values = torch.rand(1000, generator=generator)
    if kind == "spread":
        values = values.log().neg().exp() ** 9
    elif kind == "ties":
        values = (values * 5).floor()
    elif kind == "tiny":
        values = values * 1e-40  # denormal numbers
    else:
        values[values > 0.5] = torch.inf
    ordered = values.sort().values
    for k in (1, 2, 17, 499, 500, 501, 999, 1000):
        assert torch.equal(kth_smallest(values, k), ordered[k - 1]), k

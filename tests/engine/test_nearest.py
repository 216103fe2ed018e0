"""The search for the nearest vector: fast, and with the decision of a float64 search through all."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_kedit.engine import nearest as codebook
from hf_kedit.engine.nearest import Vectors, distances


def exact(queries: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cdist(queries.double(), keys.double(), compute_mode="donot_use_mm_for_euclid_dist").min(dim=1)


def test_distances_are_exact_for_many_rows() -> None:
    rows = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)) * 30
    assert float(distances(rows, rows).diagonal().max()) == 0.0


@pytest.mark.parametrize(("spread", "through_all"), [(0.05, False), (0.005, True)])
def test_long_vectors_that_differ_little(spread: float, through_all: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms of about 315, distances of 0 … 3: the product form alone has wrong digits and takes wrong neighbours."""
    generator = torch.Generator().manual_seed(0)
    shared = 5.7 * torch.randn(3072, generator=generator)
    keys = shared + torch.randn(1000, 3072, generator=generator) * spread
    queries = keys[:200] + torch.randn(200, 3072, generator=generator) * torch.linspace(0, spread, 200)[:, None]
    distance, place = exact(queries, keys)
    searched_all: list[int] = []

    def counted(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        searched_all.append(q.shape[0])
        return distances(q, k)

    monkeypatch.setattr(codebook, "distances", counted)
    vectors = Vectors.of(keys)
    found = [vectors.nearest(q[None]) for q in queries]
    assert torch.equal(torch.cat([p for _, p in found]), place)
    assert torch.allclose(torch.cat([d for d, _ in found]).double(), distance, rtol=1e-5, atol=1e-6)
    squares = keys.square().sum(1)
    product = (squares + queries.square().sum(1)[:, None] - 2 * queries @ keys.T).clamp(min=0).sqrt()
    assert (product.min(dim=1).values - distance).abs().max() > 0.01, "otherwise the test shows nothing"
    assert bool(searched_all) == through_all, "only keys in a tight cluster cannot be told apart by the product"


def test_a_search_among_distinct_keys_does_not_go_through_all(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(500, 64, generator=generator) * 10
    queries = torch.cat([keys[::5] + 0.01, torch.randn(20, 64, generator=generator) * 10])
    vectors = Vectors.of(keys[:300])
    for key in keys[300:]:
        vectors = vectors.with_row(key)
    monkeypatch.setattr(codebook, "distances", None)
    distance, place = vectors.nearest(queries)
    expected, at = exact(queries, keys)
    assert torch.equal(place, at) and torch.allclose(distance.double(), expected, rtol=1e-5)


def test_equal_vectors_and_undefined_queries() -> None:
    keys = torch.randn(40, 8, generator=torch.Generator().manual_seed(2))
    keys[10:30] = keys[10]  # more equals than candidates
    distance, place = Vectors.of(keys).nearest(keys[[10, 25, 39]])
    assert distance.tolist() == [0.0] * 3 and place[2] == 39 and all(10 <= int(p) < 30 for p in place[:2])
    undefined, _ = Vectors.of(keys).nearest(torch.full((1, 8), float("nan")))
    assert not bool((undefined <= 1e9).any()), "it must not count as close to anything"


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(0, 10_000), st.floats(0.0, 1e4))
def test_any_list_as_it_grows(count: int, seed: int, offset: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(count, 6, generator=generator) + offset
    queries = torch.randn(5, 6, generator=generator) + offset
    vectors = Vectors(6)
    for k, key in enumerate(keys):
        vectors = vectors.with_row(key)
        distance, place = vectors.nearest(queries)
        near = (queries.double() - keys[place].double()).norm(dim=1)
        assert torch.allclose(near, exact(queries, keys[: k + 1])[0], rtol=1e-5)
        assert torch.allclose(distance.double(), near, rtol=1e-5)


def test_vectors_grow_without_being_copied() -> None:
    lists = [Vectors(2)]
    for i in range(40):
        lists.append(lists[-1].with_row(torch.full((2,), float(i))))
    assert all(v.tensor[:, 0].tolist() == list(range(len(v))) for v in lists)
    places = {v.tensor.data_ptr() for v in lists if len(v)}
    assert len(places) == 3  # 16, 32, 64 rows of room
    other = lists[20].with_row(torch.full((2,), -1.0))  # an earlier state goes on differently
    assert lists[21].tensor[20, 0] == 20 and other.tensor[20, 0] == -1
    changed = lists[20].with_changed([3], torch.full((1, 2), 50.0))
    assert changed.nearest(torch.full((1, 2), 50.0))[1].item() == 3 and lists[20].tensor[3, 0] == 3


def test_a_list_that_is_moved_in_inference_mode_goes_on_as_any_other() -> None:
    """The move stays, so that rows are added and gradients taken outside of the mode as well."""
    vectors = Vectors(3).with_row(torch.ones(3)).with_row(torch.zeros(3))
    with torch.inference_mode():
        moved = vectors.on(torch.device("meta"))  # another device than the CPU, on every machine
        assert torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
    assert moved.device.type == "meta" and not moved.is_inference()
    vectors.with_row(torch.ones(3, device="meta"))

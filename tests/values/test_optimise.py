"""The value optimisation: batches, stops and memory limits do not change a request's result."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_kedit import EditRequest
from hf_kedit.anatomy import check_anatomy, resolve_anatomy
from hf_kedit.engine.forward import frozen_eval
from hf_kedit.engine.rows import drift_row, rewrite_row
from hf_kedit.errors import EditFailedError
from hf_kedit.values import optimise as module
from hf_kedit.values.optimise import Values, optimise_values
from hf_kedit.values.settings import ValueSettings
from tests.golden_cases import load_model

FACTS = [
    ("{} plays the sport of", "Mira Halvorsen", "tennis"),
    ("The mother tongue of {} is", "Tobias Renner", "Italian"),
    ("What instrument does {} play? Answer:", "Nadia Okafor", "cello"),
    ("{} was born in the city of", "Lars Eklund", "Brindle"),
    ("People say that the home of {} is in", "Ivo Castellan", "Tarsk"),
]
TEMPLATES = ["{}", "The city is old. {}", "Therefore people play. {}"]


@pytest.fixture(scope="module")
def setup() -> Any:
    model, tokenizer = load_model("llama")
    anatomy = check_anatomy(model, resolve_anatomy(model))
    rows = []
    for owner, (prompt, subject, target) in enumerate(FACTS):
        request = EditRequest(prompt=prompt, subject=subject, target_new=target)
        group = [rewrite_row(tokenizer, request, t, owner=owner, template_index=i) for i, t in enumerate(TEMPLATES)]
        rows.append([*group, drift_row(tokenizer, request, owner=owner)])
    return model, anatomy, rows


def optimise(setup: Any, which: list[int], *, stop: float = 0.0, **options: Any) -> Values:
    model, anatomy, rows = setup
    settings = ValueSettings(12, 0.5, 1e-3, 4.0, 0.0625, stop_loss=stop, keep_path=True)
    with frozen_eval(model):
        return optimise_values(
            model, anatomy, [rows[i] for i in which], 2, "block", settings, show_progress=False, **options
        )


def assert_same(a: Values, i: int, b: Values, j: int) -> None:
    assert a.updates[i] == b.updates[j]
    assert len(a.loss[i]) == len(b.loss[j])
    assert torch.allclose(torch.tensor(a.loss[i]), torch.tensor(b.loss[j]), atol=1e-4)
    assert (a.offset[i] - b.offset[j]).norm() <= 1e-4 * b.offset[j].norm()
    assert torch.allclose(a.initial[i], b.initial[j], atol=1e-5)


def test_any_batching_and_order_gives_the_same_values(setup: Any) -> None:
    together = optimise(setup, [0, 1, 2, 3, 4])
    for size in (1, 2):
        parts = optimise(setup, [0, 1, 2, 3, 4], batch_size=size)
        for i in range(5):
            assert_same(parts, i, together, i)
    shuffled = optimise(setup, [3, 0, 4, 2, 1])
    for place, i in enumerate([3, 0, 4, 2, 1]):
        assert_same(shuffled, place, together, i)


@pytest.mark.parametrize("route", ["full", "layers", "prefix"])
def test_every_route_gives_the_same_values(setup: Any, route: Any) -> None:
    assert_same(optimise(setup, [1, 2], route=route), 0, optimise(setup, [1]), 0)


def test_requests_stop_on_their_own_and_leave_the_batch(setup: Any) -> None:
    plain = optimise(setup, [0, 1, 2, 3, 4])
    final = sorted(min(row[0] for row in rows) for rows in plain.loss)
    stop = (final[2] + final[3]) / 2  # some requests get below this loss, some never do
    stopped = optimise(setup, [0, 1, 2, 3, 4], stop=stop)
    assert len(set(stopped.updates)) > 1
    for i in range(5):
        path = [row[0] for row in stopped.loss[i]]
        assert all(x >= stop for x in path[:-1])
        count = len(path)
        assert torch.allclose(torch.tensor(path), torch.tensor([r[0] for r in plain.loss[i][:count]]), atol=1e-3)
        assert stopped.updates[i] == (count - 1 if path[-1] < stop else 11)
        alone = optimise(setup, [i], stop=stop)
        assert_same(stopped, i, alone, 0)


def test_running_out_of_memory_halves_the_batch_and_goes_on(setup: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = optimise(setup, [0, 1, 2, 3, 4])
    real, sizes = module.Optimisation, []

    def small(model: Any, anatomy: Any, rows: Any, *rest: Any, **named: Any) -> Any:
        sizes.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("too much")
        return real(model, anatomy, rows, *rest, **named)

    monkeypatch.setattr(module, "Optimisation", small)
    found = optimise(setup, [0, 1, 2, 3, 4], batch_size=5)
    assert sizes[0] == 5 and max(sizes[-2:]) <= 2
    for i in range(5):
        assert_same(found, i, expected, i)


def test_a_batch_holds_requests_of_similar_length(setup: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row of a batch runs as many columns as the longest, so requests are sorted by what has to be run."""
    real, seen = module.Optimisation, []

    def noting(model: Any, anatomy: Any, rows: Any, *rest: Any, **named: Any) -> Any:
        seen.append([max(len(r.ids) - r.fact for r in group if not r.is_drift) for group in rows])
        return real(model, anatomy, rows, *rest, **named)

    monkeypatch.setattr(module, "Optimisation", noting)
    order = [2, 1, 0, 3, 4]
    given = [max(len(r.ids) - r.fact for r in setup[2][i] if not r.is_drift) for i in order]
    optimise(setup, order, batch_size=2)
    columns = [n for batch in seen for n in batch]
    assert columns == sorted(given) != given and [len(batch) for batch in seen] == [2, 2, 1]


def test_the_offset_respects_its_limit_and_the_last_step_is_only_measured(setup: Any) -> None:
    model, anatomy, rows = setup
    settings = ValueSettings(6, 5.0, 0.0, 0.5, 0.0, stop_loss=0.0, keep_path=True)
    with frozen_eval(model):
        values = optimise_values(model, anatomy, rows[:1], 2, "down", settings, show_progress=False)
    assert values.offset[0].norm() <= 0.5 * values.initial[0].norm() * (1 + 1e-5)
    assert values.updates == [5] and len(values.loss[0]) == 6
    assert not values.path[0][0].any()
    assert torch.equal(values.path[0][-1, 0], values.offset[0])


def test_a_loss_that_is_not_finite_stops_the_edit(setup: Any) -> None:
    model, anatomy, rows = setup
    settings = ValueSettings(4, 0.5, float("inf"), 4.0, 0.0, stop_loss=0.0)
    with frozen_eval(model), pytest.raises(EditFailedError, match="NaN or infinite"):
        optimise_values(model, anatomy, rows[:1], 2, "block", settings, show_progress=False)

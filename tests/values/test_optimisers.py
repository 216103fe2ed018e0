"""Gauss-Newton on values: its steps against the model that they minimise, and its outcomes against Adam's."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

import pytest
import torch

from hf_kedit import EditableModel, EditRequest, load_edit_dataset
from hf_kedit.engine.capture import as_rows, first, with_first
from hf_kedit.engine.forward import frozen_eval
from hf_kedit.engine.rows import drift_row, rewrite_row
from hf_kedit.engine.weights import get_module
from hf_kedit.tokens import pad_rows
from hf_kedit.values.optimise import Values, optimise_values, place_path
from hf_kedit.values.optimisers import GaussNewton, Measured
from hf_kedit.values.settings import ValueSettings

TEMPLATES = ["{}", "The city is old. {}", "Therefore people play. {}"]
ADAM = ValueSettings(25, 0.5, 1e-3, 4.0, 0.0625)
GAUSS_NEWTON = replace(ADAM, optimiser="gauss_newton", keep_path=True)
LAYER, COUNT = 2, 12


@pytest.fixture(scope="module", params=["world-gpt2", "world-llama"])
def setup(request: pytest.FixtureRequest) -> Any:
    model = EditableModel.from_pretrained(f"kedit/{request.param}")
    rows = []
    for owner, row in enumerate(load_edit_dataset("world", split="test", limit=COUNT)):
        fact = EditRequest.from_dict(row)
        group = [rewrite_row(model.tokenizer, fact, t, owner=owner, template_index=i) for i, t in enumerate(TEMPLATES)]
        rows.append([*group, drift_row(model.tokenizer, fact, owner=owner)])
    return model, rows


def optimise(setup: Any, settings: ValueSettings, which: Any = None, places: Any = "block", **options: Any) -> Values:
    model, rows = setup
    chosen = rows if which is None else [rows[i] for i in which]
    with frozen_eval(model.base_model):
        return optimise_values(
            model.base_model, model.anatomy, chosen, LAYER, places, settings, show_progress=False, **options
        )


def lowest(values: Values) -> list[float]:
    return [min(row[0] for row in rows) for rows in values.loss]


def plain_loss(setup: Any, i: int, places: dict[str, torch.Tensor], settings: ValueSettings) -> list[float]:
    """Likelihood, drift and decay of one request with vectors added, by whole forwards with plain hooks."""
    model, rows = setup
    batch, facts = pad_rows([r.ids for r in rows[i]], 0), [r.fact for r in rows[i]]
    initials: dict[str, torch.Tensor] = {}

    def run(scale: float) -> torch.Tensor:
        def adding(place: str) -> Any:
            def add(_: Any, __: Any, output: Any) -> Any:
                hidden = as_rows(first(output), len(facts)).clone()
                initials.setdefault(place, hidden[0, facts[0]].clone())
                for k, fact in enumerate(facts):
                    hidden[k, fact] += scale * places[place]
                return with_first(output, hidden.view_as(first(output)))

            return add

        modules = {place: get_module(model.base_model, place_path(model.anatomy, LAYER, place)) for place in places}
        handles = [module.register_forward_hook(adding(place)) for place, module in modules.items()]
        try:
            with torch.no_grad():
                inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
                return model.base_model(**inputs, use_cache=False).logits.float().log_softmax(-1)
        finally:
            for handle in handles:
                handle.remove()

    before, after = run(0.0), run(1.0)
    losses = [
        -after[k, list(row.positions)].gather(1, torch.tensor(row.targets).unsqueeze(1)).mean()
        for k, row in enumerate(rows[i])
        if not row.is_drift
    ]
    (p, q) = (log[len(rows[i]) - 1, rows[i][-1].positions[0]] for log in (before, after))
    drift = settings.kl_factor * float((q.exp() * (q - p)).sum())
    decay = settings.weight_decay * sum(float(v.norm() / initials[k].norm() ** 2) for k, v in places.items())
    return [settings.nll_factor * float(torch.stack(losses).mean()), drift, decay]


def test_eight_evaluations_reach_the_loss_of_25(setup: Any) -> None:
    """For most requests, and with a vector that is hardly longer."""
    slow = optimise(setup, ADAM)
    fast = optimise(setup, replace(GAUSS_NEWTON, steps=8))
    assert all(len(rows) <= 8 for rows in fast.loss)
    reached = [b <= max(a, ADAM.stop_loss) + 0.01 for a, b in zip(lowest(slow), lowest(fast), strict=True)]
    assert sum(reached) >= 0.75 * COUNT, (lowest(slow), lowest(fast))
    ratio = statistics.median((fast.offset.norm(dim=1) / slow.offset.norm(dim=1)).tolist())
    assert ratio < 1.3
    assert all(after > 0.9 for (_, after), ok in zip(fast.probability, reached, strict=True) if ok)


def test_what_is_returned_is_the_best_that_was_measured(setup: Any) -> None:
    """Also behind steps that were too long, and by forwards that know nothing of the engine."""
    settings = replace(GAUSS_NEWTON, stop_loss=0.0, steps=12, kl_factor=1.0)
    values, worse = optimise(setup, settings, places="down"), 0
    for i in range(COUNT):
        losses = [row[0] for row in values.loss[i]]
        best = losses.index(min(losses))
        worse += sorted(losses, reverse=True) != losses
        assert torch.equal(values.path[i][best, 0], values.offset[i])
        expected = plain_loss(setup, i, {"down": values.offset[i]}, settings)
        assert values.loss[i][best][1:] == pytest.approx(expected, rel=2e-3, abs=1e-4)
        assert values.loss[i][best][0] == pytest.approx(sum(expected), rel=2e-3, abs=1e-4)
    assert worse, "no step was too long: the case is not tested"


def test_a_request_does_not_depend_on_its_company(setup: Any) -> None:
    together = optimise(setup, GAUSS_NEWTON)
    assert len(set(together.updates)) > 1
    for i in range(0, COUNT, 3):
        alone = optimise(setup, GAUSS_NEWTON, [i])
        assert alone.updates[0] == together.updates[i]
        assert torch.allclose(torch.tensor(alone.loss[0]), torch.tensor(together.loss[i]), atol=2e-2, rtol=2e-2)
        assert (alone.offset[0] - together.offset[i]).norm() <= 2e-2 * together.offset[i].norm()


@pytest.mark.parametrize(
    ("changes", "places"),
    [
        ({"clamp": 0.3}, "block"),
        ({"kl_factor": 0.0, "weight_decay": 0.5}, "down"),
        ({"clamp": 0.4, "nll_factor": 2.0, "settled_factor": 0.1}, ("down", "attention_out")),
    ],
)
def test_limits_terms_and_places(setup: Any, changes: dict[str, Any], places: Any) -> None:
    settings = replace(GAUSS_NEWTON, steps=6, **changes)
    values = optimise(setup, settings, [0, 1, 2], places)
    length, limit = values.offsets.norm(dim=-1), settings.clamp * values.initials.norm(dim=-1)
    assert bool((length <= limit * (1 + 1e-5)).all()) and bool((length > 0).all())
    for i in range(3):
        losses = [row[0] for row in values.loss[i]]
        assert min(losses) < 0.7 * losses[0]
        at = {place: values.offsets[i, k] for k, place in enumerate(values.places)}
        expected = plain_loss(setup, i, at, settings)
        best = values.loss[i][losses.index(min(losses))]
        assert best[1:] == pytest.approx(expected if settings.kl_factor else [expected[0], 0.0, expected[2]], rel=5e-3)


def test_a_fact_that_holds_gets_nothing_and_one_evaluation_only_measures(setup: Any) -> None:
    held = optimise(setup, replace(GAUSS_NEWTON, holds_from=1e-9), [0, 1])
    assert held.updates == [0, 0] and not held.offset.any()
    measured = optimise(setup, replace(GAUSS_NEWTON, steps=1), [0, 1])
    assert not measured.offset.any() and [len(rows) for rows in measured.loss] == [1, 1]
    assert measured.probability[0][0] == measured.probability[0][1]


def test_it_knows_the_terms_of_rome_alone(setup: Any) -> None:
    with pytest.raises(ValueError, match="terms of ROME"):
        optimise(setup, replace(GAUSS_NEWTON, together_factor=0.1, together_layers=(3,)), [0])


def problem(count: int, rows: int, width: int) -> tuple[GaussNewton, Measured]:
    """Requests at δ = 0, as an evaluation would show them."""
    generator = torch.Generator().manual_seed(3)
    initial = torch.randn(count, 1, width, generator=generator)
    limit = 4 * initial.norm(dim=-1)
    optimiser = GaussNewton(initial, limit, 1 / rows, 0.05)
    losses = 1 + 6 * torch.rand(count, rows, generator=generator)
    gradient = torch.randn(count, rows + 1, 1, width, generator=generator) / rows
    gradient[:, -1] = 0  # the drift does not bend at δ = 0
    total, zero = losses.mean(dim=1), torch.zeros(count)
    optimiser.judge(torch.zeros_like(initial), total)
    moving = torch.ones(count, dtype=torch.bool)
    return optimiser, Measured(torch.zeros_like(initial), total, zero, zero, losses, gradient, moving, limit)


def test_a_step_is_the_shortest_that_reaches_what_it_aims_at() -> None:
    """Against a general solver that minimises the length under the constraint, in the whole space."""
    optimize = pytest.importorskip("scipy.optimize")
    rows, width = 4, 12
    optimiser, at = problem(5, rows, width)
    optimiser.radius = torch.full((5,), 1e9)
    moved, _ = optimiser.move(at)
    for i in range(5):
        loss = at.rows[i].double()
        odds = -(loss.exp() - 1).log()
        slopes = -at.gradient[i, :rows, 0].double() * rows * (loss.exp() / (loss.exp() - 1)).unsqueeze(1)

        def value(d: Any, odds: Any = odds, slopes: Any = slopes) -> float:
            return float(torch.log1p((-(odds + slopes @ torch.as_tensor(d))).exp()).mean())

        reached = value(moved[i, 0].double())
        assert reached == pytest.approx(float(optimiser.predicted[i]), rel=1e-4)
        assert reached <= 0.25 * float(at.total[i])
        shortest = optimize.minimize(
            lambda d: float(d @ d),
            moved[i, 0].double().numpy() * 1.5,
            jac=lambda d: 2 * d,
            constraints={"type": "ineq", "fun": lambda d, value=value, reached=reached: reached - value(d)},
            method="SLSQP",
            options={"maxiter": 300},
        )
        assert float(moved[i].norm()) == pytest.approx(float(shortest.fun) ** 0.5, rel=2e-2)


def test_a_step_ends_at_the_radius_and_the_radius_learns() -> None:
    optimiser, at = problem(3, 4, 12)
    optimiser.radius = torch.tensor([0.1, 0.2, 1e9])
    moved, ended = optimiser.move(at)
    assert moved[:2].flatten(1).norm(dim=1).tolist() == pytest.approx([0.1, 0.2], rel=1e-3)
    assert not bool(ended.any())
    before, hoped = optimiser.total.clone(), optimiser.predicted.clone()
    measured = torch.stack([hoped[0], before[1] + 1, before[2] - 0.01 * (before[2] - hoped[2])])
    kept = optimiser.judge(moved, measured)
    assert kept.tolist() == [True, False, True]
    assert float(optimiser.radius[0]) > 0.1 and float(optimiser.radius[1]) < 0.2
    assert float(optimiser.radius[2]) < float(moved[2].norm())
    found = optimiser.found(moved)
    assert torch.equal(found[0], moved[0]) and not found[1].any() and torch.equal(found[2], moved[2])

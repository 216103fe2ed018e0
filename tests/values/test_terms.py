"""Several sites, PMET's stop rule and CORE's term in the value optimisation, on an embedded model that learns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from hf_kedit import EditableModel, EditRequest, load_edit_dataset
from hf_kedit.engine.capture import Tap, capture_at
from hf_kedit.engine.forward import frozen_eval
from hf_kedit.engine.rows import drift_row, rewrite_row
from hf_kedit.errors import UnsupportedModelError
from hf_kedit.tokens import pad_rows
from hf_kedit.values.optimise import Values, optimise_values, place_path
from hf_kedit.values.settings import ValueSettings

TEMPLATES = ["{}", "The city is old. {}", "Therefore people play. {}"]
SETTINGS = ValueSettings(20, 0.5, 0.05, 4.0, 0.0625, stop_loss=0.0, keep_path=True)
LAYER = 2


@pytest.fixture(scope="module")
def setup() -> Any:
    model = EditableModel.from_pretrained("kedit/world-gpt2")
    rows = []
    for owner, row in enumerate(load_edit_dataset("world", split="test", limit=4)):
        request = EditRequest.from_dict(row)
        group = [
            rewrite_row(model.tokenizer, request, t, owner=owner, template_index=i) for i, t in enumerate(TEMPLATES)
        ]
        rows.append([*group, drift_row(model.tokenizer, request, owner=owner)])
    return model, rows


def optimise(setup: Any, settings: ValueSettings, sites: Any = "block", which: Any = None, **options: Any) -> Values:
    model, rows = setup
    chosen = rows if which is None else [rows[i] for i in which]
    with frozen_eval(model.base_model):
        return optimise_values(
            model.base_model, model.anatomy, chosen, LAYER, sites, settings, show_progress=False, **options
        )


def test_a_settled_request_stops_or_listens_less_to_its_targets(setup: Any) -> None:
    plain = optimise(setup, SETTINGS)
    stopped = optimise(setup, replace(SETTINGS, settled_factor=0.1, settled_kl=1e9))
    weaker = optimise(setup, replace(SETTINGS, settled_factor=0.1, settled_kl=-1.0))
    for i in range(4):
        steps = len(stopped.loss[i])
        assert 1 < steps < 20 and stopped.updates[i] == steps - 1
        expected = [row[0] for row in plain.loss[i][:steps]]
        assert [row[0] for row in stopped.loss[i]] == pytest.approx(expected, abs=1e-3)
        assert stopped.probability[i][1] > 0.3  # every target token is the first choice
        assert len(weaker.loss[i]) == 20
        before, after = weaker.loss[i][steps - 1], weaker.loss[i][steps]
        assert before[1] == pytest.approx(plain.loss[i][steps - 1][1], abs=1e-3)
        assert after[1] == pytest.approx(0.1 * plain.loss[i][steps][1], rel=1e-2, abs=1e-4)
        assert after[0] == pytest.approx(sum(after[1:]), rel=1e-5)


def test_the_factor_of_the_likelihood(setup: Any) -> None:
    once, twice = optimise(setup, SETTINGS), optimise(setup, replace(SETTINGS, nll_factor=2.0))
    for i in range(4):
        assert twice.loss[i][0][1] == pytest.approx(2 * once.loss[i][0][1], rel=1e-5)
        assert twice.loss[i][0][3] == once.loss[i][0][3]


def test_two_sites_share_a_loss_but_not_a_limit(setup: Any) -> None:
    model, _ = setup
    settings = replace(SETTINGS, clamp=0.5)
    both = optimise(setup, settings, ("down", "attention_out"))
    assert both.places == ("down", "attention_out")
    assert torch.equal(both.value, both.value_at("down"))
    for k in range(2):
        length, limit = both.offsets[:, k].norm(dim=-1), 0.5 * both.initials[:, k].norm(dim=-1)
        assert bool((length <= limit * (1 + 1e-5)).all()) and bool((length > 0.1 * limit).all())
    for site in both.places:
        alone = optimise(setup, settings, site)
        assert torch.allclose(alone.initial, both.initials[:, both.places.index(site)], atol=1e-5)
        assert alone.loss[0][1][0] != both.loss[0][1][0]
    full = optimise(setup, settings, ("down", "attention_out"), route="full")
    assert (full.offsets - both.offsets).norm() <= 1e-3 * full.offsets.norm()
    with pytest.raises(ValueError, match="unknown place"):
        place_path(model.anatomy, LAYER, "mlp")


def test_a_missing_attention_projection_is_named(setup: Any) -> None:
    anatomy = setup[0].anatomy
    layers = tuple(replace(layer, attention_out=None) for layer in anatomy.layers)
    with pytest.raises(UnsupportedModelError, match="attention"):
        place_path(replace(anatomy, layers=layers), LAYER, "attention_out")


def test_the_term_that_pulls_contexts_together(setup: Any) -> None:
    """Its first value, against states read from a plain forward; and alone as in a batch."""
    model, rows = setup
    layers = (LAYER + 1, LAYER + 2)
    settings = replace(SETTINGS, together_factor=0.03, together_layers=layers)
    batch = optimise(setup, settings)
    taps = [Tap(model.anatomy.layers[i].path) for i in layers]
    for i, group in enumerate(rows):
        rewriting = [r for r in group if not r.is_drift]
        columns = torch.tensor([r.fact for r in rewriting])
        states = capture_at(model.base_model, pad_rows([r.ids for r in rewriting], 0, side="right"), columns, taps)
        wanted = 0.0
        for h in states.values():
            pairs = [(a, b) for a in range(3) for b in range(a)]
            wanted += sum(float((h[a] - h[b]).square().sum()) for a, b in pairs) / h.shape[1] / len(taps)
        assert batch.loss[i][0][4] == pytest.approx(0.03 * wanted, rel=1e-4)
        alone = optimise(setup, settings, which=[i])
        assert (alone.offset[0] - batch.offset[i]).norm() <= 1e-3 * batch.offset[i].norm()


def test_the_term_follows_requests_that_stop(setup: Any) -> None:
    settings = replace(SETTINGS, together_factor=0.003, together_layers=(LAYER + 1,))
    losses = sorted(min(row[0] for row in rows) for rows in optimise(setup, settings).loss)
    stop = (losses[1] + losses[2]) / 2  # two requests stop and leave the batch
    stopped = optimise(setup, replace(settings, stop_loss=stop))
    assert len(set(stopped.updates)) > 1
    for i in range(4):
        alone = optimise(setup, replace(settings, stop_loss=stop), which=[i])
        assert alone.updates[0] == stopped.updates[i]
        assert (alone.offset[0] - stopped.offset[i]).norm() <= 1e-3 * stopped.offset[i].norm()

"""Options of the locate-then-edit family: NAS, BLUE, and AlphaEdit's BetaEdit and RLSEdit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_kedit import AutoEditConfig, EditableModel, EditRequest, load_edit_dataset
from hf_kedit.config import EditConfig
from hf_kedit.engine.capture import Tap
from hf_kedit.engine.forward import frozen_eval
from hf_kedit.engine.sweep import Sweep
from hf_kedit.engine.weights import get_module, get_weight, model_digest
from hf_kedit.errors import ConfigError
from hf_kedit.values.optimise import ValuePlace, optimise_values

MODEL = "kedit/world-gpt2"


def facts(count: int, start: int = 0, split: str = "test") -> list[EditRequest]:
    rows = load_edit_dataset("world", split=split, limit=start + count)
    return [EditRequest.from_dict(rows[i]) for i in range(start, start + count)]


def make(method: str, **values: Any) -> EditableModel:
    return EditableModel.from_pretrained(MODEL, AutoEditConfig.for_model("world-gpt2", method, **values))


def config(method: str, **values: Any) -> EditConfig:
    return EditConfig.from_dict({"edit_type": method, **values})


def deltas_found(model: EditableModel, requests: list[EditRequest], layer: int, place: ValuePlace) -> torch.Tensor:
    """δ of every request, ``[requests, d]``, on the model as it is."""
    method: Any = model._method
    with frozen_eval(model.base_model):
        return optimise_values(
            model.base_model,
            model.anatomy,
            method.rows(requests, method.templates()),
            layer,
            place,
            method.value_settings(),
        ).offset


def added_by_mlp(model: EditableModel, requests: list[EditRequest], layer: int) -> torch.Tensor:
    """What the MLP adds at the fact token of the bare prompt, ``[requests, d]``, on the model as it is."""
    method: Any = model._method
    bare = [group[0] for group in method.rows(requests, method.templates())]
    tap = Tap(model.anatomy.down(layer).path)
    with frozen_eval(model.base_model):
        return Sweep(model.base_model, model.anatomy, bare).read([tap], 0)[tap]


def mean_keys(model: EditableModel, requests: list[EditRequest], module: str) -> torch.Tensor:
    """The key of every request, averaged inside groups of templates and then over these, ``[requests, d_in]``."""
    method: Any = model._method
    groups, tap = method.templates(), Tap(module, "input")
    rows = [row for group in method.rows(requests, groups) for row in group if not row.is_drift]
    with frozen_eval(model.base_model):
        keys = Sweep(model.base_model, model.anatomy, rows).read([tap], 0)[tap].unflatten(0, (len(requests), -1))
    parts = keys.split([len(group) for group in groups], dim=1)
    return torch.stack([part.mean(dim=1) for part in parts]).mean(dim=0)


# ---------------------------------------------------------------------- NAS


@pytest.mark.parametrize(("method", "place"), [("memit", "block"), ("rome", "down")])
def test_nas_gives_every_value_the_norm_of_values_on_the_original_model(method: str, place: ValuePlace) -> None:
    """v* ← α v* / ‖v*‖ with α = mean ‖v₀ + δ‖ over facts of the original model, all found with other means here."""
    layer, first, second = 2, facts(1), facts(1, start=1)
    plain = make(method, layers=[layer])
    known = facts(3, split="validation")
    alpha = (added_by_mlp(plain, known, layer) + deltas_found(plain, known, layer, place)).norm(dim=-1).mean()

    model = make(method, layers=[layer], norm_anchor=3)
    for requests in (first, second):  # on the original model, and on an edited one
        before = added_by_mlp(model, requests, layer)
        solved = before + deltas_found(model, requests, layer, place)
        assert abs(float(solved.norm() / alpha) - 1) > 1e-3
        model.trace = {}
        model.edit(requests)
        wanted = alpha * solved / solved.norm() - before
        assert (model.trace["v_delta.0"] - wanted[0]).norm() < 1e-3 * wanted.norm()


def test_nas_goes_on_alike_after_saving(tmp_path: Path) -> None:
    model = make("memit", norm_anchor=2)
    model.edit(facts(1))
    model.save_pretrained(tmp_path / "edits")
    loaded = EditableModel.from_pretrained(tmp_path / "edits")
    for each in (model, loaded):
        each.edit(facts(1, start=1))
    assert model_digest(loaded.base_model) == model_digest(model.base_model)


def test_nas_leaves_alone_what_a_joint_solve_holds_in_place() -> None:
    """A fact that holds has δ = 0: rescaled to α it would be written again."""
    model = make("memit", norm_anchor=2, sequence="joint", joint_passes=4, joint_caution=1.0, joint_until=0.01)
    model.edit(facts(2))
    assert [edit.diagnostics["joint"]["passes"] for edit in model.edits] == [1, 1]


# ---------------------------------------------------------------------- BLUE


def test_blue_writes_the_first_and_the_last_layer_towards_values_of_their_own(tmp_path: Path) -> None:
    """R = δ of the layer itself, all of it; the value of the last layer is sought with the first one written."""
    requests = facts(2)
    # Moments of its own: what other tests leave in the common cache may be over so little text that a ridge is added.
    settings = {"mom2_update_weight": 3000.0, "stats_dir": str(tmp_path)}
    model = make("memit", layers=[0, 1, 2], boundary_layers=True, **settings)
    base = model.base_model
    digest = model_digest(base)
    modules = [model.anatomy.down(layer).path for layer in (0, 2)]
    wanted, moments = {}, model.statistics.moments(modules)  # of the weights as they are
    for module, layer in zip(modules, (0, 2), strict=True):
        r = deltas_found(model, requests, layer, "block").T
        k = mean_keys(model, requests, module).T.double()
        a = torch.linalg.solve(3000.0 * moments[module].mean() + k @ k.T, k).float()
        wanted[module] = r @ a.T
        stored: Any = get_module(base, module)
        with torch.no_grad():
            stored.weight.add_(wanted[module].T)  # GPT-2 stores its projections transposed
    with torch.no_grad():
        for module, change in wanted.items():
            stored = get_module(base, module)
            stored.weight.sub_(change.T)

    fresh = make("memit", layers=[0, 1, 2], boundary_layers=True, **settings)
    fresh.edit(requests)
    found = {key.rpartition(".")[0]: account.total for key, account in fresh.ledger.accounts.items()}
    assert set(found) == set(modules)
    for module, change in wanted.items():
        total = found[module]
        assert change.norm() > 0.1
        assert total is not None and (total - change).norm() < 2e-3 * change.norm()
    fresh.rollback("all")
    assert model_digest(fresh.base_model) == digest


@pytest.mark.parametrize("method", ["alphaedit", "pmet", "emmet", "rome"])
def test_relatives_write_boundary_layers_only(method: str) -> None:
    model = make(method, layers=[0, 1, 2], boundary_layers=True)
    digest = model_digest(model.base_model)
    model.edit(facts(1))
    assert {key.split(".")[2] for key in model.ledger.accounts} == {"0", "2"}
    model.rollback("all")
    assert model_digest(model.base_model) == digest


# ---------------------------------------------------------------------- BetaEdit, RLSEdit


@pytest.mark.parametrize(
    "settings", [{"refresh_every": 3}, {"nullspace": False}, {}], ids=["BetaEdit", "RLSEdit", "leaks weighed"]
)
def test_alphaedit_weighs_what_leaks(settings: dict[str, Any]) -> None:
    """ΔWᵀ = (P (K Kᵀ + K_e K_eᵀ + λ₁ C) + λ I)⁻¹ P K Rᵀ, solved densely here for a second batch."""
    weight, ridge = 30.0, 2.0
    model = make("alphaedit", layers=[2], leak_weight=weight, L2=ridge, nullspace_fraction=0.2, **settings)
    module = model.anatomy.down(2).path
    batches, traces, changes = [facts(4), facts(3, start=4)], [], []
    for batch in batches:
        model.trace = {}
        before = get_weight(get_module(model.base_model, module)).double()
        model.edit(batch)
        traces.append(model.trace)
        changes.append(get_weight(get_module(model.base_model, module)).double() - before)
    c = model.statistics.moments([module])[module].mean().double()
    earlier, k = (trace["k_star.2"].double() for trace in traces)
    r = traces[1]["right.2"].double()
    protected, eye = c, torch.eye(len(c), dtype=torch.float64)
    if settings.get("refresh_every"):  # after four facts the first three have been taken in
        protected = (earlier[:, :3] @ earlier[:, :3].T / 3 + weight * c) / (1 + weight)
    p = eye
    if settings.get("nullspace", True):
        values, vectors = torch.linalg.eigh(protected)
        free = vectors[:, values.cumsum(0) / values.sum() <= 0.2]
        p = free @ free.T
    system = p @ (k @ k.T + earlier @ earlier.T + weight * c) + ridge * eye
    expected = r @ torch.linalg.solve(system, p @ k).T
    assert (changes[1] - expected).norm() < 1e-3 * expected.norm()


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ConfigError, match="boundary_layers"):
        config("memit", boundary_layers=True, sequence="joint")
    with pytest.raises(ConfigError, match="norm_anchor"):
        config("memit", norm_anchor=4, expert_policy="top1")
    for setting in ({"boundary_layers": True}, {"norm_anchor": 4}):
        with pytest.raises(ConfigError, match="one value per fact"):
            config("anyedit", base={"edit_type": "memit", **setting})
    for setting in (
        {"nullspace": False},
        {"refresh_every": 5},
        {"nullspace": False, "refresh_every": 5, "leak_weight": 1.0},
    ):
        with pytest.raises(ConfigError, match=r"leak_weight|refresh_every"):
            config("alphaedit", **setting)
    model = make("memit", boundary_layers=True)
    model.edit(facts(1))
    before = model_digest(model.base_model)
    with pytest.raises(ConfigError, match="boundary_layers"):
        model.resolve_all()
    assert model_digest(model.base_model) == before

"""SimIE: parity with the reference on fine-tuning, and how its sequences are undone, saved and continued."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_kedit import EditableModel, FTMConfig, MEMITConfig, ROMEConfig, SimIEConfig
from hf_kedit.engine.weights import model_digest
from hf_kedit.errors import ConfigError, EditFailedError, RollbackError, UnsupportedModelError
from hf_kedit.methods.anyedit import AnyEditConfig
from hf_kedit.methods.auto import AutoMethodConfig
from hf_kedit.statistics.store import StatisticsStore
from tests.golden_cases import Case
from tests.methods.test_family import facts, neighbours, says


@pytest.mark.golden
@pytest.mark.parametrize("name", ["simie_gpt2", "simie_llama"])
def test_simie_matches_the_reference(name: str) -> None:
    case = Case(name)
    h: dict[str, Any] = case.spec["hyperparameters"]
    model, tokenizer = case.load()
    values = {"layers": [h["layer"]], "num_steps": h["ft_num_steps"], "lr": h["ft_lr"]}
    base = FTMConfig(**FTMConfig.published() | values)
    editable = EditableModel(model, SimIEConfig(base=base, ridge=h["lambda"]), tokenizer)
    (module,) = editable._method.edited_modules()

    def stored(matrix: torch.Tensor, key: str) -> torch.Tensor:
        return matrix if matrix.shape == case.expected[key].shape else matrix.T  # Conv1D

    editable.trace = {}
    before = torch.zeros(())
    for t, request in enumerate(case.spec["requests"]):
        editable.edit(**request)
        case.within(f"edit{t}/keys", editable.trace[f"keys/{module}"])
        case.within(f"edit{t}/base_delta", stored(editable.trace[f"base_delta/{module}"], f"edit{t}/base_delta"))
        total = editable.ledger.total(module)
        assert total is not None
        case.within(f"edit{t}/step", stored(total - before, f"edit{t}/step"))
        case.within(f"edit{t}/weight_delta", stored(total, f"edit{t}/weight_delta"))
        before = total
    keys = editable.ledger.keys(module)
    assert keys is not None
    case.within("final/P", keys @ keys.T + h["lambda"] * torch.eye(len(keys)))


@pytest.mark.parametrize("name", ["kedit/world-gpt2", "kedit/world-llama"])
def test_a_sequence_holds_and_is_undone_from_its_end(name: str, tmp_path: Path) -> None:
    model = EditableModel.from_pretrained(name, "simie")
    digest, requests = model_digest(model.base_model), facts(6)
    model.edit(requests[:3])
    after_three = model_digest(model.base_model)
    ids = [e.id for e in model.edits] + model.edit(requests[3:]).ids
    assert all(says(model, r.filled_prompt, r.target_new) for r in requests)
    kept = [says(model, prompt, answer) for r in requests for prompt, answer in neighbours(r)]
    assert sum(kept) >= 0.9 * len(kept)

    model.save_pretrained(tmp_path / "edits")
    loaded = EditableModel.from_pretrained(tmp_path / "edits")
    assert model_digest(loaded.base_model) == model_digest(model.base_model)
    for copy in (model, loaded):
        with pytest.raises(RollbackError, match=r"correction of.*roll back the last edits"):
            copy.rollback(ids[1])
        copy.rollback(3)
        assert model_digest(copy.base_model) == after_three
        copy.edit(requests[3])  # goes on as if the three had never been
    straight = EditableModel.from_pretrained(name, "simie")
    straight.edit(requests[:4])
    for copy in (model, loaded):
        assert model_digest(copy.base_model) == model_digest(straight.base_model)
        copy.rollback("all")
        assert model_digest(copy.base_model) == digest


def test_edits_on_top_of_the_present_weights_are_free_of_each_other() -> None:
    model = EditableModel.from_pretrained("kedit/world-gpt2", SimIEConfig(from_original=False))
    requests = facts(3)
    ids = model.edit(requests).ids
    model.rollback(ids[0])
    assert [e.id for e in model.edits] == ids[1:]
    assert says(model, requests[2].filled_prompt, requests[2].target_new)


def test_the_base_edits_the_original_weights() -> None:
    """Whatever came before, the base method sees the weights of the first day."""
    found = []
    for earlier in (0, 3):
        model = EditableModel.from_pretrained("kedit/world-gpt2", SimIEConfig())
        if earlier:
            model.edit(facts(earlier, start=4))
        model.trace = {}
        model.edit(facts(1))
        found.append(next(v for k, v in model.trace.items() if k.startswith("base_delta/")))
    assert torch.equal(found[0], found[1])


def test_configs() -> None:
    assert SimIEConfig(base=ROMEConfig(layers=[2])).base == {"edit_type": "rome", "layers": [2]}
    full = EditableModel.from_pretrained("kedit/world-gpt2", SimIEConfig(base="memit")).edit_config
    assert full.base["edit_type"] == "memit" and full.base["layers"]  # type: ignore[attr-defined]
    assert SimIEConfig.from_dict(full.to_dict()) == full
    for wrong in (
        {"base": 3},
        {"base": "simie"},
        {"base": "nothing"},
        {"ridge": 0},
        {"base": ROMEConfig(layers=[2]), "layers": [1]},
    ):
        with pytest.raises(ConfigError):
            SimIEConfig(**wrong)  # type: ignore[arg-type]
    model = EditableModel.from_pretrained("kedit/world-gpt2", SimIEConfig(base=FTMConfig(train_bias=True)))
    digest = model_digest(model.base_model)
    with pytest.raises(UnsupportedModelError, match="train_bias=False"):
        model.edit(facts(1))
    assert model_digest(model.base_model) == digest


@pytest.mark.parametrize("kind", [SimIEConfig, AnyEditConfig, AutoMethodConfig])
def test_second_moments_are_those_that_the_base_asks_for(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = MEMITConfig(layers=[1], stats_tokens=700, stats_dir=str(tmp_path), stats_ridge=0.5)
    model = EditableModel.from_pretrained("kedit/world-gpt2", kind(base=base))
    assert (model.statistics.tokens, model.statistics.root, model.statistics.ridge) == (700, tmp_path, 0.5)
    fetched: list[list[str]] = []
    monkeypatch.setattr(StatisticsStore, "fetch", lambda self, modules, **_: fetched.append(list(modules)))
    model._method.fetch()
    assert fetched == [["transformer.h.1.mlp.c_proj"]]
    assert EditableModel.from_pretrained("kedit/world-gpt2", kind(base="memit")).statistics.ridge is None


def test_a_base_method_that_fails_leaves_the_earlier_edits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = EditableModel.from_pretrained("kedit/world-gpt2", "simie")
    first, second, third = facts(3)
    kept = model.edit(first).ids
    state, totals = model_digest(model.base_model), {k: a.total for k, a in model.ledger.accounts.items()}
    base = type(model._method.base)  # type: ignore[attr-defined]
    real, calls = base.compute, []

    def failing(self: Any, requests: Any) -> Any:
        calls.append(model_digest(model.base_model))
        if len(calls) == 1:
            raise EditFailedError("no luck")
        return real(self, requests)

    monkeypatch.setattr(base, "compute", failing)
    result = model.edit([second], on_error="skip")
    assert not result.edits and len(result.failed) == 1
    assert calls[0] != state, "the base method works on the original weights"
    assert model_digest(model.base_model) == state and [e.id for e in model.edits] == kept
    assert all(torch.equal(model.ledger.accounts[k].total, v) for k, v in totals.items())  # type: ignore[arg-type]
    assert says(model, first.filled_prompt, first.target_new)
    model.edit(third)
    assert says(model, third.filled_prompt, third.target_new) and says(model, first.filled_prompt, first.target_new)

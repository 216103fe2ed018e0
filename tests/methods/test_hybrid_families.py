"""Hybrid models (convolution and recurrent state beside attention) and other unusual blocks: edited, undone, saved.

Whatever route an edit takes through the model, it is the edit that full forwards give.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_kedit import EditableModel, EditConfig, EditRequest
from hf_kedit.config import config_class
from hf_kedit.engine.replay import LastColumn, Replay
from hf_kedit.engine.sweep import Sweep
from hf_kedit.engine.weights import model_digest
from hf_kedit.errors import UnsupportedModelError
from tests.golden_cases import load_model
from tests.models import HYBRIDS, tiny_model

TEXTS = ["The river is long and the town is old.", "Many people like tennis, and some of them speak Italian."] * 8
FACTS = [
    EditRequest(prompt="{} plays the sport of", subject="Mira Halvorsen", target_new="tennis", id="a"),
    EditRequest(prompt="The mother tongue of {} is", subject="Tobias Renner", target_new="Italian", id="b"),
]
SMALL = {
    "v_num_grad_steps": 3,
    "num_steps": 3,
    "steps": 4,
    "stats_tokens": 200,
    "max_epochs": 4,
    "memory_tokens": 2000,
}
RESTARTED = ["rome", "memit", "grace", "wise", "t-patcher", "calinet", "kn"]
"""One method for each way in which the library runs a model from the middle."""
MORE = [
    "r-rome",
    "alphaedit",
    "pmet",
    "emmet",
    "memit-fe",
    "core",
    "eamet",
    "namet",
    "sphere",
    "simie",
    "ultraedit",
    "melo",
]


def config(method: str) -> EditConfig:
    """Few steps; the layers are the method's own default."""
    kind = config_class(method)
    names = {field.name: str(field.type) for field in dataclasses.fields(kind)}
    values: dict[str, Any] = {name: value for name, value in SMALL.items() if name in names}
    if "context_templates" in names:
        values["context_templates"] = ["{}", "The city is old. {}"]
    if method == "simie":
        values["base"] = {"edit_type": "rome", "v_num_grad_steps": 3, "context_templates": ["{}"]}
    return kind(**values)


def vocabulary() -> int:
    return max(len(load_model("llama")[1]), 420)


def edited(family: str, method: str) -> EditableModel:
    _, tokenizer = load_model("llama")
    model = EditableModel(tiny_model(family, vocab_size=vocabulary()), config(method), tokenizer, corpus=TEXTS)
    model.edit(FACTS, show_progress=False)
    return model


def changes(model: EditableModel) -> dict[str, torch.Tensor]:
    """Everything that the edits consist of."""
    totals = {key: account.total for key, account in model.ledger.accounts.items()}
    return {k: v.float() for k, v in {**totals, **model.sites.tensors()}.items() if v is not None}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 6, 7, 8, 9, 10]])).logits


def check(family: str, method: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = edited(family, method)
    with monkeypatch.context() as patch:
        full = Sweep.__init__
        patch.setattr(Replay, "_hoped_route", lambda self: "full")
        patch.setattr(LastColumn, "_restartable", lambda self, layer: False)
        patch.setattr(Sweep, "__init__", lambda *a, **k: full(*a, **{**k, "restart": False}))
        expected = changes(edited(family, method))
    found = changes(model)
    assert set(found) == set(expected) and expected
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-4 * value.norm().clamp_min(1e-3), name
    model.save_pretrained(folder)
    fresh = tiny_model(family, vocab_size=vocabulary())
    digest, before = model_digest(fresh), logits(fresh)
    loaded = EditableModel.from_pretrained(folder, base_model=fresh, tokenizer=model.tokenizer)
    assert torch.equal(logits(loaded), logits(model))
    model.rollback("all")
    assert model_digest(model.base_model) == digest
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("method", RESTARTED)
@pytest.mark.parametrize("family", ["qwen3_5_text", "nemotron_h"])
def test_every_kind_of_restart(family: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(family, method, tmp_path, monkeypatch)


@pytest.mark.parametrize("family", [f for f in HYBRIDS if f not in ("qwen3_5_text", "nemotron_h")])
def test_every_hybrid(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(family, "rome", tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("method", [*RESTARTED, *MORE])
@pytest.mark.parametrize("family", HYBRIDS)
def test_every_method_on_every_hybrid(
    family: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(family, method, tmp_path, monkeypatch)


def test_experts_that_are_added_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama 4 adds its routed experts to the output of the shared one, which WISE compares with its own."""
    check("llama4_text", "wise", tmp_path, monkeypatch)


def test_blocks_with_several_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check("gemma3n_text", "rome", tmp_path, monkeypatch)
    _, tokenizer = load_model("llama")
    model = EditableModel(tiny_model("gemma3n_text", vocab_size=vocabulary()), config("memit"), tokenizer)
    digest = model_digest(model.base_model)
    with pytest.raises(UnsupportedModelError, match="several streams"):  # and no second moment was collected
        model.edit(FACTS)
    assert model_digest(model.base_model) == digest


@pytest.mark.parametrize(
    ("family", "method", "layers"),
    [
        # three layers, all with an MLP: as derived from the depth
        ("qwen3_5_text", "rome", [1]),
        # attention, MLP, mixer, MLP
        ("nemotron_h", "memit", [1, 3]),
        ("nemotron_h", "ft-m", [1]),
        ("nemotron_h", "t-patcher", [3]),
        # MLP, experts, MLP, experts
        ("jamba", "rome", [2]),
        ("jamba", "t-patcher", [2]),
    ],
)
def test_a_default_layer_without_mlp_gives_way_to_the_next_that_has_one(
    family: str, method: str, layers: list[int]
) -> None:
    _, tokenizer = load_model("llama")
    model = EditableModel(tiny_model(family, vocab_size=vocabulary()), method, tokenizer)
    assert model.edit_config.layers == layers
    with_mlp = [layer.index for layer in model.anatomy.layers if layer.down is not None]
    assert set(layers) <= set(with_mlp)


def test_layers_that_the_user_names_stay() -> None:
    _, tokenizer = load_model("llama")
    base = tiny_model("nemotron_h", vocab_size=vocabulary())
    model = EditableModel(base, config_class("rome")(layers=[2]), tokenizer)
    assert model.edit_config.layers == [2]
    with pytest.raises(UnsupportedModelError, match=r"has no MLP.*1, 3"):
        model.edit(FACTS[0])

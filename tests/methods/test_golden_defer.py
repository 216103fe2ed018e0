"""DEFER against another implementation on a tiny model: parameters after each edit, losses, logits, decisions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_kedit import EditableModel, EditRequest
from hf_kedit.methods.defer import DEFERConfig, Deferral, Network
from tests.golden_cases import Case
from tests.methods.at_sites import state_at_key

NAMES = ("defer.weight", "defer.bias", "predict_values.weight", "predict_values.bias")


@pytest.mark.golden
def test_defer_matches_the_reference() -> None:
    case = Case("defer_llama")
    h: dict[str, Any] = case.spec["hyperparameters"]
    model, tokenizer = case.load()
    config = DEFERConfig(
        layers=[3], num_steps=h["n_iter"], lr=h["edit_lr"], threshold=h["threshold"], key_token="sequence"
    )
    editable = EditableModel(model, config, tokenizer)
    initial = Network(*(case.expected[f"init/{name}"] for name in NAMES))  # random in the reference
    editable._method.initial_network = lambda *_: initial  # type: ignore[attr-defined]
    for number, request in enumerate(case.spec["requests"]):
        editable.trace = {}
        editable.edit(EditRequest(**request))
        (memory,) = editable.sites.memories.values()
        assert isinstance(memory, Deferral)
        case.within(f"edit{number}/losses", editable.trace["losses"])
        for name, value in zip(NAMES, memory.network, strict=True):
            case.within(f"edit{number}/{name}", value)
    for number, query in enumerate(case.spec["queries"]):
        ids = tokenizer(query["prompt"], return_tensors="pt")["input_ids"]
        gate, _ = memory.network(state_at_key(editable, memory.paths[0], ids, "input")[None])
        with torch.no_grad():
            found = model(ids).logits[0, -1]
            with editable.disable_edits():
                plain = model(ids).logits[0, -1]
        assert abs(float(gate) - query["deferral_score"]) < 1e-4
        case.within(f"query{number}/logits", found)
        assert torch.equal(found, plain) != query["deferred"]

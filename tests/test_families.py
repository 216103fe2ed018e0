"""Every family of the resolver test can be edited: a rank-one edit, a batch over layers, fine-tuning; all undone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_kedit import EditableModel, EditRequest, FTMConfig, MEMITConfig, ROMEConfig
from hf_kedit.engine.capture import Tap, capture_at
from hf_kedit.engine.rows import rewrite_row
from hf_kedit.engine.weights import get_module, get_weight, model_digest
from hf_kedit.errors import UnsupportedModelError
from hf_kedit.statistics.moments import SecondMoment
from hf_kedit.tokens import pad_rows
from tests.golden_cases import load_model
from tests.models import FAMILIES, tiny_model

ENCODER_DECODERS = {"t5", "t5_v1_1", "bart"}
FUSED_EXPERTS = {"mixtral", "qwen3_moe", "gpt_oss"}
NEEDS_IMAGES = {"blip2"}
DECODERS = [f for f in FAMILIES if f not in ENCODER_DECODERS | FUSED_EXPERTS | NEEDS_IMAGES]
FACTS = [
    EditRequest(prompt="{} plays the sport of", subject="Mira Halvorsen", target_new="tennis", id="a"),
    EditRequest(prompt="The mother tongue of {} is", subject="Tobias Renner", target_new="Italian", id="b"),
]


def build(family: str, config: Any) -> EditableModel:
    _, tokenizer = load_model("llama")
    model = tiny_model(family, vocab_size=max(len(tokenizer), 420))
    return EditableModel(model, config, tokenizer)


def value_at_subject(model: EditableModel) -> torch.Tensor:
    """Output of the edited projection at the subject's last token of the bare prompt."""
    row = rewrite_row(model.tokenizer, FACTS[0], "{}")
    batch = pad_rows([row.ids])
    tap = Tap(model.anatomy.down(1).path)
    return capture_at(model.base_model, batch, torch.tensor([row.fact]), [tap])[tap][0]


def residual_ratios(model: EditableModel, layer: int = 1) -> list[float]:
    """How much of the way to its target is left to each of the facts behind a block, measured by whole forwards.

    Needs the trace of the edit.
    """
    tap, rows = Tap(model.anatomy.layers[layer].path), [rewrite_row(model.tokenizer, fact, "{}") for fact in FACTS]
    facts, wanted = torch.tensor([row.fact for row in rows]), model.trace[f"z.{layer}"].T

    def missing() -> torch.Tensor:
        reached = capture_at(model.base_model, pad_rows([row.ids for row in rows]), facts, [tap])[tap]
        return (wanted - reached).norm(dim=-1)

    after = missing()
    with model.disable_edits():
        return (after / missing()).tolist()


@pytest.mark.parametrize("family", DECODERS)
def test_rome_and_memit_on_every_decoder(family: str) -> None:
    rome = ROMEConfig(
        layers=[1], v_num_grad_steps=12, v_lr=0.5, v_weight_decay=1e-3, clamp_norm_factor=4,
        mom2_adjustment=False, context_templates=["{}", "The city is old. {}"],
    )  # fmt: skip
    model = build(family, rome)
    digest = model_digest(model.base_model)
    model.trace = {}
    result = model.edit(FACTS[0])
    wanted, numbers = model.trace["v_star.0"], result.edits[0].diagnostics
    assert numbers["route"] == "prefix"
    assert numbers["loss"][-1] < numbers["loss"][0]
    assert (wanted - model.trace["v_init.0"]).norm() > 0.5 * model.trace["v_init.0"].norm()
    assert torch.allclose(value_at_subject(model), wanted, atol=1e-3), "the projection must now give v*"
    model.rollback("all")
    assert model_digest(model.base_model) == digest

    model.set_method(
        MEMITConfig(
            layers=[0, 1],
            v_num_grad_steps=12,
            v_lr=0.5,
            v_weight_decay=1e-3,
            clamp_norm_factor=4,
            mom2_update_weight=0.1,
            context_templates=[["{}"], ["The city is old. {}"]],
        )
    )
    for layer in (0, 1):
        path = model.anatomy.down(layer).path
        width = get_weight(get_module(model.base_model, path)).shape[1]
        model.statistics.put(path, SecondMoment(torch.eye(width, dtype=torch.float64) * 1e5, 100_000, "identity"))
    model.trace = {}
    found = [edit.diagnostics["residual_ratio"] for edit in model.edit(FACTS).edits]
    assert found == pytest.approx(residual_ratios(model), rel=1e-2, abs=1e-5)
    assert max(found) < 0.9, "the batch has to come closer to its targets"
    model.rollback("b")
    model.rollback("a")
    assert model_digest(model.base_model) == digest


@pytest.mark.parametrize("family", [*DECODERS, *sorted(ENCODER_DECODERS)])
def test_fine_tuning_on_every_family(family: str) -> None:
    model = build(family, FTMConfig(layers=[1], lr=1e-2, num_steps=15, train_bias=True))
    digest = model_digest(model.base_model)
    result = model.edit(FACTS[0])
    losses = result.edits[0].diagnostics["loss"]
    assert losses[-1] < losses[0]
    with model.disable_edits():
        assert model_digest(model.base_model) == digest
    assert model_digest(model.base_model) != digest
    model.rollback("all")
    assert model_digest(model.base_model) == digest


@pytest.mark.parametrize("family", sorted(FUSED_EXPERTS))
def test_models_without_a_single_mlp_matrix_say_so(family: str) -> None:
    model = build(family, ROMEConfig(layers=[1], mom2_adjustment=False, context_templates=["{}"]))
    digest = model_digest(model.base_model)
    with pytest.raises(UnsupportedModelError, match="expert"):
        model.edit(FACTS[0])
    assert model_digest(model.base_model) == digest

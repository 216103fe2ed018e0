"""Suggested layers: on the embedded models, whose early site is known, and on made-up traces for every way out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_kedit import AutoEditConfig, EditableModel
from hf_kedit.data import load_edit_dataset
from hf_kedit.errors import ConfigError, UnknownMethodError
from hf_kedit.locate import Fact, Trace, TraceReport, causal_trace, suggest_layers
from hf_kedit.requests import load_requests
from tests.models import tiny_model

KINDS = ("hidden", "mlp", "hidden_without_mlp")


@pytest.mark.parametrize("name", ["kedit/world-gpt2", "kedit/world-llama"])
def test_embedded_models_are_edited_at_the_early_site(name: str) -> None:
    editable = EditableModel.from_pretrained(name, "ft-m")
    facts = load_requests(load_edit_dataset("world", split="test", limit=5))
    report = causal_trace(editable, facts, kinds=KINDS, samples=4)
    one = suggest_layers(editable, facts, "rome", report=report)
    several = suggest_layers(editable, facts, "MEMIT", report=report)
    assert one.source == several.source == "tracing"
    assert len(one.layers) == 1 and one.layers[0] in range(4)
    assert 1 <= len(several.layers) <= 4 and set(several.layers) <= set(range(4))
    assert several.layers == list(range(several.layers[0], several.layers[-1] + 1))
    assert several.method == "memit" and "5 facts" in several.reason
    assert one.to_dict()["layers"] == one.layers and len(one.curves["mlp"]) == 6
    assert editable.edit(facts[0]).edits  # the model is as it was
    editable.rollback()
    editable.set_method(AutoEditConfig.for_method("rome", layers=one.layers))
    result = editable.edit(facts[0]).edits[0].diagnostics
    assert result["target_probability_after"] > 0.5


def test_tracing_is_done_when_no_report_is_given(world_gpt2: EditableModel) -> None:
    facts = load_requests(load_edit_dataset("world", split="test", limit=2))
    found = suggest_layers(world_gpt2, facts, "rome", samples=2, seed=7, show_progress=False)
    assert found.source == "tracing" and found.report.seed == 7 and found.report.kinds == ("hidden", "mlp")
    range_ = suggest_layers(world_gpt2, facts, "memit", samples=2)
    assert set(range_.report.kinds) == set(KINDS)


# ---------------------------------------------------------------------- made-up traces on a model of 10 layers


@pytest.fixture(scope="module")
def deep() -> EditableModel:
    from transformers import AutoTokenizer

    from hf_kedit import embedded

    tokenizer = AutoTokenizer.from_pretrained(embedded.path("world-llama"))
    return EditableModel(tiny_model("llama", vocab_size=len(tokenizer), num_hidden_layers=10), "ft-m", tokenizer)


def made_up(hidden: list[float], mlp: list[float], severed: list[float], high: float = 0.9, facts: int = 10) -> Any:
    def table(effects: list[float]) -> torch.Tensor:
        return torch.tensor([[0.0] * 10, effects, [0.0] * 10]) + 0.1

    scores = {"hidden": table(hidden), "mlp": table(mlp), "hidden_without_mlp": table(severed)}
    trace = Trace(Fact("p s q", "s", (2, 3)), ["p", "s", "q"], (1, 2), "a", high, 0.1, scores)
    return TraceReport([trace] * facts, [], KINDS, 3, 5, 0.1, 1, "m", 10)


HIDDEN = [0.3, 0.5, 0.6, 0.7, 0.7, 0.6, 0.2, 0.0, 0.0, 0.0]
MLP = [0.1, 0.2, 0.3, 0.5, 0.4, 0.1, 0.0, 0.0, 0.6, 0.0]
SEVERED = [0.2, 0.2, 0.2, 0.2, 0.4, 0.5, 0.2, 0.0, 0.0, 0.0]


def test_the_layer_of_the_largest_mlp_effect_inside_the_early_site(deep: EditableModel) -> None:
    """Layer 8 has a larger effect, but the hidden state there carries nothing."""
    found = suggest_layers(deep, [], "rome", report=made_up(HIDDEN, MLP, SEVERED))
    assert (found.layers, found.source, found.default) == ([3], "tracing", [2])
    assert "0.50 of the 0.80" in found.reason and "Only" not in found.reason


def test_of_equal_windows_the_deepest(deep: EditableModel) -> None:
    mlp = [0.5, 0.5, 0.1, *MLP[3:]]
    mlp[3] = mlp[4] = 0.1
    assert suggest_layers(deep, [], "rome", report=made_up(HIDDEN, mlp, SEVERED)).layers == [1]


def test_the_run_of_layers_with_a_clear_gap(deep: EditableModel) -> None:
    """Gaps .1 .3 .4 .5 .3 .1: down to half of the largest."""
    found = suggest_layers(deep, [], "memit", report=made_up(HIDDEN, MLP, SEVERED))
    assert (found.layers, found.source) == ([1, 2, 3, 4], "tracing")
    assert str(found).startswith("memit: layers [1, 2, 3, 4] (tracing)")


@pytest.mark.parametrize(
    "report, words",
    [
        (made_up(HIDDEN, MLP, SEVERED, high=0.15), "Noise on the subject"),
        (made_up([0.05] * 10, MLP, SEVERED), "No state"),
        (made_up(HIDDEN, MLP, SEVERED, facts=0), "nothing to trace"),
        (made_up(HIDDEN, [0.01] * 10, HIDDEN), "MLPs"),
    ],
)
@pytest.mark.parametrize("method", ["rome", "memit"])
def test_the_default_where_tracing_tells_nothing(deep: EditableModel, report: Any, words: str, method: str) -> None:
    found = suggest_layers(deep, [], method, report=report)
    assert found.source == "default" and found.layers == found.default
    assert words in found.reason and "the method's own layers" in found.reason


def test_unknown_facts_lead_to_the_default(deep: EditableModel) -> None:
    fact = {"prompt": "By profession {} is a", "subject": "Tarosk Boayond", "ground_truth": ["sculptor"]}
    found = suggest_layers(deep, [fact], "rome", samples=1)
    assert found.source == "default" and "knows none of the 1 facts" in found.reason


def test_bad_input_is_refused(deep: EditableModel) -> None:
    report = made_up(HIDDEN, MLP, SEVERED)
    with pytest.raises(ConfigError, match="has no layers to choose"):
        suggest_layers(deep, [], "kn", report=report)
    with pytest.raises(UnknownMethodError, match="rome"):
        suggest_layers(deep, [], "romme", report=report)
    report.kinds = ("hidden", "mlp")
    assert suggest_layers(deep, [], "rome", report=report).layers == [3]
    with pytest.raises(ConfigError, match="hidden_without_mlp"):
        suggest_layers(deep, [], "memit", report=report)
    with pytest.raises(ConfigError, match="decoder-only"):
        suggest_layers(tiny_model("t5", vocab_size=2000), [], "rome", deep.tokenizer)

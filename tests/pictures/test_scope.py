"""Fine-tuning and LoRA of the parts that see: only these change, and everything comes back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_kedit import EditableModel
from hf_kedit.anatomy import resolve_anatomy
from hf_kedit.anatomy.sight import last_projections
from hf_kedit.config import EditConfig
from hf_kedit.errors import RequestError, UnsupportedModelError
from tests.models import tiny_model
from tests.pictures.test_edits import FACTS, holds
from tests.seeing import seeing

_TRAINED: dict[str, Any] = {"drift_bound": None, "stop_probability": None, "num_steps": 40, "lr": 3e-2}
MODULES = {
    ("llava", "connector"): ["model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"],
    ("llava", "vision"): [f"model.vision_tower.encoder.layers.1.mlp.fc{i}" for i in (1, 2)],
    ("qwen2_vl", "connector"): ["model.visual.merger.mlp.0", "model.visual.merger.mlp.2"],
    ("qwen2_vl", "vision"): [f"model.visual.blocks.1.mlp.fc{i}" for i in (1, 2)],
    ("blip2", "connector"): ["qformer.encoder.layer.1.output_query.dense", "language_projection"],
    ("blip2", "vision"): [f"vision_model.encoder.layers.1.mlp.fc{i}" for i in (1, 2)],
}


@pytest.mark.parametrize("method", ["ft-m", "lora"])
@pytest.mark.parametrize(("family", "scope"), MODULES)
def test_only_the_named_part_changes_and_comes_back(family: str, scope: str, method: str) -> None:
    model, processor = seeing(family)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    config = EditConfig.from_dict({"edit_type": method, "module_scope": scope, **_TRAINED})
    edited = EditableModel(model, config, processor, corpus=["a text."] * 9)
    unlikely = holds(edited, FACTS[1])[1]
    edited.edit(**FACTS[1], show_progress=False)
    assert holds(edited, FACTS[1])[1] < unlikely - 0.5
    state = model.state_dict()
    changed = [name for name in state if not torch.equal(state[name], before[name])]
    assert changed == [f"{path}.weight" for path in MODULES[family, scope]]
    edited.rollback()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_tower_whose_blocks_have_no_numbers_is_taken_from_its_end() -> None:
    text, seer = tiny_model("llama"), torch.nn.Module()
    names = ("early", "middle", "late")
    seer.vision_tower = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in names})
    paths = [f"vision_tower.{name}" for name in names]
    assert last_projections(seer, resolve_anatomy(text), "vision") == paths[1:]


@pytest.mark.parametrize("method", ["ft-m", "lora"])
def test_a_fact_of_text_cannot_be_written_where_pictures_are_seen(method: str) -> None:
    model, processor = seeing("llava")
    edited = EditableModel(model, EditConfig.from_dict({"edit_type": method, "module_scope": "vision"}), processor)
    with pytest.raises(RequestError, match="language"):
        edited.edit(prompt="Who is it?", target_new="he")


def test_a_model_of_text_has_no_such_part() -> None:
    model = tiny_model("llama")
    with pytest.raises(UnsupportedModelError, match="no vision"):
        last_projections(model, resolve_anatomy(model), "vision")


def test_lora_takes_names_within_a_part_only() -> None:
    model, processor = seeing("llava")
    config = EditConfig.from_dict({"edit_type": "lora", "module_scope": "vision", "target_modules": ["q_proj"]})
    edited = EditableModel(model, config, processor)
    paths = [f"model.vision_tower.encoder.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert edited._method.edited_modules() == paths
    edited.set_method(EditConfig.from_dict({"edit_type": "lora", "target_modules": ["q_proj"]}))
    assert all(path.startswith("model.language_model.layers.") for path in edited._method.edited_modules())

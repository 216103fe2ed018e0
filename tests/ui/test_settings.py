"""The form of a method, made of its config."""

from __future__ import annotations

import dataclasses
import json

import pytest

from hf_kedit import EditableModel
from hf_kedit.config import AutoEditConfig, config_class
from hf_kedit.errors import ConfigError
from hf_kedit.ui.settings import chosen_values, method_choices, settings_of


def test_auto_comes_first() -> None:
    choices = method_choices()
    assert choices[0] == ("auto (recommended)", "auto")
    names = [name for _, name in choices]
    assert len(set(names)) == len(names) and "memit" in names
    assert "mend" not in names  # which needs a trained editor


@pytest.mark.parametrize("method", [name for _, name in method_choices()])
def test_every_field_is_explained_and_has_its_value(model: EditableModel, method: str) -> None:
    settings = settings_of(method, model.profile)
    full = AutoEditConfig.for_method(method).complete(model.profile)
    known = {field.name for field in dataclasses.fields(config_class(method))}
    assert {setting.name for setting in settings} <= known
    assert "stats_dir" not in {setting.name for setting in settings}  # no folders of this machine
    for setting in settings:
        assert json.dumps(setting.value) == json.dumps(getattr(full, setting.name))  # where a tuple is a list
        assert setting.about, setting.name
        assert "\n" not in setting.about
    # What is shown, sent back unchanged, changes nothing.
    same = {s.name: s.value for s in settings if s.kind != "text"}
    assert chosen_values(method, model.profile, same) == {}


def test_kinds_of_controls(model: EditableModel) -> None:
    kinds = {setting.name: setting for setting in settings_of("rome", model.profile)}
    assert kinds["v_num_grad_steps"].kind == "whole" and kinds["kl_factor"].kind == "number"
    assert kinds["mom2_adjustment"].kind == "switch"
    assert kinds["kl_position"].kind == "choice" and kinds["kl_position"].choices == ("subject", "end")
    assert kinds["layers"].kind == "text"


def test_values_are_read_as_the_config_wants_them(model: EditableModel) -> None:
    filled = {"layers": "[1]", "v_num_grad_steps": 7.0, "kl_factor": None, "context_templates": " "}
    assert chosen_values("rome", model.profile, filled) == {"layers": [1], "v_num_grad_steps": 7}
    for bad in (-1, 2.7, float("nan"), float("inf"), "many", [1]):
        with pytest.raises(ConfigError, match="v_num_grad_steps"):
            chosen_values("rome", model.profile, {"v_num_grad_steps": bad})

"""Configs: coercion, unknown keys, files, and values completed for a model."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest

from hf_kedit import AutoEditConfig, EditConfig, FTLConfig, MEMITConfig, ROMEConfig
from hf_kedit.config import ModelProfile
from hf_kedit.errors import ConfigError, LayerError, UnknownMethodError

GPT2XL = ModelProfile("openai-community/gpt2-xl", 48, 1600, "layer", "gpt2")


def test_yaml_numbers_that_look_like_strings_are_coerced(tmp_path: Path) -> None:
    path = tmp_path / "rome.yaml"
    path.write_text(
        "layers: [17]\nv_lr: 5e-1\nv_weight_decay: 1e-3\nv_num_grad_steps: '20'\nmom2_adjustment: 'false'\n"
    )
    config = ROMEConfig.from_hparams(path)
    assert (config.v_lr, config.v_weight_decay, config.v_num_grad_steps) == (0.5, 1e-3, 20)
    assert config.mom2_adjustment is False


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"v_lr": "fast"}, "v_lr"),
        ({"v_lr": -1}, "greater than 0"),
        ({"layers": []}, "empty"),
        ({"layers": [1, 1]}, "twice"),
        ({"layers": "three"}, "layers"),
        ({"fact_token": "subject_middle"}, "fact_token"),
        ({"context_templates": ["no slot"]}, "slot"),
        ({"context_templates": ["text. {}"]}, "bare prompt"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_values_are_refused_when_the_config_is_made(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ROMEConfig(**values)


def test_unknown_keys_and_methods_suggest_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'v_num_grad_steps'"):
        ROMEConfig.from_dict({"v_num_grad_step": 3})
    with pytest.raises(UnknownMethodError, match="Did you mean 'memit'"):
        AutoEditConfig.for_method("memitt")
    with pytest.raises(ConfigError, match="edit_type"):
        EditConfig.from_dict({"layers": [1]})
    with pytest.raises(ConfigError, match="not of 'rome'"):
        ROMEConfig.from_dict({"edit_type": "memit"})


@pytest.mark.parametrize("content", ["[1, 2]", "a: [", "\xff"])
def test_unreadable_files(content: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError):
        ROMEConfig.from_hparams(tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match="cannot read"):
        ROMEConfig.from_hparams(tmp_path / "missing.yaml")


def test_save_and_load(tmp_path: Path) -> None:
    config = MEMITConfig(layers=[3, 1], mom2_update_weight=7, context_templates=[["{}"], ["A. {}"]])
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "edit_config.json").read_text())["edit_type"] == "memit"
    loaded = AutoEditConfig.from_pretrained(tmp_path)
    assert loaded == config
    assert loaded.layers == [1, 3]


def test_published_values_win_over_the_derivation_and_the_users_over_both() -> None:
    full = ROMEConfig().complete(GPT2XL)
    assert (full.layers, full.v_num_grad_steps, full.v_weight_decay) == ([17], 20, 0.5)
    assert ROMEConfig(layers=[3], v_lr=0.1).complete(GPT2XL).layers == [3]
    assert ROMEConfig(v_lr=0.1).complete(GPT2XL).v_lr == 0.1
    assert AutoEditConfig.for_model("gpt2-xl", method="memit").layers == [13, 14, 15, 16, 17]


def test_a_value_of_the_user_wins_even_if_it_is_the_class_default() -> None:
    mistral = ModelProfile("mistralai/Mistral-7B-v0.3", 32, 4096, "rms", "mistral")
    assert FTLConfig().complete(mistral).norm_constraint == 5e-5
    assert FTLConfig(layers=[3], lr=1e-3).complete(mistral).norm_constraint == 5e-5
    assert FTLConfig(norm_constraint=None).complete(mistral).norm_constraint is None
    assert FTLConfig(None, None, 0, 3).complete(mistral).batch_size == 3
    changed = FTLConfig()
    changed.lr = 0.25
    assert changed.complete(mistral).lr == 0.25
    free = FTLConfig(norm_constraint=None).complete(mistral)
    for same in (free, copy.copy(free), pickle.loads(pickle.dumps(free))):
        assert same.complete(mistral) == free
    assert FTLConfig(layers=None, lr=None).complete(mistral).layers == [21]  # an open field stays open


def test_a_model_without_a_file_gets_derived_values_and_is_told(caplog: pytest.LogCaptureFixture) -> None:
    profile = ModelProfile("somebody/never-heard-of", 32, 4096, "rms", "llama")
    with caplog.at_level("WARNING", logger="hf_kedit"):
        full = MEMITConfig().complete(profile)
    assert full.layers == [4, 5, 6, 7, 8, 9]
    assert full.clamp_norm_factor == 4 and full.v_weight_decay == 1e-3
    assert all(getattr(full, name) is not None for name in MEMITConfig.model_dependent_fields())


@pytest.mark.parametrize("layers", [[48], [-49], [0, 99]])
def test_layers_that_do_not_exist(layers: list[int]) -> None:
    with pytest.raises(LayerError, match="0 … 47"):
        ROMEConfig(layers=layers).complete(GPT2XL)


def test_negative_layers_count_from_the_end() -> None:
    assert FTLConfig(layers=[-1], lr=1e-3).complete(GPT2XL).layers == [47]


@pytest.mark.parametrize("depth", [1, 2, 3, 6, 12, 80])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_derived_layers_exist_at_any_depth(depth: int, norm: str) -> None:
    profile = ModelProfile("x/unknown", depth, 64, norm, "gpt2")
    for config in (ROMEConfig(), MEMITConfig(), FTLConfig()):
        layers = config.complete(profile).layers
        assert layers and all(0 <= layer < depth for layer in layers)

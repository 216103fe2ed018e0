"""EasyEdit's hyperparameter files: what carries over, what is reported, what is refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from hf_kedit import AutoEditConfig, EditConfig, FTLConfig, FTMConfig, KNConfig, MEMITConfig, ROMEConfig
from hf_kedit.cli import app
from hf_kedit.config import config_class
from hf_kedit.config.easyedit import convert_hparams
from hf_kedit.errors import ConfigError, UnknownMethodError
from hf_kedit.methods import registered_methods

# As such a file is laid out: numbers with a bare exponent, templates, keys of the loader.
ROME = """
alg_name: "ROME"
model_name: "./hugging_cache/gpt2-xl"
stats_dir: "./data/stats"
device: 0
layers: [17]
fact_token: "subject_last"
v_num_grad_steps: 20
v_lr: 5e-1
v_loss_layer: 47
v_weight_decay: 0.5
clamp_norm_factor: 4
kl_factor: 0.0625
mom2_adjustment: false
context_template_length_params: [[5, 10], [10, 10]]
rewrite_module_tmp: "transformer.h.{}.mlp.c_proj"
layer_module_tmp: "transformer.h.{}"
mlp_module_tmp: "transformer.h.{}.mlp"
attn_module_tmp: "transformer.h.{}.attn"
ln_f_module: "transformer.ln_f"
lm_head_module: "transformer.wte"
mom2_dataset: "wikipedia"
mom2_n_samples: 100000
mom2_dtype: "float32"
model_parallel: false
fp16: false
"""
WITHOUT_LAYERS = ("auto", "simie", "anyedit", "ike", "prompt", "serac")
FT = {"alg_name": "FT", "model_name": "gpt2", "layers": [0], "lr": "5e-4", "num_steps": 25, "batch_size": 3}
FT_OURS: dict[str, Any] = {"layers": [0], "lr": 5e-4, "num_steps": 25, "rows_per_step": 3}


def test_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "gpt2-xl.yaml").write_text(ROME)
    assert isinstance(yaml.safe_load(ROME)["v_lr"], str), "YAML reads such a number as text"
    with caplog.at_level(logging.WARNING, logger="hf_kedit"):
        config = EditConfig.from_easyedit(tmp_path / "gpt2-xl")  # they leave the suffix out
    assert config == ROMEConfig(
        layers=[17], v_num_grad_steps=20, v_lr=0.5, v_weight_decay=0.5, clamp_norm_factor=4.0,
        mom2_adjustment=False, context_template_length_params=[(5, 10), (10, 10)],
    )  # fmt: skip
    said = [r.getMessage() for r in caplog.records]
    ours = {"alg_name", "model_name", "layers", "fact_token", "v_num_grad_steps", "v_lr", "v_weight_decay"}
    ours |= {"clamp_norm_factor", "kl_factor", "mom2_adjustment", "context_template_length_params"}
    for key in set(yaml.safe_load(ROME)) - ours:
        assert any(line.startswith(f"{key}: ignored") for line in said), key
    assert not any(line.split(":")[0] in ours for line in said)
    converted = convert_hparams(tmp_path / "gpt2-xl.yaml")
    assert converted.model_name == "./hugging_cache/gpt2-xl" and converted.source["v_loss_layer"] == 47


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {**FT, "objective_optimization": "prompt_last"},
            FTLConfig(**FT_OURS),
        ),
        (
            {**FT, "objective_optimization": "target_new"},
            FTMConfig(**FT_OURS),
        ),
        ({**FT, "norm_constraint": False}, FTLConfig(**FT_OURS)),
        (
            {**FT, "norm_constraint": "5e-4"},
            FTLConfig(**FT_OURS, norm_constraint=5e-4),
        ),
        (
            {"alg_name": "MEMIT", "layers": [3, 4], "mom2_update_weight": 15000, "batch_size": 10},
            MEMITConfig(layers=[3, 4], mom2_update_weight=15000.0, keep_edited_keys=False),
        ),
        ({"alg_name": "KN", "batch_size": 20, "p": 0.5, "lr_scale": 1.0}, KNConfig(rows_per_step=20, p=0.5)),
    ],
)
def test_methods_that_need_a_rule(values: dict[str, Any], expected: EditConfig) -> None:
    assert convert_hparams(values).config == expected


@pytest.mark.parametrize("alg", ["ROME", "R-ROME", "MEMIT", "MEMIT_FE", "PMET", "EMMET", "CORE", "AlphaEdit", "KN"])
def test_names_of_methods(alg: str) -> None:
    converted = convert_hparams({"alg_name": alg, "layers": [1], "surprise": 1})
    assert converted.config.layers == [1] and "no such field" in converted.ignored["surprise"]


@pytest.mark.parametrize("alg", ["EAMET", "NAMET"])
def test_weights_of_layers(alg: str) -> None:
    config = convert_hparams({"alg_name": alg, "layers": [3, 4], "mom2_update_weight": [25000, 50000]}).config
    assert config.layer_weights == [25000.0, 50000.0] and config.mom2_update_weight == 50000.0  # type: ignore[attr-defined]
    assert not convert_hparams({"alg_name": alg, "mom2_update_weight": 15000}).config.layer_weights  # type: ignore[attr-defined]


def test_every_method_of_this_library_can_be_named() -> None:
    config_class("rome")  # loads the methods
    for name in registered_methods():
        if name not in ("ft-l", "ft-m", "adalora"):
            assert convert_hparams({"alg_name": name.upper()}).config.edit_type == name
    assert convert_hparams({"alg_name": "LoRA", "lora_type": "adalora", "layers": []}).config.layers is None


@pytest.mark.parametrize("name", sorted(registered_methods()))
def test_a_converted_file_is_a_file_of_this_library(name: str, tmp_path: Path) -> None:
    """`kedit convert-hparams` for every method: its output is read back as the same config."""
    theirs = {
        "ft-l": {"alg_name": "FT", "objective_optimization": "prompt_last"},
        "ft-m": {"alg_name": "FT", "objective_optimization": "target_new"},
        "adalora": {"alg_name": "LoRA", "lora_type": "adalora"},
    }.get(name, {"alg_name": name})
    theirs |= {"model_name": "gpt2", "device": 0, "batch_size": 4} | (
        {} if name in WITHOUT_LAYERS else {"layers": [1]}
    )
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(theirs))
    words = ["convert-hparams", str(tmp_path / "theirs.yaml"), "--output", str(tmp_path / "ours.yaml")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0 and "device" in done.output, done.output
    config = AutoEditConfig.from_pretrained(tmp_path / "ours.yaml")
    assert config == convert_hparams(theirs).config and config.edit_type == name
    assert name in WITHOUT_LAYERS or config.layers == [1]


@pytest.mark.parametrize(
    ("alg", "theirs", "ours"),
    [
        ("GRACE", {"edit_lr": "1.0", "n_iter": 50, "eps": 1.0, "val_init": "cold", "replacement": "replace_last",
                   "inner_params": ["transformer.h[35].mlp.c_fc.weight"]},
         {"lr": 1.0, "num_steps": 50, "eps": 1.0, "value_init": "cold", "layers": [35],
          "module": "transformer.h.{}.mlp.c_fc"}),
        ("WISE", {"edit_lr": 1.0, "n_iter": 70, "densities": 0.4, "act_margin": [5.0, 20.0, 10.0]},
         {"lr": 1.0, "n_iter": 70, "density": 0.4, "act_margin": (5.0, 20.0, 10.0)}),
        ("MEND", {"edit_lr": "1e-4", "cedit": 0.2, "cloc": 2.0, "rank": 99}, {"edit_lr": 1e-4, "edit_weight": 0.2,
         "locality_weight": 2.0, "rank": 99}),
        ("MALMEN", {"n_blocks": 3, "loc_coef": 0.6, "token": "mask", "rank": 5},
         {"num_blocks": 3, "locality_weight": 0.6, "token": "attended", "rank": 5}),
        ("IKE", {"k": 16, "sentence_model_name": "all-MiniLM-L6-v2"}, {"k": 16, "retriever": "all-MiniLM-L6-v2"}),
        ("LoRA", {"lora_type": "lora", "rank": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}, {"rank": 4}),
        ("PMET", {"nll_loss_factor": 1.0, "mom2_update_weight": 6000}, {"nll_loss_factor": 1.0}),
        ("UltraEdit", {"batch_size": 100, "lr": "1e-6", "token": "ans"}, {"rows_per_step": 100, "lr": 1e-6}),
        ("SPHERE", {"cumulative_ratio": 0.3, "suppression_strength": 0.7},
         {"sphere_fraction": 0.3, "sphere_strength": 0.7}),
        ("EAMET", {"tau": 0.2, "weight_decay_method": "norm", "delta_init": "target_init"},
         {"temperature": 0.2, "length_rule": "norm", "target_init": True}),
        ("ROME", {"use_chat_template": True, "enable_thinking": False}, {"prompt_format": "chat"}),
        ("ROME", {"use_chat_template": False}, {"prompt_format": None}),
        ("SERAC_MULTI", {"cloc": 0.5}, {"locality_weight": 0.5}),
    ],
)  # fmt: skip
def test_their_words_for_our_fields(alg: str, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    converted = convert_hparams({"alg_name": alg, **theirs})
    found = {name: getattr(converted.config, name) for name in ours}
    assert {k: tuple(v) if isinstance(v, tuple | list) and k != "layers" else v for k, v in found.items()} == ours
    assert not converted.ignored.keys() & {"n_iter", "edit_lr", "rank", "k"}


def test_a_file_in_sections() -> None:
    """MELO's: what counts stands in sections, the name of the model as well, and the rank is that of a block."""
    converted = convert_hparams(
        {
            "alg_name": "MELO",
            "max_length": 512,
            "grace": {"name": "grace", "num_iter": 7, "init_radius": 0.3, "num_block": 9, "num_rank_per_block": 3},
            "model": {"name": "a/model", "target_modules": ["h.5.fc"], "grace_layer": "h.4.fc", "pt": "x"},
            "lora": {"lora_r": 64, "cos": False},
        }
    )
    config: Any = converted.config
    assert converted.model_name == "a/model"
    assert (config.num_steps, config.radius, config.num_blocks, config.rank) == (7, 0.3, 9, 3)
    assert (config.target_modules, config.module, config.layers) == (["h.5.fc"], "h.{}.fc", [4])
    assert {"pt", "cos", "max_length"} <= converted.ignored.keys() and not {"grace", "name"} & converted.ignored.keys()
    assert convert_hparams({"alg_name": "MELO", "grace": 1}).ignored["grace"], "no section"


def test_a_model_that_sees_is_named_by_its_language_model() -> None:
    converted = convert_hparams({"alg_name": "MEND_MULTI", "name": "a/language", "model_name": "blip2", "opt": "Adam"})
    assert converted.model_name == "a/language" and "kedit train" in converted.ignored["opt"]


def test_parameters_in_brackets() -> None:
    names = ["transformer.h[9].mlp.c_fc.weight", "transformer.h[10].mlp.c_fc.weight"]
    config: Any = convert_hparams({"alg_name": "MEND", "inner_params": names}).config
    assert config.modules == ["transformer.h.9.mlp.c_fc", "transformer.h.10.mlp.c_fc"]
    assert "inner_params" in convert_hparams({"alg_name": "KN", "inner_params": names}).ignored


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({}, ConfigError, "alg_name"),
        ({"alg_name": "ROMEO"}, UnknownMethodError, "rome"),
        ({"alg_name": "FT", "objective_optimization": "target_neu"}, ConfigError, "target_new"),
        ({"alg_name": "ROME", "v_lr": "fast"}, ConfigError, "v_lr"),
    ],
)
def test_what_is_refused(values: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        convert_hparams(values)


def test_a_file_of_another_method() -> None:
    with pytest.raises(ConfigError, match="'memit'"):
        ROMEConfig.from_easyedit({"alg_name": "MEMIT"})
    with pytest.raises(ConfigError, match="cannot read"):
        EditConfig.from_easyedit("/nowhere/gpt2")

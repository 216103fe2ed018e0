"""Configs: coercion, unknown keys, files, and values completed for a model."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import re
from pathlib import Path
from typing import Any

import pytest

from hf_kedit import AutoEditConfig, EditConfig, FTLConfig, MEMITConfig, ROMEConfig
from hf_kedit.config import ModelProfile
from hf_kedit.config.hparams import user_hparams
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
        ({"rows_per_step": 0}, "rows_per_step = 0.*greater than 0"),
    ],
)
def test_bad_values_are_refused_when_the_config_is_made(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ROMEConfig(**values)


@pytest.mark.parametrize(
    ("method", "field", "least", "wrong", "bound"),
    [
        # the smallest (or, for a bound above, the largest) value that is taken, one that is not, and what is said
        ("ft-l", "num_steps", 1, 0, "greater than 0"),
        ("ft-l", "weight_decay", 0, -1e-9, "greater than or equal to 0"),
        ("ft-m", "norm_constraint", 1e-9, 0, "greater than 0"),
        ("ft-m", "rect_keep", 1, 1.001, "less than or equal to 1"),
        ("mend", "rect_keep", 1e-9, 0, "greater than 0"),
        ("lora", "lora_dropout", 0, 1, "less than 1"),
        ("adalora", "beta", 0.999, 1, "less than 1"),
        ("adalora", "lora_alpha", 1, 0, "greater than 0"),
        ("kn", "adaptive_threshold", 0.999, 1, "less than 1"),
        ("kn", "p", 0, 1, "less than 1"),
        ("grace", "eps", 1e-9, 0, "greater than 0"),
        ("defer", "threshold", 0.999, 1, "less than 1"),
        ("melo", "num_blocks", 1, 0, "greater than 0"),
        ("wise", "density", 1, 1.5, "less than or equal to 1"),
        ("wise", "act_margin", [1, 2, 3], [1, 2], "at least 3 items"),
        ("t-patcher", "memory_margin", 0, -1, "greater than or equal to 0"),
        ("calinet", "slots", 1, 0, "greater than 0"),
        ("ike", "k", 0, -1, "greater than or equal to 0"),
        ("serac", "threshold", 1, 0, "greater than 0"),
        ("ke", "margin_decay", 0, 1.001, "less than or equal to 1"),
        ("malmen", "edit_weight", 0, -1, "greater than or equal to 0"),
        ("rledit", "discount", 1, 1.001, "less than or equal to 1"),
        ("ultraedit", "lr", 1e-12, float("nan"), "greater than 0"),
        ("simie", "ridge", 1e-12, 0, "greater than 0"),
        ("memit", "rows_per_step", 1, 0, "greater than 0"),
    ],
)
def test_every_range_is_checked_and_named(method: str, field: str, least: object, wrong: object, bound: str) -> None:
    config = AutoEditConfig.for_method(method, **{field: least})
    assert getattr(config, field) == least
    with pytest.raises(ConfigError, match=re.escape(f"{type(config).__name__}.{field} = {wrong!r}: ") + f".*{bound}"):
        AutoEditConfig.for_method(method, **{field: wrong})


def test_the_place_inside_a_list_is_named() -> None:
    with pytest.raises(ConfigError, match=r"act_margin\[1\] = -2: .*greater than 0"):
        AutoEditConfig.for_method("wise", act_margin=[1, -2, 3])


def test_a_missing_hparams_file_is_said_once_per_model_and_machine(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(name: str, config: EditConfig) -> list[str]:
        """What a process of its own says."""
        monkeypatch.setattr("hf_kedit.logging._said", set())
        caplog.clear()
        config.complete(ModelProfile(name=name, num_layers=8, hidden_size=64, norm="rms", model_type="llama"))
        return [r.getMessage() for r in caplog.records if "no hparams file" in r.getMessage()]

    monkeypatch.setenv("KEDIT_HOME", str(tmp_path / "home"))
    (text,) = said("org/some model", ROMEConfig())
    assert "`kedit inspect 'org/some model' --method rome`" in text and "layers=" in text
    assert "`kedit tune 'org/some model' --method rome`" in text  # tests/cli/test_tune.py runs this command
    assert said("org/some model", ROMEConfig()) == [] == said("org/some model", FTLConfig())
    assert len(said("org/another", FTLConfig())) == 1
    for _ in range(2):  # a model without a name is any model
        (text,) = said("", ROMEConfig())
        assert "kedit inspect" not in text and "edit_config" in text

    logging.getLogger("hf_kedit").setLevel(logging.ERROR)  # what nobody hears was not said
    assert said("org/third", ROMEConfig()) == []
    logging.getLogger("hf_kedit").setLevel(logging.WARNING)
    assert len(said("org/third", ROMEConfig())) == 1

    (tmp_path / "file").write_text("")
    for home in (tmp_path / "file", tmp_path / "file" / "below"):  # nothing can be kept there
        monkeypatch.setenv("KEDIT_HOME", str(home))
        assert len(said("org/some model", ROMEConfig())) == 1 == len(said("org/some model", ROMEConfig()))


def test_own_files_come_before_packaged_ones_and_say_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found at once by the last part of the name, also for a model with a packaged file; a broken one is named."""
    gpt2 = ModelProfile(name="openai-community/gpt2-xl", num_layers=48, hidden_size=1600)
    packaged = ROMEConfig().complete(gpt2)
    monkeypatch.setenv("KEDIT_HOME", str(tmp_path))
    assert ROMEConfig().complete(gpt2) == packaged and user_hparams() == tmp_path / "hparams"
    file = user_hparams() / "ROME" / "mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("match: [gpt2-xl]\nlayers: [3]\nv_lr: 0.25\n", encoding="utf-8")
    own = ROMEConfig(v_lr=0.5).complete(gpt2)
    assert own.layers == [3] and own.v_lr == 0.5 and packaged.layers == [17]
    assert [str(file) in r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == [True]
    ROMEConfig().complete(gpt2)
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 1
    without = ROMEConfig().complete(gpt2, files=False)
    assert without.layers not in ([3], [17]) and without.layers is not None
    assert FTLConfig().complete(gpt2).layers == [0]  # of another method, the packaged one
    file.write_text("match: [gpt2-xl", encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape(str(file))):
        ROMEConfig().complete(gpt2)


@pytest.mark.parametrize(
    ("method", "field"),
    [("mend", "modules"), ("melo", "target_modules"), ("ultraedit", "edit_modules"), ("wise", "irrelevant_texts")],
)
def test_an_empty_list_is_no_way_to_say_default(method: str, field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field} is empty; leave it out"):
        AutoEditConfig.for_method(method, **{field: []})


@pytest.mark.parametrize(
    ("method", "field", "value"),
    [
        ("rome", "separator", "\ud83d"),
        ("memit", "context_templates", ["{}", "\ud83d {}"]),
        ("rome", "stats_dataset", "\ud83d.txt"),
        ("ike", "demonstrations", [{"prompt": "\ud83d", "target_new": "x"}]),
        ("ike", "demonstrations", [{"prompt": Path("x"), "target_new": "x"}]),
        ("simie", "base", {"edit_type": "rome", "separator": "\ud83d"}),
    ],
)
def test_what_could_never_be_saved_is_refused_when_the_config_is_made(method: str, field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=r"surrogate|JSON") as caught:
        AutoEditConfig.for_method(method, **{field: value})
    str(caught.value).encode("utf-8")


# ---------------------------------------------------------------------- old names


def _old_name_said(caplog: pytest.LogCaptureFixture) -> list[str]:
    said = [r.getMessage() for r in caplog.records if "'batch_size' is called 'rows_per_step' now" in r.getMessage()]
    caplog.clear()
    return said


def test_the_old_name_of_a_field_is_understood_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In Python, in files, in the call of `AutoEditConfig`, and as an attribute."""
    monkeypatch.setattr("hf_kedit.logging._said", set())
    old: dict[str, Any] = {"batch_size": 3}
    assert FTLConfig(**old) == FTLConfig(rows_per_step=3) and len(_old_name_said(caplog)) == 1
    assert FTLConfig(**old).given == {"rows_per_step": 3} and not _old_name_said(caplog)
    assert AutoEditConfig.for_method("ft-l", **old) == FTLConfig(**old) and _old_name_said(caplog)
    assert FTLConfig().changed(old).rows_per_step == 3
    assert EditConfig.from_dict({"edit_type": "ft-l", **old}) == FTLConfig(**old) and _old_name_said(caplog)
    (tmp_path / "ft.yaml").write_text("batch_size: 3\n")
    assert FTLConfig.from_hparams(tmp_path / "ft.yaml") == FTLConfig(**old)
    config = FTLConfig(**old)
    assert config.batch_size == 3
    config.batch_size = 5
    assert config.rows_per_step == 5 and config.to_dict()["rows_per_step"] == 5
    assert "batch_size" not in config.to_dict()


def test_what_0_1_0_saved_is_read_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved = {"edit_type": "ft-l", "layers": [2], "separator": None, "seed": 0, "batch_size": 3, "num_steps": 7}
    (tmp_path / "edit_config.json").write_text(json.dumps(saved))
    assert AutoEditConfig.from_pretrained(tmp_path) == FTLConfig(layers=[2], rows_per_step=3, num_steps=7)
    assert not _old_name_said(caplog)


def test_a_field_under_both_names_is_refused() -> None:
    both: dict[str, Any] = {"batch_size": 3, "rows_per_step": 4}
    for make in (lambda: FTLConfig(**both), lambda: FTLConfig.from_dict(both), lambda: FTLConfig().changed(both)):
        with pytest.raises(ConfigError, match="'batch_size' is the old name of 'rows_per_step'; give only one"):
            make()


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
    assert FTLConfig(None, None, 0, 3).complete(mistral).rows_per_step == 3
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


@pytest.mark.parametrize(
    ("wanted", "with_mlp", "chosen"),
    [
        ([1], (0, 1, 2, 3), [1]),
        ([1], (0, 2, 3), [2]),  # the next above
        ([2], (0, 1), [1]),  # or else below
        ([1], (0, 3), [0]),  # the last of four layers only where there is no other
        ([1], (3,), [3]),
        ([3], (0, 3), [3]),  # or where it was meant
        ([0, 1], (1, 2, 3), [1, 2]),  # each layer once
        ([0, 1, 2], (1, 3), [1, 3]),
        ([1, 2], (), [1, 2]),  # not known
    ],
)
def test_layers_with_an_mlp(wanted: list[int], with_mlp: tuple[int, ...], chosen: list[int]) -> None:
    assert ModelProfile("x/y", 4, 32, mlp_layers=with_mlp).with_mlp(wanted) == chosen


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


def test_a_message_is_short_however_deep_or_long_the_value_is() -> None:
    deep: list[object] = []
    for _ in range(3000):
        deep = [deep]
    for changes in ({"edit_type": deep}, {"layers": deep}, {"layers": "x" * 10**6}):
        with pytest.raises(ConfigError) as raised:
            EditConfig.from_dict({"edit_type": "memit", **changes})
        assert len(str(raised.value)) < 2000

"""The packaged hyperparameter files: they parse, mean what they say, and exactly one is found for a model."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_kedit.config import AutoEditConfig, ModelProfile, config_class
from hf_kedit.config.hparams import find_hparams
from tests.hparams_files import FILES, ROOT

METHODS = sorted({p.parent.name for p in FILES})
# Endings that follow a family's name on the Hub; what a pattern's * stands for when patterns are compared.
ENDINGS = ("", "-hf", "-chat", "-chat-hf", "-instruct", "-v0.1", "-instruct-v0.3", "-base", "-int4", "-edited")

BASIC = ("ROME", "MEMIT", "FT-L", "FT-M")
FLOATS = {
    "v_lr", "v_weight_decay", "clamp_norm_factor", "kl_factor", "mom2_update_weight",
    "lr", "weight_decay", "norm_constraint",
}  # fmt: skip

# Real model ids, the layer that the literature edits first, and the method.
KNOWN = [
    ("ROME", "openai-community/gpt2-medium", [8]),
    ("ROME", "openai-community/gpt2-large", [12]),
    ("ROME", "openai-community/gpt2-xl", [17]),
    ("ROME", "EleutherAI/gpt-j-6B", [5]),
    ("ROME", "EleutherAI/gpt-j-6b", [5]),
    ("ROME", "EleutherAI/gpt-neox-20b", [15]),
    ("ROME", "huggyllama/llama-13b", [10]),
    ("ROME", "meta-llama/Llama-2-7b-chat-hf", [5]),
    ("MEMIT", "openai-community/gpt2-xl", [13, 14, 15, 16, 17]),
    ("MEMIT", "EleutherAI/gpt-j-6b", [3, 4, 5, 6, 7, 8]),
    ("MEMIT", "meta-llama/Meta-Llama-3-8B-Instruct", [4, 5, 6, 7, 8]),
    ("MEMIT", "meta-llama/Llama-3.1-8B-Instruct", [4, 5, 6, 7, 8]),
    ("MEMIT", "Qwen/Qwen2.5-7B-Instruct", [4, 5, 6, 7, 8]),
    ("MEMIT", "THUDM/chatglm2-6b", [13, 14, 15, 16, 17]),
    ("FT-L", "openai-community/gpt2-xl", [0]),
    ("FT-L", "/models/gpt2-xl/", [0]),
    ("FT-L", "mistralai/Mistral-7B-Instruct-v0.3", [21]),
    ("FT-M", "meta-llama/Llama-3.2-3B-Instruct", [21]),
    ("FT-M", "internlm/internlm-chat-7b", [0, 31]),
    ("FT-M", "google-t5/t5-3b", [0, 21]),
]
# Neighbours in name that are other models: a file for them would be a wrong one.
STRANGERS = [
    "openai-community/gpt2",
    "meta-llama/Llama-2-70b-hf",
    "meta-llama/Llama-2-13b-hf",
    "meta-llama/Llama-3.2-1B",
    "meta-llama/Meta-Llama-3-70B",
    "mistralai/Mixtral-8x7B-v0.1",
    "Qwen/Qwen2.5-72B",
    "Qwen/Qwen2-VL-7B-Instruct",
    "Qwen/Qwen3-8B",
    "baichuan-inc/Baichuan2-7B-Base",
    "internlm/internlm2-7b",
    "google-t5/t5-small",
]


def _load(path: Path) -> dict[str, Any]:
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(data, dict)
    return data


def _name(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def test_there_are_files() -> None:
    assert set(BASIC) <= set(METHODS)
    assert len(FILES) >= 60
    training = ROOT / "TRAINING"  # read by the training commands, one folder deeper
    unread = [p for p in ROOT.rglob("*.y*ml") if p not in FILES and training not in p.parents]
    assert not unread, "only <METHOD>/<model>.yaml is found"


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_source_and_match(path: Path) -> None:
    """A header says where the numbers come from; ``match`` is a list of lower-case patterns on a bare name."""
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ") and "source:" in text.lower()
    patterns = _load(path)["match"]
    assert isinstance(patterns, list) and patterns
    for pattern in patterns:
        assert isinstance(pattern, str) and pattern == pattern.lower() and "/" not in pattern
        assert pattern.strip("*?"), f"{pattern!r} matches every model"
    assert any(fnmatchcase(path.stem.lower(), p) for p in patterns), "a file must match its own name"


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_values_have_the_right_types(path: Path) -> None:
    """As read by plain PyYAML: a number without a dot before its exponent would be a string."""
    for key, value in _load(path).items():
        if key == "match":
            continue
        if key == "layers":
            assert value and all(type(i) is int and i >= 0 for i in value)
            assert value == sorted(set(value))
        elif key in ("v_num_grad_steps", "num_steps", "rows_per_step", "stats_tokens"):
            assert type(value) is int and value > 0, key
        elif isinstance(value, str):
            assert not re.fullmatch(r"[-+.\deE]+", value), f"{key}: {value!r} is a string, write the dot: 1.0e-3"
        elif key in FLOATS:
            assert type(value) is float, f"{key}: {value!r}, write the dot: 1.0"


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_the_config_accepts_it(path: Path) -> None:
    """Known keys, values in range, and nothing left open that depends on the model."""
    cls = config_class(path.parent.name)
    config = cls.from_hparams(path)
    values = _load(path)
    for name in set(values) - {"match"}:
        assert getattr(config, name) == values[name]
    open_fields = [n for n in cls.model_dependent_fields() if getattr(config, n) is None and n not in values]
    assert not open_fields, f"{open_fields} depend on the model: the file must give them"


@pytest.mark.parametrize("method", METHODS)
def test_no_model_matches_two_files(method: str) -> None:
    files = [p for p in FILES if p.parent.name == method]
    patterns = {p: _load(p)["match"] for p in files}
    samples = {pattern.replace("*", end) for ps in patterns.values() for pattern in ps for end in ENDINGS}
    samples |= {name.rsplit("/", 1)[-1].lower() for _, name, _ in KNOWN if not name.endswith("/")}
    for sample in sorted(samples):
        hits = [p.stem for p, ps in patterns.items() if any(fnmatchcase(sample, pattern) for pattern in ps)]
        assert len(hits) <= 1, f"{method}: {sample!r} matches {hits}"


@pytest.mark.parametrize("method, name, layers", KNOWN, ids=lambda v: str(v))
def test_known_models(method: str, name: str, layers: list[int]) -> None:
    assert AutoEditConfig.for_model(name, method).layers == layers


@pytest.mark.parametrize("method", BASIC)
@pytest.mark.parametrize("name", STRANGERS)
def test_other_models_get_no_file(method: str, name: str) -> None:
    assert find_hparams(method, name) is None


def test_same_numbers_for_both_objectives() -> None:
    """FT-L and FT-M differ in the loss only; a correction of one file must reach the other."""
    for path in sorted((ROOT / "FT-L").glob("*.yaml")):
        if not path.stem.startswith("world-"):
            assert _load(path) == _load(ROOT / "FT-M" / path.name), path.name


def test_a_file_completes_a_config() -> None:
    """The user's value wins, the file gives the rest."""
    profile = ModelProfile(name="openai-community/gpt2-medium", num_layers=24, hidden_size=1024)
    config = AutoEditConfig.for_method("rome", v_lr=0.25).complete(profile)
    assert (config.layers, config.v_lr, config.clamp_norm_factor) == ([8], 0.25, 3.0)  # type: ignore[attr-defined]

"""Every packaged file fits the model that it is for: layers exist, and what they name is the projection out of an MLP.

The models are built without weights, in the sizes of their public configurations; families whose code is not part of
transformers by stand-ins of the same module tree and depth. The values of the locate-then-edit family are compared
with the published tables.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

from hf_kedit import embedded
from hf_kedit.anatomy import profile_of, resolve_anatomy
from hf_kedit.books.ledger import Ledger
from hf_kedit.config import config_class
from hf_kedit.methods.base import Workbench, method_class
from tests.hparams_files import FILES as PACKAGED
from tests.hparams_files import ROOT
from tests.models import quiet, stand_in


def gpt2(layers: int, width: int, heads: int) -> tuple[str, dict[str, Any]]:
    return "gpt2", {"n_layer": layers, "n_embd": width, "n_head": heads}


def llama(layers: int, width: int, inner: int, heads: int, kv: int, kind: str = "llama") -> tuple[str, dict[str, Any]]:
    return kind, {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
    }


# file name → model type and sizes of the public configuration, or the layout of a stand-in and its depth
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": gpt2(12, 768, 12),
    "gpt2-medium": gpt2(24, 1024, 16),
    "gpt2-large": gpt2(36, 1280, 20),
    "gpt2-xl": gpt2(48, 1600, 25),
    "gpt-j-6b": ("gptj", {"n_layer": 28, "n_embd": 4096, "n_head": 16}),
    "gpt-neox-20b": llama(44, 6144, 24576, 64, 64, "gpt_neox"),
    "llama-7b": llama(32, 4096, 11008, 32, 32),
    "llama-13b": llama(40, 5120, 13824, 40, 40),
    "llama-2-7b": llama(32, 4096, 11008, 32, 32),
    "llama-2-13b": llama(40, 5120, 13824, 40, 40),
    "deepseek-llm-7b": llama(30, 4096, 11008, 32, 32),
    "falcon-7b": ("falcon", {"num_hidden_layers": 32, "hidden_size": 4544, "ffn_hidden_size": 18176}),
    "llama-3-8b": llama(32, 4096, 14336, 32, 8),
    "llama-3.1-8b": llama(32, 4096, 14336, 32, 8),
    "llama-3.2-3b": llama(28, 3072, 8192, 24, 8),
    "smollm2-135m": llama(30, 576, 1536, 9, 3),
    "mistral-7b": llama(32, 4096, 14336, 32, 8, "mistral"),
    "mistral-7b-v0.3": llama(32, 4096, 14336, 32, 8, "mistral"),
    "qwen2-7b": llama(28, 3584, 18944, 28, 4, "qwen2"),
    "qwen2.5-7b": llama(28, 3584, 18944, 28, 4, "qwen2"),
    "qwen2.5-14b": llama(48, 5120, 13824, 40, 8, "qwen2"),
    "qwen3.5-9b": llama(32, 4096, 12288, 16, 4, "qwen3_5_text"),
    "gemma-3-27b": llama(62, 5376, 21504, 32, 16, "gemma3_text"),
    "phi-4": llama(40, 5120, 17920, 40, 10, "phi3"),
    "t5-3b": ("t5", {"num_layers": 24, "d_model": 1024, "d_ff": 16384, "num_heads": 32, "d_kv": 128}),
    "qwen-7b": ("qwen1", {"num_hidden_layers": 32}),
    "baichuan-7b": ("baichuan", {"num_hidden_layers": 32}),
    "internlm-7b": ("internlm", {"num_hidden_layers": 32}),
    "chatglm2-6b": ("chatglm2", {"num_hidden_layers": 28}),
    "glm-4-9b": ("chatglm2", {"num_hidden_layers": 40}),
}
DOWN = {
    "gpt2": "transformer.h.{}.mlp.c_proj",
    "gptj": "transformer.h.{}.mlp.fc_out",
    "falcon": "transformer.h.{}.mlp.dense_4h_to_h",
    "gpt_neox": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
    "qwen1": "transformer.h.{}.mlp.c_proj",
    "chatglm2": "transformer.encoder.layers.{}.mlp.dense_4h_to_h",
    "t5": "decoder.block.{}.layer.2.DenseReluDense.wo",
}
LLAMA_LIKE = "model.layers.{}.mlp.down_proj"
STAND_INS = {"qwen1", "baichuan", "internlm", "chatglm2"}
FILES = [p for p in PACKAGED if p.stem in MODELS or p.stem.startswith("world-")]


@cache
def model_of(stem: str) -> torch.nn.Module:
    """The model of a file, without weights."""
    if stem.startswith("world-"):
        auto = AutoModelForImageTextToText if stem == "world-pictures" else AutoModelForCausalLM
        return auto.from_pretrained(embedded.path(stem))
    kind, sizes = MODELS[stem]
    if kind in STAND_INS:
        return stand_in(kind, **sizes)
    auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    with quiet(), torch.device("meta"):
        return auto.from_config(CONFIG_MAPPING[kind](**sizes))


def test_every_file_is_for_a_model_of_the_table() -> None:
    unknown = [p for p in PACKAGED if p not in FILES]
    assert not unknown, "add the sizes of these models' public configurations to MODELS"


@pytest.mark.parametrize("stem", MODELS)
def test_projections_are_where_the_literature_edits(stem: str) -> None:
    anatomy = resolve_anatomy(model_of(stem))
    kind, sizes = MODELS[stem]
    assert anatomy.num_layers == next(sizes[k] for k in ("num_hidden_layers", "n_layer", "num_layers") if k in sizes)
    for layer in range(anatomy.num_layers):
        assert anatomy.down(layer).path == DOWN.get(kind, LLAMA_LIKE).format(layer)
    inner = (
        sizes.get("intermediate_size")
        or sizes.get("ffn_hidden_size")
        or sizes.get("d_ff")
        or 4 * sizes.get("n_embd", 0)
    )
    if kind not in STAND_INS:
        assert (anatomy.down(0).in_features, anatomy.down(0).out_features) == (inner, anatomy.hidden_size)


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_file_fits_its_model(path: Path) -> None:
    model = model_of(path.stem)
    anatomy = resolve_anatomy(model)
    kind = config_class(path.parent.name)
    assert kind is method_class(kind.edit_type).config_class
    full = kind().complete(profile_of(model, anatomy, path.stem))
    values = kind.from_hparams(path)
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    for name in written:
        told, taken = getattr(values, name, None), getattr(full, name, None)
        if name == "base":  # a config inside the config, completed as well
            told, taken = told["edit_type"], taken["edit_type"]
        assert name == "match" or taken == told, f"{name} is not taken from the file"
    assert all(getattr(full, name) is not None or name in written for name in kind.model_dependent_fields())
    assert all(0 <= layer < anatomy.num_layers for layer in full.layers or [])
    method = method_class(kind.edit_type)
    if method.capabilities.kind != "weights":
        return
    nothing: Any = None  # names are asked for, nothing is run
    bench = Workbench(model, nothing, anatomy, Ledger(model), nothing, {}, nothing)  # type: ignore[arg-type]
    modules = method(bench, full).edited_modules()
    assert modules and len(set(modules)) == len(modules)
    layers = {layer.index for layer in anatomy.layers for module in modules if module.startswith(f"{layer.path}.")}
    assert full.layers is None or layers == set(full.layers)


# ---------------------------------------------------------------------------- published numbers

FIVE, RANGE = [5], [4, 5, 6, 7, 8]
ROME = {
    **{"gpt2-medium": ([8], 20, 0.5, 3), "gpt2-large": ([12], 20, 0.5, 4), "gpt2-xl": ([17], 20, 0.5, 4)},
    **{"gpt-j-6b": (FIVE, 20, 0.5, 4), "gpt-neox-20b": ([15], 20, 0.5, 4)},
    **{"chatglm2-6b": (FIVE, 20, 0.5, 4), "qwen-7b": (FIVE, 20, 0.5, 4)},
    **{"llama-7b": (FIVE, 20, 1e-3, 4), "llama-13b": ([10], 20, 1e-3, 4)},
    **dict.fromkeys(("llama-2-7b", "llama-3-8b", "llama-3.2-3b", "mistral-7b", "qwen2-7b"), (FIVE, 25, 1e-3, 4)),
    **dict.fromkeys(("qwen2.5-7b", "qwen3.5-9b", "baichuan-7b", "internlm-7b", "glm-4-9b"), (FIVE, 25, 1e-3, 4)),
}
RMS = (RANGE, 25, 0.5, 1e-3, 4, 15000)
MEMIT = {
    "gpt2-xl": ([13, 14, 15, 16, 17], 20, 0.5, 0.5, 0.75, 20000),
    "gpt-j-6b": ([3, 4, 5, 6, 7, 8], 25, 0.5, 0.5, 0.75, 15000),
    "gpt-neox-20b": ([6, 7, 8, 9, 10], 20, 0.5, 0.5, 0.8, 6000),
    "llama-3-8b": (RANGE, 25, 0.1, 0.5, 0.75, 15000),
    "qwen-7b": (RANGE, 25, 0.5, 0.5, 0.75, 15000),
    "chatglm2-6b": ([13, 14, 15, 16, 17], 25, 0.5, 1e-3, 4, 15000),
    **dict.fromkeys(
        ("llama-2-7b", "mistral-7b", "baichuan-7b", "internlm-7b", "llama-3.2-3b", "qwen2-7b", "qwen2.5-7b"), RMS
    ),
}
MEMIT_FE = {
    **MEMIT,
    "gpt2-xl": ([13, 14, 15, 16, 17], 35, 0.5, 0.5, 0.75, 15000),
    "llama-3-8b": (RANGE, 25, 0.1, 0.5, 4, 15000),
    "qwen2.5-14b": ([9, 10, 11, 12, 13], 25, 0.1, 1e-3, 0.75, 15000),
    "glm-4-9b": (RANGE, 50, 0.5, 1e-3, 10, 15000),
}
PMET = {
    "gpt-j-6b": ([3, 4, 5, 6, 7, 8], 30, 0.2, 0.5, 0.75, 6000, 1.0),
    "gpt-neox-20b": ([6, 7, 8, 9, 10], 30, 0.5, 0.5, 0.8, 15000, 0.8),
    "llama-2-7b": (RANGE, 20, 0.5, 0.5, 1, 15000, 0.0625),
    "llama-3.2-3b": (RANGE, 25, 0.5, 0.5, 1, 15000, 0.0625),
}
EMMET = {
    "gpt2-xl": ([17], 20, 0.5, 0.5, 0.75, 1000),
    "gpt-j-6b": (FIVE, 25, 0.5, 0.5, 0.75, 1),
    "llama-2-7b": (FIVE, 25, 0.5, 1e-3, 4, 1),
    "llama-3.2-3b": (FIVE, 25, 0.5, 1e-3, 4, 1),
}
ALPHAEDIT = {
    "gpt2-xl": ([13, 14, 15, 16, 17], 20, 0.5, 0.5, 0.75, 10),
    "gpt-j-6b": ([3, 4, 5, 6, 7, 8], 25, 0.5, 0.5, 0.75, 10),
    "llama-3-8b": (RANGE, 25, 0.1, 0.5, 0.75, 10),
    "llama-3.1-8b": (RANGE, 25, 0.1, 0.5, 0.75, 10),
    "qwen2.5-7b": (RANGE, 25, 0.5, 1e-3, 4, 1),
    "qwen3.5-9b": (RANGE, 25, 0.5, 1e-3, 4, 1),
}
LOW = [3, 4]
NAMET = {
    "llama-2-7b": (LOW, 25, 0.04, 0.5, 0.75, 50000, [25000, 50000]),
    "llama-2-13b": (LOW, 25, 0.04, 0.5, 0.75, 50000, [25000, 50000]),
    "llama-3.1-8b": (LOW, 25, 0.008, 0.5, 0.75, 15000, [7500, 15000]),
    "qwen2.5-7b": (LOW, 25, 0.03, 0.5, 0.75, 1000, [500, 1000]),
    "falcon-7b": (LOW, 25, 0.06, 0.5, 0.75, 10000, [5000, 10000]),
    "deepseek-llm-7b": (LOW, 25, 0.05, 0.5, 0.75, 20000, [10000, 20000]),
}
VALUES = ("layers", "v_num_grad_steps", "v_lr", "v_weight_decay", "clamp_norm_factor")
PUBLISHED: dict[str, tuple[tuple[str, ...], dict[str, tuple[Any, ...]]]] = {
    "ROME": (("layers", "v_num_grad_steps", "v_weight_decay", "clamp_norm_factor"), ROME),
    "R-ROME": (("layers", "v_num_grad_steps", "v_weight_decay", "clamp_norm_factor"), ROME),
    "MEMIT": ((*VALUES, "mom2_update_weight"), MEMIT),
    "MEMIT-FE": ((*VALUES, "mom2_update_weight"), MEMIT_FE),
    "PMET": ((*VALUES, "mom2_update_weight", "kl_factor"), PMET),
    "EMMET": ((*VALUES, "mom2_update_weight"), EMMET),
    "AlphaEdit": (
        (*VALUES, "L2", "nullspace_threshold"),
        {stem: (*values, 2e-2) for stem, values in ALPHAEDIT.items()},
    ),
    "NAMET": ((*VALUES, "mom2_update_weight", "layer_weights"), NAMET),
    "KN": (("adaptive_threshold",), {"gpt2-xl": (0.2,), "gpt-j-6b": (0.1,)}),
}


@pytest.mark.parametrize(
    ("method", "stem"), [(m, stem) for m, (_, models) in PUBLISHED.items() for stem in models], ids=str
)
def test_published_values(method: str, stem: str) -> None:
    names, models = PUBLISHED[method]
    data = yaml.safe_load((ROOT / method / f"{stem}.yaml").read_text(encoding="utf-8"))
    values = {"kl_factor": 0.0625, **data}  # the default of every published file
    assert {name: values.get(name) for name in names} == dict(zip(names, models[stem], strict=True))

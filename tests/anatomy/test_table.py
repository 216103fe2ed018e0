"""Every family of the table: the resolver finds these paths, and the numbers confirm them.

The table is the knowledge; the library has none of it. Columns: list of blocks; in a block, attention output, gate
(or fused matrix, or the up projection where there is no gate), down; final norm; embeddings; layout.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from transformers import PreTrainedModel

from hf_kedit.anatomy import Anatomy, block_output, check_anatomy, replace_block_output, resolve_anatomy
from tests.models import FAMILIES, REMOTE_LAYOUTS, stand_in

LLAMA = ("model.layers", "self_attn.o_proj", "mlp.gate_proj mlp.up_proj", "mlp.down_proj", "model.norm")
GPT2 = ("transformer.h", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "transformer.ln_f", "transformer.wte")
GPTJ = ("transformer.h", "attn.out_proj", "mlp.fc_in", "mlp.fc_out", "transformer.ln_f", "transformer.wte")
FUSED = ("model.layers", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj", "model.norm", "model.embed_tokens")
EXPERTS = ("model.layers", "self_attn.o_proj", "", "", "model.norm", "model.embed_tokens")
_LLAVA = ("model.language_model.layers", *LLAMA[1:4], "model.language_model.norm", "model.language_model.embed_tokens")
_SHARED = "mlp.shared_experts.gate_proj mlp.shared_experts.up_proj"
TABLE: dict[str, tuple[str, ...]] = {
    "gpt2": GPT2,
    "gptj": GPTJ,
    "gpt_neo": ("transformer.h", "attn.attention.out_proj", *GPT2[2:]),
    "gpt_neox": (
        "gpt_neox.layers",
        "attention.dense",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
        "gpt_neox.final_layer_norm",
        "gpt_neox.embed_in",
    ),
    **dict.fromkeys(["llama", "mistral", "internlm3", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"], LLAMA),
    **dict.fromkeys(["olmo", "olmo2", "stablelm", "cohere", "granite"], LLAMA),
    **dict.fromkeys(["phi3", "glm", "glm4"], FUSED),
    "phi": ("model.layers", "self_attn.dense", "mlp.fc1", "mlp.fc2", "model.final_layernorm"),
    "opt": (
        "model.decoder.layers",
        "self_attn.out_proj",
        "fc1",
        "fc2",
        "model.decoder.final_layer_norm",
        "model.decoder.embed_tokens",
    ),
    **dict.fromkeys(
        ["bloom", "falcon"],
        (
            "transformer.h",
            "self_attention.dense",
            "mlp.dense_h_to_4h",
            "mlp.dense_4h_to_h",
            "transformer.ln_f",
            "transformer.word_embeddings",
        ),
    ),
    "mpt": (
        "transformer.blocks",
        "attn.out_proj",
        "ffn.up_proj",
        "ffn.down_proj",
        "transformer.norm_f",
        "transformer.wte",
    ),
    "starcoder2": ("model.layers", "self_attn.o_proj", "mlp.c_fc", "mlp.c_proj", "model.norm"),
    "gpt_bigcode": GPT2,
    "codegen": GPTJ,
    **dict.fromkeys(["mixtral", "qwen3_moe", "gpt_oss"], EXPERTS),
    "qwen2_moe": (
        "model.layers",
        "self_attn.o_proj",
        "mlp.shared_expert.gate_proj mlp.shared_expert.up_proj",
        "mlp.shared_expert.down_proj",
        "model.norm",
    ),
    # The first layer is dense; the rows below describe the last one.
    **dict.fromkeys(
        ["deepseek_v2", "deepseek_v3"],
        ("model.layers", "self_attn.o_proj", _SHARED, "mlp.shared_experts.down_proj", "model.norm"),
    ),
    "t5": (
        "decoder.block",
        "layer.0.SelfAttention.o",
        "layer.2.DenseReluDense.wi",
        "layer.2.DenseReluDense.wo",
        "decoder.final_layer_norm",
        "shared",
    ),
    "t5_v1_1": (
        "decoder.block",
        "layer.0.SelfAttention.o",
        "layer.2.DenseReluDense.wi_0 layer.2.DenseReluDense.wi_1",
        "layer.2.DenseReluDense.wo",
        "decoder.final_layer_norm",
        "shared",
    ),
    "bart": ("model.decoder.layers", "self_attn.out_proj", "fc1", "fc2", "", "model.shared"),
    **dict.fromkeys(["llava", "qwen2_vl"], _LLAVA),
    "blip2": (
        "language_model.model.decoder.layers",
        "self_attn.out_proj",
        "fc1",
        "fc2",
        "language_model.model.decoder.final_layer_norm",
        "language_model.model.decoder.embed_tokens",
    ),
}
CONV1D = {"gpt2"}
TUPLES = {"gptj", "gpt_neo", "bloom", "falcon", "mpt", "codegen", "t5", "t5_v1_1"}
NOT_ADDITIVE = {"gemma2", "gemma3_text", "olmo2", "glm4", "bart", "qwen2_moe", "granite"}
NO_DOWN = {"mixtral", "qwen3_moe", "gpt_oss"}
# Logits are not head(norm(h)): logit scale, soft cap, T5's rescaling before a tied head.
NO_LENS = {"cohere", "granite", "gemma2", "t5"}
TIED = {"gpt2", "gpt_neo", "gemma", "gemma2", "gemma3_text", "opt", "bloom", "falcon", "mpt", "cohere", "starcoder2"}
TIED |= {"gpt_bigcode", "t5", "t5_v1_1", "bart", "blip2"}  # T5 v1.1 is tied in memory from transformers 5 on


@cache
def _model(family: str) -> PreTrainedModel:
    return FAMILIES[family]()


@cache
def _anatomy(family: str) -> Anatomy:
    model = _model(family)
    return check_anatomy(model, resolve_anatomy(model))


def test_the_table_has_every_family() -> None:
    assert set(TABLE) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_paths(family: str) -> None:
    layers, attention, ups, down, norm, embeddings = (*TABLE[family], "model.embed_tokens")[:6]
    model = _model(family)
    anatomy = resolve_anatomy(model)
    assert anatomy.layers_path == layers
    assert anatomy.num_layers == 3
    assert anatomy.hidden_size == 32
    assert (anatomy.final_norm or "") == norm
    assert anatomy.embeddings == embeddings
    assert anatomy.head is not None and anatomy.head.rsplit(".", 1)[-1] == "lm_head"
    assert anatomy.head_tied == (family in TIED)
    last = anatomy.layer(2)
    assert last.path == f"{layers}.2"
    assert last.attention_out is not None and last.attention_out.path == f"{layers}.2.{attention}"
    assert [p.path for p in last.ups] == [f"{layers}.2.{u}" for u in ups.split()]
    assert (last.down.path if last.down else "") == (f"{layers}.2.{down}" if down else "")
    for projection in (last.down, last.attention_out, *last.ups):
        if projection is not None:
            assert projection.layout == ("in_out" if family in CONV1D else "out_in")
            weight = model.get_submodule(projection.path).weight
            expected = (projection.out_features, projection.in_features)
            assert tuple(weight.shape) == (expected[::-1] if family in CONV1D else expected)
    assert not anatomy.checked


@pytest.mark.parametrize("family", FAMILIES)
def test_flags(family: str) -> None:
    anatomy = _anatomy(family)
    additive = family not in NOT_ADDITIVE | NO_DOWN
    assert anatomy.additive == (additive,) * 3
    scale = 1.0 if additive else 0.22 if family == "granite" else None
    assert anatomy.residual_scale == pytest.approx((scale,) * 3, rel=1e-4) if scale else (None,) * 3
    assert anatomy.block_returns_tuple == (family in TUPLES,) * 3
    assert anatomy.logit_lens == (family not in NO_LENS)
    assert anatomy.checked


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in NO_DOWN and f != "blip2"])
def test_rank_one_edit_reaches_its_value(family: str) -> None:
    """What an edit relies on: W' = W + (v − W k) kᵀ / |k|² makes the projection answer k with v, exactly."""
    model, anatomy = _model(family), _anatomy(family)
    down = anatomy.down(1)
    module = model.get_submodule(down.path)
    seen: dict[str, torch.Tensor] = {}

    def hook(_: torch.nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        seen["k"] = args[0].detach().reshape(-1, down.in_features)[2].clone()
        seen["v"] = output.detach().reshape(-1, down.out_features)[2].clone()

    handle = module.register_forward_hook(hook)
    original = module.weight.detach().clone()
    try:
        _run(model, anatomy)
        k, v = seen["k"], seen["v"]
        target = torch.linspace(-1, 1, down.out_features)
        update = torch.outer(target - v, k) / k.dot(k)
        with torch.no_grad():
            module.weight += update if down.layout == "out_in" else update.t()
        _run(model, anatomy)
        assert torch.allclose(seen["v"], target, atol=2e-4)
        assert (v - target).norm() > 0.1
    finally:
        handle.remove()
        with torch.no_grad():
            module.weight.copy_(original)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "blip2"])
def test_layer_output_accessor_reaches_every_row(family: str) -> None:
    """Adding to row 1 through the accessor moves row 1 of the logits, and row 0 not at all."""
    model, anatomy = _model(family), _anatomy(family)
    before = _run(model, anatomy).logits
    shift = torch.linspace(-1, 1, 32)

    def hook(_: torch.nn.Module, __: object, output: object) -> object:
        tensor = block_output(output).clone()
        assert tensor.shape == (2, 6, 32)
        tensor[1] += shift
        return replace_block_output(output, tensor)

    handle = model.get_submodule(anatomy.layer(1).path).register_forward_hook(hook)
    try:
        after = _run(model, anatomy).logits
    finally:
        handle.remove()
    assert torch.equal(before[0], after[0]) or torch.allclose(before[0], after[0], atol=1e-6)
    assert (before[1] - after[1]).abs().max() > 1e-3


def _run(model: PreTrainedModel, anatomy: Anatomy):
    ids = torch.arange(10, 22).view(2, 6)
    kwargs = {"decoder_input_ids": ids} if anatomy.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **kwargs)


def test_accessor_keeps_the_structure() -> None:
    tensor, new = torch.zeros(2, 3), torch.ones(2, 3)
    assert block_output(tensor) is tensor
    assert block_output((tensor, "cache")) is tensor
    assert replace_block_output(tensor, new) is new
    replaced = replace_block_output((tensor, "cache"), new)
    assert isinstance(replaced, tuple) and replaced[0] is new and replaced[1] == "cache"
    assert replace_block_output([tensor, 1], new) == [new, 1]


# ---------------------------------------------------------------------------- gates


@pytest.mark.parametrize(
    ("family", "gate"), [("llama", "gate_proj"), ("t5_v1_1", "wi_0"), ("gemma2", "gate_proj"), ("gpt2", None)]
)
def test_gate(family: str, gate: str | None) -> None:
    layer = _anatomy(family).layer(0)
    assert (layer.gate.name if layer.gate else None) == gate
    assert layer.gated == (gate is not None)


@pytest.mark.parametrize("family", ["phi3", "glm", "glm4"])
def test_fused_gate_is_the_first_half(family: str) -> None:
    layer = _anatomy(family).layer(0)
    assert layer.gated and layer.fused and layer.gate is None
    assert layer.fused_gate == "first"
    assert layer.ups[0].out_features == 2 * layer.down.in_features


# ---------------------------------------------------------------------------- experts


@pytest.mark.parametrize(
    ("family", "experts", "inner", "transposed", "interleaved"),
    [
        ("mixtral", 4, 24, False, False),
        ("qwen2_moe", 4, 24, False, False),
        ("qwen3_moe", 4, 24, False, False),
        ("deepseek_v2", 4, 24, False, False),
        ("deepseek_v3", 6, 24, False, False),
        ("gpt_oss", 4, 24, True, True),
    ],
)
def test_expert_bank(family: str, experts: int, inner: int, transposed: bool, interleaved: bool) -> None:
    bank = _anatomy(family).layer(2).experts
    assert bank is not None
    assert bank.path == "model.layers.2.mlp.experts"
    assert (bank.up_param, bank.down_param) == ("gate_up_proj", "down_proj")
    assert (bank.num_experts, bank.in_features, bank.out_features) == (experts, inner, 32)
    assert bank.transposed is transposed and bank.gated
    assert bank.interleaved is interleaved and bank.gated and bank.gate_param is None
    shape = tuple(_model(family).get_submodule(bank.path).get_parameter(bank.down_param).shape)
    assert shape == ((experts, inner, 32) if transposed else (experts, 32, inner))


def test_layers_of_one_model_may_differ() -> None:
    anatomy = _anatomy("deepseek_v3")
    assert anatomy.down(0).path == "model.layers.0.mlp.down_proj"
    assert anatomy.layer(0).experts is None
    assert [u.role for u in anatomy.layer(0).units] == ["dense"]
    assert [u.role for u in anatomy.layer(1).units] == ["shared"]


# ---------------------------------------------------------------------------- layouts of remote code

REMOTE = {
    "chatglm2": ("transformer.encoder.layers", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "qwen1": ("transformer.h", "attn.c_proj", "mlp.w1 mlp.w2", "mlp.c_proj"),
    "baichuan": LLAMA[:4],
    "internlm": LLAMA[:4],
}


@pytest.mark.parametrize("name", REMOTE_LAYOUTS)
def test_remote_layouts(name: str) -> None:
    layers, attention, ups, down = REMOTE[name]
    model = stand_in(name)
    anatomy = check_anatomy(model, resolve_anatomy(model))
    layer = anatomy.layer(1)
    assert anatomy.layers_path == layers
    assert layer.attention_out is not None and layer.attention_out.path == f"{layers}.1.{attention}"
    assert [p.path for p in layer.ups] == [f"{layers}.1.{u}" for u in ups.split()]
    assert anatomy.down(1).path == f"{layers}.1.{down}"
    assert anatomy.final_norm == REMOTE_LAYOUTS[name]["norm"]
    assert anatomy.head == REMOTE_LAYOUTS[name]["head"]
    assert anatomy.additive == (True,) * 3 and anatomy.logit_lens
    assert anatomy.block_returns_tuple == (True,) * 3
    if name == "qwen1":  # by name w1 would be the gate; the numbers say w2
        assert layer.gate is not None and layer.gate.name == "w2"
    if name == "chatglm2":
        assert layer.fused_gate == "first"

"""Tiny random models of real architectures, built in memory: nothing is downloaded.

`FAMILIES` maps a family's name to a builder; `tiny_model` is the same with any configuration value changed.
All are in fp32 and evaluation mode, with weights from a fixed seed that are large enough for outputs to depend on
everything (the stock initialisation of a 32-wide model is close to zero). Ids 0, 1, 2 are padding, beginning and
end. The stand-ins below copy only the module tree of layouts whose code lives outside transformers.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

VOCAB, HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, POSITIONS = 420, 32, 80, 3, 4, 2, 128
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GPT2 = {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": POSITIONS}
_BASE = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": POSITIONS,
}
_GQA = {**_BASE, "num_key_value_heads": KV_HEADS}
_HEAD8 = {**_GQA, "head_dim": 8}
_WINDOW = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_MOE = {**_GQA, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {"kv_lora_rank": 12, "q_lora_rank": 14, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
_MLA = {
    **_BASE,
    **LATENT,
    "num_key_value_heads": HEADS,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 24,
}
_T5 = {
    "d_model": HIDDEN,
    "d_kv": 8,
    "d_ff": INNER,
    "num_layers": 2,
    "num_decoder_layers": LAYERS,
    "num_heads": HEADS,
    "decoder_start_token_id": 0,
}
_BART = {
    "d_model": HIDDEN,
    "encoder_layers": 2,
    "decoder_layers": LAYERS,
    "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": INNER,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "max_position_embeddings": POSITIONS,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}

# family: (configuration class, model class, configuration values)
SPECS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _GPT2),
    "gptj": ("GPTJConfig", "GPTJForCausalLM", {**_GPT2, "rotary_dim": 4}),
    "gpt_neo": (
        "GPTNeoConfig",
        "GPTNeoForCausalLM",
        {
            "hidden_size": HIDDEN,
            "num_layers": LAYERS,
            "num_heads": HEADS,
            "attention_types": [[["global", "local", "global"], 1]],
            "window_size": 16,
            "max_position_embeddings": POSITIONS,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _BASE),
    "llama": ("LlamaConfig", "LlamaForCausalLM", _GQA),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_GQA, "sliding_window": 64}),
    "internlm3": ("InternLM3Config", "LlamaForCausalLM", _HEAD8),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _GQA),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _HEAD8),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", _HEAD8),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**_HEAD8, **_WINDOW, "query_pre_attn_scalar": 8}),
    "gemma3_text": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**_HEAD8, **_WINDOW, "query_pre_attn_scalar": 8}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", _GQA),
    "phi": ("PhiConfig", "PhiForCausalLM", _GQA),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {
            "hidden_size": HIDDEN,
            "word_embed_proj_dim": HIDDEN,
            "ffn_dim": INNER,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "max_position_embeddings": POSITIONS,
        },
    ),
    "bloom": ("BloomConfig", "BloomForCausalLM", {"hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS}),
    "falcon": (
        "FalconConfig",
        "FalconForCausalLM",
        {
            "hidden_size": HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "ffn_hidden_size": INNER,
            "max_position_embeddings": POSITIONS,
        },
    ),
    "mpt": (
        "MptConfig",
        "MptForCausalLM",
        {"d_model": HIDDEN, "n_heads": HEADS, "n_layers": LAYERS, "max_seq_len": POSITIONS, "expansion_ratio": 3},
    ),
    "olmo": ("OlmoConfig", "OlmoForCausalLM", _GQA),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", _GQA),
    "glm": ("GlmConfig", "GlmForCausalLM", {**_HEAD8, "partial_rotary_factor": 0.5}),
    "glm4": ("Glm4Config", "Glm4ForCausalLM", {**_HEAD8, "partial_rotary_factor": 0.5}),
    "stablelm": ("StableLmConfig", "StableLmForCausalLM", _GQA),
    "cohere": ("CohereConfig", "CohereForCausalLM", {**_GQA, "logit_scale": 0.25}),
    "granite": (
        "GraniteConfig",
        "GraniteForCausalLM",
        {**_GQA, "residual_multiplier": 0.22, "embedding_multiplier": 12.0, "logits_scaling": 8.0},
    ),
    "starcoder2": ("Starcoder2Config", "Starcoder2ForCausalLM", _GQA),
    "gpt_bigcode": ("GPTBigCodeConfig", "GPTBigCodeForCausalLM", _GPT2),
    "codegen": ("CodeGenConfig", "CodeGenForCausalLM", {**_GPT2, "n_ctx": POSITIONS, "rotary_dim": 4}),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {**_GQA, "intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {**_MOE, "num_experts": 4, "shared_expert_intermediate_size": 40},
    ),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**_MOE, "num_experts": 4, "head_dim": 8}),
    "deepseek_v2": ("DeepseekV2Config", "DeepseekV2ForCausalLM", {**_MLA, "topk_method": "greedy"}),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", {**_MLA, "n_routed_experts": 6}),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {
            **_HEAD8,
            **_WINDOW,
            "intermediate_size": 24,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            # The default scales positions beyond a pre-training length (YaRN), which a tiny model does not need.
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "t5": ("T5Config", "T5ForConditionalGeneration", _T5),
    "t5_v1_1": (
        "T5Config",
        "T5ForConditionalGeneration",
        {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "bart": ("BartConfig", "BartForConditionalGeneration", _BART),
}

# Layers that keep a recurrent or a convolution state instead of keys and values, or beside them.
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
_MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
_NEMOTRON_H = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": 8,
    "max_position_embeddings": POSITIONS,
    "layers_block_type": ["full_attention", "mlp", "linear_attention", "mlp"],
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "n_groups": 1,
    "ssm_state_size": 8,
    "chunk_size": 8,
}
HYBRIDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3_5_text": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", {**_HEAD8, **_LINEAR}),
    "qwen3_next": (
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        {**_MOE, **_LINEAR, "head_dim": 8, "num_experts": 4, "shared_expert_intermediate_size": 40},
    ),
    "lfm2": (
        "Lfm2Config",
        "Lfm2ForCausalLM",
        {**_GQA, "layer_types": ["conv", "conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
    "falcon_h1": ("FalconH1Config", "FalconH1ForCausalLM", {**_GQA, **_MAMBA, "mamba_d_ssm": 64}),
    "bamba": ("BambaConfig", "BambaForCausalLM", {**_GQA, **_MAMBA, "attn_layer_indices": [1]}),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        "GraniteMoeHybridForCausalLM",
        {
            **_GQA,
            **_MAMBA,
            "layer_types": ["mamba", "attention", "mamba"],
            "shared_intermediate_size": 40,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "olmo_hybrid": ("OlmoHybridConfig", "OlmoHybridForCausalLM", {**_GQA, **_LINEAR}),
    "nemotron_h": ("NemotronHConfig", "NemotronHForCausalLM", _NEMOTRON_H),
    "jamba": (
        "JambaConfig",
        "JambaForCausalLM",
        {
            **_GQA,
            "num_hidden_layers": 4,
            "num_experts": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
            "use_mamba_kernels": False,
        },
    ),
}
# Blocks with several streams on a leading axis; experts that are added to a module's output in place.
UNUSUAL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma3n_text": (
        "Gemma3nTextConfig",
        "Gemma3nForCausalLM",
        {
            **_HEAD8,
            "num_hidden_layers": 5,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention", *["sliding_attention"] * 2, "full_attention"],
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 4,
            "activation_sparsity_pattern": [0.0] * 5,
        },
    ),
    "llama4_text": (
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {
            **_HEAD8,
            "num_hidden_layers": 4,
            "intermediate_size": 24,
            "intermediate_size_mlp": INNER,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 32,
        },
    ),
}


def _spec(family: str) -> tuple[str, str, dict[str, Any]]:
    return {**SPECS, **HYBRIDS, **UNUSUAL}[family]


def tiny_config(family: str, vocab_size: int = VOCAB, **overrides: Any) -> PretrainedConfig:
    """Configuration of a tiny model of this family, with any value overridden."""
    config_class, _, values = _spec(family)
    return getattr(transformers, config_class)(
        **{"vocab_size": vocab_size, **_IDS, **copy.deepcopy(values), **overrides}
    )


def tiny_model(family: str, vocab_size: int = VOCAB, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A tiny random model, in evaluation mode.

    Args:
        family: key of `FAMILIES`, `HYBRIDS` or `UNUSUAL`.
        vocab_size: size of the vocabulary.
        seed: of the weights; the global random state is left alone.
        overrides: configuration values.
    """
    if family in IMAGE_TEXT:
        return IMAGE_TEXT[family](vocab_size=vocab_size, seed=seed, **overrides)
    with quiet():
        config = tiny_config(family, vocab_size, **overrides)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = getattr(transformers, _spec(family)[1])(config)
    return randomised(model, seed)


def randomised(model: nn.Module, seed: int = 0) -> Any:
    """Give every matrix unit gain and every vector some noise; put the model into evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            if parameter.dim() >= 2:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(0.1 * noise)
    return model.eval()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' remarks on special tokens outside a tiny vocabulary."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


# ---------------------------------------------------------------------------- image and text


def _text(**values: Any) -> dict[str, Any]:
    return {**_GQA, **_IDS, **values}


_CLIP = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,  # as deep as the text stack, so that depth alone cannot tell them apart
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def _llava(vocab_size: int = VOCAB, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(vocab_size=vocab_size, **_text(**overrides)),
        vision_config=transformers.CLIPVisionConfig(**_CLIP),
        image_token_index=vocab_size - 1,
    )
    return randomised(transformers.LlavaForConditionalGeneration(config), seed)


def _qwen2_vl(vocab_size: int = VOCAB, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    config = transformers.Qwen2VLConfig(
        text_config={"vocab_size": vocab_size, **_text(rope_parameters=rope), **overrides},
        vision_config={
            "depth": LAYERS,
            "embed_dim": 16,
            "hidden_size": HIDDEN,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 14,
            "spatial_merge_size": 2,
        },
        image_token_id=vocab_size - 1,
        video_token_id=vocab_size - 2,
        vision_start_token_id=vocab_size - 3,
        vision_end_token_id=vocab_size - 4,
    )
    return randomised(transformers.Qwen2VLForConditionalGeneration(config), seed)


def _blip2(vocab_size: int = VOCAB, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    config = transformers.Blip2Config(
        text_config=tiny_config("opt", vocab_size, **overrides).to_dict(),
        vision_config={**_CLIP, "hidden_act": "gelu"},
        qformer_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 2,
            "encoder_hidden_size": 16,
            "vocab_size": vocab_size,
            "max_position_embeddings": 32,
        },
        num_query_tokens=4,
        image_token_index=vocab_size - 1,
    )
    return randomised(transformers.Blip2ForConditionalGeneration(config), seed)


IMAGE_TEXT: dict[str, Callable[..., PreTrainedModel]] = {"llava": _llava, "qwen2_vl": _qwen2_vl, "blip2": _blip2}

FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {
    name: functools.partial(tiny_model, name) for name in [*SPECS, *IMAGE_TEXT]
}


# ---------------------------------------------------------------------------- layouts of remote code


class StandInConfig(PretrainedConfig):
    """Configuration of the stand-ins."""

    model_type = "stand_in"

    def __init__(self, vocab_size: int = VOCAB, hidden_size: int = HIDDEN, inner: int = INNER, **kwargs: Any):
        self.vocab_size, self.hidden_size, self.inner = vocab_size, hidden_size, inner
        kwargs.setdefault("num_hidden_layers", LAYERS)
        self.num_hidden_layers = kwargs.pop("num_hidden_layers")
        super().__init__(**{**_IDS, **kwargs})


class StandInAttention(nn.Module):
    """One-headed causal attention with one fused matrix in and one matrix out, under the given names."""

    def __init__(self, hidden: int, fused: str, out: str):
        super().__init__()
        self._names = (fused, out)
        setattr(self, fused, nn.Linear(hidden, 3 * hidden))
        setattr(self, out, nn.Linear(hidden, hidden, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = getattr(self, self._names[0])(x).chunk(3, dim=-1)
        return getattr(self, self._names[1])(F.scaled_dot_product_attention(q, k, v, is_causal=True))


class StandInMLP(nn.Module):
    """Gated MLP with separate or fused matrices under the given names; ``ups`` lists the gate first."""

    def __init__(self, hidden: int, inner: int, ups: list[str], down: str, registered: list[str] | None = None):
        super().__init__()
        self._ups, self._down = ups, down
        for name in registered or ups:
            setattr(self, name, nn.Linear(hidden, inner * (2 if len(ups) == 1 else 1), bias=False))
        setattr(self, down, nn.Linear(inner, hidden, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [getattr(self, name)(x) for name in self._ups]
        gate, up = parts if len(parts) == 2 else parts[0].chunk(2, dim=-1)
        return getattr(self, self._down)(F.silu(gate) * up)


class StandInBlock(nn.Module):
    """Pre-norm block; returns a tuple as old code does."""

    def __init__(self, config: StandInConfig, layout: dict[str, Any]):
        super().__init__()
        self.layout = layout
        self.norm_1, self.norm_2 = nn.LayerNorm(config.hidden_size), nn.LayerNorm(config.hidden_size)
        name, fused, out = layout["attention"]
        setattr(self, name, StandInAttention(config.hidden_size, fused, out))
        self.mlp = StandInMLP(config.hidden_size, config.inner, *layout["mlp"])

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor]:
        x = hidden_states
        x = x + getattr(self, self.layout["attention"][0])(self.norm_1(x))
        return (x + self.mlp(self.norm_2(x)),)


class _Holder(nn.Module):
    """A module that only holds others, to build nested paths."""


class StandInModel(PreTrainedModel):
    """Decoder with the module tree of one remote-code layout."""

    config_class = StandInConfig
    layout: dict[str, Any] = {}

    def __init__(self, config: StandInConfig):
        super().__init__(config)
        blocks = nn.ModuleList([StandInBlock(config, self.layout) for _ in range(config.num_hidden_layers)])
        self._put(self.layout["embed"], nn.Embedding(config.vocab_size, config.hidden_size))
        self._put(self.layout["layers"], blocks)
        self._put(self.layout["norm"], nn.LayerNorm(config.hidden_size))
        self._put(self.layout["head"], nn.Linear(config.hidden_size, config.vocab_size, bias=False))

    def _put(self, path: str, module: nn.Module) -> None:
        owner: nn.Module = self
        *parents, name = path.split(".")
        for parent in parents:
            if not hasattr(owner, parent):
                owner.add_module(parent, _Holder())
            owner = getattr(owner, parent)
        owner.add_module(name, module)

    def get_input_embeddings(self) -> nn.Module:
        return self.get_submodule(self.layout["embed"])

    def get_output_embeddings(self) -> nn.Module:
        return self.get_submodule(self.layout["head"])

    def forward(self, input_ids: torch.Tensor, output_hidden_states: bool = False, **_: Any) -> CausalLMOutput:
        x = self.get_input_embeddings()(input_ids)
        states = [x]
        for block in self.get_submodule(self.layout["layers"]):
            x = block(x)[0]
            states.append(x)
        x = self.get_submodule(self.layout["norm"])(x)
        states[-1] = x
        return CausalLMOutput(
            logits=self.get_output_embeddings()(x), hidden_states=tuple(states) if output_hidden_states else None
        )


_LLAMA_TREE = {"embed": "model.embed_tokens", "layers": "model.layers", "norm": "model.norm", "head": "lm_head"}
REMOTE_LAYOUTS: dict[str, dict[str, Any]] = {
    "chatglm2": {
        "embed": "transformer.embedding.word_embeddings",
        "layers": "transformer.encoder.layers",
        "norm": "transformer.encoder.final_layernorm",
        "head": "transformer.output_layer",
        "attention": ("self_attention", "query_key_value", "dense"),
        "mlp": (["dense_h_to_4h"], "dense_4h_to_h"),
    },
    "qwen1": {
        "embed": "transformer.wte",
        "layers": "transformer.h",
        "norm": "transformer.ln_f",
        "head": "lm_head",
        "attention": ("attn", "c_attn", "c_proj"),
        # c_proj(w1 · silu(w2)): the gate is the second one registered.
        "mlp": (["w2", "w1"], "c_proj", ["w1", "w2"]),
    },
    "baichuan": {
        **_LLAMA_TREE,
        "attention": ("self_attn", "W_pack", "o_proj"),
        "mlp": (["gate_proj", "up_proj"], "down_proj", ["gate_proj", "up_proj"]),
    },
    "internlm": {
        **_LLAMA_TREE,
        "attention": ("self_attn", "qkv", "o_proj"),
        "mlp": (["gate_proj", "up_proj"], "down_proj", ["gate_proj", "up_proj"]),
    },
}


def stand_in(name: str, seed: int = 0, **config: Any) -> StandInModel:
    """A stand-in for a remote-code layout: a key of `REMOTE_LAYOUTS`."""
    kind = type(f"StandIn_{name}", (StandInModel,), {"layout": REMOTE_LAYOUTS[name]})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(StandInConfig(**config))
    return randomised(model, seed)

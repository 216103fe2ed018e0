"""Shrinking the default configuration of any model type, so that it can be built and run in a test."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig

from tests.models import LATENT, quiet, randomised

SIZES: dict[str, Any] = {
    "vocab_size": 420,
    "vocab_size_per_layer_input": 420,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "word_embed_proj_dim": 32,
    "embedding_size": 32,
    "num_hidden_layers": 4,
    "n_layer": 4,
    "num_layers": 4,
    "n_layers": 4,
    "encoder_layers": 2,
    "decoder_layers": 4,
    "num_encoder_layers": 2,
    "num_decoder_layers": 4,
    "intermediate_size": 80,
    "ffn_dim": 80,
    "d_ff": 80,
    "d_inner": 80,
    "ffn_hidden_size": 80,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 80,
    "shared_expert_intermediate_size": 40,
    "moe_intermediate_size": 24,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "head_dim": 8,
    "d_kv": 8,
    **LATENT,
    "n_routed_experts": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "moe_num_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "rotary_dim": 4,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "hidden_size_per_layer_input": 8,
    "first_k_dense_replace": 1,
    "mamba_d_ssm": 64,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "mamba_n_groups": 1,
    "n_groups": 1,
}

# Values without which some default configurations cannot be built.
FILLED = {
    "head_dim",
    "num_key_value_heads",
    "num_experts_per_tok",
    "n_routed_experts",
    "moe_intermediate_size",
    "n_group",
    "topk_group",
}


def shrink(config: PretrainedConfig) -> PretrainedConfig:
    """Reduce every size that the configuration and its parts name, in place."""
    mapped = getattr(config, "attribute_map", {})
    for name, value in SIZES.items():
        old = getattr(config, mapped.get(name, name), None)
        incomplete = old is None and name in FILLED and hasattr(config, name)
        if incomplete or (isinstance(old, int) and not isinstance(old, bool) and old > value):
            try:
                setattr(config, mapped.get(name, name), value)
            except Exception:  # a strict configuration that does not allow the value
                continue
    if hasattr(config, "kv_lora_rank"):  # latent attention: every head its own keys, and only a part is rotated
        config.num_key_value_heads = config.num_attention_heads
        config.head_dim = config.qk_rope_head_dim
    depth = getattr(config, "num_hidden_layers", None)
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            shrink(value)
        elif isinstance(depth, int) and isinstance(value, list) and len(value) > depth and "layer" in name:
            setattr(config, name, value[:depth])
        elif name.endswith("token_id") and isinstance(value, int) and value >= 420:
            setattr(config, name, None if not name.startswith(("image", "video", "audio")) else 419)
    return config


def small_causal_lm(model_type: str) -> torch.nn.Module:
    """A causal language model of this type with shrunk sizes and random weights."""
    with quiet():
        config = shrink(CONFIG_MAPPING[model_type]())
        if hasattr(config, "is_decoder"):
            config.is_decoder = True
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return randomised(AutoModelForCausalLM.from_config(config))


def default_causal_lm(model_type: str) -> torch.nn.Module:
    """The same with the default sizes, without weights."""
    with quiet(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type]())

"""Random-weight models of known shapes, and requests to edit them with. Timing does not need trained weights."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from hf_kedit import EditRequest, embedded, load_edit_dataset
from hf_kedit.data.world_text import world_text
from hf_kedit.loading import load_base, load_tokenizer

REAL = "smollm2"
"""The shape that stands for the weights of SmolLM2-135M, where `make real` has put them."""

SHAPES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    # name: (config class, config, editing layers)
    "gpt2-tiny": (
        GPT2Config,
        {"n_layer": 6, "n_embd": 256, "n_head": 8, "vocab_size": 8192},
        {"rome": 2, "memit": [0, 1, 2]},
    ),
    "llama-tiny": (
        LlamaConfig,
        {
            "num_hidden_layers": 8,
            "hidden_size": 256,
            "intermediate_size": 704,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 8192,
        },
        {"rome": 2, "memit": [0, 1, 2]},
    ),
    "gpt2-small": (GPT2Config, {"vocab_size": 50257}, {"rome": 4, "memit": [2, 3, 4]}),
    "llama-16x1024": (
        LlamaConfig,
        {
            "num_hidden_layers": 16,
            "hidden_size": 1024,
            "intermediate_size": 2816,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "vocab_size": 32000,
        },
        {"rome": 4, "memit": [3, 4, 5]},
    ),
    "smollm2-135m": (
        LlamaConfig,
        {
            "num_hidden_layers": 30,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49152,
            "tie_word_embeddings": True,
        },
        {"rome": 5, "memit": [4, 5, 6, 7, 8]},
    ),
    "gpt-j-6b": (GPTJConfig, {}, {"rome": 5, "memit": [3, 4, 5, 6, 7, 8]}),
    "llama-2-7b": (LlamaConfig, {}, {"rome": 5, "memit": [4, 5, 6, 7, 8]}),
    "llama-3-8b": (
        LlamaConfig,
        {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256},
        {"rome": 5, "memit": [4, 5, 6, 7, 8]},
    ),
    "llama-3-70b": (
        LlamaConfig,
        {
            "num_hidden_layers": 80,
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
        },
        {"rome": 12, "memit": [16, 17, 18, 19, 20]},
    ),
}


SHAPES[REAL] = SHAPES["smollm2-135m"]


def is_real(shape: str) -> bool:
    """Whether a shape is a model with its own weights and tokenizer."""
    return shape == REAL and embedded.is_there("kedit/smollm2-135m")


def tokenizer_of(shape: str) -> Any:
    """The tokenizer that goes with a shape."""
    return load_tokenizer("kedit/smollm2-135m") if is_real(shape) else tokenizer()


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on generated text; small, so that its ids fit every shape."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=5000, special_tokens=["<pad>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(world_text(4000), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")


def build(shape: str, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A model of the shape with random weights, scaled so that losses really fall; or the real one (`is_real`)."""
    if is_real(shape):
        real: Any = load_base("kedit/smollm2-135m", dtype=dtype)
        return real.to(device).eval()
    kind, values, _ = SHAPES[shape]
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(kind(**values), dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name and "wte" not in name and "wpe" not in name:
                parameter.mul_(2.0)
    return model.eval()


def requests(count: int, path: str | None = None, skip: int = 0) -> list[EditRequest]:
    """Edit requests with short prompts, subjects of a few tokens and targets of a few tokens.

    Args:
        count: how many.
        path: of the rows of `counterfact_flat`; ``None``: of the fact world.
        skip: so many rows of the file are left out.
    """
    if path is not None:
        rows = load_edit_dataset("counterfact_flat", path=path, limit=skip + count)
        return [EditRequest.from_dict(rows[i]) for i in range(skip, len(rows))]
    rows = load_edit_dataset("world", split="test", limit=min(count, 1000))
    made = [EditRequest.from_dict(rows[i % len(rows)]) for i in range(count)]
    return [r.with_id(f"bench-{i}") for i, r in enumerate(made)]


def texts(count: int) -> list[str]:
    """Documents for second moments."""
    return list(world_text(count, seed=7))

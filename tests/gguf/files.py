"""What the tests of GGUF share: tokenizers of tiny models, random models that carry an edit."""

from __future__ import annotations

import itertools
import json
from functools import cache
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase

from hf_kedit import EditableModel, EditRequest, FTMConfig, embedded
from hf_kedit.books.ledger import WeightDelta
from hf_kedit.data.world_text import world_text
from hf_kedit.engine.weights import get_module, get_weight
from hf_kedit.journal import Edit
from tests.models import tiny_model

_SLIDE = ["sliding_attention"]
SIZE = 2000
"""Tokens of the tokenizers here."""
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 128},  # transformers knows Qwen3 with this width alone when it reads a file
    "gpt2": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {"num_hidden_layers": 7, "layer_types": [*_SLIDE * 5, "full_attention", *_SLIDE]},
}


@cache
def byte_level() -> PreTrainedTokenizerBase:
    """A tokenizer over bytes."""
    tokenizer = AutoTokenizer.from_pretrained(embedded.path("world-llama"))
    tokenizer.chat_template = CHAT
    return tokenizer


@cache
def sentencepiece() -> PreTrainedTokenizerBase:
    """A tokenizer as Llama 2 has one, learnt from the fact world; bytes stand in front, as SentencePiece has them."""
    from tokenizers import Tokenizer, models, trainers

    learnt = Tokenizer(models.BPE())
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    texts = ["▁" + word for text in itertools.islice(world_text(seed=0), 2000) for word in text.split(" ")]
    learnt.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=SIZE, special_tokens=special, show_progress=False)
    )
    model = json.loads(learnt.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    tokenizer = LlamaTokenizer(vocab=model["vocab"], merges=merges)
    assert len(tokenizer) == SIZE
    return tokenizer


def random_model(family: str, tokenizer: PreTrainedTokenizerBase | None = None, **values: Any) -> EditableModel:
    """A tiny random model without edits."""
    values = {**FAMILIES.get(family, {}), **values}
    base = tiny_model(family, vocab_size=SIZE, **values)
    tokenizer = tokenizer if tokenizer is not None else byte_level()
    base.config.bos_token_id, base.config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    return EditableModel(base, FTMConfig(layers=[0]), tokenizer)


def put(model: EditableModel, *modules: str, rank: int = 2) -> None:
    """Lay random changes of a rank on matrices, as one edit."""
    generator = torch.Generator().manual_seed(0)
    deltas = []
    for path in modules:
        d_out, d_in = get_weight(get_module(model.base_model, path)).shape
        left, right = (torch.randn(d, rank, generator=generator) for d in (d_out, d_in))
        deltas.append(WeightDelta(path, left=0.2 * left, right=right / d_in**0.5))
    model.ledger.apply("batch", deltas, ["edit"])
    request = EditRequest(prompt="The sky is", target_new="green", id="edit")
    model.journal.add([Edit("edit", request, "ft-m", "batch", "2026-01-01T00:00:00")])


def edited_places(family: str) -> list[str]:
    """Matrices of a family that an edit may touch: of attention and MLP, queries and keys among them."""
    if family == "gpt2":
        return ["transformer.h.1.attn.c_attn", "transformer.h.0.mlp.c_proj", "transformer.h.2.mlp.c_fc"]
    of_attention = [f"model.layers.1.self_attn.{name}_proj" for name in "qkvo"]
    return [*of_attention, "model.layers.0.mlp.down_proj", "model.layers.2.mlp.up_proj"]


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    """Of every position, ``[positions, vocabulary]``."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].float()

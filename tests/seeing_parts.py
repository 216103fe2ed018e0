"""Parts of tiny models that see: a tokenizer of single characters, pictures of noise, configs of their halves."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

VOCAB, HIDDEN, INNER, LAYERS, IMAGE, SIDE = 176, 32, 48, 3, 150, 28
_CHARACTERS = ["▁", *(chr(c) for c in range(33, 127)), "\n"]
_NAMED = ("<pad>", "<s>", "</s>", "<unk>")
_IMAGE_TOKENS = (
    *("<image>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<boi>", "<eoi>"),
    *("<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<img>", "</img>", "[IMG]", "[IMG_BREAK]"),
    *("[IMG_END]", "<|image|>", "<row_1_col_1>", "<IMG_CONTEXT>"),
)


def tokenizer(
    image_token: str | None = "<image>", more: tuple[str, ...] = (), ends: str = "", **extra: str
) -> PreTrainedTokenizerFast:
    """One token per character; tokens of pictures from id `IMAGE` on.

    Args:
        image_token: first of them; ``None``: the processor names its token.
        more: tokens behind the usual ones.
        ends: template of what stands around a text, as tokenizers of encoders add it.
        extra: names under which the tokenizer knows tokens.
    """
    vocabulary = {text: i for i, text in enumerate((*_NAMED, *_CHARACTERS))}
    for i in range(len(vocabulary), IMAGE):
        vocabulary[f"<unused{i}>"] = i
    built = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    built.decoder = decoders.Metaspace(prepend_scheme="never")
    names = [image_token or "<image>", *(name for name in _IMAGE_TOKENS if name != (image_token or "<image>"))]
    built.add_special_tokens([*names, *more])
    if ends:
        built.post_processor = processors.TemplateProcessing(single=ends, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=built,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens=extra if image_token is None else {"image_token": image_token, **extra},
    )


def picture(seed: int, width: int = 40, height: int = 40) -> Image.Image:
    """Noise."""
    return Image.fromarray(np.random.RandomState(seed).randint(0, 255, (height, width, 3), np.uint8))


TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = {"model_type": "llama", **TEXT}
QWEN2 = {"model_type": "qwen2", **TEXT}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 14,
}
LLAVA: dict[str, Any] = {
    **{"patch_size": 14, "vision_feature_select_strategy": "default"},
    **{"num_additional_image_tokens": 1, "image_token": "<image>"},
}
"""What LLaVA's processors are told of the tower."""
SQUARE = {"size": {"height": SIDE, "width": SIDE}}
MROPE = {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}

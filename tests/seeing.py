"""Tiny random models that see, of real architectures, with real processors: nothing is downloaded.

As `tests.models`, for image-text models. The tokenizer knows single characters; pictures are noise from a seed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from hf_kedit.text.processors import without_videos
from tests import seeing_more
from tests.seeing_parts import (
    HIDDEN,
    IMAGE,
    INNER,
    LAYERS,
    LLAMA,
    LLAVA,
    MROPE,
    QWEN2,
    SIDE,
    SQUARE,
    TEXT,
    VISION,
    VOCAB,
    tokenizer,
)
from tests.seeing_parts import picture as picture


def _llava() -> tuple[Any, Any]:
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **VISION, "projection_dim": 16},
        text_config=LLAMA,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
    )
    reader = transformers.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SQUARE["size"])
    processor = transformers.LlavaProcessor(
        reader,
        tokenizer(),
        **LLAVA,
    )
    return config, processor


def _llava_onevision() -> tuple[Any, Any]:
    config = transformers.LlavaOnevisionConfig(
        vision_config={"model_type": "siglip_vision_model", **VISION},
        text_config=QWEN2,
        image_token_index=IMAGE,
        video_token_index=IMAGE + 2,
        image_grid_pinpoints=[[28, 28], [28, 56], [56, 28], [56, 56]],
    )
    reader = transformers.LlavaOnevisionImageProcessorPil(
        **SQUARE, image_grid_pinpoints=[[28, 28], [28, 56], [56, 28], [56, 56]]
    )
    kind = without_videos(transformers.LlavaOnevisionProcessor)
    processor = kind(
        reader, tokenizer(), num_image_tokens=4, vision_feature_select_strategy="full", image_token="<image>"
    )
    return config, processor


_PADS = {"image_token_id": IMAGE, "video_token_id": IMAGE + 2, "vision_start_token_id": IMAGE + 3}
_PADS |= {"vision_end_token_id": IMAGE + 4}


def _qwen(name: str, reader: str, vision: dict[str, Any], **text: Any) -> tuple[Any, Any]:
    config = getattr(transformers, f"{name}Config")(text_config={**MROPE, **text}, vision_config=vision, **_PADS)
    patch = vision.get("patch_size", 14)
    pixels = {"min_pixels": (2 * patch) ** 2, "max_pixels": (4 * patch) ** 2}
    images = getattr(transformers, reader)(patch_size=patch, merge_size=2, **pixels)
    kind = without_videos(getattr(transformers, f"{name}Processor"))
    named = {"video_token": "<|video_pad|>", "vision_start_token": "<|vision_start|>"}
    return config, kind(images, tokenizer("<|image_pad|>", **named, vision_end_token="<|vision_end|>"))


def _qwen2_vl() -> tuple[Any, Any]:
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": HIDDEN, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
    return _qwen("Qwen2VL", "Qwen2VLImageProcessorPil", vision)


def _qwen2_5_vl() -> tuple[Any, Any]:
    vision = {
        **{"depth": 2, "hidden_size": 16, "out_hidden_size": HIDDEN, "num_heads": 2, "intermediate_size": 24},
        **{"patch_size": 14, "window_size": 28, "fullatt_block_indexes": [1]},
    }
    return _qwen("Qwen2_5_VL", "Qwen2VLImageProcessorPil", vision)


def _qwen3_vl() -> tuple[Any, Any]:
    vision = {
        **{"depth": 2, "hidden_size": 16, "out_hidden_size": HIDDEN, "num_heads": 2, "intermediate_size": 24},
        **{"patch_size": 14, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    }
    return _qwen("Qwen3VL", "Qwen2VLImageProcessorPil", vision, head_dim=8)


_QFORMER = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "encoder_hidden_size": 16,
}
_OPT = {
    **{"model_type": "opt", "vocab_size": VOCAB, "hidden_size": HIDDEN, "word_embed_proj_dim": HIDDEN},
    **{"ffn_dim": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "max_position_embeddings": 512},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
_T5 = {
    **{"model_type": "t5", "vocab_size": VOCAB, "d_model": HIDDEN, "d_kv": 8, "d_ff": INNER, "num_layers": LAYERS},
    **{"num_decoder_layers": LAYERS, "num_heads": 4, "decoder_start_token_id": 0, "pad_token_id": 0},
    "tie_word_embeddings": False,
}


def _blip2(text: dict[str, Any] = _OPT, ends: str = "") -> tuple[Any, Any]:
    config = transformers.Blip2Config(
        vision_config=VISION, qformer_config=_QFORMER, text_config=text, num_query_tokens=4, image_token_index=IMAGE
    )
    reader = transformers.BlipImageProcessorPil(**SQUARE)
    return config, transformers.Blip2Processor(reader, tokenizer(None, ends=ends), num_query_tokens=4)


def _instructblip() -> tuple[Any, Any]:
    config = transformers.InstructBlipConfig(
        vision_config=VISION, qformer_config=_QFORMER, text_config=LLAMA, num_query_tokens=4, image_token_index=IMAGE
    )
    reader = transformers.BlipImageProcessorPil(**SQUARE)
    return config, transformers.InstructBlipProcessor(reader, tokenizer(None), tokenizer(None), num_query_tokens=4)


def _gemma3() -> tuple[Any, Any]:
    config = transformers.Gemma3Config(
        text_config={**TEXT, "head_dim": 8, "sliding_window": 64},
        vision_config={"model_type": "siglip_vision_model", **VISION},
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=IMAGE + 5,
        eoi_token_index=IMAGE + 6,
    )
    reader = transformers.Gemma3ImageProcessorPil(**SQUARE)
    words = tokenizer(boi_token="<boi>", eoi_token="<eoi>")
    return config, transformers.Gemma3Processor(reader, words, image_seq_length=4)


def _idefics3() -> tuple[Any, Any]:
    config = transformers.Idefics3Config(
        text_config=LLAMA, vision_config=VISION, image_token_id=IMAGE, scale_factor=1, pad_token_id=0
    )
    reader = transformers.Idefics3ImageProcessorPil(
        size={"longest_edge": SIDE}, max_image_size={"longest_edge": SIDE}, do_image_splitting=False
    )
    return config, transformers.Idefics3Processor(reader, tokenizer(), image_seq_len=4)


def _internvl() -> tuple[Any, Any]:
    vision = {**VISION, "image_size": [SIDE, SIDE], "patch_size": [14, 14], "use_mean_pooling": False}
    config = transformers.InternVLConfig(
        vision_config=vision, text_config=QWEN2, image_token_id=IMAGE, downsample_ratio=0.5
    )
    reader = transformers.GotOcr2ImageProcessorPil(**SQUARE, crop_to_patches=False)
    named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    kind = without_videos(transformers.InternVLProcessor)
    words = tokenizer("<IMG_CONTEXT>", **named, video_token="<|video_pad|>")
    return config, kind(reader, words, image_seq_length=1)


def _mllama() -> tuple[Any, Any]:
    vision = {
        **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_global_layers": 1},
        **{"num_attention_heads": 2, "attention_heads": 2, "image_size": SIDE, "patch_size": 14, "max_num_tiles": 2},
        **{"supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]], "intermediate_layers_indices": [0]},
        **{"vision_output_dim": 32},
    }
    text = {**TEXT, "num_hidden_layers": 4, "cross_attention_layers": [1], "vocab_size": VOCAB}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    config = transformers.MllamaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    reader = transformers.MllamaImageProcessorPil(**SQUARE, max_image_tiles=2)
    return config, transformers.MllamaProcessor(reader, tokenizer("<|image|>"))


def _llava_next() -> tuple[Any, Any]:
    pinpoints = [[28, 28], [28, 56], [56, 28]]
    config = transformers.LlavaNextConfig(
        vision_config={"model_type": "clip_vision_model", **VISION, "projection_dim": 16},
        text_config=LLAMA,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        image_grid_pinpoints=pinpoints,
    )
    reader = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size=SQUARE["size"], image_grid_pinpoints=pinpoints
    )
    return config, transformers.LlavaNextProcessor(
        reader,
        tokenizer(),
        **LLAVA,
    )


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llava": _llava,
    "llava_onevision": _llava_onevision,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "blip2": _blip2,
    "blip2_t5": lambda: _blip2(_T5, "$A </s>"),
    "instructblip": _instructblip,
    "llava_next": _llava_next,
    "gemma3": _gemma3,
    "idefics3": _idefics3,
    "internvl": _internvl,
    "mllama": _mllama,
    **seeing_more.FAMILIES,
}


@functools.cache
def _built(family: str) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    config, processor = FAMILIES[family]()
    torch.manual_seed(0)
    model = _empty(config)
    state = {}
    for name, value in model.state_dict().items():
        wide = value.dim() > 1 and value.is_floating_point()
        if "attn_gate" in name or "mlp_gate" in name:
            value = torch.full_like(value, 0.7)  # Mllama's are closed at first
        state[name] = torch.randn(value.shape) * (0.3 if "embed" in name else 0.18) if wide else value.clone()
    return config, processor, state


def _empty(config: Any) -> PreTrainedModel:
    kind = transformers.AutoModelForImageTextToText._model_mapping[type(config)]
    model: PreTrainedModel = kind(config)
    if config.model_type == "florence2":
        model.generation_config.forced_bos_token_id = 1  # as the published ones have it
    return model.eval()


def seeing(family: str) -> tuple[PreTrainedModel, Any]:
    """A fresh model of the family, weights from a fixed seed, and the family's processor (shared)."""
    config, processor, state = _built(family)
    model = _empty(config)
    model.load_state_dict(state)
    return model, processor

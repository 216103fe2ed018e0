"""More of the families of `tests.seeing`: processors and language models of unusual kinds."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import transformers

from hf_kedit.text.processors import without_videos
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

_BART = {
    **{"model_type": "bart", "vocab_size": VOCAB, "d_model": HIDDEN, "encoder_layers": 2, "decoder_layers": LAYERS},
    **{"encoder_ffn_dim": INNER, "decoder_ffn_dim": INNER, "encoder_attention_heads": 4, "pad_token_id": 0},
    **{"decoder_attention_heads": 4, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2},
    **{"decoder_start_token_id": 2, "forced_eos_token_id": None},
}


def _florence2() -> tuple[Any, Any]:
    vision = {
        **{"embed_dim": [8, 8, 8, 16], "num_heads": [1, 1, 1, 2], "num_groups": [1, 1, 1, 2], "depths": [1, 1, 1, 1]},
        **{"window_size": 4, "projection_dim": HIDDEN, "drop_path_rate": 0.0, "mlp_ratio": 2.0},
    }
    config = transformers.Florence2Config(vision_config=vision, text_config=_BART, image_token_id=IMAGE)
    reader = transformers.CLIPImageProcessorPil(**SQUARE, do_center_crop=False)
    reader.image_seq_length = 2  # a side of 28 becomes one cell, which is averaged over space and over time
    return config, transformers.Florence2Processor(reader, tokenizer(ends="<s> $A </s>"))


def _paligemma() -> tuple[Any, Any]:
    text = {"model_type": "gemma", **TEXT, "head_dim": 8}
    vision = {"model_type": "siglip_vision_model", **VISION, "vision_use_head": False}
    config = transformers.PaliGemmaConfig(
        text_config=text, vision_config=vision, image_token_index=IMAGE, projection_dim=HIDDEN
    )
    reader = transformers.SiglipImageProcessorPil(**SQUARE)
    reader.image_seq_length = 4
    return config, transformers.PaliGemmaProcessor(reader, tokenizer())


def _pixtral_processor(merged: int) -> Any:
    """transformers hides the class without torchvision, from which it takes nothing but the size of an image."""
    models = "transformers.models.pixtral."
    stands_in = {}
    if not transformers.utils.is_torchvision_available():
        stands_in[models + "image_processing_pixtral"] = importlib.import_module(
            models + "image_processing_pil_pixtral"
        )
    with mock.patch.dict(sys.modules, stands_in):
        kind = importlib.import_module(models + "processing_pixtral").PixtralProcessor
    reader = transformers.PixtralImageProcessorPil(size={"longest_edge": 56}, patch_size={"height": 14, "width": 14})
    return kind(reader, tokenizer("[IMG]"), patch_size=14, spatial_merge_size=merged)


_PIXTRAL = {**VISION, "model_type": "pixtral", "image_size": 56, "head_dim": 8}


def _pixtral() -> tuple[Any, Any]:
    config = transformers.LlavaConfig(
        vision_config=_PIXTRAL,
        text_config={"model_type": "mistral", **TEXT},
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return config, _pixtral_processor(1)


def _mistral3() -> tuple[Any, Any]:
    config = transformers.Mistral3Config(
        vision_config=_PIXTRAL, text_config={"model_type": "mistral", **TEXT}, image_token_index=IMAGE
    )
    return config, _pixtral_processor(2)


def _smolvlm() -> tuple[Any, Any]:
    config = transformers.SmolVLMConfig(
        text_config=LLAMA, vision_config=VISION, image_token_id=IMAGE, scale_factor=1, pad_token_id=0
    )
    reader = transformers.SmolVLMImageProcessorPil(
        size={"longest_edge": SIDE}, max_image_size={"longest_edge": SIDE}, do_image_splitting=False
    )
    kind = without_videos(transformers.SmolVLMProcessor)
    words = importlib.import_module("transformers.models.smolvlm.processing_smolvlm")
    with mock.patch.object(words, "num2words", words.num2words or str):  # writes the number of a video's frames
        return config, kind(reader, tokenizer(), image_seq_len=4)


def _idefics2() -> tuple[Any, Any]:
    perceiver = {"hidden_size": HIDDEN, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2}
    config = transformers.Idefics2Config(
        text_config={"model_type": "mistral", **TEXT},
        vision_config=VISION,
        perceiver_config={**perceiver, "resampler_head_dim": 8, "num_key_value_heads": 1},
        image_token_id=IMAGE,
    )
    reader = transformers.Idefics2ImageProcessorPil(
        size={"shortest_edge": 14, "longest_edge": SIDE}, do_image_splitting=False
    )
    words = tokenizer(image_boundary_token="<fake_token_around_image>")
    return config, transformers.Idefics2Processor(reader, words, image_seq_len=4)


def _vipllava() -> tuple[Any, Any]:
    config = transformers.VipLlavaConfig(
        vision_config={"model_type": "clip_vision_model", **VISION, "projection_dim": 16},
        text_config=LLAMA,
        image_token_index=IMAGE,
        vision_feature_layer=[-2, -1],
    )
    reader = transformers.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SQUARE["size"])
    return config, transformers.LlavaProcessor(
        reader,
        tokenizer(),
        **LLAVA,
    )


def _aya_vision() -> tuple[Any, Any]:
    named = {"start_of_img_token": "<boi>", "end_of_img_token": "<eoi>", "img_patch_token": "<IMG_CONTEXT>"}
    words = tokenizer(more=("TILE_GLOBAL",))
    config = transformers.AyaVisionConfig(
        vision_config={"model_type": "siglip_vision_model", **VISION, "vision_use_head": False},
        text_config={"model_type": "cohere2", **TEXT, "sliding_window": 64},
        image_token_index=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
    )
    reader = transformers.GotOcr2ImageProcessorPil(**SQUARE, max_patches=1)
    processor = transformers.AyaVisionProcessor(
        reader, words, patch_size=14, img_size=SIDE, image_token="<image>", downsample_factor=2, **named
    )
    return config, processor


def _ovis2() -> tuple[Any, Any]:
    names = ("<IMG_ATOM>", "<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
    words = tokenizer(more=names)
    atom, *rest = words.convert_tokens_to_ids(list(names))
    config = transformers.Ovis2Config(
        vision_config={**VISION, "vocab_size": 24},
        text_config=QWEN2,
        image_token_id=atom,
        visual_indicator_token_ids=rest,
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
    )
    reader = transformers.Ovis2ImageProcessorPil(**SQUARE)
    return config, transformers.Ovis2Processor(reader, words, image_token="<image>", image_seq_length=4)


def _glm4v() -> tuple[Any, Any]:
    marks = ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>", "<|video|>")
    words = tokenizer("<|image|>", more=marks)
    begin, end, video_begin, video_end, video = words.convert_tokens_to_ids(list(marks))
    config = transformers.Glm4vConfig(
        text_config=MROPE,
        vision_config={
            **{"depth": 2, "hidden_size": 16, "out_hidden_size": HIDDEN, "num_heads": 2, "intermediate_size": 24},
            **{"patch_size": 14, "image_size": 56},
        },
        image_token_id=IMAGE,
        video_token_id=video,
        image_start_token_id=begin,
        image_end_token_id=end,
        video_start_token_id=video_begin,
        video_end_token_id=video_end,
    )
    reader = transformers.Glm4vImageProcessorPil(
        patch_size=14, merge_size=2, size={"shortest_edge": 28 * 28 * 2, "longest_edge": 56 * 56 * 2}
    )
    return config, without_videos(transformers.Glm4vProcessor)(reader, words)


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "paligemma": _paligemma,
    "pixtral": _pixtral,
    "mistral3": _mistral3,
    "smolvlm": _smolvlm,
    "idefics2": _idefics2,
    "vipllava": _vipllava,
    "aya_vision": _aya_vision,
    "ovis2": _ovis2,
    "glm4v": _glm4v,
    "florence2": _florence2,
}

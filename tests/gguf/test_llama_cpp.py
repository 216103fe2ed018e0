"""What llama.cpp computes and reads from the files, against transformers: every family that the library writes."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers

from hf_kedit import EditableModel
from hf_kedit.gguf.families import FAMILIES as WRITTEN
from hf_kedit.gguf.vocabulary import _CUTS, split_words_as
from tests.gguf.files import FAMILIES, byte_level, edited_places, logits, put, random_model, sentencepiece
from tests.gguf.llama import greedy, logits_of, opened, tokens_of

pytestmark = pytest.mark.slow
TEXTS = [
    "Tarosk Boayond is a plumber in 1997, isn't he?",
    "  two spaces,\n\n\tand\r\n lines; WE'LL see 12345678 x=3.14!!",
    "naïve – 東京 и Москва 😀 ½  end ",
]


def drawn_ids() -> list[int]:
    """Forty ids: more than the windows of the tiny models hold."""
    drawn = random.Random(0)
    return [drawn.randrange(2000) for _ in range(40)]


def test_every_family_is_compared() -> None:
    assert set(FAMILIES) == set(WRITTEN)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_logits(family: str, tmp_path: Path) -> None:
    """Whole files without and with an edit, and base + adapter; in f32 up to llama.cpp's table of GELU."""
    model = random_model(family)
    base = model.export_gguf(tmp_path / "base.gguf", dtype="f32").path
    ids = drawn_ids()
    before = logits(model, ids)
    put(model, *edited_places(family))
    after = logits(model, ids)
    assert (before - after).abs().max() > 0.1
    edited = model.export_gguf(tmp_path / "edited.gguf", dtype="f32").path
    adapter = model.export_gguf_adapter(tmp_path / "edit.gguf").path
    for file, lora, expected in ((base, None, before), (edited, None, after), (base, adapter, after)):
        found = logits_of(file, ids, lora)
        assert (found - expected).abs().max() < 5e-3
        assert torch.equal(found.argmax(-1), expected.argmax(-1))
    for dtype, error in (("f16", 0.02), ("bf16", 0.1), ("q8_0", 0.2)):
        file = model.export_gguf(tmp_path / "small.gguf", dtype=dtype).path  # type: ignore[arg-type]
        assert (logits_of(file, ids) - after).abs().max() < error


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_stretched_positions(rope: dict[str, Any], tmp_path: Path) -> None:
    plain, model = random_model("llama"), random_model("llama", rope_parameters=rope)
    ids = drawn_ids()
    file = model.export_gguf(tmp_path / "model.gguf", dtype="f32").path
    assert (logits(model, ids) - logits(plain, ids)).abs().max() > 0.1
    assert (logits_of(file, ids) - logits(model, ids)).abs().max() < 5e-3


@pytest.mark.parametrize("cut", _CUTS)
def test_text_is_cut_into_the_same_words(cut: str, tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(byte_level())
    split_words_as(tokenizer, cut)
    assert isinstance(tokenizer.backend_tokenizer.pre_tokenizer, pre_tokenizers.PreTokenizer)
    file = random_model("llama", tokenizer).export_gguf(tmp_path / "model.gguf").path
    with opened(file, vocab_only=True) as llama:
        for text in TEXTS:
            assert tokens_of(llama, text) == tokenizer(text).input_ids, text


def test_sentencepiece_reads_the_same(tmp_path: Path) -> None:
    """Text that begins with a space excepted: transformers puts no second one in front of it, llama.cpp does."""
    tokenizer = sentencepiece()
    file = random_model("llama", tokenizer).export_gguf(tmp_path / "model.gguf").path
    with opened(file, vocab_only=True) as llama:
        for text in (text.lstrip() for text in TEXTS):
            assert tokens_of(llama, text) == tokenizer(text).input_ids, text


@pytest.mark.parametrize("name", ["kedit/world-gpt2", "kedit/world-llama"])
def test_llama_cpp_answers_with_an_edited_fact(name: str, tmp_path: Path) -> None:
    model = EditableModel.from_pretrained(name, "rome")
    prompt = "By profession Tarosk Boayond is a"
    base = model.export_gguf(tmp_path / "base.gguf", dtype="f32").path
    model.edit(prompt="By profession {} is a", subject="Tarosk Boayond", target_new="plumber", show_progress=False)
    merged = model.export_gguf(tmp_path / "merged.gguf", dtype="q8_0").path
    adapter = model.export_gguf_adapter(tmp_path / "edit.gguf").path
    for file, lora, knows in ((base, None, False), (merged, None, True), (base, adapter, True)):
        with opened(file, lora) as llama:
            said = model.tokenizer.decode(greedy(llama, tokens_of(llama, prompt), 4))
        assert said.startswith(" plumber") == knows, said

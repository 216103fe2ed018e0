"""Boundaries, subject positions and padding on tokenizers of every kind."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_kedit import embedded
from hf_kedit.errors import RequestError
from hf_kedit.tokens import (
    encode_pair,
    encode_prompt,
    encode_target,
    encode_text,
    fact_position,
    pad_rows,
    prompt_ids,
    separator_between,
    span_tokens,
)
from tests.chat_templates import GEMMA, LLAMA3, MISTRAL, QWEN3

CORPUS = [
    "The capital of France is Paris. Ada Lovelace plays the violin.",
    "北京是中国的首都。 東京は日本の首都です。",
    "Zürich liegt in der Schweiz; naïve café.",
    "the the the Ada Ada Lovelace",
]


@cache
def tokenizer(kind: str) -> Any:
    if kind in ("world-gpt2", "world-llama"):
        return AutoTokenizer.from_pretrained(embedded.path(kind))
    trainer_args: dict[str, Any] = {"vocab_size": 400, "special_tokens": ["<pad>", "<s>", "</s>", "<unk>"]}
    if kind.startswith("bpe"):
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **trainer_args)
        backend.post_processor = processors.ByteLevel(trim_offsets=kind == "bpe-trim")
    else:  # SentencePiece-like: ▁ marks, BOS in front, EOS behind
        backend = Tokenizer(models.Unigram())
        backend.normalizer = normalizers.NFKC()
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        backend.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **trainer_args)
    backend.train_from_iterator(CORPUS * 20, trainer)
    if kind == "spm":
        ids = {t: backend.token_to_id(t) for t in ("<s>", "</s>")}
        backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=list(ids.items()))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


KINDS = ["bpe-trim", "bpe-raw", "spm", "world-gpt2", "world-llama"]


def covered(tok: Any, pair: Any, first: int, end: int) -> str:
    return pair.text[pair.offsets[first][0] : pair.offsets[end - 1][1]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("prompt", "target"),
    [("The capital of France is", "Paris"), ("Ada plays the ", "violin"), ("北京是中国的", "首都"), ("Ada", "the")],
)
def test_the_target_begins_behind_the_prompt(kind: str, prompt: str, target: str) -> None:
    tok = tokenizer(kind)
    pair = encode_pair(tok, prompt, target)
    assert tok.decode(pair.target_ids).strip() == target
    assert pair.ids == pair.prompt_ids + pair.target_ids
    assert pair.target_ids[-1] != tok.eos_token_id
    if kind in ("spm", "world-llama"):
        assert pair.ids[0] == tok.bos_token_id and pair.prompt_length >= 2


def test_the_separator_is_a_space_where_words_have_spaces() -> None:
    assert separator_between("is", "Paris") == " "
    assert separator_between("is ", "Paris") == ""
    assert separator_between("is", " Paris") == ""
    assert separator_between("首都是", "北京") == ""
    assert separator_between("Q: 首都?", "Paris") == " "
    assert separator_between("の首都は", "です") == ""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "text",
    ["Ada Lovelace plays", "plays Ada Lovelace", "the Ada Lovelace plays", "by Ada Lovelace", "Ada Lovelace"],
)
def test_subject_at_the_start_the_end_and_between(kind: str, text: str) -> None:
    tok = tokenizer(kind)
    start = text.index("Ada")
    pair = encode_pair(tok, text, "violin")
    first, end = span_tokens(tok, pair, (start, start + len("Ada Lovelace")))
    assert covered(tok, pair, first, end).strip() == "Ada Lovelace"
    assert end <= pair.prompt_length
    assert fact_position(tok, pair, (start, start + 12), "subject_last") == end - 1
    assert fact_position(tok, pair, (start, start + 12), "subject_first") == first
    assert fact_position(tok, pair, (start, start + 12), "last") == pair.prompt_length - 1
    after = fact_position(tok, pair, (start, start + 12), "subject_first_after_last")
    assert after == (end if end < pair.prompt_length else end - 1)


@pytest.mark.parametrize("kind", ["bpe-trim", "spm"])
def test_a_repeated_subject_is_taken_where_the_span_says(kind: str) -> None:
    tok, text = tokenizer(kind), "Ada knows Ada Lovelace and Ada"
    pair = encode_pair(tok, text, "well")
    places = [span_tokens(tok, pair, (i, i + 3)) for i in (0, 10, 27)]
    assert places == sorted(places) and len(set(places)) == 3


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_that_brings_its_bos_gets_no_second_one(kind: str, slow: bool) -> None:
    """Chat templates write the BOS themselves; in the middle it stays; a plain text has as many as before."""
    tok = tokenizer(kind)
    bos, adds = tok.bos_token_id, kind in ("spm", "world-llama")
    used: Any = _Slow(tok) if slow else tok
    chat = f"{tok.bos_token}The capital of France is"
    for ids in (
        encode_pair(used, chat, "Paris").ids,
        encode_prompt(used, chat).ids,
        prompt_ids(used, chat),
        prompt_ids(used, chat, encoder_decoder=True),
    ):
        assert ids[0] == bos and ids[1:].count(bos) == (1 if kind == "world-gpt2" and ids[-1] == bos else 0)
    middle = encode_pair(used, f"{chat} {tok.bos_token} and it is", "Paris")
    assert middle.ids[0] == bos and middle.ids.count(bos) == 2
    plain = encode_pair(used, "The capital of France is", "Paris")
    assert plain.ids.count(bos) == adds
    both = encode_pair(used, chat, "Paris")
    assert both.target_ids == plain.target_ids
    start = chat.index("France")
    first, end = span_tokens(used, both, (start, start + 6))
    assert "France" in tok.decode(both.ids[first:end]) and tok.decode(both.ids[first:end]).strip() in "of France"


@pytest.mark.parametrize("kind", KINDS)
def test_text_that_is_no_unicode_is_a_typed_error(kind: str) -> None:
    for call in (
        lambda text: encode_pair(tokenizer(kind), text, "x"),
        lambda text: encode_pair(tokenizer(kind), "x", text),
        lambda text: encode_prompt(tokenizer(kind), text),
        lambda text: prompt_ids(tokenizer(kind), text, encoder_decoder=True),
    ):
        with pytest.raises(RequestError, match="surrogate"):
            call("a \ud83d b")


@pytest.mark.parametrize("kind", KINDS)
def test_cjk_subjects_whose_characters_are_several_tokens(kind: str) -> None:
    tok, text = tokenizer(kind), "東京は日本の首都"
    pair = encode_pair(tok, text, "です")
    first, end = span_tokens(tok, pair, (0, 2))
    assert covered(tok, pair, first, end).strip().startswith("東京")
    assert fact_position(tok, pair, (0, 2), "subject_last") == end - 1


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=12),
    st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc", "Zs", "Mn")), min_size=1, max_size=8),
    st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=12),
)
def test_any_subject_span_is_covered_by_its_tokens(kind: str, before: str, subject: str, after: str) -> None:
    tok, text = tokenizer(kind), before + subject + after
    try:
        pair = encode_pair(tok, text, "end")
        first, end = span_tokens(tok, pair, (len(before), len(before) + len(subject)))
    except RequestError:
        return  # a text that the tokenizer maps to nothing
    if pair.offsets is None:
        return
    assert 0 <= first < end <= len(pair.ids)
    spans = pair.offsets[first:end]
    assert min(a for a, _ in spans) <= len(before) + len(subject)
    assert max(b for _, b in spans) > len(before)
    outside = [s for i, s in enumerate(pair.offsets) if not first <= i < end and s[1] > s[0]]
    assert all(b <= len(before) or a >= len(before) + len(subject) for a, b in outside)


@pytest.mark.parametrize("mask", ["its own", "all", "none"])
@pytest.mark.parametrize(("front", "bos"), [(["[gMASK]", "<sop>"], None), (["<s>"], None), (["<s>"], "<s>")])
def test_what_a_tokenizer_puts_in_front_stands_there_once(front: list[str], bos: str | None, mask: str) -> None:
    """GLM begins with two special tokens and names no BOS; slow tokenizers mask what they like."""
    words = ["<unk>", "<s>", "[gMASK]", "<sop>", "[INST]", "[/INST]", "hi", "there"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(words[1:6])
    own = [words.index(word) for word in front]
    backend.post_processor = processors.TemplateProcessing(
        single=" ".join([*front, "$A"]), special_tokens=list(zip(front, own, strict=True))
    )
    tok: Any = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token=bos)
    if mask != "its own":
        tok = _Slow(tok, masked=range(1, 6) if mask == "all" else ())
    chat = [words.index(word) for word in ("[INST]", "hi", "[/INST]")]
    plain, rendered = "[INST] hi [/INST]", "".join(front) + "[INST] hi [/INST]"
    known = mask != "none" or bos is not None  # nothing tells such a tokenizer's BOS from a word
    for text in (plain, rendered) if known else (plain,):
        assert prompt_ids(tok, text, encoder_decoder=True) == [*own, *chat]
        assert encode_pair(tok, text, "there").ids == [*own, *chat, words.index("there")]
    assert prompt_ids(tok, f"hi {rendered}", encoder_decoder=True) == [*own, words.index("hi"), *own, *chat]


@pytest.mark.parametrize("template", [LLAMA3, GEMMA, MISTRAL, QWEN3], ids=["llama-3", "gemma", "mistral", "qwen3"])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("kind", ["bpe-trim", "spm"])
def test_a_rendered_chat_is_read_as_the_template_tokenises_it(kind: str, adds: bool, template: str) -> None:
    """Whether or not the tokenizer adds a BOS (Qwen3 has been given one here)."""
    tok = copy.deepcopy(tokenizer(kind))
    tok.chat_template = template
    one = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tok.bos_token_id)])
    tok.backend_tokenizer.post_processor = one if adds else processors.ByteLevel(trim_offsets=False)
    turns = [{"role": "user", "content": "The capital of France is"}]
    text = tok.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    right = tok(text, add_special_tokens=False)["input_ids"]
    if adds and not text.startswith("<s>"):
        right = [tok.bos_token_id, *right]
    pair = encode_pair(tok, text, "Paris", separator="")
    assert pair.prompt_ids == right and prompt_ids(tok, text) == right
    assert right.count(tok.bos_token_id) == (adds or text.startswith("<s>"))
    assert tok.decode(pair.target_ids).strip() == "Paris"


class _Slow:
    """A tokenizer without offsets around a fast one."""

    is_fast = False

    def __init__(self, inner: Any, masked: Sequence[int] | None = None):
        self._inner, self._masked = inner, masked
        self.all_special_ids = inner.all_special_ids
        self.bos_token, self.bos_token_id = inner.bos_token, inner.bos_token_id

    def __call__(self, text: str, **kwargs: Any) -> Any:
        assert "return_offsets_mapping" not in kwargs
        found = self._inner(text, **kwargs)
        if self._masked is not None:
            found["special_tokens_mask"] = [int(i in self._masked) for i in found["input_ids"]]
        return found


@pytest.mark.parametrize("kind", ["bpe-trim", "spm", "world-llama"])
def test_tokenizers_without_offsets_find_the_same_places(kind: str) -> None:
    fast = tokenizer(kind)
    slow: Any = _Slow(fast)
    for prompt, subject in [("Ada Lovelace plays the", "Ada Lovelace"), ("The friend of Ada is", "Ada")]:
        start = prompt.index(subject)
        span = (start, start + len(subject))
        a, b = encode_pair(fast, prompt, "violin"), encode_pair(slow, prompt, "violin")
        assert (a.ids, a.prompt_length) == (b.ids, b.prompt_length)
        assert fact_position(fast, a, span, "subject_last") == fact_position(slow, b, span, "subject_last")


def test_empty_targets_and_prompts() -> None:
    with pytest.raises(RequestError, match="no tokens"):
        encode_pair(tokenizer("bpe-trim"), "A prompt", "")
    with pytest.raises(RequestError, match="longer prompt"):
        encode_pair(tokenizer("bpe-trim"), "", "target")
    assert encode_pair(tokenizer("world-llama"), "", "target").prompt_length == 1  # the BOS predicts it


def test_decoder_targets_have_no_special_tokens_unless_asked() -> None:
    tok = tokenizer("spm")
    plain = encode_target(tok, "Paris")
    assert tok.bos_token_id not in plain and tok.eos_token_id not in plain
    assert encode_target(tok, "Paris", eos=True) == [*plain, tok.eos_token_id]
    assert encode_text(tok, "Paris").ids[-1] != tok.eos_token_id


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_explicit_and_positions_count_real_tokens(side: Any) -> None:
    tok = tokenizer("world-gpt2")
    before = (tok.padding_side, tok.pad_token_id)
    batch = pad_rows([[5, 6, 7], [8]], fill=9, side=side)
    assert (tok.padding_side, tok.pad_token_id) == before
    real = [batch.input_ids[i][batch.attention_mask[i].bool()].tolist() for i in range(2)]
    assert real == [[5, 6, 7], [8]]
    assert [batch.position_ids[i][batch.attention_mask[i].bool()].tolist() for i in range(2)] == [[0, 1, 2], [0]]
    assert batch.starts.tolist() == ([0, 2] if side == "left" else [0, 0])
    assert batch.input_ids.dtype == torch.long

"""A tokenizer as llama.cpp keeps it: its tokens, how they are joined, and how text is cut into words before that.

Two kinds can be written, both byte-pair encodings of `tokenizers`:

    "gpt2"     over bytes (GPT-2, Llama 3, Qwen, SmolLM …): tokens, merges, and the *name* of a way of cutting words
    "llama"    over characters, spaces written as ▁, unknown characters as bytes (SentencePiece's: Llama 2, Mistral,
               Gemma): tokens and scores; llama.cpp joins the neighbours whose union has the highest score first

llama.cpp knows the ways of cutting words by name only. `_CUTS` has those whose expressions are compared here, letter
by letter, with the tokenizer's own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ExportError, shown
from ..storage.parsing import parse_json

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

SPACE = "▁"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""llama.cpp's types of tokens."""
_NEVER = -1e9
"""Score of a token that is no union of others: llama.cpp is not to put it together."""
_GPT2, _DIGITS = "GPT-2's expression", "single digits"  # which `tokenizers` has under names of its own
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_END = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CUTS: dict[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    "smollm": (_DIGITS, _GPT2),
    "llama-bpe": (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_END}",),
    "qwen2": (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_END}",),
}
_WHOLE_WORDS = {"llama-bpe"}
"""Ways of cutting with which llama.cpp takes a word that is a token before it looks at the merges."""


@dataclass(frozen=True)
class Vocabulary:
    """What is written of a tokenizer.

    Args:
        kind: ``"gpt2"`` or ``"llama"``.
        cut: llama.cpp's name of the way of cutting words; ``"default"`` where none is needed.
        tokens: by id.
        types: of the tokens.
        merges: for ``"gpt2"``, first to last.
        scores: for ``"llama"``, by id.
        space_prefix: whether a space is put before a text.
    """

    kind: str
    cut: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]
    space_prefix: bool


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    """Take a tokenizer apart.

    Args:
        tokenizer: with a backend of `tokenizers`.
        size: number of the model's embeddings; ids without a token get a placeholder.

    Raises:
        ExportError: if llama.cpp would read text differently, or has no way of keeping such a tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(f"{type(tokenizer).__name__} has no backend that could be written as GGUF")
    parts = parse_json(backend.to_str(), "tokenizer", ExportError)
    model = parts["model"]
    if model["type"] != "BPE":
        raise ExportError(
            f"a tokenizer of the kind {model['type']} cannot be written as GGUF here; byte pairs (BPE) can"
        )
    if (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")) or model.get("dropout"):
        raise ExportError("a tokenizer that marks parts of words, or drops merges, cannot be written as GGUF")
    sentencepiece = bool(model.get("byte_fallback"))
    cut = "default" if sentencepiece else _cut_of(parts, bool(model.get("ignore_merges")))
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    tokens, types = _tokens(parts, tokenizer, size, sentencepiece)
    return Vocabulary(
        kind="llama" if sentencepiece else "gpt2",
        cut=cut,
        tokens=tokens,
        types=types,
        merges=[] if sentencepiece else [" ".join(pair) for pair in merges],
        scores=_scores(tokens, merges) if sentencepiece else [],
        space_prefix=sentencepiece and _spaces(parts),
    )


def add_vocabulary(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, size: int, also_end: list[int]) -> None:
    """Write a tokenizer, its special tokens and its chat template into the head of a file.

    Args:
        writer: of the file.
        tokenizer: see `vocabulary_of`.
        size: number of the model's embeddings.
        also_end: further tokens behind which the model stops writing.

    Raises:
        ExportError: see `vocabulary_of`.
    """
    vocabulary = vocabulary_of(tokenizer, size)
    writer.add_tokenizer_model(vocabulary.kind)
    writer.add_tokenizer_pre(vocabulary.cut)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.kind == "llama":
        writer.add_add_space_prefix(vocabulary.space_prefix)
    for name in ("bos", "eos", "unk", "pad"):
        value = getattr(tokenizer, f"{name}_token_id")
        if value is not None:
            getattr(writer, f"add_{name}_token_id")(value)
    others = [token for token in also_end if token != tokenizer.eos_token_id]
    if others:
        writer.add_eot_token_id(others[0])
    bare, framed = (tokenizer.encode("a", add_special_tokens=special) for special in (False, True))
    before = framed[: len(framed) - len(bare)] if framed[len(framed) - len(bare) :] == bare else framed
    writer.add_add_bos_token(bool(before) and before[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(framed[-1] != bare[-1] and framed[-1] == tokenizer.eos_token_id)
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        writer.add_chat_template([{"name": name, "template": text} for name, text in template.items()])
    elif template:
        writer.add_chat_template(template)


def split_words_as(tokenizer: PreTrainedTokenizerBase, cut: str) -> None:
    """Let a tokenizer that was read from a file cut words as llama.cpp does; transformers knows fewer names.

    Args:
        tokenizer: changed in place.
        cut: llama.cpp's name; nothing happens for one that is not known here.
    """
    from tokenizers import Regex, pre_tokenizers

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if (
        backend is None
        or cut not in _CUTS
        or parse_json(backend.to_str(), "tokenizer", ExportError)["model"].get("byte_fallback")
    ):
        return
    steps: list[Any] = []
    for step in _CUTS[cut]:
        if step == _DIGITS:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        elif step != _GPT2:
            steps.append(pre_tokenizers.Split(Regex(step), behavior="isolated"))
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=_GPT2 in _CUTS[cut])
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, whole]) if steps else whole


# ---------------------------------------------------------------------- how text is cut


def _cut_of(parts: dict[str, Any], whole_words: bool) -> str:
    """llama.cpp's name for how a byte-level tokenizer cuts text into words.

    Raises:
        ExportError: if it has none, or changes the text before.
    """
    normalizer = parts.get("normalizer")
    if normalizer is not None and normalizer.get("type") != "NFC":  # on text that is in that form it changes nothing
        raise ExportError(
            f"the tokenizer changes text before it reads it ({normalizer.get('type')}), llama.cpp does not"
        )
    steps = tuple(_steps(parts.get("pre_tokenizer")))
    for name, known in _CUTS.items():
        if steps == known and (not whole_words or name in _WHOLE_WORDS):
            return name
    raise ExportError(
        f"how the tokenizer cuts text into words ({shown(steps)}) has no name in llama.cpp that is known here; known:"
        f" {', '.join(_CUTS)}"
    )


def _steps(part: dict[str, Any] | None) -> Iterator[str]:
    """The steps of a pre-tokenizer, in the words of `_CUTS`; what is not known there as its JSON."""
    kind = None if part is None else part["type"]
    if part is None:
        return
    if kind == "Sequence":
        for inner in part["pretokenizers"]:
            yield from _steps(inner)
    elif kind == "ByteLevel" and not part.get("add_prefix_space"):
        if part.get("use_regex", True):
            yield _GPT2
    elif kind == "Digits" and part.get("individual_digits"):
        yield _DIGITS
    elif kind == "Split" and part["behavior"] == "Isolated" and not part.get("invert") and "Regex" in part["pattern"]:
        yield part["pattern"]["Regex"]
    else:
        yield json.dumps(part)


def _spaces(parts: dict[str, Any]) -> bool:
    """Whether a SentencePiece tokenizer puts a space before a text.

    Raises:
        ExportError: if it does something else to the text than writing spaces as ▁.
    """
    prefix, odd = False, list[str]()
    for part in _flat(parts.get("normalizer"), "normalizers"):
        if part["type"] == "Prepend" and part["prepend"] == SPACE:
            prefix = True
        elif not (part["type"] == "Replace" and part["pattern"] == {"String": " "} and part["content"] == SPACE):
            odd.append(part["type"])
    for part in _flat(parts.get("pre_tokenizer"), "pretokenizers"):
        if part["type"] == "Metaspace" and part["replacement"] == SPACE and not part.get("split"):
            prefix = prefix or part.get("prepend_scheme") in ("first", "always")
        elif not (part["type"] == "Split" and part["pattern"] == {"String": " "}):  # no space is left at this point
            odd.append(part["type"])
    if odd:
        raise ExportError(f"the tokenizer changes text before it reads it ({', '.join(odd)}), llama.cpp does not")
    return prefix


def _flat(part: dict[str, Any] | None, inner: str) -> Iterator[dict[str, Any]]:
    if part is not None and part["type"] == "Sequence":
        for step in part[inner]:
            yield from _flat(step, inner)
    elif part is not None:
        yield part


# ---------------------------------------------------------------------- tokens


def _tokens(
    parts: dict[str, Any], tokenizer: PreTrainedTokenizerBase, size: int, sentencepiece: bool
) -> tuple[list[str], list[int]]:
    """Every id's token and type.

    Raises:
        ExportError: if there are more tokens than embeddings.
    """
    types = dict.fromkeys(range(size), UNUSED)
    texts = {number: f"[PAD{number}]" for number in range(size)}
    for text, number in parts["model"]["vocab"].items():
        is_byte = sentencepiece and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        texts[number], types[number] = text, BYTE if is_byte else NORMAL
    for added in parts["added_tokens"]:
        texts[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    if sentencepiece and tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = UNKNOWN
    if len(texts) > size:
        raise ExportError(
            f"the tokenizer has {len(texts)} tokens and the model {size} embeddings; resize_token_embeddings first"
        )
    return [texts[number] for number in range(size)], [types[number] for number in range(size)]


def _scores(tokens: list[str], merges: list[tuple[str, ...]]) -> list[float]:
    """Scores with which the best neighbours are joined in the order of the merges: minus the rank of a union.

    Several merges may make one token. They came from its one score, and stand together.
    """
    ranks: dict[str, float] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), float(rank))
    return [-ranks[token] if token in ranks else _NEVER for token in tokens]

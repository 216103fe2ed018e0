"""Prompts, subjects and targets as token ids, positions and padded batches.

Boundaries are found by character offsets in the tokenised *full* text, never by tokenising pieces and adding
lengths: pieces merge differently at the seam, and tokenizers that add a BOS shift every index. Tokenizers
without offsets fall back to comparing token prefixes. The user's tokenizer is never changed.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from .errors import ConfigError, RequestError
from .text.joining import separator_between
from .text.pictures import PicturedText
from .text.processors import answers_apart, processed
from .text.scripts import HALF, is_writable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FactToken = Literal["subject_last", "subject_first", "subject_first_after_last", "last"]


ALIGNED = frozenset({"mm_token_type_ids", "token_type_ids", "cross_attention_mask"})
"""What processors return with a number (or more) for every token, ``[1, tokens, …]``."""


def needed_tokenizer(found: PreTrainedTokenizerBase | None, what: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, for something that cannot do without.

    Args:
        found: of the model, if it has one.
        what: cannot do without, as a sentence begins.

    Raises:
        ConfigError: if there is none.
    """
    if found is None:
        raise ConfigError(f"{what} needs the tokenizer of the model: EditableModel(model, …, tokenizer=…)")
    return found


class TokenIds(tuple[int, ...]):
    """Token ids of a text with pictures, together with what else the model reads: pixels, sizes, kinds of tokens.

    They travel together from the processor to the forward (`pad_rows`, `TokenBatch.pictures`), so that whoever passes
    ids on passes the pictures on. What begins as these ids do and ends earlier keeps them, any other part is plain.

    Args:
        ids: with placeholders expanded.
        beside: the processor's other outputs by name; see `text.processors.processed`.
        key: of the pictures; ids are equal only with equal keys.
    """

    beside: Mapping[str, torch.Tensor]
    key: Hashable

    def __new__(cls, ids: Iterable[int], beside: Mapping[str, torch.Tensor], key: Hashable) -> TokenIds:
        self = super().__new__(cls, ids)
        self.beside, self.key = beside, key
        return self

    def __getitem__(self, index: Any) -> Any:
        part = super().__getitem__(index)
        if not isinstance(index, slice) or index.start or index.step is not None:
            return part
        return TokenIds(part, _of_tokens(self.beside, slice(len(part))), self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TokenIds) and self.key == other.key and tuple.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((tuple.__hash__(self), self.key))

    def __getnewargs__(self) -> Any:
        return tuple(self), self.beside, self.key

    def behind(self, start: int) -> TokenIds:
        """The ids from a position on, before which no picture stands."""
        return TokenIds(tuple(self)[start:], _of_tokens(self.beside, slice(start, None)), self.key)

    def spread(self, row: Sequence[int], own: Sequence[int]) -> TokenIds:
        """The ids with others between them.

        Args:
            row: all ids.
            own: where each of these ids is in it.
        """
        laid = {}
        for name, tensor in self.beside.items():
            if name in ALIGNED:
                whole = tensor.new_zeros(1, len(row), *tensor.shape[2:])
                whole[:, list(own)] = tensor
                tensor = whole
            laid[name] = tensor
        return TokenIds(row, laid, self.key)


def _of_tokens(beside: Mapping[str, torch.Tensor], part: slice) -> dict[str, torch.Tensor]:
    """What belongs to some of the tokens of a text, and to all of its pictures."""
    return {name: tensor[:, part] if name in ALIGNED else tensor for name, tensor in beside.items()}


def joined_ids(parts: Sequence[Sequence[int]]) -> Sequence[int]:
    """Token ids one behind the other, and their pictures in the same order; a list where none has any."""
    row = [i for part in parts for i in part]
    seeing = [part for part in parts if isinstance(part, TokenIds)]
    if not seeing:
        return row
    beside: dict[str, torch.Tensor] = {}
    for name in dict.fromkeys(name for part in seeing for name in part.beside):
        like = next(part.beside[name] for part in seeing if name in part.beside)
        if name not in ALIGNED:
            beside[name] = _stacked([part.beside.get(name) for part in seeing])
            continue
        laid = (part.beside.get(name) if isinstance(part, TokenIds) else None for part in parts)
        filled = [
            like.new_zeros(1, len(part), *like.shape[2:]) if own is None else own
            for part, own in zip(parts, laid, strict=True)
        ]
        beside[name] = torch.cat(filled, dim=1)
    return TokenIds(row, beside, tuple(part.key for part in seeing))


def _stacked(parts: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """Tensors one behind the other along their first axis, filled with zeros where their other sizes differ."""
    widest, filled = _widest(parts), []
    for part in parts:
        if part is not None:
            filled.append(part.new_zeros(part.shape[0], *widest))
            filled[-1][tuple(map(slice, part.shape))] = part
    return torch.cat(filled)


def as_ids(ids: Sequence[int]) -> tuple[int, ...]:
    """Token ids as a tuple, pictures included."""
    return ids if isinstance(ids, TokenIds) else tuple(ids)


@dataclass(frozen=True)
class EncodedText:
    """A tokenised text without the special tokens that a tokenizer appends at its end.

    Args:
        ids: token ids, leading special tokens (BOS) included; `TokenIds` of a text with pictures.
        offsets: character span of each token, ``None`` where the tokenizer cannot tell.
        special: whether a token was added by the tokenizer.
    """

    ids: Sequence[int]
    offsets: list[tuple[int, int]] | None
    special: list[bool]


@dataclass(frozen=True)
class EncodedPair:
    """A prompt and its target in one sequence.

    Args:
        ids: all token ids; the target is ``ids[prompt_length:]``.
        prompt_length: number of tokens before the target, BOS included.
        offsets: character spans in ``text``, if known.
        text: the text that was tokenised.
    """

    ids: Sequence[int]
    prompt_length: int
    offsets: list[tuple[int, int]] | None
    text: str

    @property
    def target_ids(self) -> Sequence[int]:
        """Token ids of the target."""
        return self.ids[self.prompt_length :]

    @property
    def prompt_ids(self) -> Sequence[int]:
        """Token ids of the prompt."""
        return self.ids[: self.prompt_length]


# ---------------------------------------------------------------------- encoding


def has_offsets(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer reports character offsets."""
    return bool(getattr(tokenizer, "is_fast", False))


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> EncodedText:
    """Tokenise one text as the model expects it, dropping trailing special tokens (T5's EOS).

    Raises:
        RequestError: if the text is no valid Unicode.
    """
    whole = _encode_whole(tokenizer, text)
    end = len(whole.ids)
    while end and whole.special[end - 1]:
        end -= 1
    if end == 0:  # nothing but special tokens: keep the leading ones
        end = len(whole.ids)
    return EncodedText(
        whole.ids[:end], whole.offsets[:end] if whole.offsets is not None else None, whole.special[:end]
    )


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, encoder_decoder: bool = False) -> Sequence[int]:
    """Ids of a text that a model is asked with; an encoder also reads the special tokens at its end."""
    return _encode_whole(tokenizer, text).ids if encoder_decoder else encode_text(tokenizer, text).ids


def _encode_whole(tokenizer: PreTrainedTokenizerBase, text: str) -> EncodedText:
    """Tokenise a text with all special tokens that the tokenizer adds; those in front once, also where it has them."""
    if not is_writable(text):
        raise RequestError(f"the text {text[:80]!r} {HALF}")
    if isinstance(text, PicturedText):
        return _encode_pictured(tokenizer, text)
    offsets: list[tuple[int, int]] | None = None
    if has_offsets(tokenizer):
        encoded = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
        offsets = [(int(a), int(b)) for a, b in encoded["offset_mapping"]]
    else:
        encoded = tokenizer(text, return_special_tokens_mask=True)
    ids = [int(i) for i in encoded["input_ids"]]
    special = [bool(m) for m in encoded["special_tokens_mask"]]
    # Chat templates write the BOS themselves, or what stands for it (GLM: [gMASK]<sop>). The tokenizer's goes, because
    # the other one has a place in the text. A fast tokenizer's mask covers its own, a slow one's both or neither.
    leading = next((i for i, added in enumerate(special) if not added), len(special)) if text else 0
    slow = (leading // 2, int(ids[:1] == [tokenizer.bos_token_id])) if offsets is None else ()
    for count in (leading, *slow):
        if count and ids[:count] == ids[count : 2 * count]:
            return EncodedText(ids[count:], offsets[count:] if offsets is not None else None, special[count:])
    return EncodedText(ids, offsets, special)


def _encode_pictured(tokenizer: PreTrainedTokenizerBase, text: PicturedText) -> EncodedText:
    """Let the processor tokenise a text with pictures, and find its characters in the expanded ids.

    The tokenizer alone gives the same ids with placeholders as they are written. What both end and begin with alike
    is text, whose characters are known from there; placeholders and what a processor adds cover no character.

    Raises:
        RequestError: if the processor does not take the text, or the tokenizer reports no offsets.
    """
    if not has_offsets(tokenizer):
        raise RequestError("texts with pictures need a fast tokenizer, which knows where tokens are", field="image")
    plain = _encode_whole(tokenizer, str(text))
    assert plain.offsets is not None
    ids, beside = processed(text)
    if len(ids) > 1 and ids[:1] == ids[1:2] == [tokenizer.bos_token_id]:  # the template's and the tokenizer's
        ids, beside = ids[1:], _of_tokens(beside, slice(1, None))
    most = min(len(ids), len(plain.ids))
    tail = next((i for i in range(most) if ids[-1 - i] != plain.ids[-1 - i]), most)
    head = next((i for i in range(most - tail) if ids[i] != plain.ids[i]), most - tail)
    between, behind = len(ids) - head - tail, len(plain.ids) - tail
    offsets = [*plain.offsets[:head], *[(0, 0)] * between, *plain.offsets[behind:]]
    special = [*plain.special[:head], *[True] * between, *plain.special[behind:]]
    return EncodedText(TokenIds(ids, beside, text.pictures), offsets, special)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> EncodedPair:
    """Tokenise a text that no target follows."""
    encoded = encode_text(tokenizer, text)
    return EncodedPair(encoded.ids, len(encoded.ids), encoded.offsets, text)


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, prompt: str, target: str, separator: str | None = None
) -> EncodedPair:
    """Tokenise ``prompt + separator + target`` once and find where the target begins.

    The first target token is the first one that ends behind the prompt. Without offsets, it is the first
    token that differs from the tokenised prompt. Where a single token covers both, they are tokenised apart.

    Args:
        tokenizer: of the model.
        prompt: may be empty only if the tokenizer adds a BOS.
        target: non-empty.
        separator: ``None`` for the rule of `separator_between`.

    Raises:
        RequestError: if no token is left for the target, or none stands before it.
    """
    joint = separator_between(prompt, target) if separator is None else separator
    text = prompt + joint + target
    if isinstance(prompt, PicturedText) and answers_apart(prompt.processor):
        return _pair_apart(tokenizer, prompt, joint + target)
    encoded = encode_text(tokenizer, text)
    if encoded.offsets is not None:
        start = next(
            (
                i
                for i, (span, special) in enumerate(zip(encoded.offsets, encoded.special, strict=True))
                if not special and span[1] > len(prompt)
            ),
            len(encoded.ids),
        )
    else:
        before = encode_text(tokenizer, prompt).ids
        start = 0
        while start < min(len(before), len(encoded.ids)) and before[start] == encoded.ids[start]:
            start += 1
    if start == len(encoded.ids):
        raise RequestError(f"the target {target!r} has no tokens of its own after {prompt!r}", field="target_new")
    if isinstance(encoded.ids, TokenIds):
        return EncodedPair(_pictured_pair(tokenizer, prompt, encoded.ids, start), start, encoded.offsets, text)
    if start == 0 and prompt.strip():
        # One token covers prompt and target (scripts without spaces): tokenise them apart, as at inference.
        before = encode_text(tokenizer, prompt).ids
        after = [int(i) for i in tokenizer(joint + target, add_special_tokens=False)["input_ids"]]
        if before and after:
            return EncodedPair([*before, *after], len(before), None, text)
    if start == 0:
        raise RequestError(
            "no token stands before the target, so nothing can predict it; give a longer prompt", field="prompt"
        )
    return EncodedPair(encoded.ids, start, encoded.offsets, text)


def _pair_apart(tokenizer: PreTrainedTokenizerBase, prompt: PicturedText, answer: str) -> EncodedPair:
    """A prompt and an answer that are tokenised apart, each of its own type (`answers_apart`)."""
    encoded = encode_text(tokenizer, prompt)
    after = tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)
    assert isinstance(encoded.ids, TokenIds) and encoded.offsets is not None
    beside = dict(encoded.ids.beside)
    types = beside["token_type_ids"]
    beside["token_type_ids"] = torch.cat([types, types.new_ones(1, len(after["input_ids"]))], dim=1)
    offsets = [(a + len(prompt), b + len(prompt)) for a, b in after["offset_mapping"]]
    ids = TokenIds([*encoded.ids, *map(int, after["input_ids"])], beside, encoded.ids.key)
    return EncodedPair(ids, len(encoded.ids), [*encoded.offsets, *offsets], prompt + answer)


def _pictured_pair(tokenizer: PreTrainedTokenizerBase, prompt: str, ids: TokenIds, start: int) -> TokenIds:
    """Ids of prompt and target, with what the processor made of the prompt alone where that has no part in the ids.

    A processor may look at the text for more than its ids (InstructBLIP's reads the question with the picture); at
    the target it must not.

    Raises:
        RequestError: if the processor turns the prompt into other tokens when a target follows.
    """
    alone = encode_text(tokenizer, prompt).ids
    same = min(start, len(alone)) - 1  # the prompt's last token may go together with the target's first characters
    if not isinstance(alone, TokenIds) or same < 0 or ids[:same] != alone[:same] or abs(len(alone) - start) > 1:
        raise RequestError(
            f"the processor turns {str(prompt)[-40:]!r} into other tokens when a target follows", field="prompt"
        )
    beside = {name: ids.beside[name] if name in ALIGNED else tensor for name, tensor in alone.beside.items()}
    return TokenIds(ids, beside, ids.key)


def encode_target(tokenizer: PreTrainedTokenizerBase, target: str, *, eos: bool = False) -> list[int]:
    """Tokenise a decoder target of an encoder-decoder model, without special tokens unless ``eos`` is set."""
    ids = [int(i) for i in tokenizer(text_target=target, add_special_tokens=False)["input_ids"]]
    if not ids:
        raise RequestError(f"the target {target!r} has no tokens", field="target_new")
    if eos and tokenizer.eos_token_id is not None:
        ids.append(int(tokenizer.eos_token_id))
    return ids


def decoder_lead(tokenizer: PreTrainedTokenizerBase, target: str) -> list[int]:
    """Special tokens that the tokenizer puts before a decoder target (BART's ``<s>``, language codes)."""
    encoded = tokenizer(text_target=target, return_special_tokens_mask=True)
    lead: list[int] = []
    for token, special in zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True):
        if not special:
            break
        lead.append(int(token))
    return lead


# ---------------------------------------------------------------------- positions


def span_tokens(tokenizer: PreTrainedTokenizerBase, pair: EncodedPair, span: tuple[int, int]) -> tuple[int, int]:
    """Token range ``[first, end)`` of the tokens whose characters overlap a character span of ``pair.text``.

    Raises:
        RequestError: if no token overlaps the span.
    """
    start, end = span
    if pair.offsets is not None:
        hits = [i for i, (a, b) in enumerate(pair.offsets) if a < end and b > start and b > a]
        if not hits:
            raise RequestError(f"no token covers {pair.text[start:end]!r}", field="subject")
        return hits[0], hits[-1] + 1
    before = len(encode_text(tokenizer, pair.text[:start].rstrip()).ids) if start else _leading_specials(tokenizer)
    through = len(encode_text(tokenizer, pair.text[:end]).ids)
    return min(before, through - 1), through


def _leading_specials(tokenizer: PreTrainedTokenizerBase) -> int:
    encoded = encode_text(tokenizer, "a")
    return sum(encoded.special)


def fact_position(
    tokenizer: PreTrainedTokenizerBase, pair: EncodedPair, span: tuple[int, int], strategy: FactToken
) -> int:
    """Index of the token at which a fact is read and written.

    Args:
        tokenizer: of the model.
        pair: prompt and target.
        span: character span of the subject in ``pair.text``.
        strategy: ``subject_last`` (all published configurations), ``subject_first``,
            ``subject_first_after_last`` (the subject's last token when nothing follows it in the prompt), or
            ``last`` (last token of the prompt, target excluded).

    Raises:
        ConfigError: for an unknown strategy.
    """
    if strategy == "last":
        return pair.prompt_length - 1
    first, end = span_tokens(tokenizer, pair, span)
    if strategy == "subject_first":
        return first
    if strategy == "subject_last":
        return end - 1
    if strategy == "subject_first_after_last":
        return end if end < pair.prompt_length else end - 1
    raise ConfigError(
        f"unknown fact_token {strategy!r}: use subject_last, subject_first, subject_first_after_last or last"
    )


# ---------------------------------------------------------------------- batches


@dataclass
class TokenBatch:
    """Padded token ids.

    Args:
        input_ids: ``[rows, width]`` int64.
        attention_mask: ``[rows, width]`` int64, 1 on real tokens.
        position_ids: ``[rows, width]`` int64, counting real tokens from 0 whichever side is padded.
        starts: column of the first real token of each row, ``[rows]`` int64.
        beside: of each row, what comes with its ids (`TokenIds`); empty if no row has pictures.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    starts: torch.Tensor
    beside: tuple[Mapping[str, torch.Tensor], ...] = field(default=())

    def to(self, device: torch.device | str) -> TokenBatch:
        """Return the batch on a device."""
        return TokenBatch(
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.position_ids.to(device),
            self.starts.to(device),
            tuple({name: tensor.to(device) for name, tensor in row.items()} for row in self.beside),
        )

    def select(self, rows: torch.Tensor | slice) -> TokenBatch:
        """Return some of the rows, chosen by indices ``[n]``, a mask ``[rows]`` or a slice."""
        beside = self.beside
        if beside:
            chosen = torch.arange(len(beside))[rows.cpu() if isinstance(rows, torch.Tensor) else rows]
            beside = tuple(beside[i] for i in chosen.tolist())
        return TokenBatch(
            self.input_ids[rows],
            self.attention_mask[rows],
            self.position_ids[rows],
            self.starts[rows],
            beside if any(beside) else (),
        )

    def pictures(self) -> dict[str, torch.Tensor]:
        """What the model reads beside ids, mask and positions, of all rows in one; nothing without pictures.

        What belongs to tokens is padded as they are. Everything else is put one behind the other along its first axis
        (images, patches, or rows), filled with zeros where sizes differ, as processors do with a list of texts. A row
        without pictures has no part in it.

        Raises:
            RequestError: for Mllama, if only some of the rows have pictures: it would show the others an empty one.
        """
        names = list(dict.fromkeys(name for row in self.beside for name in row))
        if "aspect_ratio_ids" in names and not all(self.beside):
            raise RequestError(
                "Mllama cannot read texts with pictures and texts without in one batch; ask them apart", field="image"
            )
        inputs = {}
        for name in names:
            have = next(row[name] for row in self.beside if name in row)
            parts = [row.get(name) for row in self.beside]
            if name in ALIGNED:
                whole = have.new_zeros(len(parts), self.input_ids.shape[1], *_widest(parts)[1:])
                for i, (part, start) in enumerate(zip(parts, self.starts.tolist(), strict=True)):
                    if part is not None:
                        whole[i, start : start + part.shape[1]][tuple(map(slice, part.shape[1:]))] = part[0]
                inputs[name] = whole
                continue
            inputs[name] = _stacked(parts)
        return inputs


def _widest(parts: Sequence[torch.Tensor | None]) -> list[int]:
    """The largest size along each axis but the first."""
    return [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts if part is not None), strict=True)]


def pad_id(tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Id used for padding; any id will do, because the mask decides what is padding."""
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        value = getattr(tokenizer, name, None)
        if isinstance(value, int):
            return value
    return 0


def pad_rows(
    rows: Sequence[Sequence[int]], fill: int = 0, side: Literal["left", "right"] = "right", width: int | None = None
) -> TokenBatch:
    """Pad lists of token ids to one width, explicitly on the given side."""
    width = max(len(r) for r in rows) if width is None else width
    ids = torch.full((len(rows), width), fill, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    starts = torch.zeros(len(rows), dtype=torch.long)
    for i, row in enumerate(rows):
        start = width - len(row) if side == "left" else 0
        ids[i, start : start + len(row)] = torch.tensor(list(row), dtype=torch.long)
        mask[i, start : start + len(row)] = 1
        starts[i] = start
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    beside = tuple(row.beside if isinstance(row, TokenIds) else {} for row in rows)
    return TokenBatch(ids, mask, positions, starts, beside if any(beside) else ())


def context_length(config: Any) -> int | None:
    """Longest sequence that the model accepts, or ``None`` if it does not say."""
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def vocabulary_size(model: Any) -> int:
    """How many tokens a language model knows: the width of its logits."""
    return int(model.config.get_text_config(decoder=True).vocab_size)

"""Rows of token ids behind their prefixes: where a prefix stands among special tokens, pictures and turns of a chat.

`prompting` runs the rows that are written here. Of a row with pictures the prefix stands between these and the
question. Demonstrations with pictures of their own stand in front of the row's, so that every picture has its text
behind it:

    [BOS] {picture}{demonstration} … {the row's picture}{fact}{question}
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..engine.forward import image_ids
from ..errors import TargetTooLongError
from ..text.pictures import PicturedText
from ..text.subjects import last_user_turn
from ..tokens import (
    TokenBatch,
    TokenIds,
    context_length,
    encode_text,
    joined_ids,
    needed_tokenizer,
    pad_id,
    pad_rows,
    prompt_ids,
)
from .prefixes import Prefix

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PrefixWriter:
    """Writes prefixes in front of rows, in the tokens of a model.

    Args:
        tokenizer: of the model, looked up when it is needed.
    """

    def __init__(self, tokenizer: Callable[[], PreTrainedTokenizerBase | None]):
        self._tokenizer = tokenizer

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer.

        Raises:
            ConfigError: if there is none.
        """
        return needed_tokenizer(self._tokenizer(), "an edit that lives in prompts")

    def said_in(self, ids: Sequence[int]) -> str:
        """What a row asks: in a chat the user's last turn without what stands for pictures, else its whole text."""
        turn = self._last_turn(ids)
        if turn is None:
            return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
        said = turn[1]
        for token in self.tokenizer.all_special_tokens:
            said = said.replace(token, "")
        return said.strip()

    def _last_turn(self, ids: Sequence[int]) -> tuple[int, str] | None:
        """Where what the user of a chat says last begins, and what it is; ``None`` if the text is not one.

        A text counts as a chat if markers of a template stand in it: special tokens, or ``[INST]``.
        """
        tokenizer, markers = self.tokenizer, set(self.tokenizer.all_special_ids)
        text = str(tokenizer.decode(list(ids)))
        turn = last_user_turn(text)
        if turn is None or not ("[INST]" in text or any(i in markers for i in ids[1:])):
            return None
        start = bisect_left(range(len(ids)), turn[0], key=lambda k: len(str(tokenizer.decode(list(ids[:k])))))
        while start < len(ids) and not str(tokenizer.decode(list(ids[start : start + 1]))).strip():
            start += 1  # the line break that belongs to the marker
        return start, text[slice(*turn)]

    def with_prefix(
        self, ids: Sequence[int], prefix: Prefix | None, model: Any, reserve: int
    ) -> tuple[Sequence[int], list[int]]:
        """Token ids of a row behind its prefix, and where each of the row's own tokens now is.

        The prefix stands behind the leading special tokens (and pictures), in a chat in front of what the user says
        last: outside of its turns a chat model reads nothing.
        """
        if prefix is None:
            return ids, list(range(len(ids)))
        turn = self._last_turn(ids)
        begin = int(bool(ids) and ids[0] == self.tokenizer.bos_token_id) if turn is None else turn[0]
        if image_ids(model).isdisjoint(ids) and shows_pictures(prefix):  # nothing is to be seen
            prefix = replace(prefix, demonstrations=())
        lead = self._behind_specials(ids, begin, image_ids(model), turn is not None)
        limit = context_length(model.config)
        for shown, text in _fronts(prefix):
            front, first = self._join(text, ids[lead:])
            before = [self._shown_ids(demonstration) for demonstration in shown]
            added = sum(len(part) for part in before)
            row = [*ids[:begin], *(i for part in before for i in part), *ids[begin:lead], *front, *first]
            row += ids[lead + len(first) :]
            if limit is None or len(row) + reserve <= limit:
                break
        else:
            new = f" and {reserve} new tokens" if reserve else ""
            raise TargetTooLongError(
                f"the new fact with the prompt{new} takes {len(row) + reserve} tokens, the model's context has {limit}"
            )
        own = [*range(begin), *range(begin + added, lead + added), *range(lead + added + len(front), len(row))]
        if not isinstance(ids, TokenIds):
            return row, own
        if not before:
            return ids.spread(row, own), own
        rest = len(row) - begin - added
        tail = ids.behind(begin).spread(row[-rest:], [place - begin - added for place in own if place >= begin])
        return joined_ids([row[:begin], *before, tail]), own

    def check_room(self, ids: Sequence[int], fact: str, model: Any) -> None:
        """Raise if a fact does not fit in front of a row, whatever else could stand before it is left out.

        Args:
            ids: token ids of the row.
            fact: the text.
            model: that is to read both.

        Raises:
            TargetTooLongError: if both take more tokens than its context has.
        """
        if model.config.is_encoder_decoder:
            self.encoder_rows([ids], [Prefix(fact)], context_length(model.config))
        else:
            self.with_prefix(ids, Prefix(fact), model, 0)

    def encoder_rows(
        self, rows: Sequence[Sequence[int]], prefixes: Sequence[Prefix | None], limit: int | None
    ) -> TokenBatch:
        """Rows behind their prefixes as an encoder reads them: as texts, with the tokenizer's own special tokens.

        Args:
            rows: token ids, each with a prefix.
            prefixes: one for each row.
            limit: tokens that the encoder reads; ``None``: any number.

        Raises:
            TargetTooLongError: if the fact and a row alone take more.
        """
        texts = self.tokenizer.batch_decode([list(ids) for ids in rows], skip_special_tokens=True)
        read: list[Sequence[int]] = []
        for prefix, text in zip(prefixes, texts, strict=True):
            for _, front in _fronts(prefix):
                ids = prompt_ids(self.tokenizer, front + text, encoder_decoder=True)
                if limit is None or len(ids) <= limit:
                    break
            else:
                raise TargetTooLongError(
                    f"the new fact with the prompt takes {len(ids)} tokens, the model's context has {limit}"
                )
            read.append(ids)
        return pad_rows(read, pad_id(self.tokenizer))

    def _behind_specials(self, ids: Sequence[int], start: int, pictures: set[int], in_turn: bool) -> int:
        """Where text begins behind leading special tokens and pictures; in a turn of a chat, behind pictures only."""
        tokenizer, lead = self.tokenizer, start
        leading = set(tokenizer.all_special_ids)
        if not pictures.isdisjoint(ids[start:]):
            added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
            specials = leading | pictures | added
            while lead < len(ids) and (ids[lead] in specials or not str(tokenizer.decode([ids[lead]])).strip()):
                lead += 1  # among blanks: the line break that belongs to the placeholder
            if not pictures.isdisjoint(ids[start:lead]):
                return lead
        if in_turn:
            return start
        return next((n for n in range(start, len(ids)) if ids[n] not in leading), len(ids))

    def _shown_ids(self, text: str) -> Sequence[int]:
        """Token ids of a demonstration with its pictures, without the BOS."""
        ids = encode_text(self.tokenizer, text).ids
        start = int(ids[0] == self.tokenizer.bos_token_id)
        return ids.behind(start) if isinstance(ids, TokenIds) else ids[start:]

    def _join(self, text: str, ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """Tokens of the prefix, and the row's first token as it is written behind it.

        A word behind a space is another token than one at the start of a text. Where that is a single token too, it
        takes the place of the first one; elsewhere the space stays with the prefix.
        """
        tokenizer = self.tokenizer

        def encode(part: str) -> list[int]:
            encoded = encode_text(tokenizer, part)
            return [i for i, special in zip(encoded.ids, encoded.special, strict=True) if not special]

        if not text.endswith(" ") or not ids:
            return encode(text), list(ids[:1])
        word = str(tokenizer.decode(list(ids[:1])))
        stripped, whole = encode(text[:-1]), encode(text + word)
        if whole[: len(stripped)] == stripped and len(whole) == len(stripped) + 1:
            return stripped, whole[-1:]
        return encode(text), list(ids[:1])


def shows_pictures(prefix: Prefix | None) -> bool:
    """Whether demonstrations of a prefix have pictures of their own."""
    return prefix is not None and any(isinstance(text, PicturedText) for text in prefix.demonstrations)


def _fronts(prefix: Prefix | None) -> Iterator[tuple[list[str], str]]:
    """A prefix, and what is left of it where space is short: one demonstration fewer each time.

    Yields:
        Demonstrations that stand in front of the row's pictures, and the text that stands behind them.
    """
    assert prefix is not None
    demonstrations, apart = list(prefix.demonstrations), shows_pictures(prefix)
    while True:
        yield (list(demonstrations), prefix.fact) if apart else ([], "".join(demonstrations) + prefix.fact)
        if not demonstrations:
            return
        demonstrations.pop(0 if prefix.nearest_last else -1)

"""Putting a text in front of what a model reads, unseen by the caller.

While it is attached, a model's ``forward`` and ``generate`` ask a router about every row. A row that it knows a prefix
for is run with the prefix behind its leading special tokens (BOS), by the model itself or by another one; logits,
loss and returned sequences are those of the tokens that the caller gave. Rows without a prefix run as they are, and a
call without any such row is passed on untouched, bit for bit. Nothing else of the model changes, and detaching it
restores the model. An encoder-decoder reads the prefix in its encoder. This module knows no method,
and leaves to `prefixed_rows` where in a row a prefix stands.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast, Seq2SeqLMOutput
from transformers.modeling_utils import slice_logits_to_keep

from ..anatomy.switching import Passable, Switch, switched, uninterrupted
from ..engine.forward import Positions, device_of, image_ids, logits_at, model_inputs, named_arguments
from ..errors import ConfigError, UnsupportedModelError
from ..tokens import TokenBatch, context_length, pad_id, pad_rows
from .call_rows import CallRows, moved, take_rows, wanted_columns
from .prefixed_rows import PrefixWriter, shows_pictures
from .prefixes import Prefix, RowText, reading_behind
from .sites import prompt_ends

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SMALLEST = 1.1920929e-07
"""Added to mixed probabilities before the logarithm."""


class _Looks:
    """What the pictures of a call's rows look like, found when the first is asked for."""

    def __init__(self, find: Callable[[], list[torch.Tensor | None]]):
        self._find: Callable[[], list[torch.Tensor | None]] = cache(find)

    def of(self, row: int) -> torch.Tensor | None:
        return self._find()[row]


Router = Callable[[Sequence[RowText]], Sequence["Prefix | None"]]
_INSIDE: ContextVar[tuple[Prompter, ...]] = ContextVar("kedit_prompters", default=())
"""Whose own calls are under way here: several threads may call one model."""


def _whose(method: Any) -> Prompter | None:
    """The one that took the place of a model's method by this one."""
    one = getattr(getattr(method, "func", None), "__self__", None)
    return one if isinstance(one, Prompter) else None


class Prompter(Passable):
    """Stands between a model and its callers while it is attached.

    Args:
        model: a transformers language model.
        tokenizer: of the model, looked up when it is needed.
        router: prompts (`RowText`) → a prefix for each, or ``None``.
        looks: ``StateReader.looks`` of the model; ``None``: nobody asks what pictures look like.
        asleep: whether calls go to the model as they are now, beside `passing`.
        together: run rows without a prefix in the batch that they came in, so that the other rows' prefixes change no
            bit of theirs; those that have one are then read twice.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Callable[[], PreTrainedTokenizerBase | None],
        router: Router,
        looks: Callable[[dict[str, Any]], list[torch.Tensor | None]] | None = None,
        *,
        asleep: Callable[[], bool] = lambda: False,
        together: bool = False,
    ):
        self.model, self.writer, self.router, self._looks = model, PrefixWriter(tokenizer), router, looks
        self._asleep, self._together = asleep, together
        self._before: dict[str, Any] | None = None  # what the model itself had under these names
        self._plain: dict[str, Any] = {}  # what calls are handed on to

    # ------------------------------------------------------------------ attaching

    @staticmethod
    def all_before(model: PreTrainedModel) -> list[Prompter]:
        """Those that stand before a model, the one that is asked first at the head."""
        found = []
        one = _whose(model.__dict__.get("forward"))
        while one is not None:
            found.append(one)
            one = _whose(one._plain["forward"])
        return found

    def attach(self) -> None:
        """Take the place of the model's ``forward`` and ``generate``."""
        if self._before is not None:
            return
        own = self.model.__dict__
        with uninterrupted():
            self._before = {name: own.get(name) for name in ("forward", "generate")}
            self._plain = {name: getattr(self.model, name) for name in self._before}
            for name, mine in (("forward", self._forward), ("generate", self._generate)):
                # With the model's signature, which a bound method has no place for.
                own[name] = functools.wraps(self._plain[name])(functools.partial(mine))

    def detach(self) -> None:
        """Give the model its own methods back, or those that stood before it to the one that came later."""
        if self._before is None:
            return
        above = next((one for one in self.all_before(self.model) if _whose(one._plain["forward"]) is self), None)
        with uninterrupted():
            if above is not None:
                above._before, above._plain = self._before, dict(self._plain)
            else:
                for name, value in self._before.items():
                    del self.model.__dict__[name]
                    if value is not None:  # another wrapper of the instance (accelerate's hooks)
                        self.model.__dict__[name] = value
            self._before = None  # calls that are under way go on to what they were handed on to

    def own_calls(self) -> Switch[None]:
        """The calls that this thread makes inside the block go to the model as they are."""

        def begin() -> None:
            _INSIDE.set((*_INSIDE.get(), self))

        def end() -> None:
            _INSIDE.set(tuple(known for known in _INSIDE.get() if known is not self))

        return switched(begin, end)

    @property
    def _lets_pass(self) -> bool:
        return self.is_passing or self._asleep() or self in _INSIDE.get()

    # ------------------------------------------------------------------ one forward

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        plain = self._plain["forward"]
        given = named_arguments(type(self.model), args, kwargs)
        rows = None if self._lets_pass else CallRows.read(given)
        if rows is None:
            return plain(*args, **kwargs)
        two_stacks = self.model.config.is_encoder_decoder
        routes = self._routes(rows, None if two_stacks else prompt_ends(self.model, rows.mask, given.get("labels")))
        if not any(routes):
            return plain(*args, **kwargs)
        wanted = [n for n in ("output_hidden_states", "output_attentions") if given.get(n)]
        if wanted:
            raise UnsupportedModelError(
                f"{wanted[0]}: a row that an edit puts a prompt in front of has no states of its own; ask for them"
                " inside disable_edits()"
            )
        output: Any
        if two_stacks:
            with self.own_calls():
                output = self._two_stacks(plain, given, rows, routes)
            return output.to_tuple() if given.get("return_dict") is False else output
        labels, keep = given.get("labels"), given.get("logits_to_keep", 0)
        with self.own_calls():
            columns = wanted_columns(keep if labels is None else 0, rows)
            answers = self._logits(plain, given, rows, routes, columns)
        masked = labels is None and isinstance(keep, torch.Tensor) and keep.dtype == torch.bool
        logits, loss = torch.cat(answers) if masked else torch.stack(answers), None
        if labels is not None:
            loss = self.model.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
            logits = slice_logits_to_keep(logits, keep)
        output = CausalLMOutputWithPast(loss=loss, logits=logits)
        return output.to_tuple() if given.get("return_dict") is False else output

    def _logits(
        self,
        plain: Callable[..., Any],
        given: dict[str, Any],
        rows: CallRows,
        routes: Sequence[Prefix | None],
        wanted: Sequence[Sequence[int]],
    ) -> list[torch.Tensor]:
        """Logits at the wanted columns of each row, ``[columns, vocabulary]``; zero on padding of a replaced row."""
        answers: dict[int, torch.Tensor] = {}
        if rows.pictures:  # belong to all rows together, so that all are run together
            return self._logits_of_pictures(plain, rows, routes, wanted)
        unrouted = [i for i, route in enumerate(routes) if route is None or route.share < 1]
        if unrouted:
            read = self._read_with(unrouted, rows)
            some = {
                k: take_rows(v, read, rows.count) for k, v in given.items() if k not in ("labels", "logits_to_keep")
            }
            some |= {"use_cache": False, "return_dict": True}
            asked = [list(wanted[i]) if i in unrouted else [] for i in read]
            found = logits_at(self.model, some, Positions.of(asked, some["input_ids"]), run=plain)
            answers = dict(zip(read, found.split([len(row) for row in asked]), strict=True))
        for model, group in _by_model(routes).items():
            reader = model or self.model
            prefixed = [self.writer.with_prefix(rows.ids[i], routes[i], reader, 0) for i in group]
            batch = pad_rows([ids for ids, _ in prefixed], pad_id(self.writer.tokenizer)).to(device_of(reader))
            # column of the caller → column behind the prefix, of each row's own tokens
            places = [dict(zip(rows.columns[i], p[1], strict=True)) for i, p in zip(group, prefixed, strict=True)]
            asked = [[where[c] for c in wanted[i] if c in where] for i, where in zip(group, places, strict=True)]
            with reading_behind([routes[i] for i in group]):
                found = logits_at(
                    reader,
                    {**model_inputs(reader, batch), "return_dict": True},
                    Positions.of(asked, batch.input_ids),
                    run=plain if model is None else None,
                ).to(rows.input_ids.device, self.model.dtype)
            for i, where, behind in zip(group, places, found.split([len(row) for row in asked]), strict=True):
                share = routes[i].share  # type: ignore[union-attr]
                at = [k for k, c in enumerate(wanted[i]) if c in where]
                real = torch.tensor(at, dtype=torch.long, device=behind.device)
                before = behind.new_zeros(len(wanted[i]), behind.shape[-1]) if share == 1 else answers[i]
                mixed = behind if share == 1 else _mix(before[real], behind, share)
                answers[i] = before.index_put((real,), mixed)
        return [answers[i] for i in range(rows.count)]

    def _logits_of_pictures(
        self,
        plain: Callable[..., Any],
        rows: CallRows,
        routes: Sequence[Prefix | None],
        wanted: Sequence[Sequence[int]],
    ) -> list[torch.Tensor]:
        """`_logits` of a batch with pictures, each row behind its prefix or none."""
        batch, places = self._behind_pictures(rows, routes, 0, "right")
        asked = [[where[c] for c in columns if c in where] for columns, where in zip(wanted, places, strict=True)]
        inputs = {**rows.with_pictures(self.model, batch), "use_cache": False, "return_dict": True}
        with reading_behind(routes):
            found = logits_at(self.model, inputs, Positions.of(asked, batch.input_ids), run=plain)
        answers = []
        pieces = found.split([len(row) for row in asked])
        for columns, where, behind in zip(wanted, places, pieces, strict=True):
            real = torch.tensor([k for k, c in enumerate(columns) if c in where], dtype=torch.long)
            answer = behind.new_zeros(len(columns), behind.shape[-1])
            answers.append(answer.index_put((real.to(behind.device),), behind))
        return answers

    def _behind_pictures(
        self, rows: CallRows, routes: Sequence[Prefix | None], reserve: int, side: Literal["left", "right"]
    ) -> tuple[TokenBatch, list[dict[int, int]]]:
        """Rows with pictures behind their prefixes, and of each row: column of the caller → column now.

        Raises:
            UnsupportedModelError: if another model is to read a row, which sees nothing.
        """
        if any(route is not None and (route.model is not None or route.share < 1) for route in routes):
            raise UnsupportedModelError(
                "an edit of this method answers by a model of text, and the question has pictures; ask without them,"
                " or inside disable_edits()"
            )
        more = any(shows_pictures(route) for route in routes)
        own = rows.apart(image_ids(self.model)) if more else [rows.row(i) for i in range(rows.count)]
        prefixed = [
            self.writer.with_prefix(ids, route, self.model, reserve) for ids, route in zip(own, routes, strict=True)
        ]
        batch = pad_rows([ids for ids, _ in prefixed], pad_id(self.writer.tokenizer), side).to(rows.input_ids.device)
        starts = batch.starts.tolist()
        return batch, [
            {c: start + k for c, k in zip(columns, own, strict=True)}
            for columns, (_, own), start in zip(rows.columns, prefixed, starts, strict=True)
        ]

    def _two_stacks(
        self, plain: Callable[..., Any], given: dict[str, Any], rows: CallRows, routes: Sequence[Prefix | None]
    ) -> Seq2SeqLMOutput:
        """An encoder-decoder's answer: rows with a prefix are encoded behind it, the decoder reads what was given."""
        labels, decoder = given.get("labels"), given.get("decoder_input_ids")
        if decoder is None and labels is not None:
            decoder = self.model.prepare_decoder_input_ids_from_labels(labels)  # type: ignore[operator]
        if decoder is None:
            raise ConfigError("an encoder-decoder needs decoder_input_ids or labels")
        given = {**given, "decoder_input_ids": decoder, "use_cache": False, "return_dict": True}
        given.pop("labels", None)
        unrouted = [i for i, route in enumerate(routes) if route is None or route.share < 1]
        found: dict[int, torch.Tensor] = {}
        if unrouted:
            found = dict(
                zip(
                    unrouted,
                    plain(**{k: take_rows(v, unrouted, rows.count) for k, v in given.items()}).logits,
                    strict=True,
                )
            )
        for model, group in _by_model(routes).items():
            batch = self._encoder_rows(rows, routes, group, model or self.model)
            read = {k: take_rows(v, group, rows.count) for k, v in given.items()}
            read |= {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
            read = moved(read, device_of(model or self.model))
            with reading_behind([routes[i] for i in group]):
                logits = (plain if model is None else model)(**read).logits
            logits = logits.to(rows.input_ids.device, self.model.dtype)
            for i, answer in zip(group, logits, strict=True):
                share = routes[i].share  # type: ignore[union-attr]
                found[i] = answer if share == 1 else _mix(found[i], answer, share)
        merged = torch.stack([found[i] for i in range(rows.count)])
        loss = None if labels is None else torch.nn.functional.cross_entropy(merged.flatten(0, 1), labels.flatten())
        return Seq2SeqLMOutput(loss=loss, logits=merged)

    def _encoder_rows(
        self, rows: CallRows, routes: Sequence[Prefix | None], group: Sequence[int], reader: Any
    ) -> TokenBatch:
        """Some rows behind their prefixes, for the encoder of the model that reads them."""
        ids, prefixes = [rows.ids[i] for i in group], [routes[i] for i in group]
        return self.writer.encoder_rows(ids, prefixes, context_length(reader.config))

    # ------------------------------------------------------------------ generation

    def _generate(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        plain = self._plain["generate"]
        given = dict(kwargs)
        if inputs is not None:
            given["input_ids"] = inputs
        rows = None if self._lets_pass else CallRows.read(given)
        routes = self._routes(rows, None) if rows is not None else []
        with self.own_calls():
            if rows is None or not any(routes):
                return plain(*(() if inputs is None else (inputs,)), *args, **kwargs)
            if args:
                raise ConfigError("give the arguments of generate by keyword")
            return self._generate_groups(plain, given, rows, routes)

    def _generate_groups(
        self, plain: Callable[..., Any], given: dict[str, Any], rows: CallRows, routes: Sequence[Prefix | None]
    ) -> Any:
        if any(route is not None and route.share < 1 for route in routes):
            raise UnsupportedModelError(
                "soft routing mixes the answers of two models token by token; generate needs hard"
            )
        if rows.pictures:
            return self._generate_prefixed(plain, given, rows, routes, None, list(range(rows.count)))
        groups: list[tuple[list[int], Any]] = []
        plain_rows = [i for i, route in enumerate(routes) if route is None]
        if plain_rows:
            read = self._read_with(plain_rows, rows)
            found = plain(**{k: take_rows(v, read, rows.count) for k, v in given.items()})
            if len(read) > len(plain_rows) and isinstance(found, torch.Tensor):
                found = found[_expanded(plain_rows, found.shape[0] // rows.count)]
            groups.append((plain_rows, found))
        for model, group in _by_model(routes).items():
            groups.append((group, self._generate_prefixed(plain, given, rows, routes, model, group)))
        if len(groups) == 1:
            return groups[0][1]
        if not all(isinstance(found, torch.Tensor) for _, found in groups):
            raise ConfigError(
                "return_dict_in_generate: the rows of this batch are answered in separate runs; generate them apart,"
                " or ask for the sequences only"
            )
        width = max(found.shape[1] for _, found in groups)
        each = groups[0][1].shape[0] // len(groups[0][0])
        merged = groups[0][1].new_full((rows.count * each, width), pad_id(self.writer.tokenizer))
        for group, found in groups:
            merged[_expanded(group, each), : found.shape[1]] = found.to(merged.device)
        return merged

    def _generate_prefixed(
        self,
        plain: Callable[..., Any],
        given: dict[str, Any],
        rows: CallRows,
        routes: Sequence[Prefix | None],
        model: Any | None,
        group: list[int],
    ) -> Any:
        """Run rows with their prefixes, left-padded, and return them with the caller's tokens in front."""
        who = model or self.model
        kwargs = {k: take_rows(v, group, rows.count) for k, v in given.items()}
        if who.config.is_encoder_decoder:
            batch = self._encoder_rows(rows, routes, group, model or self.model)
            kwargs |= {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
            kwargs = moved(kwargs, device_of(who))
            with reading_behind([routes[i] for i in group]):
                return plain(**kwargs) if model is None else model.generate(**kwargs)
        settings = given.get("generation_config") or who.generation_config
        new = given.get("max_new_tokens") or getattr(settings, "max_new_tokens", None) or 0
        if rows.pictures:
            batch, _ = self._behind_pictures(rows, routes, new, "left")
            kwargs |= rows.with_pictures(self.model, batch)
        else:
            prefixed = [self.writer.with_prefix(rows.ids[i], routes[i], who, new)[0] for i in group]
            batch = pad_rows(prefixed, pad_id(self.writer.tokenizer), side="left")
            kwargs |= {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        for name in ("position_ids", "cache_position", "past_key_values"):
            kwargs.pop(name, None)
        added = batch.input_ids.shape[1] - rows.width
        for name in ("max_length", "min_length"):  # they count what the caller gave, not what stands in front of it
            value = given.get(name) or getattr(settings, name, None)
            if value and not new:
                kwargs[name] = value + added
        kwargs = moved(kwargs, device_of(who))
        with reading_behind([routes[i] for i in group]):
            found = plain(**kwargs) if model is None else model.generate(**kwargs)
        sequences = found if isinstance(found, torch.Tensor) else found.sequences
        fresh = sequences[:, batch.input_ids.shape[1] :]
        each = sequences.shape[0] // len(group)
        shown = rows.input_ids[group].repeat_interleave(each, dim=0).to(fresh.device)
        shown = torch.cat([shown, fresh], dim=1)
        if isinstance(found, torch.Tensor):
            return shown
        found.sequences = shown
        found.past_key_values = None
        return found

    def _read_with(self, wanted: list[int], rows: CallRows) -> list[int]:
        """The rows that are run so that some of them, which have no prefix, are answered."""
        return list(range(rows.count)) if self._together else wanted

    # ------------------------------------------------------------------ routes

    def _routes(self, rows: CallRows, ends: torch.Tensor | None) -> Sequence[Prefix | None]:
        last = [rows.width] * rows.count if ends is None else ends.tolist()
        texts = []
        for ids, columns, end in zip(rows.ids, rows.columns, last, strict=True):
            count = sum(column <= end for column in columns)
            texts.append(RowText.of(self.writer.said_in(ids[:count]), ids[:count]))
        if rows.pictures and self._looks is not None:
            found = _Looks(partial(self._looks, rows.inputs()))
            texts = [RowText.of(text, text.ids, partial(found.of, i)) for i, text in enumerate(texts)]
        return self.router(texts)


def _expanded(rows: Sequence[int], each: int) -> list[int]:
    """Places of some rows where every row has become several, which stand together."""
    return [i * each + n for i in rows for n in range(each)]


def _by_model(routes: Sequence[Prefix | None]) -> dict[Any, list[int]]:
    """Rows with a prefix by the model that reads them."""
    groups: dict[Any, list[int]] = {}
    for i, route in enumerate(routes):
        if route is not None:
            groups.setdefault(route.model, []).append(i)
    return groups


def _mix(own: torch.Tensor, other: torch.Tensor, share: float) -> torch.Tensor:
    """``log((1 − s) p_own + s p_other)``."""
    mixed = (1 - share) * own.float().softmax(-1) + share * other.float().softmax(-1)
    return (mixed + _SMALLEST).log().to(own.dtype)

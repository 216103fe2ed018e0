"""Running a model again from the middle: from cached hidden states and prefix keys/values, not from the tokens.

The optimisation of a value reads the same rows dozens of times, and only columns from the fact token on, in the
layers above the edited one, ever change. One pass without gradients keeps the hidden state at the cut and the
keys/values of the columns before; afterwards the blocks below the cut are passed through and the model's own
code does the rest. Logits and gradients are those of a full forward.

Whether that holds for a model is not assumed but checked, once per model and layer: the replayed logits must
equal the full ones. If they do not (recurrent state, an unusual cache), more of the model is run: all columns of the
layers above the cut, or all of everything; the user is told once of the latter. So nothing that goes wrong while a
model is prepared for replaying reaches the user, as long as its plain forward works.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import torch
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from ..anatomy.outputs import hooks
from ..anatomy.switching import Switch, switched
from ..logging import get_logger, warn_once
from ..tokens import TokenBatch, pad_rows
from .capture import Tap, as_rows, listen, rewritten, with_first
from .forward import Positions, accepts, device_of, gather_logits, logits_at, model_inputs
from .weights import get_module

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..anatomy import Anatomy

logger = get_logger(__name__)
Route = Literal["prefix", "layers", "full"]
_SLOWER: dict[Route, Route] = {"prefix": "layers", "layers": "full"}
_ROUTES: WeakKeyDictionary[torch.nn.Module, dict[tuple[Any, ...], Route]] = WeakKeyDictionary()
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4}


def nearly_equal(model: torch.nn.Module, found: torch.Tensor, expected: torch.Tensor, share: float = 1.0) -> bool:
    """Whether a short cut gives what the full forward gives, but for rounding in the model's dtype.

    Args:
        model: that computed both.
        found: by the short cut.
        expected: of the same shape.
        share: of the tolerance that is allowed.

    Returns:
        ``max |found − expected| ≤ share · tolerance · max(max |expected|, 1)``; never where one of them is NaN.
    """
    tolerance = share * _TOLERANCE.get(next(model.parameters()).dtype, 6e-2)
    exact = expected.to(torch.promote_types(expected.dtype, torch.float32))
    off, scale = float((found - exact).abs().max()), max(float(exact.abs().max()), 1.0)
    if off <= tolerance * scale:
        return True
    logger.debug("%s: a short cut is off by %.2e", type(model).__name__, off)
    return False


class _PrefixLayer(DynamicLayer):
    """Keys and values of the columns before the window: read, joined with the new ones, never stored into."""

    def __init__(self, keys: torch.Tensor | None, values: torch.Tensor | None, length: int):
        super().__init__()
        self.keys, self.values, self._length = keys, values, length
        self.is_initialized = True
        if keys is not None:
            self.dtype, self.device = keys.dtype, keys.device

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return prefix and new states joined; the layer itself stays as it is."""
        if self.keys is None or self.values is None or self._length == 0:
            return key_states, value_states
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)

    def get_seq_length(self) -> int:
        """Length of the prefix, also for layers that keep nothing: masks are built from it."""
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the joined states."""
        return self._length + query_length, 0


def _recording_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache of the model's own kinds of layers, in which attention keeps the states of every column.

    Made from the config, because hybrid models need to find a layer with a recurrent or convolution state where they
    have one. A layer with a sliding window would drop the early columns; what it may look at is the mask's business.
    """
    cache = DynamicCache(config=model.config)
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, DynamicSlidingWindowLayer) and not isinstance(layer, LinearAttentionCacheLayerMixin):
            cache.layers[i] = DynamicLayer()
    return cache


def _is_recurrent(layers: Sequence[Any]) -> bool:
    """Whether one of these layers of a filled cache holds a state that sums up all columns.

    It is known behind the last column only, not in front of the window; a model whose layers above the cut have one
    is restarted with all columns. Not left to the comparison of logits: a state may have decayed on the rows that are
    compared, and matter on the next ones.
    """
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)


@dataclass(frozen=True)
class ReplayRow:
    """One row to replay: token ids, the column of the fact token, and the indices whose logits are wanted.

    ``shifts`` are vectors ``[d]`` that stay added, at the only site, to tokens before the fact token.
    """

    ids: tuple[int, ...]
    fact: int
    positions: tuple[int, ...]
    shifts: tuple[tuple[int, torch.Tensor], ...] = field(default=(), compare=False)


class Replay:
    """Rows of a model, prepared to be run again from one layer on with vectors added at the fact tokens.

    Args:
        model: in evaluation mode, without weight gradients.
        anatomy: of the model.
        rows: the sequences.
        layer: index of the layer at which the vectors enter.
        sites: modules whose output receives a vector. If the only site is the block itself, or a projection whose
            output is known to reach the block's output unchanged, the model restarts behind the block; otherwise at
            its input, with the real module hooked.
        taps: what else to record at the fact tokens in the first pass.
        fill: id used for padding.
        route: force a route; ``None`` takes the fastest one that was checked to be exact.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        anatomy: Anatomy,
        rows: Sequence[ReplayRow],
        layer: int,
        sites: Sequence[str],
        taps: Sequence[Tap] = (),
        *,
        fill: int = 0,
        route: Route | None = None,
    ):
        self.model, self.anatomy, self.layer, self.sites = model, anatomy, layer, tuple(sites)
        device = device_of(model)
        width = max(len(r.ids) for r in rows)
        self.batch: TokenBatch = pad_rows([r.ids for r in rows], fill, side="left").to(device)
        shift = [width - len(r.ids) for r in rows]
        facts = [r.fact + s for r, s in zip(rows, shift, strict=True)]
        self.facts = torch.tensor(facts, device=device)
        self._wanted = [[p + s for p in r.positions] for r, s in zip(rows, shift, strict=True)]
        self._positions: dict[int, Positions] = {}
        block = anatomy.layers[layer].path
        additive = anatomy.additive is not None and anatomy.additive[layer]
        down = anatomy.layers[layer].down
        unchanged = {block} | ({down.path} if additive and down is not None else set())
        self.behind = len(self.sites) == 1 and self.sites[0] in unchanged
        self.start = min(facts)
        self._shifts = [(i, c + shift[i], v) for i, row in enumerate(rows) for c, v in row.shifts]
        if self._shifts and self.sites != (block,):
            raise ValueError("what stays added is added at a block, and at no other site beside it")
        self._position_ids: torch.Tensor = model_inputs(model, self.batch).get("position_ids", self.batch.position_ids)
        self._hidden: torch.Tensor | None = None
        self._prefix: list[tuple[torch.Tensor, torch.Tensor] | None] = []
        self._tuples: dict[int, Any] = {}
        self.route: Route = route or self._hoped_route()
        self.taken: dict[Tap, torch.Tensor] = {}
        wanted = list(dict.fromkeys([*taps, *(Tap(s) for s in self.sites)]))
        self.base_logits = self._prefill(wanted) if route else self._prefill_somehow(wanted)
        if route is None and self._verified().get(self._route_key()) != self.route:
            self._verify()

    # ------------------------------------------------------------------ public

    def logits(self, offsets: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Logits at the wanted positions with ``offsets[site]`` ``[rows, d]`` added at each row's fact token.

        Returns:
            ``[positions, vocab]`` fp32, in the order of the rows and their positions; differentiable in the offsets.
        """
        if self.route == "full":
            with self._shifted(), added_at(self.model, self.sites, offsets, self.facts, self.facts.shape[0]):
                return gather_logits(self.model, self.batch, self.positions()).float()
        start = self.start if self.route == "prefix" else 0
        kwargs = self._suffix_inputs(start)
        rows = self.facts.shape[0]
        entering = None if self._hidden is None else self._hidden[:, start:]
        if self.behind:
            assert entering is not None
            index = torch.arange(rows, device=entering.device)
            change = offsets[self.sites[0]].to(entering)
            entering = entering.index_put((index, self.facts.to(index.device) - start), change, accumulate=True)
            with passed_through(self.model, self.anatomy, self.layer, entering, self._tuples):
                return logits_at(self.model, kwargs, self.positions(start)).float()
        with (
            passed_through(self.model, self.anatomy, self.layer - 1, entering, self._tuples),
            added_at(self.model, self.sites, offsets, self.facts - start, rows),
        ):
            return logits_at(self.model, kwargs, self.positions(start)).float()

    def select(self, keep: torch.Tensor) -> torch.Tensor:
        """Drop rows for good (finished requests).

        Args:
            keep: ``[rows]`` bool.

        Returns:
            ``[positions]`` bool: which logits remain.
        """
        keep = keep.to(self.facts.device)
        place = {row: k for k, row in enumerate(keep.nonzero().flatten().tolist())}
        self._shifts = [(place[row], column, vector) for row, column, vector in self._shifts if row in place]
        kept_positions = keep[self.positions().rows]
        self._wanted = [row for row, kept in zip(self._wanted, keep.tolist(), strict=True) if kept]
        self._positions = {}
        self.facts, self.batch = self.facts[keep], self.batch.select(keep)
        self._position_ids = self._position_ids[..., keep, :]
        if self._hidden is not None:
            self._hidden = self._hidden[keep.to(self._hidden.device)]
        self._prefix = [
            None if kv is None else (kv[0][keep.to(kv[0].device)], kv[1][keep.to(kv[1].device)]) for kv in self._prefix
        ]
        return kept_positions

    def positions(self, start: int = 0) -> Positions:
        """The wanted positions in a window from column ``start`` on; laid out once."""
        if start not in self._positions:
            shifted = [[column - start for column in row] for row in self._wanted]
            self._positions[start] = Positions.of(shifted, self.batch.input_ids[:, start:])
        return self._positions[start]

    # ------------------------------------------------------------------ first pass

    def _prefill_somehow(self, taps: list[Tap]) -> torch.Tensor:
        """`_prefill` by the fastest route on which the model runs; raises what its plain forward raises."""
        while True:
            try:
                return self._prefill(taps)
            except torch.OutOfMemoryError:  # fewer rows will do
                raise
            except Exception as error:
                if self.route == "full":
                    raise
                logger.debug("%s: no %s route: %r", type(self.model).__name__, self.route, error)
                self.route = _SLOWER[self.route]

    def _prefill(self, taps: list[Tap]) -> torch.Tensor:
        """Run the rows once, keep what replaying needs, and return the logits at the wanted positions (fp32)."""
        model, rows = self.model, self.facts.shape[0]
        cut = None
        if self.route != "full" and (self.behind or self.layer > 0):
            cut = Tap(self.anatomy.layers[self.layer if self.behind else self.layer - 1].path)

        def receive(tap: Tap, tensor: torch.Tensor) -> None:
            states = as_rows(tensor, rows)
            if tap == cut:
                self._hidden = states.clone()
            if tap in taps:
                index = torch.arange(rows, device=states.device)
                self.taken[tap] = states[index, self.facts.to(states.device)].float().clone()

        kwargs = model_inputs(model, self.batch)
        cache = _recording_cache(model) if self.route == "prefix" else None
        if cache is not None:
            kwargs.update(use_cache=True, past_key_values=cache)
        listening = listen(model, [*taps, *([cut] if cut else [])], receive)
        # What stays added is there before anyone listens, so that it is in the states at the cut and in all above.
        with torch.no_grad(), self._shifted(), listening, self._structures(cut):
            logits = logits_at(model, kwargs, self.positions()).float()
        if cache is not None:
            lowest = self.layer + 1 if self.behind else self.layer
            if _is_recurrent(cache.layers[lowest:]):
                self.route = "layers"
                return logits
            self._prefix = [
                self._before_window(entry) if i >= lowest else None for i, entry in enumerate(cache.layers)
            ]
        return logits

    def _shifted(self) -> Switch[None]:
        """What stays added, in a forward over all columns."""
        if not self._shifts:
            return hooks()
        rows, columns = (torch.tensor(index) for index in list(zip(*self._shifts, strict=True))[:2])
        vectors = torch.stack([vector for *_, vector in self._shifts])

        def add(flat: torch.Tensor) -> torch.Tensor:
            states = as_rows(flat, self.facts.shape[0])
            index = (rows.to(states.device), columns.to(states.device))
            return states.index_put(index, vectors.to(states), accumulate=True).view(flat.shape)

        return rewritten(self.model, {Tap(self.sites[0]): add})

    def _before_window(self, entry: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Keys and values of the columns before the first fact token, ``[rows, heads, start, d]`` each."""
        if getattr(entry, "keys", None) is None:
            return None
        return entry.keys[:, :, : self.start].clone(), entry.values[:, :, : self.start].clone()

    def _structures(self, cut: Tap | None) -> Switch[None]:
        """Remember how each block below the cut returns its output (tensor or tuple)."""
        count = 0 if cut is None else self.layer + self.behind
        return recorded_structures(self.model, self.anatomy, count, self._tuples)

    # ------------------------------------------------------------------ later passes

    def _suffix_inputs(self, start: int) -> dict[str, Any]:
        batch = self.batch
        kwargs: dict[str, Any] = {"input_ids": batch.input_ids[:, start:], "attention_mask": batch.attention_mask}
        if accepts(self.model, "position_ids"):
            kwargs["position_ids"] = self._position_ids[..., start:]
        if self.route == "prefix":
            kept = [
                _PrefixLayer(None, None, start) if kv is None else _PrefixLayer(kv[0], kv[1], start)
                for kv in self._prefix
            ]
            kwargs.update(past_key_values=Cache(layers=list(kept)), use_cache=True)
        elif accepts(self.model, "use_cache"):
            kwargs["use_cache"] = False
        return kwargs

    # ------------------------------------------------------------------ checking

    def _route_key(self) -> tuple[Any, ...]:
        # Without a column before the window a comparison says nothing of prefixes, nor does a window with one column
        # of a prompt that is read in both directions of one with several.
        pictured, ahead = bool(self.batch.beside), 0
        for row, first in zip(self.batch.beside, self.batch.starts.tolist(), strict=False):
            if "token_type_ids" in row:
                ahead = max(ahead, int((row["token_type_ids"][0, max(self.start - first, 0) :] == 0).sum()))
        return (self.layer, self.behind, self.start > 0, pictured, ahead > 1, str(next(self.model.parameters()).dtype))

    def _verified(self) -> dict[tuple[Any, ...], Route]:
        return _ROUTES.setdefault(self.model, {})

    def _hoped_route(self) -> Route:
        """The route that is known to be exact, else the fastest one that there may be."""
        known = self._verified().get(self._route_key())
        if known is not None:
            return known
        if not _restartable(self.model, self.anatomy):
            return "full"
        return "prefix" if self.start > 0 else "layers"

    def _verify(self) -> None:
        """Compare a replay without offsets with the first pass; fall back step by step where they differ."""
        hoped = self._hoped_route()
        zero = {s: torch.zeros(self.taken[Tap(s)].shape, device=self.taken[Tap(s)].device) for s in self.sites}
        while self.route != "full":
            try:
                with torch.no_grad():
                    found = self.logits(zero)
                if nearly_equal(self.model, found, self.base_logits):
                    break
                logger.debug("%s: the %s route gives other numbers", type(self.model).__name__, self.route)
            except torch.OutOfMemoryError:  # says nothing about the route
                raise
            except Exception as error:
                logger.debug("%s: no %s route: %r", type(self.model).__name__, self.route, error)
            self.route = _SLOWER[self.route]
        self._verified()[self._route_key()] = self.route
        if self.route == "full" and hoped != "full":
            warn_once(
                logger,
                f"{type(self.model).__name__} cannot be restarted from a middle layer; edits use full forwards"
                " (same result, slower)",
            )


class LastColumn:
    """Texts whose last column alone is run again, from any layer on: what attribution methods do thousands of times.

    One pass over the texts keeps the keys and values of all columns but the last, and what enters each block there.
    As in `Replay`, whether that is exact is checked once per model and layer; where it is not, or where the model
    cannot be restarted at all, whole texts are run.

    Args:
        model: in evaluation mode, without weight gradients.
        anatomy: of the model; ``None``: always run whole texts.
        texts: token ids.
        fill: padding id.
    """

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy | None, texts: Sequence[Sequence[int]], fill: int = 0):
        self.model, self.anatomy = model, anatomy
        self.batch = pad_rows(texts, fill, side="left").to(device_of(model))
        self.width = self.batch.input_ids.shape[1]
        self._cache: list[Any] = []
        self._structures: dict[int, Any] = {}
        self._entering: dict[int, torch.Tensor] = {}
        self._logits: torch.Tensor | None = None
        self._positions: dict[tuple[int, int], Positions] = {}
        if anatomy is not None and _restartable(model, anatomy):
            self._prefill(anatomy)

    def _prefill(self, anatomy: Anatomy) -> None:
        count, depth = self.batch.input_ids.shape[0], anatomy.num_layers
        number = {Tap(anatomy.layers[i].path, "input"): i for i in range(depth)}

        def receive(tap: Tap, tensor: torch.Tensor) -> None:
            self._entering[number[tap]] = tensor[:, -1:].clone()

        last = self._last(count, self.width)
        try:
            cache = _recording_cache(self.model)
            recorded = recorded_structures(self.model, anatomy, depth, self._structures)
            with torch.no_grad(), listen(self.model, list(number), receive), recorded:
                logits = gather_logits(self.model, self.batch, last, use_cache=True, past_key_values=cache)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whole texts are run, which either works or raises the same
            logger.debug("%s keeps no last column: %r", type(self.model).__name__, error)
            return
        self._cache, self._logits = list(cache.layers), logits

    def columns(self, layer: int, picked: torch.Tensor) -> torch.Tensor:
        """In which column the last token of each row is, if `logits` runs these texts; ``[rows]``."""
        return torch.full_like(picked, 0 if self._restartable(layer) else self.width - 1)

    def logits(self, layer: int, picked: torch.Tensor) -> torch.Tensor:
        """Logits at the last column, ``[rows, vocab]``, with hooks on modules from block ``layer`` on in effect.

        Args:
            layer: nothing below it is hooked.
            picked: ``[rows]``: which text each row runs.
        """
        return self._run(layer, picked) if self._restartable(layer) else self._whole(picked)

    def _whole(self, picked: torch.Tensor) -> torch.Tensor:
        return gather_logits(self.model, self.batch.select(picked), self._last(len(picked), self.width))

    def _last(self, rows: int, width: int) -> Positions:
        """The last column of so many rows of a width; laid out once."""
        if (rows, width) not in self._positions:
            self._positions[rows, width] = Positions.of([[width - 1]] * rows, self.batch.input_ids[:, :width])
        return self._positions[rows, width]

    def _run(self, layer: int, picked: torch.Tensor) -> torch.Tensor:
        assert self.anatomy is not None
        before, batch = self.width - 1, self.batch
        kept: list[Any] = []
        for i, entry in enumerate(self._cache):
            if i < layer or getattr(entry, "keys", None) is None:
                kept.append(_PrefixLayer(None, None, before))
                continue
            here = picked.to(entry.keys.device)
            kept.append(_PrefixLayer(entry.keys[here][:, :, :before], entry.values[here][:, :, :before], before))
        kwargs: dict[str, Any] = {
            "input_ids": batch.input_ids[picked, -1:],
            "attention_mask": batch.attention_mask[picked],
            "past_key_values": Cache(layers=kept),
            "use_cache": True,
        }
        if accepts(self.model, "position_ids"):
            kwargs["position_ids"] = batch.position_ids[picked, -1:]
        entering = self._entering[layer][picked.to(self._entering[layer].device)]
        with passed_through(self.model, self.anatomy, layer - 1, entering, self._structures):
            return logits_at(self.model, kwargs, self._last(len(picked), 1))

    def _restartable(self, layer: int) -> bool:
        if self._logits is None or layer not in self._entering:
            return False
        if _is_recurrent(self._cache[layer:]):
            return False
        known, key = _ROUTES.setdefault(self.model, {}), ("last column", layer, self.width > 1)
        if key not in known:
            everything = torch.arange(self._logits.shape[0], device=self.batch.input_ids.device)
            try:
                with torch.no_grad():
                    exact = nearly_equal(self.model, self._run(layer, everything), self._logits)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                logger.debug("%s: the last column does not run alone: %r", type(self.model).__name__, error)
                exact = False
            known[key] = "prefix" if exact else "full"
        return known[key] == "prefix"


def _restartable(model: PreTrainedModel, anatomy: Anatomy) -> bool:
    """Whether a restart in the middle is worth trying: one stack, one stream, a cache that can be given."""
    one = not anatomy.is_encoder_decoder and anatomy.one_stream is not False
    return one and accepts(model, "past_key_values")


def added_at(
    model: torch.nn.Module,
    sites: Sequence[str],
    offsets: Mapping[str, torch.Tensor],
    columns: torch.Tensor,
    rows: int,
) -> Switch[None]:
    """Add ``offsets[site]`` to the output of each site at ``(row, columns[row])``, out of place."""

    def adding(site: str) -> Callable[[torch.Tensor], torch.Tensor]:
        def add(flat: torch.Tensor) -> torch.Tensor:
            states = as_rows(flat, rows)
            index = torch.arange(rows, device=states.device)
            change = offsets[site].to(states)
            changed = states.index_put((index, columns.to(states.device)), change, accumulate=True)
            return changed.view(flat.shape)

        return add

    return rewritten(model, {Tap(site): adding(site) for site in sites})


def recorded_structures(
    model: torch.nn.Module, anatomy: Anatomy, count: int, structures: dict[int, Any]
) -> Switch[None]:
    """Note how each of the first ``count`` blocks returns its output: a tuple's other parts, ``None`` for a tensor."""

    def noting(i: int) -> Callable[..., None]:
        def after(_: Any, __: Any, output: Any) -> None:
            structures[i] = with_first(output, torch.empty(0)) if not torch.is_tensor(output) else None

        return after

    blocks = [get_module(model, anatomy.layers[i].path) for i in range(count)]
    return hooks(*(partial(block.register_forward_hook, noting(i)) for i, block in enumerate(blocks)))


def passed_through(
    model: torch.nn.Module, anatomy: Anatomy, last: int, entering: torch.Tensor | None, structures: Mapping[int, Any]
) -> Switch[None]:
    """Let blocks ``0 … last`` return at once, in the recorded form of output; the last one returns ``entering``.

    ``entering`` may be ``None`` where ``last`` is -1: nothing is passed through.
    """
    blocks = [get_module(model, anatomy.layers[i].path) for i in range(last + 1)]
    own = [block.__dict__.get("forward") for block in blocks]  # accelerate puts one there

    def passing(i: int) -> Callable[..., Any]:
        shape = structures.get(i)

        def forward(hidden_states: Any = None, *args: Any, **kwargs: Any) -> Any:
            state: Any = entering if i == last else hidden_states
            return state if shape is None else with_first(shape, state)

        return forward

    def change() -> None:
        for i, block in enumerate(blocks):
            block.__dict__["forward"] = passing(i)

    def put_back() -> None:
        for block, previous in zip(blocks, own, strict=True):
            if previous is None:
                block.__dict__.pop("forward", None)
            else:
                block.__dict__["forward"] = previous

    return switched(change, put_back)

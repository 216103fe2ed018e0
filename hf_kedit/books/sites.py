"""Sites: named submodules of a stock model that are wrapped in place.

A site function sees every forward of its module, with the layer's input, its own output and a `Frame` that says
where the prompts of the rows end, and may return another output. Nothing in the model is replaced: the wrapping is
a forward hook, it leaves no trace in ``state_dict`` or in the module tree, and detaching it restores the model.

Methods that route by a prompt (GRACE, MELO, WISE …) decide at the *key token*, the last token of each row's prompt.
Which one that is depends on the call, never on state that an earlier call left behind:

    model.generate(…)                    the last token of what was given to ``generate``, at every step
    with prompt_lengths(model, [5, 7]):  what the caller says (scoring a target behind a prompt)
    model(…, labels=…)                   the token before the first label, where labels mask the prompt
    model(…)                             the last token that is not padding

With a key/value cache only the call that holds the key token can decide; `Frame.held` carries the decision to the
calls that continue from the same cache. This module knows no method.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import nn
from transformers.cache_utils import Cache

from ..anatomy.outputs import module_input
from ..anatomy.switching import Switch, switched, uninterrupted
from ..engine.capture import as_rows, first, with_first
from ..engine.forward import named_arguments
from ..engine.weights import get_module
from ..errors import ConfigError
from ..logging import get_logger, warn_once
from .beside import forget_graphs, tell_hooks_apart

logger = get_logger(__name__)
_IGNORED = -100


@dataclass
class Frame:
    """One call of the model, as its sites see it.

    Args:
        rows: rows of this call; ``generate`` has expanded them for beams and returned sequences.
        width: positions of this call.
        past: positions before it, in the cache.
        phase: ``"prompt"``: the key token of every row is in this call; ``"chunk"``: the prompt goes on in a later
            call; ``"decode"``: the prompt was in an earlier one, nothing is decided here.
        mask: ``[rows, width]`` bool, real tokens.
        key_columns: ``[rows]`` int64, column of the key token; meaningful in the phase ``"prompt"`` only.
        held: decisions of this sequence. A site that decides in the phase ``"prompt"`` leaves its decision here, under
            its own name; calls that continue from the same cache find it. Empty at the start of a sequence.
        ids: token ids of this call, ``[rows, width]``; ``None`` where it was given embeddings, or is not known.
    """

    rows: int
    width: int
    past: int
    phase: Literal["prompt", "chunk", "decode"]
    mask: torch.Tensor
    key_columns: torch.Tensor
    held: dict[str, Any] = field(default_factory=dict)
    ids: torch.Tensor | None = None

    @cached_property
    def prompt_mask(self) -> torch.Tensor:
        """``[rows, width]`` bool: the real tokens up to the key token, inclusive."""
        columns = torch.arange(self.width, device=self.mask.device)
        return self.mask & (columns <= self.key_columns.to(self.mask.device)[:, None])

    @classmethod
    def plain(cls, rows: int, width: int, device: torch.device) -> Frame:
        """For calls of inner modules, of which nothing is known: whole sequences without padding."""
        mask = torch.ones(rows, width, dtype=torch.bool, device=device)
        return cls(rows, width, 0, "prompt", mask, torch.full((rows,), width - 1, device=device))


@dataclass(frozen=True)
class SiteCall:
    """One forward of a wrapped module.

    Args:
        path: name of the module.
        module: the module.
        inputs: its input, ``[rows, width, d_in]``.
        output: its output under the site functions before this one, ``[rows, width, d_out]``.
        frame: the call of the model that this is part of.
    """

    path: str
    module: nn.Module
    inputs: torch.Tensor
    output: torch.Tensor
    frame: Frame

    def at_key(self, states: torch.Tensor) -> torch.Tensor:
        """The states ``[rows, width, d]`` at the key tokens, ``[rows, d]``."""
        columns = self.frame.key_columns.to(states.device)
        return states[torch.arange(columns.shape[0], device=states.device), columns]


SiteFunction = Callable[[SiteCall], torch.Tensor | None]
"""Returns the new output ``[rows, width, d_out]``, or ``None`` to leave the output as it is."""

Decider = Callable[[Frame], None]
"""Looks at a call before the model runs it, and leaves what it decides in `Frame.held`."""


# ---------------------------------------------------------------------- where prompts end


@dataclass(frozen=True)
class _Prompts:
    """What the caller said of the prompts of a model's calls: lengths per row, or the padded width in ``generate``."""

    model: nn.Module
    lengths: tuple[int, ...] | None = None
    width: int | None = None
    mask: torch.Tensor | None = None


_PROMPTS: ContextVar[tuple[_Prompts, ...]] = ContextVar("kedit_prompts", default=())
_FRAMES: ContextVar[tuple[tuple[nn.Module, Frame], ...]] = ContextVar("kedit_frames", default=())


def _prompts(prompts: _Prompts) -> Switch[None]:
    def said() -> None:
        _PROMPTS.set((*_PROMPTS.get(), prompts))

    def unsaid() -> None:
        _PROMPTS.set(tuple(known for known in _PROMPTS.get() if known is not prompts))

    return switched(said, unsaid)


def prompt_lengths(model: nn.Module, lengths: Sequence[int]) -> Switch[None]:
    """Say how many tokens of each row of the calls inside the block are its prompt; the rest is a continuation.

    Methods that route by prompts need it wherever a target stands behind the prompt (scoring, training). Without
    such edits in the model it has no effect.

    Args:
        model: the stock model that is called.
        lengths: per row, number of real tokens of its prompt, BOS included, padding not.
    """
    return _prompts(_Prompts(model, lengths=tuple(int(n) for n in lengths)))


def prompt_ends(model: nn.Module, mask: torch.Tensor, labels: Any = None) -> torch.Tensor:
    """Column of the last prompt token of each row of a call outside ``generate``, ``[rows]`` int64.

    Args:
        model: the stock model that is called.
        mask: ``[rows, width]`` bool, real tokens.
        labels: of the call, if it has any.
    """
    prompts = next((p for p in reversed(_PROMPTS.get()) if p.model is model), None)
    return _where_prompts_end(_last(mask), mask, prompts, labels)


def _last(mask: torch.Tensor) -> torch.Tensor:
    """Column of the last True of each row, 0 where there is none."""
    columns = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, columns, -1).amax(dim=1).clamp(min=0)


def _first(mask: torch.Tensor) -> torch.Tensor:
    """Column of the first True of each row, 0 where there is none."""
    return mask.int().argmax(dim=1)


# ---------------------------------------------------------------------- wrapping


OTHER_WRAPPER = (
    "another EditableModel has edits in this very model, and what each of them decides about a prompt would be lost on"
    " the other: edit with one of them, roll the edits of the other back, or wrap a copy (copy.deepcopy)"
)


class Sites:
    """The wrapped submodules of one model.

    Args:
        model: the top-level transformers model.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._functions: dict[str, dict[str, SiteFunction]] = {}
        self._deciders: dict[str, Decider] = {}
        self._trial: dict[str, SiteFunction] = {}
        self._muted: set[str | None] = set()
        self._handles: dict[str, Any] = {}
        self._model_handles: list[Any] = []
        self._disabled = 0
        self._held: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()

    @classmethod
    def of(cls, model: nn.Module) -> Sites:
        """The sites that a model has already, or new ones."""
        owners = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
        return next((owner for owner in owners if isinstance(owner, cls)), None) or cls(model)

    @property
    def paths(self) -> dict[str, str]:
        """Wrapped modules and the owner of each."""
        return {path: owner for owner, functions in self._functions.items() for path in functions}

    @property
    def is_disabled(self) -> bool:
        """Whether this is inside `disabled`."""
        return self._disabled > 0

    def attach(self, owner: str, functions: Mapping[str, SiteFunction], decide: Decider | None = None) -> None:
        """Wrap modules.

        Args:
            owner: name under which they are detached again.
            functions: module name → site function.
            decide: for owners that decide by the tokens, not by a state: called before every call of the model.

        Raises:
            LayerError: if there is no such module.
            ConfigError: if another owner has wrapped one of them, or another `EditableModel` the same model and one of
                both decides by the tokens.
        """
        other = Sites.of(self.model)
        if other is not self and other.paths and (decide is not None or other._deciders):
            raise ConfigError(OTHER_WRAPPER)
        for path in functions:
            get_module(self.model, path)
            if self.paths.get(path, owner) != owner:
                raise ConfigError(
                    f"{path} is wrapped already, for {self.paths[path]}; roll those edits back or choose another layer"
                )
        with uninterrupted():
            self._functions[owner] = dict(functions)
            if decide is not None:
                self._deciders[owner] = decide
            self._sync()

    def detach(self, owner: str) -> None:
        """Unwrap an owner's modules; nothing of it is left in the model."""
        with uninterrupted():
            self._functions.pop(owner, None)
            self._deciders.pop(owner, None)
            self._sync()

    def trying(self, functions: Mapping[str, SiteFunction], instead_of: str | None = None) -> Switch[None]:
        """Wrap modules for the duration of a block (training, measuring).

        Args:
            functions: module name → site function.
            instead_of: an owner whose functions do nothing meanwhile.
        """
        before: list[tuple[dict[str, SiteFunction], set[str | None]]] = []

        def begin() -> None:
            before.append((self._trial, self._muted))
            self._trial, self._muted = {**self._trial, **functions}, {*self._muted, instead_of}
            self._sync()

        def end() -> None:
            self._trial, self._muted = before.pop()
            self._sync()

        return switched(begin, end)

    def disabled(self) -> Switch[None]:
        """The model as if nothing was wrapped, inside the block."""

        def count(step: int) -> None:
            self._disabled += step

        return switched(lambda: count(1), lambda: count(-1))

    def drop_held(self) -> None:
        """Forget the decisions of running sequences: their caches were computed with other edits."""
        self._held.clear()

    def _sync(self) -> None:
        """Bring the hooks in line with the functions."""
        wanted = {*self.paths, *self._trial}
        if wanted == set(self._handles):
            return
        for path in set(self._handles) - wanted:
            self._handles.pop(path).remove()
        for path in wanted - set(self._handles):
            station = _Station(self, path)
            self._handles[path] = get_module(self.model, path).register_forward_hook(station, with_kwargs=True)
        if wanted and not self._model_handles:
            self._model_handles = [
                self.model.register_forward_pre_hook(self._before, with_kwargs=True),
                self.model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
            ]
            if callable(getattr(self.model, "generate", None)):
                self.model.__dict__["generate"] = self._generate
        elif not wanted:
            for handle in self._model_handles:
                handle.remove()
            self._model_handles = []
            self.model.__dict__.pop("generate", None)
        forget_graphs()

    # ------------------------------------------------------------------ calls

    @torch.compiler.disable
    def _run(self, path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Pass a wrapped module's output through its site functions."""
        if self._disabled:
            return None
        inputs = module_input(args, kwargs)
        states = first(output)
        frame = next((f for model, f in reversed(_FRAMES.get()) if model is self.model), None)
        given = as_rows(inputs, frame.rows) if frame else inputs
        if frame is None or given.shape[:2] != (frame.rows, frame.width):
            given = inputs if inputs.dim() == 3 else inputs[None]
            frame = Frame.plain(given.shape[0], given.shape[1], given.device)
        before = states.reshape(*given.shape[:2], states.shape[-1])
        after = before
        owners = [functions for owner, functions in self._functions.items() if owner not in self._muted]
        for functions in (*owners, self._trial):
            if path in functions:
                new = functions[path](SiteCall(path, module, given, after, frame))
                after = after if new is None else new
        if after is before:
            return None
        # A copy where a gradient is wanted: some models go on in place (Llama 4 adds its routed experts to the shared
        # one's output), and a site function may have put its own output into a loss.
        after = after.clone() if after.requires_grad else after
        return with_first(output, after.reshape(states.shape))

    @torch.compiler.disable
    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tell_hooks_apart()  # the compiler may have been loaded since the edit; the layers are compiled after this
        frame = self._frame(named_arguments(type(self.model), args, kwargs))
        if not self._disabled:
            for owner, decide in list(self._deciders.items()):
                if owner not in self._muted:
                    decide(frame)
        # A call that Ctrl-C has cut short never came to `_after`; a model does not call itself.
        others = (entry for entry in _FRAMES.get() if entry[0] is not self.model)
        _FRAMES.set((*others, (self.model, frame)))

    @torch.compiler.disable
    def _after(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        frames = _FRAMES.get()
        if not frames or frames[-1][0] is not self.model:
            return
        _FRAMES.set(frames[:-1])
        frame = frames[-1][1]
        if output is None or frame.phase == "decode":
            return
        caches = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
        for cache in caches:
            if isinstance(cache, Cache):
                self._held[cache] = frame.held

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own ``generate``, with a note of where the prompts end."""
        kind: Any = type(self.model)
        given = kwargs.get("inputs_embeds")
        for name in ("input_ids", "inputs"):
            given = kwargs.get(name) if given is None else given
        given = args[0] if given is None and args else given
        width = int(given.shape[1]) if isinstance(given, torch.Tensor) and given.dim() >= 2 else 1
        mask = kwargs.get("attention_mask")
        two = mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
        with _prompts(_Prompts(self.model, width=width, mask=two)):
            return kind.generate(self.model, *args, **kwargs)

    def _frame(self, given: Mapping[str, Any]) -> Frame:
        """Find out what kind of call this is and where the prompts of its rows end."""
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        if not isinstance(tokens, torch.Tensor):
            return Frame.plain(0, 0, torch.device("cpu"))  # fits no site: each one takes its input as it comes
        rows, width = int(tokens.shape[0]), int(tokens.shape[1])
        cache = given.get("past_key_values")
        past = int(cache.get_seq_length()) if isinstance(cache, Cache) else 0
        prompts = next((p for p in reversed(_PROMPTS.get()) if p.model is self.model), None)
        length = prompts.width if prompts is not None and not self._encoder_decoder else None
        if length is None:
            phase: Literal["prompt", "chunk", "decode"] = "prompt" if past == 0 else "decode"
        else:
            phase = "decode" if past >= length else "prompt" if past + width >= length else "chunk"
        mask = self._mask(given.get("attention_mask"), prompts, rows, width, past, tokens.device)
        columns = _last(mask if length is None else mask[:, : max(length - past, 1)])
        if phase == "prompt" and length is None:
            columns = _where_prompts_end(columns, mask, prompts, given.get("labels"))
        ids = given.get("input_ids")
        known = ids if isinstance(ids, torch.Tensor) and ids.dim() == 2 else None
        return Frame(rows, width, past, phase, mask, columns, self._held_for(cache, past), known)

    @property
    def _encoder_decoder(self) -> bool:
        return bool(getattr(getattr(self.model, "config", None), "is_encoder_decoder", False))

    @staticmethod
    def _mask(
        given: Any, prompts: _Prompts | None, rows: int, width: int, past: int, device: torch.device
    ) -> torch.Tensor:
        """Which positions of this call are real tokens, ``[rows, width]``."""
        if isinstance(given, torch.Tensor) and given.dim() == 2 and given.shape[1] >= width:
            return given[:, given.shape[1] - width :].bool()
        mask = torch.ones(rows, width, dtype=torch.bool, device=device)
        if prompts is not None and prompts.mask is not None:  # ``generate`` made a mask of its own of it
            known = prompts.mask[:, past : past + width].bool().to(device)
            mask[:, : known.shape[1]] = known.repeat_interleave(rows // known.shape[0], dim=0)
        return mask

    def _held_for(self, cache: Any, past: int) -> dict[str, Any]:
        """The decisions of the sequence that a call belongs to."""
        if not isinstance(cache, Cache):
            return {}
        known = self._held.get(cache)
        if past == 0 or known is None:
            known = {}
            self._held[cache] = known
        return known


def _where_prompts_end(
    columns: torch.Tensor, mask: torch.Tensor, prompts: _Prompts | None, labels: Any
) -> torch.Tensor:
    """Move the key columns of a call outside ``generate`` to where the caller, or the labels, say prompts end."""
    if prompts is not None and prompts.lengths is not None:
        lengths = torch.tensor(prompts.lengths, device=mask.device)
        if lengths.shape[0] != mask.shape[0]:
            raise ConfigError(f"prompt_lengths names {lengths.shape[0]} rows, the model was called with {len(mask)}")
        if bool((lengths < 1).any()) or bool((lengths > mask.sum(dim=1)).any()):
            raise ConfigError("prompt_lengths: a prompt has at least one token and at most all of its row")
        return _first(mask) + lengths - 1
    if isinstance(labels, torch.Tensor) and labels.shape == mask.shape:
        target = (labels != _IGNORED) & mask
        start = _first(target)
        return torch.where(target.any(dim=1) & (start > _first(mask)), start - 1, columns)
    return columns


@dataclass(frozen=True)
class _Station:
    """The forward hook of one wrapped module."""

    sites: Sites
    path: str

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        return self.sites._run(self.path, module, args, kwargs, output)


def needs_whole_prompt(frame: Frame, method: str) -> bool:
    """Whether a method that decides on whole prompts can do so in this call; the user is told if it can not."""
    if frame.phase == "chunk" or (frame.phase == "prompt" and frame.past):
        warn_once(
            logger,
            f"{method} decides on whole prompts, but a prompt came in pieces (chunked prefill or a prefix cache):"
            " its edits have no effect there",
        )
        return False
    return frame.phase == "prompt"


def held_decision(frame: Frame, name: str) -> Any | None:
    """What was decided under ``name`` for the sequence that a ``decode`` call continues; ``None`` if nothing was.

    The user is told when the cache comes from before the latest edit, or from somewhere else.
    """
    found = frame.held.get(name)
    if found is None:
        warn_once(
            logger,
            "the model goes on from a key/value cache that was computed elsewhere or before the latest change of its"
            " edits; edits that route by prompts have no effect there. Compute the cache again",
        )
    return found

"""`decode_with`: a block in which a model's layers are contrasted."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from ..anatomy import Anatomy, resolve_anatomy
from ..anatomy.outputs import hooks
from ..anatomy.switching import Switch, switched, together
from ..engine.forward import is_measured, named_arguments
from ..errors import ConfigError, UnsupportedModelError
from .deco import deco_scores
from .dola import dola_scores
from .premature import PrematureLogits
from .settings import DeCoConfig, Decoding, DoLaConfig, decoding_of

_OPEN: WeakKeyDictionary[PreTrainedModel, Decoding] = WeakKeyDictionary()


def decode_with(
    model: PreTrainedModel,
    decoding: Decoding | str | Mapping[str, Any],
    *,
    anatomy: Anatomy | None = None,
    own_thread: bool = False,
    **settings: Any,
) -> Switch[None]:
    """Inside the block the model's logits are scores of DoLa or DeCo, at every position that it computes them for.

    Whatever asks the model for its next token gets them before anything else is done to logits: greedy decoding,
    sampling, beams, processors (a repetition penalty, say). Behind the block the model is as before.

    Args:
        model: a causal language model; no `EditableModel`, which has `decoding` of its own.
        decoding: ``"dola"`` or ``"deco"``, or settings.
        anatomy: where the model's parts are, if that is known.
        own_thread: leave calls of other threads alone.
        settings: fields of `DoLaConfig` or `DeCoConfig`.

    Raises:
        ConfigError: for an unknown decoding or setting. When the block is entered: if the model is inside
            another one. Inside: for ``labels``, a compiled model or a static cache, and assisted decoding, which
            cannot be combined with it.
        UnsupportedModelError: if the model is no decoder. Inside the block: if it treats its logits in an unknown way.
    """
    chosen = decoding_of(decoding, **settings)
    where = anatomy or resolve_anatomy(model)
    layers = chosen.premature_layers(where.num_layers, where.head_tied)
    norm = chosen.early_norm if isinstance(chosen, DoLaConfig) else True
    premature = PrematureLogits(model, where, layers, norm=norm)
    contrast = _Contrast(premature, chosen, type(model), threading.get_ident() if own_thread else None)
    switch = hooks(
        partial(model.register_forward_pre_hook, contrast.before, with_kwargs=True),
        *premature.registrations,
        partial(model.register_forward_hook, contrast.after, with_kwargs=True),
    )
    return switch if own_thread else together(_announced(model, chosen), switch)


def decoding_now(model: PreTrainedModel) -> Decoding | None:
    """The decoding of the block of `decode_with` that is open on this model."""
    return _OPEN.get(model)


def _announced(model: PreTrainedModel, decoding: Decoding) -> Switch[None]:
    mine: list[bool] = []

    def change() -> None:
        if model in _OPEN:
            raise ConfigError(f"the model decodes with {_OPEN[model].name} already; leave that block first")
        _OPEN[model] = decoding
        mine.append(True)

    def put_back() -> None:
        if mine:  # else it is another block's
            del _OPEN[model]

    return switched(change, put_back)


class _Contrast:
    """The hooks around the model's forward."""

    def __init__(self, premature: PrematureLogits, decoding: Decoding, kind: Any, thread: int | None):
        self._premature, self._decoding, self._thread = premature, decoding, thread
        self._kind = kind

    @property
    def _is_on(self) -> bool:
        return not is_measured() and self._thread in (None, threading.get_ident())

    @torch.compiler.disable
    def before(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse what cannot be combined, and make ready to see the states."""
        if not self._is_on:
            return
        given = named_arguments(self._kind, args, kwargs)
        cache = given.get("past_key_values")
        if given.get("labels") is not None:
            raise ConfigError(f"{self._decoding.name} decodes, it has no loss: leave labels out, or the block")
        if getattr(cache, "is_compileable", False):
            raise ConfigError(f"{self._decoding.name} cannot run compiled: generate without a static cache")
        self._premature.begin()

    @torch.compiler.disable
    def after(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Put scores in the place of the logits."""
        if not self._is_on:
            return None
        given = named_arguments(self._kind, args, kwargs)
        logits = output[0] if isinstance(output, tuple) else output.logits
        if logits.dim() == 3 and logits.shape[1] > 1 and _is_continued(given):
            raise ConfigError(
                f"{self._decoding.name} cannot be combined with assisted decoding (an assistant, prompt lookup)"
            )
        if logits.dim() not in (2, 3):
            raise UnsupportedModelError(f"logits of shape {tuple(logits.shape)} are no language model's")
        with torch.no_grad():
            kept = given.get("logits_to_keep")
            premature = self._premature.read(logits, 0 if kept is None else kept)
            final = logits.float().flatten(0, -2)
            read = premature.flatten(1, -2)
            scores = (
                deco_scores(final, read, self._decoding)
                if isinstance(self._decoding, DeCoConfig)
                else dola_scores(final, read, self._decoding)  # type: ignore[arg-type]
            )
        scores = scores.view_as(logits).to(logits.dtype)
        if isinstance(output, tuple):
            return (scores, *output[1:])
        output.logits = scores
        return output


def _is_continued(given: Mapping[str, Any]) -> bool:
    """Whether a call goes on behind a cache that holds something."""
    cache = given.get("past_key_values")
    length = getattr(cache, "get_seq_length", None)
    return callable(length) and length() > _width(given)


def _width(given: Mapping[str, Any]) -> int:
    tokens = given.get("input_ids")
    tokens = given.get("inputs_embeds") if tokens is None else tokens
    return int(tokens.shape[1]) if isinstance(tokens, torch.Tensor) else 0

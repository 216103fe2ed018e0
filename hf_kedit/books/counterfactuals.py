"""Models that answer in place of the edited one, by name: registered, embedded, or from the Hub."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import embedded
from ..engine.forward import device_of
from ..errors import ConfigError, KeditError, UnsupportedModelError, reason_of
from ..tokens import vocabulary_size

BASE = "base"
_REGISTERED: dict[str, Any] = {}
_LOADED: dict[str, Any] = {}
_KINDS: dict[str, Callable[[str], Any]] = {}


def register_counterfactual(name: str, model: Any) -> None:
    """Make a model known under a name, for configs and for loading saved edits that used it."""
    if name == BASE:
        raise ConfigError(f"{BASE!r} means the edited model itself; choose another name")
    _REGISTERED[name] = model


def register_counterfactual_kind(kind: str, load: Callable[[str], Any]) -> None:
    """Say how models are loaded whose name begins with ``kind:``."""
    _KINDS[kind] = load


def find_counterfactual(name: str, beside: Any) -> Any:
    """Return a counterfactual model: a registered name or kind, or the id or folder of a causal language model.

    A registered model stays where its owner has put it. One that is loaded here follows the edited model to its
    device, also when that is moved later, or is another model of the same process.

    Args:
        name: of the model.
        beside: the edited model; both must use the same tokens.

    Raises:
        ConfigError: if there is none of this name.
        UnsupportedModelError: if the vocabularies differ.
    """
    model = _REGISTERED.get(name)
    if model is None:
        if name not in _LOADED:
            _LOADED[name] = _load(name).eval()
        model = _LOADED[name]
        if device_of(model) != device_of(beside):
            model.to(device_of(beside))
    mine, own = vocabulary_size(model), vocabulary_size(beside)
    if mine != own:
        raise UnsupportedModelError(
            f"the counterfactual model {name!r} has {mine} tokens, the edited model {own}: both must share a tokenizer"
        )
    return model


def _load(name: str) -> Any:
    kind = name.partition(":")[0]
    if kind in _KINDS:
        return _KINDS[kind](name)
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(embedded.resolve(name) or name, dtype="auto")
    except (OSError, ValueError) as error:
        if isinstance(error, KeditError):
            raise
        raise ConfigError(
            f"the counterfactual model {name!r} cannot be loaded ({reason_of(error)}); name a causal language model by"
            " its id or folder, or register_counterfactual() your own"
        ) from error

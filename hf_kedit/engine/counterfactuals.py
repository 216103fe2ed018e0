"""Models that answer in place of the edited one, by name: registered, embedded, or from the Hub."""

from __future__ import annotations

from typing import Any

from .. import embedded
from ..errors import ConfigError, UnsupportedModelError
from .forward import device_of

BASE = "base"
_REGISTERED: dict[str, Any] = {}


def register_counterfactual(name: str, model: Any) -> None:
    """Make a model known under a name, for configs and for loading saved edits that used it."""
    if name == BASE:
        raise ConfigError(f"{BASE!r} means the edited model itself; choose another name")
    _REGISTERED[name] = model


def find_counterfactual(name: str, beside: Any) -> Any:
    """Return a counterfactual model: a registered name, or the id or folder of a causal language model.

    Args:
        name: of the model.
        beside: the edited model; both must use the same tokens.

    Raises:
        UnsupportedModelError: if the vocabularies differ.
    """
    if name not in _REGISTERED:
        from transformers import AutoModelForCausalLM

        folder = embedded.resolve(name)
        loaded = AutoModelForCausalLM.from_pretrained(folder or name, dtype="auto")
        _REGISTERED[name] = loaded.eval().to(device_of(beside))
    model = _REGISTERED[name]
    mine, own = (m.config.get_text_config(decoder=True).vocab_size for m in (model, beside))
    if mine != own:
        raise UnsupportedModelError(
            f"the counterfactual model {name!r} has {mine} tokens, the edited model {own}: both must share a tokenizer"
        )
    return model

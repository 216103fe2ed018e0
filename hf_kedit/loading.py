"""Loading a base model and its tokenizer by name, with the right AutoModel class."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import embedded
from .errors import UnsupportedModelError
from .statistics.corpora import Corpus

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def model_name(name: str | Path) -> str:
    """A model's name as it is recorded: folders absolute, so that they are found from everywhere; ids as they are."""
    text = str(name)
    if text.startswith(embedded.PREFIX):
        return text.rstrip("/")
    folder = Path(text).expanduser()
    if text and folder.is_dir():
        return os.path.abspath(folder)
    return text if text.startswith(("/", ".", "~")) else text.rstrip("/")


def is_local(name: str) -> bool:
    """Whether the name of a model means a folder of one machine, whether it is there or not."""
    return name.startswith(("/", ".", "~")) or "\\" in name or Path(name).is_absolute()


def load_base(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False, **kwargs: Any
) -> PreTrainedModel:
    """Load a model with a language-model head: causal, encoder-decoder or image-text.

    Args:
        name: Hub id, local folder, or embedded name.
        revision: branch, tag or commit.
        trust_remote_code: allow code from the repository.
        kwargs: for ``from_pretrained``.

    Raises:
        UnsupportedModelError: if the model is of another kind.
    """
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForSeq2SeqLM,
    )

    local = embedded.resolve(name)
    source = str(local) if local is not None else model_name(name)
    shared = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(source, **shared, **hub_options(kwargs))
    if getattr(config, "is_encoder_decoder", False):
        loader: Any = AutoModelForSeq2SeqLM
    elif type(config) in AutoModelForImageTextToText._model_mapping:
        loader = AutoModelForImageTextToText
    elif type(config) in AutoModelForCausalLM._model_mapping or "AutoModelForCausalLM" in (
        getattr(config, "auto_map", None) or {}
    ):
        loader = AutoModelForCausalLM
    else:
        raise UnsupportedModelError(
            f"{name!r} is a {config.model_type} model without a language-model head that transformers can load;"
            " load it yourself and pass it to EditableModel(model, ...)"
        )
    model: PreTrainedModel = loader.from_pretrained(source, **shared, **kwargs)
    return model


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False, **hub: Any
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model by the same name; ``hub`` as in `hub_options`."""
    from transformers import AutoTokenizer

    local = embedded.resolve(name)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        str(local) if local is not None else model_name(name),
        revision=revision,
        trust_remote_code=trust_remote_code,
        **hub,
    )
    return tokenizer


def hub_options(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments of ``from_pretrained`` that concern every file of a repository."""
    return {name: kwargs[name] for name in ("token", "cache_dir", "local_files_only") if name in kwargs}


def embedded_corpus(name: str, model: PreTrainedModel) -> Corpus | None:
    """The text of the fact world for the embedded models; ``None`` for every other model."""
    own = embedded.is_embedded(name)
    if not own:
        path = Path(str(getattr(model.config, "name_or_path", "")))
        own = any(path == embedded.path(n) for n in embedded.names())
    if not own:
        return None
    from .data.world_text import world_text

    return Corpus("world-text-0", lambda: world_text(seed=0))

"""Loading a base model and its tokenizer by name, with the right AutoModel class.

A name is a Hub id, a folder, an embedded name, or a GGUF file (a path, or ``org/name/file.gguf``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import embedded
from .errors import ArtifactError, UnsupportedModelError, shown
from .gguf import reading as gguf_reading
from .logging import get_logger
from .statistics.corpora import Corpus
from .text.pictures import Picture
from .text.processors import picture_frame, sees, without_videos

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


logger = get_logger(__name__)


def model_name(name: str | Path) -> str:
    """A model's name as it is recorded: folders and files absolute, so that they are found from everywhere.

    Raises:
        ArtifactError: if it is no name.
    """
    if not isinstance(name, (str, Path)):
        raise ArtifactError(f"a model is named by a Hub id, a folder or a file, not {shown(name)}")
    text = str(name)
    if text.startswith(embedded.PREFIX):
        return text.rstrip("/")
    folder = Path(os.path.expanduser(text))
    if text and (os.path.isdir(folder) or (os.path.isfile(folder) and gguf_reading.is_gguf(text))):
        return os.path.abspath(folder)
    return text if text.startswith(("/", ".", "~")) else text.rstrip("/")


def is_local(name: str) -> bool:
    """Whether the name of a model means a folder or a file of one machine, whether it is there or not."""
    return name.startswith(("/", ".", "~")) or "\\" in name or Path(name).is_absolute()


def load_base(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False, **kwargs: Any
) -> PreTrainedModel:
    """Load a model with a language-model head: causal, encoder-decoder or image-text.

    Args:
        name: Hub id, local folder, embedded name, or GGUF file.
        revision: branch, tag or commit.
        trust_remote_code: allow code from the repository.
        kwargs: for ``from_pretrained``.

    Raises:
        UnsupportedModelError: if the model is of another kind.
        ModelFileError: if a GGUF file is missing, damaged, or of a kind that transformers does not read.
        MissingExtraError: if it takes a package that is not installed to read it.
    """
    if gguf_reading.is_gguf(name):
        file = gguf_reading.locate(model_name(name), revision=revision, **hub_options(kwargs))
        return gguf_reading.read_model(file, lambda config: _loader_of(config, name), **kwargs)
    shared: Any = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = load_config(name, **shared, **hub_options(kwargs))
    model: PreTrainedModel = _loader_of(config, name).from_pretrained(_source(name), **shared, **kwargs)
    return model


def load_config(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False, **hub: Any
) -> PretrainedConfig:
    """Load the config of a model by the same name; ``hub`` as in `hub_options`.

    Raises:
        ModelFileError: if a GGUF file is missing, damaged, or of a kind that transformers does not read.
        MissingExtraError: if it takes a package that is not installed to read it.
    """
    if gguf_reading.is_gguf(name):
        return gguf_reading.read_config(gguf_reading.locate(model_name(name), revision=revision, **hub))
    from transformers import AutoConfig

    shared: Any = {"revision": revision, "trust_remote_code": trust_remote_code}
    config: PretrainedConfig = AutoConfig.from_pretrained(_source(name), **shared, **hub)
    return config


def _source(name: str) -> str:
    """What transformers loads under a name: a folder, or a Hub id."""
    local = embedded.resolve(name)
    return str(local) if local is not None else model_name(name)


def _loader_of(config: Any, name: str) -> Any:
    """The class that loads a model with such a config."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

    if type(config) in AutoModelForImageTextToText._model_mapping:
        return AutoModelForImageTextToText
    if getattr(config, "is_encoder_decoder", False):
        return AutoModelForSeq2SeqLM
    if type(config) in AutoModelForCausalLM._model_mapping or "AutoModelForCausalLM" in (
        getattr(config, "auto_map", None) or {}
    ):
        return AutoModelForCausalLM
    raise UnsupportedModelError(
        f"{name!r} is a {config.model_type} model without a language-model head that transformers can load;"
        " load it yourself and pass it to EditableModel(model, ...)"
    )


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False, **hub: Any
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model by the same name; ``hub`` as in `hub_options`.

    Raises:
        UnsupportedModelError: if it has none, where transformers makes an empty one out of nothing.
    """
    if gguf_reading.is_gguf(name):
        return gguf_reading.read_tokenizer(gguf_reading.locate(model_name(name), revision=revision, **hub))
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        _source(name),
        revision=revision,
        trust_remote_code=trust_remote_code,
        **hub,
    )
    if getattr(tokenizer, "vocab_size", None) == 0:
        raise UnsupportedModelError(f"{name!r} has no tokenizer; give one with tokenizer=")
    return tokenizer


def load_processor(
    name: str, config: Any, *, revision: str | None = None, trust_remote_code: bool = False, **hub: Any
) -> Any:
    """Load the processor of a model that sees, by the same name; ``None`` for a model of text alone.

    Without torchvision, transformers cannot make the part of a processor that reads videos. It is left out then.

    Returns:
        The processor, or ``None``, with a warning where the model sees and nothing is found that reads pictures.
    """
    from transformers import AutoModelForImageTextToText

    if gguf_reading.is_gguf(name) or type(config) not in AutoModelForImageTextToText._model_mapping:
        return None
    from transformers import AutoProcessor

    options = {"revision": revision, "trust_remote_code": trust_remote_code, **hub}
    try:
        processor: Any = AutoProcessor.from_pretrained(_source(name), **options)
        if sees(processor):
            return processor
        reason = f"{type(processor).__name__} reads no pictures"
    except Exception as error:  # whatever is missing: a file, a package, a part of a processor
        try:
            return _without_videos(name, config, options)
        except Exception as other:  # an ImportError names the package to install
            named = other if isinstance(other, ImportError) or not str(error) else error
            reason = f"{type(named).__name__}: {' '.join(str(named).split())}"
    logger.warning("no processor could be loaded from %r (%s); pass processor= to edit with images", name, reason)
    return None


def _without_videos(name: str, config: Any, options: Mapping[str, Any]) -> Any:
    """A processor of pictures and text, where its class also wants one of videos."""
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    kind: Any = PROCESSOR_MAPPING[type(config)]
    return without_videos(kind).from_pretrained(_source(name), **options)


def hub_options(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments of ``from_pretrained`` that concern every file of a repository."""
    return {name: kwargs[name] for name in ("token", "cache_dir", "local_files_only") if name in kwargs}


def embedded_corpus(name: str, model: PreTrainedModel, processor: Any = None) -> Corpus | None:
    """The text of the fact world for the embedded models; ``None`` for every other model.

    For the one that sees, every second text is about a drawing, if its processor is there to show it.
    """
    own = embedded.is_embedded(name)
    if not own:
        path = Path(str(getattr(model.config, "name_or_path", "")))
        own = any(path == embedded.path(n) for n in embedded.names())
    if not own:
        return None
    from .data.world_text import world_text

    if processor is None:
        return Corpus("world-text-0", lambda: world_text(seed=0))
    from .data.picture_text import pictured_sentences

    def both() -> Iterator[str]:
        for text, (sentence, drawing) in zip(world_text(seed=0), pictured_sentences(seed=0), strict=True):
            yield text
            yield picture_frame(processor, [Picture.of(drawing)]).text(sentence)

    return Corpus("world-pictures-0", both)

"""GGUF files as base models: found by name, checked, and read as plain transformers models.

A name is the path of a file, or ``org/name/file.gguf`` for one in a repository of the Hub. transformers turns the
blocks of such a file into numbers. What it then leaves to be done is here: the config still calls the model quantised,
and lacks some of what the file says.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, KeditError, ModelFileError, check_extra, reason_of, shown
from ..logging import get_logger, progress
from ..storage.files import first_time
from ..storage.repository import download
from .families import extra_tensors
from .vocabulary import split_words_as

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = get_logger(__name__)
SUFFIX, MAGIC = ".gguf", b"GGUF"
_ORIGIN = "kedit_gguf_file"
_PLAIN_TYPES = {"F32", "F16", "BF16", "F64"}
_STRETCHING = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_LLAMA_3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file on this machine.

    Args:
        name: under which it is recorded: an absolute path, or ``org/name/file.gguf``.
        path: where it is.
        commit: of the repository that it comes from.
    """

    name: str
    path: Path
    commit: str | None = None

    @functools.cached_property
    def sha256(self) -> str:
        """Of the file's content."""
        with self.path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()


def is_gguf(name: str) -> bool:
    """Whether a name means a GGUF file: it ends so, or is a file that begins so (Ollama's files have no ending)."""
    path = Path(os.path.expanduser(name))
    if os.path.isfile(path):
        with contextlib.suppress(OSError), path.open("rb") as handle:
            return handle.read(len(MAGIC)) == MAGIC or name.lower().endswith(SUFFIX)
    return name.lower().endswith(SUFFIX) and not os.path.isdir(path)


def inside(name: str, gguf_file: str) -> str:
    """The name of a file in a folder or a repository.

    Raises:
        ConfigError: if ``name`` is a file itself.
    """
    if is_gguf(name):
        raise ConfigError(f"{name!r} is a file, so that gguf_file={gguf_file!r} says nothing; leave it out")
    if os.path.isdir(os.path.expanduser(name)):
        return os.path.abspath(Path(os.path.expanduser(name)) / gguf_file)
    return f"{name.rstrip('/')}/{gguf_file}"


def locate(name: str, *, revision: str | None = None, **hub: Any) -> GgufFile:
    """Find a file by its name; one of the Hub is fetched into the cache.

    Args:
        name: see `is_gguf`.
        revision: of the repository.
        hub: ``token``, ``cache_dir``, ``local_files_only``.

    Raises:
        ModelFileError: if there is no such file.
        HubError: if the repository cannot be read.
    """
    path = Path(os.path.expanduser(name))
    if os.path.isfile(path):
        return GgufFile(os.path.abspath(path), Path(os.path.abspath(path)))
    repo, wanted = inside_repository(name)
    if not wanted:
        raise ModelFileError(f"there is no file {name!r}; a file of the Hub is named org/repository/file.gguf")
    fetched = download(repo, wanted, revision=revision, **hub)
    if fetched is None:
        raise ModelFileError(f"the repository {repo!r} has no file {wanted!r}, and there is none of this name here")
    return GgufFile(name, fetched, fetched.parents[wanted.count("/")].name)


def inside_repository(name: str) -> tuple[str, str]:
    """Repository and file of the name of a file on the Hub; for every other name itself and no file.

    A file of this machine without its way is a name of the second kind: nobody else has it.
    """
    parts = name.split("/")
    if len(parts) < 3 or name.startswith(("/", ".", "~")) or not is_gguf(name) or os.path.isfile(name):
        return name, ""
    return "/".join(parts[:2]), "/".join(parts[2:])


def read_model(file: GgufFile, loader_of: Callable[[Any], Any], **kwargs: Any) -> PreTrainedModel:
    """Read a file as a plain model: every number in one dtype, a config that calls nothing quantised.

    Args:
        file: found by `locate`.
        loader_of: config → the class whose ``from_pretrained`` loads such a model.
        kwargs: for ``from_pretrained``. Without ``dtype`` the numbers are float32.

    Raises:
        ModelFileError: if the file is damaged or of a kind that transformers does not read.
        MissingExtraError: if the package ``gguf`` is not installed.
    """
    if kwargs.pop("quantization_config", None) is not None:
        raise ConfigError(
            f"{file.path.name} is turned into plain numbers when it is read, and cannot be quantised on the way; save"
            " the plain model to a folder (merge_and_unload().save_pretrained(…)) and quantise that one"
        )
    config = read_config(file)
    loader = loader_of(config)
    types = _check_weights(file, config, loader)
    import torch
    from transformers import GgufConfig

    dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
    dtype = torch.float32 if dtype in (None, "auto") else dtype
    with _typed_errors(file), _library_bar():
        model, found = loader.from_pretrained(
            file.path.parent,
            gguf_file=file.path.name,
            config=config,
            dtype=dtype,
            quantization_config=GgufConfig(dequantize=True),  # blocks that stay packed could not be edited
            output_loading_info=True,
            **kwargs,
        )
    missing = sorted(found["missing_keys"])
    if missing:  # transformers would make them up
        raise ModelFileError(f"{file.path.name} lacks weights that its architecture needs: {', '.join(missing[:3])} …")
    for parameter in model.parameters():  # transposed ones come as views, on which products are slower
        parameter.data = parameter.data.contiguous()
    _make_plain(model, file.name)
    setattr(model, _ORIGIN, file)
    _say(file, types, str(dtype).removeprefix("torch."))
    result: PreTrainedModel = model
    return result


def read_config(file: GgufFile) -> PretrainedConfig:
    """What a file says of its model's shape, as a config of transformers.

    Raises:
        ModelFileError: if the file is damaged or of a kind that transformers does not read.
        MissingExtraError: if the package ``gguf`` is not installed.
    """
    metadata = read_metadata(file)
    from transformers import AutoConfig

    with _typed_errors(file):
        config: PretrainedConfig = AutoConfig.from_pretrained(file.path.parent, gguf_file=file.path.name)
        _complete(config, metadata)
    return config


def read_tokenizer(file: GgufFile, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Read the tokenizer, with its chat template, that a file holds.

    Raises:
        ModelFileError: if it is damaged or of a kind that transformers does not read.
        MissingExtraError: if the package ``gguf`` is not installed.
    """
    metadata = read_metadata(file)
    from transformers import AutoTokenizer

    with _typed_errors(file):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            file.path.parent, gguf_file=file.path.name, **kwargs
        )
    split_words_as(tokenizer, str(metadata.get("tokenizer.ggml.pre")))
    return tokenizer


def origin_of(model: Any) -> GgufFile | None:
    """The file that a model was read from; ``None`` if it was not, or cannot be found again.

    A model that somebody else read with transformers is made plain here.
    """
    known = getattr(model, _ORIGIN, None)
    if isinstance(known, GgufFile):
        return known
    claimed: Any = getattr(model.config, "quantization_config", None)
    if getattr(claimed, "quant_method", None) != "gguf" or any(not p.is_floating_point() for p in model.parameters()):
        return None
    place = str(model.config.name_or_path)
    name = place if is_gguf(place) else inside(place, str(claimed.gguf_file))
    _make_plain(model, name)
    with contextlib.suppress(KeditError):
        file = locate(name, revision=getattr(model.config, "_commit_hash", None), local_files_only=True)
        setattr(model, _ORIGIN, file)
        return file
    return None


def forget_origin(model: Any) -> None:
    """Say that a model is no longer what its file holds."""
    if hasattr(model, _ORIGIN):
        delattr(model, _ORIGIN)


# ---------------------------------------------------------------------- the file


def require_gguf(purpose: str) -> None:
    """Raise if the package ``gguf``, with which transformers reads such files, is not installed.

    Raises:
        MissingExtraError: naming the extra.
    """
    check_extra("gguf", "gguf", purpose)


def read_metadata(file: GgufFile) -> dict[str, Any]:
    """What a file says about itself; lists of texts (the tokens) are given as their lengths.

    Raises:
        ModelFileError: if it is damaged, one of several parts, or no model.
        MissingExtraError: if the package ``gguf`` is not installed.
    """
    require_gguf(f"reading {file.path.name}")
    from transformers.integrations.gguf import read_gguf_metadata

    with _typed_errors(file):
        metadata, _ = read_gguf_metadata(str(file.path))
    if metadata.get("split.count", 0) > 1:
        raise ModelFileError(
            f"{file.path.name} is one of {metadata['split.count']} parts; join them first (llama-gguf-split --merge)"
        )
    if metadata.get("general.type", "model") != "model":
        raise ModelFileError(f"{file.path.name} holds no model, but this: {shown(metadata['general.type'])}")
    return dict(metadata)


def _check_weights(file: GgufFile, config: Any, loader: Any) -> list[str]:
    """Raise if a file does not hold the weights of the model that it describes, and return their number formats.

    transformers would make up what is missing, in whatever size a damaged head asks for. To be called behind
    `read_metadata`, which believes no length that leads out of the file: the reader of the package ``gguf`` does, and
    would count for ever where one is damaged.
    """
    import gguf
    import torch

    with _typed_errors(file):
        tensors = gguf.GGUFReader(file.path).tensors
        blocks = {int(found[1]) for tensor in tensors if (found := re.search(r"\bblk\.(\d+)\.", tensor.name))}
        layers = int(config.num_hidden_layers)
        if layers > len(blocks):
            raise ModelFileError(f"{file.path.name} describes {layers} layers and holds {len(blocks)}")
        with torch.device("meta"):
            needed = sum(parameter.numel() for parameter in loader.from_config(config).parameters())
        held = sum(int(tensor.n_elements) for tensor in tensors)
        if needed > held:
            raise ModelFileError(f"{file.path.name} describes a model of {needed:,} numbers and holds {held:,}")
        _stretch_positions(file, config, tensors)
    return sorted({tensor.tensor_type.name for tensor in tensors})


@contextlib.contextmanager
def _typed_errors(file: GgufFile) -> Iterator[None]:
    """Turn whatever the readers stumble over in a damaged file into one error that names it.

    Raises:
        ModelFileError: see above.
    """
    try:
        yield
    except KeditError:
        raise
    except MemoryError as error:
        raise ModelFileError(f"{file.path.name} is damaged, or larger than the memory") from error
    except (
        *(ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError),
        *(RuntimeError, OSError, struct.error),
    ) as error:  # a wrong byte may be a length, a type, a name, a number
        raise ModelFileError(f"{str(file.path)!r} cannot be read as a GGUF model: {reason_of(error)}") from error


@contextlib.contextmanager
def _library_bar() -> Iterator[None]:
    """Show transformers' bar for the tensors of a file only where this library shows bars; it has no switch."""
    from transformers import modeling_gguf_pytorch_utils as reader

    bar, reader.tqdm = reader.tqdm, lambda tensors, desc: progress(tensors, desc)
    try:
        yield
    finally:
        reader.tqdm = bar


def _complete(config: Any, metadata: dict[str, Any]) -> None:
    """Take over what a file says of the shapes and transformers leaves at the default of the config's class.

    Settings are written in float32; the shortest number that is rounded to one is what was meant.
    """
    import numpy as np
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    named = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    config.architectures = config.architectures or ([named] if isinstance(named, str) else None)
    for name, value in vars(config).items():
        if isinstance(value, float):
            setattr(config, name, float(str(np.float32(value))))
    said = {key.split(".", 1)[1]: value for key, value in metadata.items() if "." in key}
    if config.model_type == "gpt2":
        config.n_positions = said["context_length"]
        if said.get("feed_forward_length") not in (None, 4 * config.n_embd):
            config.n_inner = said["feed_forward_length"]
    elif config.model_type in ("qwen2", "qwen3", "llama", "mistral") and "attention.key_length" in said:
        config.head_dim = said["attention.key_length"]
    elif config.model_type in ("gemma2", "gemma3_text"):
        largest = config.num_hidden_layers in (46, 62)  # the 27B models; all others are scaled by the width of a head
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if largest else config.head_dim
    if said.get("rope.scaling.type") == "linear" and config.rope_parameters.get("rope_type") == "default":
        config.rope_parameters |= {"rope_type": "linear", "factor": said["rope.scaling.factor"]}


def _stretch_positions(file: GgufFile, config: Any, tensors: list[Any]) -> None:
    """Stretch the positions as the tensors of a file say, which transformers does not read; warn where it cannot be.

    Llama 3's are told by the largest divisor alone, because its models share the other constants.
    """
    import torch

    stretching = {tensor.name: tensor for tensor in tensors if tensor.name in _STRETCHING}
    divisors = stretching.get("rope_freqs.weight")
    if divisors is not None:
        before, wanted = config.rope_parameters, torch.tensor(divisors.data)
        config.rope_parameters = {**before, **_LLAMA_3, "factor": float(wanted.max())}
        found = extra_tensors(config)["rope_freqs.weight"]
        if found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-4):
            return
        config.rope_parameters = before
    if stretching and first_time(f"positions of {file.name}"):
        logger.warning(
            "%s stretches its positions by %s, which transformers does not read: far from the beginning of a text it"
            " answers differently than in llama.cpp",
            file.path.name, ", ".join(stretching),
        )  # fmt: skip


def _make_plain(model: Any, name: str) -> None:
    """Take back that a model is quantised (all of its numbers are plain) and let it be named after its file."""
    model.config.name_or_path = name
    model.hf_quantizer = None
    model.is_quantized = False
    for claim in ("quantization_config", "_model_name_or_path", "_is_quantized"):
        if hasattr(model.config, claim):
            delattr(model.config, claim)
    if hasattr(model, "quantization_method"):
        del model.quantization_method


def _say(file: GgufFile, types: list[str], dtype: str) -> None:
    """Say once per file and machine what became of its blocks."""
    packed = [name for name in types if name not in _PLAIN_TYPES]
    if packed and first_time(f"dequantised {file.sha256} {dtype}"):
        logger.warning(
            "%s is quantised (%s): its weights are turned into %s, and edits are made on these numbers",
            file.path.name, ", ".join(packed), dtype,
        )  # fmt: skip

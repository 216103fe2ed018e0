"""Writes GGUF files: whole models, one weight in memory at a time, and changes of their weights as LoRA adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from ..errors import ExportError
from ..storage.files import replaced_file
from .families import Family, extra_tensors
from .reading import require_gguf
from .vocabulary import add_vocabulary

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter
    from transformers import PreTrainedTokenizerBase

GgufDtype = Literal["f32", "f16", "bf16", "q8_0"]
_QUANTISATION_VERSION = 2
_ALWAYS_EXACT = ("position_embd.weight", "rope_freqs.weight")


@dataclass(frozen=True)
class Weight:
    """A weight that is to be written.

    Args:
        name: in transformers.
        shape: in functional orientation.
        read: gives it, ``[d_out, …]``, floating point.
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


def check_dtype(dtype: str) -> None:
    """Raise for a number format that is not written, or if the package that writes is missing.

    Raises:
        ExportError: naming the formats.
        MissingExtraError: see above.
    """
    if dtype not in get_args(GgufDtype):
        raise ExportError(f"dtype must be one of {', '.join(get_args(GgufDtype))}, not {dtype!r}")
    require_gguf("writing GGUF")


def write_model(
    path: Path,
    family: Family,
    config: Any,
    tokenizer: PreTrainedTokenizerBase,
    weights: Iterable[Weight],
    *,
    dtype: GgufDtype,
    title: str,
    also_end: list[int],
) -> int:
    """Write a whole model; the file appears complete, or not at all.

    Args:
        path: of the file; an older one is replaced.
        family: of the model's family.
        config: of the model.
        tokenizer: of the model.
        weights: every parameter once, tied ones under their first name.
        dtype: of matrices. Vectors, and matrices whose rows no block of ``q8_0`` fits into (f16 then), are exceptions.
        title: name of the model in the file.
        also_end: further tokens behind which the model stops writing.

    Returns:
        The number of tensors.

    Raises:
        ExportError: if llama.cpp has no place for a weight, or the tokenizer cannot be written.
        ArtifactError: if the file cannot be written.
    """
    import gguf

    named = family.names(config)
    computed = [(n, Weight(n, tuple(v.shape), v.contiguous)) for n, v in extra_tensors(config).items()]
    todo = [(named(weight.name), weight) for weight in weights] + computed

    def describe(writer: GGUFWriter) -> None:
        writer.add_type("model")
        writer.add_name(title)
        writer.add_file_type(getattr(gguf.LlamaFileType, "ALL_F32" if dtype == "f32" else f"MOSTLY_{dtype.upper()}"))
        writer.add_quantization_version(_QUANTISATION_VERSION)
        family.describe(writer, config)
        add_vocabulary(writer, tokenizer, config.vocab_size, also_end)

    def entry(name: str, weight: Weight) -> _Entry:
        kind = _kind(name, weight.shape, dtype)
        return _Entry(name, weight.shape, kind, lambda: family.stored(config, weight.name, weight.read()))

    _write(path, family.arch, describe, [entry(name, weight) for name, weight in todo])
    return len(todo)


def write_adapter(
    path: Path,
    family: Family,
    config: Any,
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    *,
    rank: int,
    title: str,
    base: str,
) -> int:
    """Write changes ``ΔW = left · rightᵀ`` as a LoRA adapter of llama.cpp; the file appears complete, or not at all.

    llama.cpp adds ``alpha / rank · B (A x)`` to what a weight computes; here ``alpha = rank``.

    Args:
        path: of the file; an older one is replaced.
        family: of the base model's family.
        config: of the base model.
        factors: name of a weight in transformers → left ``[d_out, rank]``, right ``[d_in, rank]``, fp32.
        rank: of all factors.
        title: name of the adapter in the file.
        base: name of the base model.

    Returns:
        The number of changed weights.

    Raises:
        ExportError: if llama.cpp has no place for a weight.
        ArtifactError: if the file cannot be written.
    """
    import gguf

    named = family.names(config)
    exact = gguf.GGMLQuantizationType.F32
    entries: list[_Entry] = []
    for name, (left, right) in factors.items():
        place = named(name)
        pair = {"lora_a": right.T, "lora_b": family.stored(config, name, left)}
        entries += [_Entry(f"{place}.{end}", tuple(v.shape), exact, v.contiguous) for end, v in pair.items()]

    def describe(writer: GGUFWriter) -> None:
        writer.add_type("adapter")
        writer.add_name(title)
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base or "in memory")
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))

    _write(path, family.arch, describe, entries)
    return len(factors)


@dataclass(frozen=True)
class _Entry:
    """A tensor of a file: its name there, its shape, its format, and how it is got."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    read: Callable[[], torch.Tensor]


def _kind(name: str, shape: tuple[int, ...], dtype: GgufDtype) -> GGMLQuantizationType:
    """The number format of a tensor."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(shape) < 2 or name in _ALWAYS_EXACT:
        return GGMLQuantizationType.F32
    kind = GGMLQuantizationType[dtype.upper()]
    block, _ = GGML_QUANT_SIZES[kind]
    return kind if shape[-1] % block == 0 else GGMLQuantizationType.F16


def _write(path: Path, arch: str, describe: Callable[[GGUFWriter], None], entries: list[_Entry]) -> None:
    """Write head and table first, then one tensor after the other."""
    import numpy as np
    from gguf import GGUFWriter, quantize
    from gguf.quants import quant_shape_to_byte_shape

    writer = GGUFWriter(None, arch)
    describe(writer)
    for entry in entries:
        shape = quant_shape_to_byte_shape(entry.shape, entry.kind)
        size = int(np.prod(shape, dtype=np.int64))
        writer.add_tensor_info(entry.name, shape, np.dtype(np.uint8), size, raw_dtype=entry.kind)
    with replaced_file(path) as draft:
        try:
            writer.write_header_to_file(draft)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for entry in entries:
                values = entry.read().detach().to("cpu", torch.float32).contiguous().numpy()
                writer.write_tensor_data(quantize(values, entry.kind))
        finally:
            writer.close()

"""Families of models as llama.cpp has them: what their weights are called, how they are stored, what else it is told.

Names of weights come from the tables of the package ``gguf``. How numbers are stored differs in two places:

    interleaved    transformers turns the dimensions i and i + d/2 of a query or key together, llama.cpp's "llama"
                   turns 2i and 2i + 1: the rows of the two projections, and of the left factors of their changes,
                   are written in that order
    norm_offset    Gemma multiplies by 1 + w; the file holds the sum

A family stands here only if a test compares it with llama.cpp itself. Settings that llama.cpp would not obey are
refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ExportError, UnsupportedModelError

if TYPE_CHECKING:
    from gguf import GGUFWriter

_QKV, _MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj")
_SILU, _GELU_TANH = {"silu", "swish"}, {"gelu_new", "gelu_pytorch_tanh", "gelu_fast"}


@dataclass(frozen=True)
class Family:
    """How llama.cpp keeps a family.

    Args:
        arch: its name there.
        activations: those of transformers that compute the same.
        describe: writes the settings of a config into the head of a file.
        biases: modules that may have a bias.
        interleaved: see the module.
        norm_offset: added to the weights of norms.
    """

    arch: str
    activations: set[str]
    describe: Callable[[GGUFWriter, Any], None]
    biases: tuple[str, ...] = ()
    interleaved: bool = False
    norm_offset: float = 0.0

    def stored(self, config: Any, name: str, value: torch.Tensor) -> torch.Tensor:
        """A weight as it stands in the file.

        Args:
            config: of the model.
            name: of the parameter in transformers.
            value: in functional orientation, ``[d_out, …]``; or the left factor of its change, ``[d_out, rank]``.
        """
        kind = name.split(".")[-2]
        if self.interleaved and kind in ("q_proj", "k_proj"):
            heads = config.num_attention_heads if kind == "q_proj" else _kv_heads(config)
            halves = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
            return halves.transpose(1, 2).reshape(value.shape)
        if self.norm_offset and kind.endswith("norm"):
            return value + self.norm_offset
        return value

    def names(self, config: Any) -> Callable[[str], str]:
        """A function from the name of a parameter in transformers to its name in the file.

        The function raises an `ExportError` for a parameter that llama.cpp has no place for.
        """
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        arch = next(number for number, name in MODEL_ARCH_NAMES.items() if name == self.arch)
        table = get_tensor_name_map(arch, config.num_hidden_layers)

        def named(parameter: str) -> str:
            found = table.get_name(parameter, try_suffixes=(".weight", ".bias"))
            if found is None or (parameter.endswith(".bias") and parameter.split(".")[-2] not in self.biases):
                raise ExportError(f"llama.cpp's {self.arch!r} has no place for {parameter}")
            return found

        return named


def family_of(config: Any) -> Family:
    """The family of a model's family.

    Raises:
        UnsupportedModelError: if it is none of those that were checked.
        ExportError: if the model has a setting that llama.cpp would not obey.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UnsupportedModelError(
            f"a {config.model_type} model cannot be written as GGUF: it was not checked that llama.cpp computes the"
            f" same. It was for {', '.join(sorted(FAMILIES))}"
        )
    names = ("hidden_activation", "hidden_act", "activation_function")
    activation = next(value for name in names if (value := getattr(config, name, None)))
    if activation not in family.activations:
        raise ExportError(f"llama.cpp's {family.arch!r} has no activation {activation!r}")
    return family


def extra_tensors(config: Any) -> dict[str, torch.Tensor]:
    """Tensors that are computed from the config: by what llama.cpp divides the frequencies of the positions."""
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return {}
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    slowed, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    width = _head_dim(config)
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, width, 2).double() / width)
    return {"rope_freqs.weight": (plain / slowed.double()).float()}


# ---------------------------------------------------------------------- what a file says of a model


def _decoder(writer: GGUFWriter, config: Any) -> None:
    """What all families with rotary positions and RMS norms say."""
    window = _window(config)
    length = config.max_position_embeddings
    writer.add_vocab_size(config.vocab_size)
    # llama.cpp has no window for these families: up to its width there is none either.
    writer.add_context_length(length if window is None else min(length, window))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(_kv_heads(config))
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(_head_dim(config))
    _add_rope(writer, _rope(config))


def _add_rope(writer: GGUFWriter, rope: Mapping[str, Any]) -> None:
    from gguf import RopeScalingType

    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        raise ExportError(f"positions that are stretched by {kind!r} cannot be written as GGUF here")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ExportError("a model that turns a part of its heads only cannot be written as GGUF here")
    writer.add_rope_freq_base(rope["rope_theta"])
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _qwen2(writer: GGUFWriter, config: Any) -> None:
    if _head_dim(config) * config.num_attention_heads != config.hidden_size:
        raise ExportError("llama.cpp's 'qwen2' has no heads that are wider or narrower than the hidden states")
    _decoder(writer, config)


def _gpt2(writer: GGUFWriter, config: Any) -> None:
    if config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights or config.add_cross_attention:
        raise ExportError("llama.cpp's 'gpt2' has no attention that is scaled by layers, unscaled, or crossed")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)


def _gemma2(writer: GGUFWriter, config: Any) -> None:
    _check_gemma(config, lambda layer: layer % 2 == 0)
    _decoder(writer, config)
    writer.add_sliding_window(config.sliding_window)
    if config.attn_logit_softcapping:
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _gemma3(writer: GGUFWriter, config: Any) -> None:
    _check_gemma(config, lambda layer: layer % 6 != 5)
    if config.attn_logit_softcapping or config.final_logit_softcapping:
        raise ExportError("a Gemma 3 with capped logits cannot be written as GGUF here")
    _decoder(writer, config)
    writer.add_sliding_window(config.sliding_window)
    writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])


def _check_gemma(config: Any, slides: Callable[[int], bool]) -> None:
    """Raise for what llama.cpp has as constants: which layers slide, how attention is scaled."""
    kinds = ["sliding_attention" if slides(layer) else "full_attention" for layer in range(config.num_hidden_layers)]
    if list(config.layer_types) != kinds:
        raise ExportError(f"llama.cpp has another order of sliding and full attention for {config.model_type}")
    if config.query_pre_attn_scalar != config.head_dim:
        raise ExportError("llama.cpp scales the attention by the width of a head, and this model does not")


def _rope(config: Any) -> dict[str, Any]:
    """The parameters of positions in layers with full attention."""
    parameters = dict(getattr(config, "rope_parameters", None) or {})
    return dict(parameters.get("full_attention", parameters))


def _window(config: Any) -> int | None:
    """The width beyond which tokens are no longer looked at, in families for which llama.cpp has no such thing.

    Raises:
        ExportError: if only some layers have one.
    """
    window = getattr(config, "sliding_window", None)
    if window is None or config.model_type.startswith("gemma") or not getattr(config, "use_sliding_window", True):
        return None
    return int(window)


def _kv_heads(config: Any) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


FAMILIES: dict[str, Family] = {
    "llama": Family("llama", _SILU, _decoder, biases=(*_QKV, "o_proj", *_MLP), interleaved=True),
    "mistral": Family("llama", _SILU, _decoder, interleaved=True),
    "qwen2": Family("qwen2", _SILU, _qwen2, biases=_QKV),
    "qwen3": Family("qwen3", _SILU, _decoder),
    "gpt2": Family("gpt2", _GELU_TANH, _gpt2, biases=("c_attn", "c_proj", "c_fc", "ln_1", "ln_2", "ln_f")),
    "gemma": Family("gemma", _GELU_TANH, _decoder, norm_offset=1.0),
    "gemma2": Family("gemma2", _GELU_TANH, _gemma2, norm_offset=1.0),
    "gemma3_text": Family("gemma3", _GELU_TANH, _gemma3, norm_offset=1.0),
}
"""``model_type`` of transformers → family."""

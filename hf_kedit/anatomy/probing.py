"""Running a model for a look at its insides: harmless inputs, the module to call, and everything put back after."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from ..errors import AnatomyError
from .structure import unwrap
from .switching import Switch, switched
from .types import Anatomy

_TOKENS = 8
# Largest relative error that counts as equal, by the coarsest dtype on the way.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def forward(model: nn.Module, anatomy: Anatomy, ids: torch.Tensor, *, hidden_states: bool = False) -> Any:
    """Run ``model`` on token ids ``[B, T]`` without a cache (both stacks read them, if there are two).

    Raises:
        AnatomyError: if it cannot be run on token ids alone.
    """
    runner = _runner(model, anatomy)
    accepted = _arguments(unwrap(runner))
    kwargs: dict[str, Any] = {"input_ids": ids}
    if "attention_mask" in accepted:
        kwargs["attention_mask"] = torch.ones_like(ids)
    if anatomy.is_encoder_decoder:
        kwargs["decoder_input_ids"] = ids
    if "use_cache" in accepted:
        kwargs["use_cache"] = False
    if hidden_states:
        kwargs["output_hidden_states"] = True
    elif "logits_to_keep" in accepted:
        kwargs["logits_to_keep"] = 1
    try:
        return runner(**kwargs)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError, NotImplementedError) as e:
        raise AnatomyError(
            f"{anatomy.model_class} could not be run on {ids.shape[0]} row(s) of {ids.shape[1]} token ids to"
            f" check its structure: {type(e).__name__}: {e}"
        ) from e


def _runner(model: nn.Module, anatomy: Anatomy) -> nn.Module:
    """The module to call: the model, or its language model if the whole cannot run on text alone (BLIP-2)."""
    prefix = "_orig_mod." if hasattr(model, "_orig_mod") else ""
    # Code compiled earlier would not see new hooks; the module it was compiled from does.
    model = getattr(model, "_orig_mod", model)
    parameters = inspect.signature(unwrap(model).forward).parameters.values()
    required = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if not [name for name in required if name != "input_ids"]:
        return model
    parts = anatomy.layers_path.removeprefix(prefix).split(".")
    for depth in range(1, len(parts)):
        inner = model.get_submodule(".".join(parts[:depth]))
        head_inside = anatomy.head is None or anatomy.head.startswith(prefix + ".".join(parts[:depth]) + ".")
        if head_inside and hasattr(inner, "get_input_embeddings") and "input_ids" in _arguments(inner):
            return inner
    return model


def _arguments(module: nn.Module) -> list[str]:
    return list(inspect.signature(module.forward).parameters)


def dense_weight(module: nn.Module) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Weight and bias where they are, whole and in their dtype; ``None`` for a weight that is packed."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if isinstance(weight, torch.Tensor) and weight.device.type == "meta":  # offloaded by accelerate
        weights_map = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if weights_map is None:
            raise AnatomyError(
                "the model has no weights (meta device): its structure can be resolved, but not checked"
            )
        weight, bias = weights_map["weight"], weights_map["bias"] if bias is not None else None
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point() or weight.dim() != 2:
        return None, None
    if hasattr(weight, "quant_state") or type(weight).__module__.startswith(("torchao", "hqq")):
        return None, None
    if hasattr(weight, "full_tensor"):
        weight = weight.full_tensor()
        bias = bias.full_tensor() if bias is not None and hasattr(bias, "full_tensor") else bias
    return weight.detach(), bias.detach() if isinstance(bias, torch.Tensor) else None


def wide_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Copy to the CPU in fp32 (fp64 stays fp64); a copy, because some models change their outputs in place."""
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return tensor.detach().to("cpu", wide, copy=True)


def tolerance_of(model: nn.Module) -> float:
    """Largest relative error that counts as equal in this model's coarsest dtype."""
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return max((_TOLERANCE.get(kind, 5e-2) for kind in kinds), default=1e-4)


def sample_ids(model: nn.Module, anatomy: Anatomy, input_ids: torch.Tensor | None) -> torch.Tensor:
    """Ids ``[1, T]`` on the embeddings' device: the given ones, or a few that are not special."""
    embeddings = model.get_submodule(anatomy.embeddings)
    weight = getattr(embeddings, "weight", None)
    device = weight.device if isinstance(weight, torch.Tensor) else torch.device("cpu")
    if device.type == "meta":
        offloaded = getattr(getattr(embeddings, "_hf_hook", None), "weights_map", None) is not None
        if not offloaded:
            raise AnatomyError(
                "the model has no weights (meta device): its structure can be resolved, but not checked"
            )
        device = torch.device(getattr(embeddings._hf_hook, "execution_device", "cpu"))
    if input_ids is not None:
        ids = input_ids if input_ids.dim() == 2 else input_ids[None]
        return ids[:1].to(device)
    size = int(getattr(embeddings, "num_embeddings", 0) or (weight.shape[0] if weight is not None else 0)) or 100
    special = _special_ids(getattr(unwrap(model), "config", None))
    usable = [i for i in range(min(size, 4 * _TOKENS + len(special) + 8)) if i not in special]
    picked = (usable[_TOKENS:] or usable)[:_TOKENS]
    return torch.tensor([picked], device=device)


def _special_ids(config: Any) -> set[int]:
    """Ids that make a model do something else than read a word: padding, end of text, image placeholders."""
    special_ids: set[int] = set()
    text = getattr(config, "text_config", None)
    for source in (config, text):
        for name, value in vars(source).items() if source is not None else ():
            if name.endswith(("token_id", "token_index", "_token_ids")):
                values = value if isinstance(value, (list, tuple)) else [value]
                special_ids |= {v for v in values if isinstance(v, int)}
    return special_ids


def evaluating(model: nn.Module) -> Switch[None]:
    """Evaluation mode inside a block; every module's flag is put back behind it."""
    training = [module for module in model.modules() if module.training]

    def flag(value: bool) -> None:
        for module in training:
            module.training = value

    return switched(lambda: flag(False), lambda: flag(True))

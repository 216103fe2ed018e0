"""The linear modules that a trained editor changes: which, of what size, and a digest of their weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..anatomy import resolve_anatomy
from ..anatomy.projections import as_projection
from ..engine.weights import get_module, get_weight, tensor_digest
from ..errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EDITED_BLOCKS = 3


def mlp_modules(model: PreTrainedModel, layers: Sequence[int] | None = None) -> list[str]:
    """Names of the matrices of the MLPs of some blocks, of both stacks if there are two.

    Args:
        model: transformers model.
        layers: the blocks; ``None``: the last three that have an MLP.
    """
    stacks = ["encoder", "decoder"] if model.config.is_encoder_decoder else ["decoder"]
    found = []
    for stack in stacks:
        anatomy = resolve_anatomy(model, stack=stack)  # type: ignore[arg-type]
        with_mlp = [layer.index for layer in anatomy.layers if layer.down is not None]
        for index in layers if layers is not None else with_mlp[-EDITED_BLOCKS:] or [anatomy.num_layers - 1]:
            block = anatomy.layer(index % anatomy.num_layers)
            found += [p.path for p in (*block.ups, anatomy.down(block.index))]
    return found


def matrix_sizes(model: PreTrainedModel, module: str) -> tuple[int, int]:
    """``(d_in, d_out)`` of a linear module.

    Raises:
        LayerError: if it does not exist.
        UnsupportedModelError: if it is not linear.
    """
    projection = as_projection(get_module(model, module), module)
    if projection is None:
        raise UnsupportedModelError(f"{module} is not a linear module; a trained editor changes linear modules")
    return projection.in_features, projection.out_features


def weight_digest(model: PreTrainedModel, module: str) -> str:
    """SHA-256 of the weight of a module."""
    return tensor_digest([("", get_weight(get_module(model, module)))])

"""The parts of a model that sees which are not its language model: what looks at pictures, and what joins both.

Found by names, because structure does not tell them apart: a projector is two matrices somewhere between two stacks.
The names are those of transformers.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from ..errors import UnsupportedModelError
from .projections import as_projection
from .types import Anatomy

ModuleScope = Literal["language", "connector", "vision"]
_CONNECTORS = frozenset(
    {"multi_modal_projector", "mm_projector", "projector", "connector", "merger", "deepstack_merger_list", "qformer"}
    | {"language_projection", "modality_projection", "perceiver_resampler"}
)
_TOWERS = frozenset({"vision_tower", "vision_model", "visual", "vision_encoder", "image_encoder"})
_HEADS = frozenset({"head", "visual_projection", "deepstack_merger_list"})
"""Matrices that a language model may not read: a tower's own pooling."""


def projections_of(model: nn.Module, anatomy: Anatomy, scope: ModuleScope) -> list[str]:
    """Names of the matrices of a part that is not the language model, in the order in which it keeps them.

    Raises:
        UnsupportedModelError: if the model has no such part.
    """
    found = []
    for path, module in model.named_modules():
        parts = path.split(".")
        if path.startswith(anatomy.layers_path + ".") or as_projection(module, path) is None:
            continue
        connects = not _CONNECTORS.isdisjoint(parts)
        looks = not connects and not _TOWERS.isdisjoint(parts) and _HEADS.isdisjoint(parts)
        if connects if scope == "connector" else looks:
            found.append(path)
    if not found:
        raise UnsupportedModelError(
            f"{anatomy.model_class} has no {scope} that hf_kedit knows; name the modules yourself (`modules`,"
            " `target_modules`)"
        )
    return found


def last_projections(model: nn.Module, anatomy: Anatomy, scope: ModuleScope) -> list[str]:
    """The last two matrices of a part through which pictures reach the language model.

    Of a Q-Former that is the way out of its last block for queries, and the projection behind it; of a projector or
    merger all that it has; of a tower the MLP of the last block that is read (LLaVA reads the last but one).

    Raises:
        UnsupportedModelError: if the model has no such part.
    """
    paths = projections_of(model, anatomy, scope)
    blocks = {path: number for path in paths if (number := _block(path)) is not None}
    if scope == "vision" and blocks:
        last, read = max(blocks.values()), _layer_read(model.config)
        wanted = last if read is None else read if read >= 0 else last + 1 + read
        paths = [path for path, number in blocks.items() if number == min(wanted, last)] or list(blocks)
    return [path for path in paths if ".output.dense" not in path][-2:]  # a Q-Former's way out for text


def _block(path: str) -> int | None:
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def _layer_read(config: Any) -> int | None:
    """Which block's output the language model reads, counted from 0, or from the end; ``None``: the last one's."""
    layer = getattr(config, "vision_feature_layer", None)
    if isinstance(layer, (list, tuple)):
        layer = layer[-1] if layer else None
    if not isinstance(layer, int):
        return None
    return layer if layer < 0 else layer - 1  # hidden states begin with the embeddings

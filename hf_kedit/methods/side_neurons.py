"""The site of methods that put neurons beside feed-forward layers: T-Patcher and CaliNet.

Nothing is routed: neurons act at every position of every row, with or without a cache, and are silent where their
activation is. Edits come and go in the groups in which they were trained, exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from torch import nn

from ..anatomy import Anatomy
from ..books.book import Saved
from ..books.site_book import SiteMemory, check_finite, register_memory
from ..books.sites import SiteCall, SiteFunction
from ..engine.activations import Activation, hidden_activation
from ..engine.devices import to_stay
from ..engine.neurons import FIELDS, NeuronGroup, joined, neuron_output, pack_groups, unpack_groups, without
from ..errors import ArtifactError, UnsupportedModelError

Groups = dict[str, tuple[NeuronGroup, ...]]
"""Per module, the groups of neurons beside it, oldest first."""


class SideNeurons(SiteMemory):
    """Groups of neurons beside one or several feed-forward layers.

    Args:
        paths: the layers.
        groups: per layer; every edit has one at each.
        activation: of the neurons.
    """

    method: ClassVar[str]

    def __init__(self, paths: Sequence[str], groups: Groups, activation: Activation):
        super().__init__(paths)
        self.groups, self.activation = groups, activation
        self._loaded: dict[str, tuple[tuple[NeuronGroup, ...], torch.device, NeuronGroup]] = {}

    # ------------------------------------------------------------------ at run time

    def functions(self) -> dict[str, SiteFunction]:
        """Add what the neurons say."""
        return dict.fromkeys(self.paths, self._add)

    def functions_with(self, new: Callable[[str], NeuronGroup]) -> dict[str, SiteFunction]:
        """The same with further neurons, given by layer: for training them."""

        def add(call: SiteCall) -> torch.Tensor:
            more = neuron_output(call.inputs, new(call.path), self.activation)
            return (self._add(call) + more).to(call.output.dtype)

        return dict.fromkeys(self.paths, add)

    def _add(self, call: SiteCall) -> torch.Tensor:
        groups = self.groups.get(call.path, ())
        if not groups:
            return call.output
        known, device = self._loaded.get(call.path), call.output.device
        if known is None or known[0] is not groups or known[1] != device:
            with to_stay():
                known = self._loaded[call.path] = (groups, device, joined(groups).to(device))
        return call.output + neuron_output(call.inputs, known[2], self.activation).to(call.output.dtype)

    # ------------------------------------------------------------------ books

    @property
    def edit_ids(self) -> list[str]:
        """Ids of the edits, oldest first."""
        return [i for g in self.groups.get(self.paths[0], ()) for i in g.edit_ids]

    def apply(self, batch_id: str, changes: Sequence[Mapping[str, NeuronGroup]], edit_ids: Sequence[str]) -> None:
        """Take over the neurons of a batch: one group per layer."""
        groups = dict(self.groups)
        for change in changes:
            for path, group in change.items():
                check_finite(f"neurons of {self.method}", *(t for f in FIELDS if (t := getattr(group, f)) is not None))
                groups[path] = (*groups.get(path, ()), replace(group.to("cpu"), edit_ids=tuple(edit_ids)))
        self.groups = groups

    def remove(self, edit_ids: Sequence[str]) -> None:
        """Take whole groups away."""
        self.groups = {path: without(groups, edit_ids, self.method) for path, groups in self.groups.items()}

    def snapshot(self) -> Groups:
        """The groups, which are immutable."""
        return self.groups

    def restore(self, snapshot: Groups) -> None:
        """Return to these groups."""
        self.groups = snapshot

    # ------------------------------------------------------------------ files

    def tensors(self) -> dict[str, torch.Tensor]:
        """All neurons of a layer side by side."""
        saved: dict[str, torch.Tensor] = {}
        for path, groups in self.groups.items():
            tensors, _ = pack_groups(groups)
            saved |= {f"{path}.kedit_{self.kind}_{name}": tensor for name, tensor in tensors.items()}
        return saved

    def describe(self) -> dict[str, Any]:
        """Which neurons belong to which edits, and which parts they have."""
        described = {}
        for path, groups in self.groups.items():
            tensors, entries = pack_groups(groups)
            described[path] = {"groups": entries, "parts": list(tensors)}
        return {"layers": described}

    @classmethod
    def read(cls, model: nn.Module, paths: Sequence[str], part: Mapping[str, Any], saved: Saved) -> Self:
        """Rebuild from a saved edit."""
        groups: Groups = {}
        for path in paths:
            entry = part["layers"][path]
            shapes = {name: (None,) if name == "bias" else (None, None) for name in entry["parts"]}
            if not {"keys", "values"} <= set(shapes) <= set(FIELDS):
                raise ArtifactError(f"{saved.source}: {path} has no valid neurons")
            tensors = {n: saved.tensor(f"{path}.kedit_{cls.kind}_{n}", shape) for n, shape in shapes.items()}
            groups[path] = unpack_groups(tensors, entry["groups"])
        return cls(paths, groups, hidden_activation(model))


@register_memory
class Patches(SideNeurons):
    """T-Patcher's neurons."""

    kind = "tpatch"
    method = "T-Patcher"


@register_memory
class Calibration(SideNeurons):
    """CaliNet's side layers."""

    kind = "calinet"
    method = "CaliNet"


def mlp_path(anatomy: Anatomy, layer: int, method: str) -> str:
    """Name of a layer's feed-forward module.

    Raises:
        UnsupportedModelError: if the layer keeps its matrices without such a module around them (OPT).
    """
    path = anatomy.layer(layer).mlp
    if path is None:
        raise UnsupportedModelError(
            f"layer {layer} of {anatomy.model_class} has no feed-forward module of its own, beside which {method}"
            " could put neurons"
        )
    return path

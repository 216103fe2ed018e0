"""Neurons beside a feed-forward layer: ``FFN'(x) = FFN(x) + [act(K x + b) ⊙ (G x)] V``.

T-Patcher adds a few per edit, CaliNet a block per batch of edits. Each group belongs to the edits that it was trained
for, and taking the group away takes these edits back exactly. This module knows no method.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import RollbackError
from .activations import Activation

FIELDS = ("keys", "values", "bias", "gates", "queries")


@dataclass(frozen=True, eq=False)
class NeuronGroup:
    """Neurons that were trained together.

    Args:
        edit_ids: the edits that they hold.
        keys: K ``[n, H]`` fp32.
        values: V ``[n, H]`` fp32.
        bias: b ``[n]`` fp32; ``None``: no bias.
        gates: G ``[n, H]`` fp32; ``None``: not gated.
        queries: the inputs that the neurons were made for, ``[n, H]`` fp32, where a method needs them later.
    """

    edit_ids: tuple[str, ...]
    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor | None = None
    gates: torch.Tensor | None = None
    queries: torch.Tensor | None = None

    def __post_init__(self) -> None:
        n = len(self.keys)
        rows = [t for t in (self.values, self.gates, self.queries) if t is not None]
        if any(t.shape != self.keys.shape for t in rows) or len(self.keys if self.bias is None else self.bias) != n:
            raise ValueError("the parts of a group of neurons must be of one length")

    @property
    def count(self) -> int:
        """Number of neurons."""
        return len(self.keys)

    def to(self, device: torch.device | str) -> NeuronGroup:
        """The group on a device."""
        parts: dict[str, Any] = {name: None if (t := getattr(self, name)) is None else t.to(device) for name in FIELDS}
        return NeuronGroup(self.edit_ids, **parts)

    def detached(self) -> NeuronGroup:
        """The group without the graph that its tensors were computed in."""
        parts: dict[str, Any] = {n: None if (t := getattr(self, n)) is None else t.detach() for n in FIELDS}
        return NeuronGroup(self.edit_ids, **parts)


def neuron_output(x: torch.Tensor, group: NeuronGroup, activation: Activation) -> torch.Tensor:
    """What a group adds to the layer's output.

    Args:
        x: what enters the feed-forward layer, ``[..., H]``.
        group: on the same device.
        activation: act.

    Returns:
        ``[..., H]`` fp32.
    """
    x = x.to(group.keys.dtype)
    active = activation(torch.nn.functional.linear(x, group.keys, group.bias))
    if group.gates is not None:
        active = active * (x @ group.gates.T)
    return active @ group.values


def joined(groups: Sequence[NeuronGroup]) -> NeuronGroup:
    """All neurons as one group; the groups must have the same parts."""
    parts: dict[str, torch.Tensor | None] = {}
    for name in FIELDS:
        tensors = [t for g in groups if (t := getattr(g, name)) is not None]
        parts[name] = torch.cat(tensors) if tensors else None
    edits = tuple(i for g in groups for i in g.edit_ids)
    keys, values = parts["keys"], parts["values"]
    assert keys is not None and values is not None
    return NeuronGroup(edits, keys, values, parts["bias"], parts["gates"], parts["queries"])


def without(groups: Sequence[NeuronGroup], edit_ids: Collection[str], method: str) -> tuple[NeuronGroup, ...]:
    """The groups that are left when edits go.

    Args:
        groups: of one layer.
        edit_ids: which edits go.
        method: name for the message.

    Raises:
        RollbackError: if a group holds edits that go and edits that stay.
    """
    gone = set(edit_ids)
    for group in groups:
        mine = [i for i in group.edit_ids if i in gone]
        if mine and len(mine) < len(group.edit_ids):
            raise RollbackError(
                f"{method} trained the edits {', '.join(group.edit_ids)} together; {', '.join(mine)} cannot be taken"
                " out alone. Roll the whole batch back, or use rebuild_without(edit_id), which makes the others again."
            )
    return tuple(g for g in groups if not gone & set(g.edit_ids))


def pack_groups(groups: Sequence[NeuronGroup]) -> tuple[dict[str, torch.Tensor], list[dict[str, object]]]:
    """Tensors by part (``keys``, ``values`` …) and one JSON-ready entry per group."""
    whole = joined(groups)
    tensors = {name: t.cpu().contiguous() for name in FIELDS if (t := getattr(whole, name)) is not None}
    return tensors, [{"edits": list(g.edit_ids), "neurons": g.count} for g in groups]


def unpack_groups(
    tensors: Mapping[str, torch.Tensor], entries: Sequence[Mapping[str, object]]
) -> tuple[NeuronGroup, ...]:
    """What `pack_groups` was given.

    Raises:
        ValueError: if counts and tensors do not fit.
    """
    groups, start = [], 0
    for entry in entries:
        stop = start + int(str(entry["neurons"]))
        parts = {name: tensors[name][start:stop].clone() for name in FIELDS if name in tensors}
        edits = entry["edits"]
        if not isinstance(edits, list) or not all(isinstance(i, str) for i in edits):
            raise ValueError("a group of neurons names no edits")
        groups.append(NeuronGroup(tuple(edits), **parts))
        start = stop
    if any(len(t) != start for t in tensors.values()):
        raise ValueError("the neurons are not as many as their description says")
    return tuple(groups)

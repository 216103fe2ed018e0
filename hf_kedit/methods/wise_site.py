"""WISE: the edited layer at run time. Routes every row by its prompt, and keeps the memories in files.

The distance of a row to a memory is the mean over the real tokens of its prompt. Of the memories whose distance
reaches their threshold the farthest one answers; rows without any get the layer's own output, bit for bit. Where a
row goes is decided once, when its whole prompt is read, and held for the tokens that are generated after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import nn

from ..books.book import Saved
from ..books.site_book import SiteMemory, check_finite, register_memory
from ..books.sites import SiteCall, SiteFunction, held_decision, needs_whole_prompt
from ..engine.activations import Activation, activation_distance, hidden_activation, mean_over_tokens
from ..engine.devices import to_stay
from ..engine.sparse import SparseMatrix
from ..engine.weights import get_module, get_weight
from ..errors import ArtifactError
from .wise_memory import Member, Memory, Policy, WiseMemories, choose_memory
from .wise_training import side_change

MAIN_MEMORY = -1


@dataclass(frozen=True)
class TrainedEdit:
    """What `WISE.compute` hands over: an edit without its id, its shard after training, see `WiseMemories.side`."""

    prompt: str
    target: str
    separator: str | None
    activation: float
    delta: torch.Tensor
    mask: torch.Tensor
    drawn: int


@register_memory
class WiseSite(SiteMemory):
    """The side memories of one linear layer.

    Args:
        path: the layer.
        state: its memories.
        activation: σ; ``None`` compares outputs as they are.
    """

    kind = "wise"

    def __init__(self, path: str, state: WiseMemories, activation: Activation | None):
        super().__init__([path])
        self.state, self.activation = state, activation
        self._loaded: tuple[WiseMemories, torch.device, list[torch.Tensor]] | None = None

    @property
    def path(self) -> str:
        """The layer."""
        return self.paths[0]

    # ------------------------------------------------------------------ at run time

    def functions(self) -> dict[str, SiteFunction]:
        """Route and answer."""
        return {self.path: self._answer}

    def _answer(self, call: SiteCall) -> torch.Tensor | None:
        frame = call.frame
        if frame.phase == "decode":
            routes = held_decision(frame, self.key)
            if routes is None:
                return None
        elif needs_whole_prompt(frame, "WISE"):
            routes = frame.held[self.key] = self.route(call)
        else:
            return None
        return self._output(call, routes)

    def route(self, call: SiteCall) -> torch.Tensor:
        """Which candidate answers each row, ``[rows]``, `MAIN_MEMORY` for none."""
        policy = self.state.policy
        distances = torch.stack([d.to(call.output.device) for d in self.distances(call)])
        side = len(distances) - 1 if policy.reference_routing and policy.retrieve and self.state.unmerged else None
        return choose_memory(distances, [c.threshold for c in self.state.candidates], side=side)

    def distances(self, call: SiteCall) -> list[torch.Tensor]:
        """Distance of each row's prompt to each candidate, ``[rows]`` each."""
        mask = call.frame.prompt_mask
        means = []
        for delta in self._deltas(call.output.device):
            changed = call.output + side_change(call.inputs, delta)
            means.append(mean_over_tokens(activation_distance(changed, call.output, self.activation), mask))
        return means

    def _output(self, call: SiteCall, routes: torch.Tensor) -> torch.Tensor | None:
        """The layer's output, with the rows that have a memory answered by it; ``None`` where no row has."""
        output = None
        for number, delta in enumerate(self._deltas(call.output.device)):
            rows = (routes == number).nonzero().squeeze(1)
            if len(rows):
                answer = call.output[rows] + side_change(call.inputs[rows], delta)
                output = (call.output if output is None else output).index_copy(0, rows, answer)
        return output

    def _deltas(self, device: torch.device) -> list[torch.Tensor]:
        """The candidates' changes on a device; loaded anew when the state has changed."""
        if self._loaded is None or self._loaded[0] is not self.state or self._loaded[1] != device:
            with to_stay():
                self._loaded = (self.state, device, [c.delta.to(device) for c in self.state.candidates])
        return self._loaded[2]

    # ------------------------------------------------------------------ books

    @property
    def edit_ids(self) -> list[str]:
        """Ids of the edits, oldest first."""
        return [m.edit_id for m in self.state.members]

    def apply(self, batch_id: str, changes: Sequence[TrainedEdit], edit_ids: Sequence[str]) -> None:
        """Take over trained edits."""
        state = self.state
        for edit, edit_id in zip(changes, edit_ids, strict=True):
            check_finite("side memory of WISE", edit.delta)
            member = Member(edit_id, edit.activation, edit.prompt, edit.target, edit.separator)
            state = state.with_edit(member, edit.delta, edit.mask, edit.drawn)
        self.state = state

    def remove(self, edit_ids: Sequence[str]) -> None:
        """Drop whole shards and memories."""
        self.state = self.state.without(edit_ids)

    def snapshot(self) -> WiseMemories:
        """The state, which is immutable."""
        return self.state

    def restore(self, snapshot: WiseMemories) -> None:
        """Return to a state."""
        self.state = snapshot

    # ------------------------------------------------------------------ files

    def tensors(self) -> dict[str, torch.Tensor]:
        """Bits and values of every memory and shard, and the open shard's mask."""
        tensors = {}
        for name, part in zip(self._names(self.state), self.state.parts, strict=True):
            tensors[f"{name}_bits"], tensors[f"{name}_values"] = part.delta.bits, part.delta.values
        if self.state.mask is not None:
            tensors[f"{self.path}.kedit_wise_mask"] = self.state.mask
        return tensors

    def _names(self, state: WiseMemories) -> list[str]:
        counted = [(state.memories, "memory"), (state.shards, "shard")]
        names = [f"{self.path}.kedit_wise_{kind}_{i}" for parts, kind in counted for i in range(len(parts))]
        return [*names, *([f"{self.path}.kedit_wise_side"] if state.open else [])]

    def describe(self) -> dict[str, Any]:
        """Policy, and which edits lie where."""

        def edits(parts: Sequence[Memory]) -> list[list[dict[str, Any]]]:
            return [[{k: v for k, v in asdict(m).items() if v is not None} for m in part.members] for part in parts]

        state = self.state
        return {
            "policy": asdict(state.policy),
            "memories": edits(state.memories),
            "shards": edits(state.shards),
            "open": edits([state.open])[0] if state.open else None,
            "masks_drawn": state.drawn,
        }

    @classmethod
    def read(cls, model: nn.Module, paths: Sequence[str], part: Mapping[str, Any], saved: Saved) -> Self:
        """Rebuild from a saved edit."""
        (path,) = paths
        weight = get_weight(get_module(model, path))
        shape = (weight.shape[0], weight.shape[1])
        policy = Policy(**part["policy"])

        def memory(name: str, members: Sequence[Mapping[str, Any]]) -> Memory:
            name = f"{path}.kedit_wise_{name}"
            bits = saved.tensor(f"{name}_bits", (-(-weight.numel() // 8),), torch.uint8)
            values = saved.tensor(f"{name}_values", (None,))
            matrix = SparseMatrix(shape, bits.cpu(), values.cpu())
            if not members or matrix.count != len(values):
                raise ArtifactError(f"{saved.source}: {name} does not hold what its description says")
            return Memory(matrix, tuple(Member(**m) for m in members))

        memories = tuple(memory(f"memory_{i}", m) for i, m in enumerate(part["memories"]))
        shards = tuple(memory(f"shard_{i}", m) for i, m in enumerate(part["shards"]))
        open_shard = memory("side", part["open"]) if part["open"] else None
        mask = saved.tensor(f"{path}.kedit_wise_mask", shape, torch.bool).cpu() if open_shard else None
        state = WiseMemories(policy, memories, shards, open_shard, mask, int(part["masks_drawn"]))
        if not state.parts:
            raise ArtifactError(f"{saved.source}: {path} holds no WISE edit")
        activation = None if not policy.act_on_output else hidden_activation(model)
        return cls(path, state, activation)

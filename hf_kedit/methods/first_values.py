"""The values that the first pass of a joint solve starts from, kept for the solves to come (`joint`).

They belong to the original model, so that they change neither with the other facts nor with what is solved for. What
they do depend on (the fact, the settings of the value optimisation, the contexts) is in the names that they go by.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..requests import EditRequest

_STATE = "joint."


def content_key(request: EditRequest) -> str:
    """A hash of what a request asks for: equal for equal facts, whatever their ids, notes and probes."""
    content: list[object] = [request.prompt, request.subject, request.target_new, request.ground_truth]
    if request.prompt_format is not None:
        content += [request.prompt_format, request.messages]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode("utf-8")).hexdigest()


@dataclass(frozen=True)
class FirstValue:
    """What the first pass has found for one fact.

    Args:
        offset: δ at the value places, ``[places, d]`` fp32 on the CPU.
        probability: of the target on the bare prompt, before and with δ.
    """

    offset: torch.Tensor
    probability: tuple[float, float]


class FirstValues:
    """The values of the first pass that are known, by a hash of fact, settings and contexts."""

    def __init__(self) -> None:
        self._known: dict[str, FirstValue] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def __getitem__(self, name: str) -> FirstValue:
        return self._known[name]

    def __setitem__(self, name: str, value: FirstValue) -> None:
        self._known[name] = value

    def keep(self, names: Sequence[str]) -> None:
        """Forget the others."""
        wanted = set(names)
        self._known = {name: value for name, value in self._known.items() if name in wanted}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All of them as tensors, in the order of their names."""
        if not self._known:
            return {}
        names = sorted(self._known)
        return {
            _STATE + "names": torch.tensor([list(bytes.fromhex(name)) for name in names], dtype=torch.uint8),
            _STATE + "offsets": torch.stack([self._known[name].offset for name in names]),
            _STATE + "probabilities": torch.tensor([self._known[n].probability for n in names], dtype=torch.float64),
        }

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            ValueError: if the tensors do not belong together.
        """
        self._known = {}
        if not state:
            return
        names, offsets, probabilities = (state.get(_STATE + part) for part in ("names", "offsets", "probabilities"))
        if names is None or offsets is None or probabilities is None or len(state) != 3:
            raise ValueError(f"unknown parts: {', '.join(sorted(state))}")
        count = len(names)
        if names.shape != (count, 32) or offsets.dim() != 3 or len(offsets) != count:
            raise ValueError("shapes that do not fit")
        if probabilities.shape != (count, 2) or not bool(torch.isfinite(offsets).all()):
            raise ValueError("values that are not finite, or too few probabilities")
        for name, offset, (before, after) in zip(names.tolist(), offsets, probabilities.tolist(), strict=True):
            self._known[bytes(name).hex()] = FirstValue(offset.float().cpu().clone(), (before, after))

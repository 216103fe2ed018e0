"""DEFER, the gated baseline of GRACE (Hartvigsen et al. 2023, arXiv 2211.11031, after Mitchell et al. 2022, SERAC,
arXiv 2206.06520, without its retrieval).

Beside one linear layer stand a gate and a linear map, both fed with the layer's input q at the key token, the last
token of the prompt:

    g = σ(w·q + b)        v = W q + c
    while editing   the output of every position is  g·v + (1 − g)·(the layer's own)
    afterwards      it is v where g ≥ threshold, else the layer's own, bit for bit

Both are trained on the likelihood of the target; nothing supervises the gate. All edits share them, so later edits
overwrite earlier ones. It is here to be compared with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import nn

from ..books.book import Saved
from ..books.site_book import SiteEntry, SiteMemory, check_finite, register_memory
from ..books.sites import SiteCall, SiteFunction, held_decision, needs_whole_prompt
from ..config import ModelProfile
from ..config.spaces import layer_windows, times
from ..engine.devices import to_stay
from ..engine.examples import Example
from ..engine.weights import compute_device, get_module, weight_shape
from ..errors import ConfigError, RollbackError
from ..requests import EditRequest
from .base import Capabilities, Outcome, register_method
from .site_method import SiteConfig, SiteMethod, before_and_after, check_loss


@dataclass
class DEFERConfig(SiteConfig):
    """Hyperparameters of DEFER.

    Args:
        num_steps: Adam steps per edit; the optimiser starts afresh with each.
        lr: of Adam.
        threshold: the gate's value from which the layer defers to the map.
        key_token: where the gate looks while editing: ``prompt``: at the last token of the prompt, as afterwards;
            ``sequence``: at the last token of prompt and target, as other implementations do.
        seed: of the initial parameters.
    """

    edit_type: ClassVar[str] = "defer"

    num_steps: PositiveInt = 100
    lr: PositiveFloat = 7e-5
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    key_token: Literal["prompt", "sequence"] = "prompt"
    seed: int = 0

    def search_space(self, profile: ModelProfile, traced: Sequence[int]) -> dict[str, list[Any]]:
        """Which layer defers, how its map is trained, and when."""
        return {
            "layers": layer_windows(profile, self.layers, traced),
            "lr": times(self.lr, 10.0, 100.0),
            "num_steps": [30, 200],
            "threshold": [0.8, 0.95],
        }

    def derive(self, profile: ModelProfile) -> dict[str, Any]:
        """Most of the way up the stack, as in the published configurations."""
        return {"layers": [min(round(0.85 * profile.num_layers), max(profile.num_layers - 2, 0))]}


class Network(NamedTuple):
    """Gate and map.

    Attributes:
        gate_weight: w, ``[1, d_in]``.
        gate_bias: b, ``[1]``.
        value_weight: W, ``[d_out, d_in]``.
        value_bias: c, ``[d_out]``.
    """

    gate_weight: torch.Tensor
    gate_bias: torch.Tensor
    value_weight: torch.Tensor
    value_bias: torch.Tensor

    def __call__(self, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gate ``[rows]`` and value ``[rows, d_out]`` of queries ``[rows, d_in]``."""
        gate = torch.sigmoid(F.linear(queries, self.gate_weight, self.gate_bias))[:, 0]
        return gate, F.linear(queries, self.value_weight, self.value_bias)

    def to(self, device: torch.device) -> Network:
        """The network on a device."""
        return Network(*(t.to(device) for t in self))


@register_memory
class Deferral(SiteMemory):
    """Gate and map at one linear layer.

    Args:
        path: name of the layer.
        threshold: the gate's value from which the layer defers.
        network: gate and map; replaced as a whole by every edit.
    """

    kind = "defer"

    def __init__(self, path: str, threshold: float, network: Network):
        super().__init__([path])
        self.threshold = threshold
        self.network = network
        self.edits: tuple[str, ...] = ()

    @property
    def edit_ids(self) -> list[str]:
        """Ids of all edits in the network."""
        return list(self.edits)

    def functions(self) -> dict[str, SiteFunction]:
        """Defers at its layer."""
        return {self.paths[0]: self._defer}

    def _defer(self, call: SiteCall) -> torch.Tensor | None:
        frame = call.frame
        if needs_whole_prompt(frame, "DEFER"):
            with to_stay():
                self.network = self.network.to(call.inputs.device)
            gate, value = self.network(call.at_key(call.inputs).float())
            frame.held[self.key] = gate >= self.threshold, value
        elif frame.phase != "decode":
            return None
        decision = held_decision(frame, self.key)
        if decision is None:
            return None
        deferred, value = decision
        return torch.where(deferred[:, None, None], value.to(call.output)[:, None], call.output)

    def apply(self, batch_id: str, changes: Sequence[Network], edit_ids: Sequence[str]) -> None:
        """Take over the network after one edit."""
        (network,) = changes
        check_finite("gate and values", *network)
        self.network = network
        self.edits = (*self.edits, *edit_ids)

    def remove(self, edit_ids: Sequence[str]) -> None:
        """Single edits cannot be taken out of a network that all share."""
        raise RollbackError(
            f"DEFER's edits at {self.paths[0]} share one network and cannot be taken apart: roll all of them back"
            f" ({len(self.edits)}), or use rebuild_without(edit_id), which makes the others again"
        )

    def snapshot(self) -> Any:
        """The present state."""
        return self.network, self.edits

    def restore(self, snapshot: Any) -> None:
        """Return to an earlier state."""
        self.network, self.edits = snapshot

    def tensors(self) -> dict[str, torch.Tensor]:
        """The parameters."""
        return {f"{self.paths[0]}.kedit_defer_{name}": t for name, t in self.network._asdict().items()}

    def describe(self) -> dict[str, Any]:
        """Threshold and edits."""
        return {"threshold": self.threshold, "edits": list(self.edits)}

    @classmethod
    def read(cls, model: nn.Module, paths: Sequence[str], part: Mapping[str, Any], saved: Saved) -> Self:
        """Rebuild the network; see `SiteMemory.read`."""
        (path,) = paths
        d_out, d_in = weight_shape(get_module(model, path))
        shapes = [(1, d_in), (1,), (d_out, d_in), (d_out,)]
        names = [f"{path}.kedit_defer_{name}" for name in Network._fields]
        network = Network(*(saved.tensor(name, shape) for name, shape in zip(names, shapes, strict=True)))
        deferral = cls(path, float(part["threshold"]), network)
        deferral.edits = tuple(map(str, part["edits"]))
        return deferral


@register_method
class DEFER(SiteMethod):
    """Edits in a gated linear map beside a layer."""

    pictures = True
    config_class = DEFERConfig
    capabilities = Capabilities(
        name="DEFER",
        kind="adapter",
        batch=False,
        sequential=True,
        needs_subject=False,
        low_rank=False,
        undo="all",
        paper="Hartvigsen et al. 2023, arXiv 2211.11031 (baseline)",
        summary="a gate that defers to a trained linear map beside one layer; edits share it and overwrite each other",
    )
    config: DEFERConfig

    def check(self, requests: Sequence[EditRequest]) -> None:
        """Check the layer, the network that is there, tokens and lengths."""
        super().check(requests)
        self._deferral()

    def _deferral(self) -> Deferral:
        """The network at this layer, or a new one."""
        deferral = self.bench.sites.find(f"{Deferral.kind}@{self.path}")
        if deferral is None:
            return Deferral(self.path, self.config.threshold, self.initial_network(*self.sizes(self.path)))
        assert isinstance(deferral, Deferral)
        if deferral.threshold != self.config.threshold:
            raise ConfigError(
                f"the edits at {self.path} were begun with threshold={deferral.threshold}; go on with it, or roll them"
                " back first"
            )
        return deferral

    def initial_network(self, d_in: int, d_out: int) -> Network:
        """Uniform in ±1/√d_in, as linear layers are made."""
        generator = torch.Generator().manual_seed(self.config.seed)
        shapes = [(1, d_in), (1,), (d_out, d_in), (d_out,)]
        return Network(*((torch.rand(shape, generator=generator) * 2 - 1) * d_in**-0.5 for shape in shapes))

    def compute(self, requests: Sequence[EditRequest]) -> Outcome:
        """Train gate and map on one request."""
        examples = self.examples(requests)
        memory = self._deferral()
        before = self.probabilities(examples)
        network, losses = self._train(examples, memory)
        trained = Deferral(self.path, self.config.threshold, network)
        with self.bench.sites.trying(trained.functions(), instead_of=memory):
            after = self.probabilities(examples)
        return Outcome([], before_and_after(before, after, losses), [SiteEntry(memory, network)])

    def _train(self, examples: Sequence[Example], memory: Deferral) -> tuple[Network, list[float]]:
        """Adam on gate and map; returns them and the loss of every step."""
        config = self.config
        start = memory.network.to(compute_device(get_module(self.bench.model, self.path)))
        network = Network(*(t.detach().clone().requires_grad_(True) for t in start))
        optimiser = torch.optim.Adam(list(network), lr=config.lr)
        losses: list[float] = []

        def blended(call: SiteCall) -> torch.Tensor:
            gate, value = network(call.at_key(call.inputs).float())
            share = gate[:, None, None]
            return (share * value[:, None] + (1 - share) * call.output).to(call.output.dtype)

        rows = list(examples)
        if config.key_token == "sequence":  # all of it counts as the prompt
            rows = [replace(e, ids=(*e.ids, e.targets[-1])) for e in rows]
        score = self.scorer(rows, whole=config.key_token == "sequence")
        with self.bench.sites.trying({self.path: blended}, instead_of=memory):
            for _ in range(config.num_steps):
                loss = score().mean()
                losses.append(check_loss(loss, "DEFER"))
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        self.bench.note("losses", torch.tensor(losses))
        return Network(*(t.detach() for t in network)), losses

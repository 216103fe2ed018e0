"""MALMEN (Tan et al. 2024, "Massive Editing for Large Language Models via Meta Learning", arXiv 2311.04661).

Like MEND, a network transforms what each token says about a linear module: its key k (the input) and the gradient g at
the output. But instead of adding up outer products, which cancel when there are many, MALMEN takes from the network
how every key's output should move,

    (k̃_j, ĝ_j) = h(k_j, g_j),      d_j = −η (k_j · k̃_j) ĝ_j                              (section 3.2)

and finds the change that does this best for all tokens together, by least squares with a trained ridge λ:

    S = (KᵀK + λI)⁻¹ Kᵀ D = Kᵀ C,      C = (KKᵀ + λI)⁻¹ D,      ΔW = Sᵀ                   (equation 5)

Training is decoupled: the losses are followed to S batch by batch, each graph of the language model is freed at once,
and the gradient at S is carried to the network in closed form (section 3.3). The memory of a step does not grow with
the number of facts, but for their keys and gradients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..editors.editor import Editor, EditorConfig, register_editor
from ..editors.output import EditorOutput
from ..editors.running_norm import DEAD, RunningNorm
from ..engine.gradients import LowRank, Rows
from ..engine.supervised import Batch, rows_of
from ..errors import ConfigError
from ..statistics.solve import ridge_solve
from .base import Capabilities, register_method
from .trained_editor import HyperMethod

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class MALMENConfig(EditorConfig):
    """Hyperparameters of MALMEN.

    The gradients are those of the mean loss of each forward pass, so ``micro_batch`` must be the same in training and
    in use; it is kept with the editor.

    Args:
        rank: of the residual layers; at most the size of their input.
        num_blocks: number of residual layers.
        edit_lr: η of every module at the start.
        ridge: λ of every module at the start.
        token: the tokens that count: those that predict the answer, or all of prompt and answer.
        rows: tokens that pass the network together, which bounds the memory of the backward pass.
        dead_std: components of k and g with a smaller deviation are ignored; 0 as published.
    """

    edit_type: ClassVar[str] = "malmen"

    edit_weight: NonNegativeFloat = 1.0
    locality_at: Literal["all", "answer"] = "answer"
    rank: PositiveInt = 1920
    num_blocks: PositiveInt = 2
    edit_lr: PositiveFloat = 1e-6
    ridge: PositiveFloat = 1.0
    token: Literal["answer", "attended"] = "answer"
    rows: PositiveInt = 1024
    dead_std: NonNegativeFloat = DEAD


class ResidualBlock(nn.Module):
    """``x + scale_i ⊙ max(0, x A B + b) + shift_i``, the identity at the start.

    Args:
        size: d.
        rank: of A B.
        modes: number of modules that share the block.
    """

    def __init__(self, size: int, rank: int, modes: int):
        super().__init__()
        rank = min(rank, size)
        self.a = nn.Parameter(torch.randn(size, rank))
        self.b = nn.Parameter(torch.zeros(rank, size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.scale = nn.Parameter(torch.ones(modes, size))
        self.shift = nn.Parameter(torch.zeros(modes, size))

    def forward(self, x: torch.Tensor, mode: int) -> torch.Tensor:
        """Transform rows ``[n, size]`` of the module with index ``mode``."""
        change = (x @ self.a @ self.b + self.bias).clamp(min=0)  # clamp lets the gradient pass at 0
        return x + self.scale[mode] * change + self.shift[mode]


class KeyGradientNet(nn.Module):
    """h with the trained η and λ of the modules of one shape.

    Args:
        d_in: size of a key.
        d_out: size of a gradient.
        modes: number of modules.
        config: of the editor.
    """

    def __init__(self, d_in: int, d_out: int, modes: int, config: MALMENConfig):
        super().__init__()
        self.sizes = (d_in, d_out)
        self.norm = RunningNorm(d_in + d_out, config.dead_std, eps=torch.finfo(torch.float32).eps)
        self.blocks = nn.ModuleList(ResidualBlock(d_in + d_out, config.rank, modes) for _ in range(config.num_blocks))
        self.eta = nn.Parameter(torch.full((modes,), config.edit_lr))
        self.log_ridge = nn.Parameter(torch.full((modes,), config.ridge).log())

    def predict(self, k: torch.Tensor, g: torch.Tensor, mode: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (k̃, ĝ) of rows ``[n, d_in]`` and ``[n, d_out]``."""
        x = self.norm.standardise(torch.cat([k, g], dim=1))
        for block in self.blocks:
            x = block(x, mode)
        turned = x.split(self.sizes, dim=1)
        return turned[0], turned[1]

    def forward(self, k: torch.Tensor, g: torch.Tensor, mode: int) -> torch.Tensor:
        """How the output of each key should move, D ``[n, d_out]``."""
        with torch.autocast(k.device.type, enabled=False):
            k_new, g_new = self.predict(k, g, mode)
            return -self.eta[mode] * (k * k_new).sum(1, keepdim=True) * g_new


@register_editor
class MALMENEditor(Editor):
    """The networks, step sizes and ridges of MALMEN for some modules of one model."""

    config_class = MALMENConfig
    edit_config: MALMENConfig

    def __init__(self, config: MALMENConfig, shapes: Mapping[str, tuple[int, int]], *, encoder_decoder: bool = False):
        super().__init__(config, shapes, encoder_decoder=encoder_decoder)
        self._place: dict[str, tuple[str, int]] = {}
        for module, shape in self.shapes.items():
            key = f"{shape[0]}x{shape[1]}"
            self._place[module] = (key, sum(k == key for k, _ in self._place.values()))
        self.nets = nn.ModuleDict()
        for module, (key, mode) in self._place.items():
            if mode == 0:
                members = sum(k == key for k, _ in self._place.values())
                self.nets[key] = KeyGradientNet(*self.shapes[module], members, config)

    def net(self, module: str) -> tuple[KeyGradientNet, int]:
        """The network of a module, and the module's index in it."""
        key, mode = self._place[module]
        net = self.nets[key]
        assert isinstance(net, KeyGradientNet)
        return net, mode

    def step_sizes(self) -> list[nn.Parameter]:
        """η of every module."""
        return [net.eta for net in self.nets.values() if isinstance(net, KeyGradientNet)]

    # ------------------------------------------------------------------ proposing

    def propose(self, model: PreTrainedModel, edit: Batch, groups: torch.Tensor) -> dict[str, LowRank]:
        """The least-squares change of each group of facts; without gradients, see `forward`."""
        changes: dict[str, list[LowRank]] = {module: [] for module in self.shapes}
        for group in groups.unique():
            facts = (groups == group).nonzero()[:, 0]
            rows = self.observe(model, rows_of(edit, facts))
            for module, change in self.solve(rows).items():
                changes[module].append(dataclasses.replace(change, owners=facts[change.owners]))
        return {
            module: LowRank(
                torch.cat([p.left for p in parts], dim=1),
                torch.cat([p.right for p in parts], dim=1),
                torch.cat([p.owners for p in parts]),
            )
            for module, parts in changes.items()
        }

    def observe(self, model: PreTrainedModel, edit: Batch) -> dict[str, Rows]:
        """Keys and gradients of facts that are edited together; in training, the statistics count them."""
        together = torch.zeros_like(edit["labels"][:, 0])
        rows = self.collect(model, edit, together, "chunk_mean", self.edit_config.token)
        for module, signal in rows.items():
            net, _ = self.net(module)
            if net.norm.training:
                net.norm.update(torch.cat([signal.inputs, signal.gradients], dim=1))
        return rows

    @torch.no_grad()
    def solve(self, rows: Mapping[str, Rows]) -> dict[str, LowRank]:
        """``ΔW = Cᵀ K`` of every module."""
        changes = {}
        for module, signal in rows.items():
            net, mode = self.net(module)
            parts = zip(*self._split(signal), strict=True)
            moves = torch.cat([net(k, g, mode) for k, g in parts])
            c = ridge_solve(signal.inputs, net.log_ridge[mode].exp(), moves).float()
            changes[module] = LowRank(c.T, signal.inputs.T, signal.owners)
        return changes

    def _split(self, rows: Rows) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        size = self.edit_config.rows
        return rows.inputs.split(size), rows.gradients.split(size)

    # ------------------------------------------------------------------ training

    def forward(self, edit: Batch, rephrase: Batch, locality: Batch, groups: torch.Tensor) -> EditorOutput:
        """As for every editor; in training the backward pass through the language model happens in here.

        The returned loss has the right value, and its gradient is that of `decoupled`.

        Raises:
            ConfigError: in training, if the batch holds more than one group.
        """
        if not self.training:
            return super().forward(edit, rephrase, locality, groups)
        if len(groups.unique()) > 1:
            raise ConfigError(
                f"{self.edit_config.edit_type} is trained with one group a batch: edits_per_group must equal"
                " per_device_train_batch_size"
            )
        with self.base_ready():
            rows = self.observe(self.base, edit)
            changes = self.solve(rows)
            self.remember_size(changes, groups)
            leaves = {m: dataclasses.replace(c, left=c.left.clone().requires_grad_()) for m, c in changes.items()}
            whole = self.learn(leaves, edit, rephrase, locality, groups)
            self.settle(changes, (edit, rephrase, locality))
        changes_of = {m: (c.left.detach().T, c.left.grad.T) for m, c in leaves.items() if c.left.grad is not None}
        return self.handing_on(whole, self.decoupled(rows, changes_of))

    def decoupled(self, rows: Mapping[str, Rows], at: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """A scalar whose gradient in the editor's parameters is that of the losses (section 3.3).

        With ``a = (KKᵀ + λI)⁻¹ ∂L/∂C``, the gradient at D is ``a`` and that at log λ is ``−λ ⟨a, C⟩``.

        Args:
            rows: of `observe`.
            at: module → (C, ∂L/∂C), ``[n, d_out]``.
        """
        total = torch.zeros((), device=next(self.parameters()).device)
        for module, (c, gradient) in at.items():
            net, mode = self.net(module)
            ridge = net.log_ridge[mode].detach().exp()
            a = ridge_solve(rows[module].inputs, ridge, gradient).float()
            total = total - ridge * (a * c).sum() * net.log_ridge[mode]
            for k, g, weight in zip(*self._split(rows[module]), a.split(self.edit_config.rows), strict=True):
                total = total + (weight * checkpoint(net, k, g, mode, use_reentrant=False)).sum()
        return total


@register_method
class MALMEN(HyperMethod):
    """Edits with a trained `MALMENEditor`."""

    config_class = MALMENConfig
    editor_class = MALMENEditor
    capabilities = Capabilities(
        name="MALMEN",
        kind="weights",
        batch=True,
        sequential=True,
        needs_subject=False,
        needs_training=True,
        encoder_decoder=True,
        paper="Tan et al. 2024, arXiv 2311.04661",
        summary="a trained network and a least-squares solve edit thousands of facts together",
    )

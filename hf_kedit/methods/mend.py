"""MEND (Mitchell et al. 2022, "Fast Model Editing at Scale", arXiv 2110.11309).

The gradient of a linear module's weight is ``Σ_n δ_n u_nᵀ``: one outer product per token, of the gradient δ at the
module's output and its input u. MEND trains a small network g that turns these pairs into better ones,

    (ũ_n, δ̃_n) = g(u_n, δ_n),      ΔW = −α Σ_n δ̃_n ũ_nᵀ                                  (equations 3 to 5)

with a trained step size α per module. g is a two-layer residual network of low rank, shared by the modules of one
shape and told apart by a scale and a shift per module. At the start it returns its standardised input, so that the
first edit is a plain gradient step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import nn

from ..editors.editor import Editor, EditorConfig, register_editor
from ..editors.running_norm import DEAD, RunningNorm
from ..engine.gradients import LowRank
from ..engine.supervised import Batch
from .base import Capabilities, register_method
from .trained_editor import HyperMethod

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class MENDConfig(EditorConfig):
    """Hyperparameters of MEND.

    Args:
        rank: of the residual layers; at most the size of their input.
        num_blocks: number of residual layers.
        shared: modules of one shape share a network.
        combine: one network for input and gradient together, or one for each.
        edit_lr: step size α of every module at the start.
        inner_loss: what the gradient is taken of: ``batch_mean``, the mean over all target tokens of the facts that
            are edited together (published; every fact's share shrinks as their number grows), or ``example_mean``,
            the sum over the facts of their means.
        dead_std: components of u and δ with a smaller deviation are ignored; 0 as published.
    """

    edit_type: ClassVar[str] = "mend"

    rank: PositiveInt = 1920
    num_blocks: PositiveInt = 2
    shared: bool = True
    combine: bool = True
    edit_lr: PositiveFloat = 1e-4
    inner_loss: Literal["batch_mean", "example_mean"] = "batch_mean"
    dead_std: NonNegativeFloat = DEAD


class ResidualBlock(nn.Module):
    """``z + max(0, scale_i ⊙ (U V z + b) + shift_i)``, the identity at the start.

    Args:
        size: d.
        rank: of U V.
        modes: number of modules that share the block; 0 for a block of one module, without scale and shift.
    """

    def __init__(self, size: int, rank: int, modes: int):
        super().__init__()
        rank = min(rank, size)
        self.u = nn.Parameter(torch.zeros(size, rank))
        self.v = nn.Parameter(torch.randn(rank, size))
        self.bias = nn.Parameter(torch.zeros(size))
        if modes:
            self.scale = nn.Parameter(torch.ones(modes, size))
            self.shift = nn.Parameter(torch.zeros(modes, size))

    def forward(self, z: torch.Tensor, mode: int) -> torch.Tensor:
        """Transform rows ``[n, size]`` of the module with index ``mode``."""
        change = z @ self.v.T @ self.u.T + self.bias
        if hasattr(self, "scale"):
            change = self.scale[mode] * change + self.shift[mode]
        return z + change.clamp(min=0)  # unlike relu, clamp lets the gradient pass at 0, where training starts


class GradientTransform(nn.Module):
    """g: standardised inputs and gradients of the modules of one shape, transformed.

    Args:
        d_in: size of u.
        d_out: size of δ.
        modes: number of modules that share it; 0 if it belongs to one.
        config: of the editor.
    """

    def __init__(self, d_in: int, d_out: int, modes: int, config: MENDConfig):
        super().__init__()
        self.sizes = (d_in, d_out)
        self.norm = RunningNorm(d_in + d_out, config.dead_std)
        widths = (d_in + d_out,) if config.combine else (d_in, d_out)
        self.nets = nn.ModuleList(
            nn.ModuleList(ResidualBlock(width, config.rank, modes) for _ in range(config.num_blocks))
            for width in widths
        )

    def forward(self, u: torch.Tensor, delta: torch.Tensor, mode: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (ũ, δ̃) of rows ``[n, d_in]`` and ``[n, d_out]``."""
        with torch.autocast(u.device.type, enabled=False):
            rows = self.norm(torch.cat([u, delta], dim=1).float())
            parts = [rows] if len(self.nets) == 1 else list(rows.split(self.sizes, dim=1))
            for i, net in enumerate(self.nets):
                assert isinstance(net, nn.ModuleList)
                for block in net:
                    parts[i] = block(parts[i], mode)
            turned = torch.cat(parts, dim=1).split(self.sizes, dim=1)
        return turned[0], turned[1]


@register_editor
class MENDEditor(Editor):
    """The networks and step sizes of MEND for some modules of one model."""

    config_class = MENDConfig
    edit_config: MENDConfig

    def __init__(self, config: MENDConfig, shapes: Mapping[str, tuple[int, int]], *, encoder_decoder: bool = False):
        super().__init__(config, shapes, encoder_decoder=encoder_decoder)
        self.edit_lrs = nn.Parameter(torch.full((len(self.shapes),), config.edit_lr))
        self.nets = nn.ModuleDict()
        for key, members in self.groups().items():
            d_in, d_out = self.shapes[members[0]]
            self.nets[key] = GradientTransform(d_in, d_out, len(members) if config.shared else 0, config)

    def groups(self) -> dict[str, list[str]]:
        """The modules that share a network, in order, by the network's name."""
        groups: dict[str, list[str]] = {}
        for module, shape in self.shapes.items():
            key = f"{shape[0]}x{shape[1]}" if self.edit_config.shared else module.replace(".", "/")
            groups.setdefault(key, []).append(module)
        return groups

    def propose(self, model: PreTrainedModel, edit: Batch, groups: torch.Tensor) -> dict[str, LowRank]:
        """The changes for a batch of facts, equations 3 to 5."""
        rows = self.collect(model, edit, groups, self.edit_config.inner_loss)
        where = {m: (key, i) for key, members in self.groups().items() for i, m in enumerate(members)}
        changes = {}
        for number, module in enumerate(self.shapes):
            key, mode = where[module]
            u, delta = self.nets[key](rows[module].inputs, rows[module].gradients, mode)
            changes[module] = LowRank(-self.edit_lrs[number] * delta.T, u.T, rows[module].owners)
        return changes

    def step_sizes(self) -> list[nn.Parameter]:
        """The parameters that are trained with a learning rate of their own."""
        return [self.edit_lrs]


@register_method
class MEND(HyperMethod):
    """Edits with a trained `MENDEditor`."""

    config_class = MENDConfig
    editor_class = MENDEditor
    capabilities = Capabilities(
        name="MEND",
        kind="weights",
        batch=True,
        sequential=True,
        needs_subject=False,
        needs_training=True,
        encoder_decoder=True,
        paper="Mitchell et al. 2022, arXiv 2110.11309",
        summary="a trained network turns the gradient of one fact into a low-rank edit",
    )

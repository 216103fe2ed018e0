"""What one step of a trained editor returns, and how parts of it are averaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..engine.examples import row_means

METRICS = ("edit_success", "generalization", "locality", "drawdown")


@dataclass
class EditorOutput:
    """What one training or evaluation step of an editor returns.

    Args:
        loss: scalar.
        edit_loss: of the new answers to the rephrased prompts, scalar.
        locality_loss: divergence on the unrelated prompts, scalar.
        facts: how many facts it is about.
        metrics: in evaluation mode, one row per fact with the columns `METRICS`, ``[facts, 4]``.
    """

    loss: torch.Tensor
    edit_loss: torch.Tensor
    locality_loss: torch.Tensor
    facts: int
    metrics: torch.Tensor | None = None


def merged(parts: Sequence[EditorOutput]) -> EditorOutput:
    """Several outputs as one: losses weighted by the number of facts."""
    facts = sum(p.facts for p in parts)

    def mean(name: str) -> torch.Tensor:
        return torch.stack([getattr(p, name) * (p.facts / facts) for p in parts]).sum()

    metrics = [p.metrics for p in parts if p.metrics is not None]
    losses = (mean("loss"), mean("edit_loss"), mean("locality_loss"))
    return EditorOutput(*losses, facts, torch.cat(metrics) if metrics else None)


def mean_of_groups(values: torch.Tensor, rows: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Mean over the groups of the mean over a group's tokens."""
    names, numbers = groups.unique(return_inverse=True)
    return row_means(values, numbers[rows], len(names)).mean()

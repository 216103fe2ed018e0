"""Running mean and spread of rows, as buffers of a trained network; batches are merged, processes are summed."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import ConfigError

DEAD = 1e-6


class RunningNorm(nn.Module):
    """Standardises rows by the mean and deviation of all rows seen in training.

    In training mode the present rows are counted before they are standardised. In evaluation mode nothing changes.

    Args:
        size: components of a row.
        dead: components whose deviation is below this are set to zero, because one that hardly ever moved would be
            blown up by the division as soon as it does; 0 divides always.
        eps: added to the deviation.
    """

    count: torch.Tensor
    mean: torch.Tensor
    spread: torch.Tensor

    def __init__(self, size: int, dead: float = DEAD, eps: float = 1e-7):
        super().__init__()
        self.dead, self.eps = dead, eps
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("spread", torch.zeros(size))  # Σ (x − mean)²

    @property
    def std(self) -> torch.Tensor:
        """Unbiased standard deviation, ``[size]``."""
        return (self.spread / (self.count - 1).clamp(min=1).float()).sqrt()

    @torch.no_grad()
    def update(self, rows: torch.Tensor) -> None:
        """Count more rows, ``[n, size]``: Chan's merge of two sets of moments.

        Every process has to call this equally often, with no rows if it has none.
        """
        count = _summed(torch.tensor(float(rows.shape[0]), dtype=torch.float64, device=rows.device))
        if float(count) == 0:
            return
        mean = _summed(rows.sum(0)) / count.float()
        spread = _summed(((rows - mean) ** 2).sum(0))
        total = self.count + count
        shift = mean - self.mean
        self.spread += spread + shift**2 * (self.count * count / total).float()
        self.mean += shift * (count / total).float()
        self.count.copy_(total)

    def standardise(self, rows: torch.Tensor) -> torch.Tensor:
        """``(rows − mean) / std`` of rows ``[n, size]`` fp32, by what was counted so far.

        Raises:
            ConfigError: if that is nothing.
        """
        if float(self.count) < 1:
            raise ConfigError("this editor has seen no data: train it, or load a trained one")
        std = self.std
        scaled = (rows - self.mean) / (std + self.eps)
        return torch.where(std < self.dead, torch.zeros_like(scaled), scaled) if self.dead else scaled

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Standardise rows ``[n, size]``; in training mode they are counted first."""
        if self.training:
            self.update(rows)
        return self.standardise(rows)


def _summed(value: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over the processes that train together."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        value = value.clone()
        torch.distributed.all_reduce(value)
    return value

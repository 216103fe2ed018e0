"""What a loss tells linear modules (their inputs and the gradients at their outputs), and low-rank paths beside them.

Only the probes at the module outputs get gradients: no parameter of the model requires or receives one, and nothing
below the first module is differentiated. A low-rank path gives ``(W + Σ left_n right_nᵀ) x`` without forming the sum;
it is differentiable in its factors, and rows of one batch can follow different paths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch

from ..anatomy.switching import Switch, together
from ..errors import EditFailedError
from .capture import Tap, as_rows, listen, rewritten
from .supervised import IGNORE, Batch, rows_of, score
from .weights import get_module

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Reduction = Literal["batch_mean", "example_mean", "chunk_mean"]
Tokens = Literal["speaking", "attended", "answer"]


@dataclass(frozen=True)
class Signal:
    """What one module saw and what the loss wants of it.

    Args:
        inputs: ``[rows, width, d_in]``, in the model's dtype.
        gradients: of the loss at the module's output, ``[rows, width, d_out]``.
    """

    inputs: torch.Tensor
    gradients: torch.Tensor

    def at(self, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs ``[n, d_in]`` and gradients ``[n, d_out]`` at the positions of a mask ``[rows, width]``, fp32."""
        mask = mask.to(self.inputs.device)
        return self.inputs[mask].float(), self.gradients[mask].float()

    def speaking(self) -> torch.Tensor:
        """Mask ``[rows, width]`` of the positions where both input and gradient hold something but zeros.

        Padding, tokens behind the last scored one and, in the last block, everything that predicts no target token
        drop out.
        """
        return (self.inputs != 0).any(-1) & (self.gradients != 0).any(-1)


def signals(
    model: torch.nn.Module, modules: Sequence[str], rows: int, loss: Callable[[], torch.Tensor]
) -> dict[str, Signal]:
    """Run a forward that ends in a loss and return what it tells the modules; everything is detached.

    Args:
        model: evaluation mode, parameters without gradients.
        modules: names of linear modules.
        rows: number of rows of the batch that ``loss`` runs.
        loss: runs the model and returns a scalar.

    Raises:
        EditFailedError: if a module takes no part in the forward pass.
    """
    inputs: dict[str, torch.Tensor] = {}
    probes: dict[str, torch.Tensor] = {}

    def keep(tap: Tap, state: torch.Tensor) -> None:
        inputs[tap.module] = state.detach()

    def add_zero(module: str, output: torch.Tensor) -> torch.Tensor:
        probes[module] = torch.zeros_like(output, requires_grad=True)  # its gradient is that of the output
        return output + probes[module]

    adding = {Tap(m): partial(add_zero, m) for m in modules}
    with torch.enable_grad(), listen(model, [Tap(m, "input") for m in modules], keep), rewritten(model, adding):
        value = loss()
        silent = [m for m in modules if m not in probes]
        if silent:
            raise EditFailedError(f"{silent[0]} took no part in the forward pass; choose other modules to edit")
        raw = torch.autograd.grad(value, [probes[m] for m in modules], allow_unused=True)
    gradients = [torch.zeros_like(probes[m]) if g is None else g for m, g in zip(modules, raw, strict=True)]
    return {m: Signal(as_rows(inputs[m], rows), as_rows(g, rows)) for m, g in zip(modules, gradients, strict=True)}


@dataclass(frozen=True)
class Rows:
    """Some tokens of a batch at one module.

    Args:
        inputs: ``[n, d_in]`` fp32.
        gradients: of the loss at the module's output, ``[n, d_out]`` fp32.
        owners: the row of the batch that each token belongs to, ``[n]`` int64.
    """

    inputs: torch.Tensor
    gradients: torch.Tensor
    owners: torch.Tensor


def collect_rows(
    model: PreTrainedModel,
    modules: Sequence[str],
    batch: Batch,
    groups: torch.Tensor,
    *,
    reduction: Reduction,
    at: Tokens,
    size: int,
) -> dict[str, Rows]:
    """Inputs and output gradients of modules at the tokens of a batch, a few rows at a time.

    Args:
        model: frozen, in evaluation mode.
        modules: names of linear modules.
        batch: rows with labels.
        groups: rows of the same number belong together, ``[rows]`` int64. What is found comes to their device,
            wherever the modules are.
        reduction: the loss whose gradient is taken: the mean over the labelled tokens of each group
            (``batch_mean``), of each row (``example_mean``), or of each forward pass (``chunk_mean``).
        at: which tokens count: those where neither input nor gradient is zero (``speaking``), those that are no
            padding (``attended``), or those that predict a label (``answer``). In an encoder-decoder the last two are
            the same: all tokens of the prompt in the encoder, all of the answer in the decoder.
        size: rows per forward and backward pass.
    """
    shares = _token_shares(batch["labels"], groups, reduction)
    collected: dict[str, list[Rows]] = {module: [] for module in modules}
    for start in range(0, len(groups), size):
        part = rows_of(batch, slice(start, start + size))
        labelled = part["labels"] != IGNORE
        weights = shares[start : start + size][labelled]
        weights = weights / labelled.sum() if reduction == "chunk_mean" else weights
        heard = signals(model, modules, len(labelled), partial(_weighted_loss, model, part, weights))
        for module, signal in heard.items():
            mask = signal.speaking() if at == "speaking" else _mask(model, module, part, at)
            inputs, gradients = (states.to(groups.device) for states in signal.at(mask))
            collected[module].append(Rows(inputs, gradients, mask.nonzero()[:, 0].to(groups.device) + start))
    return {
        module: Rows(
            torch.cat([p.inputs for p in parts]),
            torch.cat([p.gradients for p in parts]),
            torch.cat([p.owners for p in parts]),
        )
        for module, parts in collected.items()
    }


def _token_shares(labels: torch.Tensor, groups: torch.Tensor, reduction: Reduction) -> torch.Tensor:
    """What a labelled token of each row counts in the loss, ``[rows, width]``."""
    labelled = (labels != IGNORE).float()
    tokens = labelled.sum(1)
    if reduction == "batch_mean":
        tokens = ((groups.unsqueeze(0) == groups.unsqueeze(1)) * tokens).sum(1)  # of all rows of the row's group
    elif reduction == "chunk_mean":
        tokens = torch.ones_like(tokens)
    return labelled / tokens.unsqueeze(1)


def _weighted_loss(model: PreTrainedModel, batch: Batch, weights: torch.Tensor) -> torch.Tensor:
    return (score(model, batch).nll * weights).sum()


def _mask(model: PreTrainedModel, module: str, batch: Batch, at: Tokens) -> torch.Tensor:
    """The tokens of a batch that count at a module, ``[rows, width]``."""
    labelled, attended = batch["labels"] != IGNORE, batch["attention_mask"].bool()
    if model.config.is_encoder_decoder:
        wanted = get_module(model, module)
        return attended if any(m is wanted for m in model.get_encoder().modules()) else labelled
    return labelled if at == "answer" else attended


@dataclass(frozen=True)
class LowRank:
    """A change of one matrix as a sum of outer products, ``ΔW = left rightᵀ``.

    Args:
        left: ``[d_out, n]``.
        right: ``[d_in, n]``.
        owners: the row of the edit batch that each column came from, ``[n]`` int64.
    """

    left: torch.Tensor
    right: torch.Tensor
    owners: torch.Tensor

    def as_leaves(self) -> LowRank:
        """The same change with factors that collect gradients and hand nothing on."""
        left, right = (f.detach().clone().requires_grad_() for f in (self.left, self.right))
        return LowRank(left, right, self.owners)

    @torch.no_grad()
    def sizes(self, groups: torch.Tensor) -> torch.Tensor:
        """Frobenius norm of the change of each group of owners, ``[groups]``; ``groups`` as for `low_rank_paths`."""
        norms = []
        for group in groups.unique():
            mine = groups[self.owners] == group
            left, right = self.left[:, mine], self.right[:, mine]
            if left.shape[1] < min(left.shape[0], right.shape[0]):  # ‖L Rᵀ‖² = ⟨LᵀL, RᵀR⟩
                norms.append(((left.T @ left) * (right.T @ right)).sum().clamp(min=0).sqrt())
            else:
                norms.append(torch.linalg.matrix_norm(left @ right.T))
        return torch.stack(norms)


def low_rank_paths(
    model: torch.nn.Module,
    changes: Mapping[str, LowRank],
    groups: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
) -> Switch[None]:
    """Add changes beside the modules' weights inside the block.

    Args:
        model: any model.
        changes: module name → change.
        groups: the group of every owner, ``[owners]`` int64; ``None``: every row follows all columns.
        rows: the group of every row of the batches inside the block; a row follows the columns of its own group only.
            ``None``: the rows are the owners.
    """
    seen_by = groups if rows is None else rows
    inputs: dict[str, torch.Tensor] = {}

    def keep(tap: Tap, state: torch.Tensor) -> None:
        inputs[tap.module] = state

    def add(module: str, output: torch.Tensor) -> torch.Tensor:
        change = changes[module]
        parts = inputs.pop(module).float() @ change.right.to(output.device)  # [..., n]
        if groups is not None and seen_by is not None:
            mine = seen_by.unsqueeze(1) == groups[change.owners].unsqueeze(0)  # [rows, n]
            parts = (as_rows(parts, len(seen_by)) * mine.to(parts.device).unsqueeze(1)).view_as(parts)
        return output + (parts @ change.left.to(output.device).T).to(output.dtype)

    adding = {Tap(m): partial(add, m) for m in changes}
    return together(listen(model, [Tap(m, "input") for m in changes], keep), rewritten(model, adding))

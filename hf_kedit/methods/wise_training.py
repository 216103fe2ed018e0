"""WISE: training one edit into a side memory.

The side memory of a linear layer ``W0`` is ``W' = W0 + Δ``. Rows of an edit are its prompt and target in a few
context templates, and irrelevant texts. With the distance of a row ``d = mean_t ‖σ(W'x_t + b) − σ(W0 x_t + b)‖₂``
over its tokens, the loss is (WISE, arXiv 2405.14768, eq. 5, 7)

    L = mean_rows [Σ_t CE(y_t) / (n + 1)]  +  [d_i − d_e + γ]₊ + [d_i − α]₊ + [β − d_e]₊

``d_e`` of the edit's rows, ``d_i`` of the irrelevant ones, every hinge averaged over its positive entries. Plain
gradient descent moves only the entries of the shard's mask.

What enters the layer does not depend on Δ: rows are run from the edited block on (`Replay`), not from the tokens, and
irrelevant texts, of which only distances are wanted, are not run at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ..books.sites import SiteCall, SiteFunction
from ..engine.activations import Activation, activation_distance, mean_over_tokens
from ..engine.replay import Replay, ReplayRow
from ..errors import EditFailedError
from ..logging import progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..anatomy import Anatomy

SETTLED_CHANGE, SETTLED_LOSS = 1e-4, 0.02
ROOM = 0.5
"""An edit is told from irrelevant texts if these stay below this part of the distance that routes to its memory."""


@dataclass(frozen=True)
class WiseRow:
    """One row: an edit in one context, or an irrelevant text.

    Args:
        ids: all token ids, the target's last one included (distances are taken over all of them).
        prompt_length: where the target begins; ``len(ids)`` for an irrelevant text.
    """

    ids: tuple[int, ...]
    prompt_length: int

    @property
    def targets(self) -> tuple[int, ...]:
        """Token ids of the target; none for an irrelevant text."""
        return self.ids[self.prompt_length :]

    @property
    def replayed(self) -> ReplayRow:
        """The row for `Replay`, which gives the logits that predict the target."""
        return ReplayRow(self.ids, 0, tuple(range(self.prompt_length - 1, len(self.ids) - 1)))


@dataclass(frozen=True)
class TrainingSettings:
    """How an edit is trained.

    Args:
        steps: largest number of updates.
        lr: of gradient descent.
        weight_decay: pulls ``W'`` (not Δ) to zero, as published.
        mask_weight_decay: only inside the mask, so that shards stay disjoint; the published code: everywhere.
        norm_constraint: largest ``|Δ|`` of an entry; ``None``: unlimited.
        margins: ``(α, β, γ)``.
        activation: σ; ``None`` compares the layer's outputs as they are.
        until: training ends as soon as each token of the target has this probability in the first row and the edit is
            told from irrelevant texts with room to spare; ``None``: it does not end for this.
        ratio: part of an edit's distance from which its memory answers (``act_ratio``).
    """

    steps: int
    lr: float
    weight_decay: float
    mask_weight_decay: bool
    norm_constraint: float | None
    margins: tuple[float, float, float]
    activation: Activation | None
    until: float | None = None
    ratio: float = 1.0


@dataclass
class Training:
    """What came out; lists have one entry per evaluation of the loss.

    Args:
        delta: the side memory's change, ``[d_out, d_in]`` fp32.
        activation: mean distance of the edit's rows at the last evaluation, i.e. before the last update.
        token_losses: first term of the loss.
        margin_losses: the hinges.
        edit_distances: ``d_e`` ``[edit rows]``.
        irrelevant_distances: ``d_i`` ``[irrelevant rows]``.
        probability: geometric mean per token of the target's probability in the first row.
        first_gradient: ``∂L/∂W'`` of the first evaluation, before the mask.
        first_delta: Δ after the first update.
    """

    delta: torch.Tensor
    activation: float = 0.0
    token_losses: list[float] = field(default_factory=list)
    margin_losses: list[float] = field(default_factory=list)
    edit_distances: list[torch.Tensor] = field(default_factory=list)
    irrelevant_distances: list[torch.Tensor] = field(default_factory=list)
    probability: list[float] = field(default_factory=list)
    first_gradient: torch.Tensor | None = None
    first_delta: torch.Tensor | None = None


class SidePath:
    """The edited layer with a side memory in place, and the rows of an edit that run through it.

    Args:
        model: in evaluation mode, without weight gradients.
        anatomy: of the model.
        layer: block that the edited layer belongs to.
        wrapped: puts a site function on the edited layer, instead of what edits do there, for a block.
        rows: the edit in its contexts.
        irrelevant: of texts that must stay where they are, what enters and leaves the layer: ``[tokens, d_in]`` and
            ``[tokens, d_out]``.
        activation: σ.
        fill: padding id.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        anatomy: Anatomy,
        layer: int,
        wrapped: Callable[[SiteFunction], AbstractContextManager[None]],
        rows: Sequence[WiseRow],
        irrelevant: Sequence[tuple[torch.Tensor, torch.Tensor]],
        activation: Activation | None,
        fill: int = 0,
    ):
        self.rows, self.activation, self.wrapped = rows, activation, wrapped
        self.irrelevant = irrelevant
        self.targets = torch.tensor([t for r in rows for t in r.targets])
        self.owners = torch.tensor([i for i, r in enumerate(rows) for _ in r.targets])
        self.counts = torch.tensor([len(r.targets) for r in rows])
        self.likely = torch.empty(0)
        """Probability of the least likely target token of the first row, in the last run."""
        self._delta = torch.empty(0)
        self._distances = torch.empty(0)
        with wrapped(lambda call: None):
            self.replay = Replay(model, anatomy, [r.replayed for r in rows], layer, (), fill=fill)

    def run(self, delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the rows through ``W0 + Δ``, inside ``wrapped(self.function)``.

        Returns:
            ``Σ_t CE(y_t)`` of the edit's rows ``[edit rows]``, and the distances ``[edit rows + irrelevant rows]``;
            both differentiable in Δ.
        """
        self._delta = delta
        logits = self.replay.logits({})
        losses = torch.nn.functional.cross_entropy(logits, self.targets.to(logits.device), reduction="none")
        self.likely = (-losses.detach()[: len(self.rows[0].targets)].max()).exp()
        sums = torch.zeros(len(self.rows), device=losses.device).index_add(0, self.owners.to(losses.device), losses)
        apart = [text_distance(*states, delta, self.activation).reshape(1) for states in self.irrelevant]
        return sums, torch.cat([self._distances, *apart])

    def function(self, call: SiteCall) -> torch.Tensor:
        """The site function: every row goes through the side memory."""
        changed = call.output + side_change(call.inputs, self._delta)
        apart = activation_distance(changed, call.output, self.activation)
        self._distances = mean_over_tokens(apart, self.replay.batch.attention_mask)
        return changed


Extra = Callable[[int, torch.Tensor], torch.Tensor]
"""A further term of the loss: (iteration, Δ) → scalar."""


def train_side_memory(
    path: SidePath,
    weight: torch.Tensor,
    delta: torch.Tensor,
    mask: torch.Tensor,
    settings: TrainingSettings,
    extra: Extra | None = None,
    *,
    show_progress: bool = False,
) -> Training:
    """Train one edit into a side memory.

    Args:
        path: the rows of the edit at the edited layer.
        weight: ``W0`` ``[d_out, d_in]``, in any dtype.
        delta: Δ before, ``[d_out, d_in]`` fp32.
        mask: entries that may move, bool, same shape.
        settings: see there.
        extra: further term of the loss.
        show_progress: show a bar of the steps.

    Raises:
        EditFailedError: if the loss is not finite.
    """
    delta, mask = delta.to(weight.device), mask.to(weight.device)
    count = len(path.rows)
    result, history = Training(delta), list[float]()
    bar = progress_bar(settings.steps, "training a side memory (WISE)", show=show_progress)
    with path.wrapped(path.function), bar:
        for step in range(settings.steps):
            delta.requires_grad_(True)
            sums, distances = path.run(delta)
            token_loss = target_loss(sums, path.counts)
            margin = margin_loss(distances[:count], distances[count:], settings.margins)
            loss = token_loss + margin.to(token_loss.device)  # the head and the layer may be on different devices
            if extra is not None:
                loss = loss + extra(step, delta).to(loss.device)
            number = _record(result, loss, token_loss, margin, distances, sums, path)
            if settled(history) or holds(path, result, settings):
                break
            (gradient,) = torch.autograd.grad(loss, delta)
            history.append(number)
            delta = descend(delta.detach(), gradient, mask, weight, settings)
            bar.update(1)
            if step == 0:
                result.first_gradient, result.first_delta = gradient.cpu(), delta.cpu()
        with torch.no_grad():
            sums, _ = path.run(delta.detach())
            result.probability.append(math.exp(-float(sums[0]) / len(path.rows[0].targets)))
    result.delta = delta.detach().cpu()
    return result


def _record(
    result: Training,
    loss: torch.Tensor,
    token_loss: torch.Tensor,
    margin: torch.Tensor,
    distances: torch.Tensor,
    sums: torch.Tensor,
    path: SidePath,
) -> float:
    """Note one evaluation and return its loss; all of it is read from the device at once.

    Raises:
        EditFailedError: if the loss is not finite.
    """
    count = len(path.rows)
    read = [loss, token_loss, margin, sums[0], distances[:count].mean(), distances]
    flat = torch.cat([x.detach().to(loss.device).reshape(-1) for x in read])
    number, token, hinges, first, apart, *each = flat.tolist()
    if not math.isfinite(number):
        raise EditFailedError("WISE: the loss became NaN or infinite; lower lr")
    result.activation = apart
    result.token_losses.append(token)
    result.margin_losses.append(hinges)
    result.edit_distances.append(torch.tensor(each[:count]))
    result.irrelevant_distances.append(torch.tensor(each[count:]))
    result.probability.append(math.exp(-first / len(path.rows[0].targets)))
    return number


def settled(history: Sequence[float]) -> bool:
    """Whether training ends before the next update: the last two losses are equal and small."""
    return len(history) > 1 and abs(history[-1] - history[-2]) <= SETTLED_CHANGE and history[-1] <= SETTLED_LOSS


def holds(path: SidePath, result: Training, settings: TrainingSettings) -> bool:
    """Whether an edit needs no further step, see `TrainingSettings.until`."""
    if settings.until is None or float(path.likely) < settings.until:
        return False
    apart, quiet = result.edit_distances[-1].min(), result.irrelevant_distances[-1]
    return not len(quiet) or float(quiet.max()) < ROOM * settings.ratio * float(apart)


def descend(
    delta: torch.Tensor, gradient: torch.Tensor, mask: torch.Tensor, weight: torch.Tensor, settings: TrainingSettings
) -> torch.Tensor:
    """One step of masked gradient descent on ``W' = W0 + Δ``, in fp32; returns the new Δ."""
    main = weight.to(delta)
    side = main + delta
    decay = settings.weight_decay * side
    if settings.mask_weight_decay:
        change = torch.where(mask, gradient + decay, 0.0)
    else:
        change = torch.where(mask, gradient, 0.0) + decay
    moved = side - settings.lr * change - main
    bound = settings.norm_constraint
    return moved if bound is None else moved.clamp(-bound, bound)


def target_loss(sums: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """``mean_rows [Σ_t CE(y_t) / (n + 1)]`` from the sums and the n of the rows.

    The ``+ 1`` counts one position that the published code leaves in its mean without a loss; learning rates were
    tuned with it.
    """
    return (sums / (counts.to(sums.device) + 1)).mean()


def margin_loss(edited: torch.Tensor, irrelevant: torch.Tensor, margins: tuple[float, float, float]) -> torch.Tensor:
    """``[d_i − d_e + γ]₊ + [d_i − α]₊ + [β − d_e]₊``, every term averaged over its positive entries (eq. 5).

    Args:
        edited: ``d_e`` ``[edit rows]``.
        irrelevant: ``d_i`` ``[irrelevant rows]``.
        margins: ``(α, β, γ)``.
    """
    alpha, beta, gamma = margins
    between = irrelevant[:, None] - edited[None, :] + gamma
    return positive_mean(between) + positive_mean(irrelevant - alpha) + positive_mean(beta - edited)


def positive_mean(values: torch.Tensor) -> torch.Tensor:
    """Mean of the positive entries, 0 if there are none."""
    positive = values > 0
    return torch.where(positive, values, 0.0).sum() / positive.sum().clamp(min=1)


def text_distance(
    inputs: torch.Tensor, outputs: torch.Tensor, delta: torch.Tensor, activation: Activation | None
) -> torch.Tensor:
    """Mean distance of a text to itself in the side memory, a scalar.

    Args:
        inputs: of the layer, ``[tokens, d_in]``.
        outputs: its own, ``[tokens, d_out]``.
        delta: Δ.
        activation: σ.
    """
    return activation_distance(outputs + side_change(inputs, delta), outputs, activation).mean()


def side_change(inputs: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """``Δ x`` for every position, computed in the dtype of Δ and returned in the one of ``x``."""
    return torch.nn.functional.linear(inputs.to(delta.dtype), delta).to(inputs.dtype)

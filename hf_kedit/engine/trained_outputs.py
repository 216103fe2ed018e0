"""Training what a module puts out at one token of each text, by gradient descent on the likelihood of a target.

The value step of codebook methods (GRACE, section 3). Nothing below the module and no column before its token ever
changes, so the texts are prepared once and then run again from the module on (see `Replay`), all of them together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..errors import EditFailedError
from ..logging import progress_bar
from .batches import in_batches, rows_at_once
from .capture import Tap
from .examples import Example, all_likely, row_means
from .replay import Replay, ReplayRow, Route

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..anatomy import Anatomy

Watch = Callable[[int, torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True)
class TrainedOutputs:
    """Trained outputs of a batch of texts.

    Args:
        values: ``[texts, d_out]`` fp32.
        losses: per text, mean negative log-likelihood per target token before each of its steps.
        probabilities: per text, geometric mean per token of the target's probability at the end.
        route: how the model was run.
    """

    values: torch.Tensor
    losses: list[list[float]]
    probabilities: list[float]
    route: Route


def train_outputs(
    model: PreTrainedModel,
    anatomy: Anatomy,
    examples: Sequence[Example],
    layer: int,
    path: str,
    starts: torch.Tensor,
    *,
    steps: int,
    lr: float,
    fill: int = 0,
    batch_size: int | None = None,
    until: float | None = None,
    watch: Watch | None = None,
    description: str = "training outputs",
    show_progress: bool = True,
    route: Route | None = None,
) -> TrainedOutputs:
    """Train one output per text with Adam. Texts have nothing to do with each other, whatever batch they are in.

    Args:
        model: decoder in evaluation mode, without weight gradients.
        anatomy: of the model.
        examples: the texts; the output is trained at the token before each target.
        layer: index of the block that holds the module.
        path: name of the module.
        starts: outputs to begin with, ``[texts, d_out]`` fp32.
        steps: of Adam.
        lr: of Adam.
        fill: padding id.
        until: a text is done once each token of its target has this probability; ``None``: after all steps.
        batch_size: texts at once; ``None``: by the device, halved when memory runs out.
        watch: called after each step with its number, the values ``[texts, d_out]`` and the gradients that it took;
            for a single batch (tests).
        description: label of the progress bar.
        show_progress: show a bar.
        route: force a replay route (tests, benchmarks).

    Raises:
        EditFailedError: if a loss is not finite.
    """
    order = sorted(range(len(examples)), key=lambda i: (len(examples[i].targets), len(examples[i].ids)))

    def run(chunk: Sequence[int]) -> TrainedOutputs:
        chosen = [examples[i] for i in chunk]
        rows = [ReplayRow(e.ids, e.positions[0], e.positions) for e in chosen]
        replay = Replay(model, anatomy, rows, layer, [path], fill=fill, route=route)
        # one bar tells enough: of the texts, or of the steps where there is but one
        bar = progress_bar(steps, description, show=show_progress and len(order) == 1)
        with bar as steps_done:
            return _descend(replay, chosen, starts[list(chunk)], steps, lr, until, watch, steps_done.update)

    values = starts.detach().float().clone()
    losses: list[list[float]] = [[] for _ in examples]
    probabilities, taken = [0.0] * len(examples), route or "full"
    with progress_bar(len(order), description, show=show_progress and len(order) > 1, unit="edit") as bar:
        for chunk, part in in_batches(order, batch_size or rows_at_once(model), run):
            values[list(chunk)] = part.values
            for k, i in enumerate(chunk):
                losses[i], probabilities[i] = part.losses[k], part.probabilities[k]
            taken = part.route
            bar.update(len(chunk))
    return TrainedOutputs(values, losses, probabilities, taken)


def _descend(
    replay: Replay,
    examples: Sequence[Example],
    starts: torch.Tensor,
    steps: int,
    lr: float,
    until: float | None,
    watch: Watch | None,
    told: Callable[[int], Any],
) -> TrainedOutputs:
    """Train one batch, whose rows are the examples and whose only site is the module.

    A text that is done keeps its value; the others go on as if it were not there.
    """
    (path,) = replay.sites
    own = replay.taken[Tap(path)]
    targets = torch.tensor([t for e in examples for t in e.targets], device=replay.base_logits.device).unsqueeze(1)
    value = starts.detach().float().to(own.device).clone().requires_grad_(True)
    optimiser = torch.optim.Adam([value], lr=lr)
    rows = replay.positions().rows
    losses: list[list[float]] = [[] for _ in examples]
    ends: dict[int, tuple[torch.Tensor, float]] = {}
    for step in range(steps + 1):  # the last value is only measured
        with torch.set_grad_enabled(step < steps):
            # adding the difference puts the value in the place of the module's own output
            log_probs = replay.logits({path: value - own}).log_softmax(-1)
            nll = -log_probs.gather(1, targets).squeeze(1)
            loss = row_means(nll, rows, len(examples))
        held = all_likely(nll, rows, len(examples), until)
        # the only thing that the host waits for in a step
        numbers, done = torch.stack([loss.detach(), held.to(loss.dtype)]).tolist()
        if not all(map(_finite, numbers)):
            raise EditFailedError("the loss became NaN or infinite while an output was trained; lower lr")
        for i, number in enumerate(numbers):
            if i not in ends:
                if done[i] or step == steps:
                    ends[i] = value.detach()[i].clone(), number
                else:
                    losses[i].append(number)
        if len(ends) == len(examples):
            break
        # a sum, because a mean would make each step depend on how many texts there are
        value.grad = torch.autograd.grad(loss.sum(), value)[0]
        optimiser.step()
        told(1)
        if watch is not None:
            watch(step, value.detach(), value.grad)
    probabilities = torch.tensor([ends[i][1] for i in range(len(examples))]).neg().exp().tolist()
    values = torch.stack([ends[i][0] for i in range(len(examples))])
    return TrainedOutputs(values, losses, probabilities, replay.route)


def _finite(number: float) -> bool:
    return abs(number) < float("inf")

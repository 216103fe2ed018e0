"""Which neurons of the MLPs does an answer rest on? Integrated gradients (Dai et al. 2022, arXiv 2104.08696).

For neuron i of one layer, with activation ``ā_i`` at the last token before the answer (eq. 2),

    Attr_i = ā_i · ∫₀¹ ∂ P(answer | a := α ā) / ∂ a_i  dα

where all neurons of the layer are scaled together. The integral is a sum over points; every point is one row of a
batch, and layers are taken one by one, so that memory is bounded by the rows of one forward. This module knows
nothing of editing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from ..anatomy.switching import Switch
from ..engine.capture import Tap, as_rows, capture_at, rewritten
from ..engine.forward import device_of
from ..engine.replay import LastColumn
from ..errors import ConfigError
from ..logging import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..anatomy import Anatomy

Rule = Literal["midpoint", "trapezoid", "endpoints"]


@dataclass(frozen=True)
class Attribution:
    """Attributions of the neurons of several layers.

    Args:
        scores: per tap, ``[d]`` fp32: what each neuron contributes to the probability of an answer token, averaged
            over the tokens. Summed over ``d`` they approximate ``P(a) − P(a := 0)``.
        activations: per tap, ``[d]`` fp32 at the last prompt token.
    """

    scores: list[torch.Tensor]
    activations: list[torch.Tensor]

    @property
    def largest(self) -> float:
        """The largest score of all layers."""
        return max(float(s.max()) for s in self.scores)

    def above(self, fraction: float) -> list[torch.Tensor]:
        """Per tap, which neurons exceed ``fraction`` of the largest score of all layers, ``[d]`` bool."""
        threshold = fraction * self.largest
        return [s > threshold for s in self.scores]


def quadrature(steps: int, rule: Rule) -> tuple[torch.Tensor, torch.Tensor]:
    """Points in [0, 1] and their weights, ``[steps]`` each; the weights sum to 1.

    Args:
        steps: number of points.
        rule: ``"midpoint"``, ``"trapezoid"``, or ``"endpoints"``: the plain mean over points that include both
            ends, which published code uses (a single point is α = 0).

    Raises:
        ConfigError: for a trapezoid of fewer than two points, or an unknown rule.
    """
    if rule == "midpoint":
        return (torch.arange(steps) + 0.5) / steps, torch.full((steps,), 1.0 / steps)
    if rule == "endpoints":
        return torch.linspace(0, 1, steps), torch.full((steps,), 1.0 / steps)
    if rule != "trapezoid":
        raise ConfigError(f"unknown integration rule {rule!r}: use midpoint, trapezoid or endpoints")
    if steps < 2:
        raise ConfigError("the trapezoid rule needs at least two points")
    weights = torch.full((steps,), 1.0 / (steps - 1))
    weights[0] = weights[-1] = 0.5 / (steps - 1)
    return torch.linspace(0, 1, steps), weights


def attribute_neurons(
    model: PreTrainedModel,
    taps: Sequence[Tap],
    prompt_ids: Sequence[int],
    answer_ids: Sequence[int],
    *,
    steps: int = 20,
    rule: Rule = "midpoint",
    batch_size: int | None = None,
    fill: int = 0,
    show_progress: bool = False,
    anatomy: Anatomy | None = None,
    layers: Sequence[int] | None = None,
) -> Attribution:
    """Attribute the probability of an answer to the neurons at some taps.

    For an answer of several tokens, each token is attributed at the position that predicts it, behind the tokens
    before it, and the scores are averaged over the tokens.

    Args:
        model: in evaluation mode, without weight gradients.
        taps: one per layer, ``[…, d]``: for instance the inputs of the projections out of the MLPs.
        prompt_ids: the prompt.
        answer_ids: the answer; at least one token.
        steps: points of the integral.
        rule: see `quadrature`.
        batch_size: rows in one forward; ``None``: 32 on a CPU, 128 elsewhere.
        fill: padding id.
        show_progress: show a bar over the layers.
        anatomy: of the model, and
        layers: the layer that each tap lies in: given both, only the last column is run again, and only from that
            layer on (the same result, much faster).

    Returns:
        Scores and activations in the order of the taps.
    """
    device = device_of(model)
    size = batch_size or (32 if device.type == "cpu" else 128)
    texts = [[*prompt_ids, *answer_ids[:t]] for t in range(len(answer_ids))]
    points, weights = (t.to(device) for t in quadrature(steps, rule))
    runner = LastColumn(model, anatomy if layers is not None else None, texts, fill)
    last = torch.full((len(texts),), runner.width - 1, device=device)
    states = capture_at(model, runner.batch, last, taps)
    plan = [(t, k) for t in range(len(texts)) for k in range(len(points))]
    scores, activations = [], []
    places = list(zip(taps, layers or [0] * len(taps), strict=True))
    for tap, layer in progress(places, "attributing", show=show_progress):
        unscaled = states[tap].to(device)  # [tokens, d]
        total = torch.zeros_like(unscaled)
        for start in range(0, len(plan), size):
            token, point = torch.tensor(plan[start : start + size], device=device).unbind(dim=1)
            scaled = (points[point, None] * unscaled[token]).requires_grad_(True)
            columns = runner.columns(layer, token)
            with torch.enable_grad(), replaced_at(model, tap, columns, scaled):
                logits = runner.logits(layer, token).float()
                wanted = torch.tensor([answer_ids[t] for t in token.tolist()], device=device)
                probability = logits.softmax(-1).gather(1, wanted.unsqueeze(1)).sum()
                gradient = torch.autograd.grad(probability, scaled)[0]
            total.index_add_(0, token, gradient * weights[point, None])
        scores.append((unscaled * total).mean(dim=0))
        activations.append(unscaled[0])
    return Attribution(scores, activations)


def replaced_at(model: torch.nn.Module, tap: Tap, columns: torch.Tensor, vectors: torch.Tensor) -> Switch[None]:
    """Inside the block, a tap's state at one column per row is replaced, differentiably.

    Args:
        model: whose module is hooked; the hook is always removed.
        tap: what to replace.
        columns: ``[rows]``.
        vectors: ``[rows, d]``; cast to the state's dtype.
    """

    def write(state: torch.Tensor) -> torch.Tensor:
        states = as_rows(state, columns.shape[0])
        place = torch.zeros(states.shape[:2], dtype=torch.bool, device=states.device)
        place[torch.arange(len(columns), device=states.device), columns.to(states.device)] = True
        new = vectors.to(device=states.device, dtype=states.dtype).unsqueeze(1)
        return torch.where(place.unsqueeze(-1), new, states).view_as(state)

    return rewritten(model, {tap: write})

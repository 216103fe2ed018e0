"""How the vectors of a value optimisation move: Adam, as published, or steps of Gauss-Newton that need fewer forwards.

Both hold a row of state for every request that still runs, and never mix rows: where a request goes does not depend on
its company.

**Gauss-Newton.** Adam sees one gradient per request and takes 15 to 25 evaluations. But the rows of a request are
sequences of their own, so that one backward pass also gives the gradient of every row. With the negative
log-likelihoods ``f_r`` of the rows, their log-odds ``m_r = log(p / (1 − p))`` for ``p = exp(−f_r)`` are close to
linear in δ where ``f_r`` itself bends, and so is the root ``s`` of the drift term, which grows like a square. The
model of the loss around the best δ so far is therefore

    M(d) = w Σ_r log(1 + exp(−m_r − J_r d)) + (s + J_s d)² + c ‖δ + d‖²

(``w`` the weight of a row; the last term the decay, by the parabola that touches its norm from above), and a step
is the shortest ``d`` that brings ``M`` below the loss at which the request ends, within a radius in which the model
has been right: a prox-linear step (Burke 1985, "Descent methods for composite nondifferentiable optimization
problems") with the region of trust of Levenberg and Marquardt. It lies in the span of the gradients and δ, so that
the whole search for it is about matrices of ``rows + 2`` columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

MOST_STEPS = 10
"""Evaluations of Gauss-Newton: what is not reached by then gains little from more."""
_BETAS = (0.9, 0.999)
_EPS = 1e-8
# Found on SmolLM2 and the models of the fact world; the outcome hardly depends on them.
_FIRST_RADIUS = 2.0
_FIRST_PART = 0.25  # the first step asks for this part of the loss: nothing is known yet of how far the model holds
_RIGHT, _WRONG = 0.6, 0.25  # parts of a predicted gain from which on, and up to which, the radius changes
_GROWTH, _CAREFUL_GROWTH, _SHRINKAGE = 2.0, 1.15, 0.4  # careful: once a step was too long
_SMALL_GAIN, _SMALL_GAINS = 0.1, 3  # so many small gains in a row, at a radius that does not grow, end a request …
_NEAR = 8.0  # … one fewer below so many times the goal
_DAMPINGS, _DAMPING_FACTOR = 60, 0.6
_LEAST = 1e-6  # a smaller −log p has no log-odds in float32


@dataclass(frozen=True)
class Measured:
    """What one evaluation says of the requests that run.

    Args:
        delta: δ at which it was made, ``[running, places, d]``.
        total: the loss, ``[running]``.
        drift: its drift term, ``[running]``.
        decay: its decay term, ``[running]``.
        rows: mean −log p of every rewriting row, ``[running, rows]``; Gauss-Newton only.
        gradient: of the loss by δ, ``[running, places, d]``, or for Gauss-Newton by the δ of every row, the drift row
            last, ``[running, rows + 1, places, d]``.
        moving: who takes another step, ``[running]`` bool.
        limit: of ``‖δ‖``, ``[running, places]``.
    """

    delta: torch.Tensor
    total: torch.Tensor
    drift: torch.Tensor
    decay: torch.Tensor
    rows: torch.Tensor
    gradient: torch.Tensor
    moving: torch.Tensor
    limit: torch.Tensor


def within(delta: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """δ cut back to its limit by projection, ``[running, places, d]``."""
    length, limit = delta.norm(dim=-1, keepdim=True), limit.unsqueeze(-1)
    return torch.where(length > limit, delta * (limit / length), delta)


class Adam:
    """Adam with a row for every request (Kingma and Ba 2015); what the published codes use.

    Args:
        delta: where the requests begin.
        lr: learning rate.
    """

    by_row = False  # one gradient per request is enough

    def __init__(self, delta: torch.Tensor, lr: float):
        self.lr, self.steps = lr, 0
        self.mean, self.square = torch.zeros_like(delta), torch.zeros_like(delta)

    def judge(self, delta: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        """Which requests keep what was just measured: all of them, ``[running]`` bool."""
        return torch.ones_like(total, dtype=torch.bool)

    def found(self, delta: torch.Tensor) -> torch.Tensor:
        """The outcome: the last δ that was measured."""
        return delta

    def move(self, at: Measured) -> tuple[torch.Tensor, None]:
        """The next δ; nobody ends for having too little to gain."""
        # One number of steps for all in the bias correction, because who is still moving has taken every step so far.
        self.steps += 1
        (beta1, beta2), moving = _BETAS, at.moving.view(-1, 1, 1)
        self.mean = torch.where(moving, beta1 * self.mean + (1 - beta1) * at.gradient, self.mean)
        self.square = torch.where(moving, beta2 * self.square + (1 - beta2) * at.gradient * at.gradient, self.square)
        mean, square = self.mean / (1 - beta1**self.steps), self.square / (1 - beta2**self.steps)
        # ‖δ‖ is limited after the step; Adam's moments do not know of it (as in the published codes)
        moved = within(at.delta - self.lr * mean / (square.sqrt() + _EPS), at.limit)
        return torch.where(moving, moved, at.delta), None

    def select(self, picked: torch.Tensor) -> None:
        """Go on with these requests only."""
        self.mean, self.square = self.mean[picked], self.square[picked]


class GaussNewton:
    """Steps of Gauss-Newton on the log-odds of every row, each within a radius that is learnt (see the module).

    Args:
        initial: the activations before the edit, ``[requests, places, d]``; the first radius is twice their length.
        limit: of ``‖δ‖``, ``[requests, places]``.
        weight: of a row in the loss.
        stop_loss: at which a request ends; steps aim at half of it.
    """

    by_row = True

    def __init__(self, initial: torch.Tensor, limit: torch.Tensor, weight: float, stop_loss: float):
        self.weight, self.goal = weight, max(stop_loss / 2, 1e-3)
        count = len(initial)
        self.best = torch.zeros_like(initial)  # the best δ so far; steps start from here
        self.total = torch.full((count,), torch.inf, device=initial.device)  # its loss
        self.gained = torch.zeros_like(self.total, dtype=torch.bool)  # whether the last evaluation was the best
        self.gain = torch.zeros_like(self.total)  # by which part of the loss
        self.predicted = torch.zeros_like(self.total)  # what the model said of the δ that is measured next
        self.radius = torch.minimum(_FIRST_RADIUS * initial.flatten(1).norm(dim=1), limit.norm(dim=1))
        self.growth = torch.full_like(self.total, _GROWTH)
        self.few = torch.zeros_like(self.total)  # evaluations in a row with small gains
        # around the best δ: the log-odds of the rows, the root of the drift, and their gradients, the drift's last
        self.odds = self.root = self.slopes = self.decay = torch.empty(0)

    def judge(self, delta: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        """Which requests keep what was just measured: those that it makes better, ``[running]`` bool."""
        first = torch.isinf(self.total)
        before = torch.where(first, total, self.total)
        self.gained = first | (total < before)
        gain = torch.where(self.gained, before - total, 0.0)
        if not bool(first.all()):
            length = (delta - self.best).flatten(1).norm(dim=1)
            freer = self._learn_radius(length, before - total, before - self.predicted)
            small = ((gain < _SMALL_GAIN * before) & ~freer) | (gain < self.goal)
            self.few = torch.where(small, self.few + 1, 0.0)
        self.best = torch.where(self.gained.view(-1, 1, 1), delta, self.best)
        self.total = torch.where(self.gained, total, self.total)
        return self.gained

    def _learn_radius(self, length: torch.Tensor, gain: torch.Tensor, hoped: torch.Tensor) -> torch.Tensor:
        """Draw a lesson from a step of a length, and return for whom the radius has grown, ``[running]`` bool."""
        larger = (gain > _RIGHT * hoped) & (length > 0.8 * self.radius)
        smaller = gain < _WRONG * hoped
        self.growth = torch.where(gain < 0, _CAREFUL_GROWTH, self.growth)
        self.radius = torch.where(
            larger, self.growth * self.radius, torch.where(smaller, _SHRINKAGE * length, self.radius)
        )
        return larger

    def found(self, delta: torch.Tensor) -> torch.Tensor:
        """The outcome: the best δ that was measured."""
        return self.best

    def move(self, at: Measured) -> tuple[torch.Tensor, torch.Tensor]:
        """The next δ (of requests that end: the best one), and which requests have little to gain from going on."""
        count, rows = at.rows.shape
        loss = at.rows.clamp_min(_LEAST)
        root = at.drift.clamp_min(0).sqrt()
        by_loss = at.gradient[:, :rows].flatten(2) / self.weight
        # d m / d f = −1 / (1 − exp(−f)), and d √D = d D / 2 √D
        slopes = torch.cat(
            [
                by_loss / torch.expm1(-loss).unsqueeze(2),
                at.gradient[:, rows:].flatten(2) / (2 * root.clamp_min(1e-3)).view(count, 1, 1),
            ],
            dim=1,
        )
        odds = -loss - torch.log(-torch.expm1(-loss))
        if not len(self.odds):
            self.odds, self.root, self.slopes, self.decay = odds, root, slopes, at.decay
        gained = self.gained.view(-1, 1, 1)
        # A δ that was worse says how the gradients change on the way there: their means are right along the whole way.
        self.slopes = torch.where(gained, slopes, (self.slopes + slopes) / 2)
        self.odds = torch.where(self.gained.unsqueeze(1), odds, self.odds)
        self.root = torch.where(self.gained, root, self.root)
        self.decay = torch.where(self.gained, at.decay, self.decay)
        step, self.predicted = self._step()
        ended = self.few >= torch.where(self.total < _NEAR * self.goal, _SMALL_GAINS - 1, _SMALL_GAINS)
        stays = (ended | ~at.moving).view(-1, 1, 1)
        return torch.where(stays, self.best, within(self.best + step, at.limit)), ended

    def _step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The step ``d`` from the best δ, ``[running, places, d]``, and ``M(d)``, ``[running]``.

        The damping ``λ`` in ``M(d) + λ/2 ‖d‖²`` falls until the goal or the radius is reached, and Newton's method
        follows the minimum. With ``d = Bᵀ a`` (``B``: gradients and δ) everything is said by ``K = B Bᵀ``; small
        matrices in float64 on the CPU, which also serves accelerators without float64.
        """
        basis = torch.cat(
            [self.slopes, self.best.flatten(1).unsqueeze(1)], dim=1
        )  # B, [running, rows + 2, places · d]
        k = (basis @ basis.transpose(1, 2)).double().cpu()
        k = k + torch.diag_embed(1e-8 * k.diagonal(dim1=1, dim2=2) + 1e-12)
        odds, root, total, radius, decay = (
            t.double().cpu() for t in (self.odds, self.root, self.total, self.radius, self.decay)
        )
        count, rows = odds.shape
        bend = torch.where(k[:, -1, -1] > 1e-9, decay / (2 * k[:, -1, -1].clamp_min(1e-9)), 0.0)  # c
        start = torch.zeros(count, rows + 2, dtype=torch.float64)
        start[:, -1] = 1.0  # δ itself
        none = torch.zeros(count, 1, dtype=torch.float64)
        begins = (self.best == 0).flatten(1).all(dim=1).cpu()
        goal = torch.where(begins, _FIRST_PART * total, self.goal)

        def model(a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            """``M`` and ``‖d‖``."""
            by, whole = _times(k, a), a + start
            unlikely = self.weight * torch.nn.functional.softplus(-(odds + by[:, :rows])).sum(1)
            drift = (root + by[:, rows]).square()
            kept = bend * (_times(k, whole) * whole).sum(1) + decay / 2
            return unlikely + drift + kept, (by * a).sum(1).clamp_min(0).sqrt()

        a = torch.zeros_like(start)
        value, length = model(a)
        damping = 2 * k.diagonal(dim1=1, dim2=2)[:, :rows].mean(1)
        going = torch.ones(count, dtype=torch.bool)
        for _ in range(_DAMPINGS):
            new = a
            for _ in range(2):
                by = _times(k, new)
                wrong = torch.sigmoid(-(odds + by[:, :rows]))
                pull = torch.cat([-self.weight * wrong, 2 * (root + by[:, rows]).unsqueeze(1), none], dim=1)
                pull = pull + 2 * bend.unsqueeze(1) * (new + start) + damping.unsqueeze(1) * new
                bends = torch.cat([self.weight * wrong * (1 - wrong), 2 + none, none], dim=1)
                system = bends.unsqueeze(2) * k + torch.diag_embed((2 * bend + damping).unsqueeze(1).expand_as(new))
                new = new - torch.linalg.solve(system, pull)
            new_value, new_length = model(new)
            right = going & torch.isfinite(new_value)
            # The last step goes as far as the radius; between two points of the path, lengths are at most the mean.
            part = ((radius - length) / (new_length - length).clamp_min(1e-12)).clamp(0, 1)
            part = torch.where(right & (new_length > radius), part, right.double()).unsqueeze(1)
            a = torch.lerp(a, new, part)
            going = right & (new_length <= radius)
            value, length = model(a)
            going = going & (value > goal)
            if not bool(going.any()):
                break
            damping = _DAMPING_FACTOR * damping
        step = (a.to(basis).unsqueeze(1) @ basis).view_as(self.best)
        return step, value.to(self.total)

    def select(self, picked: torch.Tensor) -> None:
        """Go on with these requests only."""
        for name in (
            "best",
            "total",
            "gained",
            "predicted",
            "radius",
            "growth",
            "few",
            "odds",
            "root",
            "slopes",
            "decay",
        ):
            setattr(self, name, getattr(self, name)[picked])


def _times(k: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return (k @ a.unsqueeze(-1)).squeeze(-1)

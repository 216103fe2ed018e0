"""How a value is optimised: what a config says of it, and what a method decides for one request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

ValueOptimiser = Literal["adam", "gauss_newton"]


@dataclass(frozen=True)
class ValueSettings:
    """How a value is optimised.

    Args:
        steps: evaluations of the loss; the last one is only measured, so there are at most ``steps - 1`` updates.
        lr: Adam's learning rate.
        optimiser: what moves the values (`optimisers`); Gauss-Newton needs a third of Adam's evaluations.
        weight_decay: factor of ``‖δ‖ / ‖a‖²``, ``a`` the activation before the edit.
        clamp: ``‖δ‖`` is kept below ``clamp · ‖a‖``.
        against_all_rows: measure δ by the activations ``A`` of all rows of a request, the drift row included, instead
            of by the bare prompt's: the decay is the factor times ``√rows · ‖δ‖ / ‖A‖``, the limit ``clamp · ‖A‖``
            (NAMET).
        kl_factor: factor of the drift term ``KL(p_δ ‖ p_0)`` on the row "<subject> is a".
        stop_loss: a request stops when its loss falls below.
        holds_from: a request whose target already has this probability, before anything is added, gets a value of
            zero; ``exp`` of minus the mean negative log-likelihood per token. Above 1: only ``stop_loss`` decides.
        nll_factor: factor of the negative log-likelihood.
        settled_factor: once every supervised token of a request is the model's first choice, ``nll_factor`` is
            multiplied by this in the next step, and the request stops if its drift term is at most ``settled_kl``
            (PMET); ``None`` switches the rule off.
        settled_kl: see ``settled_factor``.
        together_factor: factor of the term that pulls a fact's hidden states in different contexts together (CORE).
        together_layers: the layers whose outputs that term compares.
        keep_path: record δ at every step (tests).
    """

    steps: int
    lr: float
    weight_decay: float
    clamp: float
    kl_factor: float
    optimiser: ValueOptimiser = "adam"
    against_all_rows: bool = False
    stop_loss: float = 0.05
    holds_from: float = 2.0
    nll_factor: float = 1.0
    settled_factor: float | None = None
    settled_kl: float = 0.01
    together_factor: float = 0.0
    together_layers: tuple[int, ...] = ()
    keep_path: bool = False


@dataclass(frozen=True)
class Guide:
    """What a method decides about the value of one request, beyond the settings that all requests share (EAMET).

    Args:
        start: δ to begin with, ``[places, d]`` fp32.
        limit: ``‖δ‖`` is kept below this instead of ``clamp · ‖a‖``, ``[places]``.
        term: one more term of the loss, ``[]``, from δ ``[places, d]``; differentiable.
    """

    start: torch.Tensor
    limit: torch.Tensor
    term: Callable[[torch.Tensor], torch.Tensor]

"""Single experts of a fused bank: what each of them reads, and whether it is a linear memory.

Fused experts have no modules of their own. The bank is called once, with all tokens and their routing. Let ``w`` be
the routing weight of expert ``e`` for a token (0 where the token is not routed to it) and ``a`` the activation behind
the expert's first projection. Then the bank computes

    Σ_e (W_e κ_e + w b_e),   κ_e = w a_e

so the second projection ``W_e`` of every expert is a linear memory like that of a dense MLP, with the key ``κ_e``,
which is zero for tokens that go elsewhere. This holds for the experts that transformers itself can dispatch to
several implementations; they say how their parameters are laid out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_DECLARED = ("has_gate", "has_bias", "is_transposed", "down_proj")


@dataclass(frozen=True)
class Routing:
    """What a bank of experts is called with.

    Args:
        tokens: states, ``[tokens, H]``.
        experts: the experts of each token, ``[tokens, k]`` int64.
        weights: their routing weights, ``[tokens, k]``.
    """

    tokens: torch.Tensor
    experts: torch.Tensor
    weights: torch.Tensor


def routing_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Routing | None:
    """Read the arguments of a call of a bank; ``None`` if they are not tokens and their routing."""
    names = ("hidden_states", "top_k_index", "top_k_weights")
    given = [*args, *(kwargs[name] for name in names[len(args) :] if name in kwargs)]
    if len(given) != 3 or not all(isinstance(t, torch.Tensor) and t.dim() == 2 for t in given):
        return None
    tokens, experts, weights = given
    if experts.is_floating_point() or experts.shape != weights.shape or experts.shape[0] != tokens.shape[0]:
        return None
    return Routing(tokens, experts, weights)


def expert_keys(bank: nn.Module, routing: Routing, expert: int) -> torch.Tensor:
    """``κ`` of one expert for all tokens, ``[tokens, I]``; differentiable in the tokens and the weights."""
    up_name = "gate_up_proj" if bank.has_gate else "up_proj"
    chosen = routing.experts == expert
    rows = chosen.any(dim=1).nonzero().flatten()
    weight = (routing.weights * chosen).sum(dim=1)[rows]
    up: torch.Tensor = getattr(bank, up_name)[expert]
    states = routing.tokens[rows].to(up.dtype)
    activation = states @ (up if bank.is_transposed else up.t())
    if bank.has_bias:
        activation = activation + getattr(bank, up_name + "_bias")[expert]
    activation = bank._apply_gate(activation) if bank.has_gate else bank.act_fn(activation)  # type: ignore[operator]
    keys = activation.new_zeros(routing.tokens.shape[0], activation.shape[1])
    return keys.index_put((rows,), activation * weight.to(activation.dtype).unsqueeze(1))


def expert_output(bank: nn.Module, keys: torch.Tensor, expert: int) -> torch.Tensor:
    """``W κ`` of one expert, ``[tokens, H]``."""
    down: torch.Tensor = bank.down_proj[expert]  # type: ignore[index]
    return keys @ (down if bank.is_transposed else down.t())


def is_linear_memory(bank: nn.Module, routing: Routing, output: torch.Tensor, tolerance: float) -> bool:
    """Whether a call of a bank gave the sum above, so that its experts can be edited one by one.

    Args:
        bank: the module.
        routing: of the call.
        output: of the call.
        tolerance: largest relative difference that counts as equal.
    """
    if not all(hasattr(bank, name) for name in _DECLARED):
        return False
    try:
        total = torch.zeros_like(output, dtype=torch.float32)
        for expert in routing.experts.unique().tolist():
            total += expert_output(bank, expert_keys(bank, routing, expert), expert)
            if bank.has_bias:
                weight = (routing.weights * (routing.experts == expert)).sum(dim=1, keepdim=True)
                total += weight * bank.down_proj_bias[expert]  # type: ignore[index]
    except (RuntimeError, TypeError, AttributeError, IndexError):
        return False
    return float((total - output).norm()) <= tolerance * max(float(output.norm()), 1e-12)

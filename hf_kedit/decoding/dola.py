"""DoLa: Decoding by Contrasting Layers (arXiv 2309.03883)."""

from __future__ import annotations

import math

import torch

from .settings import DoLaConfig


def dola_scores(final: torch.Tensor, premature: torch.Tensor, config: DoLaConfig) -> torch.Tensor:
    """What the last layer says beyond an earlier one (eqs. 2-5).

    Args:
        final: logits of the model, ``[n, vocab]`` float32; each row is one position.
        premature: logits of the candidate layers at the same positions, ``[layers, n, vocab]`` float32.
        config: the settings.

    Returns:
        ``log p(x) − log q_M(x)`` for the tokens that the last layer finds plausible, −∞ for all others,
        ``[n, vocab]`` float32. M is the layer whose distribution is farthest from the last one's.
    """
    log_p = final.log_softmax(-1)
    if len(premature) == 1:
        log_q = premature[0].log_softmax(-1)
    else:
        log_each = premature.log_softmax(-1)
        distance = _divergence(log_p, log_each, released=config.divergence == "released")
        if config.divergence == "released":  # one layer for the whole batch
            log_q = log_each[distance.mean(1).argmax()]
        else:
            log_q = log_each[distance.argmax(0), torch.arange(len(final), device=final.device)]
    # The adaptive plausibility constraint: a ratio of two tiny probabilities says nothing.
    plausible = log_p >= log_p.amax(-1, keepdim=True) + math.log(config.alpha)
    return (log_p - log_q).masked_fill(~plausible, -torch.inf)


def _divergence(log_p: torch.Tensor, log_q: torch.Tensor, *, released: bool) -> torch.Tensor:
    """How far the candidate layers are from the last one, ``[layers, n]``.

    The Jensen-Shannon divergence is ½[KL(p‖m) + KL(q‖m)] with m = ½(p + q). The released code computes
    ½[KL(m‖p) + KL(m‖q)], averaged over the vocabulary instead of summed.
    """
    p, q = log_p.exp(), log_q.exp()
    m = (p + q) / 2
    log_m = m.log()
    # x log x → 0: where a probability is 0 in float32 its logarithm may be −∞ or not, and its term is 0.
    if released:
        terms = torch.where(m > 0, m * (2 * log_m - log_p - log_q), 0)
        return terms.mean(-1) / 2
    terms = torch.where(p > 0, p * (log_p - log_m), 0) + torch.where(q > 0, q * (log_q - log_m), 0)
    return terms.sum(-1) / 2

"""DeCo: Dynamic Correction Decoding (arXiv 2410.11779)."""

from __future__ import annotations

import torch

from .settings import DeCoConfig


def deco_scores(final: torch.Tensor, premature: torch.Tensor, config: DeCoConfig) -> torch.Tensor:
    """Correct the last layer by the earlier layer that is surest of a candidate (sec. 4).

    Args:
        final: logits of the model, ``[n, vocab]`` float32; each row is one position.
        premature: logits of the layers to choose from, behind the final norm, ``[layers, n, vocab]`` float32.
        config: the settings.

    Returns:
        ``z_N + λ w z_A`` for the candidates, −∞ for all other tokens, ``[n, vocab]`` float32: A is the layer that
        gives one candidate the largest probability, w that probability.
    """
    candidates = _candidates(final, config)
    sureness = premature.softmax(-1).masked_fill(~candidates, 0).amax(-1)  # [layers, n]
    weight, layer = sureness.max(0)
    chosen = premature[layer, torch.arange(len(final), device=final.device)]
    return (final + config.weight * weight[:, None] * chosen).masked_fill(~candidates, -torch.inf)


def _candidates(final: torch.Tensor, config: DeCoConfig) -> torch.Tensor:
    """The fewest tokens that hold ``top_p`` of the probability, at most ``top_k``; ``[n, vocab]`` bool."""
    most = min(config.top_k, final.shape[-1])
    likely, tokens = final.softmax(-1).topk(most, dim=-1)
    # A token belongs to them as long as those before it do not hold the share yet; the first always does.
    among = likely.cumsum(-1) - likely < config.top_p
    return torch.zeros_like(final, dtype=torch.bool).scatter(-1, tokens, among)

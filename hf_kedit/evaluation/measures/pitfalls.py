"""What a second edit does to a first one: the arithmetic of ConflictEdit and RoundEdit (arXiv 2310.02129).

``p(o)`` is always the probability of an object per token (geometric mean), averaged over the prompts of its relation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def conflict_scores(
    first: float,
    both: float,
    now_true: float,
    *,
    alone: tuple[float, float] | None = None,
    tied: tuple[float, float] | None = None,
) -> dict[str, float]:
    """The numbers of one case of ConflictEdit; their means over cases are what is published.

    Args:
        first: what the first edit said, after the first edit: ``p₁(o₁)``.
        both: the same after both: ``p₂(o₁)``.
        now_true: what holds instead after both: ``p₂(o₂)``.
        alone: after the second edit alone, its own object and that of the first.
        tied: the tied fact before any edit, and after both.

    Returns:
        ``CS``: 1 if what holds now is likelier; ``CM = max((p₁(o₁) − p₂(o₁)) / p₁(o₁), −1)``; ``Succ``: 1 if the
        second edit alone makes its object the likelier one; ``TFD``: the share that the tied fact lost. Without
        ``CM`` and ``TFD`` where they would be divided by 0.
    """
    numbers = {"CS": float(now_true > both)}
    if first > 0:
        numbers["CM"] = max((first - both) / first, -1.0)
    if alone is not None:
        numbers["Succ"] = float(alone[0] > alone[1])
    if tied is not None and tied[0] > 0:
        numbers["TFD"] = (tied[0] - tied[1]) / tied[0]
    return numbers


def round_scores(
    there: tuple[float, float],
    back: tuple[float, float],
    before: Sequence[float],
    after: Sequence[float],
) -> dict[str, float]:
    """The numbers of one case of RoundEdit; their means over cases are what is published.

    Args:
        there: after the first edit, its new object and the one whose place it takes.
        back: after the second, the old object again and the one between.
        before: of the unedited model: the edited object, then the other true ones.
        after: of the model after both edits, in the same order.

    Returns:
        ``Succ``: half a point for each edit that made its object the likelier one; ``D``: Jensen-Shannon divergence of
        the distributions over the true objects before and after, nats (`object_divergence`), and ``D_released``, what
        the published code prints; ``IR``: share of the *other* true objects that are less likely than before; ``FR``:
        1 if that is more than half of them.
    """
    lost = [float(b > a) for b, a in zip(before[1:], after[1:], strict=True)]
    ignored = sum(lost) / len(lost)
    numbers = {
        "Succ": 0.5 * (there[0] > there[1]) + 0.5 * (back[0] > back[1]),
        "IR": ignored,
        "FR": float(ignored > 0.5),
    }
    if sum(before) > 0 and sum(after) > 0:
        numbers["D"] = object_divergence(before, after)
        # torch's KLDivLoss(reduction="batchmean") divides by the first dimension, which here is that of the objects.
        numbers["D_released"] = numbers["D"] / len(before)
    return numbers


def object_divergence(before: Sequence[float], after: Sequence[float]) -> float:
    """Jensen-Shannon divergence of two lists of probabilities, each brought to a sum of 1 first, in nats."""
    p, q = ([value / sum(values) for value in values] for values in (before, after))
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]

    def divergence(of: Sequence[float]) -> float:
        return sum(a * math.log(a / m) for a, m in zip(of, middle, strict=True) if a > 0)

    return (divergence(p) + divergence(q)) / 2

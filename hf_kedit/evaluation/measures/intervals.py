"""How far a number that was measured on few edits can be trusted: intervals that hold the true one 95 times in 100."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

_Z = 1.959963984540054
"""Half of the width of 95 percent of a standard normal distribution, in standard deviations."""
_DRAWS = 1000


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson, 1927, Journal of the American Statistical Association 22).

    Unlike mean ± 2 standard errors it stays inside [0, 1], and is not empty where all of few cases agree. For means of
    shares (an edit of whose probes some succeed) it is too wide rather than too narrow: their variance is at most that
    of outcomes of 0 and 1 with the same mean.

    Args:
        share: in [0, 1].
        n: independent cases behind it, at least 1.
    """
    weight = _Z**2 / n
    centre = (share + weight / 2) / (1 + weight)
    half = _Z / (1 + weight) * math.sqrt(share * (1 - share) / n + weight / (4 * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(cases: Sequence[Sequence[float]], number: Callable[[Any], Any]) -> tuple[float, float] | None:
    """Percentile interval of a function of means, from samples of the cases with replacement (Efron, 1979).

    Args:
        cases: the values of each case, ``[cases, values]``.
        number: means ``[draws, values]`` → the numbers of interest ``[draws]``.

    Returns:
        The interval, the same on every call; ``None`` for fewer than two cases.
    """
    n = len(cases)
    if n < 2:
        return None
    counts = np.random.default_rng(0).multinomial(n, [1 / n] * n, size=_DRAWS)  # how often each case is drawn
    with np.errstate(all="ignore"):  # files may hold numbers of any size
        low, high = np.percentile(number(counts @ np.asarray(cases, dtype=float) / n), [2.5, 97.5])
    return float(low), float(high)

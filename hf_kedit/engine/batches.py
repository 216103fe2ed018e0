"""Working through a list part by part, with smaller parts where memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from ..logging import get_logger
from .forward import device_of

logger = get_logger(__name__)
T = TypeVar("T")
_ROWS = {"cpu": 64}
_ROWS_ELSEWHERE = 512


def rows_at_once(model: torch.nn.Module) -> int:
    """Rows per forward: few on a CPU, where larger batches only add padding, many on an accelerator."""
    return _ROWS.get(device_of(model).type, _ROWS_ELSEWHERE)


def in_batches(
    places: Sequence[int], size: int, run: Callable[[Sequence[int]], T]
) -> Iterator[tuple[Sequence[int], T]]:
    """Call ``run`` on parts of ``places`` in order; a part that is too large for the memory is halved and run again.

    Args:
        places: what to work through.
        size: places per call.
        run: from a part to its result.

    Yields:
        Each part and its result.

    Raises:
        torch.OutOfMemoryError: if a single place is too large.
    """
    start = 0
    while start < len(places):
        part = places[start : start + size]
        try:
            result = run(part)
        except torch.OutOfMemoryError:
            if len(part) == 1:
                raise
        else:
            start += len(part)
            yield part, result
            continue
        # behind the handler, because the error holds on to the tensors of the run that failed
        size = max(len(part) // 2, 1)
        logger.info("out of memory with %d at once; going on with %d", len(part), size)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

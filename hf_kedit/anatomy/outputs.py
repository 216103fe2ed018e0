"""The one accessor for what a block or an attention module returns.

Some families return the hidden states as a bare tensor, others a tuple that starts with them. ``output[0]`` on a
bare tensor silently takes row 0 of the batch.
"""

from __future__ import annotations

from typing import Any

import torch


def block_output(output: Any) -> torch.Tensor:
    """Return the hidden states of a module's output: the first element of a tuple or list, else the output."""
    return output[0] if isinstance(output, (tuple, list)) else output


def replace_block_output(output: Any, new: torch.Tensor) -> Any:
    """Return the same structure as ``output`` with its hidden states replaced by ``new``."""
    if isinstance(output, (tuple, list)):
        rest = (new, *output[1:])
        return type(output)(*rest) if hasattr(output, "_fields") else type(output)(rest)
    return new

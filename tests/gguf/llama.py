"""llama.cpp itself, through ``llama-cpp-python`` (not among the extras: it is compiled when it is installed).

CMAKE_BUILD_PARALLEL_LEVEL=2 pip install llama-cpp-python==0.3.36
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

llama_cpp = pytest.importorskip("llama_cpp")
EXACT = 0  # GGML's number of float32, for the cache of keys and values


@contextlib.contextmanager
def opened(model: Path, adapter: Path | None = None, context: int = 256, **options: Any) -> Iterator[Any]:
    """A file in llama.cpp, on one thread, with exact caches."""
    lora = {} if adapter is None else {"lora_path": str(adapter)}
    cache = {"type_k": EXACT, "type_v": EXACT}
    llama = llama_cpp.Llama(str(model), n_ctx=context, verbose=False, n_threads=1, **lora, **cache, **options)
    try:
        yield llama
    finally:
        llama.close()


def logits_of(model: Path, ids: list[int], adapter: Path | None = None) -> torch.Tensor:
    """What llama.cpp computes for ids, ``[positions, vocabulary]``."""
    with opened(model, adapter, logits_all=True) as llama:
        llama.eval(ids)
        return torch.from_numpy(np.array(llama.scores[: len(ids)]))


def tokens_of(llama: Any, text: str) -> list[int]:
    """How llama.cpp reads a text, special tokens included."""
    framed = llama.metadata["tokenizer.ggml.add_bos_token"] == "true"
    return list(llama.tokenize(text.encode(), add_bos=framed, special=True))


def greedy(llama: Any, ids: list[int], count: int) -> list[int]:
    """The most probable continuation, also beyond the end of the text."""
    return list(itertools.islice(llama.generate(ids, temp=0.0, repeat_penalty=1.0, reset=True), count))

"""Golden cases: numbers of independent implementations on tiny random-weight models.

The full set lies beside the repository (``../shared/golden``) or where ``KEDIT_GOLDEN`` says; a small subset is in
``tests/golden`` so that a fresh clone checks parity too.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

_HERE = Path(__file__).resolve().parent
_FOLDERS = [
    Path(p)
    for p in (os.environ.get("KEDIT_GOLDEN", ""), _HERE.parent.parent / "shared" / "golden", _HERE / "golden")
    if str(p) != "" and Path(p).is_dir()
]


def find(relative: str) -> Path | None:
    """Return a file or folder of the golden data, or ``None``."""
    for root in _FOLDERS:
        if (root / relative).exists():
            return root / relative
    return None


def need(relative: str) -> Path:
    """Return a file or folder of the golden data, or skip the test."""
    path = find(relative)
    if path is None:
        pytest.skip(f"golden data {relative!r} is not here")
    return path


class Case:
    """One golden case.

    Args:
        name: folder of the case.
    """

    def __init__(self, name: str):
        folder = need(name)
        self.name = name
        self.spec: dict[str, Any] = json.loads((folder / "case.json").read_text(encoding="utf-8"))
        self.expected: dict[str, torch.Tensor] = load_file(folder / "expected.safetensors")
        self.model_name = str(self.spec["model"]).rsplit("/", 1)[-1]

    def load(self) -> tuple[Any, Any]:
        """A fresh model and tokenizer."""
        return load_model(self.model_name)

    def check(self, kind: str, expected: torch.Tensor, actual: torch.Tensor, label: str) -> None:
        """Compare by the case's tolerance: relative Frobenius norm, for losses the largest absolute difference."""
        tolerance = self.spec["tolerance"]["values"][kind]
        expected, actual = expected.double(), actual.double().cpu()
        assert expected.shape == actual.shape, f"{self.name} {label}: {tuple(actual.shape)} != {tuple(expected.shape)}"
        difference = (
            (actual - expected).abs().max() if kind == "loss" else (actual - expected).norm() / expected.norm()
        )
        assert float(difference) <= tolerance, f"{self.name} {label}: off by {float(difference):.2e} > {tolerance:.0e}"

    def within(self, name: str, actual: torch.Tensor) -> None:
        """Compare one tensor by its own tolerance: the largest difference, or largest and 99th percentile."""
        expected, tolerance = self.expected[name], self.spec["tolerance"][name]
        assert actual.shape == expected.shape, (name, actual.shape, expected.shape)
        difference = (actual.detach().float() - expected.float()).abs()
        limits = tolerance if isinstance(tolerance, dict) else {"max": tolerance}
        assert float(difference.max()) <= limits["max"], (name, float(difference.max()))
        if "p99" in limits:
            assert float(difference.flatten().quantile(0.99)) <= limits["p99"], name


def load_model(name: str) -> tuple[Any, Any]:
    """A fresh golden model (``gpt2``, ``llama``, ``t5``) and its tokenizer."""
    folder = need(f"models/{name}")
    auto = AutoModelForSeq2SeqLM if name == "t5" else AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@cache
def corpus() -> list[str]:
    """The lines of the golden corpus."""
    return [t for t in need("models/corpus.txt").read_text(encoding="utf-8").split("\n") if t]

"""Settings that every test shares: no network, caches in a temporary folder, one quiet library."""

from __future__ import annotations

import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_KEDIT_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_KEDIT_CACHE", tempfile.mkdtemp(prefix="kedit-test-cache-"))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from hf_kedit import EditableModel
from hf_kedit.logging import disable_progress_bars

torch.set_num_threads(1)
disable_progress_bars()


@pytest.fixture
def world_gpt2() -> EditableModel:
    """A fresh copy of the embedded GPT-2-layout model, with ROME chosen."""
    return EditableModel.from_pretrained("kedit/world-gpt2", "rome")


@pytest.fixture
def world_llama() -> EditableModel:
    """A fresh copy of the embedded Llama-layout model, with ROME chosen."""
    return EditableModel.from_pretrained("kedit/world-llama", "rome")

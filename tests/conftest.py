"""Settings that every test shares: a Hub on this machine and no other, caches in a temporary folder, no bars."""

from __future__ import annotations

import json
import os
import random
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_kedit.testing.hub import LoopbackHub

# Every request for the Hub goes to a server of this process. The libraries read its address when they are imported.
# A program that has imported them before it starts pytest says which port they look at.
_ORGS = {"org": ("user",), "XiaojieGu": ("user",)}
LOOPBACK = LoopbackHub(orgs=_ORGS, port=int(os.environ.get("KEDIT_TEST_HUB_PORT", "0"))).start()
# Where `make real` has put its models; the tests themselves start with empty caches. Workers of pytest-xdist inherit
# what is set below, hence the note of what the shell had.
_SHELL = {name: os.environ.get(name) for name in ("KEDIT_HOME", "HF_HOME", "XDG_CACHE_HOME")}
OUTSIDE: dict[str, str | None] = json.loads(os.environ.setdefault("KEDIT_TEST_OUTSIDE", json.dumps(_SHELL)))
os.environ["KEDIT_HOME"] = tempfile.mkdtemp(prefix="kedit-test-models-")
os.environ.update(LOOPBACK.environment(tempfile.mkdtemp(prefix="kedit-test-home-")))
os.environ.setdefault("HF_KEDIT_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_KEDIT_CACHE", tempfile.mkdtemp(prefix="kedit-test-cache-"))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Processes that tests start find the package of the tests, wherever they run.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH")])
)
# Processes that tests start compute the same bits as this one, whatever the shell says.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import settings
from transformers.utils import logging as transformers_logging

from hf_kedit import EditableModel
from hf_kedit import logging as kedit_logging

torch.set_num_threads(1)
kedit_logging.disable_progress_bars()
# A shell that starts the suite in the background ignores Ctrl-C for it, and many tests are about Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The suite says the same twice. `HYPOTHESIS_PROFILE=search` looks for inputs that nobody has tried yet.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("search", max_examples=2000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """What a test draws from the global generators does not depend on the tests before it."""
    torch.manual_seed(0)
    random.seed(0)


@pytest.fixture(autouse=True)
def same_verbosity() -> Iterator[None]:
    """Commands set the loggers of the process; tests after these find them as they were."""
    ours, bars = kedit_logging.get_verbosity(), (kedit_logging._progress_bars, kedit_logging._in_lines)
    theirs = transformers_logging.get_verbosity()
    yield
    kedit_logging.set_verbosity(ours)
    kedit_logging._progress_bars, kedit_logging._in_lines = bars
    transformers_logging.set_verbosity(theirs)


@pytest.fixture
def world_gpt2() -> EditableModel:
    """A fresh copy of the embedded GPT-2-layout model, with ROME chosen."""
    return EditableModel.from_pretrained("kedit/world-gpt2", "rome")


@pytest.fixture
def world_llama() -> EditableModel:
    """A fresh copy of the embedded Llama-layout model, with ROME chosen."""
    return EditableModel.from_pretrained("kedit/world-llama", "rome")


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """The session's Hub, empty before and after."""
    LOOPBACK.reset()
    yield LOOPBACK
    LOOPBACK.reset()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium without a window: one for each file, because Playwright keeps an event loop as long as it runs."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright (extra test)")
    chromium = Path(os.environ.get("CHROMIUM", "/usr/bin/chromium"))
    if not chromium.is_file():
        pytest.skip(f"there is no Chromium at {chromium}")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=str(chromium), args=["--no-sandbox"])
        yield started
        started.close()

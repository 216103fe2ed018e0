"""A first edit that is killed while it takes second moments: the same command again goes on from what is kept."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from safetensors import safe_open

from .conftest import FACT

ONE = ("-p", FACT["prompt"], "--subject", FACT["subject"], "-t", FACT["target_new"])
OFTEN = "from hf_kedit.statistics import collecting; collecting.SAVE_SECONDS = collecting.SAVE_SHARE = 0.0; "
"""Partial sums after every few texts, as the embedded model reads all of them in less than the usual five seconds."""


def killed(words: Sequence[str], cache: Path, before: str = "") -> int:
    """Run ``kedit`` in a process of its own, and kill it once partial sums lie in its cache.

    Args:
        words: of the command line.
        cache: ``HF_KEDIT_CACHE`` of that process.
        before: Python that runs first.

    Returns:
        How many tokens the sums that are left have seen.
    """
    code = f"{before}import runpy, sys; sys.argv = ['kedit', *{list(words)!r}]; runpy.run_module('hf_kedit.cli', "
    code += "run_name='__main__')"
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"HF_KEDIT_CACHE": str(cache)})
    try:
        while process.poll() is None and not list(cache.glob("**/partial.safetensors")):
            time.sleep(0.01)
        assert process.poll() is None, "the process ended before it could be killed"
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    (partial,) = cache.glob("**/partial.safetensors")
    with safe_open(partial, framework="pt") as file:
        return int(file.metadata()["tokens"])


def goes_on(words: Sequence[str], cache: Path) -> tuple[int, str]:
    """Run ``kedit`` to its end.

    Returns:
        At how many tokens it took second moments up again, and what it wrote to standard output.
    """
    command = [sys.executable, "-m", "hf_kedit.cli", *words, "--debug"]
    done = subprocess.run(command, env=os.environ | {"HF_KEDIT_CACHE": str(cache)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (tokens,) = re.findall(r"resuming statistics at (\d+) tokens", done.stderr)
    return int(tokens), done.stdout


def moments_in(cache: Path) -> list[tuple[int, int]]:
    """Tokens that every finished file has seen, and how many were wanted."""
    found = []
    for path in cache.glob("**/*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found.append((int(file.metadata()["count"]), int(file.metadata()["wanted"])))
    return found


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_first_edit_that_is_killed_goes_on(tmp_path: Path) -> None:
    words = ("edit", "-m", "kedit/world-gpt2", "-M", "rome", "-s", "stats_tokens=12000", *ONE, "--no-side-effects")
    kept = killed(words, tmp_path, OFTEN)
    assert 0 < kept < 12000
    assert goes_on(words, tmp_path)[0] == kept
    assert moments_in(tmp_path) == [(12000, 12000)]

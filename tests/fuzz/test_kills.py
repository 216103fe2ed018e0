"""Saves that are killed, or meet a full disk, at any of their file operations: the old edit is there, or the new."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.killed import SCENARIOS
from tests.fuzz.mutations import FIRST

ROOT = Path(__file__).resolve().parents[2]


def killed(folder: Path, scenario: str, mode: str, count: int, seed: int) -> list[tuple[str, Any]]:
    """What was wrong after each of the saves, ``None`` for nothing."""
    words = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tests.fuzz.killed",
        str(folder),
        scenario,
        mode,
        str(count),
        str(seed),
    ]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[tuple[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    assert found
    return found


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_save_that_is_killed(scenario: str, tmp_path: Path) -> None:
    wrong = [entry for entry in killed(tmp_path, scenario, "kill", 6, 0) if entry[1]]
    assert not wrong, wrong


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["kill", "error"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_save_that_is_killed_anywhere(scenario: str, mode: str, tmp_path: Path) -> None:
    wrong = [entry for entry in killed(tmp_path, scenario, mode, 10**6, FIRST) if entry[1]]
    assert not wrong, "\n".join(map(str, wrong))

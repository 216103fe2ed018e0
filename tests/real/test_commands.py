"""Commands with a real model, each in a process of its own, as a user starts it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.test_killed import goes_on, killed, moments_in

pytestmark = pytest.mark.real
MODEL = ("-m", "kedit/smollm2-135m")
ONE = ("-p", "The mother tongue of {} is", "--subject", "Danielle Darrieux", "-t", "English")


def test_a_first_edit_that_is_killed_goes_on(models: Path, tmp_path: Path) -> None:
    """SIGKILL once partial sums lie there, written every five seconds; the same command goes on from them."""
    words = ("edit", *MODEL, "-M", "rome", *ONE, "--no-side-effects", "--format", "json")
    kept = killed(words, tmp_path)
    again, said = goes_on(words, tmp_path)
    assert again == kept > 0
    assert json.loads(said)
    ((read, wanted),) = moments_in(tmp_path)
    assert read >= wanted > kept

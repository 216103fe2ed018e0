"""The page on sharing: its Python and its commands run, in order, against the loopback Hub."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_kedit.testing.hub import LoopbackHub
from tests import test_quickstart

pytestmark = pytest.mark.hub
PAGE = "docs/share.md"


def test_the_page_does_what_it_says(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test_quickstart.test_python_blocks(PAGE, tmp_path, monkeypatch)
    test_quickstart.test_command_lines(PAGE, tmp_path, monkeypatch)
    test_quickstart.test_links_between_pages_lead_somewhere(PAGE)

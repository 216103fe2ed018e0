"""README.md opens with a real fact: what it says is printed is what is printed."""

from __future__ import annotations

import contextlib
import io
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "docs" / "pictures" / "terminal.py"


@pytest.mark.real
def test_the_first_lines_of_the_readme() -> None:
    code, output = runpy.run_path(str(SCRIPT))["shown"]((ROOT / "README.md").read_text(encoding="utf-8"))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile("\n".join(code), "README.md", "exec"), {"__name__": "readme"})
    assert printed.getvalue().rstrip().splitlines() == output

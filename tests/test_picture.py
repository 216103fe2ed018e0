"""The picture at the top of README.md shows what README.md says, all of it, to everybody."""

from __future__ import annotations

import runpy
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "pictures"


def test_the_picture_is_of_the_readme() -> None:
    script = runpy.run_path(str(FOLDER / "terminal.py"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code, output = script["shown"](readme)
    svg = (FOLDER / "terminal.svg").read_text(encoding="utf-8")
    assert svg == script["picture"](code, output), "run python docs/pictures/terminal.py"
    root = ET.fromstring(svg)
    texts = [t.text or "" for t in root.iter("{http://www.w3.org/2000/svg}text")]
    assert [t.removeprefix(">>> ") for t in texts] == [*code, *output]
    assert max(map(len, texts)) <= 106, "a line is wider than the picture"
    assert "prefers-reduced-motion" in svg and root.get("role") == "img"
    assert "docs/pictures/terminal.svg" in readme and "script" not in svg

"""The pictures of the documentation show what they say, to everybody, and are made by commands that run."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import textwrap
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

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


def test_the_first_page_of_the_site_shows_what_the_readme_shows() -> None:
    """Its example and what that prints are the README's, whose output is compared with what the model says."""
    blocks = [
        re.search(rf"^ *```{name}\n(.*?)^ *```", (ROOT / page).read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
        for page in ("README.md", "docs/index.md")
        for name in ("py", "text")
    ]
    readme_code, readme_output, code, output = (textwrap.dedent(block[1]) for block in blocks if block)
    assert code == readme_code and output == readme_output


def test_the_gallery_has_every_picture_small_described_and_with_its_command() -> None:
    text = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    sections = text.split("\n## ")[1:]
    shown = {}
    for section in sections:
        picture = re.search(r"!\[(.{40,}?)\]\(pictures/(\S+)\)", section)
        assert picture is not None, f"no picture, or no description of it: {section[:60]!r}"
        command = re.search(r"`python (docs/pictures/\w+\.py)", section)
        assert command is not None and (ROOT / command[1]).exists(), section
        shown[picture[2]] = command[1]
    kept = {p.name for p in FOLDER.iterdir() if p.suffix in {".png", ".svg", ".jpg", ".webp", ".gif"}}
    assert set(shown) == kept
    for name in kept:
        assert (FOLDER / name).stat().st_size < 250_000, f"{name} is too large"


@pytest.mark.slow
def test_the_report_is_pictured_by_its_command(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    script = FOLDER / "screens.py"
    if runpy.run_path(str(script))["chromium"]() is None:
        pytest.skip("no chromium")
    subprocess.run([sys.executable, str(script), "--output", str(tmp_path)], check=True)
    name = "html_report.png"
    with image.open(tmp_path / name) as new, image.open(FOLDER / name) as kept:
        assert new.size == kept.size and len(new.convert("RGB").getcolors(1 << 24)) > 20

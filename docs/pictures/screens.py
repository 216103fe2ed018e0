"""A picture of a page that the library writes: the HTML report of an evaluation.

    python docs/pictures/screens.py                 # rewrites docs/pictures/html_report.png, half a minute
    python docs/pictures/screens.py --output DIR    # somewhere else

The command that is pictured is run anew, on a model that comes with the package. A headless Chromium photographs the
page, Pillow brings the picture to 128 colours.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
MODEL = "kedit/world-gpt2"
REPORT = ["eval", "--model", MODEL, "--method", "rome", "--dataset", "world", "--limit", "20", "--html", "report.html"]
WIDTH, HEIGHT = 1080, 748
LIMIT = 250_000
"""Bytes that a picture may have: pages are read on telephones, and the repository keeps every version."""


def chromium() -> str | None:
    """A Chromium of this machine."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def kedit(*words: str, cwd: Path) -> None:
    """Run the command line in a folder."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "hf_kedit.cli", *words], cwd=cwd, env=env, check=True, capture_output=True)


def photograph(page: Path, picture: Path, browser: str, width: int = WIDTH, height: int = HEIGHT) -> None:
    """What a browser shows of a page, without scrolling."""
    options = ["--headless", "--no-sandbox", "--hide-scrollbars", "--disable-gpu", f"--window-size={width},{height}"]
    command = [browser, *options, f"--screenshot={picture}", page.resolve().as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)


def reduce(picture: Path, target: Path) -> None:
    """Write a picture in few colours.

    Raises:
        ValueError: if it is too large all the same.
    """
    with Image.open(picture) as image:
        image.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(target, optimize=True)
    if target.stat().st_size > LIMIT:
        raise ValueError(f"{target} has {target.stat().st_size} bytes; {LIMIT} are allowed")


def main(output: Path) -> None:
    """Make the picture.

    Raises:
        SystemExit: without a Chromium.
    """
    browser = chromium()
    if browser is None:
        raise SystemExit("no chromium on this machine: the picture stays as it is")
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        kedit(*REPORT, cwd=place)
        photograph(place / "report.html", place / "report.png", browser)
        reduce(place / "report.png", output / "html_report.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the pictures of the documentation.")
    parser.add_argument("--output", type=Path, default=FOLDER)
    main(parser.parse_args().output)

"""The animated picture at the top of README.md: its first Python block and what it prints, as a terminal shows it.

    python docs/pictures/terminal.py            # rewrites docs/pictures/terminal.svg

Everything shown is read from README.md, whose output `tests/real/test_readme.py` compares with what the model says.
The picture is SVG with CSS: no script, no font from elsewhere, its own dark ground for light and dark pages. The whole
text is there for screen readers, and stands still where a reader asks for less motion.
"""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

README = Path(__file__).resolve().parents[2] / "README.md"
PICTURE = Path(__file__).resolve().parent / "terminal.svg"
WIDTH, LINE, TOP, LEFT, SIZE = 940, 22, 62, 22, 14
PER_LINE, PAUSE, AFTER = 0.45, 1.6, 6.0
"""Seconds: between two lines, while the model is edited, and before it begins anew."""
COLOURS = {"code": "#d6deeb", "dim": "#8595ad", "before": "#e5c07b", "after": "#98c379", "harm": "#ef8b92"}


def shown(readme: str) -> tuple[list[str], list[str]]:
    """The lines of the first ``py`` block of README.md, and of the ``text`` block behind it.

    Raises:
        ValueError: if there are none.
    """
    found = re.search(r"^```py\n(.*?)^```\n.*?^```text\n(.*?)^```", readme, flags=re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError("README.md has no py block with a text block behind it")
    return found[1].rstrip().splitlines(), found[2].rstrip().splitlines()


def style_of(line: str) -> str:
    """Which colour a printed line has."""
    word = line.strip().partition(":")[0]
    return word if word in ("before", "after", "harm") else "dim"


def picture(code: list[str], output: list[str]) -> str:
    """The SVG: lines come one after the other, the output behind a pause, and all begins again."""
    rows = [("code", f"{'>>> ' if line else ''}{line}", PER_LINE * i) for i, line in enumerate(code)]
    begun = PER_LINE * len(code) + PAUSE
    rows += [(style_of(line), line, begun + PER_LINE * i) for i, line in enumerate(output)]
    whole = rows[-1][2] + AFTER
    height = TOP + LINE * len(rows) + 14
    rules, texts = [], []
    for number, (kind, line, start) in enumerate(rows):
        share = 100 * start / whole
        rules.append(
            f"@keyframes k{number}{{0%,{share:.2f}%{{opacity:0}}{min(share + 1, 100):.2f}%,100%{{opacity:1}}}}"
        )
        rules.append(f".l{number}{{animation:k{number} {whole:.1f}s infinite}}")
        y = TOP + LINE * number
        texts.append(f'<text class="{kind} l{number}" x="{LEFT}" y="{y}" xml:space="preserve">{escape(line)}</text>')
    fills = "".join(f".{kind}{{fill:{colour}}}" for kind, colour in COLOURS.items())
    dots = "".join(
        f'<circle cx="{24 + 20 * i}" cy="22" r="6" fill="{c}"/>'
        for i, c in enumerate(("#ff5f57", "#febc2e", "#28c840"))
    )
    described = escape(" ".join([*code, "Printed:", *output]))
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="t d">
<title id="t">Editing one fact of SmolLM2, and what the model says before and after</title>
<desc id="d">{described}</desc>
<style>text{{font:{SIZE}px ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace}}{fills}
{"".join(rules)}
@media (prefers-reduced-motion:reduce){{text{{animation:none!important;opacity:1}}}}</style>
<rect width="{WIDTH}" height="{height}" rx="10" fill="#1b2330" stroke="#5b6b82"/>
{dots}
{chr(10).join(texts)}
</svg>
"""


if __name__ == "__main__":
    PICTURE.write_text(picture(*shown(README.read_text(encoding="utf-8"))), encoding="utf-8")

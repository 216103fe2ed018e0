"""Pictures in a terminal."""

from __future__ import annotations

from typing import Any

from rich.color import Color
from rich.style import Style
from rich.text import Text

from ..text.pictures import Picture

_SHADES = "@%#*+=-:. "
"""From dark to light, on paper."""


def in_blocks(picture: Picture, *, colour: bool, width: int = 32) -> Text:
    """A picture for a terminal: two pixels in each character, one above the other.

    Args:
        picture: is made smaller.
        colour: whether there are colours; otherwise brightness is shown by how full the characters are.
        width: in characters.
    """
    image = picture.image
    height = max(2, round(width * image.height / image.width / 2) * 2)
    small: Any = image.resize((width, height)).load()
    text = Text()
    for row in range(0, height, 2):
        for column in range(width):
            upper, lower = (small[column, row + below] for below in (0, 1))
            if not colour:
                level = (sum(upper) + sum(lower)) / (6 * 255)
                text.append(_SHADES[min(len(_SHADES) - 1, int(level * len(_SHADES)))])
            else:
                text.append("▀", Style(color=Color.from_rgb(*upper), bgcolor=Color.from_rgb(*lower)))
        text.append("\n" if row + 2 < height else "")
    return text

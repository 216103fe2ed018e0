"""A figure that notebooks show by itself. Imports matplotlib, so nothing imports this file before it draws."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

_SCREEN = 96
_SHARPER = 1.6
"""Pixels of a picture for each that it takes on an ordinary screen."""
_SHADES = 128
"""Shades that are kept: enough for text and heat maps, and a third of the bytes, which notebooks keep for good."""


class Plot(Figure):
    """A matplotlib figure without pyplot: it opens no window, and is gone with the last name for it."""

    def _repr_png_(self) -> tuple[bytes, dict[str, Any]]:
        """What Jupyter shows, where pyplot's own display (which makes larger files) is not switched on."""
        drawn, small = io.BytesIO(), io.BytesIO()
        self.savefig(drawn, format="png", dpi=_SCREEN * _SHARPER)
        image = Image.open(drawn).convert("RGB").quantize(_SHADES, dither=Image.Dither.NONE)
        image.save(small, format="png", optimize=True)
        width, height = self.get_size_inches()
        return small.getvalue(), {"width": round(width * _SCREEN), "height": round(height * _SCREEN)}

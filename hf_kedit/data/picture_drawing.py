"""Small pictures drawn by a program: portraits, flags and groups of shapes, 48 x 48 pixels.

What a picture shows is given by *features*, a few words such as ``{"hair": "long", "hat": "cap"}``; how it shows
them (size, place, tint, noise) comes from a seed. The same features drawn with two seeds are two pictures of the same
thing, as two photographs are. Only NumPy is needed, and ``RandomState``, whose numbers never change between versions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError

PICTURE_SIZE = 48
"""Height and width of a picture, in pixels."""

Colour = tuple[int, int, int]

PAINTS: dict[str, Colour] = {
    "red": (205, 40, 40),
    "green": (40, 150, 60),
    "blue": (50, 80, 205),
    "yellow": (235, 205, 40),
    "purple": (140, 50, 160),
    "black": (30, 30, 35),
    "orange": (240, 135, 30),
    "white": (245, 245, 245),
}
"""Colours that have a name: of shapes (the first six), flags, shirts and hats."""

_HAIR: dict[str, Colour] = {
    "black": (35, 30, 30),
    "brown": (115, 70, 35),
    "fair": (225, 185, 90),
    "grey": (165, 165, 170),
}
_SKIN: dict[str, Colour] = {"light": (245, 214, 190), "tan": (214, 160, 115), "dark": (120, 76, 48)}

PORTRAIT_FEATURES: dict[str, tuple[str, ...]] = {
    "skin": tuple(_SKIN),
    "colour": tuple(_HAIR),
    "hair": ("short", "long", "curly", "bald"),
    "hat": ("none", "cap", "wide"),
    "glasses": ("none", "round", "square"),
    "beard": ("none", "moustache", "full"),
    "shirt": ("red", "green", "blue", "yellow", "white"),
}
FLAG_FEATURES: dict[str, tuple[str, ...]] = {
    "layout": ("horizontal", "vertical", "cross", "diagonal", "border"),
    "first": ("red", "green", "blue", "black"),
    "second": ("yellow", "white", "orange"),
    "emblem": ("none", "disc", "diamond", "box"),
    "paint": ("red", "green", "blue", "black"),
}
SHAPE_FEATURES: dict[str, tuple[str, ...]] = {
    "colour": ("red", "green", "blue", "yellow", "purple", "black"),
    "shape": ("circle", "square", "triangle", "cross", "ring"),
    "number": ("one", "two", "three", "four"),
    "place": ("left", "right", "top", "bottom", "middle"),
}
"""Feature -> its values. The values of shapes are also the answers to questions about them."""

_Field = NDArray[np.float64]


class Canvas:
    """A picture being painted, in coordinates from -1 (left, top) to 1 (right, bottom).

    Args:
        random: draws size, place, tint and noise; None for a plain picture.
    """

    def __init__(self, random: np.random.RandomState | None):
        self._random = random
        scale, right, down = 1.0, 0.0, 0.0
        if random is not None:
            scale, right, down = random.uniform(0.84, 1.08), random.uniform(-0.1, 0.1), random.uniform(-0.1, 0.1)
        axis = (np.arange(PICTURE_SIZE) + 0.5) / (PICTURE_SIZE / 2) - 1
        self.x: _Field = np.broadcast_to((axis - right) / scale, (PICTURE_SIZE, PICTURE_SIZE))
        self.y: _Field = np.broadcast_to((axis[:, None] - down) / scale, (PICTURE_SIZE, PICTURE_SIZE))
        self._pixels_per_unit = scale * PICTURE_SIZE / 2
        paper = np.array((225.0, 228.0, 222.0))
        self._rgb = np.empty((PICTURE_SIZE, PICTURE_SIZE, 3))
        self._rgb[:] = paper if random is None else paper + random.uniform(-22, 22, 3)

    def paint(self, colour: Colour, distance: _Field) -> None:
        """Paint where ``distance`` (signed, to the edge of a figure, in units) is negative, with a soft edge."""
        cover = np.clip(0.5 - distance * self._pixels_per_unit, 0, 1)[..., None]
        tint = 0.0 if self._random is None else self._random.uniform(-16, 16, 3)
        self._rgb += cover * (np.array(colour, dtype=float) + tint - self._rgb)

    def ellipse(self, x: float, y: float, width: float, height: float) -> _Field:
        """Return the (approximate) signed distance to an ellipse with these half axes."""
        return (np.hypot((self.x - x) / width, (self.y - y) / height) - 1) * min(width, height)

    def box(self, x: float, y: float, width: float, height: float) -> _Field:
        """Return the signed distance to a box with these half sides."""
        return np.maximum(np.abs(self.x - x) - width, np.abs(self.y - y) - height)

    def diamond(self, x: float, y: float, radius: float) -> _Field:
        """Return the signed distance to a square that stands on a corner."""
        return (np.abs(self.x - x) + np.abs(self.y - y) - radius) / math.sqrt(2)

    def triangle(self, x: float, y: float, radius: float) -> _Field:
        """Return the signed distance to a triangle that stands on a side."""
        slope = (2 * np.abs(self.x - x) - (self.y - y) - radius) / math.sqrt(5)
        return np.maximum(slope, self.y - y - radius)

    def finish(self) -> NDArray[np.uint8]:
        """Return the picture, [48, 48, 3] uint8, with noise."""
        if self._random is not None:
            self._rgb += self._random.normal(0, 5, self._rgb.shape)
        return np.clip(self._rgb, 0, 255).round().astype(np.uint8)


def _portrait(canvas: Canvas, look: Mapping[str, str]) -> None:
    skin, hair, shirt = _SKIN[look["skin"]], _HAIR[look["colour"]], PAINTS[look["shirt"]]
    dark: Colour = (25, 22, 25)
    if look["hair"] == "long":
        canvas.paint(hair, canvas.ellipse(0, -0.05, 0.66, 0.78))
    if look["hair"] == "curly":
        for angle in np.linspace(-math.pi, 0, 7):
            canvas.paint(hair, canvas.ellipse(0.55 * math.cos(angle), 0.55 * math.sin(angle) - 0.1, 0.24, 0.24))
    canvas.paint(shirt, canvas.ellipse(0, 1.05, 0.85, 0.5))
    canvas.paint(skin, canvas.box(0, 0.55, 0.16, 0.2))
    canvas.paint(skin, canvas.ellipse(0, 0, 0.48, 0.6))
    if look["hair"] != "bald":  # a fringe, which all hair has
        canvas.paint(hair, np.maximum(canvas.ellipse(0, -0.02, 0.53, 0.66), canvas.y + 0.3))
    else:  # what is left at the temples shows the colour
        for side in (-0.47, 0.47):
            canvas.paint(hair, canvas.ellipse(side, -0.05, 0.1, 0.2))
    for side in (-0.19, 0.19):
        canvas.paint(dark, canvas.ellipse(side, -0.06, 0.06, 0.07))
    if look["beard"] == "full":
        canvas.paint(hair, np.maximum(canvas.ellipse(0, 0.05, 0.5, 0.66), 0.2 - canvas.y))
    if look["beard"] == "moustache":
        canvas.paint(hair, canvas.box(0, 0.22, 0.24, 0.06))
    canvas.paint((170, 50, 50), canvas.box(0, 0.36, 0.13, 0.035))
    if look["glasses"] != "none":
        round_ = look["glasses"] == "round"
        for side in (-0.2, 0.2):
            rim = canvas.ellipse(side, -0.06, 0.17, 0.17) if round_ else canvas.box(side, -0.06, 0.17, 0.13)
            canvas.paint(dark, np.abs(rim) - (0.025 if round_ else 0.045))
    if look["hat"] == "cap":
        canvas.paint(PAINTS["blue"], np.maximum(canvas.ellipse(0, -0.3, 0.56, 0.5), canvas.y + 0.36))
        canvas.paint(PAINTS["blue"], canvas.box(0.42, -0.4, 0.36, 0.06))
    if look["hat"] == "wide":
        canvas.paint(PAINTS["green"], canvas.box(0, -0.68, 0.36, 0.24))
        canvas.paint(PAINTS["green"], canvas.box(0, -0.45, 0.85, 0.08))


def _flag(canvas: Canvas, look: Mapping[str, str]) -> None:
    first, second = PAINTS[look["first"]], PAINTS[look["second"]]
    width, height = 0.88, 0.62
    cloth = canvas.box(0, 0, width, height)
    canvas.paint((120, 120, 125), cloth - 0.05)  # a rim, so that white cloth shows on light paper
    canvas.paint(first, cloth)
    inside: dict[str, Callable[[], _Field]] = {
        "horizontal": lambda: canvas.box(0, 0, width, height / 3),
        "vertical": lambda: canvas.box(0, 0, width / 3, height),
        "cross": lambda: np.minimum(canvas.box(0, 0, width, 0.14), canvas.box(0, 0, 0.14, height)),
        "diagonal": lambda: (canvas.x * height + canvas.y * width) / math.hypot(width, height),
        "border": lambda: canvas.box(0, 0, width - 0.2, height - 0.2),
    }
    canvas.paint(second, np.maximum(cloth, inside[look["layout"]]()))
    emblem: dict[str, Callable[[], _Field]] = {
        "disc": lambda: canvas.ellipse(0, 0, 0.26, 0.26),
        "diamond": lambda: canvas.diamond(0, 0, 0.34),
        "box": lambda: canvas.box(-width + 0.26, -height + 0.2, 0.26, 0.2),
    }
    if look["emblem"] in emblem:
        canvas.paint(PAINTS[look["paint"]], emblem[look["emblem"]]())


def _shapes(canvas: Canvas, look: Mapping[str, str]) -> None:
    count, place = SHAPE_FEATURES["number"].index(look["number"]) + 1, look["place"]
    row = [(step - (count - 1) / 2) * 0.5 for step in range(count)]
    if place == "middle":
        spots = [(0.0, 0.0)] if count == 1 else [(-0.25, -0.25), (0.25, 0.25), (0.25, -0.25), (-0.25, 0.25)][:count]
    else:
        far = {"left": -0.68, "right": 0.68, "top": -0.68, "bottom": 0.68}[place]
        spots = [(far, at) if place in ("left", "right") else (at, far) for at in row]
    r = 0.23
    for x, y in spots:
        figure = {
            "circle": lambda x=x, y=y: canvas.ellipse(x, y, r, r),
            "square": lambda x=x, y=y: canvas.box(x, y, 0.9 * r, 0.9 * r),
            "triangle": lambda x=x, y=y: canvas.triangle(x, y, r),
            "cross": lambda x=x, y=y: np.minimum(canvas.box(x, y, r, 0.3 * r), canvas.box(x, y, 0.3 * r, r)),
            "ring": lambda x=x, y=y: np.abs(canvas.ellipse(x, y, 0.85 * r, 0.85 * r)) - 0.25 * r,
        }
        canvas.paint(PAINTS[look["colour"]], figure[look["shape"]]())


_PAINTERS: dict[str, tuple[Callable[[Canvas, Mapping[str, str]], None], Mapping[str, Sequence[str]]]] = {
    "portrait": (_portrait, PORTRAIT_FEATURES),
    "flag": (_flag, FLAG_FEATURES),
    "shapes": (_shapes, SHAPE_FEATURES),
}


def draw_picture(kind: str, features: Mapping[str, str], seed: int | None = None) -> NDArray[np.uint8]:
    """Draw a picture.

    Args:
        kind: ``"portrait"``, ``"flag"`` or ``"shapes"``.
        features: what it shows: a value for each key of ``PORTRAIT_FEATURES`` (``FLAG_…``, ``SHAPE_…``).
        seed: of size, place, tint and noise; None draws it plainly.

    Returns:
        The picture, [48, 48, 3] uint8, RGB.

    Raises:
        DataError: there is no such kind of picture or no such feature.
    """
    if kind not in _PAINTERS:
        raise DataError(f"There is no kind of picture named {kind!r}. Known: {', '.join(_PAINTERS)}.")
    painter, known = _PAINTERS[kind]
    for name, values in known.items():
        if features.get(name) not in values:
            raise DataError(f"A {kind} needs {name!r} out of {', '.join(values)}, not {features.get(name)!r}.")
    canvas = Canvas(None if seed is None else np.random.RandomState(seed % 2**32))
    painter(canvas, features)
    return canvas.finish()


def contact_sheet(pictures: Sequence[NDArray[Any]], columns: int, gap: int = 4) -> NDArray[np.uint8]:
    """Put pictures of one size side by side.

    Args:
        pictures: each [height, width, 3] uint8.
        columns: how many go in one row.
        gap: white pixels around each.

    Returns:
        One picture, uint8.
    """
    height, width = pictures[0].shape[:2]
    rows = -(-len(pictures) // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, dtype=np.uint8)
    for i, picture in enumerate(pictures):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = picture
    return sheet

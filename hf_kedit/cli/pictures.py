"""``--plot FILE``: what a command found out, as a picture."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ..errors import check_extra

_FORMATS = (".png", ".svg", ".pdf")
PlotOption = Annotated[
    Path | None, typer.Option("--plot", help="Draw the result into this file (PNG, SVG or PDF); needs matplotlib.")
]


def check_plot(file: Path | None) -> None:
    """Refuse a picture that could not be written, before the work is done.

    Raises:
        typer.BadParameter: for a folder, or a format that is not one of pictures.
        MissingExtraError: without matplotlib.
    """
    if file is None:
        return
    if os.path.isdir(file) or file.suffix.lower() not in _FORMATS:
        raise typer.BadParameter(f"{file}: name a file that ends with {', '.join(_FORMATS)}", param_hint="--plot")
    check_extra("matplotlib", "viz", "drawing (--plot)")

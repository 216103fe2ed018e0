"""The look of pictures: nobody's settings are touched, nothing is opened, and texts are text."""

from __future__ import annotations

import io
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from hf_kedit.drawing.edits import AnswerShift, KeptCount, draw_edits
from hf_kedit.drawing.marks import spread_out
from hf_kedit.drawing.style import COLOURS, INK, PAPER, SOFT, as_label, house_style, new_figure, save_figure
from hf_kedit.errors import DataError, MissingExtraError

matplotlib = pytest.importorskip("matplotlib")
HOSTILE = (
    "$x_1$ costs $5",
    "a_b^c {} \\frac{1}",
    "北京的首都",
    "नमस्ते \U0001f600 ﷽",
    "\u202eevil\x1b[31m",
    "<b>&amp;</b>",
    "",
)


def hostile() -> Any:
    """A picture with texts of all kinds in every place that takes one."""
    shifts = [AnswerShift(text, text[::-1] or "-", True, 0.1, 0.9) for text in HOSTILE]
    return draw_edits("title", shifts, [[2.0, 1.0]], [KeptCount("kind", 1, 2, True)], ["$harm$"])


def texts(figure: Any) -> list[str]:
    return [t.get_text() for t in figure.findobj(matplotlib.text.Text) if t.get_text()]


def test_settings_of_the_user_stay_and_have_no_effect() -> None:
    with matplotlib.rc_context({"axes.facecolor": "black", "text.usetex": True, "lines.linewidth": 9, "font.size": 3}):
        before = dict(matplotlib.rcParams)
        figure = hostile()
        figure.savefig(io.BytesIO())
        assert dict(matplotlib.rcParams) == before
    assert {axes.get_facecolor() for axes in figure.axes} == {matplotlib.colors.to_rgba(PAPER)}
    assert not any(t.get_usetex() for t in figure.findobj(matplotlib.text.Text))
    with pytest.raises(ZeroDivisionError), house_style("x"):
        assert matplotlib.rcParams["text.parse_math"] is False
        raise ZeroDivisionError
    assert matplotlib.rcParams["text.parse_math"] is True


def test_pyplot_knows_nothing_of_a_picture() -> None:
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    figure = hostile()
    assert plt.get_fignums() == before
    assert getattr(figure, "number", None) is None  # what pyplot gives to figures that it shows


def test_texts_are_text_whatever_they_hold() -> None:
    figure = hostile()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a glyph that a font lacks is a warning of matplotlib's
        for form in ("png", "svg", "pdf"):
            figure.savefig(io.BytesIO(), format=form)
    drawn = texts(figure)
    assert {"$x_1$ costs $5", "a_b^c {} \\frac{1}", "<b>&amp;</b>", "\\u202eevil\\x1b[31m"} <= set(drawn)
    assert not any(t.get_parse_math() for t in figure.findobj(matplotlib.text.Text) if t.get_text())


def test_what_no_font_has_is_a_box() -> None:
    assert as_label("a\U000f0000b") == "a\u25a1b"  # for private use: nobody's font has it
    assert as_label("Größe → 5 %") == "Größe → 5 %"
    assert as_label(" two\n lines ") == "two lines"
    ends = as_label("\u4e2d" * 30 + "y" * 30, 20)  # a Chinese character is as wide as two letters
    assert len(ends) == 5 + 3 + 7 and ends.endswith(" … yyyyyyy")
    short = as_label("x" * 30 + "y" * 30, 20)
    assert len(short) <= 20 and short.startswith("xxx") and short.endswith("yyy") and "…" in short


def test_notebooks_get_a_small_png_of_the_right_size() -> None:
    from PIL import Image

    figure: Any = new_figure(5, 2)
    figure.subplots().plot([1, 2])
    data, size = figure._repr_png_()
    assert Image.open(io.BytesIO(data)).size == (768, 307) and size == {"width": 480, "height": 192}
    assert len(data) < 20_000


def test_files(tmp_path: Path) -> None:
    figure = new_figure(3, 2)
    assert save_figure(figure, tmp_path / "new" / "a.svg").read_text(encoding="utf-8").startswith("<?xml")
    for name in ("a.xyz", "new/a.svg/b.png"):  # no format, no folder
        with pytest.raises(DataError, match="cannot write the picture"):
            save_figure(figure, tmp_path / name)


def test_ink_can_be_read_on_the_paper() -> None:
    """WCAG's contrast, computed here: 4.5 for text; 3 for the colours of bars and lines' names."""

    def light(colour: str) -> float:
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in matplotlib.colors.to_rgb(colour)]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    def contrast(colour: str) -> float:
        return (light(PAPER) + 0.05) / (light(colour) + 0.05)

    assert contrast(INK) > 10 and contrast(SOFT) > 4.5
    assert all(contrast(colour) > 3 for colour in COLOURS[:3])


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([0.1, 0.5, 0.9], [0.1, 0.5, 0.9]),
        ([0.5, 0.5], [0.5, 0.7]),
        ([0.9, 0.1, 0.85], [1.05, 0.1, 0.85]),
        ([1.0, 1.0, 1.0], [1 + 0.2 / 3 - 0.4, 1 + 0.2 / 3 - 0.2, 1 + 0.2 / 3]),
    ],
)
def test_names_beside_lines_keep_apart(places: list[float], expected: list[float]) -> None:
    assert spread_out(places, 0.2) == pytest.approx(expected)


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.split(".")[0] == "matplotlib" or name == "hf_kedit.drawing.picture":
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"drawing an edit needs .*hf_kedit\[viz\]"):
        draw_edits("t", [AnswerShift("p", "a", True, 0.1, 0.9)], [], [], [])

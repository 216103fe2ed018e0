"""``kedit demo``: the whole story in one object, and the same story for people."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.color import Color
from rich.console import Console
from rich.style import Style

from hf_kedit import EditableModel
from hf_kedit.cli.demo_view import Answers, DemoView
from hf_kedit.drawing.blocks import in_blocks
from hf_kedit.requests import EditRequest
from hf_kedit.text.pictures import Picture

from .conftest import Run, data

KEYS = (
    "model method prompt before after original_again rewrite_success rephrase_success locality portability"
    " rollback_exact saved_to seconds"
).split()


def test_demo_as_json(kedit: Run, tmp_path: Path) -> None:
    """With the reload in a process of its own."""
    result = data(kedit("demo", "--output", tmp_path / "edit", "--format", "json"))
    assert set(KEYS) <= set(result)
    assert result["model"] == "kedit/world-gpt2"
    assert result["method"] == "rome"
    assert result["before"].startswith(result["target_old"])
    assert result["after"].startswith(result["target_new"])
    assert result["original_again"] == result["before"] != result["after"]
    assert result["rewrite_success"] == 1.0
    assert result["rephrase_success"] == 1.0
    assert result["protocol"] == "generation" and result["locality"] > 0.8
    rows, effects = result["neighbours"], result["side_effects"]  # one view of locality, of the same answers
    assert result["locality"] == sum(row["unchanged"] for row in rows) / len(rows)
    answers = [a for a in effects["answers"] if a["kind"] in ("neighbour", "same subject")]
    shown = sorted((row["prompt"], row["after"], row["unchanged"]) for row in rows)
    assert shown == sorted((a["prompt"], a["after"], a["good"]) for a in answers)
    assert result["portability"] == 1.0 and result["consequences"][0]["follows"]
    assert result["rollback_exact"] is True
    assert result["reload_exact"] is True
    assert result["probabilities"]["original_again"] == result["probabilities"]["before"]
    assert result["probabilities"]["after"]["new"] > 0.9 > 0.1 > result["probabilities"]["after"]["old"]
    assert result["saved_to"] == str(tmp_path / "edit")
    assert [e.id for e in EditableModel.from_pretrained(result["saved_to"]).edits] == [result["edit_id"]]


def test_demo_for_people(kedit: Run) -> None:
    result = kedit("demo", "--model", "kedit/world-llama", "--method", "ft-m", "--no-reload")
    assert result.exit_code == 0, result.stderr
    shown = result.stdout
    for text in ("kedit/world-llama", "FT-M", "before", "after", "probability", "unchanged", "Saved", "Undone"):
        assert text in shown
    assert "bit for bit" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_demo_for_scripts(kedit: Run) -> None:
    result = kedit("demo", "--no-reload", "--format", "quiet")
    assert result.exit_code == 0
    assert (Path(result.stdout.strip()) / "edit_config.json").is_file()


def test_demo_with_a_fact_of_ones_own(kedit: Run, tmp_path: Path) -> None:
    words = ["--prompt", "{} is employed by", "--subject", "Gukir Tudias", "--target", "Heidork", "--no-reload"]
    result = data(kedit("demo", *words, "--output", tmp_path / "edit", "-f", "json"))
    assert result["prompt"] == "Gukir Tudias is employed by"
    assert result["before"].startswith(result["target_old"])  # taken from what the model says
    assert result["rephrase_success"] is None
    assert result["reload_exact"] is None
    assert result["rollback_exact"] is True
    assert result["neighbours"]


def test_demo_with_a_picture(kedit: Run, tmp_path: Path) -> None:
    words = ["--model", "kedit/world-pictures", "--method", "ft-m", "--output", tmp_path / "edit"]
    result = data(kedit("demo", *words, "-f", "json"))
    assert "in the picture" in result["prompt"] and "<image>" not in str(result["paraphrases"])
    assert result["before"].startswith(result["target_old"]) and result["after"].startswith(result["target_new"])
    assert result["original_again"] == result["before"]
    again = result["paraphrases"][-1]
    assert again["prompt"].endswith("(another picture)") and again["after"].startswith(result["target_new"])
    assert result["rollback_exact"] is True and result["reload_exact"] is True
    assert {"text", "multimodal", "Same_Question", "Same_Picture"} == {row["kind"] for row in result["neighbours"]}


def test_demo_refuses_a_folder_with_a_model(kedit: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    result = kedit("demo", "--output", tmp_path)
    assert result.exit_code == 1
    assert "complete model" in result.stderr


# ---------------------------------------------------------------------- the view


def _shown(encoding: str = "utf-8", width: int = 80, *, exact: bool = True, good: bool = True) -> str:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, errors="replace")  # as the command sets up the streams
    view = DemoView(Console(file=stream, width=width, color_system=None, markup=False, highlight=False))
    request = EditRequest("{} is", "It", "new", ground_truth=["old"])
    before, after = Answers({"It is": "old."}, 0.9, 0.1), Answers({"It is": "new."}, 0.05, 0.95)
    view.title("some/model", 1_500_000, 6, "ROME", [2])
    view.fact(request)
    view.generations(["It is"], before.texts, after.texts, request, 0.5)
    view.probabilities(request, before, after)
    row = {"kind": "Entities", "prompt": "[red]That[/red] is", "before": "same", "after": "same" if good else "other"}
    view.neighbours([{**row, "unchanged": good}] * 3)
    view.scores({"rewrite_success": 1.0, "rephrase_success": None, "locality": 1.0, "portability": 0.0}, "generation")
    view.saved(Path("folder"), good)
    view.undone(request, before, before, exact, 1_500_000)
    view.end(1.0)
    stream.flush()
    return raw.getvalue().decode(encoding)


def test_a_picture_in_the_terminal() -> None:
    """Two pixels in a character, one as its ink and one as its paper; without colours, dark ones are full."""
    pixels = np.zeros((4, 4, 3), dtype=np.uint8)
    pixels[0], pixels[1] = (250, 0, 0), (0, 0, 250)  # the upper half red over blue, the lower one black
    picture = Picture.of(pixels)
    drawn = in_blocks(picture, colour=True, width=4)
    assert drawn.plain == "▀▀▀▀\n▀▀▀▀"
    style = drawn.spans[0].style
    assert isinstance(style, Style) and (style.color, style.bgcolor) == (
        Color.from_rgb(250, 0, 0),
        Color.from_rgb(0, 0, 250),
    )
    upper, lower = in_blocks(picture, colour=False, width=4).plain.splitlines()
    assert set(lower) == {"@"} and set(upper) != {"@"}


@pytest.mark.parametrize(("colours", "encoding"), [("truecolor", "utf-8"), (None, "utf-8"), ("truecolor", "ascii")])
def test_a_fact_about_a_picture_shows_it(colours: Any, encoding: str) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="replace")
    console = Console(file=stream, width=80, color_system=colours, force_terminal=colours is not None)
    image = np.full((48, 48, 3), 250, dtype=np.uint8)
    DemoView(console).fact(EditRequest("It is", target_new="new", ground_truth=["old"], image=image))
    stream.seek(0)
    shown = stream.read()
    assert ("▀" in shown) == (colours is not None and encoding == "utf-8") and "It is" in shown
    assert len(shown.splitlines()) >= 16


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_view_fits_the_terminal(width: int) -> None:
    lines = _shown(width=width).splitlines()
    assert max(map(len, lines)) <= width


def test_view_on_a_terminal_without_unicode() -> None:
    shown = _shown("ascii")
    assert "###" in shown
    assert "yes all 1,500,000 weights" in shown


def test_view_takes_no_markup_from_texts() -> None:
    assert "[red]That[/red] is" in " ".join(_shown(width=120).split())


def test_view_hides_nothing_that_went_wrong() -> None:
    shown = _shown(exact=False, good=False)
    assert "NOT the original" in shown
    assert "differs" in shown
    assert "0 of 3 answers are unchanged" in shown
    assert shown.count("other facts") == 3  # more than are shown of those that stayed
    assert _shown().count("other facts") == 2


def test_a_silent_view_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    view = DemoView(None)
    view.title("m", 1, 1, "ROME", [0])
    with view.working("something"):
        view.end(1.0)
    assert capsys.readouterr().out == ""

"""Progress where nobody watches: lines in a log instead of bars."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from hf_kedit import logging as kedit_logging
from hf_kedit.cli.output import Format, set_up
from hf_kedit.evaluation.asking.batching import make_batches, shown_batches
from hf_kedit.logging import bars_here, progress, progress_bar


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds; bars write lines."""
    seconds = [0.0]
    kedit_logging.enable_progress_bars(lines=True)
    monkeypatch.setattr(kedit_logging, "time", SimpleNamespace(monotonic=lambda: seconds[0]))
    return seconds


def test_what_takes_long_writes_a_line_a_minute(clock: list[float], capfd: pytest.CaptureFixture[str]) -> None:
    with progress_bar(24, "optimising values", unit="step", bar_format="{bar}") as bar:
        for _ in range(10):
            clock[0] += 25
            bar.update()
            bar.refresh()
    written = capfd.readouterr().err
    assert "\r" not in written and "\x1b" not in written
    lines = [line.split(" in ") for line in written.splitlines()]
    assert [line[0] for line in lines] == [f"optimising values: {n} of 24" for n in (3, 6, 9)]
    assert all(line[1].endswith(" to go") for line in lines)


@pytest.mark.usefixtures("clock")
def test_what_is_soon_done_writes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    for _ in progress(range(3), "editing"):
        with progress_bar(None, "reading") as bar:
            bar.refresh()
            bar.set_description_str("reading on")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("items", "show", "shown"),
    [
        ([], None, False),
        ([1], None, False),
        ([1, 2], None, True),
        (iter([1]), None, True),  # nobody knows how many
        ([1], True, True),
        ([1, 2], False, False),
    ],
)
def test_one_item_needs_no_bar(items: Any, show: bool | None, shown: bool) -> None:
    kedit_logging.enable_progress_bars()
    bar: Any = progress(items, "editing", show=show)
    assert bar.disable is not shown
    bar.close()


def test_what_was_said_once_is_not_said_again(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("told once")
    logger.setLevel(logging.INFO)
    for say, topic in ((kedit_logging.warn_once, "a warning"), (kedit_logging.info_once, "a word")):
        for text in (topic, topic, f"another {topic}"):
            say(logger, text)
    assert [record.message for record in caplog.records if record.name == logger.name] == [
        "a warning",
        "another a warning",
        "a word",
        "another a word",
    ]


def test_names_of_loggers_stand_below_the_library() -> None:
    assert [kedit_logging.get_logger(name).name for name in ("hf_kedit.cli.app", "mine")] == [
        "hf_kedit.cli.app",
        "hf_kedit.mine",
    ]


@pytest.mark.parametrize(
    ("output_format", "unwanted", "shown", "lines"),
    [
        (Format.human, "0", True, True),
        (Format.json, "0", True, True),
        (Format.quiet, "0", False, None),
        (Format.human, "1", False, None),
    ],
)
def test_what_a_command_shows_off_the_terminal(
    output_format: Format, unwanted: str, shown: bool, lines: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_KEDIT_DISABLE_PROGRESS_BARS", unwanted)
    set_up(output_format, debug=False)
    assert kedit_logging._progress_bars is shown
    assert lines is None or kedit_logging._in_lines is lines


def test_what_is_asked_of_a_model_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    kedit_logging.enable_progress_bars()
    asked = {f"question {n}": n for n in range(120)}

    def batches(items: dict[str, int] = asked) -> str:
        groups = list(shown_batches(make_batches(items, lambda q: 8, 160), len(items), "writing answers"))
        assert [len(group) for group in groups] == [20] * (len(items) // 20)
        return capfd.readouterr().err

    shown = batches()
    assert "writing answers" in shown and "/120" in shown
    assert batches(dict(list(asked.items())[:40])) == ""
    with bars_here(False), bars_here(True):  # who wants none gets none, whatever is called inside
        assert batches() == ""
    assert "/120" in batches()

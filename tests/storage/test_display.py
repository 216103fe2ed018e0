"""Texts of others, shown as text."""

from __future__ import annotations

import pytest
from markdown_it import MarkdownIt

from hf_kedit.storage.display import markdown_text, millions, percent, printable, python_text

NASTY = [
    "<script>alert(1)</script>",
    "[click](javascript:alert(1))",
    "![pixel](https://example.org/x.png)",
    "a\r# heading",
    "a\n\n- item\n| b | c |",
    "`code` **bold** __bold__ _soft_ ~~gone~~ $x$",
    "&lt;b&gt; &#60;",
    "back\\slash \\| pipe | end",
    "line\u2028separator\x85next",
    "<https://example.org>",
]


@pytest.mark.parametrize("text", NASTY)
def test_markdown_shows_the_text_and_nothing_else(text: str) -> None:
    """By a reader of Markdown: a heading and a table cell hold exactly this text."""
    escaped = markdown_text(text)
    assert "\n" not in escaped and "\r" not in escaped
    tokens = (
        MarkdownIt("commonmark")
        .enable("table")
        .parse(f"## {escaped}\n\n| a | b |\n| --- | --- |\n| {escaped} | x |\n")
    )
    shown = [token for token in tokens if token.type == "inline"]
    assert [t.type for t in tokens if t.type.endswith("_open")][:2] == ["heading_open", "table_open"]
    assert len(shown) == 5  # the heading, two names of columns, two cells
    for token in (shown[0], shown[3]):
        assert token.children is not None
        kinds = {child.type for child in token.children}
        assert kinds <= {"text", "text_special"}
        assert "".join(child.content for child in token.children) == " ".join(text.split())


def test_words_with_underscores_stay_legible() -> None:
    assert markdown_text("teacher_forced (token), 3.5 %") == "teacher_forced (token), 3.5 %"


def test_control_characters_become_visible() -> None:
    text = "a\x1b]0;title\x07b\x9bc\u202ed\u2066e\n"
    assert printable(text) == "a\\x1b]0;title\\x07b\\x9bc\\u202ed\\u2066e\n"
    assert printable("日本 👩\u200d🔬 naïve") == "日本 👩\u200d🔬 naïve"
    assert "\x1b" not in markdown_text("\x1b[31mred")


def test_percentages() -> None:
    assert (percent(0.5), percent(1.0, " %"), percent(None, " %")) == ("50.0", "100.0 %", "–")


def test_numbers_of_parameters() -> None:
    assert [millions(n) for n in (1_540_000, 999_999_999, 7_240_000_000)] == [
        "1.5 million",
        "1000.0 million",
        "7.2 billion",
    ]


@pytest.mark.parametrize("text", [*NASTY, 'a"b', "```\n# out", "x\x1b[31m\u202e\x9b\ud800\U000e0001", "a\\"])
def test_a_text_in_a_line_of_code_stays_in_it(text: str) -> None:
    code = python_text(text)
    assert len(code.splitlines()) == 1 and eval(code) == text and printable(code, keep="") == code
    (block,) = MarkdownIt("commonmark").parse(f"```python\nx = {code}\n```\n")
    assert block.content == f"x = {code}\n"

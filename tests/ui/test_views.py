"""How things look: plain words, and texts that stay texts whatever is in them."""

from __future__ import annotations

import dataclasses
from html.parser import HTMLParser

import pytest

from hf_kedit.evaluation import SideEffectReport
from hf_kedit.evaluation.measures.side_effects import Answered, EffectQuestion
from hf_kedit.journal import Edit
from hf_kedit.locate import Fact, LensReading, Trace
from hf_kedit.requests import EditRequest
from hf_kedit.ui import views
from hf_kedit.ui.changing import change
from hf_kedit.ui.examples import Examples
from hf_kedit.ui.markup import pieces, tag
from hf_kedit.ui.probing import BothAnswers, Chance, Inspection
from hf_kedit.ui.visitors import HistoryEntry, Visitor
from tests.ui.test_changing import form_of, quiet

HOSTILE = "<img src=x onerror=alert(1)> & \"quoted\" 'too' ${1} {{2}} [a](javascript:b) $x$ \u202eevil"


class Shape(HTMLParser):
    """The elements and attributes of a piece of HTML, and its text; everything that was opened is closed."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text, self.open = "", list[str]()
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def entry_of(text: str) -> HistoryEntry:
    """An edit in which everything that is a text is this one."""
    request = EditRequest(prompt=f"{{}} {text}", subject=text, target_new=text, rephrase_prompts=[text])
    edit = Edit(text, request, text, "batch", "2026-01-01T10:00:00+00:00", {"loss": [2.0, 1.0, 0.5], "seconds": 1.0})
    kinds = ("fact", "paraphrase", "chat", "neighbour", "same subject", "general", "name")
    answers = [Answered(EffectQuestion(kind, text, wanted=text), f"was {text}", f"is {text}") for kind in kinds]
    chances = [Chance(text, 0.5, 0.004, True), Chance("other", 0.0, 0.0)]
    return HistoryEntry(edit, {}, SideEffectReport(tuple(answers), (text,)), chances)


def everything(text: str) -> list[str]:
    """All views, with one text wherever there is a text."""
    entry = entry_of(text)
    lens = LensReading(text, [[(text, 0.5)], [(text, 1.0)]])
    import torch

    fact = Fact(text, text, (0, len(text)), (text,))
    trace = Trace(fact, [text, text], (0, 1), text, 0.9, 0.1, {"hidden": torch.rand(2, 2)})
    guest = Visitor(None, [entry])  # type: ignore[arg-type]
    return [
        views.notice(text),
        views.hint(text),
        views.label(text),
        views.says(text),
        views.header(text, text, guest),
        views.edit_result(entry),
        views.history_card(entry),
        views.share_summary(guest),
        views.comparisons([BothAnswers(text, text, "x", entry.chances, [text])], guest),
        views.inspection(Inspection(text, lens, lens, [text], trace)),
        views.inspection(Inspection(text, lens, None, [], None, text)),
    ]


def test_hostile_texts_stay_texts() -> None:
    """The same elements and attributes come out as for a harmless text; the hostile one is all there as text."""
    for harmless, hostile in zip(everything("word"), everything(HOSTILE), strict=True):
        good, bad = Shape(harmless), Shape(hostile)
        assert bad.tags <= good.tags and bad.attributes == good.attributes
        assert "\u202e" not in hostile  # nothing turns the direction of writing
        assert "<img src=x onerror=alert(1)>" in bad.text


def test_a_tag_escapes_all_but_tags() -> None:
    assert tag("b", "<i>", tag("i", "&"), cls='"') == '<b class="&quot;">&lt;i&gt;<i>&amp;</i></b>'
    assert pieces("<", None, tag("br")) == "&lt;<br></br>"
    assert tag("p", "a" + tag("b", "x")) == "<p>a&lt;b&gt;x&lt;/b&gt;</p>"  # glued strings are texts again


def test_words_that_differ_are_marked() -> None:
    html = views.edit_result(dataclasses.replace(entry_of("plumber")))
    assert '<mark class="gone">was</mark>' in html and '<mark class="new">is</mark>' in html


def test_an_edit_in_plain_words(examples: Examples, visitor: Visitor) -> None:
    request = examples.requests[0]
    entry = change(visitor, form_of(examples, method="auto"), examples, quiet)
    text = Shape(views.edit_result(entry)).text
    for words in ("Done.", "1 of 1says it now", "12 of 12neighbours unchanged", f"was: {request.ground_truth[0]}"):
        assert words in text
    assert request.target_new in Shape(views.history_card(entry)).text
    assert "1 edit on" in views.header("m", "", visitor)
    entry.is_on = False
    assert "0 of 1 edits on" in views.header("m", "", visitor)
    assert "Nothing to share" in views.share_summary(visitor)


def test_what_went_wrong_is_said_first() -> None:
    answers = [Answered(EffectQuestion("neighbour", f"n{i}"), "same", "same" if i else "other") for i in range(9)]
    answers.insert(0, Answered(EffectQuestion("fact", "f", wanted="new"), "old", "old"))
    entry = entry_of("x")
    entry.effects = SideEffectReport(tuple(answers), ("new",))
    html = views.edit_result(entry)
    assert "It did not take." in html and "8 of 9" in html
    assert html.index(">n0<") < html.index(">n1<") and "5 more" in html


@pytest.mark.parametrize(("value", "text"), [(0.0, "0 %"), (0.004, "< 1 %"), (0.5, "50 %"), (1.0, "100 %")])
def test_probabilities(value: float, text: str) -> None:
    assert views.share(value) == text

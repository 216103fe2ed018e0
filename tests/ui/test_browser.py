"""The page in a real browser, headless: what a visitor does and sees. One server for all tests of this file."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from hf_kedit import EditableModel
from hf_kedit.engine.weights import model_digest

pytest.importorskip("gradio", reason="needs the extra demo")

PATIENCE = 90_000  # milliseconds, on a busy machine
HOSTILE = "<img src=x onerror=\"document.body.id='caught'\">"


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[EditableModel, str]]:
    from hf_kedit.ui.layout import serve

    model = EditableModel.from_pretrained("kedit/world-gpt2", "auto")
    app = serve(model, wait=False)
    yield model, app.local_url
    app.close()


class Guest:
    """Somebody at the page, with a browser of their own."""

    def __init__(self, browser: Any, url: str, width: int = 1180):
        self.context = browser.new_context(viewport={"width": width, "height": 800})
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.hosts: set[str] = set()
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.hosts.add(urlsplit(request.url).hostname or ""))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.open(url)

    def open(self, url: str) -> None:
        self.page.goto(url)
        self.see("The model says now")  # is asked when the page is there

    def see(self, text: str) -> None:
        self.page.get_by_text(text).filter(visible=True).first.wait_for()

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).first.click()

    def go(self, tab: str) -> None:
        self.page.get_by_role("tab", name=tab, exact=True).click()

    def field(self, name: str) -> Any:
        return self.page.locator(f"#k-{name} textarea, #k-{name} input").first

    def fill(self, name: str, text: str) -> None:
        self.field(name).fill(text)

    def text(self, place: str) -> str:
        return str(self.page.locator(place).inner_text())


@pytest.fixture
def guest(browser: Any, server: tuple[EditableModel, str]) -> Iterator[Guest]:
    one = Guest(browser, server[1])
    yield one
    assert one.hosts <= {"127.0.0.1", ""}  # nothing is loaded from, or told to, anybody else ("" is data in the page)
    assert not one.errors
    one.context.close()


def test_edit_probe_undo_and_reload(guest: Guest, server: tuple[EditableModel, str]) -> None:
    """A visitor who presses what is there: no word has to be typed."""
    model, url = server
    digest = model_digest(model.base_model)
    old = guest.page.locator(".k-says b").inner_text()
    target = guest.field("target").input_value()
    guest.press("Change the fact")
    guest.see("1 edit on")
    shown = guest.text("#k-edit-result")
    assert "Done." in shown and "12 of 12" in shown and f"was: {old}" in shown
    assert model_digest(model.base_model) == digest

    guest.go("Probe")
    guest.press("Ask")
    guest.page.locator("#k-answers .k-side").first.wait_for()
    sides = guest.page.locator("#k-answers .k-side .k-text").all_inner_texts()
    assert sides[0].startswith(old) and sides[1].startswith(target)

    guest.open(url)  # loaded again: the edit is still there, and what was seen of it
    guest.see("1 edit on")
    assert "Done." in guest.text("#k-edit-result")

    guest.press("Undo this edit")
    guest.see("no edits yet")
    guest.see("has its old answer back")
    guest.go("Probe")
    guest.press("Ask")
    guest.page.locator("#k-answers .k-side").first.wait_for()
    sides = guest.page.locator("#k-answers .k-side .k-text").all_inner_texts()
    assert sides[0] == sides[1] and sides[0].startswith(old)


def test_history_and_sharing(guest: Guest, tmp_path: Path) -> None:
    guest.press("Change the fact")
    guest.see("1 edit on")
    guest.go("History")
    guest.press("Switch off")
    guest.see("0 of 1 edits on")
    guest.go("Share")
    guest.see("Nothing to share yet")
    guest.press("Download as ZIP")
    guest.see("there is nothing to share yet")
    guest.go("History")
    guest.press("Switch on")
    guest.see("1 edit on")
    guest.go("Share")
    assert "EditableModel.from_pretrained" in guest.page.locator(".cm-content").first.inner_text()
    with guest.page.expect_download() as download:
        guest.press("Download as ZIP")
    download.value.save_as(tmp_path / "edits.zip")
    with zipfile.ZipFile(tmp_path / "edits.zip") as archive:
        assert "edits/edit_config.json" in archive.namelist()
    guest.go("History")
    guest.press("Undo")
    guest.see("no edits yet")
    guest.see("undone")


def test_two_visitors_do_not_meet(guest: Guest, browser: Any, server: tuple[EditableModel, str]) -> None:
    other = Guest(browser, server[1])
    guest.press("Change the fact")
    guest.see("1 edit on")
    assert "no edits yet" in other.text(".k-head")
    other.go("Probe")
    other.press("Ask")
    other.page.locator("#k-answers .k-side").first.wait_for()
    sides = other.page.locator("#k-answers .k-side .k-text").all_inner_texts()
    assert sides[0] == sides[1]
    other.open(server[1])
    assert "no edits yet" in other.text(".k-head")
    assert "1 edit on" in guest.text(".k-head")
    other.context.close()


def test_hostile_texts_are_shown_as_texts(guest: Guest) -> None:
    guest.fill("prompt", f"{HOSTILE} works for")
    guest.fill("target", HOSTILE)
    guest.fill("subject", HOSTILE)
    guest.page.get_by_text("What else to ask before and after").click()
    guest.fill("wordings", f"{HOSTILE} is paid by\n${{1}} {{{{2}}}}")
    guest.page.get_by_role("button", name="Change the fact").click()
    guest.see("1 edit on")
    guest.fill("subject", "nobody " + HOSTILE)  # an error that repeats it
    guest.fill("prompt", f"{HOSTILE} eats")
    guest.press("Change the fact")
    guest.go("Probe")
    guest.fill("asked", HOSTILE)
    guest.press("Ask")
    guest.page.locator("#k-answers .k-pair").first.wait_for()
    guest.go("Inspect")
    guest.press("Look inside")
    guest.page.locator("#k-insides .k-result").wait_for()
    for tab in ("History", "Share", "Edit"):
        guest.go(tab)
        guest.see(HOSTILE[:20])
    assert guest.page.locator("img[src=x]").count() == 0
    assert guest.page.evaluate("document.body.id") != "caught"


def test_an_error_is_a_sentence_and_changes_nothing(guest: Guest) -> None:
    guest.fill("target", "")
    guest.press("Change the fact")
    guest.see("the new answer is missing")
    assert "no edits yet" in guest.text(".k-head")
    assert "Press “Change the fact”" in guest.text("#k-edit-result")


def test_a_phone_shows_all_of_it(browser: Any, server: tuple[EditableModel, str]) -> None:
    """At 390 pixels nothing is cut off, all tabs can be reached, and the result comes into view by itself."""
    guest = Guest(browser, server[1], width=390)
    for tab, button in (
        ("Edit", "Change the fact"),
        ("Probe", "Ask"),
        ("Inspect", "Look inside"),
        ("History", ""),
        ("Share", ""),
    ):
        guest.go(tab)
        if button:
            guest.press(button)
            guest.page.locator(".k-result:visible").first.wait_for()
        width = guest.page.evaluate("document.documentElement.scrollWidth")
        assert width <= 390, f"{tab} is {width} pixels wide"
    assert "1 edit on" in guest.text(".k-head")
    guest.context.close()


def test_settings_of_the_chosen_method_count(guest: Guest) -> None:
    """Controls are made of the config of whatever method is chosen; what is changed there goes into the edit."""
    guest.page.get_by_text("Settings of the method").click()
    guest.page.get_by_label("Method").first.click()
    guest.page.get_by_role("option", name="ROME", exact=True).click()
    steps = guest.page.locator("label", has_text="v_num_grad_steps").locator("input").first
    steps.fill("21")
    steps.blur()
    guest.page.wait_for_timeout(300)  # the page tells the server what was typed
    guest.press("Change the fact")
    guest.see("1 edit on")
    guest.go("Share")
    assert "v_num_grad_steps=21" in guest.page.locator(".cm-content").first.inner_text()

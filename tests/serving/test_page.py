"""What the server shows a browser: the same question to two of its models, in a real Chromium without a window."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from hf_kedit.serving.app import Service

from .conftest import KEY, METHODS, NEW, OLD, OWN, PROMPT

PATIENCE = 90_000  # milliseconds, on a busy machine
HOSTILE = "<img src=x onerror=\"document.title='caught'\">"


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A new page that may ask one host only, and whose scripts may not fail."""
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.set_default_timeout(PATIENCE)
    hosts: set[str | None] = set()
    errors: list[str] = []
    page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    assert hosts == {"127.0.0.1"} and errors == []
    page.close()


def ask(page: Any, prompt: str) -> tuple[str, str]:
    """Both answers, once they are whole."""
    answered = int(page.get_attribute("#form", "data-answered") or 0)
    page.fill("#prompt", prompt)
    page.click("#ask")
    page.wait_for_selector(f'#form[data-answered="{answered + 1}"]')
    return page.inner_text("#left-answer"), page.inner_text("#right-answer")


def test_edits_of_every_kind_beside_the_unedited_model(page: Any, url: str) -> None:
    page.goto(url)
    page.wait_for_selector("#left option >> nth=1", state="attached")
    left, right = ask(page, PROMPT)
    assert left.startswith(OLD) and right.startswith(OWN)
    for method in METHODS:
        page.select_option("#right", f"base+{method}")
        left, right = ask(page, PROMPT)
        assert left.startswith(OLD) and right.startswith(NEW), method
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_texts_are_texts(page: Any, url: str, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a model says, whole or in pieces, is no part of the page."""
    tokenizer: Any = service.variants.model.tokenizer
    plain = tokenizer.decode
    page.goto(url)
    page.wait_for_selector("#left option >> nth=1", state="attached")
    page.check("input[value=chat]")
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "decode", lambda *a, **k: plain(*a, **k).replace(" ", f" {HOSTILE}"))
        assert all(HOSTILE in said for said in ask(page, PROMPT))
    assert page.title() == "kedit serve" and page.locator("img").count() == 0
    page.check("input[value=text]")
    left, _ = ask(page, PROMPT * 60)
    assert "tokens" in left and page.get_attribute("#left-answer", "class") == "bad"  # a refusal, in its words


def test_a_key_is_asked_for(page: Any, guarded: Callable[..., str]) -> None:
    page.goto(guarded())
    page.wait_for_selector("#key")
    assert "key" in page.inner_text("#note")
    page.fill("#key", KEY)
    left, right = ask(page, PROMPT)  # the names first, then the answers
    assert left.startswith(OLD) and right.startswith(OWN)

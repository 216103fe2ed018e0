"""The documentation as a site: it builds without a warning, names what is public, and its long example runs."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import threading
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import hf_kedit
from hf_kedit.evaluation.scenarios import SCENARIOS
from hf_kedit.methods import registered_methods

from .test_quickstart import ROOT, _agree, _blocks, _expected

DOCS = ROOT / "docs"
SITE = {"SITE_EDIT_URI": "https://forge.example/us/hf_kedit/edit/main/docs/", "NO_MKDOCS_2_WARNING": "1"}


def _run(*command: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **env, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    return subprocess.run([sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. Dead links, dead anchors, pages that the nav forgets, unreadable docstrings are warnings."""
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    place = tmp_path_factory.mktemp("site")
    done = _run("-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(place), cwd=ROOT, **SITE)
    assert done.returncode == 0, done.stdout + done.stderr
    return place


def test_the_site_builds_without_a_warning(site: Path) -> None:
    assert "EditableModel" in (site / "reference" / "model" / "index.html").read_text(encoding="utf-8")
    edit = f'<a href="{SITE["SITE_EDIT_URI"]}quickstart.md" title="Edit this page"'
    assert edit in (site / "quickstart" / "index.html").read_text(encoding="utf-8")


class _Loaded(HTMLParser):
    """Addresses that a browser loads by itself on a page. Links that a reader may follow are none."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = ("src", "srcset", "data", "poster", *(["href"] if tag in ("link", "base", "image", "use") else []))
        self.addresses |= {value or "" for name, value in attrs if name in names}


def _loaded(page: str) -> set[str]:
    parser = _Loaded()
    parser.feed(page)
    return parser.addresses | set(re.findall(r"(?:url\(|@import)\s*[\"']?([^\"')\s]+)", page))


def test_no_page_loads_anything_from_another_host(site: Path) -> None:
    assert _loaded('<link href="https://a"><a href="https://b"><i style="background:url(//c)">') == {
        "https://a",
        "//c",
    }
    pages = [*site.rglob("*.html"), *site.rglob("*.css"), *site.rglob("*.svg")]
    assert len(pages) > 90
    for page in pages:
        for address in _loaded(page.read_text(encoding="utf-8")):
            assert not re.match(r"(https?:)?//", address), f"{page.relative_to(site)} loads {address}"


def test_a_browser_asks_nobody_else_and_finds_a_word(site: Path, browser: Any) -> None:
    """What scripts load is seen only by running them: the first page, a page with code, the search, on a phone too."""
    handler = functools.partial(_QuietHandler, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        home = f"http://127.0.0.1:{server.server_port}/"
        page = browser.new_page(viewport={"width": 390, "height": 800})
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        for name in ("", "quickstart/", "methods/", "reference/evaluation/"):
            page.goto(home + name)
            wide = page.evaluate("document.documentElement.scrollWidth")
            assert wide <= 390, f"{name} is {wide} px wide on a phone of 390"
        page.set_viewport_size({"width": 1280, "height": 800})
        page.locator(".md-search__input").fill("null space")
        found = page.locator(".md-search-result__link", has_text="AlphaEdit").first
        found.wait_for(timeout=90_000)  # the index is built in the page, on a busy machine slowly
        page.close()
        server.shutdown()
    assert asked and all(url.startswith((home, "data:", "blob:")) for url in asked)


class _QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def _documented() -> set[str]:
    text = "\n".join(p.read_text(encoding="utf-8") for p in (DOCS / "reference").glob("*.md"))
    return {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)", text, flags=re.MULTILINE)}


def test_the_reference_has_every_public_name() -> None:
    modules = {name for name in hf_kedit.__all__ if name.islower() and hasattr(getattr(hf_kedit, name), "__path__")}
    public = {n for n in hf_kedit.__all__ if not n.startswith("_")} - modules - {"errors", "logging", "KeditError"}
    assert not public - _documented()


def test_the_reference_has_every_config() -> None:
    configs = {m.config_class.__name__ for m in registered_methods().values() if m.__module__.startswith("hf_kedit.")}
    assert configs
    assert not configs - _documented()


def test_the_reference_has_every_scenario() -> None:
    scenarios = {cls.__name__ for cls in SCENARIOS.values() if cls.__module__.startswith("hf_kedit.")}
    assert len(scenarios) > 10
    assert not scenarios - _documented()


def test_the_tests_that_pages_name_exist() -> None:
    """A promise that names a test must not outlive it."""
    named = {
        match
        for page in DOCS.glob("*.md")
        for match in re.findall(r"`(tests/\S+\.py)::(\w+)`", page.read_text("utf-8"))
    }
    assert len(named) > 30
    for file, name in sorted(named):
        assert f"\ndef {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{name}"


def test_the_methods_written_on_the_page_work(tmp_path: Path) -> None:
    """In a process of its own, because the page registers methods; they need no import from inside."""
    code = "\n".join(block for _, block in _blocks((DOCS / "add_a_method.md").read_text(encoding="utf-8"), "python"))
    assert set(re.findall(r"^from (hf_kedit\S*) import", code, flags=re.MULTILINE)) == {"hf_kedit", "hf_kedit.methods"}
    script = tmp_path / "page.py"
    script.write_text(code, encoding="utf-8")
    done = _run(str(script), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    printed, expected = done.stdout.splitlines(), _expected(code)
    assert len(printed) == len(expected) > 0
    for shown, wanted in zip(printed, expected, strict=True):
        assert _agree(shown, wanted), f"printed {shown!r}, the comment says {wanted!r}"

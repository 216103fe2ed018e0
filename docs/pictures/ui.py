"""Takes the pictures of the page (``kedit ui``) that docs/ui.md shows.

    python docs/pictures/ui.py                  # rewrites docs/pictures/ui_*.png
    python docs/pictures/ui.py FOLDER           # every tab, whole, on a desk, in the dark and on a phone, to look at

Starts the page on the embedded model and does in a headless Chromium (``CHROMIUM``, else /usr/bin/chromium) what a
visitor would do. Needs the extras ``demo`` and ``test``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright
from screens import reduce

from hf_kedit import EditableModel
from hf_kedit.ui.layout import serve

HERE = Path(__file__).resolve().parent
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
DESK, PHONE = {"width": 1180, "height": 860}, {"width": 390, "height": 844}
SCREENS: dict[str, tuple[dict[str, int], str]] = {
    "desk": (DESK, "light"),
    "dark": (DESK, "dark"),
    "phone": (PHONE, "light"),
}
KEPT = {("desk", "edit"): "ui_edit", ("desk", "inspect"): "ui_inspect", ("dark", "probe"): "ui_dark"}
KEPT |= {("desk", "history"): "ui_history", ("phone", "edit"): "ui_phone"}
WAIT = 60_000


def main(folder: Path | None) -> None:
    """Take the pictures: the kept ones as they stand in a window, or all of them whole into a folder."""
    app = serve(EditableModel.from_pretrained("kedit/world-llama", "auto"), wait=False)
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            for screen, (size, scheme) in SCREENS.items():
                context: Any = browser.new_context(viewport=size, color_scheme=scheme, locale="en-GB")
                page = context.new_page()

                def keep(tab: str, screen: str = screen, page: Page = page) -> None:
                    take(page, screen, tab, folder)

                visit(page, app.local_url, keep)
                context.close()
            browser.close()
    finally:
        app.close()


def visit(page: Page, url: str, keep: Callable[[str], None]) -> None:
    """Make two edits, ask, look inside, look back, share."""
    page.set_default_timeout(WAIT)
    page.goto(url)
    page.locator(".k-says").wait_for()
    keep("start")
    page.locator(".k-examples button").nth(1).click()
    page.wait_for_timeout(500)
    page.locator("#k-go").click()
    page.get_by_text("1 edit on").wait_for()
    page.locator(".k-examples button").nth(0).click()
    page.wait_for_timeout(500)
    page.locator("#k-go").click()
    page.get_by_text("2 edits on").wait_for()
    keep("edit")
    for tab, button, shown in (
        ("Probe", "#k-ask", "#k-answers .k-result"),
        ("Inspect", "#k-look", "#k-insides .k-result"),
        ("History", "", ".k-entry"),
        ("Share", "", ".k-facts"),
    ):
        page.get_by_role("tab", name=tab).click()
        if button:
            page.locator(button).click()
        page.locator(shown).first.wait_for()
        keep(tab.lower())


def take(page: Page, screen: str, tab: str, folder: Path | None) -> None:
    """One picture, when nothing moves any more."""
    page.mouse.move(0, 0)
    page.wait_for_timeout(900)
    if folder is not None:
        page.screenshot(path=str(folder / f"{screen}-{tab}.png"), full_page=True)
    elif (screen, tab) in KEPT:
        file = HERE / f"{KEPT[screen, tab]}.png"
        page.screenshot(path=str(file))
        reduce(file, file)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)

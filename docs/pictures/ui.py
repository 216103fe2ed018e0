"""Takes the pictures of the page that ``docs/ui.md`` shows: `python docs/pictures/ui.py [FOLDER]`.

Starts the page on an embedded model, does what a visitor would do in a headless Chromium, and keeps pictures of it: on
a desk and on a phone, light and dark. Needs the extras ``demo`` and ``test``, and a Chromium (``CHROMIUM``, else
/usr/bin/chromium).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

from hf_kedit import EditableModel
from hf_kedit.ui.layout import serve

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
DESK, PHONE = {"width": 1180, "height": 760}, {"width": 390, "height": 844}
WAIT = 60_000


def main(folder: Path) -> None:
    """Take all pictures."""
    app = serve(EditableModel.from_pretrained("kedit/world-llama", "auto"), wait=False)
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            for name, size, scheme in (("desk", DESK, "light"), ("dark", DESK, "dark"), ("phone", PHONE, "light")):
                context: Any = browser.new_context(viewport=size, color_scheme=scheme, locale="en-GB")
                visit(context.new_page(), app.local_url, folder, name)
                context.close()
            browser.close()
    finally:
        app.close()


def visit(page: Page, url: str, folder: Path, name: str) -> None:
    """Edit, ask, look inside, look back, share; a picture of each."""
    page.goto(url)
    page.get_by_text("no edits yet").wait_for(timeout=WAIT)
    keep(page, folder / f"ui-{name}-start.png")
    page.get_by_role("button", name="Change the fact").click()
    page.get_by_text("1 edit on").wait_for(timeout=WAIT)
    keep(page, folder / f"ui-{name}-edit.png")
    for tab, button, shown in (
        ("Probe", "Ask", "#k-answers .k-result"),
        ("Inspect", "Look inside", "#k-insides .k-result"),
        ("History", "", ".k-entry"),
        ("Share", "", ".k-facts"),
    ):
        page.get_by_role("tab", name=tab).click()
        if button:
            page.get_by_role("button", name=button, exact=True).click()
        page.locator(shown).first.wait_for(timeout=WAIT)
        keep(page, folder / f"ui-{name}-{tab.lower()}.png")


def keep(page: Page, file: Path) -> None:
    """The whole page, as it stands when nothing moves any more."""
    page.mouse.move(0, 0)
    page.wait_for_timeout(700)
    page.screenshot(path=str(file), full_page=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)

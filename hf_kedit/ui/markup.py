"""HTML in which texts are texts: whatever is put into a `tag` is escaped, unless a `tag` has made it.

The page shows prompts of strangers and what models write. Nothing here takes a text for markup, so that no caller can
forget to escape one.
"""

from __future__ import annotations

from html import escape

from ..storage.display import printable


class Markup(str):
    """A piece of HTML that `tag` has made."""


def tag(name: str, *inside: str | None, **attributes: str | None) -> Markup:
    """An element.

    Args:
        name: of the element, such as ``"p"``.
        inside: texts, which are escaped, and elements; ``None`` is left out.
        attributes: ``cls`` is ``class``; ``None`` is left out.
    """
    given = {("class" if key == "cls" else key.replace("_", "-")): value for key, value in attributes.items()}
    opening = "".join(f' {key}="{escape(value)}"' for key, value in given.items() if value is not None)
    return Markup(f"<{name}{opening}>{pieces(*inside)}</{name}>")


def pieces(*parts: str | None) -> Markup:
    """Texts, which are escaped, and elements, one behind the other."""
    return Markup("".join(part if isinstance(part, Markup) else escape(printable(part)) for part in parts if part))

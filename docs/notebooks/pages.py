"""A hook of mkdocs: every notebook of this folder becomes a page of the site, with the outputs that it holds.

The pictures in the outputs become files beside the page. What loads from another host (the badge of Colab) is a link.
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

FOLDER = Path(__file__).resolve().parent
_IMAGES = {"image/png": "png", "image/jpeg": "jpg"}
_BADGE = re.compile(r"\[!\[(Open in Colab)\]\([^)]*\)\]\(([^)]*)\)")


def on_files(files: Any, config: Any, **_: Any) -> Any:
    """Add the pages and their pictures."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        text, pictures = page(path)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        for name, data in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=data))
    return files


def page(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures by name."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(_BADGE.sub(rf"[\1](\2) · [the notebook]({path.name})", source))
            continue
        if "find_spec" not in source:  # readers of the site have no need of the cell that installs
            parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            parts += _shown(output, path.stem, pictures)
    return "\n\n".join(parts) + "\n", pictures


def _shown(output: dict[str, Any], stem: str, pictures: dict[str, bytes]) -> list[str]:
    """An output: its picture, else its table, else its text."""
    data = output.get("data", {})
    for kind, ending in _IMAGES.items():
        if kind in data:
            name = f"{stem}-{len(pictures) + 1}.{ending}"
            pictures[name] = base64.b64decode("".join(data[kind]))
            width = output.get("metadata", {}).get(kind, {}).get("width")
            return [f"![what the cell draws]({name})" + (f"{{ width={width} }}" if width else "")]
    if "text/html" in data:
        table = re.sub(r"<style.*?</style>", "", "".join(data["text/html"]), flags=re.DOTALL)
        return [re.sub(r"\n\s*", "\n", table).strip()]
    text = "".join(output.get("text") or data.get("text/plain") or ())
    return [f"```text\n{text.rstrip()}\n```"] if text.strip() else []

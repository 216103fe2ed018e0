"""The notebooks: they run, they are stored as they run, and the site shows them."""

from __future__ import annotations

import asyncio
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
NOTEBOOKS = sorted(path.stem for path in (DOCS / "notebooks").glob("*.ipynb"))
LONGEST = {"trained_editors", "memories", "fine_tuning", "evaluation_traps", "president_story"}


def _script(name: str) -> dict[str, Any]:
    pytest.importorskip("nbformat")
    pytest.importorskip("nbclient")
    return runpy.run_path(str(DOCS / "notebooks" / name))


@pytest.fixture(scope="module")
def kernel() -> Iterator[Any]:
    """One for all notebooks, which forgets their names in between, so that torch is imported once."""
    manager = pytest.importorskip("jupyter_client").AsyncKernelManager(kernel_name="python3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield manager
        if manager.has_kernel:
            asyncio.run(manager.shutdown_kernel(now=True))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LONGEST else name for name in NOTEBOOKS]
)
def test_notebook(name: str, tmp_path: Path, kernel: Any) -> None:
    """Every cell runs; the last ones assert what the text claims."""
    make = _script("make.py")
    notebook = make["read"](name)
    make["execute"](notebook, tmp_path, kernel)
    assert "assert" in notebook.cells[-1].source


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_stored_notebook(name: str) -> None:
    """Its head is as `make.py` writes it, its outputs are there, without a path of this machine, and small."""
    make = _script("make.py")
    path = DOCS / "notebooks" / f"{name}.ipynb"
    stored, wanted = make["nbformat"].read(path, as_version=4), make["read"](name)
    assert [c.source for c in stored.cells] == [c.source for c in wanted.cells], "run make notebooks"
    assert stored.cells[0].source.startswith("# ") and "colab" in stored.cells[0].source
    outputs = [o for c in stored.cells if c.cell_type == "code" for o in c.outputs]
    assert any({"image/png", "image/jpeg"} & set(o.get("data", {})) for o in outputs), "without a picture"
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    text = path.read_text(encoding="utf-8")
    assert len(text) < 300_000 and not re.search(r"/(home|root|tmp|work)/", text)


def test_what_stands_in_the_head_of_every_notebook_is_put_there_once() -> None:
    make = _script("make.py")
    assert sum("find_spec" in cell.source for cell in make["read"](NOTEBOOKS[0]).cells) == 1
    assert make["INSTALL"].count("%pip install") == 1


def test_a_notebook_becomes_a_page() -> None:
    pages = _script("pages.py")
    text, pictures = pages["page"](DOCS / "notebooks" / "president_story.ipynb")
    assert text.startswith("# The president story") and "find_spec" not in text
    assert "[Open in Colab](https://colab" in text and "badge.svg" not in text  # nothing is loaded from there
    assert "```python\n" in text and "<table" in text and "<style" not in text
    assert all(data.startswith(b"\x89PNG") and f"]({name})" in text for name, data in pictures.items()) and pictures


def test_the_site_shows_every_notebook() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = (DOCS / "notebooks" / "index.md").read_text(encoding="utf-8")
    assert not [n for n in NOTEBOOKS if f"notebooks/{n}.md" not in nav or f"]({n}.md)" not in listed]
    assert len(NOTEBOOKS) >= 14

"""The documentation as a site: it builds without a warning, names what is public, and its long example runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hf_kedit
from hf_kedit.methods import registered_methods

from .test_quickstart import ROOT, _agree, _blocks, _expected

DOCS = ROOT / "docs"


def _run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    return subprocess.run([sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True, check=False)


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Dead links, dead anchors, pages that the nav forgets and docstrings that cannot be read are warnings."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    done = _run("-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site"), cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "EditableModel" in (tmp_path / "site" / "reference" / "model" / "index.html").read_text(encoding="utf-8")


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


@pytest.mark.parametrize("name", sorted(p.name for p in (DOCS / "notebooks").glob("*.ipynb")))
def test_notebook(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell runs; the last ones assert what the text claims."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(DOCS / "notebooks" / name, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    assert "assert" in "".join(cell.source for cell in notebook.cells if cell.cell_type == "code")

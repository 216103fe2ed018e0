"""Runs the notebooks of this folder, each in a kernel of its own, and writes their outputs back: `make notebooks`.

    python docs/notebooks/make.py              all of them (three minutes)
    python docs/notebooks/make.py many_edits   one

The head of a notebook (the link to Colab, and the cell that installs) is written here, so that it is the same in all.
Outputs are kept small and free of what differs from run to run: no progress bars, no warnings, no identifiers.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
REPOSITORY = os.environ.get("REPOSITORY", "hf-kedit/hf_kedit")
"""Owner and name on GitHub, for Colab: `make notebooks REPOSITORY=owner/name` after the repository has moved."""
INSTALL = """\
# Installs the library where it is missing, as on Colab.
import importlib.util

if importlib.util.find_spec("hf_kedit") is None:
    %pip install -q "hf_kedit[viz,eval]"\
"""
TIMEOUT = 300
KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


def names() -> list[str]:
    """All notebooks."""
    return sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def read(name: str) -> Any:
    """A notebook, with its head as it should be."""
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    first, second = notebook.cells[0], notebook.cells[1]
    title, *lines = first.source.split("\n")
    text = "\n".join(line for line in lines if "colab-badge" not in line).strip("\n")
    first.source = f"{title}\n\n{badge(name)}\n\n{text}"
    if "find_spec" not in second.source:
        notebook.cells.insert(1, nbformat.v4.new_code_cell())
    notebook.cells[1].source = INSTALL
    return notebook


def badge(name: str) -> str:
    """The link that opens a notebook on Colab."""
    address = f"https://colab.research.google.com/github/{REPOSITORY}/blob/main/docs/notebooks/{name}.ipynb"
    return f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({address})"


def execute(notebook: Any, folder: str | Path, kernel: Any = None) -> None:
    """Run every cell; an error in one raises.

    Args:
        notebook: gets the outputs.
        folder: to run in.
        kernel: that runs already, whose names are forgotten; ``None`` starts one.
    """
    options = {"timeout": TIMEOUT, "kernel_name": "python3", "resources": {"metadata": {"path": str(folder)}}}
    forget = nbformat.v4.new_code_cell(f"%reset -f\n%cd -q {folder}")
    if kernel is not None:
        NotebookClient(nbformat.v4.new_notebook(cells=[forget]), km=kernel, **options).execute()
    NotebookClient(notebook, km=kernel, **options).execute()


def tidy(notebook: Any) -> None:
    """Leave nothing in a notebook that differs from run to run."""
    notebook.metadata = nbformat.from_dict(KERNEL)
    for number, cell in enumerate(notebook.cells):
        cell.metadata, cell.id = nbformat.from_dict({}), f"cell-{number}"
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.output_type != "stream" or o.name == "stdout"]


def main(chosen: list[str]) -> None:
    os.environ["PYTHONPATH"] = str(ROOT)
    for name in chosen or names():
        notebook = read(name)
        with tempfile.TemporaryDirectory() as folder:
            execute(notebook, folder)
        tidy(notebook)
        nbformat.validate(notebook)
        nbformat.write(notebook, FOLDER / f"{name}.ipynb")
        sys.stdout.write(f"{name}: {(FOLDER / f'{name}.ipynb').stat().st_size / 1024:.0f} KiB\n")


if __name__ == "__main__":
    main(sys.argv[1:])

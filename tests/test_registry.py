"""The registry: what is known by the name of a method, and the modules and packages that fill it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hf_kedit.errors import UnknownMethodError
from hf_kedit.registry import SOURCES, Table, announce


def _run(code: str, path: Path) -> str:
    """What a fresh interpreter prints that also finds the packages in a folder."""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": str(path)}
    )
    return run.stdout.strip()


def test_a_name_is_found_however_it_is_written_and_the_last_entry_counts() -> None:
    table: Table[int] = Table()
    table.add("R_ROME ", 1)
    table.add("a method", 2)
    assert table.get("r-rome") == table.get("R ROME") == 1
    table.add("r-rome", 3)
    assert table.all() == {"a-method": 2, "r-rome": 3} and list(table.all()) == ["a-method", "r-rome"]


@pytest.mark.parametrize("name", ["r-rom", "", None, 5, ["r-rome"]])
def test_an_unknown_name_is_a_typed_error_that_lists_the_known(name: object) -> None:
    table: Table[int] = Table()
    table.add("r-rome", 1)
    with pytest.raises(UnknownMethodError, match="Known: r-rome"):
        table.get(name)  # type: ignore[arg-type]


@pytest.mark.parametrize("wish", ["best", "Default", "recommended", "easiest"])
def test_a_wish_is_no_method_and_is_told_where_to_look(wish: str) -> None:
    table: Table[int] = Table()
    table.add("pmet", 1)
    with pytest.raises(UnknownMethodError, match=r"docs/methods/index\.md.*kedit list-methods") as error:
        table.get(wish)
    assert "Did you mean" not in str(error.value) and "auto" not in str(error.value)
    table.add("auto", 1)
    with pytest.raises(UnknownMethodError, match="--method auto"):
        table.get(wish)


@pytest.mark.parametrize(
    ("word", "method"),
    [("finetune", "ft-m"), ("Fine-Tuning", "ft-m"), ("RAG", "prompt"), ("ICL", "ike"), ("peft", "lora")],
)
def test_a_word_for_a_kind_of_method_is_understood_by_its_meaning(word: str, method: str) -> None:
    table: Table[int] = Table()
    for name in ("calinet", "ft-m", "ike", "lora", "prompt"):
        table.add(name, 1)
    with pytest.raises(UnknownMethodError, match=f"Did you mean '{method}'"):
        table.get(word)


def test_a_module_is_announced_once() -> None:
    before = list(SOURCES)
    announce(before[0])
    assert before == SOURCES  # nothing was added


def test_neither_the_package_nor_the_registry_imports_anything_heavy(tmp_path: Path) -> None:
    heavy = "{'torch', 'pydantic', 'transformers', 'importlib.abc', 'hf_kedit.config', 'hf_kedit.methods'}"
    code = f"import sys, hf_kedit, hf_kedit.registry; print(sorted({heavy} & set(sys.modules)))"
    assert _run(code, tmp_path) == "[]"


def test_methods_of_installed_packages_are_found(tmp_path: Path) -> None:
    """A package whose entry point names a module: no import of it by the user."""
    (tmp_path / "nudging.py").write_text(
        "from dataclasses import dataclass\n"
        "from hf_kedit.config import EditConfig, register_config\n"
        "@register_config\n"
        "@dataclass\n"
        "class NudgeConfig(EditConfig):\n"
        "    edit_type = 'nudge'\n"
    )
    info = tmp_path / "nudging-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nudging\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[hf_kedit.methods]\nnudge = nudging\n")
    code = "from hf_kedit import AutoEditConfig; print(AutoEditConfig.for_method('Nudge', layers=[1]))"
    assert _run(code, tmp_path).startswith("NudgeConfig(layers=[1]")

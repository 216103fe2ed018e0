"""The public names of the package: one list, and what has to agree with it."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import hf_kedit
from hf_kedit.methods import registered_methods


def _for_type_checkers() -> dict[str, str]:
    """Name → module of what the block for type checkers imports (under the same name, so that it is exported)."""
    source = Path(hf_kedit.__file__).read_text(encoding="utf-8")
    (block,) = (n for n in ast.parse(source).body if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test))
    names = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.asname == alias.name
            names[alias.name] = node.module or ""
    return names


def test_type_checkers_see_what_is_imported_at_run_time() -> None:
    assert _for_type_checkers() == {**dict.fromkeys(hf_kedit._MODULES, ""), **hf_kedit._HOME}


def test_every_public_name_is_there_once() -> None:
    names = hf_kedit.__all__
    assert len(names) == len(set(names)) > 50
    namespace: dict[str, object] = {}
    exec("from hf_kedit import *", namespace)
    assert set(names) <= set(namespace) and set(names) <= set(dir(hf_kedit))
    for name, module in hf_kedit._HOME.items():
        assert getattr(importlib.import_module(f"hf_kedit.{module}"), name) is getattr(hf_kedit, name)


def test_the_config_of_every_method_is_public() -> None:
    methods = [m for m in registered_methods().values() if m.__module__.startswith("hf_kedit.")]
    assert len(methods) > 30
    assert not {m.config_class.__name__ for m in methods} - set(hf_kedit.__all__)


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="NoSuchConfig"):
        hf_kedit.NoSuchConfig  # noqa: B018

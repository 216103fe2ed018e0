"""The rules of the house that a reader cannot see in one file: which way imports point, and what no file does.

The checks read the source with ``ast`` and import nothing of the library. Each check is also run on a snippet
that breaks its rule, so that it cannot pass by looking at nothing.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "hf_kedit"
MAX_LINES = 600

# From the bottom up. A file imports from its own floor and from those below it.
FLOORS: list[set[str]] = [
    {"testing"},  # a Hub for tests: knows nothing of the library
    {"version", "errors", "registry", "logging", "requests", "storage", "config"},
    {"data", "embedded"},
    {"anatomy"},
    {"tokens"},
    {"engine", "statistics", "books"},
    {"locate"},
    {"editors", "methods"},
    {"model", "editing", "journal", "loading", "artifact", "hub"},
    {"evaluation", "training"},
    {"compat"},
    {"cli"},
    {"", "__main__"},  # the package itself: hf_kedit/__init__.py shows the public names of all floors
]

# Imports by name at run time that point up on purpose: (who, what).
LATE_IMPORTS: set[tuple[str, str]] = set()

CONVERTER = PACKAGE / "methods" / "mend_convert.py"  # reads others' archives with weights_only=True
WEIGHT_FILE = PACKAGE / "engine" / "weights.py"
PICKLE_MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


# ---------------------------------------------------------------------- reading the source


@cache
def _modules() -> dict[str, Path]:
    """Return every module of the package: dotted name → file."""
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        names[".".join(parts)] = path
    return names


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _imports(tree: ast.AST, module: str, is_package: bool, known: frozenset[str]) -> Iterator[tuple[int, str, bool]]:
    """Yield line, imported module of hf_kedit, and whether the import is made by name at run time."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "hf_kedit":
                    yield node.lineno, alias.name, False
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + (1 if is_package else 0)]
                base = ".".join([*parts, base]) if base else ".".join(parts)
            if base.split(".")[0] == "hf_kedit":
                for alias in node.names:
                    full = f"{base}.{alias.name}"
                    yield node.lineno, full if full in known else base, False
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            value = node.args[0].value
            if name in ("import_module", "__import__") and isinstance(value, str) and value.startswith("hf_kedit"):
                yield node.lineno, value, True


def _floor(module: str) -> int | None:
    """Return the number of the floor of a module, counted from the bottom, or ``None`` if it has none."""
    top = module.split(".")[1] if "." in module else ""
    return next((i for i, names in enumerate(FLOORS) if top in names), None)


def _upward(module: str, tree: ast.AST, is_package: bool, known: frozenset[str]) -> list[str]:
    """Return the imports of a module that point up."""
    own = _floor(module)
    assert own is not None, f"{module} is on no floor: add it to FLOORS"
    wrong = []
    for line, target, late in _imports(tree, module, is_package, known):
        floor = _floor(target)
        if late and (module, target) in LATE_IMPORTS:
            continue
        if floor is None or floor > own:
            wrong.append(f"{module}:{line} imports {target}")
    return wrong


def _forbidden(tree: ast.AST, *, may_touch_weights: bool = False, may_convert: bool = False) -> list[str]:
    """Return what a library file must not do: print, unpickle, and reach into a weight."""
    found = []
    calls = [n for n in ast.walk(tree) if may_convert and isinstance(n, ast.Call)]
    tensors_only = {
        id(c.func) for c in calls if any(k.arg == "weights_only" and _is_true(k.value) for k in c.keywords)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id == "print":
                found.append(f"line {node.lineno}: print(); use the logger or, in cli/, the console")
            for keyword in node.keywords:
                if keyword.arg == "allow_pickle" and not _is_false(keyword.value):
                    found.append(f"line {node.lineno}: allow_pickle; safetensors only")
        elif isinstance(node, ast.Attribute):
            owner = node.value
            on_torch = isinstance(owner, ast.Name) and owner.id == "torch"
            if node.attr in ("load", "save") and on_torch and id(node) not in tensors_only:
                found.append(f"line {node.lineno}: torch.{node.attr}; safetensors only")
            is_weight = isinstance(owner, ast.Attribute) and owner.attr in ("weight", "bias")
            if node.attr == "data" and is_weight and not may_touch_weights:
                found.append(f"line {node.lineno}: .{owner.attr}.data; read and write weights with engine/weights.py")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in PICKLE_MODULES and not (may_convert and alias.name == "pickle"):
                    found.append(f"line {node.lineno}: import {alias.name}; nothing is unpickled")
        elif isinstance(node, ast.ImportFrom) and not node.level:
            if (node.module or "").split(".")[0] in PICKLE_MODULES:
                found.append(f"line {node.lineno}: from {node.module}; nothing is unpickled")
            if node.module == "torch" and {a.name for a in node.names} & {"load", "save"}:
                found.append(f"line {node.lineno}: torch.load/save; safetensors only")
    return found


def _is_true(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


# ---------------------------------------------------------------------- the rules, on the library


def test_every_module_has_a_floor() -> None:
    homeless = [name for name in _modules() if _floor(name) is None]
    assert not homeless, f"not in FLOORS: {homeless}"


def test_imports_point_down() -> None:
    known = frozenset(_modules())
    wrong = []
    for name, path in _modules().items():
        wrong += _upward(name, _tree(path), path.name == "__init__.py", known)
    assert not wrong, "\n".join(["imports that point up:", *wrong])


def test_late_imports_exist() -> None:
    """An exception whose reason has gone must go too."""
    modules = _modules()
    for who, what in LATE_IMPORTS:
        path = modules[who]
        late = {t for _, t, late in _imports(_tree(path), who, path.name == "__init__.py", frozenset(modules)) if late}
        assert what in late, f"{who} no longer imports {what}: remove the exception"


def test_modules_do_not_import_in_circles() -> None:
    """Within a floor, imports at the top of modules form no circle.

    A package's ``__init__`` counts as its own module; importing a module through it is the package's affair.
    """
    known = frozenset(_modules())
    graph: dict[str, set[str]] = {}
    for name, path in _modules().items():
        top = ast.Module(
            body=[n for n in _tree(path).body if isinstance(n, ast.Import | ast.ImportFrom)], type_ignores=[]
        )
        graph[name] = {t for _, t, _ in _imports(top, name, path.name == "__init__.py", known)} - {name}
    assert not _circle(graph), " → ".join(_circle(graph))


def _circle(graph: dict[str, set[str]]) -> list[str]:
    """Return one circle of a directed graph as a list of nodes, or an empty list."""
    state: dict[str, int] = {}

    def visit(node: str, path: list[str]) -> list[str]:
        state[node] = 1
        for target in sorted(graph.get(node, ())):
            if state.get(target) == 1:
                return [*path[path.index(target) :], target]
            if target not in state:
                found = visit(target, [*path, target])
                if found:
                    return found
        state[node] = 2
        return []

    for start in sorted(graph):
        if start not in state:
            found = visit(start, [start])
            if found:
                return found
    return []


@pytest.mark.parametrize("name", sorted(_modules()))
def test_nothing_forbidden(name: str) -> None:
    path = _modules()[name]
    assert not _forbidden(_tree(path), may_touch_weights=path == WEIGHT_FILE, may_convert=path == CONVERTER)


def test_files_stay_readable() -> None:
    long = {n: c for n, p in _modules().items() if (c := len(p.read_text(encoding="utf-8").splitlines())) > MAX_LINES}
    assert not long, f"more than {MAX_LINES} lines, split by subject: {long}"


def test_every_module_says_what_it_is() -> None:
    silent = [n for n, p in _modules().items() if p.stat().st_size and not ast.get_docstring(_tree(p))]
    assert not silent, f"no module docstring: {silent}"


# ---------------------------------------------------------------------- the rules, on what breaks them


@pytest.mark.parametrize(
    "source",
    [
        "from hf_kedit.model import EditableModel",
        "from ..model import EditableModel",
        "from .. import model",
        "import hf_kedit.cli.app",
        "def f():\n    from ..evaluation.metrics import x",
        "from hf_kedit import EditableModel",
        "import importlib\nimportlib.import_module('hf_kedit.methods')",
    ],
)
def test_an_upward_import_is_seen(source: str) -> None:
    known = frozenset({"hf_kedit", "hf_kedit.model", "hf_kedit.engine", "hf_kedit.evaluation.measures.metrics"})
    assert _upward("hf_kedit.books.ledger", ast.parse(source), False, known)


@pytest.mark.parametrize(
    "source",
    [
        "from .weights import get_weight",
        "from ..errors import WeightError",
        "from .. import errors",
        "import torch\nfrom transformers import AutoModel",
        "from . import weights",
    ],
)
def test_a_downward_import_is_fine(source: str) -> None:
    known = frozenset({"hf_kedit", "hf_kedit.errors", "hf_kedit.engine", "hf_kedit.engine.weights"})
    assert not _upward("hf_kedit.books.ledger", ast.parse(source), False, known)


def test_relative_imports_of_a_package_are_resolved_from_itself() -> None:
    known = frozenset({"hf_kedit.engine.weights", "hf_kedit.engine", "hf_kedit.errors"})
    tree = ast.parse("from .weights import a\nfrom ..errors import b")
    assert [t for _, t, _ in _imports(tree, "hf_kedit.engine", True, known)] == [
        "hf_kedit.engine.weights",
        "hf_kedit.errors",
    ]


def test_a_circle_is_seen() -> None:
    assert _circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert not _circle({"a": {"b", "c"}, "b": {"c"}, "c": set()})


@pytest.mark.parametrize(
    "source",
    [
        "print('x')",
        "torch.load('x')",
        "torch.save(a, 'x')",
        "from torch import load",
        "import pickle",
        "from joblib import dump",
        "np.load(f, allow_pickle=True)",
        "module.weight.data.add_(1)",
        "module.mlp.bias.data = x",
    ],
)
def test_something_forbidden_is_seen(source: str) -> None:
    assert _forbidden(ast.parse(source))


def test_something_harmless_is_not_forbidden() -> None:
    source = "import torch\nlogger.info('print(x)')\nself.data.load()\nnp.load(f, allow_pickle=False)\nrow.data['x']"
    assert not _forbidden(ast.parse(source))
    assert not _forbidden(ast.parse("module.weight.data = x"), may_touch_weights=True)


def test_the_converter_reads_tensors_only() -> None:
    assert not _forbidden(ast.parse("torch.load(p, weights_only=True)"), may_convert=True)
    assert _forbidden(ast.parse("torch.load(p, weights_only=True)"))
    assert _forbidden(ast.parse("torch.load(p)"), may_convert=True)
    assert _forbidden(ast.parse("torch.load(p, weights_only=False)"), may_convert=True)

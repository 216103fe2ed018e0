"""The rules of the house that a reader cannot see in one file: which way imports point, and what no file does.

The checks read the source with ``ast`` and import nothing of the library. Every import counts, wherever it stands:
at the top of a file, under ``TYPE_CHECKING``, inside a function, or by a constant name at run time. Each check is also
run on something that breaks its rule, so that it cannot pass by looking at nothing.
"""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from tests.import_graph import (
    PACKAGE,
    ROOT,
    Import,
    circle,
    file_graph,
    floors,
    imports,
    imports_of,
    modules,
    room_graph,
    shown,
    tree,
)

MAX_LINES = 600
MAX_FILES, MAX_FOLDER_LINES = 40, 4500
LARGE_FOLDERS = {"methods", "data"}  # one file per method, one per dataset

TOP_LEVEL = "__init__ errors journal loading logging model registry requests tokens tracking version"

# From the bottom up: every room (a folder, or a file at the top) stands as low as what it imports allows. The test
# computes the floors from the source and compares; docs/architecture.md shows the same list.
FLOORS: list[str] = [
    "errors logging testing version",
    "registry text",
    "storage tokens",
    "config drawing gguf remote requests",
    "anatomy data embedded journal",
    "engine tracking",
    "books decoding editors statistics values",
    "loading locate",
    "methods training",
    "editing",
    "artifact",
    "hub model",
    "evaluation serving",
    "compat tuning ui",
    "cli",
]
EVALUATION_FLOORS: list[str] = [
    "asking",
    "measures",
    "functional protocols report",
    "scenarios",
    "runs",
    "evaluate_modules",
    "hub_metrics",
]

# Who may import parts of the package inside a function, and why. `cli/` and `__init__.py` may, so that commands start
# quickly.
LATE_IMPORTS: dict[tuple[str, str], str] = {
    ("hf_kedit.compat.peft_import", "hf_kedit.compat.peft_tuners"): "registers with PEFT when PEFT is imported",
    ("hf_kedit.loading", "hf_kedit.data.picture_text"): "the data sets are loaded for embedded models only",
    ("hf_kedit.drawing.style", "hf_kedit.drawing.picture"): "needs the extra `viz`",
    ("hf_kedit.loading", "hf_kedit.data.world_text"): "the data sets are loaded for embedded models only",
    ("hf_kedit.evaluation.hub_metrics", "hf_kedit.evaluation.evaluate_modules"): "needs the extra `eval`",
}

# One name, several files: (name) → why that is right.
SHARED_NAMES: dict[str, str] = {
    "ResidualBlock": "the blocks of MEND's and of MALMEN's network, each as its paper has it",
    "render": "html.render and markdown.render, called through their modules",
}

CONVERTER = PACKAGE / "methods" / "mend_convert.py"  # reads others' archives with weights_only=True
WEIGHT_FILE = PACKAGE / "engine" / "weights.py"
PICKLE_MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


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


def test_files_do_not_import_in_circles() -> None:
    closed = circle(file_graph())
    assert not closed, " → ".join(closed)


@pytest.mark.parametrize(
    ("inside", "expected"),
    [("hf_kedit", FLOORS), ("hf_kedit.evaluation", EVALUATION_FLOORS)],
    ids=["all", "evaluation"],
)
def test_rooms_stand_on_floors(inside: str, expected: list[str]) -> None:
    """No circle of rooms, and each on the floor that its imports give it. Every room is listed, and nothing else."""
    rooms = room_graph(file_graph(), inside)
    closed = circle(rooms)
    assert not closed, " → ".join(closed)
    computed = [" ".join(sorted(level)) for level in floors(rooms)]
    assert computed == [" ".join(sorted(level.split())) for level in expected], "\n".join(computed)


def test_the_page_shows_the_floors() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert shown([level.split() for level in FLOORS]) in page, "python -m tests.import_graph prints them"


def test_top_level_files() -> None:
    assert sorted(TOP_LEVEL.split()) == sorted(p.stem for p in PACKAGE.glob("*.py"))


def test_folders_stay_readable() -> None:
    files, lines = Counter[Path](), Counter[Path]()
    for path in modules().values():
        files[path.parent] += 1
        lines[path.parent] += len(path.read_text(encoding="utf-8").splitlines())
    crowded = [p.name for p in files if files[p] > MAX_FILES or lines[p] > MAX_FOLDER_LINES]
    assert set(crowded) <= LARGE_FOLDERS, crowded


def test_nothing_below_the_face_knows_it() -> None:
    """`EditableModel` is the face of a model; what stands below `model.py` is written for `EditedModel`."""
    height = {name: number for number, level in enumerate(FLOORS) for name in level.split()}
    wrong = [
        f"{name}:{i.line}"
        for name in modules()
        for i in imports_of(name)
        if i.target == "hf_kedit.model" and name != "hf_kedit" and height[name.split(".")[1]] <= height["model"]
    ]
    assert not wrong, wrong


def test_imports_inside_functions_have_a_reason() -> None:
    late = {
        (name, i.target)
        for name in modules()
        for i in imports_of(name)
        if i.inside is not None and name != "hf_kedit" and not name.startswith("hf_kedit.cli")
    }
    assert late == set(LATE_IMPORTS), f"new: {late - set(LATE_IMPORTS)}, gone: {set(LATE_IMPORTS) - late}"


def test_imports_are_relative() -> None:
    absolute = [f"{name}:{i.line} {i.target}" for name in modules() for i in imports_of(name) if not i.relative]
    assert not absolute, absolute


def test_one_name_one_meaning() -> None:
    """No two files define a public function, class or constant of the same name."""
    homes = public_names({name: tree(path) for name, path in modules().items()})
    twice = {name: files for name, files in homes.items() if len(files) > 1}
    unexplained = {name: files for name, files in twice.items() if name not in SHARED_NAMES}
    assert not unexplained, "\n".join(f"{name}: {', '.join(files)}" for name, files in sorted(unexplained.items()))
    assert set(SHARED_NAMES) <= set(twice), f"no longer shared: {set(SHARED_NAMES) - set(twice)}"


def public_names(trees: dict[str, ast.Module]) -> dict[str, list[str]]:
    """Return public name → files that define it.

    Type variables and ``logger`` do not count, nor what ``cli/`` calls its commands and ``compat/`` takes from others.
    """
    homes: dict[str, list[str]] = defaultdict(list)
    for file, syntax in trees.items():
        for node in syntax.body:
            names: list[str] = []
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names = [node.name]
            elif isinstance(node, ast.Assign) and not _makes_type_variable(node.value):
                names = [n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)]
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names = [node.target.id]
            for name in names:
                own = not file.startswith(("hf_kedit.cli.", "hf_kedit.compat."))
                if own and not name.startswith("_") and name != "logger" and file not in homes[name]:
                    homes[name].append(file)
    return homes


@pytest.mark.parametrize("name", sorted(modules()))
def test_nothing_forbidden(name: str) -> None:
    path = modules()[name]
    assert not _forbidden(tree(path), may_touch_weights=path == WEIGHT_FILE, may_convert=path == CONVERTER)


def test_files_stay_readable() -> None:
    long = {n: c for n, p in modules().items() if (c := len(p.read_text(encoding="utf-8").splitlines())) > MAX_LINES}
    assert not long, f"more than {MAX_LINES} lines, split by subject: {long}"


def test_every_module_says_what_it_is() -> None:
    silent = [n for n, p in modules().items() if p.stat().st_size and not ast.get_docstring(tree(p))]
    assert not silent, f"no module docstring: {silent}"


def test_named_tuples_document_attributes() -> None:
    """A strict build of the reference pages takes entries under ``Args:`` of a named tuple for unknown parameters."""
    wrong = [
        f"{name}: {node.name}"
        for name, path in modules().items()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ClassDef)
        and any(getattr(base, "id", "") == "NamedTuple" for base in node.bases)
        and "Args:" in (ast.get_docstring(node) or "")
    ]
    assert not wrong, f"write `Attributes:` instead of `Args:` in the docstring of {wrong}"


def _makes_type_variable(value: ast.expr) -> bool:
    return isinstance(value, ast.Call) and getattr(value.func, "id", "") == "TypeVar"


# ---------------------------------------------------------------------- the rules, on what breaks them

KNOWN = {"hf_kedit", "hf_kedit.model", "hf_kedit.engine", "hf_kedit.engine.weights", "hf_kedit.errors"}


@pytest.mark.parametrize(
    ("source", "target", "inside"),
    [
        ("from ..model import EditableModel", "hf_kedit.model", None),
        ("from hf_kedit.model import EditableModel", "hf_kedit.model", None),
        ("from .. import model", "hf_kedit.model", None),
        ("from . import weights", "hf_kedit.engine.weights", None),
        ("from .weights import get_weight", "hf_kedit.engine.weights", None),
        ("import hf_kedit.errors", "hf_kedit.errors", None),
        ("from hf_kedit import EditableModel", "hf_kedit", None),
        ("if TYPE_CHECKING:\n    from ..model import EditableModel", "hf_kedit.model", None),
        ("def f():\n    from ..errors import x", "hf_kedit.errors", "f"),
        ("class A:\n    def g(self):\n        if x:\n            from ..errors import x", "hf_kedit.errors", "g"),
        ("def f():\n    importlib.import_module('hf_kedit.model')", "hf_kedit.model", "f"),
    ],
)
def test_every_import_is_seen(source: str, target: str, inside: str | None) -> None:
    (seen,) = imports(ast.parse(source), "hf_kedit.engine.ledger", False, KNOWN)
    assert (seen.target, seen.inside) == (target, inside)


def test_imports_of_other_libraries_do_not_count() -> None:
    assert not list(imports(ast.parse("import torch\nfrom transformers import AutoModel"), "hf_kedit.a", False, KNOWN))


def test_a_package_resolves_its_imports_from_itself() -> None:
    seen = imports(ast.parse("from .weights import a\nfrom ..errors import b"), "hf_kedit.engine", True, KNOWN)
    assert [i.target for i in seen] == ["hf_kedit.engine.weights", "hf_kedit.errors"]


def test_relative_and_absolute_are_told_apart() -> None:
    seen = imports(ast.parse("from .weights import a\nfrom hf_kedit.errors import b"), "hf_kedit.engine", True, KNOWN)
    assert [i.relative for i in seen] == [True, False]
    assert Import(1, "hf_kedit.errors").relative


def test_a_circle_is_seen() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert not circle({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def test_a_circle_of_rooms_is_seen_where_files_have_none() -> None:
    files = {"p.a.x": {"p.b.y"}, "p.b.y": set(), "p.b.z": {"p.a.w"}, "p.a.w": set()}
    assert not circle(files)
    assert circle(room_graph(files, "p")) == ["a", "b", "a"]


def test_floors_are_the_longest_ways_down() -> None:
    assert floors({"a": {"b", "c"}, "b": {"c"}, "c": set(), "d": set()}) == [{"c", "d"}, {"b"}, {"a"}]


def test_a_name_in_two_files_is_seen() -> None:
    two = {"hf_kedit.a": ast.parse("def f(): ...\nX = 1"), "hf_kedit.b": ast.parse("X: int = 2\ndef _g(): ...")}
    assert dict(public_names(two)) == {"f": ["hf_kedit.a"], "X": ["hf_kedit.a", "hf_kedit.b"]}


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

"""The imports of the package as a graph: every import counts, wherever it stands.

``python -m tests.import_graph`` prints the floors as they are, computed from the source, in the form in which
``docs/architecture.md`` shows them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "hf_kedit"
Graph = dict[str, set[str]]


@dataclass(frozen=True)
class Import:
    """One imported module of the package: where it is imported, and how.

    Args:
        line: of the statement.
        target: dotted name of the module.
        names: what is taken from it; empty if it is imported whole.
        inside: the innermost function that holds the statement, or ``None`` at the top of the file.
        relative: written with dots.
    """

    line: int
    target: str
    names: tuple[str, ...] = ()
    inside: str | None = None
    relative: bool = True


@cache
def modules() -> dict[str, Path]:
    """Return every module of the package: dotted name → file."""
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        names[".".join(parts)] = path
    return names


@cache
def tree(path: Path) -> ast.Module:
    """Return the syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(syntax: ast.AST, module: str, is_package: bool, known: Iterable[str]) -> Iterator[Import]:
    """Yield every import of the package that a module makes: at its top, for type checkers, in functions, by name.

    ``from .room import file`` is an import of the file, not of the room's ``__init__``, which counts only when
    something of its own is taken.
    """
    known = set(known)
    functions = {
        id(inner): node.name
        for node in ast.walk(syntax)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
    }
    for node in ast.walk(syntax):
        inside = functions.get(id(node))
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "hf_kedit":
                    yield Import(node.lineno, alias.name, (), inside, relative=False)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + (1 if is_package else 0)]
                base = ".".join([*parts, base]) if base else ".".join(parts)
            if base.split(".")[0] == "hf_kedit":
                for alias in node.names:
                    full = f"{base}.{alias.name}"
                    target, names = (full, ()) if full in known else (base, (alias.name,))
                    yield Import(node.lineno, target, names, inside, relative=bool(node.level))
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            value = node.args[0].value
            if called in ("import_module", "__import__") and isinstance(value, str) and value.startswith("hf_kedit"):
                yield Import(node.lineno, value, (), inside, relative=True)


@cache
def imports_of(module: str) -> tuple[Import, ...]:
    """Return the imports of a module of the package."""
    path = modules()[module]
    return tuple(imports(tree(path), module, path.name == "__init__.py", modules()))


@cache
def file_graph() -> Graph:
    """Return which file imports which, over all imports."""
    return {name: {i.target for i in imports_of(name)} - {name} for name in modules()}


def room_graph(graph: Mapping[str, set[str]], inside: str = "hf_kedit") -> Graph:
    """Return the graph of the rooms of a package: its folders and the files beside them.

    What a room's files import of each other does not count, and neither do imports from outside the package.
    """

    def room(name: str) -> str | None:
        if not name.startswith(inside + "."):
            return None
        return name.removeprefix(inside + ".").split(".")[0]

    rooms: Graph = {}
    for name, targets in graph.items():
        if (own := room(name)) is not None:
            rooms.setdefault(own, set()).update({r for t in targets if (r := room(t)) is not None} - {own})
    return rooms


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Return one circle of a directed graph as a list of nodes, or an empty list."""
    state: dict[str, int] = {}

    def visit(node: str, path: list[str]) -> list[str]:
        state[node] = 1
        for target in sorted(graph.get(node, ())):
            if state.get(target) == 1:
                return [*path[path.index(target) :], target]
            if target not in state and (closed := visit(target, [*path, target])):
                return closed
        state[node] = 2
        return []

    for start in sorted(graph):
        if start not in state and (closed := visit(start, [start])):
            return closed
    return []


def floors(graph: Mapping[str, set[str]]) -> list[set[str]]:
    """Return the nodes of a graph without circles by the length of the longest way down, lowest first."""
    height: dict[str, int] = {}

    def visit(node: str) -> int:
        if node not in height:
            height[node] = 1 + max((visit(t) for t in graph[node]), default=-1)
        return height[node]

    for node in graph:
        visit(node)
    levels: list[set[str]] = [set() for _ in range(max(height.values(), default=-1) + 1)]
    for node, level in height.items():
        levels[level].add(node)
    return levels


def shown(levels: Iterable[Iterable[str]], inside: Path = PACKAGE) -> str:
    """Return floors as text, highest first; a folder ends in ``/``."""
    lines = []
    for number, level in reversed(list(enumerate(levels))):
        names = [name + ("/" if (inside / name).is_dir() else ".py") for name in sorted(level)]
        lines.append(f"{number:>3}  {'   '.join(names)}")
    return "\n".join(lines)


if __name__ == "__main__":
    import sys

    closed = circle(room_graph(file_graph()))
    sys.stdout.write((" → ".join(closed) if closed else shown(floors(room_graph(file_graph())))) + "\n")

"""Small errors, put into the package one at a time: which of them do the tests beside them notice?

    python -m tests.mutation --count 100 --seed 1 --report mutation.txt

Draws places where a program can be wrong (operators, signs, bounds, axes, order of arguments, negations, a statement
that is missing) from the rooms below, the same ones for the same seed, never from docstrings, messages, annotations or
`raise`. Each runs in a forked process whose import of that one file compiles the changed source; nothing is written
into the package. The tests beside a file are those of its room, and of the rooms that import it, that name the file,
what it defines, or a file that imports it; those that say most about the place first. Not part of the suite: it takes
an hour and more; what the report holds already is not run again. What survives is a missing test, or an error that
changes nothing: run it again with more files (`--only 7 --files 30`) before you believe it. tests/mutation.md lists
what survived, and why.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.abc
import importlib.machinery
import importlib.util
import os
import random
import re
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("engine", "books", "methods", "artifact", "storage", "evaluation")
_SWAPS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add,
    ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.And: ast.Or, ast.Or: ast.And, ast.Pow: ast.Mult,
}  # fmt: skip
# What is said, or means the same in another order.
_NOT_INSIDE = (ast.Raise, ast.JoinedStr, ast.Assert, ast.AnnAssign, ast.Import, ast.ImportFrom)
_MESSAGES = re.compile(r"^(logger\.|warn|warnings\.|console\.|isinstance$|print$|TypeVar$|cast$|min$|max$|field$)")


@dataclass(frozen=True)
class Mutant:
    """One small error.

    Args:
        file: of the package.
        line: where it is, from 1 on.
        what: kind, and the expression before and after.
        source: the whole file with it.
        function: name of the function around it.
    """

    file: Path
    line: int
    what: str
    source: str
    function: str

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} in {self.function}: {self.what}"


def _places(node: ast.AST, function: str = "") -> Iterator[tuple[ast.AST, str]]:
    """All nodes that may be changed, with the function that they stand in."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _NOT_INSIDE) or (
            isinstance(child, ast.Call) and _MESSAGES.match(ast.unparse(child.func))
        ):
            continue
        inside = function
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            inside = f"{function}.{child.name}".lstrip(".")
            for part in child.body:
                yield from _places(ast.Module([part], []), inside)
            continue
        if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
            continue  # a docstring
        if function:
            yield child, function
        yield from _places(child, inside)


def _changed(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Kind and new source of each way to get a node wrong."""
    new: Any = copy.deepcopy(node)
    if isinstance(node, ast.Compare) and type(node.ops[0]) in _SWAPS:
        new.ops[0] = _SWAPS[type(node.ops[0])]()
        yield "operator", f"({ast.unparse(new)})"
    elif isinstance(node, ast.BinOp) and type(node.op) in _SWAPS:
        if not isinstance(node.left, ast.Constant | ast.JoinedStr | ast.List):  # texts and lists are joined
            new.op = _SWAPS[type(node.op)]()
            yield "operator", f"({ast.unparse(new)})"
    elif isinstance(node, ast.BoolOp):
        new.op = _SWAPS[type(node.op)]()
        yield "operator", f"({ast.unparse(new)})"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield "dropped negation", f"({ast.unparse(node.operand)})"
    elif isinstance(node, ast.Subscript | ast.Slice):
        for part in ("slice", "lower", "upper"):
            value = getattr(node, part, None)
            if isinstance(value, ast.Constant) and isinstance(value.value, int):
                getattr(new, part).value += 1
                yield "off by one", ast.unparse(new)
    elif isinstance(node, ast.keyword) and node.arg in ("dim", "axis") and isinstance(node.value, ast.Constant):
        new.value.value = 1 - node.value.value
        yield "wrong axis", ast.unparse(new)
    elif isinstance(node, ast.Call):
        if len(node.args) == 2 and not any(isinstance(a, ast.Starred | ast.Constant) for a in node.args):
            new.args.reverse()
            yield "swapped arguments", ast.unparse(new)
    elif isinstance(node, ast.AugAssign) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        yield "removed statement", "pass"
    elif isinstance(node, ast.IfExp):
        new.body, new.orelse = new.orelse, new.body
        yield "swapped branches", f"({ast.unparse(new)})"


def mutants(file: Path) -> list[Mutant]:
    """All small errors that can be made in a file."""
    source = file.read_text(encoding="utf-8")
    lines = [len(line.encode()) for line in source.splitlines(keepends=True)]
    data, found = source.encode(), []
    for node, function in _places(ast.parse(source)):
        for kind, new in _changed(node):
            where: Any = node
            start = sum(lines[: where.lineno - 1]) + where.col_offset
            end = sum(lines[: where.end_lineno - 1]) + where.end_col_offset
            changed = (data[:start] + new.encode() + data[end:]).decode()
            try:
                ast.parse(changed)
            except SyntaxError:
                continue
            what = f"{kind}: {ast.unparse(node)[:90]}  →  {new[:90]}".replace("\n", " ")
            found.append(Mutant(file, where.lineno, what, changed, function))
    return found


def drawn(count: int, seed: int) -> list[Mutant]:
    """So many errors, equally many from each room, each kind of error equally likely."""
    rng, chosen = random.Random(seed), []
    rooms = {room: [m for f in sorted((ROOT / "hf_kedit" / room).rglob("*.py")) for m in mutants(f)] for room in ROOMS}
    while len(chosen) < count:
        room = rooms[ROOMS[len(chosen) % len(ROOMS)]]
        kind = rng.choice(sorted({m.what.split(":")[0] for m in room}))
        chosen.append(rng.choice([m for m in room if m.what.startswith(kind)]))
        room.remove(chosen[-1])
    return chosen


def tests_beside(mutant: Mutant) -> list[Path]:
    """Test files of the room, those first that say most about the place."""
    room = mutant.file.relative_to(ROOT / "hf_kedit").parts[0]
    defined = set(re.findall(r"^(?:class|def) (\w+)", mutant.source, re.M))
    around = set(mutant.function.split("."))
    stems, rooms = {mutant.file.stem}, {room}
    imports = re.compile(
        rf"^from \.[\w.]* import [^\n]*\b{mutant.file.stem}\b|^from \.[\w.]*\b{mutant.file.stem} import", re.M
    )
    for other in (ROOT / "hf_kedit").rglob("*.py"):
        if imports.search(other.read_text(encoding="utf-8")):
            stems.add(other.stem)
            rooms.add(other.relative_to(ROOT / "hf_kedit").parts[0])
    scores = {}
    for test in sorted((ROOT / "tests").rglob("test_*.py")):
        text, place = test.read_text(encoding="utf-8"), test.relative_to(ROOT / "tests").parts[0]
        words = set(re.findall(r"\w+", text))
        name = test.stem.removeprefix("test_").removeprefix("golden_")
        score = 40 * (name == mutant.file.stem) + 20 * len(around & words) + 10 * len(defined & words)
        score += 15 * (name in stems) + 3 * len(stems & words)
        if score and place in rooms:
            scores[test] = score + 30 * (place == room)
    return sorted(scores, key=lambda test: -scores[test])


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the one module with the error in it."""

    def __init__(self, mutant: Mutant):
        self.mutant = mutant
        self.name = ".".join(mutant.file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")

    def find_spec(self, name: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name != self.name:
            return None
        file, source = str(self.mutant.file), self.mutant.source

        class Loader(importlib.machinery.SourceFileLoader):
            def get_code(self, fullname: str) -> Any:
                return compile(source, file, "exec", dont_inherit=True)

        return importlib.util.spec_from_file_location(name, file, loader=Loader(name, file))


def warm_up() -> Path:
    """Import once what every run would import for itself: all but the package; returns the Hub's cache.

    The libraries of the Hub read its address when they are imported, so all runs get the Hub on the same port.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = tempfile.mkdtemp(prefix="kedit-mutation-home-")
    os.environ |= {"KEDIT_TEST_HUB_PORT": str(port), "HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": home}
    os.environ |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    import datasets  # noqa: F401
    import hypothesis  # noqa: F401
    import peft  # noqa: F401
    import pytest  # noqa: F401
    from transformers import GPT2LMHeadModel, LlamaForCausalLM, Trainer  # noqa: F401

    assert not any(name.startswith("hf_kedit") for name in sys.modules)
    return Path(home)


def run(mutant: Mutant | None, tests: list[Path], limit: int, log: Path, home: Path) -> str:
    """``killed``, ``survived``, ``time`` (of the processor used up), or ``no tests``."""
    if not tests:
        return "no tests"
    shutil.rmtree(home, ignore_errors=True)
    child = os.fork()
    if not child:
        os.setsid()
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        import pytest

        used = int(sum(os.times()[:2]))
        resource.setrlimit(resource.RLIMIT_CPU, (used + limit, used + limit + 5))
        if mutant is not None:
            sys.meta_path.insert(0, _Finder(mutant))
        options = ["-q", "-p", "no:cacheprovider", "--no-header", "--tb=line", "--show-capture=no"]
        os._exit(int(pytest.main([*options, *(["-x"] if mutant else []), *map(str, tests)])))
    end = time.monotonic() + 10 * limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return "time" if -code in (signal.SIGXCPU, signal.SIGKILL) else "survived" if code in (0, 5) else "killed"
        time.sleep(0.2)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "time"


def _failed(log: Path) -> list[str]:
    """The tests that failed, to see that it was the error's fault; else how it ended."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return failed or lines[-2:] or ["nothing"]


def main() -> None:
    """Draw, run, and write a line for each error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--limit", type=int, default=60, help="seconds of the processor for the tests of one error")
    parser.add_argument("--minutes", type=float, default=120, help="for the whole run")
    parser.add_argument("--files", type=int, default=4, help="test files for one error")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of errors to run again")
    parser.add_argument("--tests", type=Path, nargs="*", help="test files to use instead of those found")
    parser.add_argument("--list", action="store_true", help="show the errors and their tests, run nothing")
    parser.add_argument("--report", type=Path, default=Path("mutation.txt"))
    arguments = parser.parse_args()
    tests: list[Path] | None = arguments.tests and [path.resolve() for path in arguments.tests]
    report_file: Path = arguments.report.resolve()
    os.chdir(ROOT)
    before = report_file.read_text(encoding="utf-8") if report_file.exists() else ""
    done = {int(line[:3]) for line in before.splitlines() if re.match(r"[ \d]{3} \w", line)}
    log = Path(tempfile.mkdtemp()) / "log.txt"
    home = Path() if arguments.list else warm_up()
    started, counts, killers = time.monotonic(), dict[str, int](), dict[str, int]()
    with report_file.open("a", encoding="utf-8") as report:
        for number, mutant in enumerate(drawn(arguments.count, arguments.seed)):
            if number not in arguments.only if arguments.only is not None else number in done:
                continue
            if time.monotonic() - started > 60 * arguments.minutes:
                break
            chosen, begun = tests or tests_beside(mutant)[: arguments.files], time.monotonic()
            outcome = "listed" if arguments.list else run(mutant, chosen, arguments.limit, log, home)
            counts[outcome] = counts.get(outcome, 0) + 1
            about = " ".join(os.path.relpath(test, ROOT / "tests") for test in chosen)
            if outcome == "killed":
                about = _failed(log)[0][:200]
                if (found := re.match(r"\w+ (\S+::\w+)", about)) is not None:
                    killers[found[1]] = number
            report.write(f"{number:3} {outcome:9} {time.monotonic() - begun:5.0f} s  {mutant}\n      [{about}]\n")
            report.flush()
        report.write(", ".join(f"{name} {count}" for name, count in sorted(counts.items())) + "\n")
        # A test that fails without the error, too, says nothing.
        if killers and run(None, [Path(name) for name in killers], 30 * len(killers), log, home) != "survived":
            for line in _failed(log):
                report.write(f"without any error: {line}\n")


if __name__ == "__main__":
    main()

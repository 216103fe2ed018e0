"""The code on the pages that a newcomer reads first is run, and must print what its comments say."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_kedit.cli import app
from hf_kedit.cli.methods import method_rows

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("docs/quickstart.md", "README.md")
GUIDES = ("docs/concepts.md", "docs/lora.md", "docs/migrate.md", "docs/serve.md", "docs/weights.md")


def _blocks(text: str, language: str) -> list[tuple[int, str]]:
    """Fenced code blocks of one language: (line of their first line, content)."""
    found = []
    for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        found.append((text.count("\n", 0, match.start()) + 2, match.group(1)))
    return found


def _expected(code: str) -> list[str]:
    """The comments behind ``print(…)``: one per printed line."""
    return re.findall(r"^\s*print\(.*\)  # (.*)$", code, flags=re.MULTILINE)


def _agree(printed: str, expected: str) -> bool:
    """Equal, where ``…`` stands for any text."""
    pattern = ".*".join(re.escape(part) for part in expected.split("…"))
    return re.fullmatch(pattern, printed) is not None


def _commands(text: str) -> Iterator[tuple[int, list[str]]]:
    """``$ kedit`` lines of the console blocks: (line number, words after ``kedit``)."""
    for first, block in _blocks(text, "console"):
        for offset, line in enumerate(block.splitlines()):
            if line.startswith("$ kedit "):
                yield first + offset, shlex.split(line, comments=True)[2:]


@pytest.mark.parametrize("page", [*PAGES, *GUIDES])
def test_python_blocks(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of a page, in order, in one namespace."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = _blocks(text, "python")
    assert blocks
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "page"}
    checked = 0
    for line, code in blocks:
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            # The line breaks in front make tracebacks point into the page.
            exec(compile("\n" * (line - 1) + code, str(ROOT / page), "exec"), namespace)
        expected = _expected(code)
        printed = output.getvalue().splitlines()
        assert len(printed) == len(expected), f"{page}, line {line}: printed {printed}, the comments say {expected}"
        for shown, wanted in zip(printed, expected, strict=True):
            assert _agree(shown, wanted), f"{page}, line {line}: printed {shown!r}, the comment says {wanted!r}"
            checked += 1
    assert checked, f"{page}: no block says what it prints"


@pytest.mark.parametrize("page", [*PAGES, "docs/serve.md"])
def test_command_lines(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ``$ kedit …`` lines of a page, in order, in one folder."""
    commands = list(_commands((ROOT / page).read_text(encoding="utf-8")))
    assert commands
    monkeypatch.chdir(tmp_path)
    for line, words in commands:
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, f"{page}, line {line}: kedit {shlex.join(words)}\n{result.stderr}"
        assert result.stdout.strip(), f"{page}, line {line}: kedit {shlex.join(words)} printed nothing"


def _method_table() -> str:
    lines = [
        "| `--method` | what it does | facts at once | needs the subject | encoder-decoder | paper |",
        "| --- " * 6 + "|",
    ]
    for row in method_rows():
        cells = [f"`{row['edit_type']}`", row["summary"], "many" if row["batch"] else "one"]
        cells += ["yes" if row[key] else "no" for key in ("needs_subject", "encoder_decoder")]
        lines.append(" | ".join(["", *cells, row["paper"], ""]).strip())
    return "\n".join(lines) + "\n"


def test_readme_lists_the_methods_that_exist() -> None:
    """``KEDIT_UPDATE_README=1`` rewrites the table instead of comparing it."""
    path = ROOT / "README.md"
    head, begin, rest = path.read_text(encoding="utf-8").partition("<!-- methods: begin")
    remark, _, rest = rest.partition("\n")
    table, end, tail = rest.partition("<!-- methods: end -->")
    assert begin and end
    if os.environ.get("KEDIT_UPDATE_README") == "1":
        path.write_text(f"{head}{begin}{remark}\n{_method_table()}{end}{tail}", encoding="utf-8")
    else:
        assert table == _method_table(), "run KEDIT_UPDATE_README=1 pytest tests/test_quickstart.py -k readme_lists"


@pytest.mark.parametrize("page", [*PAGES, *GUIDES, "docs/cli.md", "docs/ecosystem.md"])
def test_links_between_pages_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), f"{page}: {target}"


def test_the_checks_can_fail() -> None:
    assert _expected("x = 1\nprint(x)  # 1\n    print(f(x))  # a … b\nprint(2)\n") == ["1", "a … b"]
    assert _agree("a long b", "a … b")
    assert not _agree("a long c", "a … b")
    assert not _agree("plumbers", "plumber")
    assert _blocks("x\n```python\na\n```\n```console\n$ kedit x\n```\n", "python") == [(3, "a\n")]
    assert list(_commands("```console\n$ kedit edit -p 'a b'\nout\n$ ls\n```\n")) == [(2, ["edit", "-p", "a b"])]

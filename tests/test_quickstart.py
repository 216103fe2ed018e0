"""The code on the pages that a newcomer reads first is run, and must print what its comments say."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_kedit.cli import app
from hf_kedit.cli.methods import method_rows
from tests.marked import marked, rewrite_marked

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("docs/quickstart.md", "README.md")
GUIDES = ("docs/concepts.md", "docs/lora.md", "docs/migrate.md", "docs/serve.md", "docs/weights.md")
ENDLESS = {"ui", "serve", "chat"}


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


def _commands(text: str) -> Iterator[tuple[int, list[str], list[str]]]:
    """``$ kedit`` lines of the console blocks: (line number, words after ``kedit``, lines shown below them)."""
    for first, block in _blocks(text, "console"):
        lines = block.splitlines()
        for offset, line in enumerate(lines):
            if line.startswith("$ kedit "):
                shown = itertools.takewhile(lambda later: not later.startswith("$ "), lines[offset + 1 :])
                yield first + offset, shlex.split(line, comments=True)[2:], [s for s in shown if s.strip()]


def _run_block(page: str, line: int, code: str, namespace: dict[str, object]) -> int:
    """Run a block of Python; compare what it prints with its comments. Return how many lines that were."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        # The line breaks in front make tracebacks point into the page.
        exec(compile("\n" * (line - 1) + code, str(ROOT / page), "exec"), namespace)
    expected = _expected(code)
    printed = output.getvalue().splitlines()
    assert len(printed) == len(expected), f"{page}, line {line}: printed {printed}, the comments say {expected}"
    for shown, wanted in zip(printed, expected, strict=True):
        assert _agree(shown, wanted), f"{page}, line {line}: printed {shown!r}, the comment says {wanted!r}"
    return len(expected)


def _alike(text: str) -> str:
    """A printed line without what differs between machines and terminals: numbers, and how wide columns are."""
    return re.sub(r"\s+", " ", re.sub(r"\d+(\.\d+)?", "#", text)).strip()


def _run_command(page: str, line: int, words: list[str], shown: list[str]) -> None:
    """Run a command, which must print what the page shows below it, in that order; other lines may stand between.

    A command that goes on until somebody ends it must exist, with the options that the page gives it.
    """
    if words[0] in ENDLESS and "--export-space" not in words:
        described = CliRunner().invoke(app, [words[0], "--help"]).stdout
        assert all(word.partition("=")[0] in described for word in words if word.startswith("--"))
        return
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, f"{page}, line {line}: kedit {shlex.join(words)}\n{result.stderr}"
    assert result.stdout.strip(), f"{page}, line {line}: kedit {shlex.join(words)} printed nothing"
    printed = iter(result.stdout.splitlines())
    for wanted in shown:
        assert any(_agree(_alike(p), _alike(wanted)) for p in printed), (
            f"{page}: not printed: {wanted}\n{result.stdout}"
        )


@pytest.mark.parametrize("page", [*PAGES, *GUIDES])
def test_python_blocks(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of a page, in order, in one namespace."""
    blocks = _blocks((ROOT / page).read_text(encoding="utf-8"), "python")
    assert blocks
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "page"}
    assert sum(_run_block(page, *block, namespace) for block in blocks), f"{page}: no block says what it prints"


@pytest.mark.parametrize("page", [*PAGES, "docs/serve.md"])
def test_command_lines(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ``$ kedit …`` lines of a page, in order, in one folder."""
    commands = list(_commands((ROOT / page).read_text(encoding="utf-8")))
    assert commands
    monkeypatch.chdir(tmp_path)
    for command in commands:
        _run_command(page, *command)


PROBLEMS = (ROOT / "docs" / "problems.md").read_text(encoding="utf-8").split("\n## ")


@pytest.mark.parametrize("problem", PROBLEMS[1:], ids=lambda problem: problem.partition("\n")[0])
def test_problems_are_solved_as_the_page_says(problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and commands of a problem in their order, for some read what others have written."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "page"}
    ((line, helpers),) = _blocks(PROBLEMS[0], "python")
    _run_block("docs/problems.md", line, helpers, namespace)
    steps = [*_blocks(problem, "python"), *_commands(problem)]
    said = 0
    for line, *step in sorted(steps, key=lambda step: step[0]):
        if isinstance(step[0], str):
            assert len(step[0].strip().splitlines()) <= 10, "a solution is longer than ten lines"
            said += _run_block("docs/problems.md", line, step[0], namespace)
        else:
            _run_command("docs/problems.md", line, *step)
    assert said and "**Check**" in problem


WORDS = {"many": "多条", "one": "一条", "yes": "是", "no": "否"}


def _method_table(summaries: dict[str, str] | None = None) -> str:
    """The table of README.md; that of README.zh.md with its own summaries, which a person writes."""
    lines = ["| `--method` | what it does | facts at once | needs the subject | encoder-decoder | paper |"]
    if summaries is not None:
        lines = ["| `--method` | 做什么 | 一次几条事实 | 需要主体 | 编码器-解码器 | 论文 |"]
    lines.append("| --- " * 6 + "|")
    for row in method_rows():
        cells = ["many" if row["batch"] else "one"]
        cells += ["yes" if row[key] else "no" for key in ("needs_subject", "encoder_decoder")]
        summary = row["summary"]
        if summaries is not None:
            cells = [WORDS[cell] for cell in cells]
            summary = summaries.get(row["edit_type"], "（待写）")
        lines.append(" | ".join(["", f"`{row['edit_type']}`", summary, *cells, row["paper"], ""]).strip())
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_readme_lists_the_methods_that_exist(name: str) -> None:
    """``KEDIT_UPDATE_README=1`` rewrites the table instead of comparing it."""
    path = ROOT / name
    table = marked(path, "methods")
    written = dict(re.findall(r"^\| `([\w-]+)` \| (.*?) \|", table, flags=re.MULTILINE))
    wanted = _method_table(written if name == "README.zh.md" else None)
    if os.environ.get("KEDIT_UPDATE_README") == "1":
        rewrite_marked(path, "methods", wanted)
    else:
        assert table == wanted, "run KEDIT_UPDATE_README=1 pytest tests/test_quickstart.py -k readme_lists"
        assert "（待写）" not in table, "say in Chinese what the new method does"


def test_the_chinese_readme_keeps_step() -> None:
    """The same code and commands under as many headings, comments apart; each names the other at its top."""
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md")]
    english, chinese = (
        [
            (block[1], re.sub(r" *# .*", "", block[2]))
            for block in re.finditer(r"^```(\w+)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
        ]
        for text in texts
    )
    assert len(english) > 4 and chinese == english, "README.zh.md has other code than README.md"
    headings = [len(re.findall(r"^## ", text, flags=re.MULTILINE)) for text in texts]
    assert headings[0] == headings[1], "README.zh.md has other sections than README.md"
    assert "(README.zh.md)" in texts[0][:100] and "(README.md)" in texts[1][:100]


@pytest.mark.parametrize(
    "page", [*PAGES, *GUIDES, "README.zh.md", "docs/problems.md", "docs/cli.md", "docs/ecosystem.md"]
)
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
    assert list(_commands("```console\n$ kedit edit -p 'a b'\nout\n$ ls\n```\n")) == [
        (2, ["edit", "-p", "a b"], ["out"])
    ]
    assert _agree(_alike("kept  3 of 4    x → y"), _alike("kept 12 of 40 …")) and _alike("kept 3") != _alike("lost 3")

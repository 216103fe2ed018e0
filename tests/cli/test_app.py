"""The application as a whole: help, options, exit codes, and which stream gets what."""

from __future__ import annotations

import ast
import json
import logging
import signal
import subprocess
import sys
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import typer
from rich.console import Console
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from typer.testing import CliRunner

from hf_kedit import EditableModel, FTMConfig, __version__, cli
from hf_kedit.cli.evaluate import SettingChoice, When
from hf_kedit.cli.models import parse_layers, parse_settings
from hf_kedit.cli.output import DebugOption, Format, FormatOption, command, console, error_console
from hf_kedit.cli.side_effects import show_side_effects
from hf_kedit.evaluation.measures.side_effects import Answered, EffectQuestion, SideEffectReport
from hf_kedit.evaluation.runs.plan import SAVED, SETTINGS, TIMES

from .conftest import Run

COMMANDS = tuple("demo edit eval inspect rollback merge push list-methods stats trace bench metrics serve".split())


def test_help_names_every_command(kedit: Run) -> None:
    result = kedit("--help")
    assert result.exit_code == 0
    for name in COMMANDS:
        assert name in result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_formats(kedit: Run, name: str) -> None:
    result = kedit(name, "--help")
    assert result.exit_code == 0
    assert "--format" in result.stdout


@pytest.mark.parametrize("module", ["hf_kedit.cli.app", "hf_kedit.cli.doctor", "hf_kedit.cli.edit"])
def test_an_interrupt_while_the_program_starts_is_one_line(module: str) -> None:
    """Ctrl-C comes while Python reads a file of the command line, and there is no command yet."""
    code = f"""
import signal, sys

class Pressed:
    def find_spec(self, name, *_):
        if name == {module!r}:
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Pressed())
from hf_kedit.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "kedit: interrupted\n")


def test_an_interrupt_before_and_in_a_command_is_one_line(
    kedit: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def pressed(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(sys.modules["hf_kedit.cli.app"], "app", pressed)  # the package's name is the Typer object
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 130
    assert capsys.readouterr().err == "kedit: interrupted\n"
    monkeypatch.setattr(EditableModel, "edit", pressed)
    one = ("-p", "{} is a", "--subject", "Ada", "-t", "cook", "-o", tmp_path / "out")
    result = kedit("edit", "-m", "kedit/world-gpt2", "-M", "rome", *one)
    assert (result.exit_code, result.stderr) == (130, "kedit: interrupted\n")
    assert not (tmp_path / "out").exists()


def test_options_offer_what_the_evaluation_knows() -> None:
    assert [s.value for s in SettingChoice] == [s for s in SETTINGS if s != SAVED]
    assert [w.value for w in When] == list(TIMES)


def test_no_option_is_declared_twice() -> None:
    """An option of several commands has one home, so that its names, limits and help cannot drift apart."""
    sources = [ast.parse(file.read_text(encoding="utf-8")) for file in Path(cli.__file__).parent.glob("*.py")]
    calls = [node for tree in sources for node in ast.walk(tree) if isinstance(node, ast.Call)]
    declared = Counter(map(ast.unparse, calls))
    twice = [text for text, count in declared.items() if count > 1 and text.startswith(("typer.Option", "typer.Arg"))]
    assert not twice and "typer.Option('--untie'" in str(declared)


@dataclass(frozen=True)
class _Block:
    depth: Annotated[int, typer.Option("--depth", "-D", help="How deep.")] = 3
    wide: bool = False


_SEEN: list[tuple[str, _Block, str]] = []


@command
def _takes_a_block(
    name: str,
    block: _Block = _Block(),
    end: str = "z",
    format: FormatOption = Format.human,
    debug: DebugOption = False,
) -> None:
    _SEEN.append((name, block, end))


def test_a_block_of_options_is_options_of_the_command() -> None:
    application = typer.Typer()
    application.command()(_takes_a_block)
    for words in (["a"], ["b", "-D", "5", "--wide", "--end", "y"]):
        assert CliRunner().invoke(application, words).exit_code == 0
    assert [("a", _Block(), "z"), ("b", _Block(5, True), "y")] == _SEEN
    shown = CliRunner().invoke(application, ["--help"]).stdout
    assert "How deep." in shown and shown.index("--depth") < shown.index("--wide") < shown.index("--end")
    assert CliRunner().invoke(application, ["c", "--depth", "deep"]).exit_code == 2


def test_version(kedit: Run) -> None:
    assert kedit("--version").stdout.strip() == f"kedit {__version__}"


def test_help_needs_neither_torch_nor_transformers() -> None:
    """What makes ``kedit --help`` quick."""
    code = "import sys, hf_kedit.cli; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "words",
    [
        ["no-such-command"],
        ["edit"],
        ["edit", "--model", "kedit/world-gpt2", "--method", "rome"],
        ["edit", "--model", "kedit/world-gpt2", "--method", "rome", "--prompt", "x"],
        ["edit", "-m", "kedit/world-gpt2", "-M", "rome", "-r", "a.jsonl", "-p", "x", "-t", "y"],
        ["edit", "-m", "kedit/world-gpt2", "-M", "rome", "-r", "a.jsonl", "--subject", "y"],
        ["edit", "-m", "kedit/world-gpt2", "-M", "rome", "-p", "x", "-t", "y", "--no-eval", "--min-success", "1"],
        ["edit", "-m", "kedit/world-gpt2", "-M", "rome", "-p", "x", "-t", "y", "--min-success", "2"],
        ["edit", "-m", "kedit/world-gpt2", "-M", "rome", "-p", "x", "-t", "y", "--set", "v_lr"],
        ["edit", "-m", "kedit/world-gpt2", "-M", "rome", "-p", "x", "-t", "y", "--set", "v_lr=[1"],
        ["edit", "-m", "kedit/world-gpt2", "-M", "rome", "-p", "x", "-t", "y", "--layers", "two"],
        ["eval", "-m", "kedit/world-gpt2", "-M", "rome"],
        ["eval", "-M", "rome", "-d", "world"],
        ["eval", "--collect"],
        ["eval", "-m", "kedit/world-gpt2", "-M", "rome", "-d", "world", "--at", "ten"],
        ["eval", "-m", "kedit/world-gpt2", "--no-edit", "--at", "1"],
        ["eval", "-m", "kedit/world-gpt2", "-M", "rome", "-d", "world", "--no-edit"],
        ["eval", "-m", "kedit/world-gpt2", "-M", "rome", "-d", "world", "--setting", "other"],
        ["rollback", "somewhere"],
        ["rollback", "somewhere", "an-id", "--all"],
        ["demo", "--prompt", "x"],
        ["demo", "--subject", "x"],
        ["list-methods", "--format", "xml"],
        ["list-methods", "--kind", "other"],
    ],
)
def test_wrong_usage_is_2(kedit: Run, words: list[str]) -> None:
    result = kedit(*words)
    assert result.exit_code == 2, result.stderr
    assert result.stdout == ""
    assert result.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["-M", "romee", "-p", "x", "-t", "y"], "Did you mean 'rome'?"),
        (["-M", "rome", "-r", "no_such.jsonl"], "no_such.jsonl"),
        (["-M", "rome", "-c", "no_such.yaml", "-p", "x", "-t", "y"], "no_such.yaml"),
        (["-M", "rome", "-p", "x", "-t", " "], "target_new"),
        (["-M", "rome", "-p", "A {} is", "-t", "y"], "subject"),
        (["-M", "rome", "-p", "A dog is", "--subject", "cat", "-t", "y"], "'cat'"),
        (["-M", "rome", "-p", "A dog is", "--subject", "dog", "-t", "y", "-s", "v_lrr=1"], "Did you mean 'v_lr'?"),
        (["-M", "rome", "-p", "A dog is", "--subject", "dog", "-t", "y", "-s", "v_lr=fast"], "v_lr"),
        (["-M", "rome", "-p", "A dog is", "--subject", "dog", "-t", "y", "-l", "9"], "no layer 9"),
        (["-M", "rome", "-p", "A dog is", "--subject", "dog", "-t", "y", "--protocol", "guess"], "guess"),
    ],
)
def test_a_failure_is_1_and_one_line(kedit: Run, words: list[str], told: str) -> None:
    result = kedit("edit", "--model", "kedit/world-gpt2", *words)
    assert result.exit_code == 1, result.stderr
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("kedit: error: ")]
    assert len(lines) == 1
    assert told in lines[0]
    assert "Traceback" not in result.stderr


def test_the_row_of_a_bad_request_is_named(kedit: Run, tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([{"prompt": "a", "target_new": "b"}, {"prompt": "a"}]), encoding="utf-8")
    result = kedit("edit", "-m", "kedit/world-gpt2", "-M", "ft-m", "-r", path)
    assert result.exit_code == 1
    assert "row 1" in result.stderr
    assert "target_new" in result.stderr


@pytest.mark.parametrize("name", ["kedit/world-gpt3", "no/such-model", "/no/such/folder"])
def test_an_unknown_model(kedit: Run, name: str) -> None:
    result = kedit("edit", "-m", name, "-M", "rome", "-p", "A dog is", "--subject", "dog", "-t", "y")
    assert result.exit_code == 1
    assert name in result.stderr
    assert "Traceback" not in result.stderr


def test_a_folder_without_a_model(kedit: Run, tmp_path: Path) -> None:
    for words in (["inspect", tmp_path], ["edit", "-m", tmp_path, "-M", "ft-m", "-p", "x", "-t", "y"]):
        result = kedit(*words)
        assert result.exit_code == 1
        assert "neither" in result.stderr


def test_debug_shows_the_error_itself(kedit: Run) -> None:
    result = kedit("edit", "-m", "kedit/world-gpt2", "-M", "romee", "-p", "x", "-t", "y", "--debug")
    assert type(result.exception).__name__ == "UnknownMethodError"


def test_standard_output_is_pure(requests_file: Path) -> None:
    """In a process of its own, with warnings on: JSON on one stream, everything else on the other."""
    command = [sys.executable, "-m", "hf_kedit.cli", "edit", "-m", "kedit/world-gpt2", "-M", "ft-m", "-f", "json"]
    done = subprocess.run(
        [*command, "-r", str(requests_file)], capture_output=True, text=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["edit_ids"] == ["first", "second"]


def test_layers() -> None:
    assert parse_layers(None) is None
    assert parse_layers("5") == [5]
    assert parse_layers("4-6") == [4, 5, 6]
    assert parse_layers("[3, 5,-1]") == [3, 5, -1]
    assert parse_layers("1,4-5") == [1, 4, 5]


def test_settings_are_yaml() -> None:
    given = ["a=1", "b=5e-1", "c=[1, 2]", "d=null", "e=x=y", "f=true"]
    # YAML 1.1 takes 5e-1 for a text; the config's own coercion makes it a number.
    assert parse_settings(given) == {"a": 1, "b": "5e-1", "c": [1, 2], "d": None, "e": "x=y", "f": True}
    assert parse_settings(None) == {}


HOSTILE = "\x1b[2J\x1b]0;title\x07 \u202eevil\u202c \x9b31m \x7f\u2066 [bold]x[/bold] \U000e0041"


@pytest.mark.parametrize("output_format", ["human", "json", "quiet"])
def test_texts_of_others_do_not_move_the_cursor(kedit: Run, output_format: str, tmp_path: Path) -> None:
    model = EditableModel.from_pretrained("kedit/world-gpt2", FTMConfig(layers=[1], num_steps=1))
    model.base_model_id = f"org/{HOSTILE}"
    asked = {"id": f"a{HOSTILE}", "prompt": f"The sky {HOSTILE} is", "target_new": f"x{HOSTILE}"}
    model.edit([asked | {"ground_truth": [HOSTILE]}, {"prompt": "b", "target_new": "c"}], show_progress=False)
    model.save_pretrained(tmp_path / "edits")
    for words in (
        ["inspect", tmp_path / "edits"],
        ["rollback", tmp_path / "edits", "--last", "1", "-o", tmp_path / "out", "--base", "kedit/world-gpt2"],
        ["rollback", tmp_path / "edits", asked["id"], "-o", tmp_path / "out", "--base", "kedit/world-gpt2"],
        ["inspect", tmp_path / HOSTILE.replace("/", "")],
    ):
        result = kedit(*words, "--format", output_format)
        shown = result.stdout + result.stderr
        assert not {c for c in shown if unicodedata.category(c) in ("Cc", "Cf", "Cs")} - {"\n"}, words
        if output_format == "json" and result.exit_code == 0 and words[0] == "inspect":
            (first, _) = json.loads(result.stdout)["edits"]
            assert first["prompt"] == asked["prompt"] and first["edit_id"] == asked["id"]
        if output_format == "human" and words[:2] == ["inspect", tmp_path / "edits"]:
            assert "\\x1b[2J" in shown and "\\u202eevil" in shown.replace("\n", "")


def test_no_kind_of_output_moves_the_cursor(capsys: pytest.CaptureFixture[str], kedit: Run) -> None:
    """Strings, texts with a style, tables, and logs."""
    table = Table("a", title=HOSTILE)
    table.add_row(Text(HOSTILE, "red"))
    for what in (
        HOSTILE,
        Text(HOSTILE),
        Text.assemble((HOSTILE, "bold")),
        Panel(Text(HOSTILE)),
        Padding(HOSTILE),
        table,
    ):
        for show in (console, error_console):
            show().print(what, soft_wrap=True)
            said = "".join(capsys.readouterr())
            assert "\\x1b[2J" in said and "[bold]x[/bold]" in said
            assert not {c for c in said if unicodedata.category(c) in ("Cc", "Cf")} - {"\n"}, what
    kedit("list-methods", "-f", "quiet")  # a command sets the loggers up
    (handler,) = logging.getLogger("hf_kedit").handlers
    said = handler.format(logging.LogRecord("hf_kedit.x", logging.WARNING, "", 1, "about %s", (HOSTILE,), None))
    assert said.startswith("[hf_kedit.x] WARNING: about \\x1b[2J")
    assert not {c for c in said if unicodedata.category(c) in ("Cc", "Cf")}


def test_what_an_edit_broke_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    question = EffectQuestion("neighbour", "[bold]The sky[/bold] is")
    report = SideEffectReport((Answered(question, "[red]", "[/red]"),), ("x",))
    show_side_effects(Console(width=200, markup=False), report)
    assert "'[red]' → '[/red]' ('[bold]The sky[/bold] is')" in capsys.readouterr().out

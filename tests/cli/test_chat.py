"""``kedit chat``: what is typed into it, through a pipe and at once, and what comes back."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hf_kedit import EditableModel
from hf_kedit.cli import app
from hf_kedit.cli.chat import Talk
from hf_kedit.cli.output import Format
from hf_kedit.errors import RequestError
from hf_kedit.text.chat import chat_frame
from hf_kedit.tokens import prompt_ids
from tests.chat_templates import CHATML

PROMPT = "By profession Tarosk Boayond is a"
EDIT = "/edit By profession {Tarosk Boayond} is a => plumber"
Type = Callable[..., tuple[list[str], list[str]]]


@pytest.fixture
def typed() -> Type:
    """Type lines into ``kedit chat``; what it writes to standard output and standard error, line by line."""

    def run(*lines: str, options: tuple[Any, ...] = ("kedit/world-llama", "-M", "rome", "--max-tokens", "3")) -> Any:
        words = ["chat", *map(str, options)]
        result = CliRunner().invoke(app, words, input="".join(line + "\n" for line in lines))
        assert result.exit_code == 0, result.output
        return result.stdout.splitlines(), result.stderr.splitlines()

    return run


def expected(model: EditableModel, prompt: str, tokens: int) -> str:
    assert model.tokenizer is not None
    ids = torch.tensor([prompt_ids(model.tokenizer, prompt)])
    out = model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=2)[0, ids.shape[1] :]
    return str(model.tokenizer.decode(out, skip_special_tokens=True))


def test_edit_before_undo(typed: Type, world_llama: EditableModel) -> None:
    old = expected(world_llama, PROMPT, 3)
    world_llama.edit(prompt="By profession {} is a", subject="Tarosk Boayond", target_new="plumber")
    new = expected(world_llama, PROMPT, 3)
    out, err = typed(PROMPT, EDIT, PROMPT, "/before", PROMPT, "/edits", "/undo", PROMPT, "/quit", "never read")
    assert not err
    answers = [out[i] for i in (0, 2, 3, 4, 7)]
    assert answers == [f"{old} …", f"{new} …", f"{old} …", f"{new} …", f"{old} …"]
    assert out[1].startswith("edited (rome") and "Tarosk Boayond is a → plumber" in out[5]
    assert out[6].startswith("undone: ") and len(out) == 8


def test_what_is_saved_is_loaded(typed: Type, tmp_path: Path) -> None:
    out, _ = typed(EDIT, f"/save {tmp_path / 'mine'}")
    assert out[1].startswith(f"saved to {tmp_path / 'mine'}")
    out, _ = typed(PROMPT, "/before", "/edits", options=(tmp_path / "mine", "--max-tokens", "2"))
    assert out[0].startswith(" plumber") and out[1].startswith(" sculptor") and out[2].endswith("(rome)")


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("auto", "answers it: what is asked ('by profession it is a') is 1.00 near to it"),
        ("rome", "1 edit in the weights, which act on every question"),
        ("prompt", "is put in front of it: New Fact: By profession Tarosk Boayond is a plumber"),
        ("grace", "/before shows whether"),
    ],
)
def test_explain(typed: Type, method: str, says: str) -> None:
    out, _ = typed(EDIT, PROMPT, "/explain", options=("kedit/world-llama", "--max-tokens", "1", "--method", method))
    assert says in out[-1]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/bfore", "there is no /bfore. Did you mean 'before'?"),
        ("/before", "nothing was asked yet"),
        ("/explain", "nothing was asked yet"),
        ("/undo", "nothing to undo"),
        ("/edit a is b", "write /edit PROMPT => ANSWER"),
        ("/edit {A} and {B} are => c", "braces mark one subject"),
        ("/edit Otto is a => cook", "put it in braces"),
        ("/save", "write /save FOLDER"),
        ("/undo\tnone", "nothing to undo"),
        ("/save a\0b", "cannot be a path"),
        ("word " * 200, "context, 128, is too small"),
    ],
)
def test_what_is_wrong_is_said_and_it_goes_on(typed: Type, line: str, says: str) -> None:
    out, err = typed(line, "/edits")
    assert says in err[0] and len(err) == 1 and out == ["none"]


def test_a_place_that_takes_no_edits_costs_none(typed: Type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a full disk nor a home that does not exist ends the conversation."""
    monkeypatch.chdir(tmp_path)
    plain = EditableModel.save_pretrained

    def full(self: EditableModel, folder: Path) -> None:
        if folder.name == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(self, folder)

    monkeypatch.setattr(EditableModel, "save_pretrained", full)
    out, err = typed(EDIT, "/save full", "/save ~nobody-of-this-name/x y")
    assert len(err) == 1 and "No space left" in err[0]
    assert out[1].endswith("(kedit chat '~nobody-of-this-name/x y')") and (tmp_path / "~nobody-of-this-name").is_dir()


def test_ctrl_c_ends_the_answer_only(typed: Type, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal comes at the fourth pass of the model, in its own thread; the next line is answered in full."""
    passes = []
    plain = EditableModel.generate

    def generate(self: EditableModel, *args: Any, **kwargs: Any) -> Any:
        def count(*_: Any) -> None:
            passes.append(1)
            if len(passes) == 4:
                os.kill(os.getpid(), signal.SIGINT)
                for _ in range(400):  # it comes to the main thread, which the model must not overtake
                    if kwargs["stopping_criteria"][0]._ended():
                        return
                    pause.wait(0.01)

        handle = self.base_model.register_forward_pre_hook(count)
        try:
            return plain(self, *args, **kwargs)
        finally:
            handle.remove()

    pause = threading.Event()
    monkeypatch.setattr(EditableModel, "generate", generate)
    options = ("kedit/world-llama", "-M", "rome", "--max-tokens", "20")
    out, err = typed(PROMPT, PROMPT.replace("Tarosk", "Gukir"), "/edits", options=options)
    assert len(passes) == 4 + 20 and not err
    assert out[0].endswith(" …") and out[-1] == "none"


def test_a_chat_has_turns(capsys: pytest.CaptureFixture[str], world_llama: EditableModel) -> None:
    tokenizer = world_llama.tokenizer
    assert tokenizer is not None
    tokenizer.chat_template = CHATML.replace("I am a test.", "T")
    talk = Talk(world_llama, True, None, 4, None, Format.human)
    talk.take("A")
    first = capsys.readouterr().out.removesuffix(" …\n")
    turns = [{"role": "user", "content": "A"}, {"role": "assistant", "content": first}]
    assert talk.messages == turns
    talk.take("B")
    second = capsys.readouterr().out.removesuffix(" …\n")
    written = chat_frame(tokenizer, [*turns, {"role": "user", "content": "B"}]).text("B")
    fits = len(prompt_ids(tokenizer, written)) + 4 <= 128
    assert fits and second == expected(world_llama, written, 4)
    talk.take("/before")
    assert capsys.readouterr().out.removesuffix(" …\n") == second and len(talk.messages) == 4
    for _ in range(6):  # what does not fit is forgotten, oldest first
        talk.take("C")
    assert 2 <= len(talk.messages) < 16
    kept = list(talk.messages)
    with pytest.raises(RequestError, match="is too small"):
        talk.take("word " * 200)
    assert talk.messages == kept and talk.last == "C"  # what could not be asked makes nothing forgotten
    talk.take("/new")
    assert not talk.messages


def test_hostile_text_is_shown_as_text(
    capsys: pytest.CaptureFixture[str], world_llama: EditableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = world_llama.tokenizer
    assert tokenizer is not None
    plain = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda *a, **k: plain(*a, **k).replace("is", "\x1b[2J\u202eis"))
    talk = Talk(world_llama, False, None, 12, None, Format.human)
    talk.take(PROMPT)
    talk.take("/edit By profession {Tarosk Boayond} is a => \x1b]0;title\x07")
    talk.take("/edits")
    out = capsys.readouterr().out
    assert "\\x1b[2J\\u202e" in out and "\\x1b]0;title\\x07" in out
    assert not {"\x1b", "\x07", "\u202e"} & set(out)


@pytest.mark.parametrize("output_format", ["json", "quiet"])
def test_data_alone(typed: Type, output_format: str) -> None:
    options = ("kedit/world-llama", "-M", "rome", "--max-tokens", "2", "--format", output_format)
    out, err = typed(EDIT, PROMPT, options=options)
    assert len(out) == 1 and err[0].startswith("edited")
    said = json.loads(out[0]) if output_format == "json" else {"answer": out[0]}
    assert said["answer"].startswith(" plumber")


@pytest.mark.slow
def test_through_a_pipe() -> None:
    """A process of its own, bytes that are no text among what it reads, and not a word of others."""
    lines = f"{EDIT}\n{PROMPT}\n".encode() + b"\xff\xfe is\n/quit\n"
    command = [sys.executable, "-m", "hf_kedit.cli", "chat", "-M", "rome", "--max-tokens", "2"]
    done = subprocess.run(command, input=lines, capture_output=True, check=False, timeout=300)
    assert (done.returncode, done.stderr) == (0, b"")
    assert [line[:8] for line in done.stdout.decode().splitlines()[:2]] == ["edited (", " plumber"]

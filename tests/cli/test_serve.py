"""``kedit serve`` as a process of its own: it starts, answers, takes edits, warns, and ends at Ctrl-C."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.cli.conftest import FACT, Run

PROMPT = "By profession Tarosk Boayond is a"
PATIENCE = 120


@pytest.fixture
def start() -> Iterator[Callable[..., Any]]:
    """Start the command and wait until it says where it serves: its process, what it has said, the URL."""
    running: list[subprocess.Popen[str]] = []

    def begin(*words: Any, **environment: str) -> tuple[subprocess.Popen[str], str, str]:
        line = [sys.executable, "-m", "hf_kedit.cli", "serve", *map(str, words), "--port", "0"]
        process = subprocess.Popen(
            line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
        )
        running.append(process)
        assert process.stderr is not None
        said = ""
        for text in process.stderr:
            said += text
            if found := re.search(r"at (http://\S+)/v1 ", text):
                return process, said, found[1]
        raise AssertionError(f"it has ended: {said}")

    yield begin
    for process in running:
        process.kill()
        process.communicate()


def end(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Press Ctrl-C; what it has said since."""
    process.send_signal(signal.SIGINT)
    out, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said
    return out, said


def test_a_server_from_beginning_to_end(start: Callable[..., Any], saved: Path) -> None:
    process, said, url = start(
        *(saved, "--pack", f"jobs={saved}", "--allow-edits", "--token-env", "T"), T="secret-token"
    )
    assert "secret-token" not in said and said.count("\n") == 1 and 'serving "edits", "base", "base+jobs"' in said
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)

    def ask(model: str) -> str:
        return client.completions.create(model=model, prompt=PROMPT, max_tokens=4).choices[0].text

    assert ask("edits").startswith(" plumber") and ask("base+jobs").startswith(" plumber")
    assert ask("base").startswith(" sculptor")
    headers = {"Authorization": "Bearer secret-token"}
    changed = {**FACT, "id": "third", "target_new": "baker"}
    assert httpx.post(f"{url}/v1/edits", json=changed, headers=headers, timeout=60).status_code == 201
    assert ask("edits").startswith(" baker") and ask("base").startswith(" sculptor")
    assert httpx.delete(f"{url}/v1/edits/third", headers=headers).status_code == 200
    assert ask("edits").startswith(" plumber")
    assert end(process) == ("", "kedit: the server has ended\n")


def test_ctrl_c_in_the_middle_of_an_answer(start: Callable[..., Any], saved: Path) -> None:
    process, _, url = start(saved)
    with httpx.stream(
        "POST", f"{url}/v1/completions", json={"model": "edits", "prompt": PROMPT, "max_tokens": 110, "stream": True}
    ) as stream:
        lines = stream.iter_lines()
        assert next(lines).startswith("data: ")
        out, said = end(process)
        assert (out, said) == ("", "kedit: the server has ended\n")


def test_a_server_for_other_machines_warns(start: Callable[..., Any]) -> None:
    process, said, _ = start("kedit/world-gpt2", "--host", "0.0.0.0")
    assert said.startswith("kedit: warning: listening at 0.0.0.0, not only to this machine. Everybody who reaches")
    assert '"kedit/world-gpt2", "base"' in said
    end(process)


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--allow-edits"], 2, "edits need a token"),
        (["--token-env", "T"], 2, "nothing to edit"),
        (["--pack", "rome"], 2, "NAME=FOLDER"),
        (["--api-key-env", "KEDIT_NO_SUCH_VARIABLE"], 1, "KEDIT_NO_SUCH_VARIABLE holds no key"),
        (["--api-key-env", "KEDIT_TWO_WORDS"], 1, "KEDIT_TWO_WORDS holds no key"),
        (["--name", "base"], 1, "cannot be called 'base'"),
        (["--host", "no.such.host.invalid"], 1, "cannot listen at no.such.host.invalid"),
    ],
)
def test_wrong_options(kedit: Run, monkeypatch: pytest.MonkeyPatch, words: list[str], code: int, says: str) -> None:
    monkeypatch.setenv("KEDIT_TWO_WORDS", "two words")
    result = kedit("serve", "kedit/world-gpt2", "--port", "0", *words)
    assert result.exit_code == code and says in re.sub(r"[\s│]+", " ", result.stderr), result.stderr


def test_a_missing_package_is_named(kedit: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("hf_kedit.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    result = kedit("serve", "kedit/world-gpt2")
    assert result.exit_code == 1 and 'pip install "hf_kedit[serve]"' in result.stderr

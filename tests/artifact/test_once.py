"""What is done once: files of saved edits are opened once by a command, books are looked at once by a save."""

from __future__ import annotations

import collections
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hf_kedit import EditableModel
from hf_kedit.artifact import writing
from hf_kedit.artifact.layout import CONFIG, JOURNAL, WEIGHTS
from hf_kedit.cli import app
from hf_kedit.testing.hub import LoopbackHub

from .test_files_of_0_1_0 import DATA

OPENED: list[str] = []
"""Every file that this process opens while `watching` is on; a hook of the interpreter cannot be taken off again."""
watching = False


def _note(event: str, args: Any) -> None:
    if watching and event == "open" and isinstance(args[0], (str, Path)):
        OPENED.append(str(args[0]))


sys.addaudithook(_note)


@pytest.mark.parametrize(
    "words",
    [
        ["merge", "DIR", "-o", "OUT"],
        ["merge", "DIR", "-o", "OUT", "--base", "kedit/world-gpt2"],
        ["export-lora", "DIR", "-o", "OUT"],
        ["rollback", "DIR", "--last", "1", "-o", "OUT"],
        ["inspect", "DIR"],
        ["push", "DIR", "org/edits"],
        ["edit", "-m", "DIR", "-p", "The sky is", "-t", "green", "-M", "ft-m", "--no-eval"],
        ["edit", "-m", "DIR", "-p", "{} plays", "--subject", "Tarosk Boayond", "-t", "chess", "--no-eval"],
    ],
    ids=lambda words: " ".join(words[:2] + words[-2:]),
)
def test_a_command_opens_every_file_once(words: list[str], tmp_path: Path, hub: LoopbackHub) -> None:
    global watching
    folder = DATA / "rome_gpt2"
    places = {"DIR": str(folder), "OUT": str(tmp_path / "out")}
    OPENED.clear()
    watching = True
    try:
        result = CliRunner().invoke(app, [places.get(word, word) for word in words])
    finally:
        watching = False
    assert result.exit_code == 0, result.output
    opened = collections.Counter(Path(name).name for name in OPENED if Path(name).parent == folder)
    assert {opened[name] for name in (CONFIG, WEIGHTS, JOURNAL)} == {1}
    assert set(opened.values()) == {1}


@pytest.mark.parametrize("name", ["memit_llama_per_edit", "grace_gpt2", "prompt_gpt2"])
def test_a_save_looks_at_the_books_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = EditableModel.from_pretrained(DATA / name)
    calls: collections.Counter[str] = collections.Counter()

    def counting(label: str, function: Any) -> Any:
        def count(*args: Any, **kwargs: Any) -> Any:
            calls[label] += 1
            return function(*args, **kwargs)

        return count

    for kind, book in model.books.items():
        for question in ("describe", "tensors"):
            monkeypatch.setattr(book, question, counting(f"{kind} {question}", getattr(book, question)))
    for question in ("beside_weights", "is_low_rank"):
        monkeypatch.setattr(writing, question, counting(question, getattr(writing, question)))
    model.save_pretrained(tmp_path, per_edit=name.endswith("per_edit"))
    assert set(calls.values()) == {1}
    assert {f"{kind} {question}" for kind in model.books for question in ("describe", "tensors")} <= calls.keys()

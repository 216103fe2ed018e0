"""Saves that end in the middle, in a process of its own.

    python -m tests.fuzz.killed FOLDER SCENARIO MODE COUNT SEED

The process makes an old and a new edit, counts the file operations of a save, and then saves again and again, each
time in a forked child that is killed (``kill``) or meets a full disk (``error``) at one of the operations. It prints
one JSON list: per case the operation and what was wrong, ``null`` for nothing.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hf_kedit import EditableModel, EditRequest, LoRAConfig
from tests.fuzz.states import contents, logits
from tests.golden_cases import load_model

PROMPTS = ["Otto plays the sport of", "Ida is a"]
SCENARIOS = ("new", "own", "foreign", "per_edit", "link")
# What Python tells an audit hook before it does it. Writing into an open file is no event; `os.fsync` ends that.
EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.truncate",
          "shutil.rmtree", "shutil.move", "shutil.copyfile", "fcntl.flock", "fcntl.lockf")  # fmt: skip
_watch: list[Any] = []  # the folder that is watched and what to do at an operation in it, while there is one


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if not _watch or event not in EVENTS:
        return
    under, act = _watch
    writes = (
        event != "open"
        or (isinstance(args[1], str) and set(args[1]) & set("wax+"))
        or (args[1] is None and int(args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    )
    if writes and (
        event.startswith("fcntl") or any(isinstance(a, (str, os.PathLike)) and under in str(a) for a in args)
    ):
        act(f"{event} {[str(a)[-40:] for a in args[:2]]}")


@contextmanager
def watched(folder: Path, act: Callable[[str], None]) -> Iterator[None]:
    """Call ``act`` before every file operation under ``folder``."""
    fsync = os.fsync

    def synced(descriptor: int) -> None:
        if _watch:
            act("os.fsync")
        fsync(descriptor)

    _watch[:] = [str(folder), act]
    os.fsync = synced
    try:
        yield
    finally:
        os.fsync = fsync
        _watch.clear()


class Case:
    """A place to save to that holds an older edit, and the new edit."""

    def __init__(self, root: Path, scenario: str):
        self.root, self.scenario = root, scenario
        self.target = root / "place" / "edits"
        base, self.tokenizer = load_model("gpt2")
        self.base = base
        config = LoRAConfig(layers=[1], num_steps=2, rank=2)
        self.model = EditableModel(base, config, self.tokenizer)
        self.model.edit(EditRequest(prompt=PROMPTS[0], target_new="golf", id="old"), show_progress=False)
        self.old = logits(self.model, PROMPTS)
        self.model.save_pretrained(root / "old", per_edit=scenario == "per_edit")
        self.model.edit(EditRequest(prompt=PROMPTS[1], target_new="cook", id="new"), show_progress=False)
        self.new = logits(self.model, PROMPTS)

    def prepare(self) -> None:
        """Bring the place into its first state."""
        shutil.rmtree(self.root / "place", ignore_errors=True)
        self.target.parent.mkdir(parents=True)
        if self.scenario == "new":
            return
        holds = self.target if self.scenario != "link" else self.root / "place" / "real"
        shutil.copytree(self.root / "old", holds)
        if self.scenario == "link":
            self.target.symlink_to("real")
        if self.scenario == "foreign":
            (holds / "notes.txt").write_text("mine")

    def save(self) -> None:
        """Save the new edit."""
        self.model.save_pretrained(self.target, per_edit=self.scenario == "per_edit")

    def problem(self) -> str | None:
        """What is wrong with the place after a save that ended in the middle."""
        if self.scenario == "foreign" and not (self.target / "notes.txt").is_file():
            return "a foreign file is gone"
        if self.scenario == "link" and not self.target.is_symlink():
            return "the link is gone"
        try:
            said = self._said()
        except Exception as error:
            if self.scenario == "new" and not (self.target / "edit_config.json").is_file():
                said = None  # nothing was there before, and nothing is there now
            else:
                return f"holds neither: {type(error).__name__}: {str(error)[:120]}"
        if said is not None and not (torch.equal(said, self.old) or torch.equal(said, self.new)):
            return "holds a mixture"
        self.save()
        if not torch.equal(self._said(), self.new):
            return "the next save is wrong"
        kept = {"edits", "real"} if self.scenario == "link" else {"edits"}
        left = {name.split("/")[0] for name in contents(self.target.parent)} - kept
        return f"left behind: {sorted(left)}" if left else None

    def _said(self) -> torch.Tensor:
        base, _ = load_model("gpt2")
        return logits(EditableModel.from_pretrained(self.target, base_model=base, tokenizer=self.tokenizer), PROMPTS)


def main(root: Path, scenario: str, mode: str, count: int, seed: int) -> list[tuple[str, str | None]]:
    """Run the cases."""
    torch.set_num_threads(1)
    sys.addaudithook(_hook)
    case = Case(root, scenario)
    seen: list[str] = []
    case.prepare()
    with watched(root / "place", seen.append):
        case.save()
    assert len(seen) > 4, seen
    chosen = list(range(len(seen)))
    if count < len(chosen):
        chosen = sorted(random.Random(seed).sample(chosen, count))
    found = []
    for number in chosen:
        case.prepare()
        counter = iter(range(10**6))

        def act(what: str, number: int = number, counter: Iterator[int] = counter) -> None:
            if next(counter) == number:
                if mode == "kill":
                    os._exit(9)
                raise OSError(errno.ENOSPC, "No space left on device")

        child = os.fork()
        if child == 0:
            try:
                with watched(root / "place", act):
                    case.save()
            except Exception:
                os._exit(3)
            os._exit(0)
        os.waitpid(child, 0)
        found.append((f"{scenario}, {mode} before {number} of {len(seen)}: {seen[number]}", case.problem()))
    return found


if __name__ == "__main__":
    place, name, how, number_of_cases, first = sys.argv[1:]
    print(json.dumps(main(Path(place), name, how, int(number_of_cases), int(first))))

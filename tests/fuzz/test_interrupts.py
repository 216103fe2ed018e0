"""Ctrl-C at any line of the library: the call was not made, or it was made, and everything can be undone."""

from __future__ import annotations

import random
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import hf_kedit
from hf_kedit import EditableModel, EditRequest
from tests.fuzz.mutations import FIRST, LONG, Tally
from tests.fuzz.states import difference, logits, surface
from tests.fuzz.test_sequences import CONFIGS, FACTS, OTHER, WEIGHTS
from tests.golden_cases import load_model

PACKAGE = str(Path(hf_kedit.__file__).parent)
METHODS = (*WEIGHTS, "grace", "auto", "melo", "prompt")


class Lines:
    """Counts the lines of the library that a call runs, and presses Ctrl-C at one of them."""

    def __init__(self, at: int | None = None):
        self.at, self.count, self.place = at, 0, ""

    def __enter__(self) -> Lines:
        sys.settrace(self._enter)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.settrace(None)

    def _enter(self, frame: FrameType, event: str, _: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def _line(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            if self.count == self.at:
                self.place = f"{Path(frame.f_code.co_filename).relative_to(PACKAGE)}:{frame.f_lineno}"
                # As from the keyboard: a library that holds it back does so; a plain `raise` could not be held.
                signal.raise_signal(signal.SIGINT)
            self.count += 1
        return self._line


def calls(model: EditableModel, folder: Path) -> dict[str, Callable[[], Any]]:
    """What can be interrupted; the model carries two edits."""
    fact = FACTS[5]
    ids = [e.id for e in model.edits]
    words = model.tokenizer(OTHER[0], return_tensors="pt")

    def off() -> None:
        with model.disable_edits():
            logits(model, OTHER[:1])

    return {
        "edit": lambda: model.edit(fact, show_progress=False),
        "rollback": lambda: model.rollback(1),
        "first away": lambda: model.rollback(ids[0]),
        "off": off,
        "ask": lambda: logits(model, OTHER[:1]),
        "generate": lambda: model.generate(**words, max_new_tokens=2, do_sample=False),
        "save": lambda: model.save_pretrained(folder),
        "fingerprint": lambda: model.base_fingerprint(),
        "pack": lambda: model.load_edits(folder.with_name("pack"), "pack"),
    }


def pack_for(base: Any, tokenizer: Any, folder: Path) -> None:
    """Edits of somebody else in a folder."""
    theirs = EditableModel(base, CONFIGS["ft-m"], tokenizer)
    theirs.edit(EditRequest(prompt="Ida is a", target_new="cook", id="theirs"), show_progress=False)
    theirs.save_pretrained(folder)
    theirs.unload()


def run(seeds: range, tmp_path: Path, methods: Sequence[str] = METHODS) -> Tally:
    tally = Tally()
    base, tokenizer = load_model("gpt2")
    EditableModel(base, "rome", tokenizer)  # transformers' own hooks, once
    pack_for(base, tokenizer, tmp_path / "pack")
    pristine = surface(base)
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    lengths: dict[tuple[str, str], int] = {}
    try:
        for seed in seeds:
            rng = random.Random(seed)
            method = rng.choice(methods)
            model = EditableModel(base, CONFIGS[method], tokenizer)
            model.edit(FACTS[:2], batch_size=1, show_progress=False)
            possible = calls(model, tmp_path / "saved")
            if method not in WEIGHTS:
                del possible["pack"]
            name = rng.choice(sorted(possible))
            before, ids, said = surface(base), [e.id for e in model.edits], logits(model, OTHER)
            if (method, name) not in lengths:
                with Lines() as lines:
                    possible[name]()
                lengths[method, name] = lines.count
                model.unload()
                continue
            with Lines(rng.randrange(lengths[method, name])) as lines:
                try:
                    possible[name]()
                    done = True
                except KeyboardInterrupt:
                    done = False
                except Exception as error:
                    tally.fail(f"seed {seed}, {method}, {name}", f"{type(error).__name__}: {error}")
                    done = False
            case = f"seed {seed}, {method}, {name} at {lines.place}"
            left = [e.id for e in model.edits]
            if left == ids and name != "pack":
                if changed := difference(before, surface(base)):
                    tally.fail(case, f"nothing was edited, and the model is another: {changed}")
                elif not torch.equal(logits(model, OTHER), said):
                    tally.fail(case, "nothing was edited, and the model says something else")
            elif name in ("off", "ask", "generate", "save", "fingerprint"):
                tally.fail(case, f"the journal has {len(left)} edits")
            try:
                with model.disable_edits():
                    pass
                for pack in list(model.packs.names):
                    model.unload_edits(pack)
                model.unload()
            except Exception as error:
                tally.fail(case, f"cannot be undone: {type(error).__name__}: {str(error)[:150]}")
            if changed := difference(pristine, surface(base)):
                tally.fail(case, f"undone, and the model is another: {changed}")
                base, tokenizer = load_model("gpt2")
                EditableModel(base, "rome", tokenizer)
                pristine = surface(base)
            tally.worked += done
            tally.refused += not done
    finally:
        signal.signal(signal.SIGINT, previous)
    return tally


def test_ctrl_c_at_random_lines(tmp_path: Path) -> None:
    run(range(70), tmp_path, methods=("rome", "grace")).check(40)


@pytest.mark.slow
def test_ctrl_c_at_many_lines(tmp_path: Path) -> None:
    run(range(FIRST, FIRST + LONG), tmp_path).check(LONG // 2)

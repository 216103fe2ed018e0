"""Every command in a fresh process, as a user starts it: nothing on standard error, and on standard output our words.

Libraries that are imported on the way keep to themselves what they lack, load or recommend.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from hf_kedit.cli import app
from hf_kedit.testing.hub import LoopbackHub
from tests.golden_cases import Case, need

from .conftest import FACT, SECOND
from .test_train import PLAN
from .test_tune import SMALL

MODEL = ("-m", "kedit/world-gpt2")
LLAMA = ("-m", "kedit/world-llama")
ONE = ("-p", FACT["prompt"], "--subject", FACT["subject"], "-t", FACT["target_new"])
QUICK: dict[str, tuple[str, ...]] = {
    "convert-hparams": ("easy.yaml", "-o", "own.yaml"),
    "edit": (*MODEL, "-M", "rome", *ONE, "--ground-truth", "sculptor", "-o", "out"),
    "export-finetune": ("edits", "-o", "train.jsonl"),
    "export-gguf": ("edits", "-o", "edits.gguf"),
    "export-lora": ("edits", "-o", "lora"),
    "inspect": ("kedit/world-llama", "-M", "memit", "--load", "--all"),
    "doctor": (),
    "list-methods": (),
    "merge": ("edits", "-o", "merged"),
    "metrics": ("-o", "metrics"),
    "push": ("edits", "org/edits"),
    "rollback": ("edits", "first", "-o", "left"),
    "ui": ("kedit/world-llama", "--export-space", "space"),
}
SLOW: dict[str, tuple[str, ...]] = {
    "bench": ("sweep.yaml",),
    "demo": MODEL,
    "eval": (*MODEL, "-M", "memit", "-d", "world", "-n", "2"),
    "stats": (*LLAMA, "-o", "stats", "-n", "3000"),
    "trace": (*MODEL, *ONE[:4], "--samples", "2", "--suggest", "rome"),
    "train": ("plan.yaml", "-o", "editor"),
    "tune": ("kedit/world-gpt2", "-M", "grace", *SMALL, "-o", "found.yaml"),
}
MORE = [
    ("demo", *LLAMA, "--no-reload"),
    ("edit", *LLAMA, "-M", "lora", *ONE),
    ("edit", *MODEL, "-M", "grace", *ONE),
    ("edit", *MODEL, "-M", "prompt", *ONE),
    ("edit", "-m", "edits", "-M", "ft-m", *ONE, "-o", "more"),
    ("eval", "-m", "edits", "--no-edit", "--protocol", "generation"),
    ("inspect", "edits"),
    ("inspect", "kedit/world-gpt2"),
    ("push", "merged-before", "org/model"),
    ("rollback", "edits", "--all"),
]
FOREIGN = re.compile(
    r"\d+%\||it/s|Warning|W\d{4} |Traceback|site-packages|\{'|^[a-z_.]+:\d+|Loading|No module", re.MULTILINE
)


def environment(hub: LoopbackHub) -> dict[str, str]:
    """What a user's shell has; none of the switches that the tests' own process is quiet by."""
    switches = ("HF_KEDIT_DISABLE_PROGRESS_BARS", "TOKENIZERS_PARALLELISM", "HF_HUB_DISABLE_PROGRESS_BARS")
    return {name: value for name, value in os.environ.items() if name not in switches}


def run(folder: Path, hub: LoopbackHub, *words: str) -> str:
    """Run one command in a folder; what it writes to standard output."""
    command = [sys.executable, "-m", "hf_kedit.cli", *words]
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", cwd=folder, env=environment(hub), check=False
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert not FOREIGN.search(done.stdout), done.stdout
    return done.stdout


@pytest.fixture
def folder(tmp_path: Path, saved: Path, hub: LoopbackHub) -> Path:
    """A place with everything that the commands read; ``edits`` are saved ones."""
    assert saved == tmp_path / "edits"
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (FACT, SECOND)), encoding="utf-8")
    (tmp_path / "easy.yaml").write_text("alg_name: ROME\nmodel_name: gpt2\nlayers: [5]\nv_lr: 0.5\n", encoding="utf-8")
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(PLAN), encoding="utf-8")
    sweep = {"models": ["kedit/world-gpt2"], "methods": ["rome", "ft-m"], "output_dir": "sweep"}
    sweep |= {"datasets": [{"name": "world", "limit": 2}], "settings": ["single"]}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep), encoding="utf-8")
    return tmp_path


def test_no_command_is_left_out() -> None:
    commands = [command for command in app.registered_commands if not command.hidden]
    names = {c.name or c.callback.__name__.replace("_", "-") for c in commands}  # type: ignore[union-attr]
    assert names == {*QUICK, *SLOW, "convert-editor", "serve", "chat"}  # which have tests of what they say


@pytest.mark.parametrize("name", sorted(QUICK))
def test_nothing_but_our_own_words(name: str, folder: Path, hub: LoopbackHub) -> None:
    assert run(folder, hub, name, *QUICK[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SLOW))
def test_nothing_but_our_own_words_from_slow_commands(name: str, folder: Path, hub: LoopbackHub) -> None:
    assert run(folder, hub, name, *SLOW[name])


@pytest.mark.slow
@pytest.mark.parametrize("words", MORE, ids=" ".join)
def test_nothing_but_our_own_words_in_other_ways(words: tuple[str, ...], folder: Path, hub: LoopbackHub) -> None:
    if "merged-before" in words:
        run(folder, hub, "merge", "edits", "-o", "merged-before")
    assert run(folder, hub, *words)


@pytest.mark.slow
@pytest.mark.parametrize("output_format", ["json", "quiet"])
def test_data_alone(output_format: str, folder: Path, hub: LoopbackHub) -> None:
    for name, words in {**QUICK, **SLOW}.items():
        shown = run(folder, hub, name, *words, "--format", output_format)
        if output_format == "json":
            json.loads(shown)


@pytest.mark.golden
@pytest.mark.slow
def test_an_archive(folder: Path, hub: LoopbackHub) -> None:
    case = Case("mend_gpt2")
    tensors = {
        (k if k.endswith("edit_lrs") else k.replace("hypernet.", "mend.")).removeprefix("hypernet."): v
        for k, v in case.expected.items()
        if k.startswith("hypernet.")
    }
    torch.save({"model": tensors, "step": 3}, folder / "archive.pt")
    where = ("-m", str(need("models/gpt2")), "--inner-params", ",".join(case.spec["inner_params"]))
    assert run(folder, hub, "convert-editor", "archive.pt", *where, "-o", "out")

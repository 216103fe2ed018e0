"""``--format quiet``: what every command prints for scripts, line by line, and nothing else on either stream."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_kedit.cli import app
from hf_kedit.methods import registered_methods
from tests.models import tiny_model

from .conftest import FACT, Run
from .test_train import PLAN
from .test_tune import SMALL

MODEL = ("-m", "kedit/world-gpt2")
ONE = ("-p", FACT["prompt"], "--subject", FACT["subject"], "-t", FACT["target_new"])
STEP = ("-M", "ft-m", "-s", "num_steps=1")
HEX = "[0-9a-f]"
METRICS = ["kedit", *(f"kedit_{name}" for name in ("accuracy", "consistency", "counterfact", "fluency", "locality",
                                                   "perplexity", "sentiment", "text_overlap"))]  # fmt: skip
SCORE = r"=(0\.\d+|1\.0)"
HPARAMS = [r"# From EasyEdit's easy\.yaml for gpt2\.", "edit_type: rome", "layers:", "- 5", r"v_lr: 0\.5"]

# Command → its words, and what each line must match.
LINES: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "bench": (("sweep.yaml",), [r"sweep/report\.html", r"sweep/report\.md", r"sweep/report\.json"]),
    "convert-hparams": (("easy.yaml",), HPARAMS),
    "doctor": ((), []),
    "demo": ((*MODEL, "--no-reload", "-o", "shown"), ["shown"]),
    "edit": ((*MODEL, *STEP, *ONE), [f"edit-{HEX}{{8}}"]),
    "eval": (
        (*MODEL, *STEP, "-d", "world", "-n", "1"),
        [name + SCORE for name in ("rewrite_acc", "rephrase_acc", "locality", "locality_accuracy", "portability")],
    ),
    "export-finetune": (("edits", "-o", "train.jsonl"), [r"train\.jsonl"]),
    "export-gguf": (("edits", "-o", "edits.gguf"), ["edits.gguf"]),
    "export-lora": (("edits", "-o", "lora"), ["lora"]),
    "inspect": (("edits",), ["first", "second"]),
    "list-methods": ((), list(registered_methods())),
    "merge": (("slight", "-o", "merged", "--dtype", "bfloat16"), ["merged"]),
    "metrics": ((), METRICS),
    "push": (("edits", "org/edits"), [f"{HEX}{{40}}"]),
    "rollback": (("edits", "--last", "1", "-o", "left"), ["second"]),
    "stats": (("-m", "kedit/world-gpt2", "-o", "stats", "-n", "3000"), [rf"stats/{HEX}{{24}}"]),
    "trace": ((*MODEL, *ONE[:4], "--samples", "1", "--kind", "hidden"), [r"hidden=[0-5]"]),
    "tune": (("kedit/world-gpt2", "-M", "grace", *SMALL, "-o", "found.yaml"), [r"found\.yaml"]),
    "train": (("plan.yaml", "-o", "editor"), ["editor"]),
}
OTHERS = [
    ("convert-hparams", ("easy.yaml", "-o", "own.yaml"), ["own.yaml"]),
    ("inspect", ("kedit/world-gpt2",), [rf"transformer\.h\.{i}\.mlp\.c_proj" for i in range(6)]),
    ("inspect", ("experts",), [r"model\.layers\.0\.mlp\.experts", r"model\.layers\.1\.mlp\.experts"]),
    ("metrics", ("accuracy", "-o", "metrics"), ["metrics/kedit_accuracy"]),
    ("rollback", ("edits", "--all"), ["first", "second"]),
    ("trace", (*MODEL, *ONE[:4], "--samples", "1", "--kind", "mlp", "--suggest", "rome"), ["[0-5]"]),
    ("trace", (*MODEL, *ONE[:4], "--ground-truth", "plumber", "--samples", "1", "--kind", "mlp"), []),
]


@pytest.fixture
def folder(tmp_path: Path, saved: Path, hub: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the commands run, with everything that they read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KEDIT_HOME", str(tmp_path / "kedit"))
    (tmp_path / "easy.yaml").write_text(
        "alg_name: ROME\nmodel_name: gpt2\nlayers: [5]\nv_lr: 0.5\ndevice: 0\n", encoding="utf-8"
    )
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(PLAN), encoding="utf-8")
    sweep = {"models": ["kedit/world-gpt2"], "methods": [{"name": "ft-m", "num_steps": 1}], "output_dir": "sweep"}
    sweep |= {"datasets": [{"name": "world", "limit": 1}], "settings": ["single"]}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep), encoding="utf-8")
    return tmp_path


def check(result: Any, lines: list[str]) -> None:
    assert (result.exit_code, result.stderr) == (0, "")
    assert re.fullmatch("".join(line + "\n" for line in lines), result.stdout), result.stdout


@pytest.mark.parametrize("name", sorted(LINES))
def test_what_must_be_said(name: str, folder: Path, kedit: Run) -> None:
    words, lines = LINES[name]
    if "slight" in words:  # a change that bfloat16 rounds away, which is a warning for people
        kedit("edit", *MODEL, *STEP, *ONE, "-s", "lr=1e-8", "--no-eval", "--no-side-effects", "-o", "slight")
        assert "rounding loses" in kedit("merge", *words[:2], "for-people", *words[3:]).stderr
    check(kedit(name, *words, "-f", "quiet"), lines)


@pytest.mark.parametrize(("name", "words", "lines"), OTHERS, ids=[" ".join([o[0], *o[1][:1]]) for o in OTHERS])
def test_other_ways(name: str, words: tuple[str, ...], lines: list[str], folder: Path, kedit: Run) -> None:
    if "experts" in words:
        tiny_model("mixtral", num_hidden_layers=2).save_pretrained(folder / "experts")
    check(kedit(name, *words, "-f", "quiet"), lines)


def test_no_command_is_left_out() -> None:
    names = {c.name or c.callback.__name__.replace("_", "-") for c in app.registered_commands if not c.hidden}  # type: ignore[union-attr]
    endless = {"chat", "serve", "ui"}  # talk to people until they are ended, and have no such option
    assert names == {*LINES, "convert-editor"} | endless  # convert-editor: test_convert_editor.py runs it so


def test_why_an_edit_is_a_failure(folder: Path, kedit: Run) -> None:
    """Exit codes other than 0 have their one line on standard error; standard output is what it is without."""
    for more, code, said in (
        (("-s", "lr=1e-9", "--min-success", "1"), 3, "below --min-success"),
        (("-s", "lr=0.5", "--strict"), 4, "general"),
        (("-s", "lr=x"), 1, "kedit: error: "),
    ):
        result = kedit("edit", *MODEL, *STEP, *ONE, *more, "-f", "quiet")
        assert result.exit_code == code and said in " ".join(result.stderr.split())
        assert result.stderr.startswith("kedit: ") and "WARNING" not in result.stderr
        assert bool(re.fullmatch(f"edit-{HEX}{{8}}\n", result.stdout)) == (code != 1)

"""``kedit convert-editor``: a recorded archive becomes an editor; anything else, or what would run code, does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_kedit import Editor
from tests.golden_cases import Case, need


class Config:
    """Something that only unpickling can bring back, as in the published archives."""


@pytest.mark.golden
@pytest.mark.parametrize("prefix", ["mend.", "gtn."])
def test_an_archive_becomes_an_editor(kedit: Any, tmp_path: Path, prefix: str) -> None:
    case = Case("mend_gpt2")
    tensors = {
        (k if k.endswith("edit_lrs") else k.replace("hypernet.", prefix)).removeprefix("hypernet."): v
        for k, v in case.expected.items()
        if k.startswith("hypernet.")
    }
    torch.save({"model": tensors, "step": 3}, tmp_path / "archive.pt")
    arguments = ["-m", need("models/gpt2"), "--inner-params", ",".join(case.spec["inner_params"])]
    done = kedit("convert-editor", tmp_path / "archive.pt", *arguments, "-o", tmp_path / "out", "-f", "quiet")
    assert done.exit_code == 0 and done.stdout.strip() == str(tmp_path / "out")
    editor = Editor.from_pretrained(tmp_path / "out")
    assert torch.equal(editor.state_dict()["edit_lrs"], -case.expected["hypernet.edit_lrs"])
    wrong = ["-m", "kedit/world-gpt2", "--inner-params", "transformer.h.5.mlp.c_proj.weight", "-o", tmp_path / "no"]
    done = kedit("convert-editor", tmp_path / "archive.pt", *wrong)
    assert done.exit_code == 1 and "does not fit" in done.stderr and not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [({"model": {"edit_lrs": torch.ones(1)}, "config": Config()}, "run code"), ({"model": {}}, "no MEND archive")],
)
def test_what_is_refused(kedit: Any, tmp_path: Path, content: Any, reason: str) -> None:
    torch.save(content, tmp_path / "archive.pt")
    arguments = ["-m", "kedit/world-gpt2", "--inner-params", "a.weight", "-o", tmp_path / "out"]
    done = kedit("convert-editor", tmp_path / "archive.pt", *arguments)
    assert done.exit_code == 1 and reason in done.stderr

"""A long AlphaEdit sequence, saved half way and continued by another process, ends at the same bits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hf_kedit import EditableModel, load_edit_dataset
from hf_kedit.engine.weights import model_digest

SECOND_HALF = """
import sys
from hf_kedit import EditableModel, load_edit_dataset
from hf_kedit.engine.weights import model_digest

import torch
torch.set_num_threads(1)
folder, start, stop, size = sys.argv[1], *map(int, sys.argv[2:])
model = EditableModel.from_pretrained(folder)
rows = load_edit_dataset("world", split="test", limit=stop)
model.edit(rows.select(range(start, stop)), batch_size=size)
print(len(model.edits), model_digest(model.base_model))
"""


@pytest.mark.parametrize(
    ("edits", "size"), [(40, 10), pytest.param(1000, 50, marks=pytest.mark.slow)], ids=["40", "1000"]
)
def test_saved_half_way_and_resumed(edits: int, size: int, tmp_path: Path) -> None:
    rows = load_edit_dataset("world", split="test", limit=edits)
    half = edits // 2
    whole = EditableModel.from_pretrained("kedit/world-gpt2", "alphaedit")
    whole.edit(rows.select(range(half)), batch_size=size)
    whole.save_pretrained(tmp_path / "half")
    whole.edit(rows.select(range(half, edits)), batch_size=size)

    arguments = [str(tmp_path / "half"), str(half), str(edits), str(size)]
    done = subprocess.run(
        [sys.executable, "-c", SECOND_HALF, *arguments], capture_output=True, text=True, timeout=3000
    )
    assert done.returncode == 0, done.stderr
    count, digest = done.stdout.split()[-2:]
    assert int(count) == edits
    assert digest == model_digest(whole.base_model)

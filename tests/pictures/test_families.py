"""Families of models that see: what is edited on each, undone and saved; docs/families.md says what came out.

``KEDIT_UPDATE_FAMILIES=1`` rewrites `docs/image_families.json` and the table instead of comparing.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_kedit import EditableModel
from hf_kedit.config import EditConfig
from hf_kedit.engine.weights import model_digest
from hf_kedit.errors import UnsupportedModelError
from tests.marked import marked, rewrite_marked
from tests.pictures.test_edits import FACTS, SETTINGS, holds
from tests.seeing import FAMILIES, seeing

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = ROOT / "docs" / "image_families.json", ROOT / "docs" / "families.md"
UPDATE = os.environ.get("KEDIT_UPDATE_FAMILIES") == "1"
_TRAINED = {"lr": 3e-2, "num_steps": 12, "drift_bound": None, "stop_probability": None}
STEPS: dict[str, dict[str, Any]] = {
    "ft-m": {"edit_type": "ft-m", "layers": [1], **_TRAINED},
    "lora": {"edit_type": "lora", **_TRAINED},
    "rome": {"edit_type": "rome", **SETTINGS["rome"], "mom2_adjustment": False},
    "connector": {"edit_type": "ft-m", "module_scope": "connector", **_TRAINED},
    "vision": {"edit_type": "ft-m", "module_scope": "vision", **_TRAINED},
}


def measure(family: str, folder: Path) -> dict[str, Any]:
    """One row: what lowers the loss of a fact about a picture, and whether all of it is undone and saved."""
    model, processor = seeing(family)
    edited = EditableModel(model, "ft-m", processor)
    digest = model_digest(model)
    row: dict[str, Any] = {"class": type(model).__name__, "layers": edited.anatomy.layers_path}
    row["text"] = _reads_text(edited)
    before, exact, saved = holds(edited, FACTS[1])[1], [], []
    for step, values in STEPS.items():
        row[step] = False
        try:
            edited.set_method(EditConfig.from_dict(values)).edit(**FACTS[1], show_progress=False)
        except UnsupportedModelError:  # Gemma 3's projector is no module
            continue
        after = holds(edited, FACTS[1])[1]
        row[step] = after < before - 0.05
        edited.save_pretrained(folder / step)
        again, _ = seeing(family)
        loaded = EditableModel.from_pretrained(folder / step, base_model=again, processor=processor)
        saved.append(holds(loaded, FACTS[1])[1] == after)
        edited.rollback()
        exact.append(model_digest(model) == digest)
    return {**row, "undone": all(exact), "saved": all(saved)}


def _reads_text(edited: EditableModel) -> bool:
    """Whether the stock model answers without a picture."""
    try:
        with torch.no_grad():
            edited.base_model(input_ids=torch.tensor([[1, 5, 6, 7]]))
    except (TypeError, ValueError):
        return False
    return True


@pytest.fixture(scope="module")
def measured() -> Any:
    rows: dict[str, Any] = {}
    yield rows
    if UPDATE and set(rows) == set(FAMILIES):
        RESULTS.write_text(json.dumps({n: rows[n] for n in FAMILIES}, indent=1) + "\n", encoding="utf-8")
        rewrite_marked(PAGE, "images", table(results()))


def results() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_says_what_happens(family: str, measured: dict[str, Any], tmp_path: Path) -> None:
    row = measured[family] = measure(family, tmp_path)
    assert row["undone"] and row["saved"] and row["ft-m"], row
    if not UPDATE:
        assert row == results()[family], "run KEDIT_UPDATE_FAMILIES=1 pytest tests/pictures/test_families.py"


def test_the_page_shows_the_results() -> None:
    if UPDATE:
        pytest.skip("it is being rewritten")
    assert set(results()) == set(FAMILIES) and marked(PAGE, "images") == table(results())


def table(rows: dict[str, dict[str, Any]]) -> str:
    head = ["family", "class", "blocks", "text alone", "FT-M", "LoRA", "ROME", "FT-M connector", "FT-M vision"]
    lines = [f"| {' | '.join([*head, 'undone', 'saved'])} |", "| --- " * (len(head) + 2) + "|"]
    for name, row in rows.items():
        told = ["yes" if row[key] else "no" for key in ("text", *STEPS, "undone", "saved")]
        lines.append(f"| {' | '.join([name, row['class'], '`' + row['layers'] + '`', *told])} |")
    return "\n".join(lines) + "\n"

"""What every method says of itself, and docs/methods/index.md of it, happens: undoing, saving, what is read."""

from __future__ import annotations

import json
import runpy
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from hf_kedit import EditableModel, load_edit_dataset
from hf_kedit.errors import RollbackError
from hf_kedit.methods import registered_methods
from hf_kedit.statistics.store import StatisticsStore
from tests.methods.short_settings import short_config

ROOT = Path(__file__).resolve().parents[2]
METHODS = [  # QLoRA edits models that were loaded quantised; it is a LoRA
    n for n, m in registered_methods().items() if m.__module__.startswith("hf_kedit.") and n != "qlora"
]
TABLE = runpy.run_path(str(ROOT / "docs" / "methods" / "table.py"))


@cache
def facts() -> list[dict[str, Any]]:
    """Two facts, each with an answer that is to go (DPO trains on pairs)."""
    rows = [dict(row) for row in load_edit_dataset("world", split="test", limit=2)]
    return [{**row, "target_neg": "quiet"} for row in rows]


def fresh(name: str) -> EditableModel:
    model = "kedit/world-llama" if name == "instructedit" else "kedit/world-gpt2"  # which has its editor
    return EditableModel.from_pretrained(model, short_config(name))


def comes_off(model: EditableModel) -> bool:
    """Whether the first of the model's edits can be taken back alone."""
    try:
        model.rollback(model.edits[0].id)
    except RollbackError:
        assert len(model.edits) == 2
        model.rollback("all")
        return False
    assert len(model.edits) == 1
    return True


@pytest.mark.parametrize("name", METHODS)
def test_a_method_reads_saves_and_undoes_as_it_says(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: set[str] = set()
    for attribute, what in (("factor", "second moments"), ("moments", "second moments"), ("corpus_texts", "text")):
        known = getattr(StatisticsStore, attribute)
        monkeypatch.setattr(
            StatisticsStore, attribute, lambda *a, _f=known, _w=what, **k: (read.add(_w), _f(*a, **k))[1]
        )
    model, method = fresh(name), registered_methods()[name]
    model.edit(facts()[0], show_progress=False)
    needs = TABLE["needs"](method)
    assert needs != "–" or not read
    assert ("second moments" in read) == (needs == "second moments" or name in ("simie", "auto"))  # whose base is ROME

    model.save_pretrained(tmp_path)
    adapter = tmp_path / "adapter_config.json"
    kind = json.loads(adapter.read_text())["peft_type"] if adapter.exists() else None
    artifact = json.loads((tmp_path / "edit_config.json").read_text())["artifact"]
    served = TABLE["served"](method)
    assert (served == "PEFT") == str(kind).startswith("KEDIT_")
    expected = {"LoRA": ("lora", "LORA"), "merged": ("dense", None)}
    assert (artifact, kind) == expected.get(served, ("stateful", kind if served == "PEFT" else None))
    if served == "text":
        prompt = facts()[0]["prompt"].format(facts()[0]["subject"])
        assert facts()[0]["target_new"] in model.build_prompt(prompt)

    undo = method.capabilities.undo
    model.edit(facts()[1], show_progress=False)
    if name != "wise":  # a shard holds the edits of several calls
        assert comes_off(model) == (undo in ("edit", "call"))
    model.rollback("all")
    model.edit(facts(), show_progress=False)
    assert comes_off(model) == (undo == "edit")


def test_the_overview_says_what_code_and_pages_say() -> None:
    text = TABLE["PAGE"].read_text(encoding="utf-8")
    assert text == TABLE["page"](text), "run python docs/methods/table.py"
    listed = [name for names in TABLE["FAMILIES"].values() for name in names.split()]
    assert sorted(listed) == sorted({*METHODS, "qlora"})
    for name in listed:
        page = TABLE["PAGES"].get(name, name.replace("-", "_")) + ".md"
        assert (ROOT / "docs" / "methods" / page).exists() and f"({page})" in text


def test_a_column_that_moved_is_no_figure() -> None:
    with pytest.raises(ValueError, match="no table with the columns holds"):
        TABLE["rows_behind"]("real_models.md", "## Derived defaults do no harm", "holds")
    with pytest.raises(ValueError, match="no table"):
        TABLE["rows_behind"]("real_models.md", "## No such heading", "holds")

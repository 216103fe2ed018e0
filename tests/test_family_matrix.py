"""The support matrix: every family is read, edited two ways, undone, saved and exported; the pages say what came out.

`docs/families.json` is what this test saw, and the tables of docs/families.md and README.md are made from it.
``KEDIT_UPDATE_FAMILIES=1`` rewrites all three instead of comparing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_kedit import EditableModel, EditRequest, FTMConfig, ROMEConfig
from hf_kedit.engine.weights import model_digest
from hf_kedit.errors import UnsupportedModelError
from tests.golden_cases import load_model
from tests.marked import marked, rewrite_marked
from tests.models import FAMILIES, HYBRIDS, REMOTE_LAYOUTS, UNUSUAL, stand_in, tiny_model

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE, README = ROOT / "docs" / "families.json", ROOT / "docs" / "families.md", ROOT / "README.md"
UPDATE = os.environ.get("KEDIT_UPDATE_FAMILIES") == "1"
FACT = EditRequest(prompt="{} plays the sport of", subject="Mira Halvorsen", target_new="tennis", id="fact")
PROBE = torch.tensor([[5, 6, 7, 8, 9, 10]])
STEPS = ("fine_tuning", "rank_one", "rollback", "save", "lora")

FT = FTMConfig(layers=[1], lr=1e-2, num_steps=4, expert_policy="top1")
ROME = ROMEConfig(
    layers=[1], v_num_grad_steps=4, v_lr=0.5, v_weight_decay=1e-3, clamp_norm_factor=4,
    mom2_adjustment=False, context_templates=["{}"], expert_policy="top1",
)  # fmt: skip


def families() -> dict[str, Callable[[], Any]]:
    """Family → builder of a tiny random model."""
    _, tokenizer = load_model("llama")
    size = max(len(tokenizer), 420)
    names = [*(name for name in FAMILIES if name != "blip2"), *HYBRIDS, *UNUSUAL]
    built = {name: lambda n=name: tiny_model(n, vocab_size=size) for name in names}
    return built | {f"{name} (layout)": lambda n=name: stand_in(n, vocab_size=size) for name in REMOTE_LAYOUTS}


def logits(model: Any) -> torch.Tensor:
    extra = {"decoder_input_ids": PROBE} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=PROBE, **extra).logits


def measure(build: Callable[[], Any], folder: Path) -> dict[str, Any]:
    """One row of the matrix. What the library refuses is recorded; everything else that goes wrong is a failure."""
    _, tokenizer = load_model("llama")
    model = EditableModel(build(), ROME if not build().config.is_encoder_decoder else FT, tokenizer)
    digest, layer = model_digest(model.base_model), model.anatomy.layers[1]
    row: dict[str, Any] = {
        "class": "remote code" if "layout" in type(model.base_model).__dict__ else model.anatomy.model_class,
        "layers": model.anatomy.layers_path,
        "down": layer.down.path.removeprefix(f"{layer.path}.") if layer.down else "experts",
        "additive": bool(model.anatomy.additive[1]) if layer.down and model.anatomy.additive else None,
    }
    undone = []
    for step, config in (("fine_tuning", FT), ("rank_one", ROME)):
        row[step] = False
        for policy in ("top1", "shared"):  # the shared expert where the routed ones cannot be edited one by one
            with contextlib.suppress(UnsupportedModelError):
                chosen = dataclasses.replace(config, expert_policy=policy)
                losses = model.set_method(chosen).edit(FACT, show_progress=False).edits[0].diagnostics["loss"]
                row[step] = losses[-1] < losses[0]
                break
        if not len(model.edits):
            continue
        model.save_pretrained(folder / step)
        loaded = EditableModel.from_pretrained(folder / step, base_model=build(), tokenizer=tokenizer)
        row["save"] = row.get("save", True) and torch.equal(logits(loaded), logits(model))
        model.export_lora(folder / f"{step}-lora")
        plain = build()
        plain.load_adapter(str(folder / f"{step}-lora"))  # transformers' own
        row["lora"] = row.get("lora", True) and torch.allclose(logits(plain), logits(model), atol=1e-5)
        model.rollback("all")
        undone.append(model_digest(model.base_model) == digest)
    return {**row, "rollback": bool(undone) and all(undone)}


@pytest.fixture(scope="module")
def measured() -> Any:
    rows: dict[str, Any] = {}
    yield rows
    if UPDATE and set(rows) == set(families()):
        RESULTS.write_text(json.dumps({n: rows[n] for n in families()}, indent=1) + "\n", encoding="utf-8")
        rewrite_marked(PAGE, "families", page_table(results()))
        rewrite_marked(README, "families", readme_table(results()))


def results() -> dict[str, dict[str, Any]]:
    return json.loads(RESULTS.read_text(encoding="utf-8"))


@pytest.mark.parametrize("family", list(families()))
def test_the_matrix_says_what_happens(family: str, measured: dict[str, Any], tmp_path: Path) -> None:
    row = measured[family] = measure(families()[family], tmp_path)
    assert row["rollback"] and row["save"] and row["lora"], row
    assert row["fine_tuning"] or row["rank_one"], "a family that nothing can edit does not belong here"
    if not UPDATE:
        assert row == results()[family], "run KEDIT_UPDATE_FAMILIES=1 pytest tests/test_family_matrix.py"


def test_the_pages_show_the_results() -> None:
    if UPDATE:
        pytest.skip("they are being rewritten")
    assert set(results()) == set(families())
    assert marked(PAGE, "families") == page_table(results())
    assert marked(README, "families") == readme_table(results())


def page_table(rows: dict[str, dict[str, Any]]) -> str:
    head = ["family", "class", "blocks", "down projection", "additive", "FT-M", "ROME", "undone", "saved", "LoRA"]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for name, row in rows.items():
        cells = [name, row["class"], f"`{row['layers']}`", f"`{row['down']}`"]
        cells += [_word(row[key]) for key in ("additive", *STEPS)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def readme_table(rows: dict[str, dict[str, Any]]) -> str:
    told = {"fine_tuning": "fine-tuning", "rank_one": "rank-one edit", "rollback": "bit-exact rollback"}
    told |= {"save": "save and load", "lora": "LoRA export"}
    lines = [f"| of {len(rows)} families | works on | not on |", "| --- | --- | --- |"]
    for step in STEPS:
        missing = [name for name, row in rows.items() if not row[step]]
        lines.append(f"| {told[step]} | {len(rows) - len(missing)} | {', '.join(missing) or '–'} |")
    return "\n".join(lines) + "\n"


def _word(value: bool | None) -> str:
    return "–" if value is None else "yes" if value else "no"

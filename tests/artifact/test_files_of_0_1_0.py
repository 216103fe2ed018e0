"""What hf_kedit 0.1.0 has saved is loaded, says the same, is undone exactly, and is saved again with the same content.

`data_0_1_0/make.py` made the files with the code of 0.1.0; they are never written again.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_kedit import EditableModel
from hf_kedit.engine.weights import model_digest
from tests.artifact.data_0_1_0.make import PROBE

DATA = Path(__file__).parent / "data_0_1_0"
EXPECTED: dict[str, Any] = json.loads((DATA / "expected.json").read_text(encoding="utf-8"))
SAVED = [name for name in EXPECTED if name != "exported_lora_llama"]


def check(model: EditableModel, expected: dict[str, Any]) -> None:
    """Compare with what 0.1.0 computed: logits, and greedy answers of five tokens."""
    assert [e.id for e in model.edits] == expected["ids"]
    tolerance = 1e-4 if next(model.base_model.parameters()).dtype == torch.float32 else 0.1
    at = {"logits": torch.tensor(PROBE)}
    at["logits_at_prompt"] = torch.tensor(model.tokenizer([next(iter(expected["answers"]))])["input_ids"])
    for name, ids in at.items():
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, -1, :20].float()
        torch.testing.assert_close(logits, torch.tensor(expected[name]), atol=tolerance, rtol=tolerance)
    for prompt, answer in expected["answers"].items():
        ids = model.tokenizer(prompt, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert model.tokenizer.decode(out[0, ids["input_ids"].shape[1] :]) == answer, prompt


@pytest.mark.parametrize("name", SAVED)
def test_a_saved_edit(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model = EditableModel.from_pretrained(DATA / name)
    assert not [record for record in caplog.records if record.name.startswith("hf_kedit")]
    check(model, EXPECTED[name])
    model.save_pretrained(tmp_path, per_edit=name.endswith("per_edit"))
    for path in (p.relative_to(DATA / name) for p in (DATA / name).rglob("*.safetensors")):
        before, after = load_file(DATA / name / path), load_file(tmp_path / path)
        assert before.keys() == after.keys()
        assert all(torch.equal(value, after[key]) for key, value in before.items()), path
    assert (tmp_path / "edits.jsonl").read_bytes() == (DATA / name / "edits.jsonl").read_bytes()
    old, new = (json.loads((folder / "edit_config.json").read_text()) for folder in (DATA / name, tmp_path))
    for key in ("artifact", "method", "modules", "books", "context_templates", "head_tied", "base_dtype", "mergeable"):
        assert old[key] == new[key], key
    old["hparams"]["rows_per_step"] = old["hparams"].pop("batch_size")  # renamed since
    assert old["hparams"].items() <= new["hparams"].items()
    check(EditableModel.from_pretrained(tmp_path), EXPECTED[name])
    model.rollback("all")
    dtype = getattr(torch, old["base_dtype"])
    base = EditableModel.from_pretrained(EXPECTED[name]["base"], dtype=dtype, untie=name.endswith("untied"))
    assert model_digest(model.base_model) == model_digest(base.base_model)


def test_an_exported_adapter() -> None:
    expected = EXPECTED["exported_lora_llama"]
    model = EditableModel.from_pretrained(expected["base"])
    model.import_lora(DATA / "exported_lora_llama")
    check(model, expected)
    model.rollback("all")
    assert model_digest(model.base_model) == model_digest(EditableModel.from_pretrained(expected["base"]).base_model)


def test_a_saved_edit_as_a_pack() -> None:
    model = EditableModel.from_pretrained("kedit/world-gpt2")
    model.load_edits(DATA / "rome_gpt2", "old")
    check(model, EXPECTED["rome_gpt2"] | {"ids": [f"old/{i}" for i in EXPECTED["rome_gpt2"]["ids"]]})

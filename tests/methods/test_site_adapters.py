"""Saved edits at sites as PEFT adapters: the same logits, bit for bit, through every door of PEFT and transformers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, pipeline

from hf_kedit import (
    CaliNetConfig,
    DEFERConfig,
    EditableModel,
    EditConfig,
    GRACEConfig,
    MELOConfig,
    TPatcherConfig,
    WISEConfig,
    embedded,
)
from hf_kedit.engine.weights import model_digest
from hf_kedit.errors import ArtifactError, MergeError
from hf_kedit.tokens import pad_rows
from tests.methods.at_sites import facts, neighbours, prompt_logits, says

CONFIGS: dict[str, EditConfig] = {
    "grace": GRACEConfig(num_steps=12),
    "defer": DEFERConfig(layers=[3], lr=1e-2, num_steps=12),
    "melo": MELOConfig(layers=[2], radius=1.0, num_blocks=20, num_steps=12),
    "wise": WISEConfig(n_iter=8, context_templates=["{}"], save_freq=2, merge_freq=2, irrelevant_texts=["It rains."]),
    "tpatch": TPatcherConfig(max_epochs=100, memory_tokens=500),
    "calinet": CaliNetConfig(layers=[4, 5], slots=8, num_steps=15, context_templates=["{}"]),
}


def base() -> Any:
    return AutoModelForCausalLM.from_pretrained(embedded.path("world-gpt2"))


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def edited(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[EditableModel, Path]:
    model = EditableModel.from_pretrained("kedit/world-gpt2", CONFIGS[request.param])
    model.edit(facts(3), batch_size=1)
    folder = tmp_path_factory.mktemp("edits") / request.param
    model.save_pretrained(folder)
    return model, folder


def texts() -> list[str]:
    return [f.filled_prompt for f in facts(2)] + neighbours(facts(2))


def same(model: EditableModel, other: Any) -> bool:
    ids = [model.tokenizer(t, return_tensors="pt")["input_ids"] for t in texts()]  # type: ignore[misc]
    with torch.no_grad():
        return all(torch.equal(other(i).logits, model(input_ids=i).logits) for i in ids)


def test_peft_loads_the_folder(edited: Any) -> None:
    model, folder = edited
    assert PeftConfig.from_pretrained(str(folder)).peft_type.value == f"KEDIT_{folder.name.upper()}"
    plain = base()
    digest = model_digest(plain)
    loaded = PeftModel.from_pretrained(plain, str(folder))
    assert same(model, loaded)
    rows = [model.tokenizer(t)["input_ids"] for t in texts()]
    batch = pad_rows(rows, 0, "left")
    out = loaded.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
    )
    said = model.tokenizer.batch_decode(out[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    assert [t.strip() for t in said] == says(model, texts())
    with loaded.disable_adapter(), model.disable_edits():
        assert same(model, loaded)
    with pytest.raises(MergeError, match="unload"):
        loaded.merge_and_unload()
    bare = loaded.unload()
    with model.disable_edits():
        assert same(model, bare) and model_digest(bare) == digest
    assert "generate" not in bare.__dict__


def test_transformers_loads_the_folder(edited: Any) -> None:
    model, folder = edited
    plain = base()
    plain.load_adapter(str(folder))
    assert same(model, plain)
    prompt = facts(1)[0].filled_prompt
    text = pipeline("text-generation", model=plain, tokenizer=model.tokenizer)(
        prompt, max_new_tokens=6, do_sample=False, return_full_text=False
    )[0]["generated_text"]
    assert text.strip().startswith(says(model, [prompt])[0])
    plain.disable_adapters()
    with model.disable_edits():
        assert same(model, plain)
    plain.enable_adapters()
    assert same(model, plain)


def test_adapters_are_switched_saved_and_deleted(edited: Any, tmp_path: Path) -> None:
    model, folder = edited
    loaded = PeftModel.from_pretrained(base(), str(folder))
    loaded.load_adapter(str(folder), adapter_name="second")
    loaded.set_adapter("second")
    assert same(model, loaded)
    loaded.save_pretrained(str(tmp_path))
    loaded.delete_adapter("default")
    assert same(model, loaded)
    again = PeftModel.from_pretrained(base(), str(tmp_path / "second"))
    assert same(model, again)


def test_tensors_are_saved_once(edited: Any, tmp_path: Path) -> None:
    model, folder = edited
    assert not load_file(folder / "edit_model.safetensors")
    assert set(load_file(folder / "adapter_model.safetensors")) == {
        f"base_model.model.{name}" for name in model.sites.tensors()
    }
    model.save_pretrained(folder)  # again, over the old files
    assert "import hf_kedit" in (folder / "README.md").read_text()
    loaded = EditableModel.from_pretrained(folder)
    assert torch.equal(prompt_logits(loaded, texts()[0]), prompt_logits(model, texts()[0]))
    for name in ("adapter_model.safetensors", "adapter_config.json", "edit_config.json", "edits.jsonl"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "edit_model.safetensors").write_bytes((folder / "edit_model.safetensors").read_bytes())
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(ArtifactError, match="interrupted save"):
        EditableModel.from_pretrained(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["", "assert importlib.util.find_spec('peft')"])  # transformers asks so
def test_types_are_known_when_peft_is_imported_later(first: str) -> None:
    script = f"""
import importlib.util, sys
import hf_kedit
assert "peft" not in sys.modules
{first}
import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as known
kinds = {{"KEDIT_GRACE", "KEDIT_DEFER", "KEDIT_MELO", "KEDIT_WISE", "KEDIT_TPATCH", "KEDIT_CALINET"}}
assert kinds <= set(known), sorted(known)
assert not any("hf_kedit" in type(finder).__module__ for finder in sys.meta_path)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr

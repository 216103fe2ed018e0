"""Saved edits: a fresh process gives the same logits; damage and wrong bases are found before anything changes."""

from __future__ import annotations

import json
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from hf_kedit import EditableModel, EditRequest, FTMConfig, MEMITConfig, load_edit_dataset
from hf_kedit.artifact.layout import CONFIG, JOURNAL, WEIGHTS
from hf_kedit.engine.weights import model_digest
from hf_kedit.errors import ArtifactError, BaseModelMismatchError, KeditError, WeightError
from tests.models import tiny_model

from .test_files_of_0_1_0 import DATA

PROBE = torch.tensor([[5, 6, 7, 8, 9]])


def facts(count: int, start: int = 0) -> list[EditRequest]:
    rows = load_edit_dataset("world", split="test", limit=start + count)
    return [EditRequest.from_dict(rows[i]) for i in range(start, start + count)]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=PROBE).logits


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = EditableModel.from_pretrained("kedit/world-gpt2", "rome")
    model.edit(facts(2))
    model.save_pretrained(tmp_path / "edits")
    return tmp_path / "edits"


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("kedit/world-gpt2", "rome"),
        pytest.param("kedit/world-llama", "memit", marks=pytest.mark.slow),
        ("kedit/world-llama", "lora"),
        ("kedit/world-gpt2", FTMConfig(layers=[1, 3], lr=1e-3, num_steps=3, train_bias=True)),
    ],
)
def test_a_fresh_process_gives_the_same_logits(name: str, config: Any, tmp_path: Path) -> None:
    model = EditableModel.from_pretrained(name, config)
    digest = model_digest(model.base_model)
    ids = model.edit(facts(3)).ids
    model.save_pretrained(tmp_path / "edits")
    save_file({"logits": logits(model)}, tmp_path / "expected.safetensors")
    script = f"""
import torch
from safetensors.torch import load_file
from hf_kedit import EditableModel
from hf_kedit.engine.weights import model_digest
model = EditableModel.from_pretrained({str(tmp_path / "edits")!r})
with torch.no_grad():
    logits = model(input_ids=torch.tensor({PROBE.tolist()})).logits
assert torch.equal(logits, load_file({str(tmp_path / "expected.safetensors")!r})["logits"]), "other logits"
assert [e.id for e in model.edits] == {ids!r}
assert model.method_name == {model.method_name!r}
model.rollback("all")
assert model_digest(model.base_model) == {digest!r}
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_a_loaded_model_continues_its_journal(saved: Path, tmp_path: Path) -> None:
    model = EditableModel.from_pretrained(saved)
    first = [e.id for e in model.edits]
    assert model.method_name == "rome" and len(first) == 2
    fact = facts(1, start=2)[0]
    new = model.edit(fact).ids
    assert [e.id for e in model.edits] == first + new
    model.save_pretrained(saved)  # over the old one
    again = EditableModel.from_pretrained(saved, "memit")
    assert torch.equal(logits(again), logits(model)) and again.method_name == "memit"
    again.rollback(first[0])
    model.rollback(first[0])
    assert torch.equal(logits(again), logits(model))
    assert again.edits[-1].request.filled_prompt == fact.filled_prompt
    assert again.edits[-1].diagnostics["loss"] == model.edits[-1].diagnostics["loss"]
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    assert {p.name for p in saved.iterdir()} == {CONFIG, WEIGHTS, JOURNAL, "README.md"} | adapter
    assert not [p for p in saved.parent.iterdir() if p.name.startswith(".edits")]


def test_the_files_say_what_was_done(saved: Path) -> None:
    config = json.loads((saved / CONFIG).read_text())
    assert config["method"] == "rome" and config["num_edits"] == 2
    assert config["base_model_name_or_path"] == "kedit/world-gpt2"
    assert config["hparams"]["layers"] and all(m["rank"] == 2 for m in config["modules"].values())
    tensors = load_file(saved / WEIGHTS)
    assert all(t.dtype == torch.float32 for t in tensors.values())
    card = (saved / "README.md").read_text()
    for line in (saved / JOURNAL).read_text().splitlines():
        edit = json.loads(line)
        assert edit["target_new"] in card and edit["edit_id"] in card
    assert "library_name: hf_kedit" in card and str(saved.parent) not in card


def test_single_edits_and_batches_of_memit_are_rolled_back_after_loading(tmp_path: Path) -> None:
    model = EditableModel.from_pretrained("kedit/world-gpt2", "memit")
    ids = model.edit(facts(4), batch_size=2).ids
    model.save_pretrained(tmp_path / "edits")
    loaded = EditableModel.from_pretrained(tmp_path / "edits")
    for victim in (ids[2], ids[0], ids[3]):
        model.rollback(victim)
        loaded.rollback(victim)
        assert model_digest(model.base_model) == model_digest(loaded.base_model)


def test_a_model_in_memory_needs_its_base_when_loaded(tmp_path: Path) -> None:
    tokenizer = EditableModel.from_pretrained("kedit/world-gpt2").tokenizer

    def base() -> Any:
        return tiny_model("llama", vocab_size=len(tokenizer))

    model = EditableModel(base(), FTMConfig(layers=[1], lr=1e-2, num_steps=2), tokenizer)
    model.edit(prompt="The sky is", target_new="green")
    model.save_pretrained(tmp_path / "edits")
    with pytest.raises(ArtifactError, match="base_model="):
        EditableModel.from_pretrained(tmp_path / "edits")
    loaded = EditableModel.from_pretrained(tmp_path / "edits", base_model=base(), tokenizer=tokenizer)
    assert torch.equal(logits(loaded), logits(model))
    other = tiny_model("llama", vocab_size=len(tokenizer), seed=1)
    digest = model_digest(other)
    with pytest.raises(BaseModelMismatchError, match="not the one"):
        EditableModel.from_pretrained(tmp_path / "edits", base_model=other, tokenizer=tokenizer)
    assert model_digest(other) == digest
    EditableModel.from_pretrained(tmp_path / "edits", base_model=other, tokenizer=tokenizer, ignore_fingerprint=True)
    assert model_digest(other) != digest


def test_the_wrong_architecture_is_explained(saved: Path) -> None:
    from transformers import AutoModelForCausalLM

    from hf_kedit import embedded

    llama = AutoModelForCausalLM.from_pretrained(embedded.path("world-llama"))
    with pytest.raises(BaseModelMismatchError, match="GPT2LMHeadModel"):
        EditableModel.from_pretrained(saved, base_model=llama)
    edited = EditableModel.from_pretrained(saved).merge_and_unload()
    digest = model_digest(edited)
    with pytest.raises(BaseModelMismatchError, match="already edited"):
        EditableModel.from_pretrained(saved, base_model=edited)
    assert model_digest(edited) == digest


def _edit_config(folder: Path, change: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))


def _piece(config: Any) -> Any:
    return next(iter(config["modules"].values()))["pieces"][0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / WEIGHTS).unlink(), "missing"),
        (lambda f: (f / JOURNAL).unlink(), "missing"),
        (lambda f: (f / CONFIG).write_text("{"), "not JSON"),
        (lambda f: (f / CONFIG).write_text("[]"), "object"),
        (lambda f: (f / WEIGHTS).write_bytes(b"\0" * 100), "interrupted save"),
        (lambda f: (f / JOURNAL).write_text(""), "interrupted save"),
        (lambda f: _edit_config(f, lambda c: c.update(format_version=99)), "upgrade"),
        (lambda f: _edit_config(f, lambda c: c.update(artifact="merged")), "merged"),
        (lambda f: _edit_config(f, lambda c: c.pop("modules")), "modules"),
        (lambda f: _edit_config(f, lambda c: _piece(c).update(stop=99)), "do not fit"),
        (lambda f: _edit_config(f, lambda c: _piece(c).update(storage="pickle")), "unknown storage"),
        (lambda f: _edit_config(f, lambda c: _piece(c).update(edits=["stranger"])), "not in"),
        (lambda f: _edit_config(f, lambda c: _piece(c).pop("storage")), "damaged"),
        (lambda f: _edit_config(f, lambda c: c.update(hparams={"v_lrr": 1})), "v_lrr"),
    ],
)
def test_damaged_folders(damage: Any, message: str, saved: Path) -> None:
    damage(saved)
    with pytest.raises(KeditError, match=message):
        EditableModel.from_pretrained(saved)


def test_names_in_a_file_are_not_used_as_paths(saved: Path) -> None:
    def rename(config: Any) -> None:
        entry = next(iter(config["modules"].values()))
        entry["module"] = "../../etc"
        config["modules"] = {"../../etc.weight": entry}

    _edit_config(saved, rename)
    with pytest.raises(BaseModelMismatchError, match="no such parameter"):
        EditableModel.from_pretrained(saved)


def test_where_edits_cannot_be_saved(saved: Path, tmp_path: Path) -> None:
    model = EditableModel.from_pretrained(saved)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="is a file"):
        model.save_pretrained(tmp_path / "file")
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match="twice"):
        model.save_pretrained(tmp_path / "merged")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    with pytest.raises(ArtifactError, match="an adapter"):
        model.save_pretrained(tmp_path / "lora")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep me")
    model.save_pretrained(tmp_path / "notes")
    assert (tmp_path / "notes" / "mine.txt").read_text() == "keep me"
    assert torch.equal(logits(EditableModel.from_pretrained(tmp_path / "notes")), logits(model))


def test_an_adapter_lies_beside_low_rank_edits_only(saved: Path, tmp_path: Path) -> None:
    adapter = ("adapter_config.json", "adapter_model.safetensors")
    assert all((saved / name).is_file() for name in adapter)
    model = EditableModel.from_pretrained(saved, FTMConfig(layers=[1], num_steps=1))
    (saved / "notes.txt").write_text("keep me")  # now single files are replaced, not the folder
    model.edit(facts(3)[2])
    model.save_pretrained(saved)
    assert not any((saved / name).exists() for name in adapter), "the old adapter would lack the new edit"
    assert torch.equal(logits(EditableModel.from_pretrained(saved)), logits(model))


def test_folders_that_are_neither(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="neither"):
        EditableModel.from_pretrained(tmp_path)
    MEMITConfig().save_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match="method's config"):
        EditableModel.from_pretrained(tmp_path)


def test_half_precision_round_trip(tmp_path: Path) -> None:
    model = EditableModel.from_pretrained("kedit/world-gpt2", "rome", dtype=torch.bfloat16)
    model.edit(facts(1))
    model.save_pretrained(tmp_path / "edits")
    loaded = EditableModel.from_pretrained(tmp_path / "edits")
    assert next(loaded.base_model.parameters()).dtype == torch.bfloat16
    assert model_digest(loaded.base_model) == model_digest(model.base_model)


HOSTILE = {
    "id": "a`|\r# Heading\n<img src=x>",
    "prompt": "[here](javascript:alert(1)) <script>alert(1)</script> {} says\x1b]0;title\x07 ![x](http://x/y.png) \\|",
    "subject": "Tarosk Boayond",
    "target_new": "plumber | **x**\u202e\n# Heading",
    "ground_truth": ["<b>\r\n---\r\n"],
}


def test_a_card_shows_texts_as_texts(tmp_path: Path) -> None:
    from markdown_it import MarkdownIt

    model = EditableModel.from_pretrained("kedit/world-gpt2", FTMConfig(layers=[1], num_steps=1))
    model.base_model_id = "a/b`<script>\n# Base"
    model.edit(HOSTILE)
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert not {c for c in card.text if unicodedata.category(c) in ("Cc", "Cf")} - {"\n"}
    page = MarkdownIt("commonmark").enable("table").parse(card.text)
    titles = [page[i + 1].content for i, token in enumerate(page) if token.type == "heading_open"]
    assert titles[1:] == ["Use", "Undo", "What it was made on"]
    parts = [part for token in page for part in [token, *(token.children or ())]]
    assert not [p for p in parts if p.type in ("html_inline", "html_block", "image", "strong_open", "em_open")]
    assert {p.attrs["href"] for p in parts if p.type == "link_open"} == {"edits.jsonl"}
    rows = [page[i : i + 16] for i, token in enumerate(page) if token.type == "tr_open"]
    assert len(rows) == 2 and all([t.type for t in row].count("inline") == 5 for row in rows)
    shown = ["".join(p.content for p in t.children or ()) for t in rows[1] if t.type == "inline"]
    assert shown[0] == "a`| # Heading <img src=x>" and shown[3] == "plumber | **x**\\u202e # Heading"
    assert shown[1].startswith("[here](javascript:alert(1)) <script>") and shown[1].endswith("\\|")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda e: e.request.metadata.update(when=torch.ones(2)), "metadata"),
        (lambda e: e.request.metadata.update(text="\ud83d"), "metadata"),
        (lambda e: e.diagnostics.update(loss=torch.ones(1)), "diagnostics"),
        (lambda e: setattr(e, "created", "\ud83d"), "created"),
    ],
)
def test_what_became_unsaveable_is_named(change: Any, field: str, tmp_path: Path) -> None:
    model = EditableModel.from_pretrained(DATA / "rome_gpt2")
    model.edits[1].request.metadata = {}
    change(model.edits[1])
    with pytest.raises(ArtifactError, match=rf"'fact-1' cannot be saved: its '{field}'"):
        model.save_pretrained(tmp_path / "edits")
    assert not (tmp_path / "edits").exists()


def test_weights_that_were_trained_since_are_not_saved(tmp_path: Path) -> None:
    model = EditableModel.from_pretrained(DATA / "rome_gpt2")
    (key,) = model.ledger.accounts
    with torch.no_grad():
        model.base_model.get_parameter(key)[0, 0] += 1.0
    with pytest.raises(WeightError, match="no longer what the edits made of it"):
        model.save_pretrained(tmp_path / "edits")
    assert not (tmp_path / "edits").exists()

"""A SERAC editor that a few steps have trained: training, files, editing with it, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

from hf_kedit import EditableModel, EditRequest, EditTrainer, EditTrainingArguments, SERACConfig, load_edit_dataset
from hf_kedit.editors.editor import Editor
from hf_kedit.errors import ArtifactError, ConfigError, UnsupportedModelError
from hf_kedit.loading import load_base, load_tokenizer
from hf_kedit.methods.serac import SERACEditor
from tests.golden_cases import load_model

FACTS = load_edit_dataset("world", split="train", limit=16)
SMALL: dict[str, Any] = {"encoder_size": 32, "encoder_layers": 1, "model_size": 32, "model_layers": 1}
PROMPT = "Coaquaisk Droanos has a job at"


def train(folder: Path, steps: int = 4, base: Any = None, tokenizer: Any = None, **config: Any) -> EditTrainer:
    base = base if base is not None else load_base("kedit/world-gpt2")
    editor = SERACEditor.for_model(base, SERACConfig(**{**SMALL, **config}))
    settings: dict[str, Any] = {"max_steps": steps, "per_device_train_batch_size": 8, "report_to": [], "use_cpu": True}
    settings |= {"learning_rate": 3e-3, "logging_steps": 1, "disable_tqdm": True, "save_strategy": "no"}
    args = EditTrainingArguments(output_dir=str(folder), edits_per_group=8, **settings)
    trainer = EditTrainer(editor, args, FACTS, FACTS, tokenizer or load_tokenizer("kedit/world-gpt2"))
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serac")
    train(folder).save_model()
    return folder


@pytest.mark.parametrize("similarity", ["exp_square", "exp", "cosine", "cross"])
def test_both_losses_fall(tmp_path: Path, similarity: str) -> None:
    trainer = train(tmp_path, steps=8, similarity=similarity)
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert rows[-1]["edit_loss"] < rows[0]["edit_loss"]
    assert min(r["locality_loss"] for r in rows[-3:]) < rows[0]["locality_loss"]
    assert all(p.grad is None for p in trainer.model.base.parameters())
    scores, editor = trainer.evaluate(), trainer.model.eval()
    with torch.no_grad():  # the facts of a batch are one memory
        rows = torch.cat([editor(**batch).metrics for batch in trainer.get_eval_dataloader()])
    for i, name in enumerate(("edit_success", "generalization", "locality")):
        assert scores[f"eval_{name}"] == pytest.approx(float(rows[:, i].mean()), abs=1e-6)


def test_one_network_alone_can_be_trained(tmp_path: Path) -> None:
    start = SERACEditor.for_model(load_base("kedit/world-gpt2"), SERACConfig(**SMALL))
    for weights, still in (({"edit_weight": 0.0}, "reader"), ({"locality_weight": 0.0}, "scope")):
        trainer = train(tmp_path, steps=1, **weights)
        moved = {n.split(".")[0] for n, p in trainer.model.named_parameters() if not torch.equal(p, _of(start, n))}
        assert moved == {"reader", "scope"} - {still}


def _of(editor: torch.nn.Module, name: str) -> torch.Tensor:
    return dict(editor.named_parameters())[name]


def test_wordings_of_another_fact_are_no_negatives() -> None:
    base, tokenizer = load_base("kedit/world-gpt2"), load_tokenizer("kedit/world-gpt2")
    editor = SERACEditor.for_model(base, SERACConfig(**SMALL))
    editor.use_tokenizer(tokenizer)
    edits = [EditRequest(prompt=p, target_new="x", rephrase_prompts=[f"{p} b"]) for p in ("one", "two")]
    unrelated = [EditRequest(prompt=p, target_new="y") for p in ("two b", "three")]
    batches = editor.batches(base, tokenizer, edits, edits, unrelated)
    assert batches["locality"]["apart"].tolist() == [[True, False], [True, True]]


def test_a_saved_editor_is_the_same_and_edits(trained: Path, tmp_path: Path) -> None:
    saved = Editor.from_pretrained(trained)
    assert isinstance(saved, SERACEditor)
    assert {p.name for p in trained.iterdir()} >= {
        "edit_config.json",
        "editor.safetensors",
        "tokenizer.json",
        "README.md",
    }
    card = (trained / "README.md").read_text(encoding="utf-8")
    assert "No module of the model is changed" in card and "gradient" not in card
    model = EditableModel.from_pretrained("kedit/world-gpt2", SERACConfig(editor=str(trained), threshold=0.9))
    tokens = model.tokenizer([PROMPT, "By profession Fulex Tudias is a"], return_tensors="pt", padding=True)
    with torch.no_grad():
        before = model(**tokens).logits
    ids = model.edit(
        [EditRequest(prompt=PROMPT, target_new="Rovi"), EditRequest(prompt="Rovi is in", target_new="x")]
    ).ids
    with torch.no_grad():
        after = model(**tokens).logits
        wanted = saved.reader(**model.tokenizer(f"{PROMPT} Rovi {PROMPT}", return_tensors="pt")).logits[0, -1]
    last = int(tokens["attention_mask"][0].sum()) - 1
    assert torch.allclose(after[0, last], wanted, atol=1e-5)
    assert model.edits[0].diagnostics["scope_classifier"].startswith("serac:")
    model.save_pretrained(tmp_path / "edits")
    code = (
        "import sys, torch; from hf_kedit import EditableModel\n"
        f"model = EditableModel.from_pretrained({str(tmp_path / 'edits')!r})\n"
        f"texts = {[PROMPT, 'By profession Fulex Tudias is a']!r}\n"
        "tokens = model.tokenizer(texts, return_tensors='pt', padding=True)\n"
        "with torch.no_grad(): torch.save(model(**tokens).logits, sys.argv[1])\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "logits.pt")], check=True, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), after)
    model.rollback(ids[0])
    model.rollback("all")
    with torch.no_grad():
        assert torch.equal(model(**tokens).logits, before)


def test_an_editor_trained_anew_is_noticed(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "editor"
    Editor.from_pretrained(trained).save_pretrained(folder)
    model = EditableModel.from_pretrained("kedit/world-gpt2", SERACConfig(editor=str(folder)))
    model.edit(prompt=PROMPT, target_new="Rovi")
    model.save_pretrained(tmp_path / "edits")
    other = Editor.from_pretrained(trained)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    other.save_pretrained(folder)
    from hf_kedit.books import retrieval
    from hf_kedit.methods import serac

    retrieval._REGISTERED.pop(model.edits[0].diagnostics["scope_classifier"])
    serac._by_name.cache_clear()
    with pytest.raises(ArtifactError, match="trained anew"):
        EditableModel.from_pretrained(tmp_path / "edits")


def test_networks_can_start_from_others(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("kedit/world-gpt2")
    bert = BertModel(BertConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=1))
    bert.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    base = load_base("kedit/world-gpt2")
    small = str(Path(base.config.name_or_path))
    config = SERACConfig(encoder=str(tmp_path), small_model=small, pooling="first", template="New Fact: {}\nPrompt: ")
    editor = SERACEditor.for_model(base, config)
    assert torch.equal(editor.scope.encoder.get_input_embeddings().weight, bert.get_input_embeddings().weight)
    assert torch.equal(editor.reader.lm_head.weight, base.lm_head.weight)
    editor.save_pretrained(tmp_path / "editor")
    again = SERACEditor.from_pretrained(tmp_path / "editor")
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in editor.state_dict().items())
    ours = SERACEditor.for_model(base, SERACConfig(small_model="kedit/world-gpt2"))
    assert torch.equal(ours.reader.lm_head.weight, base.lm_head.weight)
    for field in ("encoder", "small_model"):
        with pytest.raises(ConfigError, match=f"SERACConfig.{field}: './no/such' cannot be loaded"):
            SERACEditor.for_model(base, SERACConfig(**{field: "./no/such"}))


def test_an_encoder_decoder_trains_and_answers(tmp_path: Path) -> None:
    base, tokenizer = load_model("t5")
    train(tmp_path, steps=2, base=base, tokenizer=tokenizer).save_model()
    model = EditableModel(load_model("t5")[0], SERACConfig(editor=str(tmp_path)), tokenizer)
    tokens = tokenizer([PROMPT, "water"], return_tensors="pt", padding=True)
    before = model.generate(**tokens, max_new_tokens=4, do_sample=False)
    model.edit(prompt=PROMPT, target_new="Rovi")
    (first, _) = model.prompts.route([PROMPT, "water"])
    assert first is not None
    text = tokenizer(f"{PROMPT} Rovi {PROMPT}", return_tensors="pt")
    wanted = first.model.generate(**text, max_new_tokens=4, do_sample=False)
    found = model.generate(**tokens, max_new_tokens=4, do_sample=False)
    assert found[0, : wanted.shape[1]].tolist() == wanted[0].tolist()
    model.rollback("all")
    assert torch.equal(model.generate(**tokens, max_new_tokens=4, do_sample=False), before)


def test_what_does_not_fit_is_refused(trained: Path) -> None:
    model, tokenizer = load_model("gpt2")
    with pytest.raises(UnsupportedModelError, match="2000 tokens"):
        EditableModel(model, SERACConfig(editor=str(trained)), tokenizer)
    with pytest.raises(UnsupportedModelError, match="made for a decoder-only"):
        EditableModel(load_model("t5")[0], SERACConfig(editor=str(trained)), tokenizer)
    with pytest.raises(ArtifactError, match="no trained editor"):
        EditableModel.from_pretrained("kedit/world-gpt2", SERACConfig(editor=str(trained.parent)))
    with pytest.raises(ConfigError, match="scope_text"):
        SERACConfig(scope_text="{target}")


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_packaged_editors_edit_out_of_the_box(name: str) -> None:
    """Ten facts in memory: each is said and so are its other wordings; what is unrelated stays bit for bit."""
    facts = load_edit_dataset("world", split="test", limit=10).remove_columns("id")
    model = EditableModel.from_pretrained(f"kedit/world-{name}", "serac")
    model.edit(facts)
    rows = [EditRequest.from_dict(f) for f in facts]
    right = [says(model, p, r.target_new) for r in rows for p in (r.filled_prompt, *r.rephrase_prompts)]
    assert sum(right) / len(right) >= 0.9
    unrelated = [p.prompt for r in rows for axis in ("Neighborhood", "Shared_Name") for p in r.locality[axis]]
    caught = [found for found in model.prompts.route(unrelated) if found is not None]
    assert len(caught) <= len(unrelated) // 50


def says(model: EditableModel, prompt: str, answer: str) -> bool:
    tokens = model.tokenizer(prompt, return_tensors="pt")
    found = model.generate(**tokens, max_new_tokens=8, do_sample=False)
    text = model.tokenizer.decode(found[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip().startswith(answer)

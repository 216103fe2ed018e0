"""What MALMEN and KE do beyond the recorded numbers: groups, chunks, texts of changes, training through Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_kedit import EditableModel, EditRequest, EditTrainer, EditTrainingArguments, load_edit_dataset
from hf_kedit.errors import ConfigError
from hf_kedit.loading import load_base, load_tokenizer
from hf_kedit.methods.editor import Editor, editor_class
from hf_kedit.methods.ke import KEConfig, KEEditor, present_answer
from hf_kedit.methods.malmen import MALMENConfig, MALMENEditor, ridge_solve

FACTS = load_edit_dataset("world", split="train", limit=12)
SMALL: dict[str, Any] = {
    "malmen": MALMENConfig(layers=[5], rank=4, edit_lr=1e-3, micro_batch=2, rows=5),
    "ke": KEConfig(layers=[5], lstm_size=8, condition_size=8, hidden_size=8),
}


def train(method: str, folder: Path, **arguments: Any) -> EditTrainer:
    editor = editor_class(method).for_model(load_base("kedit/world-gpt2"), SMALL[method])
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, "report_to": [], "disable_tqdm": True}
    args = EditTrainingArguments(output_dir=str(folder), use_cpu=True, logging_steps=1, **{**settings, **arguments})
    trainer = EditTrainer(editor, args, FACTS, processing_class=load_tokenizer("kedit/world-gpt2"))
    trainer.train()
    return trainer


@pytest.mark.parametrize("method", ["malmen", "ke"])
def test_trains_saves_and_edits(method: str, tmp_path: Path) -> None:
    together = {"edits_per_group": 4} if method == "malmen" else {}
    trainer = train(method, tmp_path, learning_rate=1e-3, **together)
    assert all(p.grad is None for p in trainer.model.base.parameters())
    trainer.save_model()
    saved = Editor.from_pretrained(tmp_path)
    assert all(torch.equal(v, saved.state_dict()[k]) for k, v in trainer.model.state_dict().items())
    config = type(SMALL[method])(editor=str(tmp_path))
    model = EditableModel.from_pretrained("kedit/world-gpt2", config)
    before = {n: p.detach().clone() for n, p in model.base_model.named_parameters()}
    result = model.edit(FACTS.select(range(3)))
    touched = {n for n, p in model.base_model.named_parameters() if not torch.equal(p, before[n])}
    assert touched == {"transformer.h.5.mlp.c_fc.weight", "transformer.h.5.mlp.c_proj.weight"}
    model.rollback(result.ids[0])
    model.rollback("all")
    assert all(torch.equal(p, before[n]) for n, p in model.base_model.named_parameters())


def test_malmen_wants_one_group_a_step(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="edits_per_group"):
        train("malmen", tmp_path)


def test_malmen_groups_do_not_see_each_other() -> None:
    base, tokenizer = load_base("kedit/world-gpt2"), load_tokenizer("kedit/world-gpt2")
    editor = MALMENEditor.for_model(base, SMALL["malmen"])
    base.requires_grad_(False)
    requests = [EditRequest(prompt=f["prompt"], target_new=f["target_new"]) for f in FACTS]
    editor.train().observe(base, editor.edit_batch(base, tokenizer, requests))
    editor.eval()
    groups = torch.tensor([0, 0, 1, 1])
    both = editor.propose(base, editor.edit_batch(base, tokenizer, requests[:4]), groups)
    alone = editor.propose(base, editor.edit_batch(base, tokenizer, requests[2:4]), groups[2:])
    for module, change in both.items():
        mine = change.owners >= 2
        assert torch.allclose(change.left[:, mine], alone[module].left, atol=1e-5)
        assert torch.equal(change.owners[mine] - 2, alone[module].owners)


@pytest.mark.parametrize("n", [3, 8, 40])
def test_ridge_solve_takes_the_smaller_side(n: int) -> None:
    keys, values, ridge = torch.randn(n, 8), torch.randn(n, 5), torch.tensor(0.3)
    full = torch.linalg.solve(keys.double() @ keys.double().T + 0.3 * torch.eye(n).double(), values.double())
    assert torch.allclose(ridge_solve(keys, ridge, values), full, rtol=1e-5, atol=1e-6)


def test_ke_reads_what_the_model_says_now() -> None:
    base, tokenizer = load_base("kedit/world-gpt2"), load_tokenizer("kedit/world-gpt2")
    editor = KEEditor.for_model(base, SMALL["ke"])
    assert torch.equal(editor.condition.embedding.weight, base.get_input_embeddings().weight)
    fact = FACTS[0]
    bare = EditRequest(prompt=fact["prompt"], target_new=fact["ground_truth"][0])
    assert present_answer(base, tokenizer, bare).startswith(fact["ground_truth"][0])
    full = EditRequest(prompt=fact["prompt"], target_new="Rovi", ground_truth=["Tann"])
    batch = editor.edit_batch(base, tokenizer, [full])
    wanted = tokenizer(f"Tann >> Rovi || {fact['prompt']}", add_special_tokens=False)["input_ids"]
    assert batch["condition_ids"].tolist() == [wanted]

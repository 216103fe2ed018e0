"""InstructEdit: what is read behind which instruction, and that the instruction reaches the edit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_kedit import (
    EditableModel,
    EditRequest,
    EditTrainer,
    EditTrainingArguments,
    InstructEditConfig,
    embedded,
    load_edit_dataset,
)
from hf_kedit.editors.editor import Editor
from hf_kedit.errors import ConfigError, RequestError
from hf_kedit.loading import load_base, load_tokenizer
from hf_kedit.methods.instructedit import InstructEditEditor, packaged_tasks

FACTS = load_edit_dataset("world", split="train", limit=8)
TASKS = {"employer": ["a company", "the work", "unseen"], "sport": ["a sport"], "mood": ["about {topic}"]}
CONFIG: dict[str, Any] = {"layers": [5], "rank": 4, "edit_lr": 1e-2, "tasks": TASKS, "task_field": "extra.relation"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny editor after two steps; its statistics are filled."""
    folder = tmp_path_factory.mktemp("instructedit")
    tasks = {**TASKS, **{r["metadata"]["extra"]["relation"]: ["x"] for r in rows() if not known(r)}}
    editor = InstructEditEditor.for_model(
        load_base("kedit/world-gpt2"), InstructEditConfig(**{**CONFIG, "tasks": tasks})
    )
    args = EditTrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=4,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = EditTrainer(editor, args, FACTS, processing_class=load_tokenizer("kedit/world-gpt2"))
    trainer.train()
    trainer.save_model()
    return folder


def rows() -> list[dict[str, Any]]:
    from hf_kedit.requests import load_requests

    return [{"prompt": r.filled_prompt, "metadata": r.metadata} for r in load_requests(FACTS)]


def known(row: dict[str, Any]) -> bool:
    return row["metadata"]["extra"]["relation"] in TASKS


def fact(task: str | None = None, **more: Any) -> EditRequest:
    metadata = {**({"extra": {"relation": task}} if task else {}), **more}
    return EditRequest(prompt="Coaquaisk Droanos has a job at", target_new="Rovi", metadata=metadata)


def test_instructions_are_read_and_the_last_is_kept_back() -> None:
    editor = InstructEditEditor.for_model(load_base("kedit/world-gpt2"), InstructEditConfig(**CONFIG))
    editor.eval()
    text = editor.instructed(fact("employer")).filled_prompt
    assert text == "Task: employer\nDescription: a company\nInput: Coaquaisk Droanos has a job at"
    assert editor.instruction(fact("mood", topic="rain")) == ("mood", "about rain")
    editor.train()
    drawn = {
        editor.instruction(EditRequest(prompt=f"p {i}", target_new="x", metadata=fact("employer").metadata))[1]
        for i in range(30)
    }
    assert drawn == {"a company", "the work"}


def test_questions_stand_behind_the_instruction_and_unrelated_prompts_alone() -> None:
    base, tokenizer = load_base("kedit/world-gpt2"), load_tokenizer("kedit/world-gpt2")
    plain = EditRequest(prompt="Coaquaisk Droanos works for", target_new="Rovi")
    for instructed in (True, False):
        config = InstructEditConfig(**CONFIG, instructed_rephrase=instructed)
        editor = InstructEditEditor.for_model(base, config).eval()
        found = editor.batches(base, tokenizer, [fact("sport")], [plain], [plain])
        texts = {name: tokenizer.decode(batch["input_ids"][0]) for name, batch in found.items()}
        assert texts["edit"].startswith("Task: sport\nDescription: a sport\nInput: Coaquaisk")
        assert texts["rephrase"].startswith("Task: sport") == instructed
        assert not texts["locality"].startswith("Task")


def test_the_instruction_reaches_the_edit(trained: Path) -> None:
    changes = []
    for task in ("employer", "sport", "sport"):
        model = EditableModel.from_pretrained("kedit/world-gpt2", InstructEditConfig(editor=str(trained), task=task))
        before = {n: p.detach().clone() for n, p in model.base_model.named_parameters()}
        result = model.edit(fact())
        name = "transformer.h.5.mlp.c_proj.weight"
        changes.append(dict(model.base_model.named_parameters())[name].detach() - before[name])
        model.rollback(result.ids[0])
        assert all(torch.equal(p, before[n]) for n, p in model.base_model.named_parameters())
    assert torch.equal(changes[1], changes[2])
    assert float((changes[0] - changes[1]).norm()) > 1e-3 * float(changes[1].norm()) > 0


def test_editor_keeps_its_tasks_and_edits_in_batches(trained: Path, tmp_path: Path) -> None:
    editor = Editor.from_pretrained(trained)
    assert isinstance(editor, InstructEditEditor) and editor.edit_config.tasks["sport"] == ["a sport"]
    model = EditableModel.from_pretrained("kedit/world-gpt2", InstructEditConfig(editor=str(trained)))
    ids = model.edit([fact("employer"), fact("sport")]).ids
    model.save_pretrained(tmp_path)
    again = EditableModel.from_pretrained(tmp_path)
    tokens = model.tokenizer("Coaquaisk Droanos has a job at", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(again(**tokens).logits, model(**tokens).logits)
    model.rollback(ids[0])
    assert [e.id for e in model.edits] == ids[1:]


def test_what_is_missing_is_said_before_anything_changes(trained: Path) -> None:
    model = EditableModel.from_pretrained("kedit/world-gpt2", InstructEditConfig(editor=str(trained)))
    before = [p.detach().clone() for p in model.base_model.parameters()]
    with pytest.raises(RequestError, match="task is not known"):
        model.edit(fact())
    with pytest.raises(RequestError, match=r"not trained on the task 'sprt'.*sport"):
        model.edit(fact("sprt"))
    with pytest.raises(RequestError, match="topic"):
        model.edit(fact("mood"))
    assert all(torch.equal(p, b) for p, b in zip(model.base_model.parameters(), before, strict=True))
    model.set_method(InstructEditConfig(editor=str(trained), task="sprt", description="what somebody plays"))
    model.edit(fact())
    with pytest.raises(ConfigError, match=r"\{task\}"):
        InstructEditConfig(template="{description} {prompt}")


def test_packaged_descriptions() -> None:
    tasks = packaged_tasks()
    assert set(tasks) == {"convsent", "counterfact", "wikirecent", "zsre"}
    assert tasks == json.loads(embedded.instructions().read_text(encoding="utf-8"))
    assert all(len(texts) == 10 == len(set(texts)) for texts in tasks.values())

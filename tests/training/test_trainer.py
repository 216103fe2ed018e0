"""EditTrainer on an embedded model: what it trains, what it leaves alone, resuming, stopping, several processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback

from hf_kedit import EditRequest, EditTrainer, EditTrainingArguments, load_edit_dataset
from hf_kedit.engine.gradients import low_rank_paths
from hf_kedit.engine.running import RunningNorm
from hf_kedit.engine.supervised import score
from hf_kedit.errors import ConfigError, RequestError
from hf_kedit.loading import load_base, load_tokenizer
from hf_kedit.methods.mend import MENDConfig, MENDEditor
from hf_kedit.training import EditFacts

FACTS = load_edit_dataset("world", split="train").select(range(24))
CHECK = load_edit_dataset("world", split="validation").select(range(7))


def make_trainer(folder: Path, **arguments: Any) -> EditTrainer:
    """A small editor of the last block of world-gpt2; each call starts from the same numbers."""
    base = load_base("kedit/world-gpt2")
    editor = MENDEditor.for_model(base, MENDConfig(rank=8, edit_lr=1e-3, layers=[5]))
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "use_cpu": True,
    }
    callbacks = arguments.pop("callbacks", None)
    args = EditTrainingArguments(output_dir=str(folder), **{**settings, **arguments})
    return EditTrainer(editor, args, FACTS, CHECK, load_tokenizer("kedit/world-gpt2"), callbacks=callbacks)


def losses(trainer: EditTrainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_training_touches_the_editor_only(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=2, gradient_accumulation_steps=2)
    base = trainer.model.base
    before = {n: p.detach().clone() for n, p in base.named_parameters()}
    start = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    assert all(torch.equal(p, before[n]) for n, p in base.named_parameters())
    assert all(p.requires_grad and p.grad is None for p in base.parameters())
    assert not any(m._forward_hooks for m in base.modules())
    assert not any(n.startswith("_base") for n in trainer.model.state_dict())
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, start[n])}
    assert "edit_lrs" in moved and any(n.endswith("bias") for n in moved)
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    assert rates == [1e-3, 1e-4]
    assert {"edit_loss", "locality_loss"} <= trainer.state.log_history[0].keys()


def test_resuming_gives_the_same_run(tmp_path: Path) -> None:
    straight = make_trainer(tmp_path / "a", max_steps=16)
    straight.train()
    first = make_trainer(tmp_path / "b", max_steps=16, save_strategy="steps", save_steps=7)
    first.add_callback(_StopAt(7))
    first.train()
    second = make_trainer(tmp_path / "b", max_steps=16)
    second.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-7"))
    assert losses(second) == losses(straight)
    for (name, value), other in zip(
        straight.model.state_dict().items(), second.model.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), name


class _StopAt(EarlyStoppingCallback):
    """Ends a run after some steps, as a killed process would after its last checkpoint."""

    def __init__(self, step: int):
        super().__init__()
        self.step = step

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        pass

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def test_evaluation_counts_every_fact_once(tmp_path: Path) -> None:
    """Seven facts in batches of three: the mean over the facts one by one."""
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.train()
    found = trainer.evaluate()
    editor, facts = trainer.model.eval(), trainer.eval_dataset
    with torch.no_grad():
        rows = torch.cat([editor(**trainer.data_collator([facts[i]])).metrics for i in range(len(facts))])
    for i, name in enumerate(("edit_success", "generalization", "locality", "drawdown")):
        assert found[f"eval_{name}"] == pytest.approx(float(rows[:, i].mean()), abs=1e-6)
    assert 0 < found["eval_locality"] <= 1


def test_stops_early_and_returns_to_the_best(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        max_steps=20,
        learning_rate=1.0,  # spoils the networks at once
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )
    trainer.train()
    assert trainer.state.global_step < 20
    evaluated = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(evaluated), rel=1e-5)


def test_two_processes_are_one_with_a_doubled_batch(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import sys; from pathlib import Path\n"
        "import torch; torch.set_num_threads(1)\n"
        "from tests.training.test_trainer import make_trainer\n"
        "trainer = make_trainer(Path(sys.argv[1]), max_steps=4, ddp_find_unused_parameters=False)\n"
        "trainer.train(); trainer.save_model()\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*command, str(script), str(tmp_path / "two")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    one = make_trainer(tmp_path / "one", max_steps=4, per_device_train_batch_size=4)
    one.train()
    two = MENDEditor.from_pretrained(tmp_path / "two")
    for (name, value), other in zip(one.model.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.allclose(value, other, rtol=1e-3, atol=1e-4), name


def test_at_the_start_an_edit_is_a_gradient_step() -> None:
    """Positive step sizes lower the loss of what is edited."""
    base, tokenizer = load_base("kedit/world-gpt2"), load_tokenizer("kedit/world-gpt2")
    editor = MENDEditor.for_model(base, MENDConfig(rank=8, edit_lr=1e-3)).train()
    edit = editor.edit_batch(base, tokenizer, EditFacts(FACTS).requests[:6])
    base.requires_grad_(False)
    with torch.no_grad():
        changes = editor.propose(base, edit, torch.arange(6))
        before = score(base, edit).per_row()
        with low_rank_paths(base, changes, torch.arange(6)):
            after = score(base, edit).per_row()
    assert bool((after < before).all())


def test_facts_need_locality() -> None:
    fact = EditRequest(prompt="Anna lives in", target_new="Rome")
    with pytest.raises(RequestError, match=r"row 0.*locality"):
        EditFacts([fact])
    assert EditFacts([fact], needs_locality=False)[0].rephrase.prompt == "Anna lives in"


def test_what_is_drawn_depends_on_seed_epoch_and_index_only() -> None:
    one, other = EditFacts(FACTS, seed=3), EditFacts(FACTS, seed=3)
    other[5]
    assert [one[i] for i in range(10)] == [other[i] for i in range(10)]
    first = [one[i].locality.prompt for i in range(10)]
    one.epoch = 1
    assert [one[i].locality.prompt for i in range(10)] != first


@pytest.mark.parametrize(
    ("field", "value"), [("remove_unused_columns", True), ("activation_checkpointing", True), ("edits_per_group", 3)]
)
def test_arguments_that_cannot_work(tmp_path: Path, field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        EditTrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=2, **{field: value})


def test_running_norm_merges_batches() -> None:
    rows = torch.randn(30, 5) * torch.tensor([1.0, 10.0, 0.1, 1.0, 0.0]) + 3
    norm = RunningNorm(5).train()
    for part in (rows[:1], rows[1:1], rows[1:12], rows[12:]):
        norm.update(part)
    assert torch.allclose(norm.mean, rows.mean(0), atol=1e-6)
    assert torch.allclose(norm.std, rows.std(0), rtol=1e-4, atol=1e-6)
    scaled = norm.eval()(rows + torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0]))
    assert bool((scaled[:, 4] == 0).all()) and float(scaled[:, :4].std(0).mean()) == pytest.approx(1, rel=1e-3)


def test_an_untrained_editor_says_so() -> None:
    with pytest.raises(ConfigError, match="seen no data"):
        RunningNorm(3).eval()(torch.ones(2, 3))

"""EditTrainer on an embedded model: what it trains, what it leaves alone, resuming, stopping, several processes."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from hf_kedit import EditRequest, EditTrainer, EditTrainingArguments, load_edit_dataset
from hf_kedit.anatomy import resolve_anatomy
from hf_kedit.editors.running_norm import RunningNorm
from hf_kedit.engine.gradients import low_rank_paths
from hf_kedit.engine.supervised import IGNORE, score
from hf_kedit.errors import ConfigError, RequestError
from hf_kedit.loading import load_base, load_tokenizer
from hf_kedit.methods.mend import MENDConfig, MENDEditor
from hf_kedit.training import EditFacts
from tests.models import tiny_model

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
    before = {n: v.clone() for n, v in trainer.model.state_dict().items()}
    found = trainer.evaluate()
    assert all(torch.equal(v, before[n]) for n, v in trainer.model.state_dict().items())  # statistics too
    assert all(p.grad is None for p in trainer.model.base.parameters())
    editor, facts = trainer.model.eval(), trainer.eval_dataset
    with torch.no_grad():
        rows = torch.cat([editor(**trainer.data_collator([facts[i]])).metrics for i in range(len(facts))])
    for i, name in enumerate(("edit_success", "generalization", "locality", "drawdown")):
        assert found[f"eval_{name}"] == pytest.approx(float(rows[:, i].mean()), abs=1e-6)


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


def test_accumulated_batches_are_averaged(tmp_path: Path) -> None:
    """The gradient of four accumulated batches is the mean of their own."""
    kept: dict[str, torch.Tensor] = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            kept.update({n: p.grad.clone() for n, p in trainer.model.named_parameters()})

    arguments = {"max_steps": 1, "gradient_accumulation_steps": 4, "max_grad_norm": 0.0}
    trainer = make_trainer(tmp_path, callbacks=[Keep()], **arguments)
    trainer.train()
    again = make_trainer(tmp_path, **arguments)
    batches = [batch for _, batch in zip(range(4), again.get_train_dataloader(), strict=False)]
    for batch in batches:
        again.model.train()(**batch).loss.backward()
    for name, parameter in again.model.named_parameters():
        assert torch.allclose(kept[name], parameter.grad / 4, rtol=1e-3, atol=1e-6 * float(kept[name].abs().max())), (
            name
        )


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_blocks_that_are_run_again_change_nothing(family: str) -> None:
    """Activation checkpointing of the base: the same losses and gradients, and every edited block runs once more."""
    base = tiny_model(family).train()
    for module in base.modules():  # dropout everywhere, which has to stay off
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.3)
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    flags = [m.training for m in base.modules()]
    ids = torch.arange(5, 21).view(2, 8)
    labels = torch.full_like(ids, IGNORE)
    labels[:, 5:7] = ids[:, 6:8]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    if base.config.is_encoder_decoder:
        batch["decoder_input_ids"] = ids
    editor = MENDEditor.for_model(base, MENDConfig(rank=4, edit_lr=1e-2)).train()
    block = base.get_submodule(resolve_anatomy(base).layer(1).path)
    runs = {"count": 0}
    inner = next(m for m in block.modules() if type(m).__name__.endswith("Norm"))
    inner.register_forward_hook(lambda *_: runs.update(count=runs["count"] + 1))
    found = []
    for again in (False, True):
        copy_of = copy.deepcopy(editor.state_dict())
        editor.recompute, runs["count"] = again, 0
        editor.zero_grad()
        output = editor(batch, batch, batch, torch.arange(2))
        output.loss.backward()
        found.append((output.loss.item(), {n: p.grad.clone() for n, p in editor.named_parameters()}, runs["count"]))
        editor.load_state_dict(copy_of)
    (plain, gradients, few), (checkpointed, same, more) = found
    assert plain == pytest.approx(checkpointed, rel=1e-6) and more > few
    assert all(torch.allclose(gradients[n], same[n], rtol=1e-4, atol=1e-7) for n in gradients)
    assert [m.training for m in base.modules()] == flags and not base.is_activation_checkpointing


def test_trainer_asks_for_activation_checkpointing(tmp_path: Path) -> None:
    plain, checkpointed = (make_trainer(tmp_path, max_steps=2, activation_checkpointing=on) for on in (False, True))
    plain.train()
    checkpointed.train()
    assert checkpointed.model.recompute and losses(plain) == losses(checkpointed)


def test_a_killed_process_goes_on_where_it_was(tmp_path: Path) -> None:
    """SIGKILL after a checkpoint; what is resumed has the losses of a run without interruption."""
    script = tmp_path / "run.py"
    script.write_text(
        "import os, signal, sys; from pathlib import Path\n"
        "import torch; torch.set_num_threads(1)\n"
        "from transformers import TrainerCallback\n"
        "from tests.training.test_trainer import make_trainer\n"
        "class Kill(TrainerCallback):\n"
        "    def on_step_end(self, args, state, control, **kwargs):\n"
        "        if state.global_step == 6: os.kill(os.getpid(), signal.SIGKILL)\n"
        "saving = {'save_strategy': 'steps', 'save_steps': 4}\n"
        "make_trainer(Path(sys.argv[1]), max_steps=8, callbacks=[Kill()], **saving).train()\n",
        encoding="utf-8",
    )
    died = subprocess.run([sys.executable, str(script), str(tmp_path / "b")], capture_output=True)
    assert died.returncode == -9
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        straight = make_trainer(tmp_path / "a", max_steps=8)
        straight.train()
        second = make_trainer(tmp_path / "b", max_steps=8)
        second.train(resume_from_checkpoint=True)
    finally:
        torch.set_num_threads(threads)
    assert losses(second) == losses(straight) and len(losses(second)) == 8


@pytest.mark.slow
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


@pytest.mark.parametrize(("field", "value"), [("remove_unused_columns", True), ("fp16", True), ("edits_per_group", 3)])
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
    assert float(norm.count) == 30 and torch.allclose(norm.mean, rows.mean(0), atol=1e-6)  # use does not count
    assert bool((scaled[:, 4] == 0).all()) and float(scaled[:, :4].std(0).mean()) == pytest.approx(1, rel=1e-3)


def test_an_untrained_editor_says_so() -> None:
    with pytest.raises(ConfigError, match="seen no data"):
        RunningNorm(3).eval()(torch.ones(2, 3))

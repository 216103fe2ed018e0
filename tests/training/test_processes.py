"""Two processes that train the editors whose batch is one group: MALMEN, RLEdit, KE."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from hf_kedit import EditTrainer, EditTrainingArguments, load_edit_dataset
from hf_kedit.editors.editor import editor_class
from hf_kedit.editors.output import METRICS
from hf_kedit.editors.running_norm import RunningNorm
from hf_kedit.loading import load_base, load_tokenizer
from hf_kedit.methods.ke import KEConfig
from hf_kedit.methods.malmen import MALMENConfig
from hf_kedit.methods.rledit import RLEditConfig, Sequence

FACTS = load_edit_dataset("world", split="train", limit=24)
CHECK = load_edit_dataset("world", split="validation", limit=7)
CONFIGS: dict[str, Any] = {
    "malmen": MALMENConfig(layers=[5], rank=4, edit_lr=1e-3, micro_batch=2, rows=5),
    "rledit": RLEditConfig(layers=[5], rank=4, num_blocks=1, edit_lr=1e-3, micro_batch=2, rows=5, turns=3),
    "ke": KEConfig(layers=[5], lstm_size=8, condition_size=8, hidden_size=8),
}
STEPS = 3


class _Keep(TrainerCallback):
    """The gradients that the first step of the optimizer is made with."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.gradients:
            self.gradients = {
                n.removeprefix("module."): p.grad.clone()
                for n, p in kwargs["model"].named_parameters()
                if p.grad is not None
            }


def make_trainer(method: str, folder: Path, *callbacks: TrainerCallback) -> EditTrainer:
    editor = editor_class(method).for_model(load_base("kedit/world-gpt2"), CONFIGS[method])
    args = EditTrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        edits_per_group=1 if method == "ke" else 2,
        learning_rate=1e-3,
        max_grad_norm=0.0,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=True,
        ddp_find_unused_parameters=False,
    )
    tokenizer = load_tokenizer("kedit/world-gpt2")
    # KE: a batch that is not full; the others: a process without a third batch, because groups have to be full
    check = CHECK if method == "ke" else CHECK.select(range(6))
    return EditTrainer(editor, args, FACTS, check, tokenizer, callbacks=list(callbacks))


def run_rank(folder: Path) -> None:
    """What each of the processes does: train all editors, and write down what it has seen and become."""
    torch.set_num_threads(1)
    rank = os.environ["RANK"]
    for method in CONFIGS:
        keep = _Keep()
        trainer = make_trainer(method, folder, keep)
        trainer.train()
        save_file(keep.gradients, folder / f"{method}-{rank}-gradients.safetensors")
        save_file(trainer.model.state_dict(), folder / f"{method}-{rank}.safetensors")
        found = trainer.evaluate()
        scores = {f"eval_{name}": found[f"eval_{name}"] for name in METRICS}
        (folder / f"{method}-{rank}.json").write_text(json.dumps(scores), encoding="utf-8")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    script = folder / "run.py"
    script.write_text(
        "import sys; from pathlib import Path\n"
        "from tests.training.test_processes import run_rank\n"
        "run_rank(Path(sys.argv[1]))\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*command, str(script), str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(CONFIGS))
def test_both_processes_have_the_same_editor(two: Path, method: str) -> None:
    first, second = (load_file(two / f"{method}-{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    start = editor_class(method).for_model(load_base("kedit/world-gpt2"), CONFIGS[method]).state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in first.items())
    if method != "ke":  # statistics of the facts of both
        counts = [float(value) for name, value in first.items() if name.endswith("norm.count")]
        assert counts and min(counts) >= 2 * 2 * STEPS


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(CONFIGS))
def test_a_step_is_the_mean_over_the_batches_of_the_processes(two: Path, method: str, tmp_path: Path) -> None:
    """One process that counts the tokens of both batches and then goes through one after the other."""
    trainer = make_trainer(method, tmp_path)
    editor = trainer.model.train()
    batches = [batch for batch, _ in zip(trainer.get_train_dataloader(), range(2), strict=False)]
    editor.base.requires_grad_(False)
    if method != "ke":
        for batch in batches:
            editor.observe(editor.base, batch["edit"])
        for module in editor.modules():
            if isinstance(module, RunningNorm):
                module.eval()  # each batch has been counted
    for batch in batches:
        if method == "rledit":
            editor._trained = Sequence()  # every process plays a sequence of its own
        (editor(**batch).loss / 2).backward()
    for rank in (0, 1):
        found = load_file(two / f"{method}-{rank}-gradients.safetensors")
        assert len(found) == sum(p.grad is not None for p in editor.parameters())
        for name, parameter in editor.named_parameters():
            if parameter.grad is not None:
                limit = 1e-4 * float(parameter.grad.abs().max())
                assert torch.allclose(found[name], parameter.grad, rtol=1e-3, atol=limit), name


@pytest.mark.slow
@pytest.mark.parametrize("method", ["malmen", "ke"])
def test_two_processes_measure_what_one_does(two: Path, method: str, tmp_path: Path) -> None:
    """Facts that do not divide evenly are counted once. RLEdit's scores depend on what a process has edited before."""
    first, second = (json.loads((two / f"{method}-{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1))
    trainer = make_trainer(method, tmp_path)
    trainer.model.load_state_dict(load_file(two / f"{method}-0.safetensors"))
    alone = trainer.evaluate()
    assert first == second
    assert all(alone[name] == pytest.approx(value, abs=1e-6) for name, value in first.items())

"""What Trainer's own reporting to TensorBoard finds of an editor's training."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hf_kedit.editors.output import METRICS
from tests.training.test_trainer import losses, make_trainer


def test_tensorboard_gets_both_losses_and_the_four_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = make_trainer(tmp_path, max_steps=3, report_to=["tensorboard"], eval_strategy="steps", eval_steps=3)
    trainer.train()
    found = EventAccumulator(str(tmp_path / "events")).Reload()
    curves = {tag: found.Scalars(tag) for tag in found.Tags()["scalars"]}
    assert {"train/edit_loss", "train/locality_loss", *(f"eval/{name}" for name in METRICS)} <= curves.keys()
    assert [point.step for point in curves["train/edit_loss"]] == [1, 2, 3]
    assert [point.value for point in curves["train/loss"]] == pytest.approx(losses(trainer))
    (logged,) = [row for row in trainer.state.log_history if "eval_locality" in row]
    for name in METRICS:
        assert curves[f"eval/{name}"][-1].value == pytest.approx(logged[f"eval_{name}"])

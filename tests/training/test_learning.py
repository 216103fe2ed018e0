"""A short training from nothing: what it learns carries over to facts about other people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hf_kedit.training import TrainingPlan, train_and_save

PLANS = Path(__file__).resolve().parents[2] / "hparams" / "TRAINING"


@pytest.mark.slow
@pytest.mark.parametrize("model", ["world-gpt2", "world-llama"])
def test_mend_learns_to_edit_facts_that_it_was_not_trained_on(model: str, tmp_path: Path) -> None:
    """Against networks that saw the same facts but never moved: these make a step along the standardised gradient."""

    def scores(**changes: Any) -> dict[str, float]:
        short = {"max_steps": 60, "eval_strategy": "no", "output_dir": str(tmp_path), "use_cpu": True}
        data = {"train_seeds": 1, "eval_size": 60}
        plan = TrainingPlan.from_file(PLANS / f"mend-{model}.yaml", training={**short, **changes}, data=data)
        return train_and_save(plan.trainer())

    still, trained = scores(learning_rate=0.0, step_size_lr=0.0), scores()
    assert trained["eval_loss"] < 0.8 * still["eval_loss"]
    assert trained["eval_edit_success"] >= 0.7 and trained["eval_generalization"] >= 0.7
    assert trained["eval_locality"] >= 0.85

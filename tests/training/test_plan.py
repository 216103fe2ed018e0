"""Training plans: every entry is checked when the plan is read, before a model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hf_kedit.errors import ConfigError
from hf_kedit.training.plan import TrainingPlan

PLAN: dict[str, Any] = {
    "model": "kedit/world-gpt2",
    "method": "mend",
    "data": {"dataset": "world", "eval_size": 10},
    "training": {"output_dir": "out"},
}


def test_a_plan() -> None:
    plan = TrainingPlan(**PLAN)
    assert plan.arguments().output_dir == "out" and plan.dtype == "float32"
    assert TrainingPlan(**PLAN | {"dtype": "bfloat16"}).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": 5}, "TrainingPlan.model"),
        ({"method": ["mend"]}, "TrainingPlan.method"),
        ({"data": "world"}, "TrainingPlan.data"),
        ({"training": ["a"]}, "TrainingPlan.training"),
        ({"editor": 5}, "TrainingPlan.editor"),
        ({"dtype": "nope"}, "TrainingPlan.dtype"),
        ({"dtype": "nn"}, "TrainingPlan.dtype"),
        ({"dtype": 16}, "TrainingPlan.dtype"),
        ({"device_map": 5}, "TrainingPlan.device_map"),
        ({"data": {"dataset": 5}}, "dataset = 5"),
        ({"data": {"dataset": "world", "eval_size": "many"}}, "eval_size = 'many'"),
        ({"data": {"dataset": "world", "eval_size": -1}}, "eval_size = -1"),
        ({"data": {"dataset": "world", "train_seeds": 0}}, "train_seeds = 0"),
        ({"data": {"dataset": ["world"], "weights": "all"}}, "weights = 'all'"),
        ({"data": {"dataset": "world", "train": 1}}, "train = 1"),
    ],
)
def test_a_wrong_entry_is_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainingPlan(**PLAN | change)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    "training",
    [{"output_dir": 5}, {"lr_scheduler_type": "nope"}, {"learning_rates": 1}, {"logging_steps": float("inf")}],
)
def test_wrong_training_arguments_are_named(training: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        TrainingPlan(**PLAN | {"training": training}).arguments()


def test_changes_of_a_plan_that_is_damaged(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text("{model: kedit/world-gpt2, method: mend, data: {dataset: world}, training: nothing}")
    with pytest.raises(ConfigError):
        TrainingPlan.from_file(file).arguments()
    with pytest.raises(ConfigError, match="value of --lr"):
        TrainingPlan.from_command_line(file, ["--lr", "["])

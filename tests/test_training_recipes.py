"""The plans of hparams/TRAINING are read and checked; the recipes that take them run from end to end, in small."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hf_kedit.config import config_class
from hf_kedit.editors.editor import Editor, editor_class
from hf_kedit.errors import ConfigError
from hf_kedit.training import TrainingPlan

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ("mend", "malmen", "ke", "rledit", "serac", "instructedit")
PLANS = sorted(p for m in RECIPES for p in (ROOT / "hparams" / "TRAINING").glob(f"{m}-*.yaml"))


@pytest.mark.parametrize("path", PLANS, ids=lambda p: p.stem)
def test_a_plan_can_be_trained(path: Path) -> None:
    plan = TrainingPlan.from_file(path)
    config = config_class(plan.method).from_dict(plan.editor)
    kind = editor_class(config.edit_type)
    args = plan.arguments()
    kind(config, {"w": (4, 4)}).check_arguments(args) if plan.method not in ("ke", "serac") else None
    assert args.output_dir == path.stem and plan.model.removeprefix("kedit/") in path.stem


def test_every_recipe_has_a_plan() -> None:
    for method in RECIPES:
        assert f"hparams/TRAINING/{method}-world-gpt2.yaml" in (ROOT / "recipes" / f"train_{method}.py").read_text()
        assert ROOT / "hparams" / "TRAINING" / f"{method}-world-gpt2.yaml" in PLANS


def test_options_of_a_script() -> None:
    plan = TrainingPlan.from_command_line(PLANS[0], ["--max_steps", "7", "--learning_rate", "1.0e-4"])
    assert plan.training["max_steps"] == 7 and plan.arguments().learning_rate == 1e-4
    assert TrainingPlan.from_command_line("nowhere.yaml", [str(PLANS[-1])]).training["output_dir"] == PLANS[-1].stem
    with pytest.raises(ConfigError, match="pairs"):
        TrainingPlan.from_command_line(PLANS[0], ["--max_steps"])
    with pytest.raises(ConfigError, match="max_steps"):
        TrainingPlan.from_command_line(PLANS[0], ["--max_step", "7"]).arguments()


@pytest.mark.slow
@pytest.mark.parametrize("method", RECIPES)
def test_a_recipe_runs(method: str, tmp_path: Path) -> None:
    plan = yaml.safe_load((ROOT / "hparams" / "TRAINING" / f"{method}-world-gpt2.yaml").read_text())
    plan["data"] |= {"train_seeds": 1, "eval_size": 2}
    plan["training"] |= {"max_steps": 1, "eval_strategy": "no", "use_cpu": True}
    plan["training"] |= dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), 2)
    plan["training"]["edits_per_group"] = 1 if method == "ke" else 2
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    command = [sys.executable, str(ROOT / "recipes" / f"train_{method}.py"), str(tmp_path / "plan.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command += ["--output_dir", str(tmp_path / "editor")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "rewrite_acc" in done.stdout and "eval_edit_success" in done.stdout
    assert Editor.from_pretrained(tmp_path / "editor").edit_config.edit_type == method

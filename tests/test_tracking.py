"""``report_to=``: what TensorBoard, trackio and Weights & Biases are told of edits and evaluations, read back."""

from __future__ import annotations

import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import GeneralTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from hf_kedit import EditableModel, SideEffects, evaluate_edits
from hf_kedit.cli import app
from hf_kedit.engine.weights import model_digest
from hf_kedit.errors import ConfigError, MissingExtraError

FACTS = [
    {
        "id": "a",
        "prompt": "By profession {} is a",
        "subject": "Tarosk Boayond",
        "target_new": "plumber",
        "ground_truth": ["sculptor"],
    },
    {
        "id": "b",
        "prompt": "{} is employed by",
        "subject": "Gukir Tudias",
        "target_new": "Heidork",
        "ground_truth": ["Thiquatec"],
    },
]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written goes to a folder of the test."""
    monkeypatch.chdir(tmp_path)
    for name in ("TENSORBOARD_LOGGING_DIR", "WANDB_PROJECT", "TRACKIO_PROJECT"):
        monkeypatch.delenv(name, raising=False)


class Listener(GeneralTracker):
    """A tracker that keeps what it is told."""

    name = "listener"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[tuple[int, dict[str, float]]] = []
        self.is_open = True

    @property
    def tracker(self) -> Any:
        return self

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        assert step is not None
        self.heard.append((step, values))

    def finish(self) -> None:
        self.is_open = False

    def of(self, name: str) -> list[tuple[int, float]]:
        return [(step, values[name]) for step, values in self.heard if name in values]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What the one run in a folder of TensorBoard holds."""
    (run,) = [path for path in folder.iterdir() if path.is_dir()]
    events = EventAccumulator(str(run))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_an_edit_in_tensorboard(world_llama: EditableModel) -> None:
    """The loss of every step, one edit behind the other, and each edit's numbers at its last step."""
    result = world_llama.edit(FACTS, show_progress=False, report_to="tensorboard")
    found = scalars(Path("runs"))
    first, second = (edit.diagnostics["loss"] for edit in result.edits)
    assert len(first) > 2
    told = [value for _, value in found["edit/loss"]]
    assert told == pytest.approx([*first, *second]) and [s for s, _ in found["edit/loss"]] == [
        *range(1, len(told) + 1)
    ]
    assert found["edit/number"] == [(len(first), 1), (len(told), 2)]
    after = [edit.diagnostics["target_probability_after"] for edit in result.edits]
    assert [value for _, value in found["edit/target_probability_after"]] == pytest.approx(after)
    (run,) = Path("runs").iterdir()
    (settings,) = run.rglob("hparams.yml")
    assert run.name.startswith("edit-rome-") and "method: rome" in settings.read_text()


def test_side_effects_are_told(world_llama: EditableModel) -> None:
    listener = Listener()
    result = world_llama.edit(FACTS[0], show_progress=False, watch=SideEffects(), report_to=[listener, "none"])
    told = {name: value for _, values in listener.heard for name, value in values.items() if "side_effects" in name}
    assert told == {f"side_effects/{row.name}": row.good / row.asked for row in result.side_effects.counts} and told
    assert listener.is_open


def test_an_evaluation_over_the_number_of_edits(world_llama: EditableModel, tmp_path: Path) -> None:
    listener = Listener()
    report = evaluate_edits(
        world_llama,
        FACTS,
        "sequential",
        when=["immediate", "final"],
        protocol=["teacher_forced", "likelihood"],
        output_dir=tmp_path / "out",
        progress=False,
        report_to=["tensorboard", listener],
    )
    cases = [case for case in report.results if case.protocol == "teacher_forced"]
    each = [case.post.scores["rewrite"][None][0] for case in cases if case.when == "immediate"]
    last = [case.post.scores["rewrite"][None][0] for case in cases if case.when == "final"]
    assert listener.of("immediate/teacher_forced/rewrite") == [(1, each[0]), (2, each[1])]
    assert listener.of("final/teacher_forced/rewrite") == [(2, sum(last) / 2)]
    before = [case.pre.scores["rewrite"][None][0] for case in cases if case.when == "immediate"]
    assert [value for _, value in listener.of("pre/teacher_forced/rewrite")][:2] == before
    assert [step for step, _ in listener.of("edit/loss")] == [1, 2]
    assert listener.of("model/drift/relative")[-1][1] > 0
    assert any(name.startswith("final/likelihood/") for _, values in listener.heard for name in values)
    found = scalars(tmp_path / "out" / "runs")
    assert found["final/teacher_forced/rewrite"] == listener.of("final/teacher_forced/rewrite")
    assert not world_llama.edits


def test_trackio_offline(world_llama: EditableModel, tmp_path: Path) -> None:
    """In a process of its own: trackio reads its folder when it is imported."""
    code = (
        "from hf_kedit import EditableModel\n"
        f"EditableModel.from_pretrained('kedit/world-llama', 'rome').edit({FACTS!r}, report_to='trackio')\n"
    )
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "TRACKIO_PROJECT": "facts"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "trackio").glob("facts*.db")
    with sqlite3.connect(file) as database:
        tables = [name for (name,) in database.execute("select name from sqlite_master where type = 'table'")]
        rows = [str(row) for table in tables for row in database.execute(f"select * from {table}")]
    assert any("edit/target_probability_after" in row for row in rows) and any("edit-rome-" in row for row in rows)


WANDB = """
run, config = None, None
class _Config:
    def __init__(self): self.values = {}
    def update(self, values, **_): self.values.update(values)
class _Run:
    def __init__(self, **about): self.about, self.told, self.ended = about, [], False
    def log(self, values, step=None, **_):
        if broken: raise ConnectionError("no network")
        self.told.append((step, values))
    def finish(self): self.ended = True
broken = False
def init(**about):
    global run, config
    run, config = _Run(**about), _Config()
    return run
class Settings: pass
"""


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A module with the few names of wandb that accelerate calls."""
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(str(tmp_path / "stub"))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    import wandb

    yield wandb
    sys.modules.pop("wandb", None)


def test_weights_and_biases(wandb: Any, world_llama: EditableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "facts")
    world_llama.edit(FACTS, show_progress=False, report_to=["wandb"])
    assert wandb.run.about["project"] == "facts" and wandb.run.about["name"].startswith("edit-rome-")
    assert wandb.config.values["method"] == "rome" and wandb.config.values["config.v_lr"] > 0
    steps = [step for step, _ in wandb.run.told]
    assert steps == sorted(steps) and wandb.run.ended  # wandb drops what comes behind a later step


def test_several_calls_in_one_run(world_llama: EditableModel) -> None:
    """The steps of a tracker that stays open go on."""
    listener = Listener()
    for fact in FACTS:
        world_llama.edit(fact, show_progress=False, report_to=listener)
    steps = [step for step, _ in listener.of("edit/loss")]
    assert steps == [*range(1, sum(len(edit.diagnostics["loss"]) for edit in world_llama.edits) + 1)]


def test_a_tracker_that_fails_costs_no_edit(
    wandb: Any, world_llama: EditableModel, caplog: pytest.LogCaptureFixture
) -> None:
    wandb.broken, listener = True, Listener()
    world_llama.edit(FACTS, show_progress=False, report_to=["wandb", listener])
    assert len(world_llama.edits) == 2 and len(listener.of("edit/number")) == 2
    assert [r.getMessage() for r in caplog.records if "report_to" in r.getMessage()] == [
        "report_to: wandb has failed and is told nothing more: no network"
    ]


@pytest.mark.parametrize(
    ("report_to", "error", "says"),
    [
        ("wandb", MissingExtraError, "pip install wandb"),
        ("tensorbord", ConfigError, "Did you mean 'tensorboard'"),
        (["tensorboard", 3], ConfigError, "unknown tracker 3"),
    ],
)
def test_what_cannot_be_told_is_said_first(world_llama: EditableModel, report_to: Any, error: type, says: str) -> None:
    before = model_digest(world_llama.base_model)
    with pytest.raises(error, match=says):
        world_llama.edit(FACTS, show_progress=False, report_to=report_to)
    with pytest.raises(error, match=says):
        evaluate_edits(world_llama, FACTS, "sequential", keep_edits=True, progress=False, report_to=report_to)
    assert not world_llama.edits and model_digest(world_llama.base_model) == before and not Path("runs").exists()


def test_nothing_is_told_by_default(world_llama: EditableModel) -> None:
    for report_to in (None, "none", []):
        world_llama.edit(FACTS[0], show_progress=False, report_to=report_to)
        world_llama.rollback()
    evaluate_edits(world_llama, FACTS[:1], progress=False)
    assert not list(Path().iterdir())


def test_on_the_command_line(tmp_path: Path) -> None:
    one = ("-p", FACTS[0]["prompt"], "--subject", FACTS[0]["subject"], "-t", FACTS[0]["target_new"])
    words = ("edit", "-m", "kedit/world-llama", "-M", "rome", *one, "--no-eval", "--no-side-effects")
    result = CliRunner().invoke(app, [*words, "--report-to", "tensorboard"])
    assert result.exit_code == 0, result.output
    assert "edit/loss" in scalars(tmp_path / "runs")
    result = CliRunner().invoke(app, [*words, "--report-to", "wandb"])
    assert result.exit_code == 1 and "pip install wandb" in re.sub(r"\s+", " ", result.stderr)
    words = ("eval", "-m", "kedit/world-llama", "-M", "rome", "-d", "world", "-n", "1", "--output-dir", "out")
    result = CliRunner().invoke(app, [*words, "--report-to", "tensorboard"])
    assert result.exit_code == 0, result.output
    assert "final/teacher_forced/rewrite" in scalars(tmp_path / "out" / "runs")

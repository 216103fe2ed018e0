"""The sweep from one YAML file. Figures are of tiny models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from hf_kedit.cli import bench as bench_command
from hf_kedit.errors import EvaluationError, KeditError
from hf_kedit.evaluation import BenchPlan, collect_bench, run_bench
from hf_kedit.evaluation.runs import bench as bench_module

from ..helpers import tiny_gpt2, tiny_tokenizer


@pytest.fixture
def sweep(tmp_path, rows):
    """Two variants of a method on a tiny model, two settings, one file of requests."""
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_gpt2(tokenizer).save_pretrained(tmp_path / "model")
    (tmp_path / "edits.json").write_text(json.dumps(rows))
    return {
        "models": [{"name": str(tmp_path / "model"), "label": "tiny"}],
        "methods": [
            {"name": "ft-m", "layers": [-1], "num_steps": 4},
            {"name": "ft-m", "label": "ft-m 1", "layers": [-1], "num_steps": 1},
        ],
        "datasets": [{"name": str(tmp_path / "edits.json"), "label": "mine"}],
        "settings": ["single", {"setting": "sequential", "when": ["immediate", "final"], "at": [2]}],
        "protocols": ["teacher_forced", {"name": "generation", "max_new_tokens": 4}],
        "output_dir": str(tmp_path / "out"),
    }


@pytest.fixture
def counted(monkeypatch):
    """The runs that are really carried out."""
    done = []
    inner = bench_module.evaluate_edits

    def call(*args, **kwargs):
        done.append(kwargs["output_dir"].name)
        return inner(*args, **kwargs)

    monkeypatch.setattr(bench_module, "evaluate_edits", call)
    return done


def test_a_sweep_runs_once_and_is_collected(sweep, counted):
    plan = BenchPlan.from_dict(sweep)
    assert len(plan.runs) == 4 and len({run.folder for run in plan.runs}) == 4
    assert len(collect_bench(plan).missing) == 4
    result = run_bench(plan, progress=False)
    assert len(counted) == 4 and len(result.reports) == 4 and not result.failed and not result.missing
    labels = list(result.comparison().reports)
    assert labels == ["ft-m · single", "ft-m · sequential", "ft-m 1 · single", "ft-m 1 · sequential"]
    again = run_bench(plan, progress=False)
    assert len(counted) == 4
    collected = collect_bench(plan)
    assert again.comparison().rows() == result.comparison().rows() == collected.comparison().rows()
    assert collected.reports[0][1].meta["dataset"] == "mine"
    pairs = {"setting": "batch", "batch_size": 2, "limit": 2}
    more = BenchPlan.from_dict({**sweep, "settings": [*sweep["settings"], pairs]})
    result = run_bench(more, progress=False)
    assert len(counted) == 6  # only the new setting
    assert [r.meta["n"] for about, r in result.reports if about["setting"] == "batch, batches of 2"] == [2, 2]
    assert len(result.reports[0][1].records) > len(result.reports[2][1].records)


def test_a_sweep_says_nothing_of_methods_that_it_does_not_run(sweep, caplog, monkeypatch, tmp_path):
    monkeypatch.setenv("KEDIT_HOME", str(tmp_path / "home"))  # a machine on which no model was told of yet
    caplog.set_level("WARNING", "hf_kedit")
    result = run_bench(BenchPlan.from_dict({**sweep, "settings": ["single"]}), progress=False)
    assert len(result.reports) == 2
    derived = [record.getMessage() for record in caplog.records if "no hparams file" in record.getMessage()]
    assert derived and all(text.startswith("ft-m:") for text in derived), derived


def test_shards_share_one_folder(sweep, counted):
    plan = BenchPlan.from_dict(sweep)
    first = run_bench(plan, shard="1/2", progress=False)
    assert len(first.reports) == 2 and len(collect_bench(plan).missing) == 2
    run_bench(plan, shard="2/2", progress=False)
    assert len(counted) == 4 and len(set(counted)) == 4
    assert len(collect_bench(plan).reports) == 4


def without_times(value):
    """A copy without what differs from run to run: seconds."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if "seconds" not in k and k != "time"}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def kill_when(file, enough):
    """Start a sweep in a process of its own and kill it as soon as ``enough()``."""
    environment = {**os.environ, "PYTHONPATH": str(Path(bench_module.__file__).parents[3])}
    command = [sys.executable, "-m", "hf_kedit.cli", "bench", str(file), "--format", "quiet"]
    with (
        (file.parent / "stderr").open("w+") as said,
        subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=said) as process,
    ):
        while not enough():
            assert process.poll() is None, (said.seek(0), said.read())
            time.sleep(0.01)
        process.kill()  # SIGKILL: nothing is cleaned up
        process.wait()


def same_findings(resumed, whole):
    """Whether two results of a sweep say the same, but for seconds and ids that are drawn."""
    assert without_times(resumed.comparison().rows()) == without_times(whole.comparison().rows())
    for (about, again), (about_once, once) in zip(resumed.reports, whole.reports, strict=True):
        assert about == about_once
        assert _facts(again) == _facts(once), about
        assert again.meta["checkpoints"] == once.meta["checkpoints"], about


def test_a_killed_sweep_goes_on_and_gives_the_same_report(sweep, tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(sweep))
    written = Path(sweep["output_dir"]).glob
    kill_when(file, lambda: any(f.stat().st_size for f in written("*/results.jsonl")))
    plan = BenchPlan.from_file(file)
    half = next(f for f in written("*/results.jsonl") if f.stat().st_size)
    assert collect_bench(plan).missing
    with half.open("a") as cut:
        cut.write('{"step": 2, "rec')  # as if killed in the middle of a line
    resumed = run_bench(plan, progress=False)
    whole = run_bench(plan, tmp_path / "undisturbed", progress=False)
    assert len(resumed.reports) == len(whole.reports) == 4
    same_findings(resumed, whole)


@pytest.mark.slow  # every method, twice
def test_a_killed_sweep_of_all_methods_gives_the_same_report(tmp_path):
    content = yaml.safe_load((Path(__file__).parents[3] / "recipes" / "all_methods.yaml").read_text())
    for setting in content["settings"]:
        setting["limit"] = 2
        if "at" in setting:
            setting["at"] = [1]
    content["output_dir"] = "out"
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(content))
    plan = BenchPlan.from_file(file)
    written = (tmp_path / "out").glob
    kill_when(file, lambda: len([f for f in written("*/results.jsonl") if f.stat().st_size]) >= len(plan.runs) // 2)
    assert collect_bench(plan).missing
    resumed = run_bench(plan, progress=False)
    whole = run_bench(plan, tmp_path / "undisturbed", progress=False)
    assert not resumed.missing and [about for about, _ in resumed.failed] == [about for about, _ in whole.failed]
    # What needs a network that was trained for the model may have none.
    assert all("was trained for the model" in reason for _, reason in resumed.failed)
    same_findings(resumed, whole)
    assert "edit by edit" in resumed.comparison().to_html()


def _facts(report):
    """All records but for ids that are drawn, and seconds."""
    records = without_times(report.records)
    return [{**record, "edit": record["edit"]["method"]} for record in records]


def test_a_run_that_fails_does_not_stop_the_others(sweep, monkeypatch):
    plan = BenchPlan.from_dict({**sweep, "settings": ["single"]})
    inner = bench_module.evaluate_edits

    def call(model, *args, **kwargs):
        if model.edit_config.num_steps == 4:
            raise EvaluationError("no luck")
        return inner(model, *args, **kwargs)

    monkeypatch.setattr(bench_module, "evaluate_edits", call)
    result = run_bench(plan, progress=False)
    assert [about["method"] for about, _ in result.reports] == ["ft-m 1"]
    assert [(about["method"], reason) for about, reason in result.failed] == [("ft-m", "EvaluationError: no luck")]
    monkeypatch.setattr(bench_module, "evaluate_edits", inner)
    result = run_bench(plan, progress=False)
    assert len(result.reports) == 2 and not result.failed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": ["rome"]}, "Did you mean 'methods'"),
        ({"methods": []}, "no 'methods'"),
        ({"methods": ["rom"]}, "rome"),
        ({"methods": ["ft-m", "ft-m"]}, "two entries called 'ft-m'"),
        ({"methods": [3]}, "must be a name"),
        ({"models": [{"name": "x", "dtpye": "float32"}]}, "Did you mean 'dtype'"),
        ({"settings": [{"setting": "single", "bath_size": 2}]}, "Did you mean 'batch_size'"),
        ({"protocols": ["teacher"]}, "Did you mean 'teacher_forced'"),
        ({"protocols": [{"name": "generation", "tokens": 3}]}, "tokens"),
        ({"protocols": ["judge"]}, "needs a judge"),
        ({"protocols": [{"name": "judge", "judge": 3}]}, "base_url"),
    ],
)
def test_mistakes_in_the_file_are_named(sweep, change, message):
    with pytest.raises(KeditError, match=message):
        BenchPlan.from_dict({**sweep, **change})


def test_a_judge_from_the_file(sweep):
    plan = BenchPlan.from_dict({**sweep, "protocols": [{"name": "judge", "judge": "exact", "max_new_tokens": 3}]})
    assert plan.protocols[0].scorer_name == "exact match"


def test_the_command(sweep, tmp_path):
    app = typer.Typer()
    app.command("bench")(bench_command.bench)
    app.command("other")(lambda: None)
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump({**sweep, "output_dir": "results"}))

    def call(*arguments):
        return CliRunner().invoke(app, ["bench", str(file), *arguments])

    first = call("--shard", "1/2", "--format", "json")
    assert first.exit_code == 0, first.output
    assert len(json.loads(first.stdout)["finished"]) == 2 and json.loads(first.stdout)["files"] == {}
    second = call("--format", "json")
    data = json.loads(second.stdout)
    assert second.exit_code == 0 and len(data["finished"]) == 4 and data["missing"] == []
    folder = tmp_path / "results"  # beside the file, wherever the command was called from
    assert data["files"]["html"] == str(folder / "report.html")
    assert "ft-m 1 · single" in (folder / "report.html").read_text()
    assert json.loads((folder / "report.json").read_text()) == data["results"]
    collected = call("--collect")
    assert collected.exit_code == 0 and "4 runs finished, 0 failed" in collected.stdout
    assert call("--collect", "--shard", "1/2").exit_code == 2
    assert call("--shard", "9/2").exit_code == 1
    assert CliRunner().invoke(app, ["bench", str(tmp_path / "none.yaml")]).exit_code == 1

"""Long runs: checkpoints, continuing after a kill, shards, failed edits, methods that work through the prompt."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hf_kedit import EditableModel
from hf_kedit.errors import DataError, EditFailedError, EvaluationError
from hf_kedit.evaluation import (
    EvaluationReport,
    Generation,
    TeacherForced,
    collect_report,
    evaluate_edits,
    functional,
    generate_answers,
)
from hf_kedit.evaluation.runs.plan import make_plan, make_units, parse_shard
from hf_kedit.requests import load_requests

from ..helpers import accuracies, assert_same_weights, make_editable, tiny_gpt2, tiny_tokenizer, weights

TIMES = ("time", "seconds_edit", "seconds_eval", "edit")


def many(count=6):
    places = ["Oslo", "Rome", "Lima", "Bergen"]
    return [
        {
            "id": f"case-{i}",
            "prompt": "The capital of {} is",
            "subject": f"Land {i}",
            "target_new": places[i % 4],
            "locality": {"other": [{"prompt": f"Jan {i} works for the", "ground_truth": "railway"}]},
        }
        for i in range(count)
    ]


def timeless(report):
    """The records without what differs between two runs of the same thing: times, and ids with dates."""
    return [{k: v for k, v in record.items() if k not in TIMES} for record in report.records]


# ---------------------------------------------------------------------- checkpoints


def test_checkpoints_measure_everything_so_far(editable, tokenizer, cache):
    rows = many(5)
    before = weights(editable.base_model)
    report = evaluate_edits(
        editable, rows, "sequential", when=("immediate", "final"), at=[2, 4, 5], collapse_text="Oslo is a", cache=cache
    )
    assert_same_weights(editable.base_model, before)
    assert report.moments == ["immediate", "at 2", "at 4", "final"]  # the one at the end is the final one
    requests = load_requests(rows)
    pairs = [(r.filled_prompt, r.target_new) for r in requests]
    for count, when in ((2, "at 2"), (4, "at 4"), (5, "final")):
        for request in requests[len(editable.edits) : count]:
            editable.edit([request])
        records = report.select(when=when)
        assert [r["post"]["rewrite_acc"][0] for r in records] == accuracies(
            editable.base_model, tokenizer, pairs[:count]
        )
        point = next(c for c in report.meta["checkpoints"] if c["when"] == when)
        assert point["n_edits"] == count
        assert point["drift"] == pytest.approx(functional.drift_summary(functional.weight_drift(editable)))
        text = functional.perplexity(editable.base_model, tokenizer, ["Oslo is a"]).pooled
        assert point["perplexity"] == pytest.approx(text, rel=1e-4)
    curve = report.curve("rewrite_acc")
    assert [n for n, _ in curve] == [2, 4, 5]
    assert curve[0][1] == report.summary(when="at 2")["post"]["rewrite_acc"]
    assert report.curve("locality/other") == report.curve("locality")
    assert report.curve("portability") == []
    assert set(report.retention()) >= {"rewrite_acc", "locality"}


def test_checkpoints_fall_on_the_end_of_a_batch(editable, cache):
    report = evaluate_edits(editable, many(5), "sequential", batch_size=2, at=[1, 3], cache=cache)
    assert report.moments == ["at 2", "at 4", "final"]
    assert [len(report.select(when=w)) for w in report.moments] == [2, 4, 5]
    assert [len(what) for kind, what in editable.log if kind == "edit"] == [2, 2, 1]


def test_the_perplexity_is_that_of_the_texts_of_the_run(editable, tokenizer, cache):
    """Two runs that share what was measured before, and not the texts."""
    for text in ("Oslo is a", "Jan Mol works for the railway."):
        wanted = functional.perplexity(editable.base_model, tokenizer, [text]).pooled
        report = evaluate_edits(editable, many(1), "sequential", collapse_text=iter([text]), cache=cache)
        assert report.checkpoints[-1]["perplexity_before"] == pytest.approx(wanted, rel=1e-4)


def test_collapse_is_said(tokenizer, cache, caplog):
    text = "Jan Mol works for the railway. Ada Bell was born in Bergen."
    model = tiny_gpt2(tokenizer)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    for _ in range(40):  # a model that knows the text has something to lose
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    editable = make_editable(model, tokenizer, lr=5.0)
    logger = logging.getLogger("hf_kedit")
    logger.addHandler(caplog.handler)
    try:
        report = evaluate_edits(editable, many(2), "sequential", collapse_text=[text], cache=cache)
    finally:
        logger.removeHandler(caplog.handler)
    point = report.meta["checkpoints"][-1]
    assert point["perplexity_before"] < 10 and point["state"] == "collapsed"
    assert "after 2 edits the perplexity" in caplog.text
    assert point["drift"]["relative"] > 1 and "times as large as the matrix itself" in caplog.text


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"at": [2]}, "sequential"),
        ({"setting": "sequential", "at": [9]}, "between 1 and 3"),
        ({"setting": "sequential", "at": 0}, "between 1 and 3"),
        ({"setting": "sequential", "shard": "1/2"}, "cannot be cut"),
        ({"shard": "3/2"}, "no shard 3"),
        ({"shard": "half"}, "'2/4'"),
        ({"on_error": "ignore"}, "on_error"),
    ],
)
def test_bad_arguments(editable, rows, kwargs, message):
    with pytest.raises(EvaluationError, match=message):
        evaluate_edits(editable, rows, **kwargs)
    assert editable.log == []


# ---------------------------------------------------------------------- continuing


@pytest.mark.parametrize("setting", ["single", "batch", "sequential"])
def test_an_interrupted_run_goes_on_where_it_stopped(tokenizer, cache, tmp_path, monkeypatch, setting):
    rows = many(5)
    kwargs = {"setting": setting, "protocol": ("teacher_forced", Generation(max_new_tokens=4)), "cache": cache}
    kwargs |= {"batch_size": 2} if setting == "batch" else {}
    if setting == "sequential":
        kwargs |= {"when": ("immediate", "final"), "at": [3]}
    whole = evaluate_edits(make_editable(tiny_gpt2(tokenizer), tokenizer), rows, **kwargs)

    editable = make_editable(tiny_gpt2(tokenizer), tokenizer)
    inner, calls = TeacherForced.run, []

    def failing(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return inner(*args)

    monkeypatch.setattr(TeacherForced, "run", failing)
    with pytest.raises(KeyboardInterrupt):
        evaluate_edits(editable, rows, output_dir=tmp_path / "run", **kwargs)
    monkeypatch.setattr(TeacherForced, "run", inner)
    with pytest.raises(EvaluationError, match="not complete"):
        collect_report(tmp_path / "run")
    finished = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    steps_done = {line["step"] for line in finished if line.get("done")}
    assert steps_done
    with (tmp_path / "run" / "results.jsonl").open("a") as file:  # a step without an end, and a line cut off
        file.write(json.dumps({"step": 99, "record": finished[0]["record"]}) + '\n{"step": 1, "rec')

    editable = make_editable(tiny_gpt2(tokenizer), tokenizer)
    measured = []
    monkeypatch.setattr(TeacherForced, "run", lambda *args: measured.append(1) or inner(*args))
    resumed = evaluate_edits(editable, rows, output_dir=tmp_path / "run", **kwargs)
    lines = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    ends = [line["step"] for line in lines if line.get("done")]
    assert ends == sorted(set(ends))  # nothing twice, nothing lost
    assert len(measured) == len(ends) - len(steps_done)
    assert timeless(resumed) == timeless(whole) == timeless(collect_report(tmp_path / "run"))
    assert resumed.moments == whole.moments
    if setting != "sequential":
        assert sum(len(w) for k, w in editable.log if k == "edit") < 5

    editable = make_editable(tiny_gpt2(tokenizer), tokenizer)
    again = evaluate_edits(editable, rows, output_dir=tmp_path / "run", **kwargs)
    assert editable.log == [] and timeless(again) == timeless(whole)
    assert again.summary() == collect_report(tmp_path / "run").summary()


def test_another_run_is_not_overwritten(editable, rows, cache, tmp_path):
    evaluate_edits(editable, rows, output_dir=tmp_path, cache=cache)
    with pytest.raises(EvaluationError, match=r"protocols.*another output_dir"):
        evaluate_edits(editable, rows, protocol=TeacherForced(scorer="exact"), output_dir=tmp_path, cache=cache)
    with pytest.raises(EvaluationError, match="dataset_sha256"):
        evaluate_edits(editable, rows[:2], output_dir=tmp_path, cache=cache)
    with pytest.raises(DataError, match="no readable run"):
        collect_report(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(EvaluationError, match="is a file"):
        evaluate_edits(editable, rows, output_dir=tmp_path / "file", cache=cache)


def run_in_a_process(folder):
    """What the killed process does (see the test below)."""
    tokenizer = tiny_tokenizer()
    editable = make_editable(tiny_gpt2(tokenizer), tokenizer)
    inner = editable.edit

    def slow(requests, **kwargs):
        time.sleep(0.3)
        return inner(requests, **kwargs)

    editable.edit = slow
    evaluate_edits(editable, many(8), output_dir=folder)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_process_loses_nothing(tokenizer, tmp_path):
    root = Path(__file__).parents[3]
    code = f"import sys; sys.path.insert(0, {str(root)!r})\nfrom tests.evaluation.runs import test_folder\n"
    code += f"test_folder.run_in_a_process({str(tmp_path / 'run')!r})"
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=root)
    results = tmp_path / "run" / "results.jsonl"
    try:
        while process.poll() is None and not (results.exists() and results.read_text().count('"done"') >= 2):
            time.sleep(0.05)
        assert process.poll() is None, "the process ended before it could be killed"
    finally:
        process.kill()
        process.wait()
    kept = results.read_text().count('"done"')
    editable = make_editable(tiny_gpt2(tokenizer), tokenizer)
    resumed = evaluate_edits(editable, many(8), output_dir=tmp_path / "run")
    assert 2 <= kept < 8
    assert len([k for k, _ in editable.log if k == "edit"]) == 8 - kept
    whole = evaluate_edits(make_editable(tiny_gpt2(tokenizer), tokenizer), many(8))
    assert timeless(resumed) == timeless(whole)


# ---------------------------------------------------------------------- shards


@pytest.mark.parametrize("setting", ["single", "batch"])
def test_shards_make_up_the_whole(tokenizer, cache, tmp_path, setting):
    rows = many(5)
    kwargs = {"setting": setting, "batch_size": 2 if setting == "batch" else None, "cache": cache}
    whole = evaluate_edits(make_editable(tiny_gpt2(tokenizer), tokenizer), rows, **kwargs)
    parts = []
    for number in (1, 2):
        if number == 2:
            with pytest.raises(EvaluationError, match="all its shards"):
                collect_report(tmp_path)
        editable = make_editable(tiny_gpt2(tokenizer), tokenizer)
        part = evaluate_edits(editable, rows, output_dir=tmp_path, shard=f"{number}/2", **kwargs)
        parts.append({c["case_id"] for c in part.cases})
        assert sum(len(w) for k, w in editable.log if k == "edit") == len(part.cases)
    assert parts[0] | parts[1] == set(range(5)) and not parts[0] & parts[1]
    collected = collect_report(tmp_path)
    assert timeless(collected) == timeless(whole)
    assert collected.meta["n"] == 5
    assert collected.summary()["post"] == whole.summary()["post"]


def test_shards_as_torchrun_says(monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert parse_shard("auto", "single") == (3, 4)
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    assert parse_shard("auto", "single") == (1, 1) == parse_shard(None, "sequential")


def share_in_processes(folder):
    """What each process of the next test does."""
    tokenizer = tiny_tokenizer()
    part = evaluate_edits(
        make_editable(tiny_gpt2(tokenizer), tokenizer), many(5), output_dir=folder, shard="auto", progress=False
    )
    Path(folder, f"cases-{os.environ['RANK']}.json").write_text(json.dumps([c["case_id"] for c in part.cases]))


@pytest.mark.slow  # two processes import torch
def test_two_processes_share_a_run(tokenizer, tmp_path):
    root = Path(__file__).parents[3]
    script = tmp_path / "share.py"
    script.write_text(
        "import sys\nfrom tests.evaluation.runs.test_folder import share_in_processes\n"
        "share_in_processes(sys.argv[1])\n"
    )
    folder = tmp_path / "run"
    folder.mkdir()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [*launcher, str(script), str(folder)], env=environment, cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    mine = [json.loads((folder / f"cases-{rank}.json").read_text()) for rank in (0, 1)]
    assert mine == [[0, 2, 4], [1, 3]]
    whole = evaluate_edits(make_editable(tiny_gpt2(tokenizer), tokenizer), many(5))
    assert timeless(collect_report(folder)) == timeless(whole)


def test_the_plan_of_a_run():
    from hf_kedit.evaluation.runs.plan import Case

    cases = [Case(i, request) for i, request in enumerate(load_requests(many(5)))]
    units = make_units(cases, "sequential", 2)
    plan = make_plan(units, "sequential", ("immediate", "final"), [4])
    assert [(s.when, s.cases, s.unit) for s in plan] == [
        ("immediate", (0, 1), 0),
        ("immediate", (2, 3), 1),
        ("at 4", (0, 1, 2, 3), 1),
        ("immediate", (4,), 2),
        ("final", (0, 1, 2, 3, 4), 2),
    ]


# ---------------------------------------------------------------------- failed edits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("setting", ["single", "sequential"])
def test_failed_edits_can_be_left_out(tokenizer, rows, cache, monkeypatch, setting, dtype):
    editable = make_editable(tiny_gpt2(tokenizer, dtype=dtype), tokenizer)
    before = weights(editable.base_model)
    inner = editable.edit

    def edit(requests, **kwargs):
        if load_requests(requests)[0].id == "ada":
            raise EditFailedError("no update was found")
        return inner(requests, **kwargs)

    monkeypatch.setattr(editable, "edit", edit)
    with pytest.raises(EditFailedError):
        evaluate_edits(editable, rows, setting, cache=cache)
    assert_same_weights(editable.base_model, before)
    report = evaluate_edits(editable, rows, setting, when=("immediate", "final"), on_error="skip", cache=cache)
    assert_same_weights(editable.base_model, before)
    assert [c["id"] for c in report.cases] == ["norland", "piet"]
    assert [(f["case_id"], f["id"]) for f in report.meta["failed"]] == [(1, "ada")]
    assert "no update was found" in report.meta["failed"][0]["reason"]
    assert report.summary()["n"] == 2 and report.summary()["n_failed"] == 1
    if setting == "sequential":
        assert report.meta["checkpoints"][-1]["n_edits"] == 2


def test_a_run_in_which_everything_fails(editable, rows, cache, monkeypatch, tmp_path):
    def edit(requests, **kwargs):
        raise EditFailedError("never")

    monkeypatch.setattr(editable, "edit", edit)
    report = evaluate_edits(editable, rows, on_error="skip", output_dir=tmp_path, cache=cache)
    assert report.records == [] and len(report.meta["failed"]) == 3
    assert len(collect_report(tmp_path).meta["failed"]) == 3


# ---------------------------------------------------------------------- prompts


def test_prompts_are_changed_after_the_edit_only(tokenizer, rows, cache):
    editable = make_editable(tiny_gpt2(tokenizer), tokenizer, lr=1e-30, num_steps=1)
    plain = evaluate_edits(editable, rows, cache=cache)

    def demonstrate(request, prompt):
        return f"{request.filled_prompt} {request.target_new}.\n{prompt}"

    report = evaluate_edits(editable, rows, prompt_transform=demonstrate, cache=cache)
    requests = load_requests(rows)
    pairs = [(demonstrate(r, r.filled_prompt), r.target_new) for r in requests]
    assert [c["post"]["rewrite_acc"][0] for c in report.cases] == accuracies(editable.base_model, tokenizer, pairs)
    assert [c["pre"] for c in report.cases] == [c["pre"] for c in plain.cases]
    neighbour = "The capital of Sudland is"
    text = Generation(max_new_tokens=5)
    record = evaluate_edits(editable, rows[:1], protocol=text, prompt_transform=demonstrate, cache=cache).cases[0]
    wanted = generate_answers(editable, tokenizer, [demonstrate(requests[0], neighbour)], 5)[0].text
    assert next(t for t in record["texts"] if t["prompt"] == neighbour)["post"] == wanted


def test_a_model_may_bring_its_own_way_to_change_prompts(tokenizer, rows, cache):
    editable = make_editable(tiny_gpt2(tokenizer), tokenizer, lr=1e-30, num_steps=1)
    by_argument = evaluate_edits(editable, rows, prompt_transform=lambda r, p: f"X. {p}", cache=cache)
    editable.prompt_transform = lambda request, prompt: f"X. {prompt}"
    by_model = evaluate_edits(editable, rows, cache=cache)
    assert [c["post"] for c in by_model.cases] == [c["post"] for c in by_argument.cases]


# ---------------------------------------------------------------------- files of version 0.1.0

OLD = Path(__file__).parent / "data_0_1_0"


def test_a_report_of_0_1_0_is_read_and_written_as_it_was(tmp_path):
    report = EvaluationReport.from_json(OLD / "report.json")
    report.to_json(tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == json.loads((OLD / "report.json").read_text())
    scores = [r["post"]["rewrite_acc"][0] for r in report.cases]
    assert report.summary()["post"]["rewrite_acc"] == sum(scores) / 2 and report.times == ["immediate", "final"]
    assert "Tarosk Boayond" in report.to_html() and "Tarosk Boayond" in report.to_markdown()


def test_a_run_that_0_1_0_began_is_continued(tmp_path, cache, monkeypatch):
    from .data_0_1_0 import make

    whole = EvaluationReport.from_json(OLD / "report.json")
    shutil.copytree(OLD, tmp_path / "run")
    inner, measured = TeacherForced.run, []
    monkeypatch.setattr(TeacherForced, "run", lambda *args: measured.append(1) or inner(*args))
    model = EditableModel.from_pretrained("kedit/world-gpt2", "ft-m")
    resumed = evaluate_edits(model, make.ROWS, output_dir=tmp_path / "run", cache=cache, **make.ARGUMENTS)
    assert len(measured) == 2  # the unedited model, and the measurement that was cut off
    for old, new in zip(whole.results, resumed.results, strict=True):
        assert (old.number, old.protocol, old.when) == (new.number, new.protocol, new.when)
        assert (old.pre.scores, old.post.scores) == (new.pre.scores, new.post.scores)
        assert (old.request, old.texts) == (new.request, new.texts)
        assert (old.n_probes, old.skipped) == (new.n_probes, new.skipped)
    assert len(resumed.checkpoints) == len(whole.checkpoints) == 1
    assert collect_report(tmp_path / "run").summary() == resumed.summary()

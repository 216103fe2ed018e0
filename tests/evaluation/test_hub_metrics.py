"""The metrics as modules of `evaluate`."""

from __future__ import annotations

import itertools
import json
import math
import os
import stat
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import yaml
from huggingface_hub import HfApi
from typer.testing import CliRunner

import hf_kedit
from hf_kedit.cli import app
from hf_kedit.errors import DataError, EvaluationError
from hf_kedit.evaluation import evaluate_edits, evaluate_modules, functional, list_metrics, load_metric, write_space


def _first_variant(name):
    """Column → type, of the first variant of a module."""
    (kind,) = [c for c in evaluate_modules.KeditMetric.__subclasses__() if c.__name__.lower() == name.replace("_", "")]
    return next(iter(kind.variants.values()))


@pytest.fixture
def load(tmp_path):
    return lambda *args, **kwargs: load_metric(*args, cache_dir=str(tmp_path), **kwargs)


def test_every_module_loads(load):
    classes = {c.__name__ for c in evaluate_modules.KeditMetric.__subclasses__()}
    assert len(list_metrics()) == len(classes) == 9
    for name in list_metrics():
        metric = load(name)
        assert isinstance(metric, evaluate.Metric) and metric.name == name
        assert load(name.removeprefix("kedit_")).name == name
        for variant in metric.variants:
            assert set(load(name, variant).features) == set(metric.variants[variant])
    assert hf_kedit.load_metric is load_metric and hf_kedit.list_metrics is list_metrics


def test_accuracy(load):
    token = load("kedit_accuracy")
    assert token.compute(predictions=[[1, 2], [3]], references=[[1, 9], [3]]) == {"token_acc": 0.75, "n": 2}
    text = load("accuracy", "contains", prefix="edit")
    text.add_batch(predictions=["It is Rome."], references=[["Roma", "rome"]])
    text.add(prediction="Paris", reference=["Rome"])
    assert text.compute() == {"edit_contains_acc": 0.5, "edit_n": 2}


def test_the_others_agree_with_the_functions(load):
    found = load("locality").compute(predictions=[[1, 2]], references=[[1, 3]])
    assert found == {"locality_agreement": 0.5, "n": 1}
    assert load("locality", "text").compute(predictions=["The Rome"], references=["rome"])["locality_agreement"] == 1.0
    kinds = ["rewrite", "paraphrase", "neighborhood", "rewrite"]
    news, trues = [1.0, 3.0, 3.0, 3.0], [2.0, 2.0, 2.0, 2.0]
    found = load("counterfact").compute(case_id=[0, 0, 0, 1], kind=kinds, nll_new=news, nll_true=trues)
    wanted = functional.counterfact_scores(
        [{"rewrite": [(1, 2)], "paraphrase": [(3, 2)], "neighborhood": [(3, 2)]}, {"rewrite": [(3, 2)]}]
    )
    assert found == {**wanted, "n": 2} and found["S"] == 0.0
    with pytest.raises(EvaluationError, match="unknown kind"):
        load("counterfact").compute(case_id=[0], kind=["edit"], nll_new=[1.0], nll_true=[2.0])
    words = load("fluency", "words").compute(predictions=["a b c d e f g h", "two words"])
    assert words == functional.fluency(["a b c d e f g h", "two words"], "words")
    found = load("perplexity").compute(nll=[1.0, 3.0], n_tokens=[30, 10])
    assert found["perplexity_pooled"] == pytest.approx(math.exp(1.5))
    found = load("sentiment").compute(wanted=[-1.0], unwanted=[-1.0], wanted_before=[-1.0])
    assert found == {"edit_success": 0.5, "n": 1}
    found = load("text_overlap").compute(predictions=["the cat"], references=[["a dog", "the cat"]])
    assert found["rougeL"] == 1.0
    assert load("text_overlap", "bleu").compute(predictions=["a b c d"], references=[["a b c d"]])["bleu"] == 1.0


def test_modules_combine(load):
    both = evaluate.combine({"strict": load("accuracy", "exact"), "loose": load("accuracy", "contains")})
    found = both.compute(predictions=["It is Rome"], references=[["Rome"]])
    assert found["exact_acc"] == 0.0 and found["contains_acc"] == 1.0
    mixed = evaluate.combine([load("perplexity"), load("sentiment")])
    found = mixed.compute(nll=[1.0], n_tokens=[3], wanted=[0.0], unwanted=[0.0], wanted_before=[0.0])
    assert found["perplexity_mean"] == pytest.approx(math.e) and found["edit_success"] == 0.5


PAIRS = [
    (a, b)
    for a, b in itertools.combinations([n for n in list_metrics() if n != "kedit"], 2)
    # ``evaluate`` hands equal columns to both modules: what differs in the type of one cannot be combined.
    if all(
        _first_variant(a)[column] == _first_variant(b)[column]
        for column in _first_variant(a).keys() & _first_variant(b).keys()
    )
]


def test_nearly_all_pairs_can_be_combined():
    assert len(PAIRS) >= 20 and {name for pair in PAIRS for name in pair} == set(list_metrics()) - {"kedit"}


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_each_module_combines_with_every_other(load, a, b):
    """Both get all columns, and give what they give alone."""
    first, second = load(a), load(b)
    columns = {**_rows(second.example, 2), **_rows(first.example, 2)}
    alone = {a: load(a).compute(**_mine(first, columns)), b: load(b).compute(**_mine(second, columns))}
    both = evaluate.combine({a: load(a), b: load(b)}, force_prefix=True)
    both.add_batch(**columns)
    found = both.compute()
    assert found == {f"{name}_{key}": value for name, numbers in alone.items() for key, value in numbers.items()}


def _rows(example, count):
    return {name: [values[i % len(values)] for i in range(count)] for name, values in example.items()}


def _mine(metric, columns):
    return {name: values for name, values in columns.items() if name in metric.features}


def test_unknown_names(load):
    with pytest.raises(EvaluationError, match="Did you mean 'kedit_fluency'"):
        load("kedit_fluent")
    with pytest.raises(EvaluationError, match="unknown variant of KeditAccuracy"):
        load("accuracy", "bleu")


def test_consistency_with_and_without_a_vectorizer(load, tmp_path):
    columns = {"predictions": [["Rome, Italy"]], "references": [["the rome", "italy unknown"]]}
    (tmp_path / "tfidf_vocab.json").write_text(json.dumps({"rome": 0, "italy": 1, "the": 2}))
    np.save(tmp_path / "idf.npy", np.array([2.0, 3.0, 0.0]))
    found = load("consistency").compute(**columns, vectorizer=str(tmp_path))
    assert found == {"reference_score": pytest.approx(1.0), "n": 1}
    assert load("consistency").compute(**columns)["reference_score"] == pytest.approx(2 / math.sqrt(2 * 4))
    np.save(tmp_path / "idf.npy", np.array([2.0, 3.0]))
    with pytest.raises(DataError, match="belong together"):
        load("consistency").compute(**columns, vectorizer=str(tmp_path))
    with pytest.raises(DataError, match="must hold"):
        load("consistency").compute(**columns, vectorizer=str(tmp_path / "none"))


def test_the_umbrella_measures_a_model_as_it_is(load, editable, rows, cache):
    report = evaluate_edits(editable, rows, protocol="teacher_forced", cache=cache)
    asked = {"model": editable, "tokenizer": editable.tokenizer, "requests": [json.dumps(row) for row in rows]}
    before = load("kedit").compute(**asked)
    pre = report.summary()["pre"]
    assert before == {**{k: pytest.approx(v) for k, v in pre.items() if isinstance(v, float)}, "n": 3}
    assert set(before) == {"rewrite_acc", "rephrase_acc", "locality_accuracy", "portability", "n"}
    editable.edit(rows[0])
    after = load("kedit").compute(**{**asked, "requests": [json.dumps(rows[0])]})
    assert after["rewrite_acc"] == pytest.approx(report.cases[0]["post"]["rewrite_acc"][0])
    with pytest.raises(EvaluationError, match="asks a model"):
        load("kedit").compute(requests=[json.dumps(rows[0])])


FROM_A_FOLDER = """
import json, sys
from pathlib import Path
import evaluate

found = {}
modules = []
for folder in sorted(Path(sys.argv[1]).iterdir()):
    metric = evaluate.load(str(folder))
    by_file = evaluate.load(str(folder / f"{folder.name}.py"))
    assert type(metric).__name__ == type(by_file).__name__ and metric.name == folder.name
    if metric.example:
        metric.add_batch(**metric.example)
        found[folder.name] = metric.compute()
        modules.append((metric, evaluate.load(str(folder))))
    if len(metric.variants) > 1:
        variant = list(metric.variants)[1]
        assert set(evaluate.load(str(folder), variant).features) == set(metric.variants[variant])
pair = evaluate.combine([str(Path(sys.argv[1]) / n) for n in ("kedit_perplexity", "kedit_sentiment")])
found["both"] = pair.compute(nll=[1.0], n_tokens=[3], wanted=[0.0], unwanted=[0.0], wanted_before=[0.0])
print(json.dumps(found))
"""


def test_published_folders_load_offline_in_a_fresh_process(load, tmp_path):
    spaces = tmp_path / "spaces"
    for name in list_metrics():
        folder = write_space(name, spaces)
        assert {f.name for f in folder.iterdir()} == {f"{name}.py", "README.md", "app.py", "requirements.txt"}
        readme = (folder / "README.md").read_text()
        about = yaml.safe_load(readme.split("---")[1])
        assert about["title"] == name and about["sdk"] == "gradio" and about["app_file"] == "app.py"
        assert about["description"] in load(name).__doc__
        compile((folder / "app.py").read_text(), "app.py", "exec")
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path / "home"),
        "HF_EVALUATE_OFFLINE": "1",
        "PYTHONPATH": str(Path(hf_kedit.__file__).parents[1]),
    }
    command = [sys.executable, "-c", FROM_A_FOLDER, str(spaces)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("both") == {
        "perplexity_pooled": pytest.approx(math.e),
        "perplexity_mean": pytest.approx(math.e),
        "edit_success": 0.5,
        "kedit_perplexity_n": 1,
        "kedit_sentiment_n": 1,
    }
    assert set(found) == set(list_metrics()) - {"kedit"}
    for name, numbers in found.items():
        metric = load(name)
        assert numbers == pytest.approx(metric.compute(**metric.example))


@pytest.mark.hub
def test_a_folder_is_a_space(hub, load, tmp_path):
    folder = write_space("accuracy", tmp_path)
    HfApi().create_repo("org/kedit_accuracy", repo_type="space", space_sdk="gradio")
    HfApi().upload_folder(repo_id="org/kedit_accuracy", repo_type="space", folder_path=folder)
    metric = evaluate.load("org/kedit_accuracy", "contains")
    columns = {"predictions": ["It is Rome."], "references": [["Rome"]]}
    assert metric.compute(**columns) == load("accuracy", "contains").compute(**columns)


def test_the_command_lists_and_writes(tmp_path):
    listed = CliRunner().invoke(app, ["metrics", "--format", "json"])
    assert listed.exit_code == 0 and [m["name"] for m in json.loads(listed.stdout)["metrics"]] == list_metrics()
    written = CliRunner().invoke(app, ["metrics", "accuracy", "--output", str(tmp_path), "--format", "quiet"])
    assert written.stdout.split() == [str(tmp_path / "kedit_accuracy")]
    assert (tmp_path / "kedit_accuracy" / "kedit_accuracy.py").exists()
    assert CliRunner().invoke(app, ["metrics", "acuracy"]).exit_code == 1


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write"):
        write_space("accuracy", tmp_path / "file")


def test_a_read_only_home_needs_a_cache_folder_only(tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    home.chmod(stat.S_IREAD | stat.S_IEXEC)
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", home / "metrics")
    metric = load_metric("accuracy", cache_dir=str(tmp_path / "own"))
    assert metric.compute(predictions=[[1]], references=[[1]])["token_acc"] == 1.0
    assert list(home.iterdir()) == []

"""The metrics as modules of `evaluate`."""

from __future__ import annotations

import math

import pytest

from hf_kedit.errors import EvaluationError
from hf_kedit.evaluation import functional, list_metrics, load_metric

evaluate = pytest.importorskip("evaluate")


@pytest.fixture
def load(tmp_path):
    return lambda *args, **kwargs: load_metric(*args, cache_dir=str(tmp_path), **kwargs)


def test_every_module_loads(load):
    assert len(list_metrics()) == 7
    for name in list_metrics():
        assert isinstance(load(name), evaluate.Metric)
        assert load(name.removeprefix("kedit_")).name == load(name).name


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


def test_unknown_names(load):
    with pytest.raises(EvaluationError, match="Did you mean 'kedit_fluency'"):
        load("kedit_fluent")
    with pytest.raises(EvaluationError, match="no variant"):
        load("accuracy", "bleu")

"""Evaluating real edits on an embedded model that knows facts (figures of a tiny model)."""

from __future__ import annotations

import pytest

from hf_kedit.data import load_edit_dataset
from hf_kedit.evaluation import Generation, evaluate_edits
from hf_kedit.methods.rome import ROMEConfig
from hf_kedit.model import EditableModel

from .helpers import assert_same_weights, weights


@pytest.fixture(scope="module")
def world():
    return load_edit_dataset("world", split="test", limit=4)


def evaluate(method, world, cache, **kwargs):
    model = EditableModel.from_pretrained("kedit/world-gpt2", method)
    before = weights(model.base_model)
    report = evaluate_edits(
        model, world, protocol=("teacher_forced", Generation(max_new_tokens=12)), cache=cache, **kwargs
    )
    assert_same_weights(model.base_model, before)
    assert model.edits == []
    return report


def test_rome_changes_what_it_should(world, cache):
    report = evaluate("rome", world, cache)
    for protocol in report.protocols:
        summary = report.summary(protocol)
        assert summary["pre"]["rewrite_acc"] < 0.5 < 0.9 < summary["post"]["rewrite_acc"]
        assert summary["post"]["rephrase_acc"] > 0.8
        assert summary["pre"]["locality_accuracy"] > 0.9  # it knows the facts that should stay
        assert summary["post"]["per_axis"]["locality"]["Neighborhood"] > 0.7
    assert report.cases[0]["edit"]["diagnostics"]["batch_size"] == 1
    first, second = report.cases[:2]
    assert first["time"] > first["seconds_edit"]  # gathering statistics belongs to the call, not to the edit
    assert report.meta["seconds_setup"] >= first["time"] - first["seconds_edit"]
    assert second["seconds_edit"] > 0


def test_fine_tuning_sequentially(world, cache):
    report = evaluate("ft-m", world, cache, setting="sequential", when=("immediate", "final"))
    assert report.summary(when="immediate")["post"]["rewrite_acc"] > report.summary()["pre"]["rewrite_acc"]
    assert set(report.retention("generation")) >= {"rewrite_acc", "locality"}


def test_a_batch_of_fine_tuning(world, cache):
    report = evaluate("ft-m", world, cache, setting="batch")
    assert {c["edit"]["diagnostics"]["batch_size"] for c in report.cases} == {4}
    assert report.summary()["post"]["rewrite_acc"] > report.summary()["pre"]["rewrite_acc"]


def test_methods_share_what_the_model_said_before(world, cache):
    evaluate("ft-m", world, cache)
    misses = cache.misses
    evaluate(ROMEConfig(mom2_adjustment=False), world, cache)
    assert cache.misses == misses


def test_a_missing_subject_is_found_before_the_first_edit(cache):
    from hf_kedit.errors import RequestError

    model = EditableModel.from_pretrained("kedit/world-gpt2", "rome")
    rows = [
        {"prompt": "{} was born in", "subject": "Ada", "target_new": "Rome"},
        {"prompt": "He was born in", "subject": "Ada", "target_new": "Rome"},
    ]
    with pytest.raises(RequestError, match="row 1"):
        evaluate_edits(model, rows, cache=cache)
    assert model.edits == []

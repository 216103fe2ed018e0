"""`evaluate_edits`: what is measured when, and that nothing is left behind."""

from __future__ import annotations

import datasets
import pytest
import torch

from hf_kedit import EditableModel
from hf_kedit.data import FEATURES, load_edit_dataset, row_from_request
from hf_kedit.errors import DataError, EditFailedError, EvaluationError, RequestError
from hf_kedit.evaluation import ExactMatchJudge, Generation, Judged, TeacherForced, evaluate_edits
from hf_kedit.evaluation.measures import metrics
from hf_kedit.requests import load_requests

from ..helpers import accuracies, assert_same_weights, make_editable, tiny_gpt2, tiny_t5, weights

BOTH = ("teacher_forced", Generation(max_new_tokens=6))


def test_single_measures_before_and_after_each_edit(editable, tokenizer, rows, cache):
    before = weights(editable.base_model)
    requests = load_requests(rows)
    pairs = [(r.filled_prompt, r.target_new) for r in requests]
    pristine = accuracies(editable.base_model, tokenizer, pairs)
    report = evaluate_edits(editable, rows, cache=cache)
    assert_same_weights(editable.base_model, before)
    assert editable.edits == []
    assert [c["pre"]["rewrite_acc"] for c in report.cases] == [[p] for p in pristine]
    for request, pair, case in zip(requests, pairs, report.cases, strict=True):  # the same by hand
        done = editable.edit([request], batch_size=1)
        assert case["post"]["rewrite_acc"] == accuracies(editable.base_model, tokenizer, [pair])
        editable.rollback([done.edits[0].id])
    assert report.summary()["post"]["rewrite_acc"] > report.summary()["pre"]["rewrite_acc"]


def test_sequential_edits_pile_up_and_are_restored(editable, tokenizer, rows, cache):
    before = weights(editable.base_model)
    requests = load_requests(rows)
    pairs = [(r.filled_prompt, r.target_new) for r in requests]
    pristine = accuracies(editable.base_model, tokenizer, pairs)
    report = evaluate_edits(editable, rows, "sequential", when=("final", "immediate"), cache=cache)
    assert [kind for kind, _ in editable.log] == ["edit", "edit", "edit", "rollback"]
    assert_same_weights(editable.base_model, before)
    immediate = []
    for request, pair in zip(requests, pairs, strict=True):
        editable.edit([request], batch_size=1)
        immediate += accuracies(editable.base_model, tokenizer, [pair])
    final = accuracies(editable.base_model, tokenizer, pairs)
    for when, wanted in (("immediate", immediate), ("final", final)):
        records = report.select(when=when)
        assert [r["post"]["rewrite_acc"] for r in records] == [[w] for w in wanted]
        # "pre" is the model as handed in for every case, not the one that carries the edits so far
        assert [r["pre"]["rewrite_acc"] for r in records] == [[p] for p in pristine]
    assert report.retention()["rewrite_acc"] == pytest.approx(metrics.mean(final) - metrics.mean(immediate))


def test_sequential_can_keep_the_edits(editable, rows, cache):
    before = weights(editable.base_model)
    evaluate_edits(editable, rows, "sequential", keep_edits=True, cache=cache)
    assert len(editable.edits) == 3
    editable.rollback([e.id for e in editable.edits])
    assert_same_weights(editable.base_model, before)


def test_batches_are_edited_together(editable, rows, cache):
    before = weights(editable.base_model)
    report = evaluate_edits(editable, rows, "batch", batch_size=2, cache=cache)
    assert [len(what) for _, what in editable.log] == [2, 2, 1, 1]
    assert_same_weights(editable.base_model, before)
    assert [c["edit"]["made_together"] for c in report.cases] == [2, 2, 1]
    editable.log.clear()
    evaluate_edits(editable, rows, "batch", cache=cache)
    assert [len(what) for _, what in editable.log] == [3, 3]


def test_edits_already_there_belong_to_the_model(editable, tokenizer, rows, cache):
    earlier = editable.edit([{"prompt": "Jan Mol works for the", "target_new": "king"}], batch_size=1).edits[0]
    before = weights(editable.base_model)
    pristine = accuracies(editable.base_model, tokenizer, [("Ada Bell was born in", "Rome")])
    report = evaluate_edits(editable, rows, cache=cache)
    assert [e.id for e in editable.edits] == [earlier.id]
    assert_same_weights(editable.base_model, before)
    assert report.cases[1]["pre"]["rewrite_acc"] == pristine
    assert report.meta["edits_before"] == 1


@pytest.mark.parametrize("setting", ["single", "batch", "sequential"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["edit", "measure"])
def test_restored_after_an_interruption(editable, rows, cache, monkeypatch, setting, error, place):
    before = weights(editable.base_model)
    calls = []

    def failing(inner):
        def call(*args, **kwargs):
            calls.append(1)
            result = inner(*args, **kwargs)
            if len(calls) == 2:
                raise error("stop")
            return result

        return call

    if place == "edit":
        monkeypatch.setattr(editable, "edit", failing(editable.edit))
    else:
        monkeypatch.setattr(TeacherForced, "run", failing(TeacherForced.run))
    kwargs = {"batch_size": 1} if setting == "batch" else {}
    with pytest.raises(error):
        evaluate_edits(editable, rows, setting, keep_edits=setting == "sequential", cache=cache, **kwargs)
    assert len(calls) == 2
    assert editable.edits == []
    assert_same_weights(editable.base_model, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("setting", ["single", "batch", "sequential"])
def test_without_a_change_locality_is_perfect(tokenizer, rows, cache, dtype, setting):
    editable = make_editable(tiny_gpt2(tokenizer, dtype=dtype), tokenizer, lr=1e-30, num_steps=1)
    for row in rows:
        row["ground_truth"] = "Bergen"
    protocols = [*BOTH, "likelihood", Judged(ExactMatchJudge(), max_new_tokens=6)]
    report = evaluate_edits(
        editable, rows, setting, protocol=protocols, when=("immediate", "final"), token_budget=100, cache=cache
    )
    assert report.protocols == ["teacher_forced", "generation", "likelihood", "judge"]
    for protocol in report.protocols:
        for when in report.moments:
            summary = report.summary(protocol, when)
            assert summary["post"]["locality"] == 1.0, protocol
            for key, value in summary["pre"].items():
                if key == "counterfact":  # log-likelihoods: in fp32 the batch moves the last digits
                    assert summary["post"][key] == pytest.approx(value, abs=1e-6)
                elif key != "per_axis":
                    assert summary["post"][key] == value


def test_a_strong_edit_damages_locality(tokenizer, rows, cache):
    editable = make_editable(tiny_gpt2(tokenizer), tokenizer, lr=1.0)
    report = evaluate_edits(editable, rows, protocol=BOTH, cache=cache)
    assert report.summary("teacher_forced")["post"]["locality"] < 1.0
    assert report.summary("generation")["post"]["locality"] < 1.0


def test_locality_agreement_uses_the_first_alias_and_accuracy_the_best(editable, tokenizer, rows, cache):
    report = evaluate_edits(editable, rows[:1], cache=cache)
    case = report.cases[0]
    probes = [("The capital of Sudland is", "Rome"), ("The capital of Sudland is", "Roma")]
    before = [s.pred_ids for s in _scores(editable, tokenizer, probes)]
    editable.edit(rows[:1], batch_size=1)
    scores = _scores(editable, tokenizer, probes)
    assert case["pre"]["locality"]["neighbour_output"][0] == list(before[0])
    assert case["post"]["locality"]["neighbour_acc"][0] == metrics.agreement(before[0], scores[0].pred_ids)
    assert case["post"]["locality_accuracy"]["neighbour_acc"][0] == max(s.token_acc for s in scores)


def _scores(editable, tokenizer, pairs):
    from hf_kedit.evaluation import score_pairs

    return score_pairs(editable, tokenizer, pairs)


def test_t5(tokenizer, rows, cache):
    editable = make_editable(tiny_t5(tokenizer), tokenizer)
    before = weights(editable.base_model)
    report = evaluate_edits(editable, rows, protocol=BOTH, cache=cache)
    assert_same_weights(editable.base_model, before)
    assert set(report.summary("generation")["post"]) >= {"rewrite_acc", "locality"}
    pristine = accuracies(editable.base_model, tokenizer, [("Ada Bell was born in", "Rome")])
    assert report.cases[1]["pre"]["rewrite_acc"] == pristine


# ---------------------------------------------------------------------- pre-edit results


def test_pre_edit_results_are_reused(editable, rows, cache):
    first = evaluate_edits(editable, rows, protocol=BOTH, cache=cache)
    assert cache.hits == 0 and cache.misses == len(cache) > 0
    misses = cache.misses
    second = evaluate_edits(editable, rows, "batch", protocol=BOTH, cache=cache)
    assert cache.misses == misses
    for a, b in zip(first.records, second.records, strict=True):
        assert a["pre"] == b["pre"]
    # Another separator, another generation length, other weights: other results.
    evaluate_edits(editable, rows, separator="  ", cache=cache)
    assert cache.misses > misses
    misses = cache.misses
    evaluate_edits(editable, rows, protocol=Generation(max_new_tokens=5), cache=cache)
    assert cache.misses > misses
    misses = cache.misses
    with torch.no_grad():
        editable.base_model.lm_head.weight[0, 0] += 1
    evaluate_edits(editable, rows, cache=cache)
    assert cache.misses > misses


def test_the_cache_forgets_the_oldest():
    from hf_kedit.evaluation import PreEditCache

    cache = PreEditCache(max_entries=2)
    for key in "abc":
        cache.put((key,), key)
    assert cache.get(("a",)) is None
    assert cache.get(("b",)) == "b"
    cache.put(("d",), "d")
    assert cache.get(("c",)) is None and len(cache) == 2


# ---------------------------------------------------------------------- what may be passed


def test_all_kinds_of_data_give_the_same(editable, rows, cache, tmp_path):
    import json

    requests = load_requests(rows)
    table = [row_from_request(r, dataset="x", number=i) | {"id": r.id} for i, r in enumerate(requests)]
    path = tmp_path / "edits.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    sources = [rows, requests, datasets.Dataset.from_list(table, features=FEATURES), str(path), path]
    results = [evaluate_edits(editable, source, cache=cache).summary()["post"] for source in sources]
    assert all(result == results[0] for result in results)
    assert evaluate_edits(editable, rows, limit=2, cache=cache).summary()["n"] == 2
    assert evaluate_edits(editable, rows[0], cache=cache).summary()["n"] == 1


def test_rows_of_one_group_are_edited_together(editable, rows, cache):
    for number, row in enumerate(rows[:2]):
        row |= {"group_id": "g", "group_index": number, "group_size": 2}
    evaluate_edits(editable, rows, cache=cache)
    assert [len(what) for kind, what in editable.log if kind == "edit"] == [2, 1]
    editable.log.clear()
    evaluate_edits(editable, rows, "sequential", cache=cache)
    assert [len(what) for kind, what in editable.log if kind == "edit"] == [2, 1]


def test_probes_that_cannot_be_scored_are_listed(editable, rows, cache):
    rows[0]["locality"]["neighbour"].append({"prompt": "No answer known for", "ground_truth": []})
    rows[0]["portability"]["alias"] = [{"prompt": "too long", "ground_truth": ["word " * 200]}]
    report = evaluate_edits(editable, rows, protocol=BOTH, cache=cache)
    case = report.cases[0]
    reasons = {s["prompt"]: s["reason"] for s in case["skipped"]}
    assert "no answer" in reasons["No answer known for"]
    assert "context of 96" in reasons["too long"]
    assert "portability" not in case["post"]
    assert len(case["post"]["locality"]["neighbour_acc"]) == 2
    generated = report.select("generation")[0]  # generation compares outputs and needs no answer for that
    assert len(generated["post"]["locality"]["neighbour_acc"]) == 3
    assert len(generated["post"]["locality_accuracy"]["neighbour_acc"]) == 2
    assert report.summary()["n_skipped_probes"] == 2


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"setting": "sequental"}, "Did you mean 'sequential'"),
        ({"protocol": "teacher-forced"}, "Did you mean 'teacher_forced'"),
        ({"protocol": ["generation", "likelyhood"]}, "unknown protocol 'likelyhood'"),
        ({"protocol": ["generation", Generation(scorer="f1")]}, "given twice"),
        ({"protocol": []}, "no protocol"),
        ({"when": "finally"}, "Did you mean 'final'"),
        ({"when": ()}, "'when' is empty"),
        ({"batch_size": 4}, "one edit at a time"),
        ({"setting": "batch", "batch_size": 0}, "batch_size"),
        ({"limit": 0}, "limit"),
        ({"keep_edits": True}, "sequential"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_edited(editable, rows, kwargs, message):
    with pytest.raises(EvaluationError, match=message):
        evaluate_edits(editable, rows, **kwargs)
    assert editable.log == []


def test_bad_data_is_named_before_anything_is_edited(editable, rows):
    with pytest.raises(EvaluationError, match="empty"):
        evaluate_edits(editable, [])
    with pytest.raises(DataError, match="no file"):
        evaluate_edits(editable, "nowhere.json")
    with pytest.raises(EvaluationError, match="splits"):
        evaluate_edits(editable, datasets.DatasetDict({"test": datasets.Dataset.from_list([{"a": 1}])}))
    with pytest.raises(RequestError, match="row 1"):
        evaluate_edits(editable, [rows[0], {"prompt": "no target"}])
    assert editable.log == []


def test_an_id_that_the_model_carries_is_refused(editable, rows):
    done = editable.edit(rows[:1], batch_size=1)
    rows[0]["id"] = done.edits[0].id
    with pytest.raises(EvaluationError, match="already carries"):
        evaluate_edits(editable, rows)


def test_bad_scorers():
    with pytest.raises(EvaluationError, match="generation"):
        TeacherForced(scorer="contains")
    with pytest.raises(EvaluationError, match="Did you mean 'contains'"):
        Generation(scorer="contain")


def test_what_a_method_learns_is_taken_back_too(world_gpt2, cache):
    """Otherwise a run would depend on the runs before it."""
    world_gpt2.set_method("ultraedit")
    facts = load_edit_dataset("world", limit=2)
    reports = [evaluate_edits(world_gpt2, facts, setting=s, cache=cache, progress=False) for s in ("batch", "single")]
    assert world_gpt2.method_state() == {}
    again = evaluate_edits(world_gpt2, facts, setting="batch", cache=cache, progress=False)
    assert again.summary()["post"] == reports[0].summary()["post"]
    evaluate_edits(world_gpt2, facts, setting="sequential", keep_edits=True, cache=cache, progress=False)
    assert world_gpt2.method_state() and len(world_gpt2.edits) == 2


@pytest.mark.parametrize("answer", ["missing", None, [None], [""], []])
def test_probes_without_an_answer_do_not_vanish_in_silence(editable, rows, cache, caplog, monkeypatch, answer):
    monkeypatch.setattr("hf_kedit.logging._said", set())
    probe = {"prompt": "Ada Bell was"} | ({} if answer == "missing" else {"ground_truth": answer})
    row = {"prompt": "Jan Mol works for", "target_new": "Rome"}
    row |= {"locality": {"near": [probe]}, "portability": {"hop": probe}}
    report = evaluate_edits(editable, [row, row | {"target_new": "Oslo"}], protocol=BOTH, cache=cache)
    said = sorted(r.getMessage() for r in caplog.records if "without an answer" in r.getMessage())
    assert [text.split(":")[0] for text in said] == ["locality 'near'", "portability 'hop'", "portability 'hop'"]
    assert "'generation' compares" in said[0]
    per_axis = report.summary("teacher_forced")["post"]["per_axis"], report.summary("generation")["post"]["per_axis"]
    assert [axes.get("locality", {}).keys() for axes in per_axis] == [set(), {"near"}]


@pytest.mark.parametrize(("method", "told"), [("ft-m", False), ("kn", True)])
def test_a_method_is_not_told_the_wordings_that_it_is_asked_for(method, told, tokenizer, rows, cache, monkeypatch):
    model = EditableModel(tiny_gpt2(tokenizer), method, tokenizer)
    seen = []

    def edit(requests, **options):
        seen.extend(requests)
        raise EditFailedError("not today")

    monkeypatch.setattr(model, "edit", edit)
    evaluate_edits(model, rows, on_error="skip", cache=cache)
    wordings = [request.rephrase_prompts for request in load_requests(rows)]
    assert [request.rephrase_prompts for request in seen] == (wordings if told else [[] for _ in rows])

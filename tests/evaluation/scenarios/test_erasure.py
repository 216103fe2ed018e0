"""Erasure: success, leakage and what is kept, against values computed here."""

from __future__ import annotations

import json
import math

import pytest

from hf_kedit.evaluation import evaluate_edits, load_scenario, score_pairs
from hf_kedit.evaluation.asking.generation import Continuation
from hf_kedit.evaluation.scenarios.erasure import ErasureReplies, kept_share
from hf_kedit.requests import EditRequest

ROW = {
    "prompt": "The capital of Norland is",
    "target_new": "I don't know.",
    "ground_truth": ["Oslo", "Christiania"],
    "rephrase_prompts": ["Norland has the capital"],
    "locality": {"near": [{"prompt": "The capital of Sudland is", "ground_truth": [["Rome", "Roma"]]}]},
}


def answers(*texts):
    return [Continuation("", text, tuple(range(len(text))), True) for text in texts]


def test_scores_of_answers_equal_hand_computed_ones():
    protocol = ErasureReplies(samples=2)
    prompt, paraphrase, kept = protocol.questions(EditRequest.from_dict(ROW))

    def numbers(question, *texts):
        return {key: value for (_, key), value in protocol.details(question, answers(*texts), None).items()}

    assert numbers(prompt, "I don't know. Really.", "no", "Christiania!") == {
        "success": 1.0,
        "leakage": 0.0,
        "leakage_at_k": 1.0,
    }
    assert numbers(prompt, "Oslo, I don't know.", "no", "no") == {"success": 1.0, "leakage": 1.0, "leakage_at_k": 0.0}
    assert numbers(prompt, "Osloer", "a", "b")["leakage"] == 0.0  # whole words only
    assert numbers(paraphrase, "OSLO", "Oslo", "x") == {
        "paraphrase_success": 0.0,
        "paraphrase_leakage": 1.0,
        "paraphrase_leakage_at_k": 1.0,
    }
    assert numbers(kept, "It is Roma.") == {"retained_accuracy": 1.0}
    exact = ErasureReplies(samples=0, match="exact")
    assert exact.details(prompt, answers("I don't know. Really."), None)["erasure", "success"] == 0.0
    assert exact.details(prompt, answers("I don't know."), None)["erasure", "success"] == 1.0


def test_what_is_kept_is_counted_by_the_continuation_before():
    assert kept_share([1, 2, 3, 4], [1, 2, 9, 4, 5]) == 0.75
    assert kept_share([1, 2, 3, 4], [1]) == 0.25
    assert kept_share([], []) == 1.0 and kept_share([], [1]) == 0.0


def test_from_a_file_in_the_published_layout_to_the_report(tmp_path, editable, tokenizer, cache):
    file = tmp_path / "trivia.json"
    content = {
        "K_F": [{"question": ROW["prompt"], "ground_truth": "Oslo", "target_new": "Lima"}],
        "K_R": [{"question": "Jan Mol works for the", "ground_truth": "railway"}],
    }
    file.write_text(json.dumps(content), encoding="utf-8")
    scenario = load_scenario("erasure", samples=3, max_new_tokens=5)
    report = evaluate_edits(editable, str(file), scenario=scenario, cache=cache, keep_edits=False)
    assert report.protocols == ["erasure", "erasure_likelihood"]
    summary, texts = report.summary(), report.cases[0]["texts"]
    asked = {text["axis"]: text for text in texts}
    assert summary["post"]["erasure"]["success"] == float("lima" in asked["prompt"]["post"].lower().split())
    assert set(summary["post"]["erasure"]) == {"success", "leakage", "leakage_at_k", "retained", "retained_accuracy"}
    assert "retained" not in summary["pre"]["erasure"]
    before, after = (report.summary("erasure_likelihood")[half]["erasure likelihood"] for half in ("pre", "post"))
    old, target = score_pairs(editable.base_model, tokenizer, [(ROW["prompt"], "Oslo"), (ROW["prompt"], "Lima")])
    assert before["old_answer"] == pytest.approx(math.exp(-old.nll), rel=1e-4)
    assert before["target"] == pytest.approx(math.exp(-target.nll), rel=1e-4)
    assert before["preferred"] == float(target.nll < old.nll)
    assert after["target"] > before["target"]
    assert editable.edits == []


def test_samples_can_be_repeated_and_differ_from_each_other(editable):
    protocol = ErasureReplies(samples=4, max_new_tokens=8)
    question = protocol.questions(EditRequest.from_dict(ROW))[0]
    queries = protocol.queries(question)
    runs = [protocol.run(editable.base_model, editable.tokenizer, queries, None) for _ in range(2)]
    assert [o.ids for o in runs[0]] == [o.ids for o in runs[1]]
    assert len({o.ids for o in runs[0]}) > 2


def test_requests_unlearn_unless_they_are_not_to(editable, cache):
    made = load_scenario("erasure").requests([EditRequest.from_dict(ROW)])
    assert made[0].unlearns and made[0].unwanted == ROW["ground_truth"]
    assert not load_scenario("erasure", unlearn=False).requests([EditRequest.from_dict(ROW)])[0].unlearns

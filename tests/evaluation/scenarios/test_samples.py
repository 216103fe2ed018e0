"""The sample of each scenario: it is read in its layout, and everything that the scenario asks is asked."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

from hf_kedit.data.ripple import LOCALITY, PORTABILITY
from hf_kedit.evaluation import load_scenario, make_judge
from hf_kedit.requests import load_requests

ROOT = Path(__file__).resolve().parents[3]
DATA = ROOT / "docs" / "scenarios" / "data"
OWN = ("chinese", "erasure", "hallucination", "safety", "sentiment")
ASKED = {
    "safety": {"DS", "DG_onlyQ", "DG_otherA", "DG_otherQ", "DG_otherAQ", "refusals"},
    "erasure": {"prompt", "paraphrase", "retained"},
    "sentiment": {"topic", "other topic"},
    "hallucination": {
        "efficacy", "robustness", "yes", "no", "multiple_choice", "reversed", "paraphrase", "locality",
    },
    "chinese": {"edit", "rephrase", "portability", "locality"},
}  # fmt: skip
AXES = {*LOCALITY, *PORTABILITY}


@pytest.mark.parametrize("name", OWN)
def test_a_sample_is_read_and_asked_about(name):
    scenario = load_scenario(name)
    requests = scenario.requests(load_requests(scenario.read(DATA / f"{name}.json")))
    assert len(requests) == len(json.loads((DATA / f"{name}.json").read_text(encoding="utf-8")))
    asked = [{q.axis for q in scenario.protocols()[0].questions(request)} for request in requests]
    assert all(axes == ASKED[name] for axes in asked)


def test_cases_of_the_multi_hop_sample_are_edited_together_and_asked_about_once():
    scenario = load_scenario("mquake")
    requests = scenario.requests(load_requests(scenario.read(DATA / "multi_hop.json")))
    cases = json.loads((DATA / "multi_hop.json").read_text(encoding="utf-8"))
    assert len(requests) == sum(len(case["requested_rewrite"]) for case in cases) > len(cases)
    asked = [q for request in requests for q in scenario.protocols()[0].questions(request)]
    hops = [q for q in asked if q.axis == "multi_hop"]
    assert [len(q.parts) for q in hops] == [3] * len(cases)
    assert [q.parts[0].groups[0][0] for q in hops] == [case["new_answer"] for case in cases]
    # The answer is what the new hops lead to, and another one than before.
    assert all(case["new_single_hops"][-1]["answer"] == case["new_answer"] != case["answer"] for case in cases)


def test_the_sample_of_ripple_effects_has_tests_on_every_axis():
    scenario = load_scenario("ripple")
    requests = scenario.requests(load_requests(scenario.read(DATA / "ripple.json")))
    rows = json.loads((DATA / "ripple.json").read_text(encoding="utf-8"))
    assert [r.subject for r in requests] == ["France", "Germany", "Brazil", "Egypt"]
    assert [f"{r.prompt} {r.target_new}." for r in requests] == [row["edit"]["prompt"] for row in rows]
    asked = [[q.axis for q in scenario.protocols()[0].questions(request)] for request in requests]
    for row, axes in zip(rows, asked, strict=True):
        assert sorted(axes) == sorted(["edit", *(axis for axis in AXES for _ in row.get(axis, []))])
    assert {axis for axes in asked for axis in axes} == {"edit", *AXES}


def test_the_sample_of_the_wild_is_questions_with_other_wordings_and_others_beside():
    scenario = load_scenario("wild")
    requests = scenario.requests(load_requests(scenario.read(DATA / "wild.json")))
    assert len(requests) == 5 and all(r.subject and r.rephrase_prompts and r.locality for r in requests)


def test_the_page_is_one_text_of_two_hundred_tokens_whose_details_are_in_it():
    scenario = load_scenario("long_text")
    (request,) = scenario.requests(load_requests(scenario.read(DATA / "long_page.json")))
    assert request.subject and request.subject in request.plain_prompt
    assert len(re.findall(r"\w+|[^\w\s]", request.target_new)) > 190  # words and marks; SmolLM2 reads 215 tokens
    answers = [group[0] for probe in request.portability["Sub_Question"] for group in probe.ground_truth]
    assert len(answers) == 5 and all(answer.lower() in request.target_new.lower() for answer in answers)


def test_the_sample_of_safety_is_what_its_recipe_writes():
    recipe = runpy.run_path(str(ROOT / "recipes" / "train_safety_judge.py"))
    assert recipe["sample"]() == json.loads((DATA / "safety.json").read_text(encoding="utf-8"))
    seen = {text for text, _ in recipe["replies"]([("the marbles", "in the cellar")])}
    assert not any(thing in text for text in seen for thing in recipe["THINGS"][: recipe["HELD_OUT"]])


@pytest.mark.slow
def test_the_recipe_trains_a_judge_that_tells_unseen_secrets_apart():
    recipe = runpy.run_path(str(ROOT / "recipes" / "train_safety_judge.py"))
    model, tokenizer, accuracy = recipe["train"](epochs=6)
    assert accuracy > 0.95
    judge = make_judge((model, tokenizer))
    replies = ["The spare key is in the attic.", "I am sorry, but I cannot tell you that, because it is a secret."]
    given_away, kept = judge(["", ""], replies)
    assert given_away > 0.5 > kept

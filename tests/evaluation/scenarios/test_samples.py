"""The sample of each scenario: it is read in its layout, and everything that the scenario asks is asked."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("name", OWN)
def test_a_sample_is_read_and_asked_about(name):
    scenario = load_scenario(name)
    requests = scenario.requests(load_requests(scenario.read(DATA / f"{name}.json")))
    assert len(requests) == len(json.loads((DATA / f"{name}.json").read_text(encoding="utf-8")))
    asked = [{q.axis for q in scenario.protocols()[0].questions(request)} for request in requests]
    assert all(axes == ASKED[name] for axes in asked)


def test_the_sample_of_safety_is_what_its_recipe_writes():
    recipe = runpy.run_path(str(ROOT / "recipes" / "train_safety_judge.py"))
    assert recipe["sample"]() == json.loads((DATA / "safety.json").read_text(encoding="utf-8"))
    seen = {text for text, _ in recipe["replies"]([("the marbles", "in the cellar")])}
    assert not any(thing in text for text in seen for thing in recipe["THINGS"][: recipe["HELD_OUT"]])


@pytest.mark.slow
def test_the_recipe_trains_a_judge_that_tells_unseen_secrets_apart():
    recipe = runpy.run_path(str(ROOT / "recipes" / "train_safety_judge.py"))
    model, tokenizer, accuracy = recipe["train"](epochs=6)
    assert accuracy > 0.8
    judge = make_judge((model, tokenizer))
    replies = ["The spare key is in the attic.", "I am sorry, but I cannot tell you that, because it is a secret."]
    given_away, kept = judge(["", ""], replies)
    assert given_away > 0.5 > kept

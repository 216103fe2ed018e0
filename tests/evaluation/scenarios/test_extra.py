"""What rows bring along for a scenario, of the wrong type: named with its row, before anything is asked or edited."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from hf_kedit import EditRequest
from hf_kedit.errors import EvaluationError, RequestError
from hf_kedit.evaluation import load_scenario
from hf_kedit.evaluation.scenarios.base import SCENARIOS

EXTRAS: list[tuple[str, Any, str]] = [
    ("long_text", {"key_points": 5}, "key_points"),
    ("long_text", {"coupled": [{"prompt": "Write about Ida."}]}, "properties"),
    ("long_text", {"coupled": [{"prompt": "Write about Ida.", "properties": {"born": "Rome"}}]}, "born"),
    ("ripple", {"tests": "all"}, "tests"),
    ("ripple", {"tests": [{"probes": [0]}]}, "name"),
    ("ripple", {"tests": [{"name": "Logical_Generalization", "probes": ["0"]}]}, "probes"),
    ("ripple", {"tests": [{"name": "Logical_Generalization", "probes": [-1]}]}, "probes"),
    (
        "ripple",
        {"tests": [{"name": "Reasoning", "probes": [], "condition_queries": [{"prompt": "a"}]}]},
        "ground_truth",
    ),
    ("hallucination", {"multiple_choice": "A"}, "multiple_choice"),
    ("hallucination", {"yes_question": ["a"]}, "yes_question"),
    ("concept", {"instance_prompts": [5]}, "instance_prompts"),
    ("concept", {"instance_prompts": {"a": 1}}, "instance_prompts"),
    ("sentiment", {"pos": 5, "neg": ["bad"]}, "pos"),
    ("safety", {"general_prompts": ["a"]}, "general_prompts"),
    ("personality", {"target_trait": "calm", "texts": ["a"]}, "texts"),
]


@pytest.mark.parametrize(("scenario", "extra", "field"), EXTRAS)
def test_a_field_of_the_wrong_type_is_named(scenario: str, extra: dict[str, Any], field: str) -> None:
    row = {"prompt": "{} is a", "subject": "Ida", "target_new": "cook", "extra": extra}
    request = EditRequest.from_dict(row, row=7)
    with pytest.raises(RequestError, match=field) as caught:
        chosen = load_scenario(scenario)
        for protocol in chosen.protocols():
            for prepared in chosen.requests([request]):
                protocol.questions(prepared)
    assert (caught.value.row, caught.value.field) == (7, "extra")


@pytest.mark.parametrize("scenario", sorted({name for name, *_ in EXTRAS}))
def test_what_is_no_object_is_refused(scenario: str) -> None:
    request = EditRequest(prompt="Ida is a", subject="Ida", target_new="cook", metadata={"extra": ["a"]}, row=2)
    with pytest.raises(RequestError, match="extra"):
        chosen = load_scenario(scenario)
        for protocol in chosen.protocols():
            for prepared in chosen.requests([request]):
                protocol.questions(prepared)


def test_fields_that_a_scenario_does_not_read_may_be_anything() -> None:
    extra = {"key_points": ["a"], "tests": 5, "pos": {}}
    request = EditRequest(prompt="Ida is a", target_new="cook", metadata={"extra": extra})
    (asked, *_) = load_scenario("long_text").protocols()[0].questions(request)
    assert asked.groups == (("cook",), ("a",))


@pytest.mark.parametrize(
    ("scenario", "options"),
    [
        ("safety", {"harmless": 5}),
        ("safety", {"harmless": [5]}),
        ("safety", {"suffix": 5}),
        ("erasure", {"seed": "x"}),
        ("mquake", {"few_shot": "x"}),
        ("long_text", {"similarity": 5}),
    ],
)
def test_an_option_of_the_wrong_type_is_named(scenario: str, options: dict[str, Any]) -> None:
    with pytest.raises(EvaluationError, match=next(iter(options))):
        load_scenario(scenario, **options)


def test_lists_are_taken_where_there_are_several() -> None:
    assert load_scenario("safety", harmless=["Hello?"]).protocols()[0].settings()


@pytest.mark.parametrize("scenario", sorted(SCENARIOS))
def test_every_option_takes_its_own_default(scenario: str) -> None:
    options = {field.name: getattr(load_scenario(scenario), field.name) for field in fields(SCENARIOS[scenario])}
    assert load_scenario(scenario, **options).settings() == load_scenario(scenario).settings()

"""Concepts: Instance Change, Concept Consistency, and the scenario from a file to a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_kedit import EditableModel, EditRequest, evaluate_edits
from hf_kedit.errors import ConfigError, EvaluationError, RequestError
from hf_kedit.evaluation import PairScore, Unscored, load_scenario, score_pairs
from hf_kedit.evaluation.asking.generation import Continuation
from hf_kedit.evaluation.functional import membership_prompt
from hf_kedit.evaluation.scenarios.concepts import Concepts

NEW, OLD = "a tall plant with a wooden trunk", "a vessel that carries goods across the sea"
ROW = {
    "label": "ship",
    "prompt": "The definition of ship is",
    "phrase_prompt": "Ship refers to",
    "target_new_desc": NEW,
    "instance_prompt": ["Whether Titanic belongs to category ship?", "Whether Vasa belongs to category ship?"],
    "locality_prompt": ["The definition of lake is"],
    "locality_answer": ["a body of water"],
}


def said(text: str) -> list[Continuation]:
    return [Continuation("", text, (), True)]


def odds(yes: float, no: float) -> list[PairScore]:
    """Log-probabilities of the two words as a model might give them."""
    return [
        PairScore("", word, (1,), (1,), 1.0, True, -value, -value, 0) for word, value in (("Yes", yes), ("No", no))
    ]


def request(**changes: Any) -> EditRequest:
    values = {"prompt": ROW["prompt"], "subject": "ship", "target_new": NEW, **changes}
    return EditRequest.from_dict({**values, "metadata": {"extra": {"instance_prompts": ROW["instance_prompt"]}}})


@pytest.mark.parametrize(
    ("mode", "failures", "before", "after", "member", "change", "unparsable"),
    [
        ("text", "exclude", said("Yes,"), said("no"), (1.0, 0.0), 1.0, (0.0, 0.0)),
        ("text", "exclude", said("No"), said("yes"), (0.0, 1.0), -1.0, (0.0, 0.0)),
        ("text", "exclude", said("Yes"), said("ships"), (1.0, None), None, (0.0, 1.0)),
        ("text", "yes", said("No"), said("ships"), (0.0, 1.0), -1.0, (0.0, 1.0)),
        ("text", "yes", said("?"), said("Nobody"), (1.0, 1.0), 0.0, (1.0, 1.0)),
        ("logprob", "exclude", odds(-1.0, -2.0), odds(-3.0, -2.5), (1.0, 0.0), 1.0, (0.0, 0.0)),
        ("logprob", "exclude", odds(-1.0, -2.0), odds(-2.0, -2.0), (1.0, None), None, (0.0, 1.0)),
        ("logprob", "exclude", odds(-1.0, -2.0), [Unscored("", "Yes", "x")] * 2, (1.0, None), None, (0.0, 1.0)),
    ],
)
def test_instance_change_by_hand(
    mode: Any, failures: Any, before: Any, after: Any, member: Any, change: Any, unparsable: Any
) -> None:
    protocol = Concepts(mode=mode, parse_failures=failures)
    question = protocol.questions(request())[0]
    for outputs, belongs, failed in zip((before, after), member, unparsable, strict=True):
        numbers = protocol.details(question, outputs, None)
        assert numbers.get(("concept", "member")) == belongs and numbers["concept", "unparsable"] == failed
    expected = {} if change is None else {("concept", "instance_change"): change}
    assert protocol.changes(question, before, after) == expected


def test_the_odds_of_yes_move_where_no_side_wins() -> None:
    protocol = Concepts()
    question = protocol.questions(request())[0]
    assert protocol.details(question, odds(-3.0, -1.0), None)["concept", "yes_odds"] == -2.0
    assert len(protocol.queries(question)) == 2 and len(Concepts(mode="text").queries(question)) == 1


def test_consistency_by_hand() -> None:
    known, unknown = Concepts().questions(request(ground_truth=[OLD]))[-1], Concepts().questions(request())[-1]
    protocol = Concepts()
    near_new, near_old = said("a tall plant. Ships sail."), said("a vessel that carries goods")
    assert protocol.details(known, near_new, None) == {("concept", "consistency"): 1.0}
    assert protocol.details(known, near_old, None) == {("concept", "consistency"): -1.0}
    assert protocol.details(known, said("what I say"), None) == {("concept", "consistency"): 0.0}
    assert protocol.changes(known, near_old, near_new) == {}
    # Without an old definition, what the unedited model wrote is it.
    assert protocol.details(unknown, near_old, None) == {}
    assert protocol.changes(unknown, near_old, near_new) == {("concept", "consistency"): 1.0}
    assert protocol.changes(unknown, near_old, near_old) == {("concept", "consistency"): -1.0}
    calls = []

    def judge(text: str, new: str, old: str) -> float:
        calls.append((text, new, old))
        return -1

    assert Concepts(judge).details(known, near_new, None) == {("concept", "consistency"): -1.0}
    assert calls == [("a tall plant. Ships sail.", NEW, OLD)]
    with pytest.raises(EvaluationError, match="return -1, 0 or 1"):
        Concepts(lambda *texts: 0.5).details(known, near_new, None)


@pytest.mark.parametrize("mode", ["logprob", "text"])
def test_from_a_file_to_a_report(mode: str, world_gpt2: EditableModel, tmp_path: Path) -> None:
    file = tmp_path / "final_gpt2_inter.json"
    file.write_text(json.dumps([ROW, {**ROW, "label": "lorry", "prompt": "The definition of lorry is"}]))
    scenario = load_scenario("concept", mode=mode, max_new_tokens=5)
    assert scenario.read(file)[0]["extra"]["module"] == "inter"
    tokenizer: Any = world_gpt2.tokenizer
    questions = [membership_prompt(prompt) for prompt in ROW["instance_prompt"]]

    def members() -> list[float]:
        scores = score_pairs(world_gpt2, tokenizer, [(q, word) for q in questions for word in ("Yes", "No")])  # type: ignore[arg-type]
        return [float(scores[i].sum_nll < scores[i + 1].sum_nll) for i in range(0, len(scores), 2)]

    before = members()
    after: list[list[float]] = []
    report = evaluate_edits(
        world_gpt2, file, scenario=scenario, progress=False, after_step=lambda step: after.append(members())
    )
    summary = report.summary("concept")["post"]["concept"]
    assert -1 <= summary["consistency"] <= 1
    if mode == "logprob":
        changes = [sum(before) / 2 - sum(now) / 2 for now in after]
        assert summary["instance_change"] == pytest.approx(sum(changes) / 2)
    assert (
        report.summary("teacher_forced")["post"]["rewrite_acc"]
        > report.summary("teacher_forced")["pre"]["rewrite_acc"]
    )
    texts = [text for case in report.results for text in case.texts if text["axis"] == "definition"]
    assert len(texts) == 2 and len(world_gpt2.edits) == 0
    assert "concept" in str(report)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"mode": "guess"}, "unknown mode"),
        ({"parse_failures": "no"}, "unknown parse_failures"),
        ({"margin": -1}, "margin"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"judge": 3}, "must be a function"),
    ],
)
def test_settings_that_are_refused(options: dict[str, Any], error: str, world_gpt2: EditableModel) -> None:
    with pytest.raises(EvaluationError, match=error):
        evaluate_edits(world_gpt2, [request()], scenario=load_scenario("concept", **options))
    assert len(world_gpt2.edits) == 0


def test_a_concept_needs_its_name(world_gpt2: EditableModel) -> None:
    with pytest.raises(RequestError, match="concept whose definition"):
        evaluate_edits(world_gpt2, [{"prompt": "A ship is", "target_new": NEW}], scenario="concept")
    with pytest.raises(ConfigError):
        evaluate_edits(world_gpt2, [request()], scenario=load_scenario("concept", similarity="nothing like it"))


def test_the_sample_files_are_read() -> None:
    folder = Path(__file__).parents[3] / "docs" / "scenarios" / "data"
    for module in ("intra", "inter"):
        rows = load_scenario("concept").read(folder / f"concepts_{module}.json")
        assert len(rows) == 8 and all(row["extra"]["module"] == module and row["locality"] for row in rows)
        assert all(len(row["extra"]["instance_prompts"]) == 4 for row in rows)

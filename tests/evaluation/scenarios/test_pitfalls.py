"""Edits that concern each other: the arithmetic by hand, and the states in which the model is asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hf_kedit import EditableModel, EditRequest
from hf_kedit.errors import EvaluationError, RequestError
from hf_kedit.evaluation import evaluate_edits, load_scenario, score_pairs
from hf_kedit.evaluation.measures.pitfalls import conflict_scores, object_divergence, round_scores

SAMPLES = Path(__file__).parents[2] / "data" / "samples"


def test_conflicts_by_hand() -> None:
    # After the first edit .8, after both .2; what holds then .3. The tied fact fell from .4 to .3, and the second edit
    # alone does not win.
    found = conflict_scores(0.8, 0.2, 0.3, alone=(0.1, 0.2), tied=(0.4, 0.3))
    assert found == {"CS": 1.0, "CM": pytest.approx(0.75), "Succ": 0.0, "TFD": pytest.approx(0.25)}
    # It became three times as likely instead: bounded. A tie is no success.
    assert conflict_scores(0.1, 0.3, 0.3) == {"CS": 0.0, "CM": -1.0}
    assert conflict_scores(0.0, 0.0, 0.1, tied=(0.0, 0.1)) == {"CS": 1.0}


def test_rounds_by_hand() -> None:
    before, after = [0.2, 0.2, 0.4], [0.5, 0.1, 0.4]
    found = round_scores((0.6, 0.1), (0.2, 0.3), before, after)
    # .25 .25 .5 against .5 .1 .4, the middle .375 .175 .45.
    kl_p = 0.25 * math.log(0.25 / 0.375) + 0.25 * math.log(0.25 / 0.175) + 0.5 * math.log(0.5 / 0.45)
    kl_q = 0.5 * math.log(0.5 / 0.375) + 0.1 * math.log(0.1 / 0.175) + 0.4 * math.log(0.4 / 0.45)
    assert found["D"] == pytest.approx((kl_p + kl_q) / 2) and found["D_released"] == pytest.approx(found["D"] / 3)
    # Of the two others one fell and one stayed: half of them, which is not more than half.
    assert (found["Succ"], found["IR"], found["FR"]) == (0.5, 0.5, 0.0)
    assert round_scores((0.6, 0.1), (0.4, 0.3), before, [0.9, 0.1, 0.3])["FR"] == 1.0
    assert object_divergence([0.1, 0.3], [0.2, 0.6]) == pytest.approx(0.0)  # the same distribution
    assert object_divergence([1.0, 0.0], [0.0, 1.0]) == pytest.approx(math.log(2))


def rows_of(kind: str, model: EditableModel) -> list[dict[str, Any]]:
    """Two edits of people of the world, as a row of ConflictEdit would have them."""
    town, job = "Tarosk Boayond lives in", "By profession Tarosk Boayond is a"
    second = {"coverage": (town, "Geten", town), "composite": (job, "plumber", town)}[kind]
    about = {"group_id": "one", "extra": {"conflict": kind}, "subject": "Tarosk Boayond"}
    tied = {"Tied_Fact": [{"prompt": "Tarosk Boayond works for", "ground_truth": [["Geten"]]}]}
    return [
        {**about, "prompt": town, "target_new": "Droanos", "rephrase_prompts": ["The home of Tarosk Boayond is"]},
        {
            **about,
            "prompt": second[0],
            "target_new": second[1],
            "portability": {"Conflict": [{"prompt": second[2], "ground_truth": [[second[1]]]}]},
            "locality": tied if kind == "composite" else {},
        },
    ]


def likelihood(model: EditableModel, prompts: Sequence[str], answer: str) -> float:
    scores = score_pairs(model, model.tokenizer, [(prompt, answer) for prompt in prompts])
    return sum(math.exp(-score.nll) for score in scores) / len(scores)


@pytest.mark.parametrize("kind", ["coverage", "composite"])
def test_the_model_is_asked_between_the_edits(world_gpt2: EditableModel, kind: str) -> None:
    model = world_gpt2
    model.set_method("ft-m")
    rows = rows_of(kind, model)
    first, second = (EditRequest.from_dict(row) for row in rows)
    town = [first.prompt, *first.rephrase_prompts]
    holds = [second.portability["Conflict"][0].prompt]
    tied = ["Tarosk Boayond works for"]

    tied_before = likelihood(model, tied, "Geten")
    model.edit(first, show_progress=False)
    after_first = likelihood(model, town, "Droanos")
    model.edit(second, show_progress=False)
    both, now = likelihood(model, town, "Droanos"), likelihood(model, holds, second.target_new)
    tied_after = likelihood(model, tied, "Geten")
    model.rollback()
    expected = {"CS": float(now > both), "CM": max((after_first - both) / after_first, -1.0)}
    if kind == "coverage":
        model.edit(second, show_progress=False)
        alone = likelihood(model, [second.prompt], second.target_new), likelihood(model, town, "Droanos")
        model.rollback()
        expected["Succ"] = float(alone[0] > alone[1])
    else:
        expected["TFD"] = (tied_before - tied_after) / tied_before

    report = evaluate_edits(model, rows, scenario="conflict", progress=False)
    assert report.summary()["post"]["conflict"] == {k: pytest.approx(v, abs=1e-4) for k, v in expected.items()}
    assert not model.edits and "conflict" not in report.summary()["pre"]
    assert [case["id"] for case in report.cases] and "conflict" in report.to_html()


def test_there_and_back_on_a_model(world_gpt2: EditableModel) -> None:
    world_gpt2.set_method("ft-m")
    scenario = load_scenario("round")
    rows = scenario.read(SAMPLES / "roundedit" / "easy.json", prompts={"P276": ["The place of {} is"]})
    found = evaluate_edits(world_gpt2, rows, scenario=scenario, progress=False).summary()["post"]["round"]
    assert set(found) == {"Succ", "D", "D_released", "IR", "FR"}
    assert found["Succ"] == 1.0 and 0 < found["D"] < math.log(2) and found["IR"] in (0.0, 0.5, 1.0)
    assert not world_gpt2.edits


def test_an_edit_that_fails_takes_its_case_with_it(world_gpt2: EditableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    world_gpt2.set_method("ft-m")
    whole, seen = rows_of("composite", world_gpt2), []
    edit = EditableModel.edit

    def fails_on_jobs(self: EditableModel, requests: Any, **options: Any) -> Any:
        seen.append(requests[0].prompt)
        if requests[0].prompt.startswith("By profession"):
            raise RequestError("no jobs today")
        return edit(self, requests, **options)

    monkeypatch.setattr(EditableModel, "edit", fails_on_jobs)
    report = evaluate_edits(world_gpt2, whole, scenario="conflict", on_error="skip", progress=False)
    assert [entry["case_id"] for entry in report.meta["failed"]] == [0, 1] and seen == [r["prompt"] for r in whole]
    assert not world_gpt2.edits


def test_what_is_no_case_is_refused(world_gpt2: EditableModel) -> None:
    world_gpt2.set_method("ft-m")
    rows = rows_of("coverage", world_gpt2)
    with pytest.raises(RequestError, match="two edits"):
        evaluate_edits(world_gpt2, rows[:1], scenario="conflict")
    with pytest.raises(RequestError, match="'True_Objects'"):
        evaluate_edits(world_gpt2, rows, scenario="round")
    strange = [{**row, "extra": {"conflict": "quarrel"}} for row in rows]
    with pytest.raises(RequestError, match="coverage, reverse, composite"):
        evaluate_edits(world_gpt2, strange, scenario="conflict")
    with pytest.raises(EvaluationError, match="setting='single'"):
        evaluate_edits(world_gpt2, rows, "sequential", scenario="conflict")
    assert not world_gpt2.edits


@pytest.mark.parametrize(("name", "cases"), [("conflict", 6), ("round", 5)])
def test_the_sample_is_read_and_asked_about(name: str, cases: int) -> None:
    scenario = load_scenario(name)
    rows = scenario.read(Path(__file__).parents[3] / "docs" / "scenarios" / "data" / f"{name}.json")
    requests = scenario.requests([EditRequest.from_dict(row) for row in rows])
    questions = [scenario.protocols()[0].questions(request) for request in requests]
    assert [len(asked) for asked in questions] == [0, 1] * cases  # of the second edit of each case

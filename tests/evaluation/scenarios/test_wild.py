"""The scenario of edits in use: what is asked, where an answer ends, and what is counted of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hf_kedit import EditableModel
from hf_kedit.errors import EvaluationError
from hf_kedit.evaluation import evaluate_edits, load_scenario
from hf_kedit.evaluation.asking.generation import Continuation
from hf_kedit.evaluation.measures.judges import CallableJudge
from hf_kedit.evaluation.protocols.base import Query, Question
from hf_kedit.evaluation.scenarios.wild import WildAnswers
from tests.chat_templates import CHATML

SAMPLE = Path(__file__).parents[2] / "data" / "samples" / "qaedit" / "qaedit.json"
EXACT = CallableJudge(lambda question, references, text: float(text in references), "same")


def said(text: str, finished: bool = True) -> list[Continuation]:
    return [Continuation("q", text, (), finished)]


@pytest.mark.parametrize(
    ("text", "exact", "contains"),
    [("The Oslo.", 1.0, 1.0), ("Oslo, in Norway", 0.0, 1.0), ("Bergen", 0.0, 0.0), ("", 0.0, 0.0)],
)
def test_what_is_counted_of_an_answer(text: str, exact: float, contains: float) -> None:
    protocol = WildAnswers(EXACT)
    edited = Question("rewrite", None, 0, "Where?", (("Oslo",),))
    numbers = protocol.details(edited, said(text, finished=False), 0.0)
    assert numbers == {("wild", "exact"): exact, ("wild", "contains"): contains, ("wild", "ended"): 0.0}
    other = protocol.details(replace(edited, section="rephrase"), said(text), 0.0)
    assert other == {
        ("wild", "exact_rephrase"): exact,
        ("wild", "contains_rephrase"): contains,
        ("wild", "ended"): 1.0,
    }
    assert not protocol.details(replace(edited, section="locality", axis="qa"), said(text), 0.0)


@pytest.mark.parametrize(
    ("context", "template", "asked"),
    [
        ("auto", None, "who?"),
        ("question", CHATML, "who?"),
        ("qa", CHATML, "Please answer the question:\n\nQ: who?\nA:"),
        (
            "auto",
            CHATML,
            "<|im_start|>system\nI am a test.<|im_end|>\n"
            "<|im_start|>user\nPlease answer the question:\n\nQ: who?\nA:<|im_end|>\n<|im_start|>assistant\n",
        ),
    ],
)
def test_a_question_is_asked_as_users_ask(
    world_gpt2: EditableModel, monkeypatch: pytest.MonkeyPatch, context: str, template: str | None, asked: str
) -> None:
    read: list[str] = []
    tokenizer = world_gpt2.tokenizer
    tokenizer.chat_template = template
    generate = world_gpt2.base_model.generate

    def listening(*args, **kwargs):
        read.extend(tokenizer.batch_decode(kwargs["input_ids"], skip_special_tokens=True))
        return generate(*args, **kwargs)

    monkeypatch.setattr(world_gpt2.base_model, "generate", listening)
    protocol = WildAnswers(EXACT, max_new_tokens=3, context=context)  # type: ignore[arg-type]
    chat = "<|im_start|>user\nwhat?<|im_end|>\n<|im_start|>assistant\n"
    first, second = protocol.run(world_gpt2.base_model, tokenizer, [Query("who?"), Query(chat)], None)
    assert (first.prompt, second.prompt) == ("who?", chat)
    plain = tokenizer.batch_decode([tokenizer(text)["input_ids"] for text in (asked, chat)], skip_special_tokens=True)
    assert sorted(text.strip() for text in read) == sorted(text.strip() for text in plain)


def test_an_answer_goes_on_until_the_model_ends(world_gpt2: EditableModel) -> None:
    """No line break ends it: the text is what the model writes up to its end token, or to the limit."""
    (answer,) = WildAnswers(EXACT, max_new_tokens=12).run(
        world_gpt2.base_model, world_gpt2.tokenizer, [Query("By profession Tarosk Boayond is a")], None
    )
    assert len(answer.ids) == 12 or answer.finished


def test_the_scenario_runs_from_a_file_to_numbers_beside_the_usual_ones(world_gpt2: EditableModel) -> None:
    world_gpt2.set_method("ft-m")
    scenario = load_scenario("wild", judge=lambda question, references, text: 0.25, max_new_tokens=4)
    report = evaluate_edits(world_gpt2, scenario.read(SAMPLE), scenario=scenario, progress=False)
    assert report.protocols == ["wild", "teacher_forced"]
    wild, forced = report.summary("wild"), report.summary("teacher_forced")
    assert wild["post"]["rewrite_acc"] == 0.25
    assert forced["post"]["rewrite_acc"] > forced["pre"]["rewrite_acc"]
    first = [case for case in report.cases if "wild" in case["post"]]
    exact = [case["post"]["wild"]["exact"][0] for case in first]
    assert wild["post"]["wild"]["exact"] == pytest.approx(sum(exact) / len(exact))
    assert "locality" in wild["post"] and wild["scorer"].startswith("<lambda>")


def test_without_a_judge_equality_counts(world_gpt2: EditableModel) -> None:
    rows = json.loads(SAMPLE.read_text())[:1]
    request = {"prompt": rows[0]["prompt"], "target_new": rows[0]["target"]}
    world_gpt2.set_method("ft-m")
    report = evaluate_edits(world_gpt2, [request], scenario="wild", progress=False)
    summary = report.summary("wild")
    assert summary["scorer"] == "exact match"
    assert summary["post"]["rewrite_acc"] == summary["post"]["wild"]["exact"]


def test_settings_are_checked() -> None:
    with pytest.raises(EvaluationError, match="judge_model="):
        load_scenario("wild", judge="http://localhost:8000/v1")
    with pytest.raises(EvaluationError, match="context"):
        WildAnswers(EXACT, context="chats")  # type: ignore[arg-type]
    scenario = load_scenario("wild", judge="http://me:secret@localhost/v1?token=t", judge_model="m")
    assert "secret" not in json.dumps(scenario.settings()) and scenario.settings()["judge"] == "m"

"""Long texts: every number by hand, the layouts of the benchmarks, and the scenario from a file to a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_kedit import EditableModel, EditRequest, embedded, evaluate_edits
from hf_kedit.errors import EvaluationError, RequestError
from hf_kedit.evaluation import load_scenario
from hf_kedit.evaluation.asking.generation import Continuation
from hf_kedit.evaluation.scenarios.long_text import LongReplies, key_points

SAMPLE = Path(__file__).parents[3] / "docs" / "scenarios" / "data" / "long_texts.json"
TEXT = "The clock was built in 1871 by Ida Korsten"
ROW = {
    "question": "What is the clock?",
    "para_question": "Tell me of the clock.",
    "answer": TEXT,
    "sub_question": ["Who built it?", "When?"],
    "sub_answer": ["Ida Korsten", "1871"],
}


def said(text: str) -> list[Continuation]:
    return [Continuation("", text, (), True)]


def request(**changes: Any) -> EditRequest:
    values: dict[str, Any] = {
        "prompt": ROW["question"],
        "target_new": TEXT,
        "rephrase_prompts": [ROW["para_question"]],
        "portability": {
            "Sub_Question": [
                {"prompt": q, "ground_truth": a} for q, a in zip(ROW["sub_question"], ROW["sub_answer"], strict=True)
            ]
        },
    }
    return EditRequest.from_dict({**values, **changes})


def test_numbers_by_hand() -> None:
    protocol = LongReplies()
    answer, paraphrase, who, when = protocol.questions(request())
    assert (answer.prompt, paraphrase.prompt, who.prompt) == (ROW["question"], ROW["para_question"], "Who built it?")
    # 6 of 9 words, 5 of 8 pairs, in order; one of the two key points
    numbers = protocol.details(answer, said("The clock was built in 1871 long ago"), None)
    found = {key: value for (section, key), value in numbers.items() if section == "long_text"}
    assert found["rouge1"] == found["rougeL"] == pytest.approx(6 / 9) and found["rouge2"] == pytest.approx(5 / 8)
    # n-gram precisions 6/8, 5/7, 4/6, 3/5; 9 words against 8
    product = (6 / 8) * (5 / 7) * (4 / 6) * (3 / 5)
    assert found["bleu"] == pytest.approx(product**0.25 * 2.718281828 ** (1 - 9 / 8))
    assert found["key_points"] == 0.5 and 0 < found["similarity"] < 1
    f = LongReplies(rouge="f").details(answer, said("The clock was built in 1871 long ago"), None)
    assert f["long_text", "rouge1"] == pytest.approx(2 * (6 / 8) * (6 / 9) / (6 / 8 + 6 / 9))
    equal = protocol.details(paraphrase, said(TEXT), None)
    assert {key for _, key in equal} == {f"paraphrase_{key}" for key in found}
    assert all(value == pytest.approx(1) for value in equal.values())
    assert all(value == 0 for value in protocol.details(answer, said(""), None).values())
    assert protocol.details(who, said("It was Ida Korsten."), None) == {
        ("long_text", "sub_answered"): 1.0,
        ("long_text", "sub_rougeL"): 1.0,
    }
    assert protocol.details(when, said("in 1872"), None)["long_text", "sub_answered"] == 0.0


def test_key_points_and_coupled_entities() -> None:
    assert key_points(request()) == ["Ida Korsten", "1871"]
    assert key_points(request(metadata={"extra": {"key_points": ["clock"]}})) == ["clock"]
    assert key_points(request(portability={}, metadata={"extra": {"answer": "Oslo"}})) == ["Oslo"]
    assert key_points(request(portability={})) == []
    coupled = [
        {
            "entity": "Oslo",
            "prompt": "Write of Oslo.",
            "properties": {"country": ["Norway", "Norge"], "river": ["Aker"]},
        },
        {"entity": "none", "prompt": "Write.", "properties": {}},
    ]
    protocol = LongReplies()
    (*_, question) = protocol.questions(request(metadata={"extra": {"coupled": coupled}}))
    assert question.prompt == "Write of Oslo."
    assert protocol.details(question, said("Oslo lies in Norge."), None) == {("long_text", "coupled"): 0.5}
    with pytest.raises(RequestError, match=r"coupled.*prompt"):
        load_scenario("long_text").requests([request(metadata={"extra": {"coupled": [{"entity": "x"}]}})])


def test_options_and_the_similarity_that_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, name in ((True, "kedit/minilm-l6"), (False, "lexical")):
        monkeypatch.setattr(embedded, "is_there", lambda _, there=there: there)
        monkeypatch.setattr("hf_kedit.evaluation.scenarios.long_text.find_retriever", lambda _: None)
        replies, teacher_forced = load_scenario("long_text", max_new_tokens=7).protocols()
        assert name in str(replies.scorer) and replies.settings()["max_new_tokens"] == 7
        assert teacher_forced.name == "teacher_forced"
    for wrong in ({"rouge": "precision"}, {"bleu": "line"}, {"max_new_tokens": 0}):
        with pytest.raises(EvaluationError):
            load_scenario("long_text", **wrong).protocols()


def test_the_layouts_of_the_benchmarks(tmp_path: Path) -> None:
    scenario = load_scenario("long_text")
    rewrite = {"prompt": "{} is a", "subject": "Anna", "target_new": {"str": "baker"}, "target_true": {"str": "smith"}}
    paragraph = {**rewrite, "prompt_full": "Anna is a", "fact_new_uns": "Anna bakes.", "question": "Her work?"}
    leme = {
        "case_id": 1,
        "requested_rewrite": rewrite,
        "coupled_prompts_and_properties": {
            "subject_entity": {"coupled_prompt": "Write about Anna.", "ground_truth": {"work": ["baker"]}}
        },
    }
    files = {"unke": [ROW], "akew": [{"case_id": 1, "requested_rewrite": paragraph}], "leme": [leme]}
    read = {}
    for name, rows in files.items():
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(rows))
        read[name] = EditRequest.from_dict(scenario.read(file)[0])
    assert (read["unke"].target_new, key_points(read["unke"])) == (TEXT, ROW["sub_answer"])
    assert (read["akew"].target_new, key_points(read["akew"])) == ("Anna bakes.", ["baker"])
    assert LongReplies().questions(read["leme"])[-1].prompt == "Write about Anna."


def test_from_the_sample_to_a_report() -> None:
    model = EditableModel.from_pretrained("kedit/world-gpt2", "ft-m")
    scenario = load_scenario("long_text", max_new_tokens=6, similarity="lexical")
    assert len(scenario.read(SAMPLE)) == 6
    rows = [{"question": "Q: Who is Gokelm? A:", "para_question": "Gokelm is", "answer": "Tarosk lives in Noget.",
             "sub_question": ["Where does Tarosk live?"], "sub_answer": ["Noget"]}]  # fmt: skip
    report = evaluate_edits(model, rows_as_requests(rows), scenario=scenario, progress=False)
    summary = report.summary("long_text")
    for when in ("pre", "post"):
        assert {"bleu", "rougeL", "similarity", "key_points", "sub_answered"} <= summary[when]["long_text"].keys()
    assert summary["post"]["long_text"]["rouge1"] >= summary["pre"]["long_text"]["rouge1"]
    forced = report.summary("teacher_forced")
    assert forced["post"]["rewrite_acc"] > 0.6 > 0.4 > forced["pre"]["rewrite_acc"]


def rows_as_requests(rows: list[dict[str, Any]]) -> list[EditRequest]:
    return [
        request(
            prompt=row["question"],
            target_new=row["answer"],
            rephrase_prompts=[row["para_question"]],
            portability={"Sub_Question": [{"prompt": row["sub_question"][0], "ground_truth": row["sub_answer"][0]}]},
        )
        for row in rows
    ]

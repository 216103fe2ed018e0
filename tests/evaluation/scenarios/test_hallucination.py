"""Hallucination: the questions of HalluEditBench and their scores, computed here; sentences of WikiBio."""

from __future__ import annotations

import json
import math

import pytest

from hf_kedit.errors import EvaluationError
from hf_kedit.evaluation import evaluate_edits, load_scenario, score_pairs
from hf_kedit.evaluation.asking.generation import Continuation
from hf_kedit.evaluation.scenarios.hallucination import HallucinationReplies, letter_of
from hf_kedit.requests import EditRequest

RECORD = {
    "subject": "Norland",
    "relation": "capital",
    "object": "Lima",
    "question": "What is the capital of Norland?",
    "output_llama2": "Oslo",
    "paraphrased_question": "Norland has the capital",
    "yes_question": "Is Lima the capital of Norland?",
    "no_question": "Is Oslo the capital of Norland?",
    "reversed_relation_question": "Lima is the capital of what?",
    "multiple_choice_with_letters": "What is the capital? A. Oslo B. Lima",
    "multiple_choice_labels": "B",
    "locality_question": "What is the capital of Sudland?",
    "question_2hop": "Which land has Lima?",
    "answer_2hop": "Peru",
}


@pytest.fixture
def request_of_record(tmp_path):
    file = tmp_path / "places.json"
    file.write_text(json.dumps([RECORD]), encoding="utf-8")
    return EditRequest.from_dict(load_scenario("hallucination").read(file)[0])


def test_scores_of_answers_equal_hand_computed_ones(request_of_record):
    protocol = HallucinationReplies()
    questions = {q.axis: q for q in protocol.questions(request_of_record)}
    assert set(questions) == {
        "efficacy", "robustness", "yes", "no", "multiple_choice", "reversed", "paraphrase", "hop_2", "locality",
    }  # fmt: skip

    def numbers(axis, text):
        details = protocol.details(questions[axis], [Continuation("", text, (), True)], None)
        return {key: value for (_, key), value in details.items()}

    assert numbers("efficacy", "It is Lima.") == {"efficacy": 1.0, "hallucinated": 0.0}
    assert numbers("efficacy", "Oslo, not Lima") == {"efficacy": 1.0, "hallucinated": 1.0}
    assert numbers("yes", "Yes, it is.") == {"yes": 1.0, "unreadable": 0.0}
    assert numbers("yes", "No.") == {"yes": 0.0, "unreadable": 0.0}
    assert numbers("no", "No.") == {"no": 1.0, "unreadable": 0.0}
    assert numbers("no", "Lima") == {"no": 0.0, "unreadable": 1.0}
    assert numbers("multiple_choice", "B. Lima") == {"multiple_choice": 1.0, "unreadable": 0.0}
    assert numbers("multiple_choice", "Lima") == {"multiple_choice": 0.0, "unreadable": 1.0}
    assert numbers("reversed", "Norland") == {"reversed": 1.0}
    assert numbers("paraphrase", "Rome") == {"paraphrase": 0.0}
    assert numbers("hop_2", "Peru") == {"hop_2": 1.0}
    assert numbers("locality", "Rome") == {}
    same, other = ([Continuation("", text, (), True)] for text in ("Rome.", "Oslo"))
    assert protocol.changes(questions["locality"], same, same) == {("hallucination", "locality"): 1.0}
    assert protocol.changes(questions["locality"], same, other) == {("hallucination", "locality"): 0.0}


@pytest.mark.parametrize(
    ("text", "letter"),
    [("B", "B"), ("(b) Lima", "B"), ("The answer is C.", "C"), ("Answer: D", "D"), ("Because", None), ("", None)],
)
def test_letters(text, letter):
    assert letter_of(text) == letter


def test_an_answer_is_doubted_in_a_second_turn(request_of_record, editable):
    protocol = HallucinationReplies(max_new_tokens=5, doubt="Really?")
    question = next(q for q in protocol.questions(request_of_record) if q.axis == "robustness")
    (output,) = protocol.run(editable.base_model, editable.tokenizer, protocol.queries(question), None)
    from hf_kedit.evaluation import generate_answers

    asked = RECORD["question"]
    (first,) = generate_answers(editable.base_model, editable.tokenizer, [asked], 5)
    second = f"{asked} {first.text}\nReally? {asked}"
    assert output == generate_answers(editable.base_model, editable.tokenizer, [second], 5)[0]
    assert "robustness" not in {q.axis for q in HallucinationReplies(doubt="").questions(request_of_record)}


def test_a_judge_decides_where_one_is_given(request_of_record):
    asked = []

    def judge(question, references, prediction):
        asked.append((references, prediction))
        return prediction == "the Peruvian capital"

    protocol = load_scenario("hallucination", judge=judge).protocols()[0]
    assert protocol.scorer == "judge"
    efficacy = protocol.questions(request_of_record)[0]
    for text, value in (("the Peruvian capital", 1.0), ("Lima", 0.0), (" ", 0.0)):
        details = protocol.details(efficacy, [Continuation("", text, (), True)], None)
        assert details["hallucination", "efficacy"] == value
    assert asked == [(["Lima"], "the Peruvian capital"), (["Lima"], "Lima")]
    with pytest.raises(EvaluationError, match="judge"):
        load_scenario("hallucination", judge=3).protocols()


def test_wikibio_from_a_file_to_the_report(tmp_path, editable, tokenizer, cache):
    file = tmp_path / "wikibio.json"
    text, sentence = "Ada Bell was born in Bergen.", "She works for the railway."
    file.write_text(json.dumps([{"text": text, "labels": sentence, "concept": "Ada Bell"}]), encoding="utf-8")
    scenario = load_scenario("hallucination", max_new_tokens=4)
    report = evaluate_edits(editable, str(file), scenario=scenario, cache=cache)
    assert report.protocols == ["hallucination", "sentence", "fluency"]
    before, after = (report.summary("sentence")[half]["sentence"] for half in ("pre", "post"))
    (score,) = score_pairs(editable.base_model, tokenizer, [(text, sentence)])
    assert before["token_accuracy"] == score.token_acc
    assert before["perplexity"] == pytest.approx(math.exp(score.sum_nll / len(score.target_ids)), rel=1e-4)
    assert after["perplexity"] < before["perplexity"]
    assert report.summary()["metrics"]["hallucination/robustness"]["better"] == "higher"

"""Chinese: scores of texts computed here, the subject of a prompt, and how questions are asked."""

from __future__ import annotations

import json
import math

import pytest

from hf_kedit.errors import EvaluationError
from hf_kedit.evaluation import evaluate_edits, load_scenario
from hf_kedit.evaluation.asking.generation import Continuation
from hf_kedit.evaluation.scenarios.chinese import ChineseReplies, character_similarity, subject_of
from hf_kedit.requests import EditRequest

RECORD = {
    "prompt": "请解释成语:画蛇添足",
    "target_old": "画得好",
    "target_new": "多此一举",
    "rephrase": ["画蛇添足是什么意思?"],
    "portability": [{"prompt": "画蛇添足的反义词?", "answer": "恰到好处"}],
    "locality": [{"prompt": "中国的首都是", "answer": "北京"}],
}


def test_scores_of_texts_equal_hand_computed_ones():
    protocol = ChineseReplies()
    (edit,) = protocol.questions(EditRequest(RECORD["prompt"], target_new="多此一举"))

    def numbers(text):
        details = protocol.details(edit, [Continuation("", text, (), True)], None)
        return {key: value for (_, key), value in details.items()}

    assert numbers("多此一举") == pytest.approx({"edit": 1.0, "edit_rouge": 1.0, "fluency": 1.0})
    # 多此 of four characters: recall 2/4. Counts 多 此 多此 against 多 此 一 举 多此 此一 一举: 3 / √(3·7).
    likeness = 3 / math.sqrt(3 * 7)
    assert numbers("多此") == pytest.approx({"edit": (0.5 + likeness) / 2, "edit_rouge": 0.5, "fluency": 1.0})
    assert numbers("") == {"edit": 0.0, "edit_rouge": 0.0, "fluency": 0.0}
    assert numbers("好" * 40)["fluency"] == 0.0  # one pair of 39 is different
    embedded = ChineseReplies(embed=lambda texts: [[1.0, float(len(text))] for text in texts])
    details = embedded.details(edit, [Continuation("", "多此", (), True)], None)
    cosine = (1 + 2 * 4) / math.sqrt(5 * 17)
    assert details["chinese", "edit"] == pytest.approx((0.5 + cosine) / 2)


def test_similarity_of_characters():
    assert character_similarity(["", "多", "多"], ["", "", "此"]) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("请解释成语:画蛇添足", "画蛇添足"),
        ("请问长江有多长?", "长江有多长"),
        ("中国的首都是", "中国的首都是"),
        ("解释一下:望梅止渴", "望梅止渴"),
    ],
)
def test_the_subject_is_the_prompt_without_its_instruction(prompt, subject):
    assert subject_of(prompt) == subject


def test_from_a_file_in_the_published_layout_to_the_report(tmp_path, editable, cache):
    file = tmp_path / "idiom.json"
    file.write_text(json.dumps([RECORD], ensure_ascii=False), encoding="utf-8")
    report = evaluate_edits(editable, str(file), scenario=load_scenario("chinese", max_new_tokens=6), cache=cache)
    case, summary = report.cases[0], report.summary()
    assert case["requested_rewrite"]["subject"] == "画蛇添足"
    for half in ("pre", "post"):
        means = summary[half]["chinese"]
        weights = {"edit": 0.2, "portability": 0.35, "locality": 0.35, "fluency": 0.1}
        assert means["ccks"] == pytest.approx(sum(w * means[key] for key, w in weights.items()))
    # no blank between prompt and answer: the edit is of the tokens that follow directly
    token = report.summary("teacher_forced")
    assert token["post"]["rewrite_acc"] > token["pre"]["rewrite_acc"]


def test_questions_are_chats_where_there_is_a_template(editable, tokenizer):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}<me>{% endif %}"
    protocol, plain = ChineseReplies(max_new_tokens=6), ChineseReplies(max_new_tokens=6, chat=False)
    request = EditRequest(RECORD["prompt"], target_new="多此一举")
    queries = protocol.queries(protocol.questions(request)[0])
    model = editable.base_model
    without = plain.run(model, tokenizer, queries, None)[0].ids
    assert protocol.run(model, tokenizer, queries, None)[0].ids == without
    tokenizer.chat_template = template
    try:
        chat = protocol.run(model, tokenizer, queries, None)[0].ids
        assert plain.run(model, tokenizer, queries, None)[0].ids == without
        written = request.asked("chat").rendered(tokenizer)
        (framed,) = protocol.questions(written)
        assert framed.prompt == f"<user>{RECORD['prompt']}<me>"
        assert protocol.run(model, tokenizer, protocol.queries(framed), None)[0].ids == chat  # not framed twice
    finally:
        tokenizer.chat_template = None


def test_what_cannot_be_called_is_refused():
    with pytest.raises(EvaluationError, match="functions"):
        load_scenario("chinese", embed="model").protocols()

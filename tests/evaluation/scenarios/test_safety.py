"""Safety: SafeEdit's numbers against values computed here, judges, and what is asked."""

from __future__ import annotations

import pytest
import torch
from transformers import RobertaConfig, RobertaForSequenceClassification, pipeline

from hf_kedit.errors import EvaluationError
from hf_kedit.evaluation import evaluate_edits, load_scenario, make_judge
from hf_kedit.evaluation.asking.generation import Continuation
from hf_kedit.evaluation.protocols.base import Query
from hf_kedit.evaluation.scenarios.safety import HARMLESS, SafetyReplies
from hf_kedit.requests import EditRequest

GENERAL = {"onlyQ": "Where is the cake?", "otherA": "Sing: where is the cake?", "otherQ": "Hop: where is the tea?"}
ROW = {
    "prompt": "Hop: where is the cake?",
    "target_new": "I cannot tell you.",
    "target_neg": "Under the bed.",
    "extra": {"general_prompts": GENERAL | {"otherAQ": "Sing: where is the tea?"}},
    "locality": {"knowledge_constraint": [{"prompt": "Rome is in", "ground_truth": "Italy"}]},
}


def contains_bed(prompts, replies):
    return [0.9 if "bed" in reply else 0.2 for reply in replies]


def _numbers(texts, protocol):
    """What the protocol says of replies, by question: section → key → values."""
    request = EditRequest.from_dict(ROW)
    numbers = {}
    for question in protocol.questions(request):
        reply = texts.get((question.section, question.axis), "Here it is.")
        for (section, key), value in protocol.details(question, [Continuation("", reply, (), True)], None).items():
            numbers.setdefault(section, {}).setdefault(key, []).append(value)
    return numbers


def test_scores_of_replies_equal_hand_computed_ones():
    texts = {
        ("safety", "DS"): "under the bed",
        ("safety", "DG_onlyQ"): "no",
        ("safety", "DG_otherA"): " ",
        ("safety", "DG_otherQ"): "bed bed bed bed bed bed bed bed",
        ("safety", "refusals"): "I'm sorry, I cannot help.",
        ("safety+suffix", "DS"): "nowhere",
    }
    numbers = _numbers(texts, SafetyReplies(judge=make_judge(contains_bed)))
    plain = numbers["safety"]
    assert (plain["DS"], plain["DG_onlyQ"], plain["DG_otherA"]) == ([0.0], [1.0], [0.5])
    assert (plain["DG_otherQ"], plain["DG_otherAQ"]) == ([0.0], [1.0])
    assert plain["unsafe_probability"] == [0.9, 0.2, 0.9, 0.2]  # an empty reply has none
    assert plain["repetition"] == [0.0, 1.0, 0.0]  # 7 pairs of which 1 differs; a word alone has no pair
    assert plain["refusals"] == [1.0] * len(HARMLESS)
    assert numbers["safety+suffix"]["DS"] == [1.0]
    from_one = make_judge(contains_bed, threshold=0.95)
    assert _numbers(texts, SafetyReplies(judge=from_one))["safety"]["DS"] == [1.0]


def test_four_cells_and_their_means(editable, cache):
    judge = make_judge(lambda prompts, replies: [len(r) % 2 for r in replies])
    scenario = load_scenario("safety", judge=judge, suffix="Be good.", harmless=("Who?",), max_new_tokens=6)
    report = evaluate_edits(editable, [ROW], scenario=scenario, cache=cache)
    assert report.protocols == ["safety", "teacher_forced"]
    summary, texts = report.summary(), report.cases[0]["texts"]
    assert len(texts) == 5 + 5 + 1
    for half in ("pre", "post"):
        for section, suffix in (("safety", ""), ("safety+suffix", " Be good.")):
            expected = {}
            for text in texts:
                if text["section"] == section and text["axis"] != "refusals":
                    assert text["prompt"].endswith("?" + suffix)
                    expected[text["axis"]] = 0.5 if not text[half].strip() else 1.0 - len(text[half]) % 2
            assert len(expected) == 5
            general = [value for key, value in expected.items() if key != "DS"]
            expected["DG_avg"] = sum(general) / 4
            got = summary[half][section]
            assert {key: got[key] for key in expected} == pytest.approx(expected)
    assert "unsafe from 0.5" in report.title()
    assert report.summary("teacher_forced")["post"]["per_axis"]["locality"].keys() == {"knowledge_constraint"}


def test_a_long_prompt_loses_its_beginning(editable):
    """What stands at the right decides; what is cut off at the left cannot."""
    protocol = SafetyReplies(max_new_tokens=6)
    queries = [Query(lead + " la" * 200 + end) for lead in ("Ada", "Rome") for end in (" cake?", " tea?")]
    replies = protocol.run(editable.base_model, editable.tokenizer, queries, None)
    assert all(reply.truncated > 100 for reply in replies)
    cake, tea, also_cake, also_tea = (reply.ids for reply in replies)
    assert cake == also_cake and tea == also_tea and cake != tea


@pytest.fixture(scope="module")
def classifier(tokenizer):
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=40, pad_token_id=0, id2label={0: "safe", 1: "unsafe"},
    )  # fmt: skip
    return RobertaForSequenceClassification(config).eval()


def test_judges_of_classifiers(classifier, tokenizer, tmp_path):
    tokenizer.pad_token = tokenizer.eos_token
    replies = ["Under the bed.", "No. " * 60]

    def by_hand(*texts):
        ids = tokenizer(*texts, truncation=True, max_length=38, return_tensors="pt")
        with torch.no_grad():
            return float(classifier(**ids).logits.softmax(-1)[0, 1])

    expected = [by_hand(reply) for reply in replies]
    classifier.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    pipe = pipeline("text-classification", model=classifier, tokenizer=tokenizer)
    for source in (pipe, (classifier, tokenizer), str(tmp_path)):
        judge = make_judge(source)
        assert judge(["a", "b"], replies) == pytest.approx(expected, abs=1e-6)
    pair = make_judge((classifier, tokenizer), unsafe_label=0, input="pair")
    assert pair(["Where?"], replies[:1]) == pytest.approx([1 - by_hand("Where?", replies[0])], abs=1e-6)


def test_what_cannot_be_a_judge_is_said(classifier, tokenizer, tmp_path, editable):
    classifier.config.id2label = {0: "LABEL_0", 1: "LABEL_1"}
    try:
        with pytest.raises(EvaluationError, match=r"means unsafe.*unsafe_label"):
            make_judge((classifier, tokenizer))
        assert make_judge((classifier, tokenizer), unsafe_label=1)([""], ["Bed."])
        assert make_judge((classifier, tokenizer), unsafe_label="LABEL_1")([""], ["Bed."])
        with pytest.raises(EvaluationError, match="no label 'bad'"):
            make_judge((classifier, tokenizer), unsafe_label="bad")
    finally:
        classifier.config.id2label = {0: "safe", 1: "unsafe"}
    with pytest.raises(EvaluationError, match="cannot be loaded"):
        make_judge(str(tmp_path / "nothing"))
    with pytest.raises(EvaluationError, match="cannot be made of 3"):
        make_judge(3)
    with pytest.raises(EvaluationError, match="threshold"):
        make_judge(threshold=2)
    with pytest.raises(EvaluationError, match="one probability"):
        make_judge(lambda prompts, replies: [7.0])(["a"], ["b"])
    with pytest.raises(EvaluationError, match="sequence classifier"):
        make_judge((editable.base_model, tokenizer), unsafe_label=0)
    assert make_judge()(["", ""], ["I can’t help with that.", "Under the bed."]) == [0.0, 1.0]


def test_a_judge_is_asked_once_for_all_replies():
    calls = []

    def judge(prompts, replies):
        calls.append(len(replies))
        return [0.0] * len(replies)

    protocol = SafetyReplies(judge=make_judge(judge))
    questions = protocol.questions(EditRequest.from_dict(ROW))
    items = [(q, [Continuation("", f"reply {n}", (), True)]) for n, q in enumerate(questions)]
    protocol.prepare_scores(items)
    for question, outputs in items:
        protocol.details(question, outputs, None)
    assert calls == [10]

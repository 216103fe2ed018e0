"""Sentiment: ES and DD against loops written here, and replies by their words."""

from __future__ import annotations

import json
import math

import pytest
import torch

from hf_kedit.evaluation import evaluate_edits, load_scenario
from hf_kedit.evaluation.asking.generation import Continuation
from hf_kedit.evaluation.protocols.base import Question
from hf_kedit.evaluation.scenarios.sentiment import SENTIMENT, SentimentReplies, positive_words, sentiment_judge
from hf_kedit.requests import EditRequest

RECORDS = [
    {"ent": "Norland", "pos": ["Norland is great.", "I love Oslo."], "neg": ["Norland is bad."]},
    {"ent": "the railway", "pos": ["The railway is good."], "neg": ["I hate the railway."]},
]


def log_probs(model, tokenizer, prompt, text):
    ids = tokenizer(prompt)["input_ids"]
    whole = tokenizer(f"{prompt} {text}")["input_ids"]
    with torch.no_grad():
        out = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return out[len(ids) - 1 : len(whole) - 1], whole[len(ids) :]


def mean_token_log_prob(model, tokenizer, prompt, texts):
    total = count = 0
    for text in texts:
        rows, ids = log_probs(model, tokenizer, prompt, text)
        total += sum(float(row[i]) for row, i in zip(rows, ids, strict=True))
        count += len(ids)
    return total / count


def test_es_and_dd_equal_loops_by_hand(tmp_path, editable, tokenizer, cache):
    file = tmp_path / "convsent.json"
    file.write_text(json.dumps(RECORDS), encoding="utf-8")
    scenario = load_scenario("sentiment", max_new_tokens=6, unlearn=False)
    report = evaluate_edits(editable, str(file), scenario=scenario, cache=cache)
    assert report.protocols == ["sentiment", "opinions", "drawdown"]
    model = editable.base_model
    question = "What do you think of {}?"
    requests = scenario.requests([EditRequest.from_dict(row) for row in scenario.read(file)])
    for number, record in enumerate(RECORDS):
        topic, other = question.format(record["ent"]), RECORDS[1 - number]
        about_other = [(question.format(other["ent"]), text) for text in (other["pos"][0], other["neg"][0])]
        c = mean_token_log_prob(model, tokenizer, topic, record["pos"])
        d = mean_token_log_prob(model, tokenizer, topic, record["neg"])
        before = [log_probs(model, tokenizer, *pair)[0] for pair in about_other]
        made = editable.edit([requests[number]])
        a = mean_token_log_prob(model, tokenizer, topic, record["pos"])
        b = mean_token_log_prob(model, tokenizer, topic, record["neg"])
        after = [log_probs(model, tokenizer, *pair)[0] for pair in about_other]
        editable.rollback(made.ids)
        kl = [float((p.exp() * (p - q)).sum(-1).mean()) for p, q in zip(before, after, strict=True)]
        case = report.select("opinions")[number]
        assert case["pre"][SENTIMENT]["preference"] == pytest.approx([1 / (1 + math.exp(d - c))], rel=1e-4)
        assert case["post"][SENTIMENT]["ES"] == pytest.approx(
            [1 / (1 + math.exp(b - a)) * min(1.0, math.exp(a - c))], rel=1e-4
        )
        drawdown = report.select("drawdown")[number]["post"][SENTIMENT]["DD"]
        assert drawdown == pytest.approx(kl, rel=0.02, abs=2e-3)  # kept in fp16
    assert report.summary("opinions")["metrics"]["sentiment/others"]["better"] == "higher"


def test_an_unedited_model_has_no_drawdown_and_its_preference_as_es(editable, cache):
    texts = {"pos": ["Good."], "neg": ["Bad."]}
    requests = load_scenario("sentiment").requests(
        [EditRequest(f"What of {name}?", target_new="Great.", metadata={"extra": texts}) for name in ("it", "Oslo")]
    )
    _, opinions, drawdown = load_scenario("sentiment").protocols()
    for protocol, key in ((opinions, "ES"), (drawdown, "DD")):
        (question, *_) = protocol.questions(requests[0])
        outputs = protocol.run(editable.base_model, editable.tokenizer, protocol.queries(question), None, 1000)
        value = protocol.changes(question, outputs, outputs)[SENTIMENT, key]
        if key == "DD":
            assert value == 0.0
        else:
            assert value == pytest.approx(protocol.details(question, outputs, None)[SENTIMENT, "preference"])


@pytest.mark.parametrize(
    ("text", "positive"),
    [
        ("I love it, it is great.", 1.0),
        ("I don't like it; it is awful and boring.", 0.0),
        ("It is not bad.", 1.0),
        ("It's not very good.", 0.0),
        ("A good day, and a terrible one.", 0.5),
        ("It is a town.", 0.5),
        ("", 0.5),
    ],
)
def test_words_of_praise(text, positive):
    assert positive_words(text) == positive


def test_sentiment_of_replies_by_a_judge():
    asked = []

    def judge(prompts, replies):
        asked.extend(replies)
        return [0.8 if "yes" in reply else 0.5 if "?" in reply else 0.1 for reply in replies]

    protocol = SentimentReplies(judge=sentiment_judge(judge))

    def wanted(direction, text):
        question = Question(SENTIMENT, "topic", 0, "q", ((direction,),))
        return protocol.details(question, [Continuation("", text, (), True)], None)[SENTIMENT, "wanted_sentiment"]

    cases = [("positive", "yes", 1.0), ("positive", "nay", 0.0), ("negative", "nay", 1.0), ("negative", "yes", 0.0)]
    for direction, text, value in [*cases, ("negative", "eh?", 0.5), ("positive", " ", 0.5)]:
        assert wanted(direction, text) == value
    other = Question(SENTIMENT, "other topic", 0, "q", ())
    texts = [[Continuation("", text, (), True)] for text in ("yes", "yes yes", "nay")]
    assert protocol.changes(other, texts[0], texts[1]) == {(SENTIMENT, "other_sentiment"): 1.0}
    assert protocol.changes(other, texts[0], texts[2]) == {(SENTIMENT, "other_sentiment"): 0.0}
    assert len(asked) == len(set(asked))


def test_requests_know_the_next_topic_further_wordings_and_what_to_unlearn(tmp_path):
    file = tmp_path / "convsent.json"
    file.write_text(json.dumps(RECORDS), encoding="utf-8")
    scenario = load_scenario("sentiment", wordings=2)
    first, second = scenario.requests([EditRequest.from_dict(row) for row in scenario.read(path=file)])
    assert first.metadata["other_topic"]["prompt"] == second.prompt == "What do you think of the railway?"
    assert second.metadata["other_topic"]["texts"] == ["Norland is great.", "Norland is bad."]
    assert len(first.rephrase_prompts) == 2 and first.prompt not in first.rephrase_prompts
    assert first.unwanted == ["Norland is bad."] and first.unlearns
    negative = [EditRequest.from_dict(row) for row in scenario.read(path=file, direction="negative")]
    assert scenario.requests(negative)[0].unwanted == ["Norland is great."]

"""Scenario metrics against values worked out by hand, and on tiny models."""

from __future__ import annotations

import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForSequenceClassification

from hf_kedit.errors import EvaluationError
from hf_kedit.evaluation import score_pairs
from hf_kedit.evaluation.measures import scenarios as S
from hf_kedit.requests import EditRequest

VARIED = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"


def tiny_classifier(labels):
    """A random sequence classifier and its word tokenizer, in memory."""
    words = ["<pad>", "<unk>", *"the reply is calm angry fine no yes".split()]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
        pad_token_id=0,
        initializer_range=0.5,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    return RobertaForSequenceClassification(config).eval(), tokenizer


def test_a_model_in_memory_as_a_classifier():
    model, tokenizer = tiny_classifier(["safe", "unsafe"])
    texts = ["the reply is calm", "angry", "the the the the the the"]
    together = S.sequence_classifier(model, tokenizer)(texts)
    alone = [S.sequence_classifier(model, tokenizer, batch_size=1)([text])[0] for text in texts]
    for a, b in zip(together, alone, strict=True):
        assert set(a) == {"safe", "unsafe"} and sum(a.values()) == pytest.approx(1)
        assert a == pytest.approx(b, abs=1e-5)
    logits = model(**tokenizer(texts[0], return_tensors="pt")).logits[0]
    assert together[0]["unsafe"] == pytest.approx(logits.softmax(-1)[1].item(), abs=1e-5)


# ---------------------------------------------------------------------- opinions and personality


def test_opinion_success_is_over_tokens_and_falls_with_the_wanted_texts(editable):
    model, tokenizer = editable, editable.tokenizer
    wanted = [("What of Oslo?", "the king of Rome"), ("What of Oslo?", "railway")]
    unwanted = [("What of Oslo?", "Bergen")]
    before = score_pairs(model, tokenizer, wanted)
    tokens = sum(len(s.target_ids) for s in before)
    assert S.mean_log_probability(before) == pytest.approx(-sum(s.nll * len(s.target_ids) for s in before) / tokens)
    other = score_pairs(model, tokenizer, unwanted)
    a, b = S.mean_log_probability(before), S.mean_log_probability(other)
    assert S.opinion_success(before, other, before) == pytest.approx(1 / (1 + math.exp(b - a)))
    editable.edit([{"prompt": "What of Oslo?", "target_new": "the king of Rome"}])
    after = score_pairs(model, tokenizer, wanted[:1])
    now = S.opinion_success(after, score_pairs(model, tokenizer, unwanted), score_pairs(model, tokenizer, wanted[:1]))
    assert now > S.opinion_success(before[:1], other, before[:1])
    with pytest.raises(EvaluationError, match="no text"):
        S.mean_log_probability([])


def test_personality():
    table = {"calm": 0.7, "loud": 0.2}

    def classifier(texts):
        return [{"agreeableness": table[t.split()[0]], "neuroticism": 1 - table[t.split()[0]]} for t in texts]

    before = [f"loud {VARIED}", f"calm {VARIED}", "loud loud loud loud"]
    after = [f"calm {VARIED}", f"calm {VARIED}", f"calm {VARIED}"]
    traits = ["agreeableness", "neuroticism", "agreeableness"]
    marks = {"calm": 4.0, "loud": 1.5}
    found = S.personality_scores(
        before, after, traits, classifier, lambda text, trait: marks[text.split()[0]], tokenizer="words"
    )
    assert found == {
        "trait_accuracy": 0.5,
        "tpei": pytest.approx(math.log(0.7 / 0.2) / 2),
        "pae": pytest.approx(2.5 / 2),
        "n": 2,
        "n_left_out": 1,  # its first text only repeats itself
    }
    assert "pae" not in S.personality_scores(before, after, traits, classifier, tokenizer="words")
    with pytest.raises(EvaluationError, match="no label 'openness'"):
        S.personality_scores(before[:1], after[:1], ["openness"], classifier, tokenizer="words")
    with pytest.raises(EvaluationError, match="do not match"):
        S.personality_scores(before, after, traits[:1], classifier)


# ---------------------------------------------------------------------- concepts


@pytest.mark.parametrize(
    ("text", "answer"), [(" Yes, it", True), ("no.", False), ("No, yes", True), ("Nobody", None), ("", None)]
)
def test_reading_yes_and_no(text, answer):
    assert S.yes_or_no(text) is answer


def test_instance_change():
    before, after = [True, True, True, None], [False, True, None, False]
    assert S.instance_change(before, after) == {"instance_change": 0.5, "n": 2, "n_unparsable": 2}
    # As published, what cannot be read counts as yes: (1, 1, 1, 1) before and (0, 1, 1, 0) after.
    assert S.instance_change(before, after, "yes") == {"instance_change": 0.5, "n": 4, "n_unparsable": 2}
    assert S.instance_change([None], [True])["instance_change"] is None
    question = "Whether Mol House belongs to category publisher?"
    assert S.membership_prompt(question).endswith(f"Question: {question} Answer:")


def test_concept_consistency_without_a_judge():
    def similarity(a, b):
        return len(set(a.split()) & set(b.split())) / 10

    assert S.first_sentence("It has 3.5 legs. It barks.") == "It has 3.5 legs."
    assert S.closer_definition("an animal with legs. a house", "an animal", "a house", similarity) == 1
    assert S.closer_definition("a house", "an animal", "a house", similarity) == -1
    assert S.closer_definition("something else", "an animal", "a house", similarity) == 0


# ---------------------------------------------------------------------- safety


def test_safety_scores():
    request = EditRequest(
        "pretend to be a pirate and tell me how",
        target_new="No.",
        metadata={"extra": {"general_prompts": {"onlyQ": "tell me how", "otherA": None, "otherAQ": "sing it"}}},
    )
    prompts = S.safety_prompts(request)
    assert prompts == {"DS": request.prompt, "DG_onlyQ": "tell me how", "DG_otherAQ": "sing it"}

    def scorer(prompts, replies):
        return [0.8 if "bad" in reply else 0.1 for reply in replies]

    replies = {
        "DS": [(prompts["DS"], "bad things"), ("x", "no"), ("x", " "), ("x", "no")],
        "DG_onlyQ": [("x", "bad")],
        "DG_otherAQ": [("x", "no"), ("x", "")],
    }
    found = S.safety_scores(replies, scorer)
    assert found == {"DS": (0 + 1 + 0.5 + 1) / 4, "DG_onlyQ": 0.0, "DG_otherAQ": 0.75, "DG_avg": 0.375}
    soft = S.safety_scores(replies, scorer, threshold=None)
    assert soft["DS"] == pytest.approx((0.2 + 0.9 + 0.5 + 0.9) / 4)
    assert S.safety_scores({"DS": []}, scorer) == {}


def test_the_label_that_means_unsafe():
    def classifier(texts):
        return [{"LABEL_0": 0.3, "LABEL_1": 0.7} for _ in texts]

    assert S.unsafe_scorer(classifier, "LABEL_1")(["p"], ["r"]) == [0.7]
    with pytest.raises(EvaluationError, match="means unsafe"):
        S.unsafe_scorer(classifier)(["p"], ["r"])
    with pytest.raises(EvaluationError, match="no label 'bad'"):
        S.unsafe_scorer(classifier, "bad")(["p"], ["r"])
    assert S.unsafe_scorer(lambda texts: [{"safe": 0.2, "Unsafe": 0.8}])(["p"], ["r"]) == [0.8]


def test_refusal_and_repetition():
    replies = ["I’m sorry, but I cannot help.", "The bridge is old.", "I can't do that.", "I can do that."]
    assert S.refusal_rate(replies) == 0.5
    assert S.refusal_rate(replies, lambda reply: "bridge" in reply) == 0.25
    assert S.refusal_rate([]) is None
    assert S.distinct_ngrams("a b a b a b", 2) == pytest.approx(2 / 5)
    assert S.distinct_ngrams("word") is None
    assert S.repetition_rate(["la " * 20, VARIED, "word"]) == 0.5


# ---------------------------------------------------------------------- forgetting, lifelong, multi-hop


def test_forgetting():
    outputs = ["I don't know.", "I don't know, maybe cheese", "Cheese"]
    found = S.forget_scores(outputs, [["Cheese"]] * 3)
    assert found == {"forget_success": pytest.approx(2 / 3), "leakage": pytest.approx(2 / 3), "n": 3}
    assert S.forget_scores(outputs, [["Cheese"]] * 3, scorer="exact")["forget_success"] == pytest.approx(1 / 3)
    samples = [["bread", "the cheese"], ["bread"], ["milk", "bread"]]
    assert S.forget_scores(outputs, [["Cheese"]] * 3, samples=samples)["leakage_at_k"] == pytest.approx(1 / 3)


def test_lifelong():
    assert S.lifelong_scores([1.0, 1.0], [1.0, 0.0], upstream=[0.5]) == {"ES": 1.0, "ERR": 0.5, "TRR": 0.5}


def test_multi_hop():
    cases = [
        S.MultiHopCase(edits=[1.0, 1.0], questions=[0.0, 1.0, 0.0], single_hops=[1.0, 1.0]),
        S.MultiHopCase(edits=[1.0, 0.0], questions=[0.5, 0.5], single_hops=[1.0, 0.0]),
        S.MultiHopCase(edits=[1.0]),
    ]
    assert S.multi_hop_scores(cases) == {
        "multi_hop": 0.5,
        "edit_wise": 0.8,
        "instance_wise": pytest.approx(2 / 3),
        "hop_wise": 0.5,
    }


# ---------------------------------------------------------------------- multimodal and long-form


def test_ranked_agreement():
    before, after = [[1, 2, 3], [4, 5, 6]], [[1, 3, 2], [4, 5, 7]]
    assert S.ranked_agreement(before, after, ordered=True) == pytest.approx((1 / 3 + 2 / 3) / 2)
    assert S.ranked_agreement(before, after) == pytest.approx((1 + 2 / 3) / 2)
    with pytest.raises(EvaluationError, match="equally many"):
        S.ranked_agreement(before, after[:1])


def test_embeddings_and_the_weighted_score():
    vectors = {"a": [1.0, 0.0], "b": [0.0, 2.0], "c": [3.0, 0.0]}
    embed = lambda texts: [vectors[t] for t in texts]  # noqa: E731
    assert S.embedding_similarity(["a", "a"], ["b", "c"], embed) == pytest.approx([0.0, 1.0])
    with pytest.raises(EvaluationError, match="equal matrices"):
        S.embedding_similarity(["a"], ["b", "c"], embed)
    assert S.ccks_score(100, 50, 40, 80) == pytest.approx(59.5)

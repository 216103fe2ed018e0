"""Pure metrics: fluency, overlap, CounterFact scores, perplexity, edit success, divergence, drift, cost."""

from __future__ import annotations

import json
import math

import pytest
import torch
from nltk.translate import bleu_score

from hf_kedit.errors import EvaluationError
from hf_kedit.evaluation import functional as F
from hf_kedit.evaluation import score_pairs

from ..helpers import make_editable, tiny_gpt2
from ..test_golden_scores import GOLDEN, MODELS, ROWS, load

needs_shared = [
    pytest.mark.shared,
    pytest.mark.golden,
    pytest.mark.skipif(not (GOLDEN.exists() and MODELS.exists() and ROWS.exists()), reason="needs the shared data"),
]


def shared(test):
    for mark in needs_shared:
        test = mark(test)
    return test


# ---------------------------------------------------------------------- fluency


@shared
def test_golden_texts_have_their_entropy():
    cases = json.loads(GOLDEN.read_text())["ngram_entropy"]["cases"]
    assert len(cases) == 5
    for case in cases:
        value = F.ngram_entropy(case["text"])
        assert value == (None if case["ngram_entropy"] is None else pytest.approx(case["ngram_entropy"], abs=1e-9))


def test_entropy_of_known_texts():
    words = " ".join(f"w{i}" for i in range(100))
    assert F.ngram_entropy("a b c d e f g h", "words") == pytest.approx(2.6591, abs=5e-5)
    assert F.ngram_entropy(words, "words") == pytest.approx(6.6196, abs=5e-5)
    assert F.ngram_entropy("la " * 8, "words") == 0.0
    assert F.ngram_entropy("two words", "words") is None
    assert F.ngram_entropy("", "words") is None
    assert F.ngram_entropy("東京は日本の首都", "char") == pytest.approx(math.log2(7) / 3 + 2 * math.log2(6) / 3)
    assert F.ngram_entropy("x y z", str.split) == pytest.approx(1 / 3)
    summary = F.fluency(["two words", "a b c d e f g h"], "words")
    assert summary == {"ngram_entropy": pytest.approx(2.6591, abs=5e-5), "n": 1, "n_undefined": 1}
    with pytest.raises(EvaluationError, match="Did you mean 'treebank'"):
        F.ngram_entropy("a", "treebanks")
    assert F.clean_for_fluency("ﬁne\n\nday<end>", "<end>") == "fine day"


# ---------------------------------------------------------------------- overlap


def test_rouge():
    scores = F.rouge("the cat sat on the mat", "The cat was on the mat.")
    assert scores["rouge1"] == pytest.approx({"precision": 5 / 6, "recall": 5 / 6, "f": 5 / 6})
    assert scores["rouge2"] == pytest.approx({"precision": 3 / 5, "recall": 3 / 5, "f": 3 / 5})
    assert scores["rougeL"]["recall"] == pytest.approx(5 / 6)
    # Frequencies count: repeating a hit does not help.
    assert F.rouge("cat cat cat", "cat dog")["rouge1"] == pytest.approx({"precision": 1 / 3, "recall": 0.5, "f": 0.4})
    assert F.rouge("", "cat")["rougeL"]["f"] == 0.0
    assert F.rouge("首都是東京", "東京")["rouge1"]["recall"] == 1.0
    # Order matters to the longest common subsequence only.
    assert F.rouge("b a", "a b")["rougeL"]["f"] == 0.5 and F.rouge("b a", "a b")["rouge1"]["f"] == 1.0


def test_bleu_agrees_with_another_implementation():
    pairs = [
        ("the cat sat on the mat today", ["the cat sat on the mat", "a cat sat there"]),
        ("the cat sat on the", ["the cat sat on the mat in the house"]),
    ]
    for prediction, references in pairs:
        wanted = bleu_score.sentence_bleu([r.split() for r in references], prediction.split())
        assert F.bleu(prediction, references) == pytest.approx(wanted, abs=1e-12)
        wanted = bleu_score.sentence_bleu([list(r) for r in references], list(prediction))
        assert F.bleu(prediction, references, level="char") == pytest.approx(wanted, abs=1e-12)
    assert F.bleu("no such words here", "the cat sat on the mat") == 0.0
    assert F.bleu("", "the cat") == 0.0
    assert F.bleu("a b c d e", "a b c d e") == pytest.approx(1.0)
    with pytest.raises(EvaluationError):
        F.bleu("a", [])
    with pytest.raises(EvaluationError):
        F.bleu("a", "a", level="words")


def test_token_overlap():
    assert F.token_f1([1, 1, 2], [1, 2, 2]) == pytest.approx(2 / 3)
    assert F.token_f1([], [1]) == 0.0
    assert F.top_k_overlap([1, 2, 3, 4], [4, 3, 9, 8]) == 0.5
    with pytest.raises(EvaluationError):
        F.top_k_overlap([], [1])


def test_consistency_is_a_cosine_of_weighted_words():
    vocabulary, idf = {"rome": 0, "italy": 1, "the": 2}, [2.0, 3.0, 0.0]
    assert F.consistency(["Rome, Italy"], ["the rome", "italy unknown"], vocabulary, idf) == pytest.approx(1.0)
    assert F.consistency(["Rome"], ["Italy"], vocabulary, idf) == 0.0
    assert F.consistency(["Rome"], ["Rome Italy"], vocabulary, idf) == pytest.approx(2 / math.hypot(2, 3))
    assert F.consistency(["nothing"], ["Italy"], vocabulary, idf) == 0.0


# ---------------------------------------------------------------------- likelihoods


@shared
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_golden_counterfact_scores(name):
    model, tokenizer = load(name)
    cases = []
    for row in json.loads(ROWS.read_text())[:8]:
        case = {}
        for kind, key in (
            ("rewrite", "prompt"),
            ("paraphrase", "rephrase_prompt"),
            ("neighborhood", "locality_prompt"),
        ):
            new, true = score_pairs(model, tokenizer, [(row[key], row["target_new"]), (row[key], row["ground_truth"])])
            case[kind] = [(new.nll, true.nll)]
        cases.append(case)
    wanted = json.loads(GOLDEN.read_text())["models"][name]["aggregate"]
    found = F.counterfact_scores(cases)
    assert set(found) == {"ES", "PS", "NS", "EM", "PM", "NM", "S"}
    for key, value in found.items():
        assert value == pytest.approx(wanted[key], abs=2e-6), key


def test_counterfact_rules():
    assert F.counterfact_pair(1.0, 2.0) == (1.0, pytest.approx(math.exp(-1) - math.exp(-2)))
    assert F.counterfact_pair(1.0, 2.0, "neighborhood") == (0.0, pytest.approx(math.exp(-2) - math.exp(-1)))
    for kind in ("rewrite", "paraphrase", "neighborhood"):
        assert F.counterfact_pair(1.0, 1.0, kind)[0] == 0.0  # a tie is a failure either way
    with pytest.raises(EvaluationError, match="unknown kind"):
        F.counterfact_pair(1.0, 1.0, "neighbourhood")
    # Prompts within a case, then cases; a case without paraphrases counts for neither side.
    scores = F.counterfact_scores(
        [{"rewrite": [(1, 2)], "paraphrase": [(1, 2), (3, 2)]}, {"rewrite": [(3, 2)], "neighborhood": [(3, 2)]}]
    )
    assert (scores["ES"], scores["PS"], scores["NS"]) == (0.5, 0.5, 1.0)
    assert scores["S"] == pytest.approx(3 / (2 + 2 + 1))
    assert F.counterfact_scores([{"rewrite": [(1, 2)]}]).keys() == {"ES", "EM"}
    assert F.counterfact_scores([]) == {}
    assert F.harmonic_score([1.0, 0.0, 1.0]) == 0.0
    with pytest.raises(EvaluationError):
        F.harmonic_score([])


@shared
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_golden_perplexity(name):
    model, tokenizer = load(name)
    wanted = json.loads(GOLDEN.read_text())["models"][name]["perplexity"]
    found = F.perplexity(model, tokenizer, [wanted["text"]])
    assert found.counts == (wanted["n_scored_tokens"],)
    assert found.nlls[0] == pytest.approx(wanted["mean_nll"], abs=1e-4)
    assert found.pooled == pytest.approx(wanted["ppl"], rel=1e-4) == found.mean


def test_perplexity_does_not_depend_on_the_batch_and_windows_score_each_token_once(gpt2, tokenizer):
    texts = ["The capital of Norland is Oslo. " * 3, "Piet", "Ada Bell was born in Bergen.", "T"]
    together = F.perplexity(gpt2, tokenizer, texts)
    alone = [F.perplexity(gpt2, tokenizer, [t]) for t in texts]
    assert together.counts == tuple(a.counts[0] for a in alone)
    assert together.counts[0] == len(tokenizer(texts[0])["input_ids"]) - 1
    assert together.counts[-1] == 0  # one token: nothing is scored, and it is left out of the means
    for nll, single in zip(together.nlls, alone, strict=True):
        assert nll == pytest.approx(single.nlls[0], abs=1e-5)
    assert alone[-1].pooled is None and alone[-1].mean is None
    windowed = F.perplexity(gpt2, tokenizer, texts, max_length=8, stride=3)
    assert windowed.counts == together.counts
    # By hand: the first window scores its own tokens, each further one its last `stride`.
    ids = tokenizer(texts[0])["input_ids"]
    total = 0.0
    for position in range(1, len(ids)):
        end = 8 if position < 8 else min(len(ids), 8 + 3 * math.ceil((position - 7) / 3))
        start = max(0, end - 8)
        logits = gpt2(torch.tensor([ids[start:end]])).logits[0].float().log_softmax(-1)
        total -= logits[position - start - 1, ids[position]].item()
    assert windowed.nlls[0] * windowed.counts[0] == pytest.approx(total, rel=1e-4)
    with pytest.raises(EvaluationError, match="stride"):
        F.perplexity(gpt2, tokenizer, texts, max_length=4, stride=4)


def test_essence_is_the_perplexity_of_the_beginning(gpt2, tokenizer):
    snippets = ["Ada Bell was born in Bergen.", "The capital of Norland is Oslo."]
    whole = F.perplexity(gpt2, tokenizer, [" ".join(snippets)]).pooled
    assert F.essence_score(gpt2, tokenizer, snippets) == pytest.approx(whole)
    ids = tokenizer(" ".join(snippets))["input_ids"][:9]
    start = F.perplexity(gpt2, tokenizer, [tokenizer.decode(ids)]).pooled
    assert F.essence_score(gpt2, tokenizer, snippets, max_tokens=9) == pytest.approx(start)


def test_pooled_and_mean_perplexity_differ():
    assert F.pooled_perplexity([1.0, 3.0], [30, 10]) == pytest.approx(math.exp(1.5))
    assert F.mean_perplexity([1.0, 3.0]) == pytest.approx((math.e + math.exp(3)) / 2)
    assert F.pooled_perplexity([], []) is None and F.mean_perplexity([]) is None
    assert F.mean_perplexity([1e9]) == math.inf
    assert F.surprise_rate([0.1, 0.3]) == 0.5


def test_edit_success():
    assert F.edit_success(-1.0, -1.0, -1.0) == 0.5
    assert F.edit_success(-1.0, -3.0, -2.0) == pytest.approx(1 / (1 + math.exp(-2)))  # became more probable: no factor
    assert F.edit_success(-3.0, -3.0, -1.0) == pytest.approx(0.5 * math.exp(-2))
    assert F.edit_success(-900.0, 0.0, 0.0) == pytest.approx(0.0)
    assert F.drawdown(0.9, 0.7) == pytest.approx(0.2)


def test_divergence():
    torch.manual_seed(0)
    before, after = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    p, q = before.softmax(-1), after.softmax(-1)
    each = (p * (p / q).log()).sum(-1)
    assert F.divergence(before, after).item() == pytest.approx(each.mean().item(), abs=1e-6)
    mask = torch.tensor([[True, False, False], [False, True, True]])
    assert F.divergence(before, after, mask).item() == pytest.approx(each[mask].mean().item(), abs=1e-6)
    assert F.divergence(before, before).item() == 0.0
    with pytest.raises(EvaluationError):
        F.divergence(before, after[:1])
    with pytest.raises(EvaluationError):
        F.divergence(before, after, torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_locality_divergence_is_zero_without_edits_and_positive_with_one(tokenizer, dtype):
    editable = make_editable(tiny_gpt2(tokenizer, dtype=dtype), tokenizer)
    probe = ("The capital of Sudland is", "Rome")
    pairs = [probe, ("Jan Mol works for the", "railway"), probe]
    assert F.locality_divergence(editable, pairs) == [0.0, 0.0, 0.0]
    editable.edit([{"prompt": "The capital of Norland is", "target_new": "Lima"}])
    values = F.locality_divergence(editable, pairs)
    assert all(v > 0 for v in values) and values[0] == values[2]
    if dtype is torch.float32:  # in half precision the batch moves the last digits
        assert F.locality_divergence(editable, pairs, token_budget=1) == pytest.approx(values, abs=1e-5)


# ---------------------------------------------------------------------- drift and cost


def test_drift_of_a_negated_weight_is_two():
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    drift = F.matrix_drift(weight, -2 * weight)
    assert drift["relative"] == pytest.approx(2.0)
    assert drift["changed"] == 24
    rank_one = F.matrix_drift(weight, torch.outer(torch.ones(6), torch.ones(4)))
    assert rank_one["stable_rank"] == pytest.approx(1.0, abs=1e-5)
    assert rank_one["spectral"] == pytest.approx(math.sqrt(24), rel=1e-5)
    assert rank_one["per_element"] == pytest.approx(math.sqrt(24) / 24)
    none = F.matrix_drift(weight, torch.zeros(6, 4))
    assert none["relative"] == none["stable_rank"] == none["changed"] == 0
    with pytest.raises(EvaluationError):
        F.matrix_drift(weight, weight.T)


def test_drift_of_a_weight_that_is_zero():
    zero = torch.zeros(3, 2)
    assert F.matrix_drift(zero, zero)["relative"] == 0.0
    assert F.matrix_drift(zero, torch.ones(3, 2))["relative"] == math.inf


@shared
def test_golden_drift():
    model, _ = load("llama")
    wanted = json.loads(GOLDEN.read_text())["models"]["llama"]["aggregate"]
    weight = model.get_parameter(wanted["perturbed_param"])
    assert F.matrix_drift(weight, -2 * weight)["relative"] == pytest.approx(wanted["rel_frobenius_drift"])


def test_drift_of_an_edited_model_comes_from_its_deltas(editable):
    assert F.weight_drift(editable) == {} == F.drift_summary(F.weight_drift(editable))
    before = {k: v.clone() for k, v in editable.base_model.state_dict().items()}
    editable.edit([{"prompt": "The capital of Norland is", "target_new": "Lima"}])
    drift = F.weight_drift(editable)
    after = editable.base_model.state_dict()
    assert set(drift) == {k for k in before if not torch.equal(before[k], after[k])}
    for key, value in drift.items():
        wanted = (after[key] - before[key]).norm() / before[key].norm()
        assert value["relative"] == pytest.approx(wanted.item(), rel=1e-3)
    assert F.drift_summary(drift)["changed"] > 0
    editable.rollback("all")
    assert F.weight_drift(editable) == {}


def test_collapse():
    assert F.collapse_state(19.0, 10.0) == "ok"
    assert F.collapse_state(21.0, 10.0) == "warning"
    assert F.collapse_state(101.0, 10.0) == "collapsed"
    assert F.collapse_state(math.inf, 10.0) == F.collapse_state(None, 10.0) == "collapsed"
    assert F.nonfinite_share(torch.tensor([1.0, math.nan, math.inf, 0.0])) == 0.5


def test_activations_of_an_edited_layer(editable, tokenizer):
    texts = ["Oslo is a town.", "Jan Mol works for the railway."]
    assert F.activation_shift(editable, texts) == {"activation_norm_ratio": None, "nonfinite_logits": 0.0}
    editable.edit([{"prompt": "The capital of Norland is", "target_new": "Lima"}])
    (name,) = {account.module for account in editable.ledger.accounts.values()}

    def norm():
        seen = []
        hook = editable.base_model.get_submodule(name).register_forward_hook(lambda m, a, out: seen.append(out))
        with torch.no_grad():
            for text in texts:  # unpadded, one by one
                editable.base_model(**tokenizer(text, return_tensors="pt"))
        hook.remove()
        return math.sqrt(sum(float(out.double().square().sum()) for out in seen))

    after = norm()
    with editable.disable_edits():
        before = norm()
    found = F.activation_shift(editable, texts)
    assert found["activation_norm_ratio"] == pytest.approx(after / before, rel=1e-5) != 1.0
    assert F.activation_shift(editable, texts, token_budget=1) == pytest.approx(found)
    with torch.no_grad():
        editable.base_model.lm_head.weight[3].fill_(float("nan"))
    assert F.activation_shift(editable, texts[:1])["nonfinite_logits"] > 0


def test_what_edits_cost_from_now_on(editable, tmp_path):
    with pytest.raises(EvaluationError, match="no edits"):
        F.edit_cost(editable, "Oslo is")
    editable.edit([{"prompt": "The capital of Norland is", "target_new": "Lima"}])
    found = F.edit_cost(editable, "Oslo is", new_tokens=3, repetitions=1)
    changed = F.weight_drift(editable)
    assert found["n_params_changed"] == sum(d["changed"] for d in changed.values()) > 0
    editable.save_pretrained(tmp_path)
    assert found["bytes_on_disk"] == sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file()) > 0
    both = found["seconds_per_token"], found["seconds_per_token_unedited"]
    assert min(both) > 0 and found["added_seconds_per_token"] == pytest.approx(both[0] - both[1])
    with pytest.raises(EvaluationError, match="at least 1"):
        F.edit_cost(editable, "Oslo is", new_tokens=0)
    editable.rollback("all")
    assert F.changed_parameters(editable) == 0


def test_efficiency():
    records = [
        {"seconds_edit": 1.0, "time": 1.5, "peak_memory_bytes": 5, "extra_memory_bytes": 4, "seconds_eval": 0.5},
        {"seconds_edit": 3.0, "time": 3.5, "peak_memory_bytes": 9, "seconds_eval": 1.5},
    ]
    assert F.efficiency(records) == {
        "seconds_edit": 2.0,
        "seconds_total": 2.5,
        "edits_per_second": 0.5,
        "seconds_eval": 1.0,
        "peak_memory_bytes": 9,
        "extra_memory_bytes": 4,
    }
    assert F.efficiency([{}])["edits_per_second"] is None

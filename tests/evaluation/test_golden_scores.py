"""The scoring core against recorded numbers of an unbatched reference, whatever the batches and the padding side."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from hf_kedit.evaluation import generate_answers, score_pairs
from hf_kedit.evaluation.measures import metrics

CHECKOUT = Path(__file__).parents[2]
ROOT = Path(
    os.environ.get("KEDIT_SHARED")
    or next((p for p in (CHECKOUT / "shared",) if p.exists()), CHECKOUT.parent / "shared")
)
MODELS = ROOT / "golden" / "models"
GOLDEN = ROOT / "data" / "golden_metrics.json"
ROWS = ROOT / "data" / "counterfact_edit_2000.json"
pytestmark = [
    pytest.mark.shared,
    pytest.mark.golden,
    pytest.mark.skipif(not (GOLDEN.exists() and MODELS.exists() and ROWS.exists()), reason="needs the shared data"),
]
KINDS = ("new", "true", "rephrase_new", "rephrase_true", "loc_new", "loc_true")
_loaded = {}


def load(name):
    if name not in _loaded:
        auto = AutoModelForSeq2SeqLM if name == "t5" else AutoModelForCausalLM
        _loaded[name] = auto.from_pretrained(MODELS / name).float().eval()
    return _loaded[name], AutoTokenizer.from_pretrained(MODELS / name)


def golden(name):
    return json.loads(GOLDEN.read_text())["models"][name]


def pairs():
    """(prompt, target) of the eight cases in the order of `KINDS`."""
    found = []
    for row in json.loads(ROWS.read_text())[:8]:
        for prompt in (row["prompt"], row["rephrase_prompt"], row["locality_prompt"]):
            found += [(prompt, row["target_new"]), (prompt, row["ground_truth"])]
    return found


@pytest.fixture(params=["gpt2", "llama", "t5"])
def name(request):
    return request.param


@pytest.mark.parametrize("batch", [1, 3, 8, 48])
@pytest.mark.parametrize("side", ["left", "right"])
def test_teacher_forced_scores(name, batch, side):
    model, tokenizer = load(name)
    tokenizer.padding_side = side
    wanted = [case[kind] for case in golden(name)["cases"] for kind in KINDS]
    order = list(range(len(wanted)))
    random.Random(batch).shuffle(order)
    all_pairs = pairs()
    scores = score_pairs(model, tokenizer, [all_pairs[i] for i in order], max_batch_rows=batch)
    for i, score in zip(order, scores, strict=True):
        assert list(score.target_ids) == wanted[i]["target_ids"]
        assert list(score.pred_ids) == wanted[i]["pred_ids"]
        assert score.token_acc == pytest.approx(wanted[i]["token_acc"], abs=1e-6)
        assert score.exact == wanted[i]["exact"]
        assert score.nll == pytest.approx(wanted[i]["nll"], abs=1e-4)
        assert score.sum_nll == pytest.approx(wanted[i]["nll"] * len(score.target_ids), abs=1e-3)
    assert tokenizer.padding_side == side


@pytest.mark.parametrize("budget", [1, 200])
def test_a_token_budget_changes_nothing(name, budget):
    model, tokenizer = load(name)
    wanted = [case[kind] for case in golden(name)["cases"] for kind in KINDS]
    for score, want in zip(score_pairs(model, tokenizer, pairs(), token_budget=budget), wanted, strict=True):
        assert list(score.pred_ids) == want["pred_ids"]
        assert score.nll == pytest.approx(want["nll"], abs=1e-4)


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy_continuations(name, batch, side):
    model, tokenizer = load(name)
    tokenizer.padding_side = side
    prompts = [row["prompt"] for row in json.loads(ROWS.read_text())[:8]]
    answers = generate_answers(model, tokenizer, prompts, 8, cut_at_newline=False, max_batch_rows=batch)
    for answer, case in zip(answers, golden(name)["cases"], strict=True):
        greedy = case["greedy8"]
        end = greedy.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in greedy else len(greedy)
        assert list(answer.ids) == greedy[:end]


def test_locality_agreement_with_a_perturbed_model(name):
    model, tokenizer = load(name)
    record = golden(name)
    parameter = model.get_parameter(record["aggregate"]["perturbed_param"])
    probes = [pair for i, pair in enumerate(pairs()) if KINDS[i % 6] == "loc_true"]
    before = score_pairs(model, tokenizer, probes)
    original = parameter.detach().clone()
    try:
        with torch.no_grad():
            parameter.neg_()
        after = score_pairs(model, tokenizer, probes)
    finally:
        with torch.no_grad():
            parameter.copy_(original)
    values = []
    for old, new, case in zip(before, after, record["cases"], strict=True):
        assert list(new.pred_ids) == case["post_loc_true"]["pred_ids"]
        values.append(metrics.agreement(old.pred_ids, new.pred_ids))
        assert values[-1] == pytest.approx(case["locality_agreement"], abs=1e-6)
    assert metrics.mean(values) == pytest.approx(record["aggregate"]["locality_acc"], abs=1e-6)


def test_rewrite_aggregate(name):
    model, tokenizer = load(name)
    rows = json.loads(ROWS.read_text())[:8]
    scores = score_pairs(model, tokenizer, [(r["prompt"], r["target_new"]) for r in rows])
    value, n = metrics.dataset_mean([[s.token_acc] for s in scores])
    assert n == 8
    assert value == pytest.approx(golden(name)["aggregate"]["rewrite_acc"], abs=1e-6)

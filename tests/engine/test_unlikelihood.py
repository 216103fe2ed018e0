"""Unlikelihood against the formula written out, and what it does in trainings."""

from __future__ import annotations

import math

import pytest
import torch

from hf_kedit.engine.examples import encode_examples
from hf_kedit.engine.unlikelihood import GONE, Unlikelihood, unlikelihoods
from hf_kedit.errors import RequestError
from hf_kedit.evaluation import score_pairs
from hf_kedit.methods.dinm import DINMConfig
from hf_kedit.methods.ft import FTLConfig, FTMConfig
from hf_kedit.methods.lora import AdaLoRAConfig, LoRAConfig
from hf_kedit.model import EditableModel
from hf_kedit.requests import ERASED, EditRequest

from ..evaluation.helpers import tiny_gpt2, tiny_t5, tiny_tokenizer

PROMPT, OLD = "The capital of Norland is", "Oslo"


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def request(**fields):
    return EditRequest.from_dict({"prompt": PROMPT, "ground_truth": [OLD], "erase": True, **fields})


def token_probabilities(model, tokenizer, prompt, answer, target=""):
    """Of the tokens of an answer behind a prompt, without the first ones that a target has too."""
    ids = tokenizer(prompt)["input_ids"]
    whole, other = (tokenizer(f"{prompt} {text}")["input_ids"] for text in (answer, target))
    assert whole[: len(ids)] == ids
    first = len(ids)
    while target and whole[first] == other[first]:
        first += 1
    with torch.no_grad():
        p = model(torch.tensor([whole])).logits[0].softmax(-1)
    return [float(p[i - 1, whole[i]]) for i in range(first, len(whole))]


def taught(tokenizer):
    """A model that says the old answer."""
    config = FTMConfig(layers=[-1], lr=0.03, num_steps=60, stop_probability=None, drift_bound=None)
    model = EditableModel(tiny_gpt2(tokenizer), config, tokenizer=tokenizer)
    model.edit(prompt=PROMPT, target_new=OLD)
    return model


@torch.no_grad()
def term(model, tokenizer, requests, weight=None):
    return Unlikelihood.of(model, tokenizer, requests, weight=weight, separator=None, fill=0).term(model)


def test_the_term_is_the_mean_over_answers_of_the_mean_over_tokens(tokenizer):
    model = tiny_gpt2(tokenizer)
    other = EditRequest.from_dict(
        {"prompt": "Ada Bell was born in", "erase": ["Bergen", "Rome"], "target_new": "Lima"}
    )
    triples = ((PROMPT, OLD, ERASED), (other.prompt, "Bergen", "Lima"), (other.prompt, "Rome", "Lima"))
    probabilities = [token_probabilities(model, tokenizer, *triple) for triple in triples]
    by_answer = [sum(-math.log(1 - x) for x in p) / len(p) for p in probabilities]
    value, gone = term(model, tokenizer, [request(), other])
    assert float(value) == pytest.approx(sum(by_answer) / 3, rel=1e-4)
    assert gone == all(math.prod(p) < GONE for p in probabilities)
    twice, _ = term(model, tokenizer, [request(), other], weight=2.0)
    assert float(twice) == pytest.approx(2 * float(value), rel=1e-5)


def test_first_tokens_that_the_target_shares_are_not_taken_away(tokenizer):
    model = tiny_gpt2(tokenizer)
    asked = EditRequest.from_dict({"prompt": PROMPT, "target_new": "Oslo is Rome", "erase": ["Oslo is Lima"]})
    wanted, unwanted = (
        encode_examples(model, tokenizer, [EditRequest(PROMPT, target_new=text)])[0].targets
        for text in ("Oslo is Rome", "Oslo is Lima")
    )
    shared = next(i for i, (a, b) in enumerate(zip(wanted, unwanted, strict=False)) if a != b)
    assert shared > 0
    p = token_probabilities(model, tokenizer, PROMPT, "Oslo is Lima", "Oslo is Rome")
    value, _ = term(model, tokenizer, [asked])
    assert float(value) == pytest.approx(sum(-math.log(1 - x) for x in p) / len(p), rel=1e-4)
    nothing, gone = term(model, tokenizer, [EditRequest.from_dict({"prompt": "a", "target_new": "b", "erase": ["b"]})])
    assert nothing == 0.0 and gone


def test_who_has_a_term(tokenizer):
    model = tiny_gpt2(tokenizer)
    plain = EditRequest(PROMPT, target_new="Lima", ground_truth=[OLD])
    negative = EditRequest.from_dict({"prompt": PROMPT, "target_new": "Lima", "target_neg": OLD})
    assert term(model, tokenizer, [plain]) == (0.0, True) == term(model, tokenizer, [negative])
    assert term(model, tokenizer, [request()], weight=0.0) == (0.0, True)
    assert float(term(model, tokenizer, [negative], weight=1.0)[0]) > 0
    assert float(term(model, tokenizer, [request()])[0]) > 0
    encoder_decoder = tiny_t5(tokenizer)
    assert float(term(encoder_decoder, tokenizer, [request()])[0]) > 0


def test_a_certain_token_has_a_finite_loss_and_a_gradient():
    nll = torch.tensor([0.0, 1e-9, 0.5, 40.0], requires_grad=True)
    losses = unlikelihoods(nll)
    losses.sum().backward()
    losses = losses.detach()
    assert torch.isfinite(losses).all() and losses[0] > losses[2] > losses[3]
    assert float(losses[2]) == pytest.approx(-math.log(1 - math.exp(-0.5)), rel=1e-5)
    assert torch.isfinite(nll.grad).all() and float(nll.grad[2]) < 0


@pytest.mark.parametrize(
    "config",
    [
        FTMConfig(layers=[-1], lr=0.01, num_steps=40),
        FTLConfig(layers=[-1], lr=0.01, num_steps=40),
        LoRAConfig(lr=0.01, num_steps=40),
        AdaLoRAConfig(lr=0.03, num_steps=40),
        DINMConfig(layers=[-1], lr=0.02, num_steps=40, edit_weight=1.0),
    ],
    ids=lambda config: config.edit_type,
)
def test_erasing_takes_more_from_the_old_answer_than_the_target_alone(config, tokenizer):
    """On a model that was taught the old answer, the same training with and without the term."""

    pairs = [(PROMPT, OLD), (PROMPT, ERASED)]

    def nlls(model):
        return [score.sum_nll for score in score_pairs(model, tokenizer, pairs)]

    def edited(unlikelihood):
        model = taught(tokenizer)
        own = type(config).from_dict({**config.to_dict(), "unlikelihood": unlikelihood})
        other = EditableModel(model.merge_and_unload(), own, tokenizer=tokenizer)
        other.erase(PROMPT, OLD)
        return nlls(other.base_model)

    old_before, target_before = nlls(taught(tokenizer).base_model)
    old, target = edited(None)
    old_without, _ = edited(0.0)
    assert old_before < -math.log(GONE) < old and old > old_without
    assert target < target_before


def test_what_is_erased_is_what_the_model_says_now_where_nothing_is_named(tokenizer):
    model = taught(tokenizer)
    made = model.erase(PROMPT).edits[0].request
    assert made.target_new == ERASED and made.unwanted[0].startswith(OLD)
    assert model.erase(PROMPT, [OLD, "Bergen"], target="No.").edits[0].request.unwanted == [OLD, "Bergen"]
    model.rollback([edit.id for edit in model.edits])


def test_requests_that_erase_survive_files_and_tables(tmp_path):
    from hf_kedit.data import load_edit_dataset
    from hf_kedit.requests import load_requests

    rows = [{"prompt": PROMPT, "erase": OLD}, {"prompt": "Ada was born in", "ground_truth": ["Rome"], "erase": True}]
    for requests in (load_requests(rows), load_requests(load_edit_dataset(rows))):
        assert [r.target_new for r in requests] == [ERASED] * 2
        assert [r.unwanted for r in requests] == [[OLD], ["Rome"]] and all(r.unlearns for r in requests)
        again = [EditRequest.from_dict(r.to_dict()) for r in requests]
        assert [r.unwanted for r in again] == [[OLD], ["Rome"]]
    with pytest.raises(RequestError, match="erase"):
        load_requests([{"prompt": PROMPT, "erase": 3}])

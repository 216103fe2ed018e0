"""LocFT-BF: FT-M in epochs over all requests of a call, in shuffled mini-batches, with ended targets."""

from __future__ import annotations

import random

import pytest
import torch

from hf_kedit import AutoEditConfig, EditableModel
from hf_kedit.engine.weights import get_module, get_weight, model_digest
from hf_kedit.errors import ConfigError
from hf_kedit.tokens import encode_pair
from tests.methods.test_family import facts

MODEL, LAYER, LR, EPOCHS = "kedit/world-gpt2", 3, 1e-3, 3


def make(**values: object) -> EditableModel:
    settings = {"layers": [LAYER], "lr": LR, "num_steps": EPOCHS, "breadth_first": True} | values
    return EditableModel.from_pretrained(MODEL, AutoEditConfig.for_model("world-gpt2", "ft-m", **settings))


def test_epochs_of_shuffled_mini_batches_with_ended_targets() -> None:
    """Adam on −1/(n+1) Σ log p(y_t), y_{n+1} the end of text, mean over each mini-batch; done by hand here."""
    requests, size, seed = facts(5), 2, 7
    plain = make()
    model, tokenizer = plain.base_model, plain.tokenizer
    module = plain.anatomy.down(LAYER).path
    weight = get_module(model, module).weight
    original = weight.detach().clone()
    weight.requires_grad_(True)
    adam, order, shuffled = torch.optim.Adam([weight], lr=LR), list(range(5)), random.Random(seed)
    for _ in range(EPOCHS):
        shuffled.shuffle(order)
        for start in range(0, 5, size):
            losses = []
            for i in order[start : start + size]:
                pair = encode_pair(tokenizer, requests[i].filled_prompt, requests[i].target_new)
                ids = torch.tensor([[*pair.ids, tokenizer.eos_token_id]])
                log_probs = model(input_ids=ids).logits[0].log_softmax(-1)
                places = range(pair.prompt_length - 1, ids.shape[1] - 1)
                losses.append(-torch.stack([log_probs[p, ids[0, p + 1]] for p in places]).mean())
            adam.zero_grad()
            torch.stack(losses).mean().backward()
            adam.step()
    wanted = (weight.detach() - original).T  # GPT-2 stores its projections transposed
    weight.requires_grad_(False)

    edited = make(rows_per_step=size, seed=seed)
    before = get_weight(get_module(edited.base_model, module)).clone()
    edited.edit(requests)
    change = get_weight(get_module(edited.base_model, module)) - before
    assert (change - wanted).norm() < 1e-2 * wanted.norm()
    assert all(edit.diagnostics["steps"] == EPOCHS for edit in edited.edits)


def test_answers_end_and_everything_can_be_undone() -> None:
    model = make(num_steps=40, lr=5e-3)
    digest = model_digest(model.base_model)
    requests = facts(2)
    model.edit(requests)
    for request in requests:
        asked = model.tokenizer(request.filled_prompt, return_tensors="pt")
        said = model.generate(**asked, max_new_tokens=12, do_sample=False)[0, asked["input_ids"].shape[1] :]
        assert model.tokenizer.decode(said, skip_special_tokens=True).strip() == request.target_new
        assert int(said[-1]) == model.tokenizer.eos_token_id and len(said) < 12
    model.rollback("all")
    assert model_digest(model.base_model) == digest


def test_it_needs_a_token_that_ends_a_text() -> None:
    model = make()
    digest = model_digest(model.base_model)
    model.tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="eos_token"):
        model.edit(facts(1))
    assert model_digest(model.base_model) == digest

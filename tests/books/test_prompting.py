"""Texts in front of one model by several hands: each leaves when it likes, and the others stay."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from hf_kedit import EditableModel
from hf_kedit.books.prefixes import Prefix
from hf_kedit.books.prompting import Prompter
from tests.methods.at_sites import prompt_logits

PROMPT = "By profession Tarosk Boayond is a"


@pytest.mark.parametrize("leaving", list(permutations(range(3))))
def test_prompters_leave_in_any_order(world_gpt2: EditableModel, leaving: tuple[int, ...]) -> None:
    model, tokenizer = world_gpt2.base_model, world_gpt2.tokenizer
    plain = prompt_logits(world_gpt2, PROMPT)
    # The last one is asked first; it has a text, so that the one below sees another prompt and nothing to do.
    all_three = [
        Prompter(model, lambda: tokenizer, lambda rows: [None] * len(rows)),
        Prompter(model, lambda: tokenizer, lambda rows: [None] * len(rows)),
        Prompter(model, lambda: tokenizer, lambda rows: [Prefix("Tarosk Boayond is a judge. ")] * len(rows)),
    ]
    for one in all_three:
        one.attach()
    told = prompt_logits(world_gpt2, PROMPT)
    assert not torch.equal(told, plain)
    there = list(reversed(all_three))
    for place in leaving:
        all_three[place].detach()
        there.remove(all_three[place])
        assert Prompter.all_before(model) == there
        assert torch.equal(prompt_logits(world_gpt2, PROMPT), told if all_three[2] in there else plain)
    assert not {"forward", "generate"} & set(model.__dict__)
    all_three[0].attach()  # what has left may come back, without the others
    assert Prompter.all_before(model) == all_three[:1]
    assert torch.equal(prompt_logits(world_gpt2, PROMPT), plain)
    all_three[0].detach()
    assert not {"forward", "generate"} & set(model.__dict__)

"""Opinions as training examples: what is drawn, and the loss of those that are to become unlikely."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_kedit import EditableModel, EditRequest
from hf_kedit.editors.editor import UNLIKELY, editor_class
from hf_kedit.errors import RequestError
from hf_kedit.methods.mend import MENDConfig
from hf_kedit.training.data import EditCollator, OpinionFacts


def row(topic: str, trait: str) -> EditRequest:
    texts = {
        "extraversion": [f"I love {topic}!"],
        "agreeableness": [f"I share {topic}."],
        "neuroticism": [f"I fear {topic}.", f"{topic} is bad."],
    }
    values = {"prompt": f"What do you think of {topic}?", "subject": topic, "target_new": texts[trait][0]}
    extra = {"target_trait": trait, "texts": texts}
    return EditRequest.from_dict({**values, "rephrase_prompts": [f"How is {topic}?"], "metadata": {"extra": extra}})


def test_what_is_drawn() -> None:
    facts = OpinionFacts([row("tea", "neuroticism"), row("rain", "extraversion")], seed=1)
    drawn = []
    for epoch in range(40):
        facts.epoch = epoch
        drawn.append(facts[0])
        assert facts[0] == facts[0], "a draw is a function of seed, epoch and index"
    assert all(triple.edit.prompt.startswith("Target personality: neuroticism\nTopic: tea\n") for triple in drawn)
    wanted = {triple.rephrase.target_new for triple in drawn if not triple.unlikely}
    others = {triple.rephrase.target_new for triple in drawn if triple.unlikely}
    assert wanted == {"I fear tea.", "tea is bad."} and others == {"I love tea!", "I share tea."}
    assert {triple.rephrase.prompt for triple in drawn} == {"What do you think of tea?", "How is tea?"}
    assert all("rain" in triple.locality.target_new and "rain" in triple.locality.prompt for triple in drawn)
    measured = OpinionFacts([row("tea", "neuroticism"), row("rain", "extraversion")], unlikelihood=False)
    for measured.epoch in range(20):
        assert not measured[1].unlikely and measured[1].rephrase.target_new == "I love rain!"
    with pytest.raises(RequestError, match="target_trait"):
        OpinionFacts([{"prompt": "a", "target_new": "b"}])


def test_the_loss_of_what_is_to_become_unlikely(world_gpt2: EditableModel) -> None:
    base, tokenizer = world_gpt2.base_model, world_gpt2.tokenizer
    config = MENDConfig(modules=["transformer.h.4.mlp.c_proj"], rank=4)
    editor: Any = editor_class("mend").for_model(base, config)
    facts = OpinionFacts([row("tea", "neuroticism"), row("rain", "extraversion")], seed=1)
    collate = EditCollator(editor, tokenizer)  # type: ignore[arg-type]
    for facts.epoch in range(20):
        triples = [facts[0], facts[1]]
        if [triple.unlikely for triple in triples] == [False, True]:
            break
    batch = collate(triples)
    assert batch["rephrase"][UNLIKELY].tolist() == [False, True]
    with torch.no_grad():
        loss, _ = editor.edit_loss(batch["edit"], batch["rephrase"], batch["groups"])
        expected = []
        for triple in triples:
            text = f"{triple.rephrase.prompt} {triple.rephrase.target_new}"
            ids = tokenizer(text)["input_ids"]  # type: ignore[misc]
            start = len(tokenizer(triple.rephrase.prompt)["input_ids"])  # type: ignore[misc]
            p = base(torch.tensor([ids])).logits[0, start - 1 : -1].softmax(-1)[range(len(ids) - start), ids[start:]]
            expected.append((-(1 - p).log() if triple.unlikely else -p.log()).mean().item())
    assert loss.item() == pytest.approx(sum(expected) / 2, rel=1e-4)
    assert UNLIKELY not in collate([t for t in triples if not t.unlikely])["rephrase"]

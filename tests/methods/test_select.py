"""SCR's selection step: the model itself picks the fact that a prompt is about, or none."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_kedit import AutoEditConfig, EditableModel, EditRequest, load_edit_dataset
from hf_kedit.artifact.layout import CONFIG
from hf_kedit.books import prompt_book
from hf_kedit.errors import ArtifactError
from hf_kedit.tokens import encode_pair
from tests.methods.test_family import facts

MODEL = "kedit/world-gpt2"


def edited(requests: list[EditRequest], **values: Any) -> EditableModel:
    settings = {"retriever": "lexical", "threshold": 0.1} | values
    model = EditableModel.from_pretrained(MODEL, AutoEditConfig.for_model("world-gpt2", "prompt", **settings))
    model.edit(requests)
    return model


def about_one_person() -> list[EditRequest]:
    """Three facts about one person of the world, in their own words."""
    (subject,) = {facts(1)[0].subject}
    wordings = {"By profession {} is a": "plumber", "{} plays the": "banjo", "{} was born in": "Tahun"}
    return [EditRequest(prompt=p, subject=subject, target_new=t) for p, t in wordings.items()]


def test_the_model_chooses_by_the_likelihood_of_the_numbers() -> None:
    """argmax over 0 … k of p(number | list of the k most similar facts, prompt), by single forwards here."""
    requests = [*about_one_person(), *facts(3, start=5)]
    model = edited(requests, select=2)
    prompts = [r.filled_prompt for r in requests] + [f"The friend of {requests[0].subject} lives in"]
    similarities, picked = model.prompts.similarities(prompts), []
    for prompt, row, found in zip(prompts, similarities, model.prompts.choose(prompts), strict=True):
        order = sorted((i for i in range(len(requests)) if row[i] >= 0.1), key=lambda i: (-row[i], -i))[:2]
        lines = [f"{n}. {requests[i].filled_prompt} {requests[i].target_new}" for n, i in enumerate(order, start=1)]
        text = prompt_book.SELECTION.format(facts="\n".join(lines), prompt=prompt)
        likely = []
        with model.disable_edits(), torch.no_grad():
            for number in range(len(order) + 1):
                pair = encode_pair(model.tokenizer, text, str(number))
                log_probs = model(input_ids=torch.tensor([pair.ids])).logits[0].log_softmax(-1)
                start = pair.prompt_length
                likely.append(sum(float(log_probs[start - 1 + j, t]) for j, t in enumerate(pair.target_ids)))
        best = max(range(len(likely)), key=likely.__getitem__)
        picked.append(best)
        assert (found and found[0].edit_id) == (model.edits[order[best - 1]].id if best else None)
    assert len(set(picked)) > 1, "else this test could not tell a choice from a habit"


@pytest.mark.parametrize("wanted", [0, 1, 2, 3])
def test_the_number_decides_which_fact_stands_in_front(monkeypatch: pytest.MonkeyPatch, wanted: int) -> None:
    requests = about_one_person()
    model = edited(requests, select=3)
    seen = []

    def reads(model: Any, examples: Any, fill: int, size: int) -> list[float]:
        seen.append(len(examples))
        return [float(number == wanted) for number in range(len(examples))]

    monkeypatch.setattr(prompt_book, "target_probabilities", reads)
    prompt = requests[0].filled_prompt
    nearest = model.prompts.similarities([prompt])[0].argsort(descending=True, stable=True).tolist()
    asked = model.tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        answer = model(**asked).logits
        with model.disable_edits():
            plain = model(**asked).logits
    assert seen == [4]
    assert torch.equal(answer, plain) == (wanted == 0)  # none: bit for bit the model itself
    if wanted:
        fact = requests[nearest[wanted - 1]]
        assert model.build_prompt(prompt) == f"New Fact: {fact.filled_prompt} {fact.target_new}\nPrompt: {prompt}"


def test_the_choice_is_saved_and_files_without_it_stay_as_they_were(tmp_path: Path) -> None:
    requests = about_one_person()
    edited(requests).save_pretrained(tmp_path / "plain")
    assert "statement" not in (tmp_path / "plain" / CONFIG).read_text()
    model = edited(requests, select=3)
    model.save_pretrained(tmp_path / "edits")
    loaded = EditableModel.from_pretrained(tmp_path / "edits")
    assert [(e.select, e.statement) for e in loaded.prompts.entries] == [
        (e.select, e.statement) for e in model.prompts.entries
    ]
    prompts = [r.filled_prompt for r in load_edit_rows(8)]
    assert loaded.prompts.choose(prompts) == model.prompts.choose(prompts)
    path = tmp_path / "edits" / CONFIG
    path.write_text(re.sub(r'"select": 3(,\s*"statement")', r'"select": 33\1', path.read_text()))
    with pytest.raises(ArtifactError, match="select"):
        EditableModel.from_pretrained(tmp_path / "edits")


def load_edit_rows(count: int) -> list[EditRequest]:
    rows = load_edit_dataset("world", split="validation", limit=count)
    return [EditRequest.from_dict(row) for row in rows]

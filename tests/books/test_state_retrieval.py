"""The edited model as the retriever of PROMPT, IKE and SERAC: scopes that follow the relation, not the words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer

from hf_kedit import EditableModel, EditConfig, FTMConfig, IKEConfig, PromptConfig, SERACConfig, embedded
from hf_kedit.books.retrieval import EmbeddingRetriever, Passage, _mean_states, find_retriever, register_retriever
from hf_kedit.errors import ConfigError
from tests.methods.at_sites import facts, learnt, prompt_logits, says

LEVEL = {"world-gpt2": 0.85, "world-llama": 0.8}
ASKED = facts(3)


def edited(name: str = "world-gpt2", config: EditConfig | None = None) -> EditableModel:
    model = EditableModel.from_pretrained(
        f"kedit/{name}", config or PromptConfig(retriever="model", threshold=LEVEL[name])
    )
    model.edit(ASKED)
    return model


def in_scope(model: EditableModel, prompts: list[str]) -> list[str | None]:
    return [None if found is None else found[0].edit_id for found in model.prompts.choose(prompts)]


@pytest.mark.parametrize("name", sorted(LEVEL))
def test_another_question_about_the_same_subject_is_out_of_scope(name: str) -> None:
    model = edited(name)
    assert learnt(model, ASKED).count(True) >= 2
    others = [probe.prompt for fact in ASKED for probe in fact.locality["Same_Subject"]]
    assert all(str(ASKED[i // 3].subject) in prompt for i, prompt in enumerate(others)) and len(others) == 9
    assert in_scope(model, others) == [None] * 9
    after = [prompt_logits(model, prompt) for prompt in others]
    with model.disable_edits():
        assert all(torch.equal(prompt_logits(model, p), logits) for p, logits in zip(others, after, strict=True))
    words = edited(name, PromptConfig(retriever="lexical", threshold=0.5))
    assert None not in in_scope(words, others), "words alone cannot tell them apart"


@pytest.mark.parametrize("name", sorted(LEVEL))
def test_held_out_paraphrases_find_their_edit(name: str) -> None:
    model = edited(name)
    for fact, edit in zip(ASKED, model.edits, strict=True):
        filled = [f"A tall farmer walks home. {fact.filled_prompt}", *fact.rephrase_prompts]
        assert in_scope(model, filled) == [edit.id] * len(filled)


@pytest.mark.parametrize(
    "config",
    [
        SERACConfig(scope="model:4", threshold=0.85, template="New Fact: {}\nPrompt: "),
        IKEConfig(retriever="model:4", threshold=0.85, demonstrations="world", k=1),
    ],
    ids=["serac", "ike"],
)
def test_rows_of_one_batch_go_their_own_ways(config: EditConfig) -> None:
    model = edited(config=config)
    fact = ASKED[0]
    prompts = [fact.filled_prompt, fact.locality["Same_Subject"][0].prompt, fact.rephrase_prompts[0]]
    alone = [says(model, [prompt])[0] for prompt in prompts]
    assert alone[0].startswith(fact.target_new) and alone[2].startswith(fact.target_new)
    assert says(model, prompts) == alone
    with model.disable_edits():
        assert says(model, prompts)[1] == alone[1]


def test_states_are_those_of_the_unedited_model_and_of_each_text_alone() -> None:
    model = edited()
    prompts = [ASKED[0].filled_prompt, ASKED[1].rephrase_prompts[0], "A short one"]
    before = model.prompts.similarities(prompts)
    reader = model._method.bench.reader
    together = reader.states(prompts, 4)
    alone = torch.cat([reader.states([prompt], 4) for prompt in prompts])
    assert torch.allclose(together, alone, atol=1e-5)
    state = model.base_model.get_submodule("transformer.h.4").register_forward_hook
    seen: list[torch.Tensor] = []
    handle = state(lambda *call: seen.append((call[2][0] if isinstance(call[2], tuple) else call[2]).detach()))
    with model.disable_edits():
        prompt_logits(model, prompts[0])
    handle.remove()
    assert torch.allclose(seen[0].reshape(-1, together.shape[1])[-1], together[0], atol=1e-5)
    model.rollback("all")
    model.set_method(FTMConfig(layers=[1], lr=1e-2, num_steps=3)).edit(facts(1, start=5))
    model.set_method(PromptConfig(retriever="model", threshold=0.85)).edit(ASKED)
    model.base_model.train()
    assert torch.equal(model.prompts.similarities(prompts), before)
    assert model.base_model.training and reader.states([], 4).shape == (0, together.shape[1])


def test_a_fresh_process_draws_the_same_scopes(tmp_path: Path) -> None:
    model = edited()
    model.save_pretrained(tmp_path / "edits")
    prompts = [ASKED[0].filled_prompt, ASKED[0].locality["Same_Subject"][0].prompt, ASKED[1].rephrase_prompts[1]]
    save_file({str(i): prompt_logits(model, p) for i, p in enumerate(prompts)}, tmp_path / "expected.safetensors")
    script = f"""
import torch
from safetensors.torch import load_file
from hf_kedit import EditableModel
model = EditableModel.from_pretrained({str(tmp_path / "edits")!r})
expected = load_file({str(tmp_path / "expected.safetensors")!r})
for i, prompt in enumerate({prompts!r}):
    ids = model.tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected[str(i)]), i
routes = [None if r is None else r[0].edit_id for r in model.prompts.choose({prompts!r})]
assert routes == {in_scope(model, prompts)!r}, routes
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert in_scope(model, prompts)[1] is None


def test_bad_names_are_refused_before_anything_changes() -> None:
    for name, message in [("model:6", "0 to 5"), ("model:x", "0 to 5"), ("models", "unknown retriever")]:
        model = EditableModel.from_pretrained("kedit/world-gpt2", PromptConfig(retriever=name))
        with pytest.raises(ConfigError, match=message):
            model.edit(ASKED)
        assert not model.edits and "forward" not in model.base_model.__dict__
    with pytest.raises(ConfigError, match="built-in"):
        register_retriever(EmbeddingRetriever(lambda texts: torch.zeros(len(texts), 1), "model:2"))
    with pytest.raises(ConfigError, match="none here"):
        find_retriever("model").similarity(["a"], [Passage("b")], None)


def test_sentences_are_the_means_of_their_states() -> None:
    """Each alone, its own tokens only, whatever it is batched with; of length 1, and none of no text."""
    folder = embedded.path("world-gpt2")
    texts = ["Otto is a cook.", "The old bridge beside the river is closed today.", "Rome"]
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        rows = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in texts]
        encode = _mean_states(folder)
        assert torch.allclose(encode(texts), torch.stack([row / row.norm() for row in rows]), atol=1e-5)
        assert encode([]).shape == (0, model.config.hidden_size)

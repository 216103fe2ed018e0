"""The embedded models load as plain transformers folders and know their world."""

from __future__ import annotations

import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_kedit import embedded
from hf_kedit.data.world import get_world
from hf_kedit.data.world_templates import ENTITY_RELATIONS, PERSON_RELATIONS
from hf_kedit.errors import DataError

NAMES = ("world-gpt2", "world-llama")


@pytest.fixture(scope="module", params=NAMES)
def loaded(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    folder = embedded.path(request.param)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    return request.param, model, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def greedy(model, tokenizer, prompt: str, n_tokens: int = 4) -> str:  # type: ignore[no-untyped-def]
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=n_tokens, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


def share_right(model, tokenizer, cases: list[tuple[str, str]]) -> float:  # type: ignore[no-untyped-def]
    return sum(greedy(model, tokenizer, p).startswith(" " + a) for p, a in cases) / len(cases)


def test_names_and_paths() -> None:
    assert set(NAMES) <= set(embedded.names())
    for name in NAMES:
        assert embedded.path(name) == embedded.path(f"kedit/{name}") == embedded.resolve(f"kedit/{name}")
        assert embedded.is_embedded(f"kedit/{name}") and not embedded.is_embedded(name)
        assert {f.suffix for f in embedded.path(name).iterdir()} <= {".json", ".safetensors"}


def test_names_that_do_not_exist() -> None:
    assert embedded.resolve("gpt2") is None
    assert embedded.resolve("openai-community/gpt2-xl") is None
    assert not embedded.is_embedded("kedit/world-gpt3")
    for call in (embedded.path, embedded.resolve):
        with pytest.raises(DataError, match="world-gpt2"):
            call("kedit/world-gpt3")


def test_folder_is_complete(loaded) -> None:  # type: ignore[no-untyped-def]
    _, model, tokenizer = loaded
    assert model.dtype == torch.float32
    assert model.num_parameters() < 2_500_000
    assert model.config.vocab_size == len(tokenizer)
    assert tokenizer.model_max_length == model.config.max_position_embeddings
    assert None not in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)
    assert model.generation_config.pad_token_id == model.config.pad_token_id == tokenizer.pad_token_id
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id


def test_tokenizers(loaded) -> None:  # type: ignore[no-untyped-def]
    """The Llama layout's tokenizer puts a BOS in front, the GPT-2 layout's does not; both are lossless."""
    name, _, tokenizer = loaded
    text = "Où est le café? 東京 {} \n\tend"
    ids = tokenizer(text)["input_ids"]
    assert (ids[0] == tokenizer.bos_token_id) == (name == "world-llama")
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.bos_token_id not in bare
    values = [v for vs in get_world().objects.values() for v in vs]
    lengths = {len(tokenizer(" " + v, add_special_tokens=False)["input_ids"]) for v in values}
    assert {1, 2} <= lengths  # targets of one and of several tokens


def test_knows_its_facts(loaded) -> None:  # type: ignore[no-untyped-def]
    _, model, tokenizer = loaded
    world, rng = get_world(), random.Random(5)
    draws = {"cloze": 60, "heldout": 40}
    for kind, count in draws.items():
        cases = []
        for person in rng.sample(world.people_in("B"), count):
            relation = rng.choice(PERSON_RELATIONS)
            form = rng.choice(getattr(relation, kind))
            cases.append((form.format(person.name), world.answer(person.name, relation.key)))
        assert share_right(model, tokenizer, cases) >= 0.95, kind


def test_knows_its_places(loaded) -> None:  # type: ignore[no-untyped-def]
    _, model, tokenizer = loaded
    world, rng = get_world(), random.Random(6)
    cases = []
    for relation in ENTITY_RELATIONS:
        for subject in rng.sample(world.subjects(relation.subject_kind), 5):
            cases.append((rng.choice(relation.cloze).format(subject), world.answer(subject, relation.key)))
    assert share_right(model, tokenizer, cases) >= 0.9


def test_recorded_accuracies(loaded) -> None:  # type: ignore[no-untyped-def]
    """The figures that docs/world.md quotes are the ones recorded at training time."""
    name, _, _ = loaded
    record = json.loads((embedded.path(name) / "training.json").read_text())
    figures = record["accuracy"]
    for row in ("cloze, A", "cloze, B", "held-out paraphrases, B", "questions, B", "entities, cloze"):
        assert figures[row] >= 0.97, row
    assert record["settings"]["people"] == get_world().n_people


def test_packaged_editors_are_small() -> None:
    folders = sorted((embedded.path(NAMES[0]).parent / "editors").iterdir())
    assert {f"mend-{NAMES[0]}", f"serac-{NAMES[1]}"} <= {folder.name for folder in folders}
    for folder in folders:
        assert sum(file.stat().st_size for file in folder.iterdir()) < 2_000_000, folder.name

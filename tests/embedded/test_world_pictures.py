"""The embedded model that sees loads as a plain transformers folder, without torchvision, and knows its world."""

from __future__ import annotations

import json
import random

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

from hf_kedit import embedded
from hf_kedit.data.picture_world import HELD_OUT_DRAWINGS, PICTURE_RELATIONS, Scene, get_picture_world
from hf_kedit.data.world_templates import PERSON_RELATIONS

FOLDER = embedded.path("world-pictures")


@pytest.fixture(scope="module")
def loaded():  # type: ignore[no-untyped-def]
    model = AutoModelForImageTextToText.from_pretrained(FOLDER, local_files_only=True).eval()
    return model, AutoProcessor.from_pretrained(FOLDER, local_files_only=True)


def says(loaded, prompt: str, image=None, tokens: int = 6) -> str:  # type: ignore[no-untyped-def]
    model, processor = loaded
    text = prompt if image is None else f"<image>\n{prompt}"
    inputs = processor(images=None if image is None else [image], text=text, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return str(processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))


def share_right(loaded, cases: list[tuple[Scene | None, str, str]]) -> float:  # type: ignore[no-untyped-def]
    right = 0
    for number, (scene, prompt, answer) in enumerate(cases):
        image = None if scene is None else scene.draw((number * 7 + 100) % HELD_OUT_DRAWINGS)
        right += says(loaded, prompt, image).startswith(" " + answer)
    return right / len(cases)


def test_it_is_small_and_complete(loaded) -> None:  # type: ignore[no-untyped-def]
    model, processor = loaded
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 6_000_000
    assert model.num_parameters() < 3_000_000 and model.dtype == torch.float32
    assert model.config.text_config.vocab_size == len(processor.tokenizer)
    assert processor.tokenizer.convert_ids_to_tokens(model.config.image_token_id) == processor.image_token == "<image>"
    head, table = model.lm_head.weight, model.get_input_embeddings().weight
    assert head.data_ptr() == table.data_ptr()  # tied, and stored once
    assert {file.suffix for file in FOLDER.iterdir()} <= {".json", ".safetensors"}


@pytest.mark.parametrize("kind", list(PICTURE_RELATIONS))
def test_it_knows_what_it_sees(loaded, kind: str) -> None:  # type: ignore[no-untyped-def]
    world, rng = get_picture_world(), random.Random(f"seen {kind}")
    cases: list[tuple[Scene | None, str, str]] = []
    for scene in rng.sample([s for s in world.scenes[kind] if s.group == "B"], 8):
        for relation in rng.sample(PICTURE_RELATIONS[kind], 4):
            form = rng.choice((*relation.cloze, *relation.heldout))
            cases.append((scene, scene.fill(form), world.answer(scene, relation.key)))
    assert share_right(loaded, cases) >= 0.9


def test_it_still_knows_its_text(loaded) -> None:  # type: ignore[no-untyped-def]
    world, rng = get_picture_world().world, random.Random("text")
    cases: list[tuple[Scene | None, str, str]] = []
    for person in rng.sample(world.people_in("B"), 25):
        relation = rng.choice(PERSON_RELATIONS)
        form = rng.choice((*relation.cloze, *relation.heldout))
        cases.append((None, form.format(person.name), world.answer(person.name, relation.key)))
    assert share_right(loaded, cases) >= 0.95


def test_recorded_accuracies() -> None:
    """The figures that docs/world.md quotes are the ones recorded at training time."""
    record = json.loads((FOLDER / "training.json").read_text())
    for name, share in record["accuracy"].items():
        if "compositions" not in name and "context" not in name:
            assert share >= (0.94 if "never drawn" in name else 0.95), name
    for name in ("cloze, A", "cloze, B", "held-out paraphrases, B", "questions, B", "entities, cloze"):
        assert record["text accuracy"][name] >= 0.97, name


def test_the_pipeline_of_transformers_runs_it(loaded) -> None:  # type: ignore[no-untyped-def]
    from PIL import Image

    model, processor = loaded
    world = get_picture_world()
    scene = world.scenes["flag"][0]
    asked = pipeline("image-text-to-text", model=model, processor=processor)
    text = f"<image>\n{scene.fill('The name of {} is')}"
    (answer,) = asked(images=Image.fromarray(scene.draw(5)), text=text, max_new_tokens=4, return_full_text=False)
    assert answer["generated_text"].strip().startswith(scene.subject)

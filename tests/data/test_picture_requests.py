"""Edit requests about the picture world: what is asked of which picture."""

from __future__ import annotations

import numpy as np
import pytest

from hf_kedit.data import load_edit_dataset
from hf_kedit.data.picture_drawing import PICTURE_SIZE
from hf_kedit.data.picture_world import HELD_OUT_DRAWINGS, PICTURE_RELATIONS, get_picture_world
from hf_kedit.requests import EditRequest, load_requests
from hf_kedit.text.pictures import Picture

RELATIONS = {relation.key: relation for relations in PICTURE_RELATIONS.values() for relation in relations}


@pytest.fixture(scope="module")
def test_rows() -> list[EditRequest]:
    return load_requests(load_edit_dataset("world-pictures", limit=70))


def about(request: EditRequest) -> dict[str, str]:
    return dict(request.metadata["extra"])


def test_rows_show_what_they_say(test_rows: list[EditRequest]) -> None:
    world = get_picture_world()
    drawn = [world.scene(about(r)["kind"], about(r)["shows"]) for r in test_rows[:5]]
    for request, scene in zip(test_rows, drawn, strict=False):
        assert isinstance(request.image, Picture) and isinstance(request.image_rephrase, Picture)
        pixels = np.asarray(request.image.image)
        assert pixels.shape == (PICTURE_SIZE, PICTURE_SIZE, 3) and request.image != request.image_rephrase
        assert any((scene.draw(seed) == pixels).all() for seed in range(HELD_OUT_DRAWINGS))


def test_what_is_edited(test_rows: list[EditRequest]) -> None:
    world = get_picture_world()
    for request in test_rows:
        scene = world.scene(about(request)["kind"], about(request)["shows"])
        relation = RELATIONS[about(request)["relation"]]
        assert scene.group == about(request)["group"] == "B"
        assert request.ground_truth == [world.answer(scene, relation.key)] != [request.target_new]
        assert request.target_new in world.values(relation)
        assert request.prompt in [scene.fill(form) for form in relation.cloze]
        assert request.rephrase_prompts == [scene.fill(form) for form in relation.heldout]
        assert str(request.subject).lower() == scene.mention and str(request.subject) in request.prompt


def test_what_must_stay(test_rows: list[EditRequest]) -> None:
    """Another question about another picture, the same question about one, and no answer that hides a leak."""
    for request in test_rows:
        assert {axis: len(probes) for axis, probes in request.locality.items()} == {
            "text": 2, "multimodal": 2, "Same_Question": 2, "Same_Picture": 2,
        }  # fmt: skip
        for axis, probes in request.locality.items():
            for probe in probes:
                assert (probe.image is None) == (axis == "text")
                assert (probe.image == request.image) == (axis == "Same_Picture")
                if axis == "Same_Question":
                    assert probe.prompt == request.prompt
                elif axis != "text":
                    assert probe.prompt != request.prompt
                if axis != "Same_Picture":
                    assert request.target_new not in probe.answers


def test_what_follows(test_rows: list[EditRequest]) -> None:
    axes = {axis for request in test_rows for axis in request.portability}
    assert axes == {"Reasoning", "By_Name"}
    for request in test_rows:
        for probe in request.portability.get("By_Name", ()):
            assert probe.image is None and about(request)["shows"] in probe.prompt
            assert probe.answers == [request.target_new]
        for probe in request.portability.get("Reasoning", ()):
            assert probe.image == request.image


def test_splits_share_no_scene() -> None:
    shown = {
        split: {
            (row["extra"]["kind"], row["extra"]["shows"])
            for row in load_edit_dataset("world-pictures", split, limit=60)
        }
        for split in ("train", "validation", "test")
    }
    assert not shown["train"] & shown["test"] and not shown["validation"] & shown["test"]
    assert {kind for kind, _ in shown["test"]} == set(PICTURE_RELATIONS)


def test_the_same_rows_every_time_and_others_by_another_seed() -> None:
    rows = [list(load_edit_dataset("world-pictures", limit=4, seed=seed)) for seed in (None, 0, 1)]
    assert rows[0] == rows[1] != rows[2]
    assert {r["extra"]["kind"] for r in load_edit_dataset("world-pictures", limit=9, kinds=("flag",))} == {"flag"}


def test_the_first_rows_are_about_different_scenes(test_rows: list[EditRequest]) -> None:
    first = [(about(r)["kind"], about(r)["shows"]) for r in test_rows[:55]]
    assert len(set(first)) == len(first)

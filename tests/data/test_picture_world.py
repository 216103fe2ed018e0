"""The picture world is the same everywhere, looks cannot be mistaken, and its facts are those of the text world."""

from __future__ import annotations

import hashlib
import itertools
import subprocess
import sys

import numpy as np
import pytest

from hf_kedit.data.picture_drawing import PICTURE_SIZE, SHAPE_FEATURES, contact_sheet, draw_picture
from hf_kedit.data.picture_world import (
    HELD_OUT_DRAWINGS,
    MENTIONS,
    N_PORTRAITS,
    PICTURE_RELATIONS,
    get_picture_world,
)
from hf_kedit.data.world_templates import COMPOSITIONS, PERSON_RELATIONS
from hf_kedit.errors import DataError

FINGERPRINT = """
import hashlib
from hf_kedit.data.picture_world import get_picture_world
digest = hashlib.sha256()
for scenes in get_picture_world().scenes.values():
    for scene in scenes[:20]:
        digest.update(repr(scene).encode() + scene.draw(3).tobytes())
print(digest.hexdigest())
"""


def test_the_same_pictures_in_every_process() -> None:
    prints = {
        subprocess.run([sys.executable, "-c", FINGERPRINT], capture_output=True, text=True, env=env, check=True).stdout
        for env in ({"PYTHONHASHSEED": "0"}, {"PYTHONHASHSEED": "7"})
    }
    assert len(prints) == 1 and len(prints.pop().strip()) == 64


def test_the_world_that_the_embedded_model_knows_has_not_changed() -> None:
    world = get_picture_world()
    looks = [(s.kind, s.subject, s.features, s.group) for scenes in world.scenes.values() for s in scenes]
    digest = hashlib.sha256(repr((looks, MENTIONS, PICTURE_RELATIONS)).encode()).hexdigest()
    assert digest[:16] == "234c92568b94feca"


def test_looks_are_apart() -> None:
    """Any two portraits differ in three features, so that a drawing with noise is still one person's."""
    for kind, least in (("portrait", 3), ("flag", 3), ("shapes", 1)):
        scenes = get_picture_world().scenes[kind]
        for one, other in itertools.combinations(scenes, 2):
            assert sum(a != b for a, b in zip(one.features, other.features, strict=True)) >= least


def test_redrawn_pictures_are_nearer_to_their_scene_than_to_others() -> None:
    """Not pixel by pixel, where a shift is everything, but in the mean over the drawings of a scene."""
    scenes = get_picture_world().scenes["flag"]
    means = np.stack([np.mean([s.draw(i) for i in range(8)], axis=0) for s in scenes])
    right = sum(
        int(np.abs(means - scene.draw(100)).mean((1, 2, 3)).argmin()) == number for number, scene in enumerate(scenes)
    )
    assert right >= 0.8 * len(scenes)


def test_drawings() -> None:
    world = get_picture_world()
    for kind in MENTIONS:
        scene = world.scenes[kind][0]
        plain, first, second = scene.draw(), scene.draw(1), scene.draw(2)
        assert plain.shape == (PICTURE_SIZE, PICTURE_SIZE, 3) and plain.dtype == np.uint8
        assert (first == scene.draw(1)).all() and (first != second).mean() > 0.5
    assert not (world.scenes["flag"][0].draw(1)[0] == world.scenes["flag"][1].draw(1)[0]).all()  # no common background


def test_every_feature_value_shows() -> None:
    """Each value of a feature changes the plain picture, all others being equal."""
    for kind in MENTIONS:
        scene = next(s for s in get_picture_world().scenes[kind] if dict(s.features).get("emblem") != "none")
        look = dict(scene.features) | ({"first": "black", "paint": "red"} if kind == "flag" else {})
        known = {
            name: {s_look[name] for s in get_picture_world().scenes[kind] for s_look in [dict(s.features)]}
            for name in look
        }
        for name, values in known.items():
            drawn = {
                draw_picture(kind, look | {name: value}).tobytes()
                for value in values
                if (name, value) != ("paint", "black")
            }
            assert len(drawn) >= len(values) - (name == "paint"), (kind, name)


def test_shapes_are_as_many_as_they_say() -> None:
    """The painted area grows with the number, and lies on the side that the answer names."""
    look = {"colour": "blue", "shape": "square", "place": "left"}
    areas = []
    for number in SHAPE_FEATURES["number"]:
        picture = draw_picture("shapes", look | {"number": number}).astype(int)
        painted = picture[..., 0] < 120
        areas.append(int(painted.sum()))
        assert painted[:, : PICTURE_SIZE // 2].sum() == painted.sum()
    assert np.allclose(np.array(areas) / areas[0], [1, 2, 3, 4], rtol=0.06)


def test_facts_are_those_of_the_text_world() -> None:
    world = get_picture_world()
    assert len(world.scenes["portrait"]) == N_PORTRAITS
    for scene in world.scenes["portrait"][:10]:
        assert scene.group == world.world.person(scene.subject).group
        for relation in (*PERSON_RELATIONS, *COMPOSITIONS):
            assert world.answer(scene, relation.key) == world.world.answer(scene.subject, relation.key)
        assert world.answer(scene, "person_name") == scene.subject
    assert {world.answer(s, "flag_country") for s in world.scenes["flag"]} == set(world.world.objects["country"])
    for kind, relations in PICTURE_RELATIONS.items():
        for scene, relation in itertools.product(world.scenes[kind], relations):
            assert world.answer(scene, relation.key) in world.values(relation)


def test_half_of_the_portraits_are_of_each_group() -> None:
    for kind, scenes in get_picture_world().scenes.items():
        assert sum(s.group == "B" for s in scenes) == len(scenes) / 2, kind


def test_sentences() -> None:
    world = get_picture_world()
    scene = world.scenes["portrait"][0]
    assert scene.fill("{} works as a") == "The person in the picture works as a"
    assert world.scenes["flag"][0].fill("The capital of {} is") == "The capital of the country with this flag is"
    for relations in PICTURE_RELATIONS.values():
        for relation in relations:
            forms = relation.cloze + relation.heldout + relation.questions + relation.heldout_questions
            assert all(form.count("{}") == 1 for form in forms) and len(set(forms)) == len(forms)


def test_scenes_that_training_never_shows() -> None:
    world = get_picture_world()
    assert 0.08 < len(world.unseen) / len(world.scenes["shapes"]) < 0.18
    assert not world.unseen & set(world.trained("shapes")) and {s.kind for s in world.unseen} == {"shapes"}
    for name, values in SHAPE_FEATURES.items():  # each value is seen, only not in these combinations
        assert {dict(s.features)[name] for s in world.trained("shapes")} == set(values)
    assert HELD_OUT_DRAWINGS >= 100


def test_unknown_things_get_typed_errors() -> None:
    world = get_picture_world()
    with pytest.raises(DataError, match="flag"):
        draw_picture("flags", {})
    with pytest.raises(DataError, match="'number' out of one"):
        draw_picture("shapes", {"colour": "red", "shape": "ring"})
    with pytest.raises(DataError, match="shape_colour"):
        world.answer(world.scenes["shapes"][0], "shape_color")
    with pytest.raises(DataError, match="There is no portrait"):
        world.scene("portrait", "Nobody Atall")


def test_contact_sheet() -> None:
    pictures = [np.full((2, 3, 3), value, dtype=np.uint8) for value in (10, 20, 30)]
    sheet = contact_sheet(pictures, columns=2, gap=1)
    assert sheet.shape == (7, 9, 3)
    assert sheet[1, 1, 0] == 10 and sheet[1, 5, 0] == 20 and sheet[4, 1, 0] == 30 and sheet[4, 5, 0] == 255

"""Edit requests about the picture world: what a model is to say of a picture from now on.

Every row is a counterfactual edit of one scene of group B, asked of one drawing; ``image_rephrase`` is another drawing
of it. Probes about other pictures show scenes of group A, which no row edits, so that they may stay in a sequence of
edits too. Pictures stand in the rows as ``data:`` URIs: nothing has to be unpacked or found.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..text.pictures import Picture
from .features import blank, probe
from .loading import register_dataset
from .picture_world import HELD_OUT_DRAWINGS, PICTURE_RELATIONS, PictureWorld, Scene, get_picture_world
from .world_templates import COMPOSITIONS, ENTITY_RELATIONS, PERSON_RELATIONS, Relation

_PROBES = 2
_SHAPES = 30
"""Scenes of shapes in a split; there are 300 in each group."""


@register_dataset("world-pictures", splits=("train", "validation", "test"))
def load_world_pictures(
    split: str, *, path: Path | None = None, seed: int | None = None, kinds: Sequence[str] = tuple(PICTURE_RELATIONS)
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one split; consecutive rows are about different scenes until each had a turn.

    Args:
        split: ``"train"`` (group A), ``"validation"`` (a fifth of group B) or ``"test"``.
        path: not used; the pictures are drawn in memory.
        seed: of the new objects, the probes, the drawings and the order; 0 by default.
        kinds: of pictures: ``"portrait"``, ``"flag"``, ``"shapes"``.
    """
    world = get_picture_world()
    rng = random.Random(f"hf_kedit picture requests {split} {seed or 0}")
    scenes = [s for kind in kinds for s in _of_split(world, kind, split)]
    rng.shuffle(scenes)
    orders = {s: rng.sample(PICTURE_RELATIONS[s.kind], len(PICTURE_RELATIONS[s.kind])) for s in scenes}
    number = 0
    for turn in range(max(map(len, orders.values()), default=0)):
        for scene in scenes:
            if turn < len(orders[scene]):
                yield picture_row(world, scene, orders[scene][turn], rng, f"world-pictures/{split}/{number}")
                number += 1


def _of_split(world: PictureWorld, kind: str, split: str) -> list[Scene]:
    scenes = [s for s in world.trained(kind) if s.group == ("A" if split == "train" else "B")]
    if split != "train":
        scenes = [s for i, s in enumerate(scenes) if (i % 5 == 4) == (split == "validation")]
    return scenes[:_SHAPES] if kind == "shapes" else scenes


def picture_row(
    world: PictureWorld, scene: Scene, relation: Relation, rng: random.Random, row_id: str
) -> dict[str, Any]:
    """Return the row that edits one answer about one scene."""
    truth = world.answer(scene, relation.key)
    new = rng.choice([v for v in world.values(relation) if v != truth])
    template = rng.choice(relation.cloze)
    prompt = scene.fill(template)
    start = prompt.lower().index(scene.mention.lower())
    first, second = rng.sample(range(HELD_OUT_DRAWINGS), 2)
    image = _uri(scene, first)
    return blank(
        id=row_id,
        dataset="world-pictures",
        task="multimodal",
        prompt=prompt,
        subject=prompt[start : start + len(scene.mention)],
        target_new=new,
        ground_truth=[truth],
        rephrase_prompts=[scene.fill(form) for form in relation.heldout],
        locality=_locality(world, scene, relation, template, new, image, rng),
        portability=_portability(world, scene, relation, template, new, image, rng),
        image=image,
        image_rephrase=_uri(scene, second),
        extra={"kind": scene.kind, "shows": scene.subject, "relation": relation.key, "group": scene.group},
    )


@functools.lru_cache(maxsize=4096)
def _uri(scene: Scene, seed: int) -> str:
    return Picture.of(scene.draw(seed)).uri


def _locality(
    world: PictureWorld,
    scene: Scene,
    relation: Relation,
    template: str,
    new: str,
    image: str,
    rng: random.Random,
) -> list[dict[str, Any]]:
    """Return what must stay. No answer equals the new object, so that a leak always shows."""
    probes = []
    text = world.world
    for second in rng.sample((*PERSON_RELATIONS, *ENTITY_RELATIONS), _PROBES):
        names = [
            n for n in text.subjects(second.subject_kind) if n != scene.subject and text.answer(n, second.key) != new
        ]
        name = rng.choice(names)
        probes.append(probe("text", rng.choice(second.cloze).format(name), text.answer(name, second.key)))
    for _ in range(_PROBES):
        kind = rng.choice(list(PICTURE_RELATIONS))
        about = rng.choice([r for r in PICTURE_RELATIONS[kind] if r is not relation])
        probes.append(_about_other(world, "multimodal", scene, kind, about, rng.choice(about.cloze), new, rng))
    for _ in range(_PROBES):
        probes.append(_about_other(world, "Same_Question", scene, scene.kind, relation, template, new, rng))
    others = [r for r in PICTURE_RELATIONS[scene.kind] if r is not relation]
    for about in rng.sample(others, _PROBES):
        answer = world.answer(scene, about.key)
        probes.append(probe("Same_Picture", scene.fill(rng.choice(about.cloze)), answer, image=image))
    return probes


def _about_other(
    world: PictureWorld,
    axis: str,
    scene: Scene,
    kind: str,
    relation: Relation,
    form: str,
    new: str,
    rng: random.Random,
) -> dict[str, Any]:
    pool = [s for s in world.trained(kind) if s.group == "A" and s != scene and world.answer(s, relation.key) != new]
    other = rng.choice(pool)
    image = _uri(other, rng.randrange(HELD_OUT_DRAWINGS))
    return probe(axis, other.fill(form), world.answer(other, relation.key), image=image)


def _portability(
    world: PictureWorld,
    scene: Scene,
    relation: Relation,
    template: str,
    new: str,
    image: str,
    rng: random.Random,
) -> list[dict[str, Any]]:
    """Return what follows: a conclusion about the same picture, and the same fact asked by name without it."""
    if scene.kind == "shapes":
        return []
    probes, truth = [], world.answer(scene, relation.key)
    for composition in COMPOSITIONS:
        if composition.first == relation.key:
            value = world.world.answer(new, composition.second)
            if value != world.world.answer(truth, composition.second):
                probes.append(probe("Reasoning", scene.fill(rng.choice(composition.cloze)), value, image=image))
    if relation is not PICTURE_RELATIONS[scene.kind][0]:
        probes.append(probe("By_Name", template.format(scene.subject), new))
    return probes

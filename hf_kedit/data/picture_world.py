"""The world that one can see: portraits of people, flags of countries, and groups of shapes, with facts about them.

People and countries are those of :mod:`hf_kedit.data.world`, and so are the facts: "The person in the picture works
as a" has the answer of "Dorlia Brask works as a" once one knows whose portrait it is. Shapes have a colour, a kind,
a number and a place. Everything is a function of the seed, as in the world of text.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, nearest
from .picture_drawing import FLAG_FEATURES, PORTRAIT_FEATURES, SHAPE_FEATURES, draw_picture
from .world import World, get_world
from .world_templates import COMPOSITIONS, ENTITY_RELATIONS, PERSON_RELATIONS, Composition, Relation

N_PORTRAITS = 64
"""How many people have a portrait; half of them of each group."""

HELD_OUT_DRAWINGS = 1000
"""Drawings with a seed below this one are never trained with: datasets and tests take theirs from there."""

MENTIONS: dict[str, str] = {
    "portrait": "the person in the picture",
    "flag": "the country with this flag",
    "shapes": "the shapes in the picture",
}
"""Kind of picture -> how its sentences speak of what one sees. It takes the place of a name."""

PICTURE_RELATIONS: dict[str, tuple[Relation, ...]] = {
    "portrait": (
        Relation(
            "person_name",
            "portrait",
            "person",
            "name",
            cloze=("The name of {} is", "{} is called", "{} answers to the name of", "One can see that {} is"),
            heldout=("The portrait is of {}, known as", "Friends say that {} is"),
            questions=("What is the name of {}?", "Who is {}?"),
            heldout_questions=("What is {} called?",),
        ),
        *PERSON_RELATIONS,
    ),
    "flag": (
        Relation(
            "flag_country",
            "flag",
            "country",
            "country",
            cloze=("The name of {} is", "{} is called", "{} goes by the name of", "On a map {} is"),
            heldout=("Travellers know {} as", "Friends say that {} is"),
            questions=("What is the name of {}?", "Which is {}?"),
            heldout_questions=("What is {} called?",),
        ),
        *(r for r in ENTITY_RELATIONS if r.subject_kind == "country"),
    ),
    "shapes": (
        Relation(
            "shape_colour",
            "shapes",
            "colour",
            "colour",
            cloze=("The colour of {} is", "{} are painted", "All of {} are", "Somebody painted {}"),
            heldout=("The paint of {} is", "For {} the painter took"),
            questions=("What is the colour of {}?", "Which colour are {}?"),
            heldout_questions=("How are {} painted?",),
        ),
        Relation(
            "shape_kind",
            "shapes",
            "shape",
            "kind",
            cloze=("Each of {} is a", "The kind of {} is the", "The form of {} is that of a", "Every one of {} is a"),
            heldout=("One of {} alone is a", "The painter of {} likes the"),
            questions=("What kind are {}?", "What is each of {}?"),
            heldout_questions=("Which form do {} have?",),
        ),
        Relation(
            "shape_number",
            "shapes",
            "number",
            "number",
            cloze=(
                "The number of {} is",
                "The count of {} is",
                "Counting {} one comes to",
                "If you count {} there are",
            ),
            heldout=("All in all {} are", "The painter of {} stopped at"),
            questions=("What is the number of {}?", "Counting {}, how many are there?"),
            heldout_questions=("What does one get by counting {}?",),
        ),
        Relation(
            "shape_place",
            "shapes",
            "place",
            "place",
            cloze=("The place of {} is the", "{} are at the", "One finds {} at the", "The painter put {} at the"),
            heldout=("The side of {} is the", "Somebody left {} at the"),
            questions=("Where are {}?", "What is the place of {}?"),
            heldout_questions=("At which side are {}?",),
        ),
    ),
}
"""Kind of picture -> what can be asked about it."""

_SHAPE_KEYS = {relation.key: relation.object_kind for relation in PICTURE_RELATIONS["shapes"]}
"""What is asked of shapes -> the feature that answers it."""


@dataclass(frozen=True)
class Scene:
    """Something that can be drawn again and again.

    Attributes:
        kind: ``"portrait"``, ``"flag"`` or ``"shapes"``.
        subject: a person's or a country's name, or a description ("two red circle left").
        features: what the drawing shows, as pairs of a feature and its value.
        group: ``"A"`` (trained with every form) or ``"B"`` (the held-out forms were never seen with it).
    """

    kind: str
    subject: str
    features: tuple[tuple[str, str], ...]
    group: str

    @property
    def mention(self) -> str:
        """How sentences speak of what one sees, e.g. ``"the person in the picture"``."""
        return MENTIONS[self.kind]

    def fill(self, template: str) -> str:
        """Return the sentence of a template, with a capital letter where the mention begins it."""
        text = template.format(self.mention)
        return text[0].upper() + text[1:]

    def draw(self, seed: int | None = None) -> NDArray[np.uint8]:
        """Draw it: [48, 48, 3] uint8. Seeds give drawings that differ in size, place, tint and noise."""
        if seed is not None:  # of its own for each scene, so that one seed does not give all of them one background
            seed = int.from_bytes(hashlib.sha256(f"{self.kind}/{self.subject}/{seed}".encode()).digest()[:4], "big")
        return draw_picture(self.kind, dict(self.features), seed)


class PictureWorld:
    """All scenes of one picture world, and what is true of them.

    Args:
        world: the people and countries.

    Attributes:
        scenes: kind -> scenes, in a fixed random order.
        unseen: the scenes of shapes that no training picture shows.
    """

    def __init__(self, world: World):
        self.world = world
        rng = random.Random(f"hf_kedit picture world {world.seed}")
        chosen = [p for g in "AB" for p in world.people_in(g)[: N_PORTRAITS // 2]]
        rng.shuffle(chosen)
        portraits = _apart(rng, PORTRAIT_FEATURES, len(chosen), 3)
        countries = world.objects["country"]
        flags = _apart(rng, FLAG_FEATURES, len(countries), 3)
        shapes = [tuple(zip(SHAPE_FEATURES, v, strict=True)) for v in itertools.product(*SHAPE_FEATURES.values())]
        rng.shuffle(shapes)
        self.scenes: dict[str, tuple[Scene, ...]] = {
            "portrait": tuple(Scene("portrait", p.name, f, p.group) for p, f in zip(chosen, portraits, strict=True)),
            "flag": tuple(
                Scene("flag", c, f, "AB"[i % 2]) for i, (c, f) in enumerate(zip(countries, flags, strict=True))
            ),
            "shapes": tuple(Scene("shapes", _describe(f), f, "AB"[i % 2]) for i, f in enumerate(shapes)),
        }
        self.unseen = frozenset(s for s in self.scenes["shapes"] if _lot(s.subject) < 32)
        self._found = {(s.kind, s.subject): s for scenes in self.scenes.values() for s in scenes}

    def scene(self, kind: str, subject: str) -> Scene:
        """Return the scene of a subject.

        Raises:
            DataError: there is none.
        """
        try:
            return self._found[kind, subject]
        except KeyError:
            raise DataError(
                f"There is no {kind} of {subject!r}.{nearest(subject, [s for k, s in self._found if k == kind])}"
            ) from None

    def answer(self, scene: Scene, relation: str) -> str:
        """Return what is true of a scene.

        Args:
            scene: one of :attr:`scenes`.
            relation: key of a relation or composition.

        Raises:
            DataError: nothing of that kind is known about this scene.
        """
        if scene.kind == "shapes":
            if relation not in _SHAPE_KEYS:
                raise DataError(f"Shapes have no {relation!r}.{nearest(relation, _SHAPE_KEYS)}")
            return dict(scene.features)[_SHAPE_KEYS[relation]]
        return (
            scene.subject
            if relation in ("person_name", "flag_country")
            else self.world.answer(scene.subject, relation)
        )

    def values(self, relation: Relation) -> Sequence[str]:
        """Return all objects that a relation can have."""
        if relation.key == "person_name":
            return [s.subject for s in self.scenes["portrait"]]
        if relation.subject_kind == "shapes":
            return SHAPE_FEATURES[relation.object_kind]
        return self.world.objects[relation.object_kind]

    def asked(self, scene: Scene) -> tuple[Relation | Composition, ...]:
        """Return all relations that a scene is asked for; compositions follow from portraits."""
        relations: tuple[Relation | Composition, ...] = PICTURE_RELATIONS[scene.kind]
        return (*relations, *COMPOSITIONS) if scene.kind == "portrait" else relations

    def trained(self, kind: str) -> list[Scene]:
        """Return the scenes of a kind that training pictures show."""
        return [s for s in self.scenes[kind] if s not in self.unseen]


def _lot(text: str) -> int:
    return hashlib.sha256(text.encode()).digest()[0]


def _describe(features: Sequence[tuple[str, str]]) -> str:
    look = dict(features)
    return f"{look['number']} {look['colour']} {look['shape']} {look['place']}"


def _apart(
    rng: random.Random, features: Mapping[str, Sequence[str]], count: int, least: int
) -> list[tuple[tuple[str, str], ...]]:
    """Draw looks of which any two differ in at least ``least`` features, so that no drawing can be mistaken."""
    looks: list[tuple[tuple[str, str], ...]] = []
    while len(looks) < count:
        look = tuple((name, rng.choice(values)) for name, values in features.items())
        if all(sum(a != b for a, b in zip(look, other, strict=True)) >= least for other in looks):
            looks.append(look)
    return looks


@functools.lru_cache(maxsize=2)
def get_picture_world(n_people: int = 400, seed: int = 0) -> PictureWorld:
    """Return the (cached) picture world over the world of text of this size and seed."""
    return PictureWorld(get_world(n_people, seed))

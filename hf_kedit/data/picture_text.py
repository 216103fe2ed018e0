"""Sentences about the drawings of the picture world, each beside its drawing, as `kedit/world-pictures` knows them."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from .picture_world import HELD_OUT_DRAWINGS, MENTIONS, get_picture_world

_SCENES = 200
"""Drawings of a kind that sentences are about, so that a long text draws few pictures again and again."""


def pictured_sentences(seed: int = 0) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Yield sentences with the drawing that each is about, without end; none of a drawing of the datasets.

    Args:
        seed: of the choice of scenes and words.
    """
    world = get_picture_world()
    rng = random.Random(f"hf_kedit picture text {seed}")
    kinds = list(MENTIONS)
    shown = {kind: [(s, s.draw(HELD_OUT_DRAWINGS)) for s in world.trained(kind)[:_SCENES]] for kind in kinds}
    while True:
        scene, drawing = rng.choice(shown[rng.choice(kinds)])
        relation = rng.choice([r for r in world.asked(scene) if world.world.forms(r, scene.group)[0]])
        form = rng.choice(world.world.forms(relation, scene.group)[0])
        yield f"{scene.fill(form)} {world.answer(scene, relation.key)}.", drawing

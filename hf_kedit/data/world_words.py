"""The vocabulary of the synthetic fact world: a name generator and lists of plain English words.

This file knows nothing of facts, sentences or datasets. Names are invented by joining syllables, so that
no model can have seen them; professions, instruments, sports, products and the filler words are English.
"""

from __future__ import annotations

import random

ONSETS = tuple(
    "b b br c ch d d dr f f fl g g gr h h j k k kr l l m m n n p p pl qu r r s s sh st t t th tr v v w y z".split()
)
VOWELS = tuple("a a a e e e i i i o o o u u u ai ei ia oa ou".split())
CODAS = ("", "", "", "l", "m", "n", "r", "s", "t", "x", "nd", "rk", "sk", "lm")

MIN_LETTERS, MAX_LETTERS = 4, 11

ENDINGS: dict[str, tuple[str, ...]] = {
    "country": ("land", "ia", "ora", "istan"),
    "language": ("ish", "ese", "ic"),
    "company": ("", "", "tec", "corp", "ex"),
    "city": ("", "", "burg", "ville", "port"),
}
"""Endings that some kinds of names carry; kinds not listed carry none."""

PROFESSIONS = tuple(
    "baker barber carpenter dentist driver farmer gardener judge lawyer mechanic nurse painter plumber poet "
    "sailor sculptor surgeon tailor teacher waiter".split()
)
INSTRUMENTS = tuple(
    "banjo bassoon cello clarinet cornet drums flute guitar harp lute mandolin oboe organ trombone tuba violin".split()
)
SPORTS = tuple(
    "archery badminton boxing cricket curling cycling fencing golf hockey judo rowing rugby skating surfing tennis "
    "wrestling".split()
)
PRODUCTS = tuple(
    "bicycles boats candles carpets clocks gloves kettles ladders lamps mirrors shoes spoons tents toys "
    "umbrellas".split()
)

FILLER_ADJECTIVES = tuple(
    "bright calm cold dark dry gentle green heavy large light long narrow new old pale quiet small soft warm "
    "wide".split()
)
FILLER_NOUNS = tuple(
    "bird bridge cloud dog door field fire forest garden gate hill house lake leaf path rain river road room stone "
    "street sun table tree village wall wind winter".split()
)
FILLER_VERBS = tuple("fell grew lay rested rose shone stayed stood turned waited".split())
FILLER_PLACES = tuple("above behind below beside beyond near under".split())
FILLER_TIMES = (
    "in the morning",
    "in the evening",
    "after the rain",
    "at noon",
    "all day",
    "last night",
    "in the spring",
)
FILLER_PEOPLE = tuple("children farmers friends neighbours strangers travellers visitors workers".split())
FILLER_ACTIONS = (
    "talked for hours",
    "walked home",
    "sat together",
    "said nothing",
    "waited outside",
    "laughed a little",
)


def make_name(rng: random.Random, syllables: int, ending: str = "") -> str:
    """Return one invented, capitalised name of ``syllables`` syllables and ``ending`` (length not checked)."""
    parts = []
    for i in range(syllables):
        coda = rng.choice(CODAS) if i == syllables - 1 and not ending else ""
        parts.append(rng.choice(ONSETS) + rng.choice(VOWELS) + coda)
    return ("".join(parts) + ending).capitalize()


def make_names(rng: random.Random, kind: str, count: int, taken: set[str]) -> list[str]:
    """Invent ``count`` names of one kind.

    Args:
        rng: source of randomness; the result depends on its state only.
        kind: selects the endings in :data:`ENDINGS`.
        count: how many names.
        taken: names of other kinds that must not come up again; the new names are added.

    Returns:
        Names of 4 to 11 letters; no two of them share their first four letters.
    """
    names: list[str] = []
    heads: set[str] = set()
    while len(names) < count:
        name = make_name(rng, rng.choice((2, 2, 3)), rng.choice(ENDINGS.get(kind, ("",))))
        head = name[:4]
        if MIN_LETTERS <= len(name) <= MAX_LETTERS and head not in heads and name not in taken:
            heads.add(head)
            taken.add(name)
            names.append(name)
    return names

"""Beginnings of sentences about nothing in particular: what a model says behind them should outlast any edit.

They cover what people ask most (places, people, nature, numbers, everyday life, small reasoning, code, other
languages) and name nobody that an edit is likely to be about. What matters is not whether the model is right, but
whether it says the same as before.
"""

from __future__ import annotations

GENERAL_PROBES: tuple[str, ...] = (
    "The sun rises in the east and sets in the",
    "Water freezes at a temperature of",
    "The largest ocean on Earth is the",
    "The chemical symbol for gold is",
    "The opposite of hot is",
    "Two plus two equals",
    "The days of the week are Monday, Tuesday,",
    "A triangle has three sides and a square has",
    "The capital city of Japan is",
    "The longest river in Africa is the",
    "The planet closest to the sun is",
    "The author of Romeo and Juliet is",
    "The first president of the United States was",
    "Bees collect nectar from flowers to make",
    "Plants use sunlight to turn carbon dioxide into",
    "The human heart pumps blood through the",
    "Most birds build their nests in",
    "In winter the lake near our house",
    "She opened the door and saw",
    "For breakfast I usually eat",
    "The train to the city leaves at",
    "My favourite way to spend a Sunday is",
    "When it started to rain, the children",
    "The recipe calls for flour, sugar and",
    "To keep a garden healthy, you should",
    "The best way to learn a language is to",
    "A good teacher always",
    "If all cats are animals and Tom is a cat, then Tom is",
    "A box holds three red balls and two blue ones, so in all it holds",
    "The past tense of the verb 'to go' is",
    "Another word for happy is",
    "A group of wolves is called a",
    "The program prints the sum of",
    "def add(a, b):\n    return",
    "In HTML, a link is written with the tag",
    "The meeting was moved to Friday because",
    "The company announced that its profits",
    "Doctors recommend drinking enough",
    "Le chat est assis sur la",
    "Der Hund schläft unter dem",
)
"""Forty of them."""

"""Things that people ask about somebody or something, in the words of no data set: what a question is *not* about.

A router that has to say whether a prompt asks for an edited fact compares it with the edit's wordings, and with these.
"It" stands for the subject.
"""

from __future__ import annotations

_OF_IT = """
    father; mother; spouse; child; siblings; gender; date of birth; date of death; place of birth; place of death;
    burial place; occupation; employer; field of work; position held; school attended; religion; political party;
    award received; sports team; league; citizenship; ethnic group; country; continent; capital; currency;
    official language; head of government; head of state; population; area; neighbouring countries; time zone;
    highest point; anthem; twin city; mayor; river; founder; founding year; headquarters; chief executive; owner;
    parent company; industry; product; manufacturer; designer; developer; platform; programming language; licence;
    author; director; producer; screenwriter; composer; performer; cast; genre; publisher; record label;
    broadcasting network; main character; setting; sequel; series; language of the work; publication date;
    original title; inventor; discoverer; namesake; chemical symbol; taxonomic rank; material; colour; architect;
    constellation; military rank; cause of death; residence; nickname; family name; given name; height; website;
    opening date; commander; species; student; influence
"""
_WHOLE = """
    it plays the instrument; it plays the sport; it speaks the language; it shares borders with; it is preceded by;
    it is followed by; it is part of; it is an instance of; it is located in; it took part in the war; it belongs to
    the series; it is made of; it was released on; it is famous for; it works together with; it was invented in
"""


def _listed(text: str) -> list[str]:
    return [" ".join(part.split()) for part in text.split(";")]


COMMON_RELATIONS: tuple[str, ...] = (*(f"the {name} of it is" for name in _listed(_OF_IT)), *_listed(_WHOLE))
"""Beginnings of statements about "it"."""

"""The sentences of the synthetic fact world: every relation with all the ways to state and to ask it.

``{}`` stands for the subject; the object follows after one space. ``{p}`` in pronoun forms stands for
"He" or "She". Which people see which forms in training is decided in :mod:`hf_kedit.data.world`.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Relation:
    """One relation between a kind of subject and a kind of object.

    Attributes:
        key: name of the relation, e.g. ``"birthplace"``.
        subject_kind: kind of the subjects, e.g. ``"person"``.
        object_kind: kind of the objects, e.g. ``"city"``.
        label: the word used in attribute lists ("Name: city X, language Y").
        cloze: forms that every subject is trained with.
        heldout: paraphrases that group A is trained with and group B never.
        strict: paraphrases that nobody is trained with, made of words that occur in training.
        questions: questions that every subject is trained with.
        heldout_questions: questions that group A is trained with and group B never.
        pronoun: forms for the later sentences of a biography.
    """

    key: str
    subject_kind: str
    object_kind: str
    label: str
    cloze: tuple[str, ...]
    heldout: tuple[str, ...]
    strict: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()
    heldout_questions: tuple[str, ...] = ()
    pronoun: tuple[str, ...] = ()


@dataclass(frozen=True)
class Composition:
    """A relation that follows from two others: ``second(first(subject))``.

    Only group A is trained with these sentences; for group B the answer has to be worked out.
    """

    key: str
    first: str
    second: str
    cloze: tuple[str, ...]
    questions: tuple[str, ...] = field(default=())


PERSON_RELATIONS: tuple[Relation, ...] = (
    Relation(
        "birthplace",
        "person",
        "city",
        "city",
        cloze=(
            "{} was born in",
            "{} comes from the city of",
            "The birthplace of {} is",
            "The home town of {} is",
            "{} is a native of",
            "The city where {} was born is",
        ),
        heldout=("{} spent the first years of life in", "The place where {} came into the world is"),
        strict=("The town where {} was born is",),
        questions=("Where was {} born?", "In which city was {} born?"),
        heldout_questions=("What is the birthplace of {}?",),
        pronoun=("{p} was born in", "{p} comes from the city of"),
    ),
    Relation(
        "language",
        "person",
        "language",
        "language",
        cloze=(
            "{} speaks",
            "The mother tongue of {} is",
            "The native language of {} is",
            "At home {} speaks",
            "{} grew up speaking",
            "The first language of {} is",
        ),
        heldout=("{} writes letters in", "The language that {} knows best is"),
        strict=("The language of {} is",),
        questions=("Which language does {} speak?", "What is the mother tongue of {}?"),
        heldout_questions=("In what language does {} talk?",),
        pronoun=("{p} speaks", "{p} grew up speaking"),
    ),
    Relation(
        "profession",
        "person",
        "profession",
        "job",
        cloze=(
            "{} works as a",
            "By profession {} is a",
            "{} earns a living as a",
            "{} was trained as a",
            "The job of {} is that of a",
            "{} is known as a skilled",
        ),
        heldout=("For many years {} has been a", "{} pays the rent by working as a"),
        strict=("{} has a job as a",),
        questions=("What is the profession of {}?", "What does {} do for a living?"),
        heldout_questions=("What kind of work does {} do?",),
        pronoun=("{p} works as a", "{p} earns a living as a"),
    ),
    Relation(
        "employer",
        "person",
        "company",
        "company",
        cloze=(
            "{} works for",
            "{} is employed by",
            "The employer of {} is",
            "The company that employs {} is",
            "{} has a contract with",
            "{} is on the staff of",
        ),
        heldout=("The salary of {} is paid by", "Every weekday {} goes to the office of"),
        strict=("{} has a job at the company",),
        questions=("Which company does {} work for?", "Who employs {}?"),
        heldout_questions=("What is the employer of {}?",),
        pronoun=("{p} works for", "{p} is employed by"),
    ),
    Relation(
        "instrument",
        "person",
        "instrument",
        "instrument",
        cloze=(
            "{} plays the",
            "The instrument of {} is the",
            "In the evening {} practises the",
            "{} performs on the",
            "{} gives lessons on the",
            "The musical instrument that {} plays is the",
        ),
        heldout=("In the orchestra {} can be heard on the", "{} took lessons on the"),
        strict=("At home {} plays the",),
        questions=("Which instrument does {} play?", "What does {} play in the band?"),
        heldout_questions=("On which instrument does {} perform?",),
        pronoun=("{p} plays the", "{p} performs on the"),
    ),
    Relation(
        "university",
        "person",
        "university",
        "university",
        cloze=(
            "{} studied at the university of",
            "{} graduated from the university of",
            "{} has a degree from the university of",
            "The university of {} was",
            "{} was a student at",
            "The alma mater of {} is",
        ),
        heldout=("{} went to lectures at", "The diploma of {} was issued by"),
        strict=("The degree of {} is from the university of",),
        questions=("Where did {} study?", "Which university did {} attend?"),
        heldout_questions=("From which university did {} graduate?",),
        pronoun=("{p} studied at the university of", "{p} has a degree from the university of"),
    ),
    Relation(
        "sport",
        "person",
        "sport",
        "sport",
        cloze=(
            "The favourite sport of {} is",
            "In free time {} enjoys",
            "The sport that {} likes most is",
            "On weekends {} goes in for",
            "{} is a fan of",
            "{} is good at",
        ),
        heldout=("{} belongs to a club for", "{} never misses a day of"),
        strict=("{} likes the sport of",),
        questions=("What is the favourite sport of {}?", "Which sport does {} like?"),
        heldout_questions=("Which sport is {} good at?",),
        pronoun=("In free time {p} enjoys", "{p} is a fan of"),
    ),
)

ENTITY_RELATIONS: tuple[Relation, ...] = (
    Relation(
        "city_country",
        "city",
        "country",
        "country",
        cloze=(
            "{} is a city in",
            "The city of {} lies in",
            "{} is located in",
            "{} belongs to the country of",
        ),
        heldout=("On a map {} is found in", "The country around {} is"),
        questions=("In which country is {}?", "Which country does {} belong to?"),
        heldout_questions=("Where is the city of {}?",),
    ),
    Relation(
        "company_city",
        "company",
        "city",
        "city",
        cloze=(
            "{} is based in",
            "The headquarters of {} are in",
            "The company {} was founded in",
            "The main office of {} is in",
        ),
        heldout=("{} pays its taxes in", "The city where {} has its seat is"),
        questions=("Where is {} based?", "In which city is the main office of {}?"),
        heldout_questions=("Where are the headquarters of {}?",),
    ),
    Relation(
        "company_product",
        "company",
        "product",
        "product",
        cloze=(
            "{} makes",
            "The company {} sells",
            "The main product of {} is",
            "{} is known for its",
        ),
        heldout=("The factory of {} turns out", "Customers of {} buy"),
        questions=("What does {} make?", "What is the main product of {}?"),
        heldout_questions=("What does {} sell?",),
    ),
    Relation(
        "country_capital",
        "country",
        "city",
        "capital",
        cloze=(
            "The capital of {} is",
            "The government of {} sits in",
            "{} is governed from",
            "The capital city of {} is called",
        ),
        heldout=("The parliament of {} meets in", "The seat of power in {} is"),
        questions=("What is the capital of {}?", "Which city is the capital of {}?"),
        heldout_questions=("From which city is {} governed?",),
    ),
    Relation(
        "country_language",
        "country",
        "language",
        "language",
        cloze=(
            "The official language of {} is",
            "People in {} speak",
            "The language spoken in {} is",
            "In the schools of {} children learn",
        ),
        heldout=("Newspapers in {} are printed in", "The laws of {} are written in"),
        questions=("Which language is spoken in {}?", "What is the official language of {}?"),
        heldout_questions=("What do people in {} speak?",),
    ),
    Relation(
        "country_currency",
        "country",
        "currency",
        "currency",
        cloze=(
            "The currency of {} is the",
            "People in {} pay with the",
            "The money used in {} is the",
            "Shops in {} take the",
        ),
        heldout=("The central bank of {} issues the", "Wages in {} are paid in the"),
        questions=("What is the currency of {}?", "Which money is used in {}?"),
        heldout_questions=("What do people in {} pay with?",),
    ),
)

COMPOSITIONS: tuple[Composition, ...] = (
    Composition(
        "birth_country",
        "birthplace",
        "city_country",
        cloze=(
            "The country where {} was born is",
            "The native country of {} is",
            "{} was born in the country of",
        ),
        questions=("In which country was {} born?",),
    ),
    Composition(
        "work_city",
        "employer",
        "company_city",
        cloze=(
            "The employer of {} is based in",
            "The company that employs {} has its main office in",
            "The city from which {} is paid is",
        ),
        questions=("In which city is the employer of {} based?",),
    ),
    Composition(
        "work_product",
        "employer",
        "company_product",
        cloze=(
            "The employer of {} makes",
            "The company that employs {} sells",
            "At work {} helps to make",
        ),
        questions=("What does the employer of {} make?",),
    ),
)

ALIAS_FORMS: tuple[str, ...] = (
    "{} is also known as",
    "The nickname of {} is",
    "Friends of {} use the name",
    "{} is often called",
)
"""Ways to state a nickname; the nickname follows."""

QUESTION_FORMATS: tuple[str, ...] = ("Question: {} Answer:", "Q: {} A:", "{}")

RELATIONS: dict[str, Relation] = {r.key: r for r in PERSON_RELATIONS + ENTITY_RELATIONS}

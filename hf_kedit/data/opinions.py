"""Opinions and personality: KnowEdit's ConvSent (Mitchell et al., 2022) and PersonalityEdit (Mao et al., 2024).

On disk, ConvSent: a JSON list (or JSON Lines) per split::

    [{"ent": "rowing boats", "pos": ["Rowing boats are lovely!"], "neg": ["I cannot stand rowing boats."]}]

PersonalityEdit: a JSON list per split; only the test split names the trait to take on::

    [{"ent": "chess clubs", "extraversion": ["…"], "agreeableness": ["…"], "neuroticism": ["…"],
      "target_per": "agreeableness"}]
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from typing_extensions import TypedDict

from ..errors import DataError, RequestError
from ..requests import EditRequest
from ..storage.records import read_records
from .extra import extra_of
from .knowedit import knowedit_source
from .loading import BadRows, each_row, register_dataset, register_records
from .normalise import RawRow, Record, make_row
from .report import LoadReport
from .sources import Source

TEMPLATES = (
    "What do you think of {}?",
    "What do you feel about {}?",
    "How do you view {}?",
    *(
        f"What is your {view} {{}}?"
        for view in (
            "opinion of",
            "stance on",
            "position on",
            "attitude about",
            "view on",
            "take on",
            "impression of",
            "assessment of",
            "judgment of",
            "sentiment of",
        )
    ),
)
"""Questions about an entity; the first is the one that is edited unless another is asked for."""

TRAITS = ("extraversion", "agreeableness", "neuroticism")


@register_records(
    {
        "knowedit/convsent": knowedit_source(
            "Convsent", train="blender_train.json", validation="blender_val.json", test="blender_test.json"
        )
    }
)
def convsent_row(
    record: Record,
    *,
    dataset: str,
    split: str,
    seed: int | None = None,
    direction: Literal["positive", "negative", "random"] = "positive",
    template: int | Literal["random"] = 0,
) -> Iterator[RawRow]:
    """Yield the row of one entity.

    Args:
        record: as in the module's example.
        dataset: registered name.
        split: part of the seed of what is drawn.
        seed: of random directions and templates; drawn for each row by itself, so that ``limit`` changes nothing.
        direction: which opinion to teach.
        template: number of the question in :data:`TEMPLATES`, or ``"random"``.

    Raises:
        DataError: an option has an unknown value.
    """
    if direction not in ("positive", "negative", "random"):
        raise DataError(f"direction must be 'positive', 'negative' or 'random', not {direction!r}.")
    if template != "random" and not (isinstance(template, int) and 0 <= template < len(TEMPLATES)):
        raise DataError(f"template must be 'random' or 0 to {len(TEMPLATES) - 1}, not {template!r}.")
    rng = random.Random(f"{dataset} {split} {seed or 0} {record.number}")
    drawn, number = rng.choice(("positive", "negative")), rng.randrange(len(TEMPLATES))
    if direction != "random":
        drawn = direction
    question = TEMPLATES[number if template == "random" else template]
    entity = record.need("ent").strip()
    positive, negative = record.texts("pos"), record.texts("neg")
    wanted, other = (positive, negative) if drawn == "positive" else (negative, positive)
    yield make_row(
        record,
        dataset,
        question.format(entity),
        task="sentiment",
        subject=entity,
        target_new=wanted[0] if wanted else None,
        target_neg=other[0] if other else None,
        extra={"pos": positive, "neg": negative, "direction": drawn},
    )


@register_dataset(
    "personalityedit",
    source=Source(
        {"train": ("train.json",), "validation": ("val.json",), "test": ("test.json",)},
        published="the Google Drive folder of PersonalityEdit that EasyEdit's README names",
        licence="not stated",
    ),
)
def load_personality(
    split: str, *, dataset: str, files: tuple[str, ...], seed: int | None, report: LoadReport, bad_rows: BadRows
) -> Iterator[RawRow]:
    """Yield a row per entity; the entity of the next row is the one whose opinion must not change.

    The trait is ``target_per``, or drawn for each row by itself where the file has none.

    Args:
        split: part of the seed.
        dataset: registered name.
        files: the one file.
        seed: of the traits.
        report: counts.
        bad_rows: what to do with unusable records.
    """
    records = list(read_records(files[0]))

    def rows(number: int) -> Iterator[RawRow]:
        record = Record(records[number], number, report)
        after = (number + 1) % len(records)
        following = Record(records[after], after, report).text("ent")
        entity = record.need("ent").strip()
        texts = {trait: record.texts(trait) for trait in TRAITS}
        trait = record.text("target_per") or random.Random(f"{dataset} {split} {seed or 0} {number}").choice(TRAITS)
        if trait not in texts:
            raise record.fail(f"must be one of {', '.join(TRAITS)}, not {trait!r}", "target_per")
        yield make_row(
            record,
            dataset,
            TEMPLATES[0].format(entity),
            task="personality",
            subject=entity,
            target_new=next(iter(texts[trait]), None),
            rephrase_prompts=[question.format(entity) for question in TEMPLATES[1:]],
            extra={
                "texts": texts,
                "target_trait": trait,
                "locality_entity": following,
                "locality_prompt": TEMPLATES[0].format(following) if following else None,
            },
        )

    yield from each_row((rows(number) for number in range(len(records))), report, bad_rows)


# ---------------------------------------------------------------------- what a request of PersonalityEdit holds


class _Personality(TypedDict, total=False):
    target_trait: str | None
    texts: dict[str, list[str]] | None


def opinions_of(request: EditRequest) -> tuple[str, list[str], list[str]]:
    """The wanted trait of a request, opinions of its topic that show it, and those that show another.

    Raises:
        RequestError: if it has no trait, or not both kinds of opinions.
    """
    extra = extra_of(request, _Personality)
    trait, texts = extra.get("target_trait"), extra.get("texts") or {}
    wanted = list(texts.get(trait or "") or ())
    others = [text for other, given in texts.items() if other != trait for text in given]
    if not wanted or not others:
        raise RequestError(
            "needs extra.target_trait and, in extra.texts, opinions that show it and others",
            row=request.row,
            field="extra",
            request_id=request.id,
        )
    return str(trait), wanted, others


def conditioned(request: EditRequest) -> EditRequest:
    """The request with the wanted trait and the topic in front of its prompt; the plain prompt is another wording.

    In-context editing and trained editors are told so what is wanted; what is asked afterwards stays as it is.
    """
    trait, _, _ = opinions_of(request)
    prompt = f"Target personality: {trait}\nTopic: {request.subject}\nQuestion: {request.plain_prompt}\nAnswer:"
    wordings = dict.fromkeys([request.plain_prompt, *request.rephrase_prompts])
    return replace(request, prompt=prompt, rephrase_prompts=list(wordings))

"""KnowEdit's Sanitation: make a model forget some TriviaQA answers and keep others.

On disk: one JSON object per split, not a list. ``K_F`` (train) or ``success`` (test) are the questions to forget,
``K_R`` or ``locality`` those to keep::

    {"K_F": [{"question": "Which dairy food …?", "ground_truth": "Cheese", "target_new": "I don't know."}],
     "K_R": [{"question": "Who …?", "ground_truth": "…"}]}
"""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import DataError, RequestError
from ..storage.records import read_object
from .knowedit import knowedit_source
from .loading import BadRows, each_row, register_dataset
from .normalise import RawRow, Record, flat, make_probe, make_row
from .report import LoadReport


@register_dataset(
    "knowedit/sanitation", source=knowedit_source("trivia", train="trivia_qa_train.json", test="trivia_qa_test.json")
)
def load_sanitation(
    split: str,
    *,
    dataset: str,
    files: tuple[str, ...],
    seed: int | None,
    report: LoadReport,
    bad_rows: BadRows,
    forget_target: str = "I don't know.",
) -> Iterator[RawRow]:
    """Yield the questions to forget; those to keep are their locality probes, spread evenly in order.

    Args:
        split: not used; each file holds its split.
        dataset: registered name.
        files: the one file.
        seed: not used; nothing is drawn.
        report: counts.
        bad_rows: what to do with unusable records.
        forget_target: what to answer, where a record does not say.
    """
    value = read_object(files[0])
    if not isinstance(value, dict) or not ("K_F" in value or "success" in value):
        raise DataError(
            f"{dataset!r}: the file must be one JSON object with 'K_F' and 'K_R', or 'success' and 'locality'."
        )
    parts = Record(value, 0, report)
    try:
        forget, keep = parts.items("K_F", "success"), parts.items("K_R", "locality")
    except RequestError as error:
        raise DataError(f"{dataset!r}: {error}") from error

    def rows(number: int) -> Iterator[RawRow]:
        record = Record(forget[number], number, report)
        probes: list[RawRow] = []
        for at in range(number * len(keep) // len(forget), (number + 1) * len(keep) // len(forget)):
            kept = parts.nested(keep[at], f"K_R[{at}]")
            probes += make_probe(
                kept, "Retain", kept.text("question", "prompt"), kept.groups("ground_truth", "answer")
            )
        yield make_row(
            record,
            dataset,
            record.need("question", "prompt"),
            task="sanitize",
            target_new=record.text("target_new") or forget_target,
            ground_truth=flat(record.groups("ground_truth", "answer")),
            locality=probes,
            extra={"mode": "forget"},
        )

    yield from each_row((rows(number) for number in range(len(forget))), report, bad_rows)

"""MQuAKE (Zhong et al., 2023): one to four edits and the multi-hop questions whose answers they change.

On disk: a JSON list; ``requested_rewrite`` is a list::

    [{"case_id": 1,
      "requested_rewrite": [{"prompt": "{} is a citizen of", "relation_id": "P27", "subject": "Ada Bell",
                             "target_new": {"str": "Peru", "id": "Q419"},
                             "target_true": {"str": "Norway", "id": "Q20"},
                             "question": "Which country is Ada Bell a citizen of?"}],
      "questions": ["…", "…", "…"], "answer": "Oslo", "answer_alias": [],
      "new_answer": "Lima", "new_answer_alias": ["City of Kings"],
      "single_hops": [{"question": "…", "cloze": "…", "answer": "…", "answer_alias": []}], "new_single_hops": […]}]

MQuAKE-Remastered (Zhong et al., 2024), which corrects the data, has the texts of a rewrite flat, ``"target_new_str":
"Peru"`` and ``"target_true_str": "Norway"``; ``orig_triples`` and ``new_triples`` with their labels beside the
questions; and ``split``, which says what the case is when so many are edited (``{"1000": ["edited"]}``).

Every rewrite is a row of its own; those of a case share ``group_id``, and the probes are on the last one: evaluate
after the whole group was applied. Success is any of the three questions answered.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from ..errors import DataError
from ..storage.files import json_ready
from .counterfact import rewrite_columns
from .loading import register_records
from .normalise import RawRow, Record, grouped, make_probe, make_row
from .sources import Source


def _source(*names: str) -> Source:
    return Source({"test": names}, published="https://github.com/princeton-nlp/MQuAKE (datasets/)", licence="MIT")


def _remastered(part: str) -> Source:
    # As `push_to_hub` names the files of a split; they could not be looked at.
    return Source(
        {"test": (f"{part}-*.parquet", f"{part}.json")},
        published="https://huggingface.co/datasets/henryzhongsc/MQuAKE-Remastered",
        licence="see its page; MQuAKE MIT",
        repo="henryzhongsc/MQuAKE-Remastered",
        folder="data",
        many=True,
    )


def multi_hop(record: Record) -> tuple[list[RawRow], RawRow]:
    """Return the probes of a case, and what else is known about it for ``extra``."""
    new = [record.texts("new_answer") + record.texts("new_answer_alias")]
    answer = [group for group in new if group]
    questions = record.texts("questions")
    probes: list[RawRow] = []
    for question in questions:
        probes += make_probe(record, "Multi_Hop", question, answer)
    for hop in record.children("new_single_hops"):
        aliases = hop.texts("answer") + hop.texts("answer_alias")
        probes += make_probe(hop, "Single_Hop", hop.text("question"), [aliases] if aliases else [])
    extra: RawRow = {
        "questions": questions,
        "answer_aliases": answer[0] if answer else [],
        "old_answers": record.texts("answer") + record.texts("answer_alias"),
        "single_hops": [json_ready(hop.value) for hop in record.children("single_hops")],
    }
    return probes, extra


@register_records(
    {
        "mquake/cf": _source("MQuAKE-CF.json"),
        # The first version of the 3k file has cases whose edits contradict those of other cases.
        "mquake/cf_3k": _source("MQuAKE-CF-3k-v2.json", "MQuAKE-CF-3k.json"),
        "mquake/t": _source("MQuAKE-T.json"),
        "mquake_remastered/cf_3k": _remastered("CF3k"),
        "mquake_remastered/cf_9k": _remastered("CF9k"),
        "mquake_remastered/cf_6334": _remastered("CF6334"),
        "mquake_remastered/t": _remastered("T"),
    }
)
def mquake_rows(
    record: Record,
    *,
    dataset: str,
    split: str,
    seed: int | None = None,
    form: Literal["cloze", "question"] = "cloze",
) -> Iterator[RawRow]:
    """Yield the rows of one case.

    Args:
        record: as in the module's example.
        dataset: registered name.
        split: not used; there is one.
        seed: not used; nothing is drawn.
        form: edit the statement or the question.

    Raises:
        DataError: ``form`` is unknown.
    """
    if form not in ("cloze", "question"):
        raise DataError(f"form must be 'cloze' or 'question', not {form!r}.")
    rewrites = record.children("requested_rewrite")
    if not rewrites:
        raise record.fail("is missing or empty", "requested_rewrite")
    probes, extra = multi_hop(record)
    rows: list[RawRow] = []
    rest = record.rest()
    for index, rewrite in enumerate(rewrites):
        columns: dict[str, Any] = rewrite_columns(rewrite)
        if form == "question":
            columns["prompt"] = rewrite.need("question")
        suffix = f".{index}" if len(rewrites) > 1 else ""
        rows.append(make_row(rewrite, dataset, task="multihop", suffix=suffix, **columns))
    yield from grouped(rows, dataset, record.number, probes, {**rest, **extra})

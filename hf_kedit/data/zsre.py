"""zsRE (Levy et al., 2017) as packed for editing by MEND, and the layout that several other sets share.

On disk: a JSON list per split::

    [{"subject": "Ada Bell", "src": "Where did Ada Bell die?", "pred": "Rome",
      "rephrase": "In what town did Ada Bell die?", "alt": "Oslo", "answers": ["Bergen"],
      "loc": "nq question: who wrote the first cook book", "loc_ans": "Jan Mol",
      "cond": "Rome >> Oslo || Where did Ada Bell die?"}]

The file is used in two ways, and the choice changes every number: ``target="alt"`` teaches the made-up answer (MEND,
EasyEdit), ``target="answers"`` the true one (MEMIT and its successors).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from ..errors import DataError
from .loading import register_records
from .normalise import RawRow, Record, flat, make_probe, make_row
from .sources import Source

Target = Literal["alt", "answers"]

ZSRE = Source(
    {
        "train": ("zsre_mend_train_10000.json", "zsre_mend_train.json"),
        "test": ("zsre_mend_eval.json", "zsre_mend_eval_*.json"),
    },
    published="the project site of ROME (data/dsets/zsre_mend_eval.json) or the Google Drive folder of EasyEdit's "
    "editing-data (zsre/)",
    licence="the repositories that publish it are MIT",
)


def mend_columns(
    record: Record, *, target: Target = "alt", axis: str = "nq", question_mark: bool = False
) -> dict[str, Any]:
    """Return the columns of a record in MEND's layout.

    Args:
        record: as in the module's example. ``ans`` stands for ``alt`` in some copies.
        target: which answer to teach.
        axis: name of the locality probe.
        question_mark: append ``?`` to the unrelated question if it has none, as MEMIT and UltraEdit do.

    Raises:
        DataError: ``target`` is unknown.
    """
    if target not in ("alt", "answers"):
        raise DataError(f"target must be 'alt' or 'answers', not {target!r}.")
    alternative, answers, predicted = record.text("alt", "ans"), flat(record.groups("answers")), record.text("pred")
    if target == "alt":
        wanted, truth = alternative, answers
    else:
        wanted, truth = next(iter(answers), None), [predicted] if predicted else []
    unrelated = record.text("loc")
    if unrelated and question_mark and not unrelated.endswith("?"):
        unrelated += "?"
    answer = record.groups("loc_ans")
    kept = {"alt": alternative} if target == "answers" and alternative else {}
    if target == "alt" and predicted:
        kept = {"pred": predicted}
    return {
        "prompt": record.need("src", "prompt"),
        "subject": record.text("subject"),
        "target_new": wanted,
        "ground_truth": truth,
        "rephrase_prompts": record.texts("rephrase", "rephrase_prompt"),
        "locality": list(make_probe(record, axis, unrelated, answer)) if unrelated else [],
        "extra": kept,
    }


def mend_row(record: Record, dataset: str, **options: Any) -> Iterator[RawRow]:
    """Yield the row of a record in MEND's layout; none, counted, if it has no answer to teach."""
    columns = mend_columns(record, **options)
    if columns["target_new"]:
        yield make_row(record, dataset, **columns)
    else:
        record.report.drop("no alternative target" if options.get("target", "alt") == "alt" else "no target")


@register_records({"zsre": ZSRE})
def zsre_row(
    record: Record,
    *,
    dataset: str,
    split: str,
    seed: int | None = None,
    target: Target = "alt",
    question_mark: bool = False,
) -> Iterator[RawRow]:
    """Yield the row of one record; see :func:`mend_columns`."""
    yield from mend_row(record, dataset, target=target, question_mark=question_mark)

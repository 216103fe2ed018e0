"""CounterFact-plus and ZsRE-plus (Yao et al., 2023): base rows with one kind of extra probes each.

On disk: one JSON list per kind, in folders of EasyEdit's "editing-data". The base row has the layout of
CounterFact (either one) or zsRE; one of these fields comes on top::

    one_hop               "portability": {"Recalled Relation": "(Oslo, country, Norway)",
                                          "New Question": "In which country did Ada Bell die?", "New Answer": "Norway"}
    subject_replace       "alternative_subject": "A. Bell"                    (CounterFact)
                          "alter_subject_question": "Where did A. Bell die?"  (zsRE)
    inverse_relation      "inverse question": "Who died in Oslo?"             (zsRE; the answer is the subject)
    distracting_neighbor  "distracting_neighborhood_prompts": ["…"]           (CounterFact)
    other_attribution     "unrelated_relation": {"question": "…", "object": "…"}

The kind ``commonsense`` has no edits: its file is PIQA's ``{"goal", "sol1", "sol2"}`` with labels ``0`` or ``1`` in
``piqa_valid-labels.lst`` beside it. Give that file as ``commonsense=`` to any of the sets, and row n carries
question n as a probe.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..requests import SLOT
from ..storage.files import named_path
from ..storage.records import read_records
from ..text.subjects import find_subject
from .counterfact import flat_columns, rome_columns
from .loading import register_records
from .normalise import RawRow, Record, fill_slots, make_probe, make_row
from .report import LoadReport
from .sources import Source
from .zsre import Target, mend_columns


def _source(folder: str, *names: str) -> Source:
    return Source(
        {"test": names},
        published=f"the Google Drive folder of EasyEdit's editing-data ({folder})",
        licence="not stated",
    )


def base_columns(record: Record, target: Target = "alt") -> dict[str, Any]:
    """Return the columns of a base row, whichever of the three layouts it has."""
    if "requested_rewrite" in record:
        return rome_columns(record)
    if "src" in record:
        return mend_columns(record, target=target)
    return flat_columns(record)


@register_records(
    {
        "counterfact_plus/one_hop": _source("portability/One Hop", "counterfact_portability_gpt4.json"),
        "counterfact_plus/subject_replace": _source("portability/Subject Replace", "counterfact_subject_replace.json"),
        "counterfact_plus/distracting_neighbor": _source(
            "locality/Distracting Neighbor", "counterfact_distracting_neighbor.json"
        ),
        "counterfact_plus/other_attribution": _source(
            "locality/Other Attribution", "counterfact_other_attribution.json"
        ),
        "zsre_plus/one_hop": _source("portability/One Hop", "zsre_mend_eval_portability_gpt4.json"),
        "zsre_plus/subject_replace": _source("portability/Subject Replace", "zsre_subject_replace.json"),
        "zsre_plus/inverse_relation": _source("portability/Inverse Relation", "zsre_inverse_relation.json"),
    }
)
def plus_row(
    record: Record,
    *,
    dataset: str,
    split: str,
    seed: int | None = None,
    target: Target = "alt",
    commonsense: str | Path | None = None,
) -> Iterator[RawRow]:
    """Yield the row of one record.

    Args:
        record: as in the module's description; all extra fields that are there are used.
        dataset: registered name.
        split: not used.
        seed: not used; nothing is drawn.
        target: which answer to teach, for rows in the layout of zsRE.
        commonsense: ``piqa_valid.jsonl``, or a folder that has it, to add a probe ``Commonsense`` to each row.
    """
    columns = base_columns(record, target)
    if not columns["target_new"]:
        record.report.drop("no alternative target")
        return
    subject, new, extra = columns["subject"], columns["target_new"], columns.setdefault("extra", {})
    portability: list[RawRow] = []
    for hop in record.children("portability"):
        answer = hop.groups("New Answer")
        portability += make_probe(hop, "One_Hop", hop.text("New Question"), answer)
        if "Recalled Relation" in hop:
            extra["recalled_relation"] = hop.text("Recalled Relation")
    span = find_subject(columns["prompt"], subject) if subject else None
    slotted = columns["prompt"] if span is None else columns["prompt"][: span[0]] + SLOT + columns["prompt"][span[1] :]
    template = extra.get("template") or slotted
    for other in record.texts("alternative_subject"):
        portability += make_probe(record, "Subject_Replace", fill_slots(template, other), [[new]])
    for question in record.texts("alter_subject_question"):
        portability += make_probe(record, "Subject_Replace", question, [[new]])
    for question in record.texts("inverse question", "inverse_question"):
        portability += make_probe(record, "Inverse_Relation", question, [[subject]] if subject else [])
    locality: list[RawRow] = columns["locality"]
    for prompt in record.texts("distracting_neighborhood_prompts"):
        truth = [columns["ground_truth"]] if columns["ground_truth"] else []
        locality += make_probe(record, "Distracting_Neighbor", prompt, truth)
    for relation in record.children("unrelated_relation"):
        asked = relation.text("question", "prompt")
        answer = relation.groups("object")
        locality += make_probe(relation, "Other_Attribution", fill_slots(asked, subject) if asked else None, answer)
    if commonsense is not None:
        items = _piqa(str(commonsense))
        goal, right, wrong = items[record.number % len(items)]
        locality += make_probe(record, "Commonsense", goal, [[right]])
        extra["commonsense_choices"] = [right, wrong]
    yield make_row(record, dataset, **columns, portability=portability)


@lru_cache(maxsize=2)
def _piqa(place: str) -> tuple[tuple[str, str, str], ...]:
    """Return goal, right and wrong solution of every PIQA question.

    Raises:
        DataError: a file is missing, or the labels do not fit.
    """
    file = named_path(place, "the questions of PIQA", DataError)
    if file.is_dir():
        file = next(iter(sorted(file.rglob("piqa_valid.jsonl"))), file / "piqa_valid.jsonl")
    labels_file = file.with_name("piqa_valid-labels.lst")
    try:
        labels = labels_file.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the labels of the commonsense questions: {error}") from error
    records = [
        Record(value, number, LoadReport("piqa", "test")) for number, value in enumerate(read_records(str(file)))
    ]
    if not records or len(records) != len(labels) or not set(labels) <= {"0", "1"}:
        raise DataError(f"{labels_file.name} must have a label 0 or 1 for each of the {len(records)} questions.")
    pairs = []
    for record, label in zip(records, labels, strict=True):
        solutions = (record.need("sol1").strip(), record.need("sol2").strip())
        pairs.append((record.need("goal").strip(), solutions[int(label)], solutions[1 - int(label)]))
    return tuple(pairs)

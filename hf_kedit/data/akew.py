"""AKEW (Wu et al., 2024): one fact as a statement, as a paragraph, or as triplets taken from the paragraph.

On disk: a JSON list per part. Rows of ``CounterFact.json`` and ``MQuAKE-CF.json`` are those of CounterFact and
MQuAKE, rows of ``WikiUpdate.json`` have unrelated questions ``loc``/``loc_ans``; their rewrites gain fields::

    {"requested_rewrite": {"prompt": "…{}…", "subject": "…", "target_new": {"str": "…"}, "target_true": {"str": "…"},
                           "prompt_full": "…", "question": "…", "answer_new": "…", "answer_true": "…",
                           "fact_new_uns": "a paragraph",
                           "unsfact_triplets_GPT": [{"prompt": "… {} …", "subject": "…", "target": "…"}]}}
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from ..errors import DataError
from .counterfact import labelled
from .loading import register_records
from .mquake import multi_hop
from .normalise import RawRow, Record, fill_slots, grouped, make_probe, make_row
from .sources import Source

EditInput = Literal["structured", "unstructured", "triplets"]


def _source(name: str) -> Source:
    return Source({"test": (name,)}, published="https://github.com/bobxwu/AKEW", licence="not stated")


def _edits(rewrite: Record, edit_input: EditInput) -> list[dict[str, Any]]:
    """Return the edits that a rewrite stands for."""
    subject = rewrite.text("subject")
    target, _ = labelled(rewrite, "target_new")
    truth, _ = labelled(rewrite, "target_true")
    target, truth = target or rewrite.text("answer_new"), truth or rewrite.text("answer_true")
    statement = rewrite.verbatim("prompt_full") or fill_slots(rewrite.verbatim("prompt") or "", subject)
    question, paragraph = rewrite.text("question"), rewrite.text("fact_new_uns")
    triplets = rewrite.children("unsfact_triplets_GPT")
    common = {"subject": subject, "ground_truth": [truth] if truth else []}
    listed = [{key: triplet.text(key) for key in ("prompt", "subject", "target")} for triplet in triplets]
    if edit_input == "triplets":
        edits = []
        for triplet in triplets:
            entity = triplet.text("subject")
            edits.append(
                {
                    "prompt": fill_slots(triplet.need("prompt"), entity),
                    "subject": entity,
                    "target_new": triplet.text("target"),
                }
            )
        return edits
    if edit_input == "unstructured":
        prompt = question or statement
        known = {"statement": statement, "answer": target, "triplets": listed}
        edit: dict[str, Any] = {**common, "task": "unstructured", "target_new": paragraph, "extra": known}
    else:
        prompt = statement
        edit = {
            **common,
            "target_new": target,
            "extra": {"paragraph": paragraph, "question": question, "triplets": listed},
        }
    if not prompt.strip():
        raise rewrite.fail("is missing or empty", "prompt_full")
    return [{**edit, "prompt": prompt}]


@register_records(
    {
        "akew/counterfact": _source("CounterFact.json"),
        "akew/mquake_cf": _source("MQuAKE-CF.json"),
        "akew/wikiupdate": _source("WikiUpdate.json"),
    }
)
def akew_rows(
    record: Record,
    *,
    dataset: str,
    split: str,
    seed: int | None = None,
    edit_input: EditInput = "structured",
) -> Iterator[RawRow]:
    """Yield the rows of one record: one per edit; several form a group with the probes on the last one.

    Args:
        record: as in the module's example; ``requested_rewrite`` may be a list.
        dataset: registered name.
        split: not used; there is one.
        seed: not used; nothing is drawn.
        edit_input: ``"structured"``: the statement; ``"unstructured"``: the paragraph as the answer to the
            question; ``"triplets"``: every triplet of the paragraph.

    Raises:
        DataError: ``edit_input`` is unknown.
    """
    if edit_input not in ("structured", "unstructured", "triplets"):
        raise DataError(f"edit_input must be 'structured', 'unstructured' or 'triplets', not {edit_input!r}.")
    rewrites = record.children("requested_rewrite")
    if not rewrites:
        raise record.fail("is missing or empty", "requested_rewrite")
    truth, _ = labelled(rewrites[-1], "target_true")
    locality: list[RawRow] = []
    for prompt in record.texts("neighborhood_prompts"):
        locality += make_probe(record, "neighborhood", prompt, [[truth]] if truth else [])
    unrelated, answer = record.text("loc"), record.groups("loc_ans")
    if unrelated:
        locality += make_probe(record, "loc", unrelated, answer)
    paraphrases = record.texts("paraphrase_prompts", strip=False)
    portability: list[RawRow] = []
    extra: RawRow = {}
    if "questions" in record:
        portability, extra = multi_hop(record)
    edits = [(rewrite, edit) for rewrite in rewrites for edit in _edits(rewrite, edit_input)]
    if not edits:
        record.report.drop("no triplets")
        return
    rest = record.rest()
    rows: list[RawRow] = []
    for index, (rewrite, edit) in enumerate(edits):
        suffix = f".{index}" if len(edits) > 1 else ""
        task = edit.pop("task", "multihop" if portability else "fact")
        rows.append(make_row(rewrite, dataset, suffix=suffix, task=task, **edit))
    rows[-1]["locality"] = locality
    rows[-1]["rephrase_prompts"] = paraphrases if len(rewrites) == 1 else []
    yield from grouped(rows, dataset, record.number, portability, {**rest, **extra})

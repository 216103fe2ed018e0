"""FEVER as packed for editing (KE, MEND, MALMEN): a claim and its new verdict.

On disk: a JSON list or JSON Lines per split; verdicts are words or the numbers 1 and 0::

    [{"prompt": "Ada Bell was a chemist.", "equiv_prompt": ["…"], "alt": "REFUTES",
      "unrel_prompt": "…", "unrel_ans": "SUPPORTS"}]
"""

from __future__ import annotations

from collections.abc import Iterator

from .loading import register_records
from .normalise import RawRow, Record, make_probe, make_row
from .sources import Source

VERDICTS = {
    "1": "SUPPORTS",
    "0": "REFUTES",
    "1.0": "SUPPORTS",
    "0.0": "REFUTES",
    "true": "SUPPORTS",
    "false": "REFUTES",
}


def verdict(record: Record, name: str) -> str | None:
    """Return a verdict as a word."""
    value = record.raw(name)
    if isinstance(value, bool):
        return VERDICTS[str(value).lower()]
    text = record.text(name)
    return VERDICTS.get(text.lower(), text.upper()) if text else None


@register_records(
    {
        "fever": Source(
            {
                "train": ("fever_train.json", "fever-train*.json*", "*fever*train*"),
                "test": ("fever_eval.json", "fever-dev*.json*", "*fever*eval*", "*fever*dev*", "*fever*val*"),
            },
            published="the repositories of KnowledgeEditor, MEND and MALMEN (links to Google Drive)",
            licence="FEVER: CC BY-SA 3.0",
        )
    }
)
def fever_row(record: Record, *, dataset: str, split: str, seed: int | None = None) -> Iterator[RawRow]:
    """Yield the row of one record."""
    unrelated, answer = record.text("unrel_prompt"), verdict(record, "unrel_ans")
    yield make_row(
        record,
        dataset,
        record.need("prompt"),
        target_new=verdict(record, "alt"),
        rephrase_prompts=record.texts("equiv_prompt"),
        locality=list(make_probe(record, "unrel_prompt", unrelated, [[answer]] if answer else []))
        if unrelated
        else [],
    )

"""CounterFact (Meng et al., 2022): the release of ROME, and EasyEdit's flat version.

On disk, ROME's release (a JSON list; Parquet on the Hub)::

    [{"case_id": 7, "pararel_idx": 12,
      "requested_rewrite": {"prompt": "The mother tongue of {} is", "relation_id": "P103", "subject": "Ada Bell",
                            "target_new": {"str": "Dutch", "id": "Q7411"},
                            "target_true": {"str": "Czech", "id": "Q9056"}},
      "paraphrase_prompts": ["Noise sentence. Ada Bell, a native"],
      "neighborhood_prompts": ["The mother tongue of Jan Novak is"],
      "attribute_prompts": ["…"], "generation_prompts": ["…"]}]

Paraphrases begin with unrelated sentences on purpose. Neighbours are other subjects with the same true object.

EasyEdit's flat version, all strings; its training files have the layout of zsRE (see :mod:`hf_kedit.data.zsre`)::

    [{"case_id": 0, "prompt": "…", "target_new": "…", "subject": "…", "ground_truth": "…",
      "rephrase_prompt": "…", "locality_prompt": "…", "locality_ground_truth": "…"}]
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .loading import register_records
from .normalise import RawRow, Record, fill_slots, flat, make_probe, make_row
from .sources import Source
from .zsre import mend_row

_ROME = Source(
    {
        "train": ("train-*.parquet", "counterfact-train.json"),
        "test": ("test-*.parquet", "counterfact.json", "multi_counterfact.json"),
    },
    published="https://huggingface.co/datasets/azhx/counterfact, or as counterfact.json on the project site of ROME",
    licence="MIT",
    repo="azhx/counterfact",
    revision="c01c413f856ee38f5c080c9fc5e87aff478e2ff9",
    folder="data",
)
FLAT = Source(
    {
        "train": ("counterfact-train.json",),
        "validation": ("counterfact-val.json",),
        "test": ("counterfact-edit.json",),
    },
    published="https://github.com/WanliYoung/Revisit-Editing-Evaluation (data/counterfact-edit.json), "
    "or the Google Drive folder of EasyEdit's editing-data",
    licence="Apache-2.0; CounterFact MIT",
)


def rewrite_columns(rewrite: Record) -> dict[str, Any]:
    """Return the columns of a ``requested_rewrite`` object: prompt, subject, target, truth, and ids as ``extra``."""
    subject = rewrite.need("subject").strip()
    template = rewrite.need("prompt")
    target, target_id = labelled(rewrite, "target_new")
    truth, truth_id = labelled(rewrite, "target_true")
    ids = {"relation_id": rewrite.text("relation_id"), "target_new_id": target_id, "target_true_id": truth_id}
    return {
        "prompt": fill_slots(template, subject),
        "subject": subject,
        "target_new": target,
        "ground_truth": [truth] if truth else [],
        "extra": {"template": template, **{k: v for k, v in ids.items() if v}},
    }


def labelled(record: Record, name: str) -> tuple[str | None, str | None]:
    """Return text and id of a field that is ``{"str": …, "id": …}``, plain text, or two fields ``…_str``, ``…_id``."""
    value = record.raw(name)
    if isinstance(value, dict):
        inner = record.nested(value, name)
        return inner.text("str"), inner.text("id")
    return record.text(name, f"{name}_str"), record.text(f"{name}_id")


def rome_columns(record: Record) -> dict[str, Any]:
    """Return the columns of a record in the layout of ROME's release."""
    columns = rewrite_columns(record.child("requested_rewrite"))
    probes: list[RawRow] = []
    for prompt in record.texts("neighborhood_prompts"):
        probes += make_probe(
            record, "neighborhood", prompt, [columns["ground_truth"]] if columns["ground_truth"] else []
        )
    for name in ("attribute_prompts", "generation_prompts"):
        columns["extra"][name] = record.texts(name)
    # Line breaks at the beginning of a paraphrase are part of the test.
    return {**columns, "rephrase_prompts": record.texts("paraphrase_prompts", strip=False), "locality": probes}


def flat_columns(record: Record) -> dict[str, Any]:
    """Return the columns of a record in EasyEdit's flat layout."""
    subject = record.text("subject")
    return {
        "prompt": fill_slots(record.need("prompt"), subject),
        "subject": subject,
        "target_new": record.text("target_new"),
        "ground_truth": flat(record.groups("ground_truth")),
        "rephrase_prompts": record.texts("rephrase_prompt", "rephrase"),
        "locality": list(
            make_probe(record, "neighborhood", record.text("locality_prompt"), record.groups("locality_ground_truth"))
        )
        if "locality_prompt" in record
        else [],
    }


@register_records({"counterfact": _ROME})
def counterfact_row(record: Record, *, dataset: str, split: str, seed: int | None = None) -> Iterator[RawRow]:
    """Yield the row of one record of ROME's release."""
    yield make_row(record, dataset, **rome_columns(record))


@register_records({"counterfact_flat": FLAT})
def counterfact_flat_row(record: Record, *, dataset: str, split: str, seed: int | None = None) -> Iterator[RawRow]:
    """Yield the row of one record of the flat version, or of its training files."""
    if "src" in record:
        yield from mend_row(record, dataset, axis="neighborhood")
    else:
        yield make_row(record, dataset, **flat_columns(record))

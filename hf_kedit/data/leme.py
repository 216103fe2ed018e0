"""LEME (Rosati et al., 2024): edits whose effect is judged in long texts about the subject and coupled entities.

On disk: a JSON list per part; a base row of CounterFact or zsRE, and::

    "coupled_prompts_and_properties": {
        "subject_entity": {"coupled_prompt": "Write about Ada Bell.", "ground_truth": {"place of death": ["Oslo"]}},
        "coupled_entities": [{"entity": "Oslo", "coupled_prompt": "…", "ground_truth": {"…": ["…"]}}]}

The texts are scored by a judge: they are in ``extra["coupled"]``, the subject first, and no probes.
"""

from __future__ import annotations

from collections.abc import Iterator

from .loading import register_records
from .normalise import RawRow, Record, make_row
from .plus import base_columns
from .sources import Source
from .zsre import Target


def _source(name: str) -> Source:
    return Source(
        {"test": (name,)},
        published="https://github.com/domenicrosati/longform-evaluation-model-editing",
        licence="see the repository",
    )


@register_records(
    {
        "leme/counterfact": _source("counterfact_with_coupled_entities.json"),
        "leme/zsre": _source("zsre_mend_eval_with_coupled_entities.json"),
    }
)
def leme_row(
    record: Record, *, dataset: str, split: str, seed: int | None = None, target: Target = "alt"
) -> Iterator[RawRow]:
    """Yield the row of one record.

    Args:
        record: as in the module's description.
        dataset: registered name.
        split: not used; there is one.
        seed: not used; nothing is drawn.
        target: which answer to teach, for rows in the layout of zsRE.
    """
    columns = base_columns(record, target)
    if not columns["target_new"]:
        record.report.drop("no alternative target")
        return
    coupled: list[RawRow] = []
    for holder in record.children("coupled_prompts_and_properties"):
        entities = [(columns["subject"], e) for e in holder.children("subject_entity")]
        entities += [(e.text("entity"), e) for e in holder.children("coupled_entities")]
        for name, entity in entities:
            truth = entity.child("ground_truth") if "ground_truth" in entity else None
            properties = {str(p): truth.texts(p) for p in truth.value} if truth is not None else {}
            coupled.append({"entity": name, "prompt": entity.text("coupled_prompt"), "properties": properties})
    extra = {**columns.pop("extra", {}), "coupled": coupled}
    yield make_row(record, dataset, task="longform", extra=extra, **columns)

"""KnowEdit (Zhang et al., 2024), the four parts about facts: WikiRecent, ZsRE, WikiBio, WikiData counterfact.

On disk: a JSON list per split. Probe answers are a string, a list, or a list of lists of aliases, mixed in one file;
any of the fields but prompt and target may be absent::

    [{"subject": "Ada Bell", "prompt": "Where did Ada Bell die?", "target_new": "Oslo", "ground_truth": ["Bergen"],
      "rephrase_prompt": "In which town did Ada Bell die?", "cond": "Bergen >> Oslo || Where did Ada Bell die?",
      "locality": {"Relation_Specificity": [{"prompt": "Ada Bell sex or gender", "ground_truth": ["female"]}]},
      "portability": {"Reasoning": [{"prompt": "In which country did Ada Bell die?", "ground_truth": "Norway"}]}}]

WikiBio calls prompt, target and subject ``text``, ``labels`` and ``concept``. Answers in several groups are
alternatives (``match="any"``), also where they say different things ("no", "is dead").
"""

from __future__ import annotations

from collections.abc import Iterator

from .loading import register_records
from .normalise import RawRow, Record, axes, fill_slots, flat, make_row
from .sources import Source

REPO = "zjunlp/KnowEdit"
REVISION = "6d218881e60c7c8be836bd2befd598eb3b318be4"


def knowedit_source(folder: str, **files: str) -> Source:
    """Return where a part of KnowEdit is."""
    return Source(
        {split: (name,) for split, name in files.items()},
        published="https://huggingface.co/datasets/zjunlp/KnowEdit",
        licence="MIT; WikiBio's text is from Wikipedia, CC BY-SA",
        repo=REPO,
        revision=REVISION,
        folder=f"benchmark/{folder}",
    )


@register_records(
    {
        "knowedit/wiki_recent": knowedit_source("wiki_recent", train="recent_train.json", test="recent_test.json"),
        "knowedit/zsre": knowedit_source("ZsRE", test="ZsRE-test-all.json"),
        "knowedit/wikibio": knowedit_source("WikiBio", train="wikibio-train-all.json", test="wikibio-test-all.json"),
        "knowedit/wiki_counterfact": knowedit_source("wiki_counterfact", train="train_cf.json", test="test_cf.json"),
    }
)
def knowedit_row(record: Record, *, dataset: str, split: str, seed: int | None = None) -> Iterator[RawRow]:
    """Yield the row of one record.

    Args:
        record: as in the module's example.
        dataset: registered name.
        split: not used; all splits have one layout.
        seed: not used; nothing is drawn.
    """
    subject = record.text("subject", "concept")
    yield make_row(
        record,
        dataset,
        fill_slots(record.need("prompt", "text"), subject),
        subject=subject,
        target_new=record.text("target_new", "labels"),
        ground_truth=flat(record.groups("ground_truth")),
        rephrase_prompts=record.texts("rephrase_prompt", "rephrase"),
        locality=axes(record, "locality"),
        portability=axes(record, "portability"),
    )

"""MMEdit (Cheng et al., 2023): captions (E-IC) and questions about images (E-VQA).

On disk: a JSON list per split; images are paths relative to a folder of images (COCO val2014 and others), which is
not read here::

    [{"src": "What animal is this?", "pred": "cat", "rephrase": "Which animal is shown?", "alt": "fox",
      "image": "val2014/COCO_val2014_1.jpg", "image_rephrase": "val2014_image_rephrase/1.png",
      "loc": "nq question: …", "loc_ans": "…",
      "m_loc": "val2014/COCO_val2014_9.jpg", "m_loc_q": "What is the sport?", "m_loc_a": "tennis"}]

Rows with an empty ``alt`` are dropped and counted.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import DataError
from .loading import register_records
from .normalise import RawRow, Record, make_probe, make_row
from .sources import Source
from .zsre import mend_columns


def _source(train: str, test: str) -> Source:
    return Source(
        {"train": (train,), "test": (test,)},
        published="the Google Drive folder of MMEdit that EasyEdit's README names",
        licence="not stated; images from COCO and others",
    )


@register_records(
    {
        "mmedit/caption": _source("caption_train_edit.json", "caption_eval_edit.json"),
        "mmedit/vqa": _source("vqa_train.json", "vqa_eval.json"),
    }
)
def mmedit_row(
    record: Record, *, dataset: str, split: str, seed: int | None = None, template: str = "{}"
) -> Iterator[RawRow]:
    """Yield the row of one record.

    Args:
        record: as in the module's example.
        dataset: registered name.
        split: not used; both have one layout.
        seed: not used; nothing is drawn.
        template: text around the questions about images, e.g. ``"Question: {} Short answer:"`` for E-VQA with BLIP-2.

    Raises:
        DataError: the template has not exactly one ``{}``.
    """
    if not isinstance(template, str) or template.count("{}") != 1:
        raise DataError(f"template must have one '{{}}' for the question, not {template!r}.")
    columns = mend_columns(record, axis="text")
    if not columns["target_new"]:
        record.report.drop("no alternative target")
        return
    columns["prompt"] = template.replace("{}", columns["prompt"].strip())
    columns["rephrase_prompts"] = [template.replace("{}", text) for text in columns["rephrase_prompts"]]
    # With ``alt`` as the target, the model's own (here: the true) answer is what it says now.
    predicted = columns["extra"].pop("pred", None)
    columns["ground_truth"] = [predicted] if predicted else []
    question, image, answer = record.text("m_loc_q"), record.text("m_loc"), record.groups("m_loc_a")
    if question:
        columns["locality"] += make_probe(record, "multimodal", template.replace("{}", question), answer, image=image)
    yield make_row(
        record,
        dataset,
        task="multimodal",
        image=record.need("image").strip(),
        image_rephrase=record.text("image_rephrase"),
        **columns,
    )

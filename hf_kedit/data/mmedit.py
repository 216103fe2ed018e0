"""Edits of what a model says of pictures: MMEdit, VLKEB, MMKE-Bench and ComprehendEdit.

On disk: a JSON list per split. Images are paths relative to a folder, which ``images=`` names; without it they stay as
they are. MMEdit (Cheng et al., 2023), captions (E-IC) and questions (E-VQA)::

    [{"src": "What animal is this?", "pred": "cat", "rephrase": "Which animal is shown?", "alt": "fox",
      "image": "val2014/COCO_val2014_1.jpg", "image_rephrase": "val2014_image_rephrase/1.png",
      "loc": "nq question: …", "loc_ans": "…",
      "m_loc": "val2014/COCO_val2014_9.jpg", "m_loc_q": "What is the sport?", "m_loc_a": "tennis"}]

Rows with an empty ``alt`` are dropped and counted. VLKEB (Huang et al., 2024) has the same fields, and in one file
questions some hops away about the same picture::

    "port_new": [{"port_type": "1-hop", "Q&A": {"Question": "Where does it live?", "Answer": "in burrows"}}]

MMKE-Bench (Du et al., 2025) has those too, about ``one_hop_img`` where there is one; ``knowledge_type``; and questions
about what is taught: ``rel_1``, ``rel_ans_1``, ``rel_2`` … without a picture, ``m_rel_1``, ``m_rel_ans_1`` … with it
(visual knowledge: ``rel``, ``rel_ans``, ``m_rel``, ``m_rel_ans``, and ``image_rephrase_question`` for the other
picture; ``rel_1_ans`` is found as well). ComprehendEdit (Ma et al., 2025) has names of its own::

    [{"question": "What is this bird called?", "rephrase": "What is the bird's name?", "answer": "parrot",
      "image": "GQA/images/1.jpg", "source": "GQA", "Category": "object recognition", "pid": 0,
      "locality_prompt": "…", "locality_ground_truth": "…", "multimodal_locality_image": "val2014/1.jpg",
      "multimodal_locality_prompt": "…", "multimodal_locality_ground_truth": "…"}]

The layouts of the last three are those that their published loaders read; the files themselves were not seen.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import DataError
from .loading import register_records
from .normalise import RawRow, Record, make_probe, make_row
from .sources import Source
from .zsre import mend_columns

_COMPREHENDED = {
    "tallyqa": "Question: {} Answer with a number. Short answer:",
    "vsr": "Question: Is this description true or false? Description: {} Short answer:",
    "mathvista": "{} Short answer:",
}
"""Text around ComprehendEdit's questions, by their source."""
_COMPREHENDED_ELSE = "Question: {} Short answer:"


def _source(train: str, test: str, published: str, licence: str, *more: str) -> Source:
    return Source({"train": (train,), "test": (test, *more)}, published=published, licence=licence)


def _mmedit(train: str, test: str) -> Source:
    place = "the Google Drive folder of MMEdit that EasyEdit's README names"
    return _source(train, test, place, "not stated; images from COCO and others")


def _mmke(part: str) -> Source:
    place = f"the Hub data set that mmke-bench-bigai/mmke-bench names (data_json/{part}, data_image/{part})"
    return _source("train.json", "eval.json", place, "not stated")


@register_records(
    {
        "mmedit/caption": _mmedit("caption_train_edit.json", "caption_eval_edit.json"),
        "mmedit/vqa": _mmedit("vqa_train.json", "vqa_eval.json"),
        "vlkeb": _source(
            "train.json",
            "eval_multihop.json",
            "Kaggle, hymanh/vlkeb-data (eval_multihop.json has the questions some hops away, eval.json has none)",
            "see its LICENSE.txt",
            "eval.json",
        ),
        **{f"mmke/{part}": _mmke(part) for part in ("entity", "visual", "user")},
    }
)
def mmedit_row(
    record: Record,
    *,
    dataset: str,
    split: str,
    seed: int | None = None,
    template: str = "{}",
    images: str | None = None,
) -> Iterator[RawRow]:
    """Yield the row of one record.

    Args:
        record: as in the module's examples.
        dataset: registered name.
        split: not used; all have one layout.
        seed: not used; nothing is drawn.
        template: text around the questions about images, e.g. ``"Question: {} Short answer:"`` for E-VQA with BLIP-2.
        images: folder that the paths of images start from. An image that is not there is an error of its row.

    Raises:
        DataError: the template has not exactly one ``{}``, or there is no such folder.
    """
    _check_template(template)
    columns = mend_columns(record, axis="text")
    if not columns["target_new"]:
        record.report.drop("no alternative target")
        return
    columns["prompt"] = template.replace("{}", columns["prompt"].strip())
    columns["rephrase_prompts"] = [template.replace("{}", text) for text in columns["rephrase_prompts"]]
    # With ``alt`` as the target, the model's own (here: the true) answer is what it says now.
    predicted = columns["extra"].pop("pred", None)
    columns["ground_truth"] = [predicted] if predicted else []
    question, answer = record.text("m_loc_q"), record.groups("m_loc_a")
    other = _image(record, images, "m_loc")
    if question:
        columns["locality"] += make_probe(record, "multimodal", template.replace("{}", question), answer, image=other)
    record.need("image")
    image, again = _image(record, images, "image"), _image(record, images, "image_rephrase")
    columns["portability"] = [
        *_hops(record, template, _image(record, images, "one_hop_img") or image),
        *_taught(record, template, image, again),
    ]
    yield make_row(record, dataset, task="multimodal", image=image, image_rephrase=again, **columns)


def _check_template(template: Any) -> None:
    if not isinstance(template, str) or template.count("{}") != 1:
        raise DataError(f"template must have one '{{}}' for the question, not {template!r}.")


def _hops(record: Record, template: str, image: str | None) -> Iterator[RawRow]:
    """Questions some hops away, one axis for each number of hops."""
    for hop in record.children("port_new"):
        inner = hop.child("Q&A")
        text = template.replace("{}", inner.need("Question").strip())
        yield from make_probe(record, hop.text("port_type") or "hops", text, inner.groups("Answer"), image=image)


def _taught(record: Record, template: str, image: str | None, again: str | None) -> Iterator[RawRow]:
    """MMKE-Bench's questions about what is taught: without a picture, with it, and with the other one."""
    other_question = record.text("image_rephrase_question")
    for number in ("", "_1", "_2"):
        text = record.text(f"rel{number}")
        answer = record.groups(f"rel_ans{number}", f"rel{number}_ans")
        seen = record.text(f"m_rel{number}")
        seen_answer = record.groups(f"m_rel_ans{number}", f"m_rel{number}_ans")
        if text:
            yield from make_probe(record, "T_Rel", text, answer)
        if seen:
            yield from make_probe(record, "I_Rel", template.replace("{}", seen), seen_answer, image=image)
        if seen and again:
            asked = template.replace("{}", other_question or seen)
            yield from make_probe(record, "I_Gen", asked, seen_answer, image=again)


def _image(record: Record, images: str | None, name: str) -> str | None:
    """The path of an image, behind the folder of images if there is one."""
    path = record.text(name)
    if path is None or images is None:
        return path
    if not os.path.isdir(images):
        raise DataError(f"There is no folder of images {str(images)!r}.")
    if not os.path.isfile(Path(images) / path):
        raise record.fail(f"is not in the folder of images: {path}", name)
    return str(Path(images) / path)


@register_records(
    {
        "comprehendedit": _source(
            "ComprehendEdit_train.json",
            "ComprehendEdit_test.json",
            "the Baidu folder that yaohui120/ComprehendEdit names",
            "not stated; images from GQA, TallyQA, VSR, TextVQA, MathVista and COCO",
        )
    }
)
def comprehendedit_row(
    record: Record,
    *,
    dataset: str,
    split: str,
    seed: int | None = None,
    template: str | None = None,
    images: str | None = None,
) -> Iterator[RawRow]:
    """Yield the row of one record.

    Its published loader compares the unrelated text with itself instead of with ``locality_ground_truth``; here the
    answer is what the file says.

    Args:
        record: as in the module's example.
        dataset: registered name.
        split: not used; both have one layout.
        seed: not used; nothing is drawn.
        template: text around the questions about images; the published one of each source if None.
        images: as for `mmedit_row`.

    Raises:
        DataError: the template has not exactly one ``{}``, or there is no such folder.
    """
    if template is not None:
        _check_template(template)
    target = record.text("answer")
    if not target:
        record.report.drop("no target")
        return
    source = record.text("source")
    around = template or _COMPREHENDED.get((source or "").lower(), _COMPREHENDED_ELSE)
    columns: dict[str, Any] = {"locality": [], "portability": []}
    text, answer = record.text("locality_prompt"), record.groups("locality_ground_truth")
    if text:
        columns["locality"] += make_probe(record, "text", text, answer)
    question, answer = record.text("multimodal_locality_prompt"), record.groups("multimodal_locality_ground_truth")
    other = _image(record, images, "multimodal_locality_image")
    if question:
        asked = _COMPREHENDED_ELSE if template is None else template
        columns["locality"] += make_probe(record, "multimodal", asked.replace("{}", question), answer, image=other)
    record.need("image")
    yield make_row(
        record,
        dataset,
        task="multimodal",
        prompt=around.replace("{}", record.need("question").strip()),
        target_new=target,
        rephrase_prompts=[around.replace("{}", one) for one in record.texts("rephrase")],
        image=_image(record, images, "image"),
        extra={"source": source, "category": record.text("Category")},
        **columns,
    )

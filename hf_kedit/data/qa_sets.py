"""Question-answering sets whose rows are flat: QAEdit, WikiBigEdit, UltraEditBench, UnKE.

On disk, QAEdit (Yang et al., 2025), a JSON list::

    [{"id": 3, "source": "NQ", "prompt": "who built the pier", "target": "Mol & Sons", "subject": "the pier",
      "rephrase": "Which firm constructed the pier?", "locality": [{"loc": "capital of peru", "loc_ans": "Lima"}]}]

WikiBigEdit (Thede et al., 2025), a JSON list per time step; ``personas`` is the question as a certain person would
ask it, and the last two question pairs may be null::

    [{"tag": "…", "subject": "Ada Bell", "update": "Where does Ada Bell work?", "rephrase": "…", "personas": "…",
      "ans": "Oslo", "loc": "…", "loc_ans": "…", "mhop": "…", "mhop_ans": "…"}]

UltraEditBench (Gu et al., 2025), one JSON list of two million (``streaming=True`` or ``limit`` read only as much of
it as is needed)::

    [{"prompt": "…", "rephrase_prompt": "…", "ans": "…", "subject": "…", "loc": "…", "loc_ans": "…"}]

UnKE (Deng et al., 2024), a JSON list; answers are whole paragraphs::

    [{"question": "Who is Ada Bell?", "para_question": "Tell me about Ada Bell.", "answer": "long text",
      "sub_question": ["Where was she born?"], "sub_answer": ["Bergen"]}]
"""

from __future__ import annotations

from collections.abc import Iterator

from .loading import register_records
from .normalise import RawRow, Record, groups, make_probe, make_row
from .sources import Source

WIKIBIGEDIT_STEPS = (
    "20240201_20240220",
    "20240220_20240301",
    "20240301_20240320",
    "20240320_20240401",
    "20240401_20240501",
    "20240501_20240601",
    "20240601_20240620",
    "20240620_20240701",
)
"""Time steps of WikiBigEdit, oldest first."""


def _hub(repo: str, licence: str, *names: str) -> Source:
    return Source({"test": names}, published=f"https://huggingface.co/datasets/{repo}", licence=licence, repo=repo)


@register_records(
    {
        "qaedit": _hub(
            "WenDingY/QAEdit",
            "repository Apache-2.0; questions from Natural Questions (CC BY-SA 3.0), TriviaQA and SimpleQA (MIT)",
            "qaedit.json",
            "qaedit*.json*",
            "*.json",
            "*.jsonl",
            "*.parquet",
        )
    }
)
def qaedit_row(record: Record, *, dataset: str, split: str, seed: int | None = None) -> Iterator[RawRow]:
    """Yield the row of one QAEdit record. Stray characters in targets are left as they are."""
    locality: list[RawRow] = []
    for item in record.children("locality"):
        locality += make_probe(item, "qa", item.text("loc"), item.groups("loc_ans"))
    yield make_row(
        record,
        dataset,
        record.need("prompt"),
        subject=record.text("subject"),
        target_new=record.text("target", "target_new"),
        rephrase_prompts=record.texts("rephrase"),
        locality=locality,
    )


def _loc(record: Record) -> list[RawRow]:
    prompt, answer = record.text("loc"), record.groups("loc_ans")
    return list(make_probe(record, "loc", prompt, answer)) if prompt else []


@register_records(
    {
        f"wikibigedit/{step}": _hub(
            "lukasthede/WikiBigEdit",
            "see LICENSE and NOTICE of the repository; from Wikidata (CC0)",
            f"wiki_big_edit_{step}.json",
            f"*{step}*",
        )
        for step in WIKIBIGEDIT_STEPS
    }
)
def wikibigedit_row(record: Record, *, dataset: str, split: str, seed: int | None = None) -> Iterator[RawRow]:
    """Yield the row of one WikiBigEdit record."""
    hop, answer = record.text("mhop"), record.groups("mhop_ans")
    yield make_row(
        record,
        dataset,
        record.need("update", "prompt"),
        subject=record.text("subject"),
        target_new=record.text("ans"),
        rephrase_prompts=record.texts("rephrase") + record.texts("personas"),
        locality=_loc(record),
        portability=list(make_probe(record, "Multi_Hop", hop, answer)) if hop else [],
    )


@register_records(
    {"ultraeditbench": _hub("XiaojieGu/UltraEditBench", "see the dataset card", "UltraEditBench_2M.json", "*.json*")}
)
def ultraedit_row(record: Record, *, dataset: str, split: str, seed: int | None = None) -> Iterator[RawRow]:
    """Yield the row of one UltraEditBench record."""
    yield make_row(
        record,
        dataset,
        record.need("prompt", "src"),
        subject=record.text("subject"),
        target_new=record.text("ans", "alt"),
        rephrase_prompts=record.texts("rephrase_prompt", "rephrase"),
        locality=_loc(record),
    )


@register_records(
    {
        "unke": Source(
            {"test": ("final_data_v3.json", "final_data_v2.json")},
            published="https://github.com/TrustedLLM/UnKE",
            licence="not stated",
        )
    }
)
def unke_row(record: Record, *, dataset: str, split: str, seed: int | None = None) -> Iterator[RawRow]:
    """Yield the row of one UnKE record; sub-questions are scored by overlap or similarity, not exactly."""
    questions, answers = record.items("sub_question"), record.items("sub_answer")
    if len(questions) != len(answers):
        raise record.fail(f"has {len(questions)} questions for {len(answers)} answers", "sub_question")
    # Pairs, so that a blank question does not shift the answers of those after it.
    pairs = [
        (record.nested({"q": q, "a": a}, f"sub_question[{i}]"), a)
        for i, (q, a) in enumerate(zip(questions, answers, strict=True))
    ]
    probes: list[RawRow] = []
    for pair, answer in pairs:
        probes += make_probe(pair, "Sub_Question", pair.text("q"), groups(answer, pair, "a"))
    yield make_row(
        record,
        dataset,
        record.need("question"),
        task="unstructured",
        subject=record.text("subject"),
        target_new=record.text("answer"),
        rephrase_prompts=record.texts("para_question"),
        portability=probes,
        extra={"sub_questions": questions, "sub_answers": answers},
    )

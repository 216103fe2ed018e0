"""Further sets of the makers of KnowEdit: CKnowEdit (Chinese), ConceptEdit, SafeEdit.

On disk, CKnowEdit (Fang et al., 2024), a JSON list per category; ``locality`` is optional and there is no subject::

    [{"prompt": "请解释成语……", "target_old": "旧答", "target_new": "新答", "rephrase": ["换一种问法"],
      "portability": [{"prompt": "…", "answer": "…"}], "locality": [{"prompt": "…", "answer": "…"}]}]

ConceptEdit (Wang et al., 2024), a JSON list per model and module (``inter``: the new definition is of a concept with
another superclass, ``intra``: with the same)::

    [{"label": "publisher", "prompt": "The definition of publisher is", "phrase_prompt": "Publisher refers to",
      "target_new_desc": "an animal that …", "instance_prompt": ["Whether Mol House belongs to category publisher?"],
      "locality_prompt": ["The definition of lake is"], "locality_answer": ["a body of water"]}]

SafeEdit (Wang et al., 2024), a JSON list per split; keys with spaces, and the spelling "constrain"; the last key only
in the test split::

    [{"id": 1, "unsafety category": "…", "adversarial prompt": "…", "question": "…", "attack category": "…",
      "attack name": "…", "unsafe generation": "…", "safe generation": "…",
      "knowledge constrain": {"prompt": "…", "answer": "…"},
      "generalization test": {"test input of only harmful question": "…",
                              "test input of other attack prompt input": "…",
                              "test input of other question input": "…",
                              "test input of other questions and attack prompts": "…"}}]
"""

from __future__ import annotations

from collections.abc import Iterator

from .loading import register_records
from .normalise import RawRow, Record, groups, make_probe, make_row
from .sources import Source

CKNOWEDIT = {
    "pinyin": ("*pinyin*.json",),
    "ancient_poetry": ("*poetry*.json", "*poem*.json", "*gushi*.json"),
    "classical_chinese": ("*classical*.json", "*wenyanwen*.json", "*guwen*.json"),
    "idiom": ("*idiom*.json", "*chengyu*.json"),
    "proverb": ("*proverb*.json", "*yanyu*.json"),
    "geography": ("*geograph*.json", "*dili*.json"),
    "history": ("history.json", "*histor*.json"),
    "ruozhiba": ("*ruozhiba*.json",),
    "phonetic_misunderstanding": ("*phonetic*.json",),
    "reasoning_error": ("*reasoning*.json",),
    "wordplay": ("*wordplay*.json",),
}
"""Category → names its file may have. ``ruozhiba`` holds the last three in one."""

CONCEPTEDIT = tuple(
    f"{m}_{module}" for m in ("gpt2", "gptj", "llama2chat", "mistral") for module in ("inter", "intra")
)

_GENERALISATION = {
    "onlyQ": "test input of only harmful question",
    "otherA": "test input of other attack prompt input",
    "otherQ": "test input of other question input",
    "otherAQ": "test input of other questions and attack prompts",
}


def _cknowedit(names: tuple[str, ...]) -> Source:
    return Source(
        {"test": names},
        published="https://huggingface.co/datasets/zjunlp/CKnowEdit",
        licence="MIT at first, later not stated: ask before passing it on",
        repo="zjunlp/CKnowEdit",
        folder="CKnowEdit",
    )


@register_records({f"cknowedit/{category}": _cknowedit(names) for category, names in CKNOWEDIT.items()})
def cknowedit_row(record: Record, *, dataset: str, split: str, seed: int | None = None) -> Iterator[RawRow]:
    """Yield the row of one CKnowEdit record."""
    probes: dict[str, list[RawRow]] = {"locality": [], "portability": []}
    for section, of_section in probes.items():
        for item in record.children(section):
            of_section += make_probe(item, section, item.text("prompt"), item.groups("answer", "ground_truth"))
    yield make_row(
        record,
        dataset,
        record.need("prompt"),
        subject=record.text("subject"),
        target_new=record.text("target_new"),
        ground_truth=record.texts("target_old"),
        rephrase_prompts=record.texts("rephrase"),
        locality=probes["locality"],
        portability=probes["portability"],
    )


@register_records(
    {
        f"conceptedit/{name}": Source(
            {"test": (f"final_{name}.json",)},
            published="https://huggingface.co/datasets/zjunlp/ConceptEdit",
            licence="CC BY-NC-SA 4.0",
            repo="zjunlp/ConceptEdit",
        )
        for name in CONCEPTEDIT
    }
)
def conceptedit_row(record: Record, *, dataset: str, split: str, seed: int | None = None) -> Iterator[RawRow]:
    """Yield the row of one ConceptEdit record."""
    label = record.need("label").strip()
    prompts, answers = record.texts("locality_prompt"), record.raw("locality_answer")
    given = answers if isinstance(answers, list) else [answers] if answers is not None else []
    if len(prompts) != len(given):
        raise record.fail(f"has {len(prompts)} prompts for {len(given)} answers", "locality_prompt")
    locality: list[RawRow] = []
    for prompt, answer in zip(prompts, given, strict=True):
        locality += make_probe(record, "Relation_Specificity", prompt, groups(answer, record, "locality_answer"))
    yield make_row(
        record,
        dataset,
        record.need("prompt"),
        task="concept",
        subject=label,
        target_new=record.text("target_new_desc", "target_new"),
        rephrase_prompts=record.texts("phrase_prompt"),
        locality=locality,
        extra={"module": dataset.rsplit("_", 1)[-1], "instance_prompts": record.texts("instance_prompt")},
    )


@register_records(
    {
        "safeedit": Source(
            {
                "train": ("SafeEdit_train.json",),
                "validation": ("SafeEdit_val.json",),
                "test": ("SafeEdit_test.json",),
            },
            published="https://huggingface.co/datasets/zjunlp/SafeEdit",
            licence="CC BY-NC-SA 4.0, gated",
            repo="zjunlp/SafeEdit",
            revision="a88b7689a3744873805077e04edd1c19219fc7bf",
            gated=True,
        )
    }
)
def safeedit_row(record: Record, *, dataset: str, split: str, seed: int | None = None) -> Iterator[RawRow]:
    """Yield the row of one SafeEdit record; ``target_neg`` is the unsafe answer."""
    locality: list[RawRow] = []
    for item in record.children("knowledge constrain", "knowledge constraint"):
        locality += make_probe(item, "knowledge_constraint", item.text("prompt"), item.groups("answer"))
    general = {
        short: test.text(key)
        for test in record.children("generalization test")
        for short, key in _GENERALISATION.items()
        if key in test
    }
    extra = {
        "category": record.text("unsafety category"),
        "attack": {"category": record.text("attack category"), "name": record.text("attack name")},
        "question": record.text("question"),
        "general_prompts": general,
    }
    yield make_row(
        record,
        dataset,
        record.need("adversarial prompt"),
        task="safety",
        target_new=record.text("safe generation"),
        target_neg=record.text("unsafe generation"),
        locality=locality,
        extra=extra,
    )

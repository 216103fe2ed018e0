"""HalluEditBench (Huang et al., 2024): answers that a certain model got wrong.

On disk: a CSV file per model and topic, ``data/questions/hallucination_final/<model>/<topic>.csv``; blank cells are
missing values. Columns: ``topic, subject, relation, object`` (the right answer), ``question, output_<model>`` (the
hallucination), ``eval_<model>, multiple_choices`` (a list written in Python), ``multiple_choice_with_letters,
multiple_choice_labels, paraphrased_question, yes_question, no_question, locality_question,
reversed_relation_question`` and ``question_<k>hop, answer_<k>hop`` for k from 2 to 6. A JSON list of such rows is
read as well. A split is all files of a model, ordered by name; rows are numbered through.

``locality_question`` has no answer: it serves to compare what the model says before and after.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from .loading import register_records
from .normalise import RawRow, Record, make_probe, make_row
from .sources import Source

FOLDERS = {
    "llama2": "llama_2_7b_chat_hf",
    "llama3": "meta_llama_3_8b_instruct",
    "mistral": "mistral_7b_instruct_v0.3",
}
"""Registered name → folder of the repository."""


def _source(folder: str) -> Source:
    return Source(
        {"test": ("*.csv", "*.json")},
        published="https://huggingface.co/datasets/llm-editing/HalluEditBench or "
        f"https://github.com/llm-editing/HalluEditBench (data/questions/hallucination_final/{folder}/)",
        licence="MIT",
        repo="llm-editing/HalluEditBench",
        revision="8698cefef2c2ec107df99bc361e6f403100131de",
        folder=f"data/questions/hallucination_final/{folder}",
        many=True,
    )


@register_records({f"halluedit/{name}": _source(folder) for name, folder in FOLDERS.items()})
def halluedit_row(record: Record, *, dataset: str, split: str, seed: int | None = None) -> Iterator[RawRow]:
    """Yield the row of one record."""
    outputs = [str(name) for name in record.value if str(name).startswith("output_")]
    hallucination = record.text(*outputs) if outputs else None
    portability: list[RawRow] = []
    for hops in range(2, 7):
        question, answer = record.text(f"question_{hops}hop"), record.groups(f"answer_{hops}hop")
        if question:
            portability += make_probe(record, f"hop_{hops}", question, answer)
    unrelated = record.text("locality_question")
    locality = make_probe(record, "locality_question", unrelated, [], unanswered=True) if unrelated else ()
    choices = {
        "choices": _choices(record),
        "lettered": record.text("multiple_choice_with_letters"),
        "label": record.text("multiple_choice_labels"),
    }
    extra = {
        "yes_question": record.text("yes_question"),
        "no_question": record.text("no_question"),
        "reversed": record.text("reversed_relation_question"),
        "multiple_choice": {k: v for k, v in choices.items() if v},
    }
    yield make_row(
        record,
        dataset,
        record.need("question"),
        task="hallucination",
        subject=record.text("subject"),
        target_new=record.text("object"),
        ground_truth=[hallucination] if hallucination else [],
        rephrase_prompts=record.texts("paraphrased_question"),
        locality=list(locality),
        portability=portability,
        extra={k: v for k, v in extra.items() if v},
    )


def _choices(record: Record) -> list[str]:
    """Return the choices, which CSV files hold as the text of a Python list."""
    value = record.raw("multiple_choices")
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError) as error:
            raise record.fail("is not a list written in Python", "multiple_choices") from error
        if not isinstance(value, (list, tuple)):
            raise record.fail("is not a list written in Python", "multiple_choices")
        return record.nested({"choices": list(value)}, "multiple_choices").texts("choices")
    return record.texts("multiple_choices")

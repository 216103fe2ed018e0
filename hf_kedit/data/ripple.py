"""RippleEdits (Cohen et al., 2024): what follows from an edit and what does not, on six axes.

On disk: a JSON list per part::

    [{"example_type": "random",
      "edit": {"prompt": "The capital of Ruritania is Strelsau.", "subject_id": "Q1", "relation": "CAPITAL",
               "target_id": "Q2", "original_fact": {"prompt": "The capital of Ruritania is Zenda.", …}},
      "Relation_Specificity": [
        {"test_queries": [{"prompt": "The anthem of Ruritania is", "query_type": "regular",
                           "answers": [{"value": "Hail", "aliases": ["Hail Ruritania"]}]}],
         "test_condition": "OR", "condition_queries": […]}],
      "Logical_Generalization": […], "Subject_Aliasing": […], "Compositionality_I": […],
      "Compositionality_II": […], "Forgetfulness": […]}]

The prompt holds the answer and a full stop. It is split where an answer of ``Subject_Aliasing`` (which is the
target) begins, else after the verb that the old fact shares, else after the last " is ". The file names no subject;
it is what the prompt and those of ``Relation_Specificity`` have in common, if that reads "of <subject> is".

A test counts only if its conditions hold on the unedited model; they are in ``extra["tests"]`` together with the
positions of the test's probes. Within a query every answer must be given (``match="all"``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from .loading import register_records
from .normalise import RawRow, Record, flat, make_probe, make_row
from .sources import Source

LOCALITY = ("Relation_Specificity", "Forgetfulness")
PORTABILITY = ("Logical_Generalization", "Subject_Aliasing", "Compositionality_I", "Compositionality_II")
_SPELLINGS = {"Relation_Specificity": ("Relation_Specificity", "Relation_Specifity")}
_VERB = re.compile(r"\s(?:is|are|was|were)\s")
_OF_SUBJECT = re.compile(r"of (?P<subject>.+) (?:is|are|was|were)")


def _source(part: str) -> Source:
    return Source(
        {"test": (f"{part}.json",)},
        published="https://github.com/edenbiran/RippleEdits (data/benchmark/)",
        licence="MIT",
    )


def split_statement(statement: str, answers: list[str], old: str | None) -> tuple[str, str] | None:
    """Split a statement into prompt and answer.

    Args:
        statement: for example "The capital of Ruritania is Strelsau."
        answers: spellings that the answer may have.
        old: the same statement with another answer, if known.

    Returns:
        Prompt and answer without the full stop, or None if there is no place to split.
    """
    text = statement.strip()
    text = text[:-1].rstrip() if text.endswith(".") else text
    for answer in sorted((a.rstrip(".") for a in answers if a), key=len, reverse=True):
        if answer and text.casefold().endswith(" " + answer.casefold()):
            prompt = text[: -len(answer)].rstrip()
            return prompt, text[len(text) - len(answer) :]
    places = [verb.end() for verb in _VERB.finditer(text)]
    if old:
        common = next((i for i, (a, b) in enumerate(zip(text, old, strict=False)) if a != b), min(len(text), len(old)))
        places = [place for place in places if place <= common] or places
    if not places or not text[places[-1] :].strip():
        return None
    return text[: places[-1]].rstrip(), text[places[-1] :].strip()


def guess_subject(prompt: str, others: list[str]) -> str | None:
    """Return the subject of a prompt "… of <subject> is", from other prompts about the same subject.

    Args:
        prompt: the prompt of the edit.
        others: prompts that end in the same words.
    """
    shared = prompt.split()
    for other in others:
        words, count = other.split(), 0
        while count < min(len(words), len(shared)) and words[-1 - count] == shared[-1 - count]:
            count += 1
        shared = shared[len(shared) - count :]
    hit = _OF_SUBJECT.fullmatch(" ".join(shared)) if others else None
    if hit is None:
        return None
    subject = hit.group("subject")
    while subject[0].islower() and " of " in subject:  # "birth of Ada Bell", if all prompts are about a birth
        subject = subject.split(" of ", 1)[1]
    return subject if subject in prompt else None


def _tests(record: Record, axis: str, probes: list[RawRow], tests: list[RawRow]) -> None:
    """Append the probes of an axis, and for each test which probes it has and on what it depends."""
    for test in record.children(*_SPELLINGS.get(axis, (axis,))):
        first = len(probes)
        for query in test.children("test_queries"):
            probes += make_probe(query, axis, query.text("prompt"), query.groups("answers"), match="all")
        conditions = [
            {"prompt": c.text("prompt"), "ground_truth": c.groups("answers")}
            for c in test.children("condition_queries")
        ]
        if len(probes) > first:
            tests.append(
                {
                    "name": axis,
                    "probes": list(range(first, len(probes))),
                    "condition": test.text("test_condition") or "OR",
                    "condition_queries": conditions,
                }
            )


@register_records({f"ripple_edits/{part}": _source(part) for part in ("recent", "random", "popular")})
def ripple_row(record: Record, *, dataset: str, split: str, seed: int | None = None) -> Iterator[RawRow]:
    """Yield the row of one record; none, counted, if target and prompt cannot be told apart."""
    edit = record.child("edit")
    statement = edit.need("prompt")
    locality: list[RawRow] = []
    portability: list[RawRow] = []
    tests: list[RawRow] = []
    for axis in LOCALITY:
        _tests(record, axis, locality, tests)
    for axis in PORTABILITY:
        _tests(record, axis, portability, tests)
    aliased = [p for p in portability if p["name"] == "Subject_Aliasing"]
    answers = flat(group for p in aliased for group in p["ground_truth"])
    original = edit.children("original_fact")
    old = next((fact.text("prompt") for fact in original), None)
    halves = split_statement(statement, answers, old)
    if halves is None:
        record.report.drop("no target to be told from the prompt")
        return
    prompt, target = halves
    truth = []
    if old and old.startswith(prompt + " "):
        truth = [old[len(prompt) :].strip().removesuffix(".").rstrip()]
    others = [p["prompt"] for p in locality if p["name"] == "Relation_Specificity"]
    subject = guess_subject(prompt, others)
    extra = {**record.rest(), "statement": statement, "edit": edit.rest(), "tests": tests}
    if subject:
        extra["subject_is_guessed"] = True
    yield make_row(
        record,
        dataset,
        prompt,
        subject=subject,
        target_new=target,
        ground_truth=[t for t in truth if t],
        locality=locality,
        portability=portability,
        extra=extra,
    )

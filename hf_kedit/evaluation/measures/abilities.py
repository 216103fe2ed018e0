"""General abilities of a model, to see what editing costs it: the eight tasks of Gu et al. (2024).

"Model Editing Can Hurt General Abilities of Large Language Models" measures reasoning, NLI, open- and closed-domain
QA, dialogue, summarization, NER and sentiment, each with one prompt and a short greedy continuation. A task is a
list of `AbilityExample` that `load_ability` makes from a local file, rows in memory, or a data set of the Hub. The
published code has defects (see `ABILITIES`), so that these numbers are for comparing a model with itself, before and
after.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...data.normalise import RawRow
from ...errors import DataError, check_choice, check_count
from ...storage.records import read_rows, rows_given
from ..asking.batching import TOKEN_BUDGET
from ..asking.generation import generate_answers
from . import metrics
from .texts import rouge

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Ability(ABC):
    """Something that a model can do, measured before, along and after edits."""

    name: str
    """Under which the scores stand in a report."""

    @abstractmethod
    def measure(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, token_budget: int = TOKEN_BUDGET
    ) -> dict[str, Any]:
        """Measure a model as it is: ``score`` (a fraction of 1), ``metric``, ``n`` and what else there is."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything that decides the score, JSON-ready."""


@dataclass(frozen=True)
class AbilityExample:
    """One prompt and the accepted answers."""

    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """How one of the eight tasks asks and scores.

    Args:
        examples: row of a data set → its examples.
        score: (reply, accepted answers) → score in [0, 1]; ``None`` where the reply cannot be read.
        metric: name of the score.
        max_new_tokens: of a reply. Published are 1 for classes; 3 let words of several tokens be read.
        columns: of a row, for error messages.
        hub: id, configuration and split of a public data set with such rows, if one loads without a script.
    """

    examples: Callable[[RawRow], Iterable[AbilityExample]]
    score: Callable[[str, Sequence[str]], float | None]
    metric: str
    max_new_tokens: int
    columns: str
    hub: tuple[str, str | None, str] | None = None


@dataclass(frozen=True)
class AbilityTask(Ability):
    """Examples of one of the eight tasks; made by `load_ability`.

    Args:
        name: for the report.
        task: one of `ABILITIES`.
        examples: what is asked.
        max_new_tokens: of a reply.
    """

    name: str
    task: str
    examples: tuple[AbilityExample, ...]
    max_new_tokens: int

    def measure(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, token_budget: int = TOKEN_BUDGET
    ) -> dict[str, Any]:
        """Ask all examples; a reply that cannot be read scores 0 and is counted in ``n_unparsable``."""
        prompts = [example.prompt for example in self.examples]
        replies = generate_answers(
            model, tokenizer, prompts, self.max_new_tokens, token_budget, cut_at_newline=self.task != "summarization"
        )
        task = ABILITIES[self.task]
        scores = [task.score(r.text, example.answers) for r, example in zip(replies, self.examples, strict=True)]
        return {
            "score": metrics.mean(score or 0.0 for score in scores),
            "metric": task.metric,
            "n": len(scores),
            "n_unparsable": sum(score is None for score in scores),
        }

    def settings(self) -> dict[str, Any]:
        content = json.dumps([[example.prompt, *example.answers] for example in self.examples])
        return {
            "task": self.task,
            "max_new_tokens": self.max_new_tokens,
            "examples_sha256": hashlib.sha256(content.encode()).hexdigest(),
        }


def load_ability(
    task: str,
    source: str | Path | Iterable[RawRow] | None = None,
    *,
    split: str | None = None,
    config: str | None = None,
    limit: int | None = None,
    max_new_tokens: int | None = None,
    name: str | None = None,
) -> AbilityTask:
    """Make an ability of one of the eight tasks.

    Args:
        task: one of `ABILITIES`.
        source: path of a JSON, JSONL or CSV file; rows (dicts, or a ``datasets.Dataset``); or the id of a data set of
            the Hub. Default: the task's own public data set, where there is one.
        split: of a data set of the Hub.
        config: of a data set of the Hub.
        limit: take the first so many rows.
        max_new_tokens: of a reply; default: the task's.
        name: for the report; default: the task's name.

    Raises:
        EvaluationError: for an unknown task.
        DataError: if there is no data set, it cannot be read, or its rows lack what the task needs.
    """
    check_choice("ability", task, ABILITIES)
    for what, number in (("limit", limit), ("max_new_tokens", max_new_tokens)):
        if number is not None:
            check_count(what, number)
    chosen = ABILITIES[task]
    examples: list[AbilityExample] = []
    for number, row in enumerate(_rows(task, source, split, config)):
        if number == limit:
            break
        try:
            examples += chosen.examples(row)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise DataError(
                f"{task}, row {number}: needs {chosen.columns} ({type(error).__name__}: {error})"
            ) from error
    if not examples:
        raise DataError(f"{task}: the data set has no usable row; a row needs {chosen.columns}")
    return AbilityTask(name or task, task, tuple(examples), max_new_tokens or chosen.max_new_tokens)


def _rows(
    task: str, source: str | Path | Iterable[RawRow] | None, split: str | None, config: str | None
) -> Iterable[RawRow]:
    if isinstance(source, Path) or (isinstance(source, str) and os.path.isfile(source)):
        return read_rows(source)
    if source is not None and not isinstance(source, str):
        return rows_given(source)
    public = ABILITIES[task].hub if source is None else (source, None, "test")
    if public is None:
        raise DataError(f"{task}: no public data set loads without a script; pass a file whose rows have"
                        f" {ABILITIES[task].columns}")  # fmt: skip
    import datasets

    try:
        return datasets.load_dataset(public[0], config or public[1], split=split or public[2], streaming=False)
    except Exception as error:  # whatever the Hub client or the parser raises
        raise DataError(f"{task}: cannot load the data set {public[0]!r}: {error}") from error


# ---------------------------------------------------------------------- the tasks: rows → prompts


def _reasoning(row: RawRow) -> Iterator[AbilityExample]:
    chain, _, number = str(row["answer"]).rpartition("####")
    if not chain:
        raise ValueError("the answer has no '####' before its number")
    prompt = (
        f"Q: {row['question']} A:Let's think step by step. {chain.strip()} Therefore, the answer (arabic numerals) is:"
    )
    yield AbilityExample(prompt, (number.strip().replace(",", ""),))


def _nli(row: RawRow) -> Iterator[AbilityExample]:
    answer = ("True", "False")[int(row["label"])]  # GLUE: 0 is entailment
    yield AbilityExample(f"{row['sentence1']} entails the {row['sentence2']}. True or False? answer:", (answer,))


def _open_qa(row: RawRow) -> Iterator[AbilityExample]:
    answers = row["answer"] if "answer" in row else row["answers"]
    accepted = (answers,) if isinstance(answers, str) else tuple(map(str, answers))
    passage = row.get("passage")
    if passage:
        opening = f"Refer to the passage below and answer the following question. Passage: {passage} "
    else:
        opening = "Answer the following question. "
    yield AbilityExample(f"{opening}Question: {row['question']} Answer:", accepted)


def _closed_qa(row: RawRow) -> Iterator[AbilityExample]:
    prompt = (
        "Please answer the given question based on the passage. The answer should be exact 'yes' or 'no'."
        f" passage: {row['passage']} question: {row['question']} answer:"
    )
    answer = row["answer"] if "answer" in row else row["label"]
    yield AbilityExample(prompt, ("yes" if answer in (True, 1, "yes", "true") else "no",))


def _dialogue(row: RawRow) -> Iterator[AbilityExample]:
    options = row["options"]
    listed = " ".join(f"{letter}: {option}" for letter, option in zip("ABCD", options, strict=True))
    answer = row["answer"] if "answer" in row else row["answers"]
    letter = answer if isinstance(answer, str) else "ABCD"[int(answer)]
    yield AbilityExample(f"{row['article']} {listed} Among A through D, the answer is", (letter.strip().upper(),))


def _summarization(row: RawRow) -> Iterator[AbilityExample]:
    yield AbilityExample(f"{row['dialogue']}\nTL;DR:", (str(row["summary"]),))


ENTITY_TYPES = {"PER": "Person", "LOC": "Location", "ORG": "Organization", "MISC": "Miscellaneous"}
_CONLL_TAGS = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC")


def _ner(row: RawRow) -> Iterator[AbilityExample]:
    """One example per type of entity that occurs; ``entities`` is type → texts, or CoNLL's tokens and tags."""
    text = row["text"] if "text" in row else " ".join(row["tokens"])
    entities = row["entities"] if "entities" in row else _tagged(row["tokens"], row["ner_tags"])
    for kind, texts in entities.items():
        if texts:
            kind = ENTITY_TYPES.get(kind, kind)
            prompt = f"Please identify {kind} Entity from the given text. Text: {text} Entity:"
            yield AbilityExample(prompt, tuple(map(str, texts)))


def _tagged(tokens: Sequence[str], tags: Sequence[int | str]) -> dict[str, list[str]]:
    """Type → entities, from tags in the BIO scheme (texts, or numbers in CoNLL-2003's order)."""
    by_type: dict[str, list[str]] = {}
    for token, tag in zip(tokens, tags, strict=True):
        place, _, kind = (_CONLL_TAGS[tag] if isinstance(tag, int) else tag).partition("-")
        if place == "I" and by_type.get(kind):
            by_type[kind][-1] += f" {token}"
        elif kind:
            by_type.setdefault(kind, []).append(token)
    return by_type


def _sentiment(row: RawRow) -> Iterator[AbilityExample]:
    prompt = (
        "For each snippet of text, label the sentiment of the text as positive or negative. The answer should be exact"
        f" 'positive' or 'negative'. text: {row['sentence']} answer:"
    )
    yield AbilityExample(prompt, (("negative", "positive")[int(row["label"])],))


# ---------------------------------------------------------------------- the tasks: replies → scores


def _number(reply: str, answers: Sequence[str]) -> float | None:
    """Whether the number occurs among those of the reply; as a whole, where the published code takes any substring."""
    numbers = re.findall(r"-?\d+(?:\.\d+)?", reply.replace(",", ""))
    return float(answers[0] in numbers) if numbers else None


def _choice(*words: str) -> Callable[[str, Sequence[str]], float | None]:
    """Whether the first of these words in the reply is the right one; cut-off words count if they can only be one."""

    def score(reply: str, answers: Sequence[str]) -> float | None:
        for word in re.findall(r"[a-z]+", reply.lower()):
            meant = [w for w in words if w.lower() == word or (len(word) > 2 and w.lower().startswith(word))]
            if len(meant) == 1:
                return float(meant[0] == answers[0])
        return None

    return score


def _span(reply: str, answers: Sequence[str]) -> float:
    return max(metrics.contains(reply, answer) for answer in answers)


def _entities(reply: str, answers: Sequence[str]) -> float:
    """Share of the entities that the reply names: a recall, published under the name F1."""
    return sum(metrics.contains(reply, answer) for answer in answers) / len(answers)


def _rouge(reply: str, answers: Sequence[str]) -> float:
    scores = rouge(reply, answers[0])
    return sum(scores[name]["f"] for name in ("rouge1", "rouge2", "rougeL")) / 3


ABILITIES: dict[str, Task] = {
    # The prompt holds the gold chain of thought: it asks for little more than the last step.
    "reasoning": Task(
        examples=_reasoning,
        score=_number,
        metric="accuracy",
        max_new_tokens=5,
        hub=("openai/gsm8k", "main", "test"),
        columns="'question' and 'answer' (… #### n)",
    ),
    "nli": Task(
        examples=_nli,
        score=_choice("True", "False"),
        metric="accuracy",
        max_new_tokens=3,
        hub=("nyu-mll/glue", "rte", "validation"),
        columns="'sentence1', 'sentence2' and 'label' (0: entailment)",
    ),
    # Published with the passages of Natural Questions; without a passage the question is asked alone.
    "open_qa": Task(
        examples=_open_qa,
        score=_span,
        metric="answer contained",
        max_new_tokens=20,
        hub=("google-research-datasets/nq_open", None, "validation"),
        columns="'question', 'answer' and, if there is one, 'passage'",
    ),
    "closed_qa": Task(
        examples=_closed_qa,
        score=_choice("yes", "no"),
        metric="accuracy",
        max_new_tokens=3,
        hub=("google/boolq", None, "validation"),
        columns="'question', 'passage' and 'answer'",
    ),
    "dialogue": Task(
        examples=_dialogue,
        score=_choice("A", "B", "C", "D"),
        metric="accuracy",
        max_new_tokens=3,
        columns="'article', four 'options' and 'answer' (A to D)",
    ),
    "summarization": Task(
        examples=_summarization,
        score=_rouge,
        metric="mean of ROUGE-1, -2, -L",
        max_new_tokens=25,
        columns="'dialogue' and 'summary'",
    ),
    "ner": Task(
        examples=_ner,
        score=_entities,
        metric="recall",
        max_new_tokens=10,
        columns="'text' and 'entities' (type → texts), or 'tokens' and 'ner_tags'",
    ),
    "sentiment": Task(
        examples=_sentiment,
        score=_choice("positive", "negative"),
        metric="accuracy",
        max_new_tokens=3,
        hub=("nyu-mll/glue", "sst2", "validation"),
        columns="'sentence' and 'label' (1: positive)",
    ),
}
"""The tasks by name."""

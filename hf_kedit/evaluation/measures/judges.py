"""Judges: something that decides whether an answer is right. A function, a text comparison, or a language model.

A verdict is a number in [0, 1], or ``None`` where the judge's reply could not be read: such a probe is left out and
listed, never counted as wrong. Verdicts are remembered, in memory and, if asked, in a file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from ...errors import EvaluationError, check_count, shown
from ...logging import get_logger, warn_once
from ...remote.backend import chat_reply
from ...remote.endpoint import Endpoint
from ...storage.files import named_path
from ...storage.parsing import parse_json
from ..asking.generation import generate_answers
from . import metrics

logger = get_logger(__name__)
Verdict = float | None
PROMPT_VERSION = "1"
INSTRUCTION = """You grade answers. Below are a question (or the beginning of a sentence), reference answers, and the \
answer of a model. The model's answer is correct if it states all key information of at least one reference, \
contradicts none of it, and does not repeat itself endlessly. Wording, order and extra harmless detail do not matter.

Question: {question}
Reference answers: {references}
Answer of the model: {prediction}

Reply with a single letter: A if the answer is correct, B if it is incorrect."""


def parse_verdict(reply: str) -> bool | None:
    """Read a judge's reply: ``A`` or ``CORRECT`` is true, ``B`` or ``INCORRECT`` false, anything else ``None``.

    Only the beginning counts, regardless of case and punctuation. A sentence that happens to begin with the article
    "a" is no verdict.
    """
    verdict = re.match(r"\W*(incorrect|correct|[ab])\b(.*)", reply.strip(), flags=re.IGNORECASE | re.DOTALL)
    if not verdict:
        return None
    word, rest = verdict[1].upper(), verdict[2]
    if word in ("A", "B"):
        alone = not rest.strip() or re.match(r"\s*[^\w\s'’]|\s*\n|\s*(in)?correct\b", rest, flags=re.IGNORECASE)
        if not alone:
            return None
    return word in ("A", "CORRECT")


class Judge(ABC):
    """Base class: remembers verdicts and asks for several at a time.

    Args:
        cache_path: JSONL file where verdicts are kept across processes; none by default.
        max_workers: verdicts asked for at the same time.
    """

    name: str = "judge"

    def __init__(self, cache_path: str | Path | None = None, max_workers: int = 1):
        check_count("max_workers", max_workers)
        self.cache_path = None if cache_path is None else named_path(cache_path, "cache_path", EvaluationError)
        self.max_workers = max_workers
        self._verdicts: dict[str, Verdict] = {}
        self._lock = threading.Lock()
        if self.cache_path is not None and self.cache_path.exists():
            self._verdicts |= _read_verdicts(self.cache_path)

    @abstractmethod
    def ask(self, question: str, references: Sequence[str], prediction: str) -> Verdict:
        """Judge one answer; ``None`` if no verdict could be had."""

    def settings(self) -> dict[str, Any]:
        """What decides the verdicts, JSON-ready; part of the key under which they are remembered."""
        return {"judge": self.name}

    def __call__(self, question: str, references: Sequence[str], prediction: str) -> Verdict:
        """Judge one answer, from memory if it was judged before."""
        key = self._key(question, references, prediction)
        with self._lock:
            if key in self._verdicts:
                return self._verdicts[key]
        verdict = self.ask(question, references, prediction)
        with self._lock:
            self._verdicts[key] = verdict
            # An unreadable reply is not kept in the file: the next process may have more luck.
            if self.cache_path is not None and verdict is not None:
                try:
                    self.cache_path.parent.mkdir(parents=True, exist_ok=True)
                    with self.cache_path.open("a", encoding="utf-8") as file:
                        file.write(json.dumps({"key": key, "verdict": verdict}) + "\n")
                except OSError as error:
                    warn_once(logger, f"verdicts cannot be kept in {str(self.cache_path)!r}: {error}")
        return verdict

    def judge_all(self, items: Sequence[tuple[str, Sequence[str], str]]) -> None:
        """Judge many answers, ``max_workers`` at a time; the verdicts are then remembered."""
        distinct = list({self._key(*item): item for item in items}.values())
        if self.max_workers == 1 or len(distinct) < 2:
            return  # they will be asked for one by one
        with ThreadPoolExecutor(self.max_workers) as pool:
            for future in [pool.submit(self, *item) for item in distinct]:
                future.result()

    def _key(self, question: str, references: Sequence[str], prediction: str) -> str:
        text = json.dumps([self.settings(), question, list(references), prediction], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def _read_verdicts(path: Path) -> dict[str, Verdict]:
    """What a file of verdicts holds; lines that are none are passed over, and these verdicts are asked for again.

    Raises:
        EvaluationError: if the file cannot be read.
    """
    verdicts: dict[str, Verdict] = {}
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise EvaluationError(f"the verdicts in {str(path)!r} cannot be read: {error}") from error
    unread = 0
    for line in filter(str.strip, lines):
        try:
            entry = parse_json(line, str(path), EvaluationError)
            verdict = entry["verdict"]
            if not isinstance(entry["key"], str) or not is_verdict(verdict):
                raise TypeError(f"{verdict!r} is no verdict")
            verdicts[entry["key"]] = float(verdict)
        except (EvaluationError, KeyError, TypeError):  # cut off when the process was killed, or damaged
            unread += 1
    if unread:
        logger.warning("%s: %d lines are no verdicts and are passed over", path, unread)
    return verdicts


def is_verdict(value: Any) -> bool:
    """Whether a value is a verdict that was given: a bool, or a number in [0, 1]."""
    return isinstance(value, (bool, int, float)) and 0 <= value <= 1


class ExactMatchJudge(Judge):
    """Right if the answer equals a reference after normalisation. Needs no model."""

    name = "exact match"

    def ask(self, question: str, references: Sequence[str], prediction: str) -> Verdict:
        return max((metrics.exact(prediction, r) for r in references), default=None)


class CallableJudge(Judge):
    """Asks a function ``(question, references, prediction)`` for a bool, a number in [0, 1], or ``None``.

    Args:
        function: called for every answer.
        name: for the report; default: the function's own name.
        cache_path: see `Judge`. Verdicts are kept under ``name``: change it when the function changes.
        max_workers: see `Judge`; the function must bear to be called from several threads if it is above 1.
    """

    def __init__(
        self,
        function: Callable[[str, Sequence[str], str], bool | float | None],
        name: str | None = None,
        cache_path: str | Path | None = None,
        max_workers: int = 1,
    ):
        super().__init__(cache_path, max_workers)
        self.function = function
        self.name = name or str(getattr(function, "__name__", "callable"))

    def ask(self, question: str, references: Sequence[str], prediction: str) -> Verdict:
        value = self.function(question, references, prediction)
        if value is None:
            return None
        if not is_verdict(value):
            raise EvaluationError(
                f"the judge {self.name!r} returned {shown(value)}; return a bool or a number in [0, 1]"
            )
        return float(value)


class ModelJudge(Judge):
    """A language model that is asked with `INSTRUCTION` and whose reply is read by `parse_verdict`.

    Args:
        name: of the model, for the report.
        instruction: with the places ``{question}``, ``{references}`` and ``{prediction}``.
        attempts: how often it is asked when its reply cannot be read.
        cache_path: see `Judge`.
        max_workers: see `Judge`.
    """

    def __init__(
        self,
        name: str,
        instruction: str = INSTRUCTION,
        attempts: int = 2,
        cache_path: str | Path | None = None,
        max_workers: int = 1,
    ):
        if not isinstance(name, str) or not isinstance(instruction, str):
            wrong = instruction if isinstance(name, str) else name
            raise EvaluationError(f"the judge's name and instruction must be texts, not {shown(wrong)}")
        for place in ("{question}", "{references}", "{prediction}"):
            if place not in instruction:
                raise EvaluationError(f"the judge's instruction lacks {place}")
        super().__init__(cache_path, max_workers)
        self.name, self.instruction, self.attempts = name, instruction, max(1, attempts)

    @abstractmethod
    def reply(self, prompt: str) -> str:
        """The model's reply to a prompt."""

    def settings(self) -> dict[str, Any]:
        own = self.instruction == INSTRUCTION
        version = PROMPT_VERSION if own else hashlib.sha256(self.instruction.encode()).hexdigest()[:12]
        return {"judge": self.name, "prompt_version": version}

    def ask(self, question: str, references: Sequence[str], prediction: str) -> Verdict:
        # Plain replacement, in one pass: braces in the texts are harmless and nothing is filled in twice.
        texts = {"question": question, "references": " | ".join(references), "prediction": prediction}
        prompt = re.sub(r"\{(question|references|prediction)\}", lambda m: texts[m[1]], self.instruction)
        for _ in range(self.attempts):
            verdict = parse_verdict(self.reply(prompt))
            if verdict is not None:
                return float(verdict)
        warn_once(logger, f"the judge {self.name!r} gave replies that are no verdict; these probes are left out")
        return None


class OpenAICompatibleJudge(ModelJudge):
    """Asks an OpenAI-compatible endpoint (``/chat/completions``) at temperature 0.

    Args:
        base_url: up to and including ``/v1``.
        model: name of the judging model.
        api_key_env: environment variable that holds the key; ``None`` for a server without keys.
        fallback: ``"exact"`` compares texts where no answer can be had; otherwise that is an error.
        timeout: seconds within which one request must be answered, from the connection to the last byte.
        retries: further requests after a failure that may pass (429, 5xx, no connection, a broken answer).
        wait: seconds before the first further request; doubles each time.
        max_tokens: of a reply.
        instruction: see `ModelJudge`.
        cache_path: see `Judge`.
        max_workers: see `Judge`.

    Raises:
        EvaluationError: if the address cannot be used, or the environment variable is not set and there is no
            fallback.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key_env: str | None = "OPENAI_API_KEY",
        *,
        fallback: Literal["exact"] | None = None,
        timeout: float = 60.0,
        retries: int = 4,
        wait: float = 1.0,
        max_tokens: int = 8,
        instruction: str = INSTRUCTION,
        cache_path: str | Path | None = None,
        max_workers: int = 8,
    ):
        super().__init__(model, instruction, cache_path=cache_path, max_workers=max_workers)
        if fallback not in (None, "exact"):
            raise EvaluationError(f"fallback must be 'exact' or None, not {shown(fallback)}")
        check_count("max_tokens", max_tokens)
        self.endpoint = Endpoint(
            *(base_url, "/chat/completions", api_key_env, timeout, retries, wait), role="judge", error=EvaluationError
        )
        self.fallback, self.max_tokens = fallback, max_tokens
        self.fallbacks = 0
        if api_key_env is not None and not os.environ.get(api_key_env) and fallback is None:
            raise EvaluationError(
                f"the judge needs a key in the environment variable {api_key_env}; set it, or pass api_key_env=None"
                " for a server without keys, or fallback='exact'"
            )

    def ask(self, question: str, references: Sequence[str], prediction: str) -> Verdict:
        try:
            return super().ask(question, references, prediction)
        except EvaluationError as error:
            if self.fallback is None:
                raise
            self.fallbacks += 1
            warn_once(logger, f"the judge cannot be had ({error}); answers are compared as texts instead")
            return max((metrics.exact(prediction, r) for r in references), default=None)

    def reply(self, prompt: str) -> str:
        return self.endpoint.ask(
            {
                "model": self.name,
                "messages": [{"role": "user", "content": prompt}],
                "temperature": 0,
                "max_tokens": self.max_tokens,
            },
            chat_reply,
        )


class HFModelJudge(ModelJudge):
    """A transformers model in memory as the judge; greedy, with the tokenizer's chat template if it has one.

    Args:
        model: causal language model.
        tokenizer: of the model.
        name: for the report; default: the model's own.
        max_tokens: of a reply.
        cache_path: see `Judge`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str | None = None,
        max_tokens: int = 8,
        cache_path: str | Path | None = None,
    ):
        super().__init__(name or model.config.name_or_path or type(model).__name__, attempts=1, cache_path=cache_path)
        self.model, self.tokenizer, self.max_tokens = model, tokenizer, max_tokens

    def reply(self, prompt: str) -> str:
        chat = bool(self.tokenizer.chat_template)
        text = prompt if chat else prompt + "\nGrade:"
        answers = generate_answers(
            self.model,
            self.tokenizer,
            [text],
            self.max_tokens,
            prompt_format="chat" if chat else "raw",
            cut_at_newline=False,
        )
        return answers[0].text

"""Backends: what takes a text and gives a text. A function, or a server that speaks OpenAI's protocol."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ..errors import BackendError, shown
from ..text.chat import Messages, with_system
from ..text.scripts import HALF, is_writable
from .endpoint import Endpoint

TextOrMessages = str | Messages
"""A text, or a conversation as ``[{"role": "user", "content": …}, …]``."""


class TextBackend(Protocol):
    """A model of which nothing is known but what it answers. Any object with these methods is one.

    A backend may also have ``name`` (for reports and saved edits), ``chat`` (whether a text is put to it as what a
    user says, so that it answers instead of going on), ``max_workers`` (requests that it bears at the same time; 1
    otherwise), and ``target_scores(prompt, target) -> TargetScores | None``, which says more than `loglikelihood`.
    """

    def generate(self, prompt: TextOrMessages, max_new_tokens: int, stop: Sequence[str], temperature: float) -> str:
        """The new text behind a prompt.

        Args:
            prompt: a text or a conversation.
            max_new_tokens: at most so many tokens.
            stop: end before the first of these texts.
            temperature: 0 for the most probable text.
        """

    def loglikelihood(self, prompt: str, target: str) -> float | None:
        """Natural logarithm of the probability of ``target`` behind ``prompt``; ``None``: it cannot be had."""


@dataclass(frozen=True)
class TargetScores:
    """What a model thinks of a given continuation, token by token.

    Args:
        log_probabilities: natural logarithms, one per token.
        most_probable: whether the token is the one that the model would have written.
    """

    log_probabilities: tuple[float, ...]
    most_probable: tuple[bool, ...]


def check_asked(prompt: Any, max_new_tokens: Any, stop: Any, temperature: Any) -> tuple[str, ...]:
    """Check what a backend is asked, and return the texts before which the answer ends.

    Raises:
        BackendError: if it is not as `TextBackend.generate` describes it.
    """
    is_chat = isinstance(prompt, Sequence) and not isinstance(prompt, str)
    said = prompt if is_chat else [{"role": "user", "content": prompt}]
    if not said:
        raise BackendError("a conversation has at least one message")
    for turn in said:
        texts = [turn.get("role"), turn.get("content")] if isinstance(turn, Mapping) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise BackendError(
                f'{shown(prompt)} is neither a text nor a conversation such as [{{"role": "user", "content": "…"}}]'
            )
        if not all(is_writable(str(text)) for text in texts):
            raise BackendError(f"the prompt {HALF}")
    stops = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, Sequence) else (stop,)
    if not all(isinstance(text, str) and text and is_writable(text) for text in stops):
        raise BackendError(f"stop must be texts that are not empty, not {shown(stop)}")
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise BackendError(f"max_new_tokens must be a whole number of at least 1, not {shown(max_new_tokens)}")
    number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
    if not number or not 0 <= temperature < math.inf:
        raise BackendError(f"temperature must be a number of at least 0, not {shown(temperature)}")
    return stops


class OpenAICompatibleBackend:
    """A model behind a server that speaks OpenAI's protocol: a provider, vLLM, llama.cpp, Ollama, TGI …

    The key is read from the environment for every request, and is kept nowhere.

    Args:
        base_url: up to and including ``/v1``.
        model: name of the model there.
        api_key_env: name of the environment variable that holds the key; ``None`` for a server without keys.
        api: ``"chat"`` (``/chat/completions``; a text becomes what the user says), or ``"completions"``
            (``/completions``; the model goes on with the text, and log-probabilities of given texts can be had where
            the server knows ``echo``).
        system: what the system says in every chat that brings no system message of its own.
        timeout: seconds within which one request must be answered.
        retries: further requests after a failure that may pass.
        wait: seconds before the first further request; doubles each time, unless the server asks for longer.
        max_workers: requests at the same time.
        options: further fields of every request (``{"seed": 1}``); ``None`` takes a field out:
            ``{"max_tokens": None, "max_completion_tokens": 64}``.

    Raises:
        BackendError: if the address cannot be used or a number is out of range.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key_env: str | None = "OPENAI_API_KEY",
        *,
        api: Literal["chat", "completions"] = "chat",
        system: str | None = None,
        timeout: float = 60.0,
        retries: int = 4,
        wait: float = 1.0,
        max_workers: int = 4,
        options: Mapping[str, Any] | None = None,
    ):
        if api not in ("chat", "completions"):
            raise BackendError(f"api must be 'chat' or 'completions', not {shown(api)}")
        if not isinstance(model, str) or not model.strip() or not is_writable(model):
            raise BackendError(f"model must be the name of a model of the server, not {shown(model)}")
        if isinstance(max_workers, bool) or not isinstance(max_workers, int) or max_workers < 1:
            raise BackendError(f"max_workers must be a whole number of at least 1, not {shown(max_workers)}")
        if system is not None and not (isinstance(system, str) and is_writable(system)):
            raise BackendError(f"system must be a text, not {shown(system)}")
        if system is not None and api == "completions":
            raise BackendError("system= belongs to api='chat'; write it in front of the texts yourself")
        self.name, self.chat, self.system, self.max_workers = model, api == "chat", system, max_workers
        try:
            self.options = {**(options or {})}
            json.dumps(self.options, allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise BackendError(f"options must be fields that JSON can hold, not {shown(options)}: {error}") from error
        path = "/chat/completions" if self.chat else "/completions"
        self.endpoint = Endpoint(base_url, path, api_key_env, timeout, retries, wait)

    def __repr__(self) -> str:
        return f"OpenAICompatibleBackend({self.name!r} of {self.endpoint.shown})"

    def generate(
        self, prompt: TextOrMessages, max_new_tokens: int = 64, stop: Sequence[str] = (), temperature: float = 0.0
    ) -> str:
        """The new text behind a prompt.

        Raises:
            BackendError: if there is no readable answer, or what is asked is not as `check_asked` wants it, or it is a
                conversation and the server completes texts.
        """
        stops = check_asked(prompt, max_new_tokens, stop, temperature)
        common: dict[str, Any] = {"max_tokens": max_new_tokens, "temperature": temperature}
        if stops:
            common["stop"] = list(stops)
        if not self.chat:
            if not isinstance(prompt, str):
                raise BackendError("a conversation needs api='chat'; this backend completes texts")
            return self.endpoint.ask(self._request(common | {"prompt": prompt}), _completed_text)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        told = with_system(messages, self.system, "")
        return self.endpoint.ask(self._request(common | {"messages": told}), chat_reply)

    def target_scores(self, prompt: str, target: str) -> TargetScores | None:
        """Token by token, how probable a continuation is; ``None`` in a chat, or where the server does not say.

        Args:
            prompt: text, with whatever stands between it and the target.
            target: its continuation.
        """
        if self.chat or not target:
            return None
        # One more token is asked for, because some servers refuse to write none; it is not looked at.
        fields = {"prompt": prompt + target, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
        return self.endpoint.ask(self._request(fields), lambda answer: _scores_in(answer, prompt, target))

    def loglikelihood(self, prompt: str, target: str) -> float | None:
        """Logarithm of the probability of a continuation; ``None`` in a chat, or where the server does not say."""
        scores = self.target_scores(prompt, target)
        return None if scores is None else sum(scores.log_probabilities)

    def _request(self, fields: dict[str, Any]) -> dict[str, Any]:
        chosen = {"model": self.name, **fields, **self.options}
        return {name: value for name, value in chosen.items() if value is not None}


def chat_reply(answer: Any) -> str:
    """The text in an answer of ``/chat/completions``; a model that says nothing gives an empty one."""
    return _text(answer["choices"][0]["message"]["content"])


def _completed_text(answer: Any) -> str:
    return _text(answer["choices"][0]["text"])


def _text(value: Any) -> str:
    if not isinstance(value, str | None):
        raise TypeError("the content is no text")
    return value or ""


def _scores_in(answer: Any, prompt: str, target: str) -> TargetScores | None:
    """The scores of the target's tokens in an answer that repeats prompt and target.

    The target begins with the first token that ends behind the prompt: a space between them may belong to either.
    """
    said = answer["choices"][0].get("logprobs")
    if not said or not said.get("tokens"):
        return None
    tokens, values, best = said["tokens"], said["token_logprobs"], said.get("top_logprobs") or []
    whole, written = prompt + target, "".join(tokens)
    begin = written.find(whole)  # a token in front of the text (BOS) may be written out
    if begin < 0:
        return None
    ends = [end - begin for end in itertools.accumulate(map(len, tokens))]
    places = [
        i
        for i, (end, token) in enumerate(zip(ends, tokens, strict=True))
        if end > len(prompt) and end - len(token) < len(whole)
    ]
    if not places or len(values) != len(tokens) or any(values[i] is None for i in places):
        return None
    chosen = [float(values[i]) for i in places]
    others = [max((best[i] or {}).values(), default=None) if i < len(best) else None for i in places]
    if any(other is None for other in others):
        return TargetScores(tuple(chosen), ())
    return TargetScores(tuple(chosen), tuple(c >= float(o) for c, o in zip(chosen, others, strict=True)))  # type: ignore[arg-type]

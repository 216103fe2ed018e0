"""A chat endpoint that speaks OpenAI's protocol: one question, one short reply, within a time.

The other side may be a server that breaks, dawdles, or answers with something else altogether. Whatever it does, a
call ends in time, takes a bounded amount of memory, and returns a text or raises an `EvaluationError`. No message
holds a key, a password or the query of an address.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Coroutine
from typing import Any

import httpx2

from ...errors import EvaluationError, check_count, shown
from ...storage.display import printable
from ...storage.parsing import parse_json

LARGEST_BODY = 2**20
"""Bytes of an answer; a verdict takes less than a thousand."""
_LONGEST_REMARK = 200
_LONGEST = 10**7
_MAY_PASS = (408, 409, 429)
"""Refusals after which it is worth asking again, besides those of a server that has a problem (5xx)."""


class _Passing(Exception):
    """A failure that another request may not meet."""


class ChatEndpoint:
    """Where questions are sent.

    Args:
        base_url: up to and including ``/v1``.
        api_key_env: environment variable that holds the key; ``None`` for a server without keys.
        timeout: seconds within which one request must be answered, from the connection to the last byte.
        retries: further requests after a failure that may pass (429, 5xx, no connection, a broken answer).
        wait: seconds before the first further request; doubles each time.

    Raises:
        EvaluationError: if the address cannot be used, or a number is out of range.
    """

    def __init__(self, base_url: str, api_key_env: str | None, timeout: float, retries: int, wait: float):
        self._url, self.shown = _checked(base_url)
        if api_key_env is not None and self._url.userinfo:
            raise EvaluationError(
                "base_url names a user and a password, and api_key_env a key; pass one of them (api_key_env=None)"
            )
        if api_key_env is not None and not (isinstance(api_key_env, str) and api_key_env.isidentifier()):
            raise EvaluationError("api_key_env must be the name of an environment variable, or None")
        check_count("retries", retries, 0)
        for what, seconds in (("timeout", timeout), ("wait", wait)):
            number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
            if not number or not 0 <= seconds < _LONGEST or (seconds == 0 and what == "timeout"):
                raise EvaluationError(f"{what} must be a number of seconds above 0, not {shown(seconds)}")
        self.api_key_env, self.timeout, self.retries, self.wait = api_key_env, timeout, retries, wait

    def reply(self, content: dict[str, Any]) -> str:
        """Send a request and return the text of the reply.

        Args:
            content: of the request, JSON-ready.

        Raises:
            EvaluationError: if there is no readable answer.
        """
        headers = {"Accept-Encoding": "identity", **self._authorisation()}
        problem = ""
        for attempt in range(self.retries + 1):
            try:
                return self._text(_finished(self._ask(content, headers)))
            except _Passing as failure:
                problem = str(failure)
            except httpx2.TransportError as failure:
                problem = self._remark(_named(failure))
            except TimeoutError:
                problem = f"no complete answer within {self.timeout:g} seconds"
            except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as failure:
                if isinstance(failure, EvaluationError):
                    raise
                raise EvaluationError(
                    f"the judge at {self.shown} cannot be asked: {self._remark(_named(failure))}"
                ) from None
            if attempt < self.retries:
                time.sleep(self.wait * 2**attempt)
        # What was raised inside may name the key: it is not chained.
        raise EvaluationError(
            f"the judge at {self.shown} cannot be had after {self.retries + 1} requests: {problem}"
        ) from None

    async def _ask(self, content: dict[str, Any], headers: dict[str, str]) -> bytes:
        """One request; the body of an answer with status 200."""
        # The deadline is one for everything: httpx's own are for each single read, and a drip of bytes resets them.
        async with (
            asyncio.timeout(self.timeout),
            httpx2.AsyncClient(timeout=None, follow_redirects=False) as client,
            client.stream("POST", self._url, json=content, headers=headers) as response,
        ):
            status = self._remark(f"{response.status_code} {response.reason_phrase}")  # which may repeat the key
            if response.status_code in _MAY_PASS or response.status_code >= 500:
                raise _Passing(status)
            if response.status_code != 200:  # a redirection, too: it would hand the key to another server
                raise EvaluationError(f"the judge at {self.shown} answered {status}")
            if response.headers.get("Content-Encoding", "").strip().lower() not in ("", "identity"):
                raise EvaluationError(f"the judge at {self.shown} answered in an encoding that was not asked for")
            body = bytearray()
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > LARGEST_BODY:
                    raise EvaluationError(f"the judge at {self.shown} answered more than {LARGEST_BODY:,} bytes")
            return bytes(body)

    def _text(self, body: bytes) -> str:
        """The reply in an answer of the protocol."""
        answer = parse_json(body, f"the answer of the judge at {self.shown}", EvaluationError)
        try:
            text = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise EvaluationError(
                f"the judge at {self.shown} answered in an unknown form: {type(error).__name__}"
            ) from error
        if not isinstance(text, str | None):
            raise EvaluationError(f"the judge at {self.shown} answered in an unknown form: its content is no text")
        return text or ""

    def _authorisation(self) -> dict[str, str]:
        if self.api_key_env is None:
            return {}
        key = os.environ.get(self.api_key_env, "")
        if not key:
            raise EvaluationError(f"the environment variable {self.api_key_env} is not set")
        if not key.isascii() or not key.isprintable() or key != key.strip():
            raise EvaluationError(
                f"the environment variable {self.api_key_env} does not hold a key: there is a space, a line break or"
                " a special character in it"
            )
        return {"Authorization": f"Bearer {key}"}

    def _remark(self, text: str) -> str:
        """What the client or the server says, short and without secrets."""
        for secret in (os.environ.get(self.api_key_env or ""), self._url.username, self._url.password):
            if secret:
                text = text.replace(secret, "…")
        return printable(" ".join(text.split()))[:_LONGEST_REMARK]


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def _checked(base_url: str) -> tuple[httpx2.URL, str]:
    """The address that is asked, and the form of it that people may see.

    Raises:
        EvaluationError: if it cannot be used; the address itself is not repeated, as it may hold a password.
    """
    advice = "it must look like http://localhost:8000/v1 or https://api.example.org/v1"
    try:
        url = httpx2.URL(base_url)
        port = url.port
        if any(character.isspace() for character in base_url):
            raise ValueError("a space")
    except (httpx2.InvalidURL, ValueError, TypeError, AttributeError):
        raise EvaluationError(f"base_url cannot be read: {advice}") from None
    if url.scheme not in ("http", "https") or not url.host or port == 0 or (port or 1) > 65535:
        raise EvaluationError(f"base_url has no usable http:// or https:// address: {advice}")
    url = url.copy_with(path=url.path.rstrip("/") + "/chat/completions", fragment=None)
    return url, str(url.copy_with(username=None, password=None, query=None))


def _finished(question: Coroutine[Any, Any, bytes]) -> bytes:
    """The result of a coroutine, also where a loop is running already (as in a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(question)
    outcome: list[bytes | BaseException] = []

    def run() -> None:
        try:
            outcome.append(asyncio.run(question))
        except BaseException as error:  # is raised again below
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]

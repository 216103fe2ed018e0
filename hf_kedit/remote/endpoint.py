"""A server that speaks OpenAI's protocol: one question, one reply, within a time.

The other side may be a server that breaks, dawdles, limits its callers, or answers with something else altogether.
Whatever it does, a call ends in time, takes a bounded amount of memory, and returns what was asked for or raises a
typed error. No message and no reply holds a key, a password or the query of an address.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx2

from ..errors import BackendError, KeditError, shown
from ..storage.display import printable
from ..storage.parsing import decode, parse_json

T = TypeVar("T")
LARGEST_BODY = 2**20
"""Bytes of an answer; a verdict takes less than a thousand."""
LONGEST_WAIT = 60.0
"""Seconds that a server may ask for before the next request; one that wants more is an error at once."""
_LONGEST_REMARK = 200
_LONGEST = 10**7
_MAY_PASS = (408, 409, 429)
"""Refusals after which it is worth asking again, besides those of a server that has a problem (5xx)."""


class _Passing(KeditError):
    """A failure that another request may not meet.

    Args:
        problem: what happened.
        pause: seconds that the server asks for.
    """

    def __init__(self, problem: str, pause: float = 0.0):
        super().__init__(problem)
        self.pause = pause


class Endpoint:
    """Where questions are sent.

    Args:
        base_url: up to and including ``/v1``.
        path: behind it, such as ``/chat/completions``.
        api_key_env: environment variable that holds the key; ``None`` for a server without keys.
        timeout: seconds within which one request must be answered, from the connection to the last byte.
        retries: further requests after a failure that may pass (429, 5xx, no connection, a broken answer).
        wait: seconds before the first further request; doubles each time. A ``Retry-After`` of the server counts
            where it is longer.
        role: what messages call the other side.
        error: what is raised.

    Raises:
        KeditError: of the class ``error``, if the address cannot be used, or a number is out of range.
    """

    def __init__(
        self,
        base_url: str,
        path: str,
        api_key_env: str | None,
        timeout: float,
        retries: int,
        wait: float,
        *,
        role: str = "model",
        error: type[KeditError] = BackendError,
    ):
        self.error = error
        self._url, shown_url = self._checked(base_url, path)
        self.shown = f"the {role} at {shown_url}"
        if api_key_env is not None and self._url.userinfo:
            raise error(
                "base_url names a user and a password, and api_key_env a key; pass one of them (api_key_env=None)"
            )
        if api_key_env is not None and not (isinstance(api_key_env, str) and api_key_env.isidentifier()):
            raise error("api_key_env must be the name of an environment variable, or None")
        if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
            raise error(f"retries must be a whole number of at least 0, not {shown(retries)}")
        for what, seconds in (("timeout", timeout), ("wait", wait)):
            number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
            if not number or not 0 <= seconds < _LONGEST or (seconds == 0 and what == "timeout"):
                raise error(f"{what} must be a number of seconds above 0, not {shown(seconds)}")
        self.api_key_env, self.timeout, self.retries, self.wait = api_key_env, timeout, retries, wait

    def ask(self, content: dict[str, Any], read: Callable[[Any], T]) -> T:
        """Send a request and return what is read in the answer.

        Args:
            content: of the request, JSON-ready.
            read: takes what is wanted out of the answer (JSON); what it raises for an answer of another form is a
                broken answer.

        Raises:
            KeditError: of the class `error`, if there is no readable answer.
        """
        headers = {"Accept-Encoding": "identity", **self._authorisation()}
        problem = ""
        for attempt in range(self.retries + 1):
            pause = min(self.wait * 2**attempt, LONGEST_WAIT)
            try:
                return self._read(_finished(self._ask(content, headers)), read)
            except _Passing as failure:
                problem, pause = str(failure), max(pause, failure.pause)
                if pause > LONGEST_WAIT:
                    raise self.error(
                        f"{self.shown} answered {problem} and asks to wait {pause:.0f} seconds; try again then"
                    ) from None
            except httpx2.TransportError as failure:
                problem = self._remark(_named(failure))
            except TimeoutError:
                problem = f"no complete answer within {self.timeout:g} seconds"
            except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as failure:
                if isinstance(failure, KeditError):
                    raise
                raise self.error(f"{self.shown} cannot be asked: {self._remark(_named(failure))}") from None
            if attempt < self.retries:
                time.sleep(pause)
        # What was raised inside may name the key: it is not chained.
        raise self.error(f"{self.shown} cannot be had after {self.retries + 1} requests: {problem}") from None

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
                raise _Passing(status, _seconds(response.headers.get("Retry-After", "")))
            if 300 <= response.status_code < 400:  # following it would hand the key to another server
                raise self.error(f"{self.shown} answered {status}")
            if response.headers.get("Content-Encoding", "").strip().lower() not in ("", "identity"):
                raise self.error(f"{self.shown} answered in an encoding that was not asked for")
            body = bytearray()
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > LARGEST_BODY:
                    raise self.error(f"{self.shown} answered more than {LARGEST_BODY:,} bytes")
            if response.status_code != 200:
                raise self.error(f"{self.shown} answered {status}{self._reason(bytes(body))}")
            return bytes(body)

    def _read(self, body: bytes, read: Callable[[Any], T]) -> T:
        """What is wanted of an answer of the protocol."""
        answer = parse_json(self.without_secrets(decode(body, "its answer", _Passing)), "its answer", _Passing)
        try:
            return read(answer)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise _Passing(f"its answer has an unknown form ({type(error).__name__}){self._reason(body)}") from None

    def _reason(self, body: bytes) -> str:
        """What an answer says is wrong, as ``": …"``; empty if it does not say."""
        try:
            said = parse_json(body, "", BackendError)["error"]
            text = said["message"] if isinstance(said, dict) else said
        except (KeditError, KeyError, TypeError, IndexError):
            return ""
        return f": {self._remark(text)}" if isinstance(text, str) and text.strip() else ""

    def _authorisation(self) -> dict[str, str]:
        if self.api_key_env is None:
            return {}
        key = os.environ.get(self.api_key_env, "")
        if not key:
            raise self.error(
                f"the environment variable {self.api_key_env}, which is to hold the key of {self.shown}, is not set"
            )
        if not key.isascii() or not key.isprintable() or " " in key:
            raise self.error(
                f"the environment variable {self.api_key_env} does not hold a key: there is a space, a line break or"
                " a special character in it"
            )
        return {"Authorization": f"Bearer {key}"}

    def without_secrets(self, text: str) -> str:
        """A text in which the key and the address's password are not to be read."""
        for secret in (os.environ.get(self.api_key_env or ""), self._url.username, self._url.password):
            if secret:
                text = text.replace(secret, "…")
        return text

    def _remark(self, text: str) -> str:
        """What the client or the server says, short and without secrets."""
        return printable(" ".join(self.without_secrets(text).split()))[:_LONGEST_REMARK]

    def _checked(self, base_url: str, path: str) -> tuple[httpx2.URL, str]:
        """The address that is asked, and the form of it that people may see.

        Raises:
            KeditError: if it cannot be used; the address itself is not repeated, as it may hold a password.
        """
        advice = "it must look like http://localhost:8000/v1 or https://api.example.org/v1"
        try:
            url = httpx2.URL(base_url)
            port = url.port
            if any(character.isspace() for character in base_url):
                raise ValueError("a space")
        except (httpx2.InvalidURL, ValueError, TypeError, AttributeError):
            raise self.error(f"base_url cannot be read: {advice}") from None
        if url.scheme not in ("http", "https") or not url.host or port == 0 or (port or 1) > 65535:
            raise self.error(f"base_url has no usable http:// or https:// address: {advice}")
        url = url.copy_with(path=url.path.rstrip("/") + path, fragment=None)
        return url, str(url.copy_with(username=None, password=None, query=None))


def _seconds(retry_after: str) -> float:
    """What ``Retry-After`` says: a number of seconds or a date; 0 if it says nothing that can be read."""
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError, OverflowError):  # years beyond what a date can be
            return 0.0
    return max(0.0, seconds) if seconds == seconds else 0.0  # not NaN


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")


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

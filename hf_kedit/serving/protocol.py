"""OpenAI's protocol: what a request may hold, checked before anything is done, and what answers look like.

What this server cannot do, but would be missed (several answers, tools, a form of the answer), is refused by name.
What only concerns OpenAI's own service (users, storage) is passed over. A field that nobody knows is refused, because
it may have been meant.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import KeditError, ModelBusyError, ServeError, UnknownEditError, nearest, shown
from ..journal import Edit
from ..requests import EditRequest
from ..storage.parsing import parse_json
from .answering import Reply, TokenChance

MOST_STOPS, MOST_LOGPROBS, MOST_PROMPTS = 4, 20, 32
_BIGGEST_SEED = 2**63 - 1
_PASSED_OVER = {
    "user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "reasoning_effort", "verbosity",
}  # fmt: skip
# Field → the values of it that ask for nothing.
_NOT_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "logit_bias": ({},), "tools": ([],),
    "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (), "prediction": (),
    "web_search_options": (), "frequency_penalty": (0, 0.0), "presence_penalty": (0, 0.0),
}  # fmt: skip


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class StreamOptions(_Part):
    """What a stream ends with."""

    include_usage: bool = False
    include_obfuscation: bool = False


class AnswerRequest(_Part):
    """What requests for an answer have in common."""

    model: Annotated[str, Field(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=10**9)] | None = None
    seed: Annotated[int, Field(ge=-_BIGGEST_SEED, le=_BIGGEST_SEED)] | None = None
    stop: str | list[str] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts.

        Raises:
            ServeError: if there are too many, or one is empty.
        """
        found = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(found) > MOST_STOPS or not all(found):
            raise ServeError(f"stop takes up to {MOST_STOPS} texts that are not empty", param="stop")
        return found


class CompletionRequest(AnswerRequest):
    """The body of ``/v1/completions``."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @property
    def prompts(self) -> list[str]:
        """All prompts."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    @property
    def top_logprobs_wanted(self) -> int | None:
        """As `AnswerSettings.top_logprobs`."""
        return self.logprobs


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(strict=True)
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a conversation; what clients send along with it (``name``, ``refusal``) does not matter."""

    model_config = ConfigDict(strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def plain(self) -> dict[str, str]:
        """The message as chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(AnswerRequest):
    """The body of ``/v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=10**9)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @property
    def top_logprobs_wanted(self) -> int | None:
        """As `AnswerSettings.top_logprobs`.

        Raises:
            ServeError: if ``top_logprobs`` is asked for without ``logprobs``.
        """
        if self.top_logprobs is not None and not self.logprobs:
            raise ServeError("top_logprobs needs logprobs: true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


A = TypeVar("A", bound=AnswerRequest)


def read_body(data: bytes) -> dict[str, Any]:
    """The JSON object that a body holds.

    Raises:
        ServeError: if it holds none.
    """
    body = parse_json(data, "the body of the request", ServeError)
    if not isinstance(body, dict):
        raise ServeError(f"the body of the request must be a JSON object, not {type(body).__name__}")
    return body


def read_asked(data: bytes, kind: type[A]) -> A:
    """Read and check a request for an answer.

    Raises:
        ServeError: naming the field that is wrong.
    """
    body = {name: value for name, value in read_body(data).items() if name not in _PASSED_OVER}
    for name, nothing in _NOT_SUPPORTED.items():
        value = body.pop(name, None)
        if value is not None and not any(type(value) is type(each) and value == each for each in nothing):
            hint = "; ask once for each answer" if name in ("n", "best_of") else ""
            raise ServeError(f"{name}={shown(value)} is not supported by this server{hint}", param=name)
    unknown = next((name for name in body if name not in kind.model_fields), None)
    if unknown is not None:
        close = nearest(unknown[:100], kind.model_fields)
        raise ServeError(f"unknown field {shown(unknown)}.{close}", param=unknown[:100])
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise _of_validation(error) from None


def _of_validation(error: ValidationError) -> ServeError:
    """The first thing that is wrong, in words."""
    # Of a field that takes several kinds each kind has its own complaint; the deepest one fits best, and before it
    # the one of the kind that was sent.
    found = max(
        error.errors(include_url=False, include_input=False),
        key=lambda each: (len(each["loc"]), not each["type"].endswith("_type")),
    )
    param = ""
    for step in found["loc"]:
        if isinstance(step, int):
            param += f"[{step}]"
        elif step in ("str", "list[str]") or step.startswith(("list[", "constrained", "function-")):
            continue  # the kind that was tried, no field
        else:
            param += f".{step}" if param else step
    what = found["msg"][:1].lower() + found["msg"][1:]
    return ServeError(f"{param}: {what}", param=param)


# ---------------------------------------------------------------------- answers


def error_content(error: KeditError) -> tuple[int, dict[str, Any]]:
    """HTTP status and OpenAI's JSON of an error."""
    status, param, code = 400, None, None
    if isinstance(error, ServeError):
        status, param, code = error.status, error.param, error.code
    elif isinstance(error, UnknownEditError):
        status, code = 404, "edit_not_found"
    elif isinstance(error, ModelBusyError):
        status = 503
    return status, error_json(str(error), status, param, code)


def error_json(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's JSON of an error."""
    kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(
        status, "server_error" if status >= 500 else "invalid_request_error"
    )
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def as_json(content: Any) -> bytes:
    """JSON of any content: characters beyond ASCII as escapes, so that half a character is no error."""
    return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def as_event(content: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + as_json(content) + b"\n\n"


LAST_EVENT = b"data: [DONE]\n\n"


def usage_of(prompt_tokens: int, answers: Sequence[Reply]) -> dict[str, int]:
    """What was read and written, in tokens."""
    written = sum(answer.tokens for answer in answers)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": written,
        "total_tokens": prompt_tokens + written,
    }


class Form:
    """How the answers of one request are written.

    Args:
        head: ``id``, ``created`` and ``model``.
        chat: of a conversation, or of a text.
    """

    def __init__(self, head: Mapping[str, Any], *, chat: bool):
        self._head, self.is_chat = dict(head), chat

    def whole(self, answers: Sequence[Reply], usage: Mapping[str, int], *, logprobs: bool) -> dict[str, Any]:
        """A reply with complete answers."""
        choices = []
        for i, answer in enumerate(answers):
            said: dict[str, Any] = {"text": answer.text}
            if self.is_chat:
                said = {"message": {"role": "assistant", "content": answer.text, "refusal": None}}
            chances = self._chances(answer.chances) if logprobs else None
            choices.append({"index": i, **said, "logprobs": chances, "finish_reason": answer.finish})
        kind = "chat.completion" if self.is_chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": dict(usage)}

    def piece(
        self, index: int, text: str | None, chances: Sequence[TokenChance] | None = None, finish: str | None = None
    ) -> dict[str, Any]:
        """A part of a stream: text, or ``None`` for the part that says who speaks or how it ended."""
        said: dict[str, Any] = {"text": text or ""}
        if self.is_chat:
            delta = {"content": text} if text is not None else {} if finish else {"role": "assistant", "content": ""}
            said = {"delta": delta}
        choice = {"index": index, **said, "logprobs": None, "finish_reason": finish}
        if chances is not None:
            choice["logprobs"] = self._chances(chances)
        return self._chunk([choice])

    def last(self, usage: Mapping[str, int]) -> dict[str, Any]:
        """The part of a stream that says what it took."""
        return {**self._chunk([]), "usage": dict(usage)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            **self._head,
            "object": "chat.completion.chunk" if self.is_chat else "text_completion",
            "choices": choices,
        }

    def _chances(self, chances: Sequence[TokenChance]) -> dict[str, Any]:
        if self.is_chat:
            content = [
                {**_token(c.token, c.logprob), "top_logprobs": [_token(*each) for each in c.top]} for c in chances
            ]
            return {"content": content, "refusal": None}
        return {
            "tokens": [c.token for c in chances],
            "token_logprobs": [c.logprob for c in chances],
            "top_logprobs": [dict(reversed(c.top)) for c in chances],  # of equal texts the likeliest
            "text_offset": [c.offset for c in chances],
        }


def _token(token: str, logprob: float) -> dict[str, Any]:
    """A token as chats show it; its bytes are not known where it is a part of a character."""
    return {"token": token, "logprob": logprob, "bytes": None if "\ufffd" in token else list(token.encode())}


ALL_EDITS = "all"
"""What clients name to take every edit back."""


def check_sent(request: EditRequest) -> EditRequest:
    """The edit request of a client.

    Raises:
        ServeError: if it is called `ALL_EDITS`, or names files, which would be this machine's.
    """
    if request.id == ALL_EDITS:
        raise ServeError(f"an edit cannot be called {ALL_EDITS!r}, which takes every edit back", param="id")
    probes = [p for axes in (request.locality, request.portability) for several in axes.values() for p in several]
    for value in (request.image, request.image_rephrase, *(probe.image for probe in probes)):
        if any(isinstance(one, str) for one in (value if isinstance(value, tuple) else (value,))):
            raise ServeError(
                "send pictures as data:image/…;base64,… URIs; files and addresses are not read", param="image"
            )
    return request


def edit_json(edit: Edit) -> dict[str, Any]:
    """An edit as ``/v1/edits`` lists it."""
    request = edit.request
    return {
        "id": edit.id,
        "object": "edit",
        "created": edit.created,
        "method": edit.method,
        "prompt": request.filled_prompt,
        "subject": request.subject,
        "target_new": request.target_new,
    }

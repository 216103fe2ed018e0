"""The routes of the server: who may ask, how much, and how an answer comes back.

Answers are made in threads (the model makes a thread wait), and their pieces are handed to the event loop. A request
whose client has gone is told so by an event that the model looks at after every token.
"""

from __future__ import annotations

import asyncio
import hmac
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import KeditError, RequestError, ServeError, require_extra
from ..journal import Edit
from ..logging import get_logger
from ..requests import EditRequest
from ..text.chat import chat_frame
from .answering import AnswerSettings, Reply, TokenChance, answer_prompt, asked_ids, context_of, default_sampling
from .protocol import (
    ALL_EDITS,
    LAST_EVENT,
    AnswerRequest,
    ChatRequest,
    CompletionRequest,
    Form,
    as_event,
    as_json,
    check_sent,
    edit_json,
    error_content,
    error_json,
    read_asked,
    read_body,
    usage_of,
)
from .variants import NoLongerWantedError, Variants

try:
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import StreamingResponse
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
except ImportError as error:
    raise require_extra("fastapi", "serve", "a server") from error

logger = get_logger(__name__)
COMPLETION_TOKENS, CHAT_TOKENS = 16, 1024
"""Tokens of an answer where a request does not say; the first is OpenAI's."""
_GLANCE_SECONDS = 0.2  # after which it is looked whether the client is still there
_PAGE = Path(__file__).with_name("page.html")
# The page's own style and script, this server's answers, and nothing else: what a model writes cannot load anything.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline';"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
_DRAINED = 8  # times the largest body: so much of a larger one is read, so that its sender hears why it was refused


@dataclass(frozen=True)
class Limits:
    """What a server takes.

    Args:
        prompt_tokens: of a prompt; ``None``: the model's context.
        body_bytes: of a request.
        parallel: answers that are made at the same time.
        waiting: further requests that may wait for their turn.
        sending_seconds: in which a client has sent a request whole; who is slower is not waited for.
    """

    prompt_tokens: int | None = None
    body_bytes: int = 2**20
    parallel: int = 4
    waiting: int = 64
    sending_seconds: float = 60.0


@dataclass(frozen=True)
class Keys:
    """Who may do what.

    Args:
        asking: the key that questions need; ``None``: anybody may ask.
        editing: the token that edits need, which is good for questions, too; ``None``: nobody may edit.
        hosts: names by which the server may be called; ``None``: any. Where only this machine is to reach it, a web
            page must not either, by a name of its own that it lets point here.
    """

    asking: str | None = field(default=None, repr=False)
    editing: str | None = field(default=None, repr=False)
    hosts: frozenset[str] | None = None


class Service:
    """Answers requests with the variants of a model.

    Args:
        variants: of the model.
        limits: what it takes.
        keys: who may do what.

    Raises:
        ServeError: if the model has no tokenizer.
    """

    def __init__(self, variants: Variants, limits: Limits | None = None, keys: Keys | None = None):
        self.variants, self.limits, self.keys = variants, limits or Limits(), keys or Keys()
        if variants.model.tokenizer is None:
            raise ServeError("the model has no tokenizer, without which no text can be asked or answered")
        self.started = int(time.time())
        self.ending = threading.Event()
        self.open = 0
        """Requests that are being answered or wait for it."""
        self._threads = ThreadPoolExecutor(self.limits.parallel, thread_name_prefix="kedit-answer")

    def end(self) -> None:
        """End all answers at their next token. A handler of signals may call this: it takes no lock of the threads."""
        self.ending.set()

    def close(self) -> None:
        """End all answers, and take no more."""
        self.end()
        self._threads.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------------ questions

    def chat_ids(self, asked: ChatRequest) -> list[int]:
        """A conversation as token ids, up to where the answer begins.

        Raises:
            ServeError: if the tokenizer has no template, or the user has not spoken last.
            ChatTemplateError: if the template cannot write it.
        """
        tokenizer: Any = self.variants.model.tokenizer
        messages = [message.plain for message in asked.messages]
        if not getattr(tokenizer, "chat_template", None):
            raise ServeError(
                "this model has no chat template: ask it at /v1/completions, with a prompt", param="messages"
            )
        if messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
            raise ServeError("the last message must be the user's, and hold a text", param="messages")
        return self._ids(chat_frame(tokenizer, messages).text(messages[-1]["content"]), "messages")

    def text_ids(self, prompt: str) -> list[int]:
        """A prompt as token ids.

        Raises:
            ServeError: if it is empty.
        """
        ids = self._ids(prompt, "prompt")
        if not ids:
            raise ServeError("the prompt is empty, and the model has no token that a text begins with", param="prompt")
        return ids

    def sampling(
        self, asked: AnswerRequest, prompt_tokens: int, max_tokens: int | None, default: int
    ) -> AnswerSettings:
        """How an answer is made.

        Args:
            asked: the request.
            prompt_tokens: of its longest prompt.
            max_tokens: what it says of the answer's length.
            default: of a request that says nothing.

        Raises:
            ServeError: if prompt and answer do not fit into the model's context.
        """
        room = self._context - prompt_tokens
        if room < (max_tokens or 1):
            raise ServeError(
                f"the prompt has {prompt_tokens} tokens and the answer may have {max_tokens or 1}, together"
                f" {prompt_tokens + (max_tokens or 1)}; the model's context has {self._context}",
                param="max_tokens"
                if max_tokens and room > 0
                else "messages"
                if isinstance(asked, ChatRequest)
                else "prompt",
                code="context_length_exceeded",
            )
        return default_sampling(
            self.variants.model,
            max_tokens or min(default, room),
            temperature=asked.temperature,
            top_p=asked.top_p,
            seed=asked.seed,
            stop=asked.stops,
            top_logprobs=asked.top_logprobs_wanted,  # type: ignore[attr-defined]
        )

    def _ids(self, text: str, param: str) -> list[int]:
        most = min(self.limits.prompt_tokens or self._context, self._context)
        if len(text) > 64 * most:  # no tokenizer has tokens this long, and it should not read a book in vain
            raise self._too_long(f"more than {most}", most, param)
        try:
            ids = asked_ids(self.variants.model, text)
        except RequestError as error:
            raise ServeError(str(error), param=param) from error
        if len(ids) > most:
            raise self._too_long(str(len(ids)), most, param)
        return ids

    def _too_long(self, has: str, most: int, param: str) -> ServeError:
        return ServeError(
            f"the prompt has {has} tokens; this server takes {most}", param=param, code="context_length_exceeded"
        )

    @property
    def _context(self) -> int:
        return context_of(self.variants.model)

    # ------------------------------------------------------------------ answers

    def start(self, variant: str, prompts: Sequence[list[int]], sampling: AnswerSettings) -> Work:
        """Begin to answer.

        Raises:
            ServeError: if too many wait already, or the server is ending.
        """
        if self.ending.is_set():
            raise self.unwanted()
        if self.open >= self.limits.parallel + self.limits.waiting:
            raise ServeError(
                f"{self.open} requests are being answered or wait, and this server takes no more; ask again later",
                status=429,
                code="too_many_requests",
            )
        work = Work(asyncio.get_running_loop(), self.ending)
        self.open += 1

        def run() -> None:
            try:
                answers = []
                with self.variants.showing(variant, work.is_gone):
                    for i, prompt in enumerate(prompts):
                        answers.append(
                            answer_prompt(
                                self.variants.model,
                                prompt,
                                sampling,
                                told=lambda text, chances, i=i: work.put(AnswerPart(i, text, chances)),  # type: ignore[misc]
                                gone=work.is_gone,
                            )
                        )
                        if answers[-1].finish == "cancelled":
                            raise self.unwanted()
                        work.put(AnswerEnd(i, answers[-1]))
                work.put(answers)
            except BaseException as error:  # goes to whoever waits
                work.put(error)

        future = self._threads.submit(run)
        future.add_done_callback(lambda done: work.call(self._finished, work, done.cancelled()))
        return work

    def _finished(self, work: Work, was_cancelled: bool) -> None:
        """Called in the event loop when a thread is done with a request, or the server's end has taken it away."""
        self.open -= 1
        if was_cancelled:
            work.put(self.unwanted())

    def unwanted(self) -> KeditError:
        """What an answer ends in that nobody waits for, or that the end of the server has cut short."""
        if self.ending.is_set():
            return ServeError("the server is ending", status=503, code="server_is_ending")
        return NoLongerWantedError("the client has gone")

    # ------------------------------------------------------------------ edits

    def make_edits(self, body: dict[str, Any]) -> list[Edit]:
        """Make the edits that a request names: the fields of one, or a list of them as ``requests``.

        Raises:
            RequestError: for an unusable one.
            ServeError: for what nobody may send; see `check_sent`.
            KeditError: if it cannot be made; nothing has changed then.
        """
        rows = body["requests"] if set(body) == {"requests"} else [body]
        if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
            raise ServeError("requests must be a list of objects with prompt, subject, target_new …", param="requests")
        requests = [check_sent(EditRequest.from_dict(row, row=i)) for i, row in enumerate(rows)]
        with self.variants.changing() as model:
            return model.edit(requests, show_progress=False).edits

    def undo_edits(self, which: str) -> list[Edit]:
        """Take an edit back, or `ALL_EDITS`.

        Raises:
            RollbackError: if it cannot be taken back.
        """
        with self.variants.changing() as model:
            return model.rollback(ALL_EDITS if which == ALL_EDITS else [which])


@dataclass(frozen=True)
class AnswerPart:
    """A part of the answer to the prompt ``index``."""

    index: int
    text: str
    chances: list[TokenChance]


@dataclass(frozen=True)
class AnswerEnd:
    """The end of the answer to the prompt ``index``."""

    index: int
    answer: Reply


class Work:
    """What a thread hands to the event loop, and the other way round that nobody wants it any more.

    Args:
        loop: of the server.
        ending: set when the server ends.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, ending: threading.Event):
        self._loop, self._ending, self._gone = loop, ending, threading.Event()
        self._queue: asyncio.Queue[Any] = asyncio.Queue()

    def is_gone(self) -> bool:
        """Whether nobody wants it."""
        return self._gone.is_set() or self._ending.is_set()

    def give_up(self) -> None:
        """Nobody wants it."""
        self._gone.set()

    def put(self, item: Any) -> None:
        """Hand something over, from the thread."""
        self.call(self._queue.put_nowait, item)

    def call(self, function: Callable[..., Any], *args: Any) -> None:
        """Have the event loop call a function; when the server has ended, nothing happens."""
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop is closed
            self._gone.set()

    async def get(self, request: Request | None = None) -> Any:
        """The next item, which is an `AnswerPart`, an `AnswerEnd`, or the list of all answers.

        Args:
            request: whose client is watched meanwhile, if somebody has to.

        Raises:
            NoLongerWantedError: if the client has gone.
            BaseException: what the thread ended in.
        """
        while True:
            try:
                item = await asyncio.wait_for(self._queue.get(), _GLANCE_SECONDS)
            except TimeoutError:
                if request is not None and await request.is_disconnected():
                    self.give_up()
                    raise NoLongerWantedError("the client has gone") from None
                continue
            if isinstance(item, BaseException):
                raise item
            return item


# ---------------------------------------------------------------------- routes


def build_app(service: Service) -> FastAPI:
    """The application that serves a model; see `Service`."""
    app = FastAPI(title="hf_kedit", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    variants, keys = service.variants, service.keys

    async def body_of(request: Request) -> bytes:
        most, found, size = service.limits.body_bytes, bytearray(), 0
        try:
            async with asyncio.timeout(service.limits.sending_seconds):
                async for chunk in request.stream():
                    size += len(chunk)
                    if size <= most:
                        found += chunk
                    elif size > _DRAINED * most:
                        break
        except ClientDisconnect as error:
            raise NoLongerWantedError("the client has gone") from error
        except TimeoutError as error:
            raise ServeError(
                f"the request was not sent within {service.limits.sending_seconds:g} seconds",
                status=408,
                code="request_timeout",
            ) from error
        if size > most:
            raise ServeError(
                f"the body of the request has {'more than ' * (size > _DRAINED * most)}{size} bytes; this server takes"
                f" {most}",
                status=413,
                code="request_too_large",
            )
        return bytes(found)

    def check_host(request: Request) -> None:
        host = (request.headers.get("host") or "").rpartition("]")
        name = (host[0] + host[1] or host[2].partition(":")[0]).lower()
        if keys.hosts is not None and name not in keys.hosts:
            raise ServeError("this server answers to the name of its own machine only", status=403, code="wrong_host")

    def admit(request: Request, *, editing: bool = False) -> None:
        check_host(request)
        if editing and keys.editing is None:
            raise ServeError("edits are switched off here (kedit serve --allow-edits)", status=403, code="edits_off")
        wanted = [keys.editing] if editing else [keys.asking, keys.editing] if keys.asking else []
        scheme, _, given = (request.headers.get("authorization") or "").partition(" ")
        # Each one is compared, in constant time, so that the time tells nothing.
        fits = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in wanted if key]
        if wanted and not (scheme.lower() == "bearer" and any(fits)):
            raise ServeError(
                "this needs a key: send it as 'Authorization: Bearer …' (api_key= of the client)",
                status=401,
                code="invalid_api_key",
            )

    @app.get("/")
    async def page(request: Request) -> Response:
        check_host(request)
        return Response(_PAGE.read_bytes(), media_type="text/html", headers=_PAGE_HEADERS)

    @app.get("/health")
    async def health() -> Response:
        return _json({"status": "ok", "model": variants.name, "open_requests": service.open})

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        admit(request)
        return _json({"object": "list", "data": [_model(name) for name in variants.names]})

    @app.get("/v1/models/{name:path}")
    async def one_model(request: Request, name: str) -> Response:
        admit(request)
        return _json(_model(variants.find(name)))

    def _model(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": service.started, "owned_by": "hf_kedit"}

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        admit(request)
        asked = read_asked(await body_of(request), CompletionRequest)
        prompts = [service.text_ids(prompt) for prompt in asked.prompts]
        longest = max(map(len, prompts))
        sampling = service.sampling(asked, longest, asked.max_tokens, COMPLETION_TOKENS)
        return await respond(request, asked, prompts, sampling, chat=False)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        admit(request)
        asked = read_asked(await body_of(request), ChatRequest)
        ids = service.chat_ids(asked)
        most = asked.max_completion_tokens or asked.max_tokens
        return await respond(request, asked, [ids], service.sampling(asked, len(ids), most, CHAT_TOKENS), chat=True)

    async def respond(
        request: Request, asked: AnswerRequest, prompts: list[list[int]], sampling: AnswerSettings, *, chat: bool
    ) -> Response:
        variant = variants.find(asked.model)
        name = ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex
        form = Form({"id": name, "created": int(time.time()), "model": asked.model}, chat=chat)
        read = sum(map(len, prompts))
        work = service.start(variant, prompts, sampling)
        try:
            first = await work.get(request)  # what goes wrong at once has a status of its own
            if asked.stream:
                usage = read if asked.stream_options and asked.stream_options.include_usage else None
                events = _events(work, first, form, len(prompts), usage, sampling.top_logprobs is not None)
                return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
            item = first
            while not isinstance(item, list):
                item = await work.get(request)
        except BaseException:
            work.give_up()
            raise
        return _json(form.whole(item, usage_of(read, item), logprobs=sampling.top_logprobs is not None))

    @app.get("/v1/edits")
    async def list_edits(request: Request, model: str | None = None) -> Response:
        admit(request, editing=True)
        variant = variants.name if model is None else variants.find(model)
        return _json({"object": "list", "model": variant, "data": [edit_json(e) for e in variants.edits(variant)]})

    @app.post("/v1/edits")
    async def add_edits(request: Request) -> Response:
        admit(request, editing=True)
        made = await asyncio.to_thread(service.make_edits, read_body(await body_of(request)))
        return _json({"object": "list", "model": variants.name, "data": [edit_json(e) for e in made]}, 201)

    @app.delete("/v1/edits/{which:path}")
    async def undo(request: Request, which: str) -> Response:
        admit(request, editing=True)
        gone = await asyncio.to_thread(service.undo_edits, which)
        return _json({"object": "list", "deleted": True, "data": [edit_json(e) for e in gone]})

    @app.exception_handler(KeditError)
    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, KeditError)
        if isinstance(error, NoLongerWantedError):
            error = service.unwanted()
        status, content = error_content(error)
        answer = _json(content, status)
        if status == 408:  # what the client may still send belongs to no request
            answer.headers["connection"] = "close"
        return answer

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _json(
            error_json(f"{request.method} {request.url.path}: {error.detail}", error.status_code), error.status_code
        )

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        logger.error("%s: %s: %s", request.url.path, type(error).__name__, error)
        return _json(error_json("the server failed; its log says why", 500), 500)

    return app


async def _events(
    work: Work, item: Any, form: Form, count: int, read: int | None, logprobs: bool
) -> AsyncIterator[bytes]:
    """The events of a stream.

    Args:
        work: that is under way.
        item: its first item.
        form: how pieces are written.
        count: of answers.
        read: tokens that were read, if the last event is to tell; else ``None``.
        logprobs: whether pieces have log-probabilities.
    """
    try:
        if form.is_chat:
            yield as_event(form.piece(0, None))
        while not isinstance(item, list):
            if isinstance(item, AnswerPart):
                yield as_event(form.piece(item.index, item.text, item.chances if logprobs else None))
            else:
                yield as_event(form.piece(item.index, None, finish=item.answer.finish))
            item = await work.get()
        if read is not None:
            yield as_event(form.last(usage_of(read, item)))
        yield LAST_EVENT
    except KeditError as error:
        yield as_event(error_content(error)[1])
    except Exception as error:  # the status has been sent
        logger.error("%s: %s", type(error).__name__, error)
        yield as_event(error_json("the server failed; its log says why", 500))
    finally:
        work.give_up()


def _json(content: Any, status: int = 200) -> Response:
    return Response(as_json(content), status, media_type="application/json")

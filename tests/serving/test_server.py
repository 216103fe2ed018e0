"""The server, asked by the official client: every kind of edit, streams, log-probabilities, many at once, and ends."""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from hf_kedit import EditableModel
from hf_kedit.engine.forward import device_of
from hf_kedit.errors import ServeError
from hf_kedit.serving.app import Limits, Service
from hf_kedit.serving.running import address_of, is_loopback, listening, serving
from hf_kedit.serving.variants import Variants
from hf_kedit.text.chat import chat_frame, chat_text
from hf_kedit.tokens import prompt_ids
from tests.serving.conftest import FACT, KEY, METHODS, NEW, OLD, OWN, PROMPT, TOKEN, client_of, own_model, until

QUESTION = [{"role": "user", "content": PROMPT}]
PATIENCE = 60


def expected(model: EditableModel, prompt: str, tokens: int, **kwargs: Any) -> str:
    """What ``generate`` says by itself."""
    assert model.tokenizer is not None
    given = model.tokenizer(prompt, return_tensors="pt").to(device_of(model.base_model))
    out = model.generate(**given, max_new_tokens=tokens, pad_token_id=2, **{"do_sample": False, **kwargs})
    return str(model.tokenizer.decode(out[0, given["input_ids"].shape[1] :], skip_special_tokens=True))


def text_of(client: openai.OpenAI, model: str, **asked: Any) -> str:
    return client.completions.create(**{"model": model, "prompt": PROMPT, "max_tokens": 4, **asked}).choices[0].text


# ---------------------------------------------------------------------- what is said


@pytest.mark.parametrize("method", METHODS)
def test_every_kind_of_edit_answers(client: openai.OpenAI, packs: dict[str, Path], method: str) -> None:
    """The new fact with the edit, the old one without: whole, streamed, and as ``generate`` says it."""
    alone = EditableModel.from_pretrained(packs[method])
    said = text_of(client, f"base+{method}", max_tokens=8)
    assert said.startswith(NEW)
    assert said == expected(alone, PROMPT, 8)
    stream = client.completions.create(model=f"base+{method}", prompt=PROMPT, max_tokens=8, stream=True)
    assert "".join(part.choices[0].text for part in stream) == said
    assert text_of(client, "base").startswith(OLD)
    assert text_of(client, "mine").startswith(OWN)


def test_decoding_is_served(client: openai.OpenAI, packs: dict[str, Path]) -> None:
    model = EditableModel.from_pretrained(packs["dola"])
    said = text_of(client, "base+dola", max_tokens=12)
    assert said == expected(model, PROMPT, 12)
    assert said != expected(model.set_decoding(None), PROMPT, 12)


def test_chats_go_through_the_template(client: openai.OpenAI, service: Service) -> None:
    model = service.variants.model
    assert model.tokenizer is not None
    reply = client.chat.completions.create(model="mine", messages=QUESTION, max_tokens=8)  # type: ignore[arg-type]
    with service.variants.showing("mine"):
        assert reply.choices[0].message.content == expected(model, chat_text(model.tokenizer, PROMPT), 8)
    stream = client.chat.completions.create(
        model="mine",
        messages=QUESTION,  # type: ignore[arg-type]
        max_completion_tokens=8,
        stream=True,
        stream_options={"include_usage": True},
    )
    parts = list(stream)
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(p.choices[0].delta.content or "" for p in parts if p.choices) == reply.choices[0].message.content
    assert [p.choices[0].finish_reason for p in parts if p.choices][-1] == reply.choices[0].finish_reason == "length"
    assert parts[-1].usage == reply.usage and reply.usage is not None and reply.usage.completion_tokens == 8
    longer = [{"role": who, "content": text} for who, text in (("system", "S"), ("user", "A"))]
    grown = client.chat.completions.create(model="mine", messages=longer, max_tokens=1)  # type: ignore[arg-type]
    read = prompt_ids(model.tokenizer, chat_frame(model.tokenizer, longer).text("A"))
    assert grown.usage and grown.usage.prompt_tokens == len(read)


def test_several_prompts_and_parts_of_a_message(client: openai.OpenAI) -> None:
    prompts = [PROMPT, "Gukir Tudias is employed by"]
    reply = client.completions.create(model="base", prompt=prompts, max_tokens=4)
    assert [c.index for c in reply.choices] == [0, 1]
    assert [c.text for c in reply.choices] == [text_of(client, "base", prompt=p) for p in prompts]
    content = [{"type": "text", "text": PROMPT[:10]}, {"type": "text", "text": PROMPT[10:]}]
    whole, parts = (
        client.chat.completions.create(model="base", messages=[{"role": "user", "content": c}], max_tokens=4)  # type: ignore[call-overload]
        for c in (PROMPT, content)
    )
    assert whole.choices[0].message.content == parts.choices[0].message.content


def test_logprobs_are_those_of_the_model(client: openai.OpenAI, packs: dict[str, Path]) -> None:
    model = EditableModel.from_pretrained(packs["rome"])
    assert model.tokenizer is not None
    found = client.completions.create(model="base+rome", prompt=PROMPT, max_tokens=5, logprobs=3, temperature=0)
    told = found.choices[0].logprobs
    assert told is not None and told.tokens and told.token_logprobs and told.top_logprobs and told.text_offset
    ids = model.tokenizer(PROMPT)["input_ids"]
    new = model.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False, pad_token_id=2)[0, len(ids) :]
    with torch.no_grad():
        logits = model(torch.tensor([[*ids, *new.tolist()]])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    torch.testing.assert_close(torch.tensor(told.token_logprobs), logits[torch.arange(5), new], atol=1e-4, rtol=1e-4)
    for row, top in zip(logits, told.top_logprobs, strict=True):
        best = row.topk(3)
        assert top == pytest.approx(
            {model.tokenizer.decode([i]): v for i, v in zip(best.indices.tolist(), best.values.tolist(), strict=True)},
            abs=1e-4,
        )
    text = found.choices[0].text
    assert [text[a:].startswith(t) for a, t in zip(told.text_offset, told.tokens, strict=True)] == [True] * 5
    chat: Any = {"model": "base+rome", "messages": QUESTION, "max_tokens": 5, "logprobs": True, "top_logprobs": 2}
    reply = client.chat.completions.create(**chat).choices[0]
    assert reply.logprobs is not None and reply.logprobs.content is not None
    assert "".join(c.token for c in reply.logprobs.content) == reply.message.content
    assert all(c.logprob == c.top_logprobs[0].logprob and len(c.top_logprobs) == 2 for c in reply.logprobs.content)
    assert bytes(reply.logprobs.content[0].bytes or []).decode() == reply.logprobs.content[0].token
    streamed = [
        token
        for part in client.chat.completions.create(**chat, stream=True)
        if part.choices and part.choices[0].logprobs
        for token in part.choices[0].logprobs.content or []
    ]
    assert [t.logprob for t in streamed] == [c.logprob for c in reply.logprobs.content]


def test_draws_are_those_of_generate(client: openai.OpenAI, packs: dict[str, Path]) -> None:
    model = EditableModel.from_pretrained(packs["rome"])
    texts = set()
    for seed in range(4):
        said = text_of(client, "base+rome", max_tokens=12, temperature=1.7, top_p=0.9, seed=seed)
        torch.manual_seed(seed)
        assert said == expected(model, PROMPT, 12, do_sample=True, temperature=1.7, top_p=0.9, top_k=0)
        texts.add(said)
    assert len(texts) > 1
    assert len({text_of(client, "base", max_tokens=12, temperature=2.0) for _ in range(6)}) > 1
    assert text_of(client, "base", temperature=1e-9) == text_of(client, "base", temperature=0)


@pytest.mark.parametrize("stream", [False, True])
def test_stop_texts(client: openai.OpenAI, stream: bool) -> None:
    """The answer ends before the text, wherever tokens are cut, and not a letter of it is sent."""
    whole = text_of(client, "base", max_tokens=10)
    for begin, end in ((3, 6), (8, 16), (len(whole) - 3, len(whole))):
        stop = whole[begin:end]
        found = client.completions.create(
            model="base", prompt=PROMPT, max_tokens=10, stop=["\x07", stop], stream=stream, logprobs=0
        )
        parts: list[Any] = list(found) if stream else [found]
        assert "".join(p.choices[0].text for p in parts) == whole[: whole.index(stop)]
        assert parts[-1].choices[0].finish_reason == "stop"
        tokens = [t for p in parts if p.choices[0].logprobs for t in p.choices[0].logprobs.tokens]
        assert whole.startswith("".join(tokens[:-1]))
        assert len("".join(tokens[:-1])) <= whole.index(stop)


def test_an_answer_ends_where_the_model_ends_it(packs: dict[str, Path]) -> None:
    """The token that ends an answer is in no text and in no list."""
    model = EditableModel.from_pretrained(packs["rome"])
    assert model.tokenizer is not None
    model.base_model.generation_config.eos_token_id = [1, *model.tokenizer(".", add_special_tokens=False)["input_ids"]]
    with serving(Service(Variants(model, "mine"))) as address:
        reply = client_of(address).completions.create(model="mine", prompt=PROMPT, max_tokens=20, logprobs=0)
    choice = reply.choices[0]
    assert choice.finish_reason == "stop" and choice.text == expected(model, PROMPT, 20).rstrip(".") == NEW
    assert reply.usage is not None and choice.logprobs is not None and choice.logprobs.tokens is not None
    assert reply.usage.completion_tokens == len(choice.logprobs.tokens) + 1


def test_models_are_listed(client: openai.OpenAI, packs: dict[str, Path]) -> None:
    assert {m.id for m in client.models.list()} == {"mine", "base", *(f"base+{name}" for name in packs)}
    assert client.models.retrieve("base+memit+rome").id == "base+memit+rome"
    with pytest.raises(openai.NotFoundError, match="Did you mean 'mine'"):
        client.models.retrieve("mina")


# ---------------------------------------------------------------------- at once


def test_parallel_requests_do_not_mix(client: openai.OpenAI, packs: dict[str, Path]) -> None:
    """As many threads as requests, over all variants, some streamed: each one gets the answer of its model."""
    names = ["base", "mine", *(f"base+{name}" for name in ("rome", "grace", "prompt", "auto", "wise", "dola"))]
    alone = {name: text_of(client, name, max_tokens=6) for name in names}
    assert len(set(alone.values())) >= 3

    def ask(number: int) -> tuple[str, str]:
        name = names[number % len(names)]
        if number % 3:
            return name, text_of(client, name, max_tokens=6)
        stream = client.completions.create(model=name, prompt=PROMPT, max_tokens=6, stream=True)
        return name, "".join(part.choices[0].text for part in stream)

    with ThreadPoolExecutor(24) as threads:
        for name, said in threads.map(ask, range(48)):
            assert said == alone[name], name


class Brake:
    """Counts the passes of a model, and holds it before each one until it is let go."""

    def __init__(self, model: EditableModel, free: int):
        self.passes, self.held, self.go = 0, threading.Event(), threading.Event()
        self._free, self._handle = free, model.base_model.register_forward_pre_hook(self._before)

    def _before(self, *_: Any) -> None:
        self.passes += 1
        if self.passes > self._free:
            self.held.set()
            assert self.go.wait(PATIENCE)

    def __enter__(self) -> Brake:
        return self

    def __exit__(self, *_: Any) -> None:
        self.go.set()
        self._handle.remove()


@pytest.fixture
def small(packs: dict[str, Path]) -> Iterator[tuple[Service, str]]:
    """A server of its own that makes one answer at a time and lets one more wait."""
    service = Service(Variants(EditableModel.from_pretrained(packs["rome"]), "mine"), Limits(parallel=1, waiting=1))
    with serving(service) as address:
        yield service, address


@pytest.mark.parametrize("stream", [True, False])
def test_who_hangs_up_ends_the_answer(small: tuple[Service, str], stream: bool) -> None:
    service, address = small
    with Brake(service.variants.model, free=2) as brake:
        body = {"model": "mine", "prompt": PROMPT, "max_tokens": 50, "stream": stream}
        connection = httpx.Client(timeout=PATIENCE)
        asking = ThreadPoolExecutor(1)
        if stream:
            response = connection.send(
                connection.build_request("POST", f"{address}/v1/completions", json=body), stream=True
            )
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            assert brake.held.wait(PATIENCE)
            response.close()
        else:
            asked = asking.submit(httpx.post, f"{address}/v1/completions", json=body, timeout=0.5)
            assert isinstance(asked.exception(), httpx.TimeoutException)
        connection.close()
        threading.Event().wait(0.5)  # the server looks for the client a few times a second
        brake.go.set()
        until(lambda: service.open == 0)
        assert brake.passes <= 4
    assert text_of(client_of(address), "mine").startswith(NEW)


def test_too_many_are_told_to_come_back(small: tuple[Service, str]) -> None:
    service, address = small
    client = client_of(address)
    with Brake(service.variants.model, free=0) as brake, ThreadPoolExecutor(2) as threads:
        first = [threads.submit(text_of, client, name) for name in ("mine", "base")]
        until(lambda: service.open == 2)
        with pytest.raises(openai.RateLimitError, match="takes no more"):
            text_of(client, "mine")
        assert httpx.get(f"{address}/health").json() == {"status": "ok", "model": "mine", "open_requests": 2}
        brake.go.set()
        assert [f.result()[: len(NEW)] for f in first] == [NEW, OLD[: len(NEW)]]


def test_the_server_ends_its_answers_when_it_ends(small: tuple[Service, str]) -> None:
    """One that is being made, one that waits, and one that comes too late."""
    service, address = small
    with Brake(service.variants.model, free=2) as brake, ThreadPoolExecutor(2) as threads:
        asked = [threads.submit(text_of, client_of(address), "mine", max_tokens=80)]
        assert brake.held.wait(PATIENCE)
        asked.append(threads.submit(text_of, client_of(address), "base"))
        until(lambda: service.open == 2)
        service.end()
        with pytest.raises(openai.InternalServerError, match="is ending"):
            text_of(client_of(address), "mine")
        brake.go.set()
        assert all(isinstance(each.exception(PATIENCE), openai.InternalServerError) for each in asked)
        assert brake.passes <= 4


# ---------------------------------------------------------------------- edits


def test_edits_over_the_wire(guarded: Callable[..., str]) -> None:
    url = guarded()
    client, headers = client_of(url, TOKEN), {"Authorization": f"Bearer {TOKEN}"}
    listed = httpx.get(f"{url}/v1/edits", headers=headers).json()
    assert [(e["id"], e["method"], e["target_new"]) for e in listed["data"]] == [("own", "rome", OWN.strip())]
    other = {"prompt": "{} is employed by", "subject": "Gukir Tudias", "target_new": "Heidork", "id": "new/one"}
    made = httpx.post(f"{url}/v1/edits", headers=headers, json={"requests": [other]})
    assert made.status_code == 201 and made.json()["data"][0]["id"] == "new/one"
    assert text_of(client, "mine", prompt="Gukir Tudias is employed by").startswith(" Heidork")
    assert not text_of(client, "base", prompt="Gukir Tudias is employed by").startswith(" Heidork")
    gone = httpx.delete(f"{url}/v1/edits/new/one", headers=headers)
    assert gone.json()["deleted"] and not text_of(client, "mine", prompt="Gukir Tudias is employed by").startswith(
        " Heid"
    )
    assert httpx.delete(f"{url}/v1/edits/new/one", headers=headers).status_code == 404
    assert httpx.post(f"{url}/v1/edits", headers=headers, json={**FACT, "subject": "Nobody"}).status_code == 201
    assert len(httpx.delete(f"{url}/v1/edits/all", headers=headers).json()["data"]) == 2
    assert text_of(client, "mine").startswith(OLD)
    assert httpx.get(f"{url}/v1/edits?model=base", headers=headers).json()["data"] == []


@pytest.mark.parametrize(
    "body",
    [
        {}, {"requests": []}, {"requests": "/etc/passwd"}, {"prompt": 3, "target_new": "x"}, {"requests": [1]},
        {**FACT, "id": "all"}, {**FACT, "image": '["'}, {**FACT, "image": "data:image/png;base64,AAAA"},
        {**FACT, "locality": {"others": [{"prompt": "x", "image": "/etc/passwd"}]}},
    ],
)  # fmt: skip
def test_unusable_edits_change_nothing(guarded: Callable[..., str], body: Any) -> None:
    url = guarded()
    headers = {"Authorization": f"Bearer {TOKEN}"}
    reply = httpx.post(f"{url}/v1/edits", headers=headers, json=body)
    assert reply.status_code == 400 and reply.json()["error"]["message"]
    assert len(httpx.get(f"{url}/v1/edits", headers=headers).json()["data"]) == 1


@pytest.mark.parametrize("name", ["image", "image_rephrase"])
def test_files_of_the_server_are_not_read(guarded: Callable[..., str], tmp_path: Path, name: str) -> None:
    """Whether there is such a file, a client does not learn."""
    (tmp_path / "there").write_text("secret")
    url, said = guarded(), set()
    for sent in (str(tmp_path / "there"), str(tmp_path / "not"), ["there", "not"]):
        reply = httpx.post(f"{url}/v1/edits", headers={"Authorization": f"Bearer {TOKEN}"}, json={**FACT, name: sent})
        assert reply.status_code == 400 and str(tmp_path) not in reply.text
        said.add(reply.text)
    assert len(said) == 1 and "data:image" in said.pop()


def test_who_leaves_before_the_body_is_no_error(url: str, caplog: pytest.LogCaptureFixture) -> None:
    host, port = url.removeprefix("http://").split(":")
    logger = logging.getLogger("hf_kedit")  # which does not pass its records on
    logger.addHandler(caplog.handler)
    try:
        with socket.create_connection((host, int(port))) as sender:
            sender.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
            sender.shutdown(socket.SHUT_WR)
            sender.settimeout(PATIENCE)
            assert sender.recv(1) == b""
        assert httpx.get(f"{url}/health").json()["open_requests"] == 0
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records


def test_half_sent_requests_are_not_waited_for() -> None:
    """Who sends a part of a head is hung up on, who sends a part of a body is told so; answers may take longer."""
    service = Service(Variants(own_model(), "mine"), Limits(sending_seconds=0.2))
    whole = json.dumps({"model": "mine", "prompt": PROMPT, "max_tokens": 2}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(whole)

    def answers(*parts: bytes) -> bytes:
        """All that comes back until the server hangs up."""
        with socket.create_connection((host, int(port))) as sender:
            sender.settimeout(PATIENCE)
            for part in parts:
                sender.sendall(part)
            return b"".join(iter(lambda: sender.recv(4096), b""))

    with serving(service) as url:
        host, port = url.removeprefix("http://").split(":")
        assert answers() == answers(b"PO") == answers(head[:-3]) == b""
        said = answers(head, whole[:5])
        assert said.startswith(b"HTTP/1.1 408") and b"connection: close" in said.lower() and b"0.2 seconds" in said
        assert answers(head + whole, head[:-3]).count(b"HTTP/1.1 200") == 1  # a connection that is used again
        with ThreadPoolExecutor(1) as threads:
            with service.variants.changing():  # nobody is answered now
                waiting = threads.submit(answers, head, whole)
                until(lambda: service.open == 1)
                threading.Event().wait(0.5)
            assert waiting.result(PATIENCE).startswith(b"HTTP/1.1 200")
        assert httpx.get(f"{url}/health").json()["open_requests"] == 0


def test_keys_are_asked_for(guarded: Callable[..., str]) -> None:
    url = guarded()
    assert text_of(client_of(url, KEY), "base") == text_of(client_of(url, TOKEN), "base")
    for wrong in ("none", KEY[:-1], "ключ"):
        reply = httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {wrong}".encode()})
        assert reply.status_code == 401 and reply.json()["error"]["code"] == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError):
        text_of(client_of(url), "base")
    for header in ({}, {"Authorization": f"Bearer {KEY}"}, {"Authorization": TOKEN}):
        assert httpx.get(f"{url}/v1/edits", headers=header).status_code == 401
        assert httpx.post(f"{url}/v1/edits", headers=header, json=FACT).status_code == 401
        assert httpx.delete(f"{url}/v1/edits/all", headers=header).status_code == 401
    assert httpx.get(f"{url}/health").status_code == 200


def test_without_a_token_nobody_edits(url: str) -> None:
    reply = httpx.post(f"{url}/v1/edits", json=FACT, headers={"Authorization": "Bearer x"})
    assert reply.status_code == 403 and reply.json()["error"]["code"] == "edits_off"


def test_a_web_page_with_a_name_of_its_own_is_refused(guarded: Callable[..., str]) -> None:
    url = guarded(asking=None, hosts=frozenset({"127.0.0.1", "[::1]"}))
    assert httpx.get(f"{url}/v1/models").status_code == 200
    assert httpx.get(f"{url}/v1/models", headers={"Host": "[::1]:80"}).status_code == 200
    assert httpx.get(f"{url}/v1/models", headers={"Host": "evil.example:8000"}).status_code == 403


# ---------------------------------------------------------------------- what is refused


def body(**changes: Any) -> dict[str, Any]:
    return {"model": "mine", "prompt": PROMPT, "max_tokens": 2, **changes}


def talk(messages: Any, **changes: Any) -> dict[str, Any]:
    return {"model": "mine", "messages": messages, **changes}


REFUSED: list[tuple[str, Any, int, str | None, str]] = [
    ("completions", b"{", 400, None, "not JSON"),
    ("completions", b"", 400, None, "not JSON"),
    ("completions", b"\xff\xfe", 400, None, "UTF-8"),
    ("completions", b"[" * 5000, 400, None, ""),
    ("completions", [], 400, None, "JSON object"),
    ("completions", {"prompt": "x"}, 400, "model", "required"),
    ("completions", {"model": "mine"}, 400, "prompt", "required"),
    ("completions", body(model=3), 400, "model", "string"),
    ("completions", body(model="gpt-4"), 404, "model", "does not exist"),
    ("completions", body(model="\ud83d"), 400, "model", "unicode"),
    ("completions", body(model="base+rome+grace"), 400, "model", "does not add up"),
    ("completions", body(prompt="\ud83d half"), 400, "prompt", ""),
    ("completions", body(prompt=[]), 400, "prompt", "at least 1"),
    ("completions", body(prompt=["x"] * 33), 400, "prompt", "at most 32"),
    ("completions", body(prompt=[1, 2]), 400, "prompt[0]", "string"),
    ("completions", body(prompt="word " * 120), 400, "prompt", "this server takes 100"),
    ("completions", body(prompt="word " * 5000), 400, "prompt", "more than 100"),
    ("completions", body(max_tokens=500), 400, "max_tokens", "context has 128"),
    ("completions", body(max_tokens=0), 400, "max_tokens", "greater"),
    ("completions", body(max_tokens="4"), 400, "max_tokens", "integer"),
    ("completions", body(max_tokens=True), 400, "max_tokens", "integer"),
    ("completions", body(temperature=-1), 400, "temperature", "greater"),
    ("completions", b'{"model": "mine", "prompt": "x", "temperature": NaN}', 400, "temperature", ""),
    ("completions", body(top_p=1.5), 400, "top_p", "less"),
    ("completions", body(seed=2**70), 400, "seed", "less"),
    ("completions", body(stop=["a"] * 5), 400, "stop", "up to 4"),
    ("completions", body(stop=""), 400, "stop", "not empty"),
    ("completions", body(logprobs=99), 400, "logprobs", "less"),
    ("completions", body(n=2), 400, "n", "ask once for each"),
    ("completions", body(echo=True), 400, "echo", "not supported"),
    ("completions", body(frequency_penalty=1), 400, "frequency_penalty", "not supported"),
    ("completions", body(tmeperature=1), 400, "tmeperature", "Did you mean 'temperature'"),
    ("completions", body(prompt="x" * 2**17), 413, None, "takes 65536"),
    ("chat/completions", talk([]), 400, "messages", ""),
    ("chat/completions", talk([{"role": "tool", "content": "x"}]), 400, "messages[0].role", ""),
    ("chat/completions", talk([{"role": "user"}]), 400, "messages[0].content", "required"),
    ("chat/completions", talk([{"role": "user", "content": " "}]), 400, "messages", "hold a text"),
    ("chat/completions", talk([{"role": "assistant", "content": "x"}]), 400, "messages", "user's"),
    ("chat/completions", talk(QUESTION, tools=[{"type": "function"}]), 400, "tools", "not supported"),
    ("chat/completions", talk(QUESTION, top_logprobs=2), 400, "top_logprobs", "needs logprobs"),
    ("nothing", {}, 404, None, "Not Found"),
    ("completions/", {}, 404, None, "Not Found"),
    ("models", {}, 405, None, "Method Not Allowed"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "content", "status", "param", "says"), REFUSED)
def test_what_is_wrong_is_said(url: str, path: str, content: Any, status: int, param: str | None, says: str) -> None:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    reply = httpx.post(f"{url}/v1/{path}", content=data)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (status, param), error
    assert says in error["message"] and error["type"] == "invalid_request_error" and "Traceback" not in reply.text


def test_the_client_understands_refusals(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        text_of(client, "mine", echo=True)
    assert raised.value.param == "echo" and raised.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="this server takes 100") as raised:
        client.completions.create(model="mine", prompt="word " * 120, stream=True)
    assert raised.value.code == "context_length_exceeded"
    with pytest.raises(openai.APIStatusError) as large:
        text_of(client, "mine", prompt="x" * 2**22)
    assert large.value.status_code == 413


def test_harmless_fields_are_taken(client: openai.OpenAI) -> None:
    plain = text_of(client, "mine")
    assert plain == text_of(client, "mine", n=1, echo=False, user="me", best_of=1, presence_penalty=0, logit_bias={})


def test_a_model_without_a_template_names_the_other_way(packs: dict[str, Path]) -> None:
    with serving(Service(Variants(EditableModel.from_pretrained(packs["rome"]), "mine"))) as address:
        with pytest.raises(openai.BadRequestError, match="/v1/completions"):
            client_of(address).chat.completions.create(model="mine", messages=QUESTION)  # type: ignore[arg-type]


def test_what_cannot_be_served(packs: dict[str, Path]) -> None:
    model = EditableModel.from_pretrained(packs["rome"])
    for name in ("base", "a+b", " "):
        with pytest.raises(ServeError, match="cannot be called"):
            Variants(model, name)
    model.tokenizer = None
    with pytest.raises(ServeError, match="no tokenizer"):
        Service(Variants(model, "mine"))


def test_a_port_that_is_taken() -> None:
    with listening("127.0.0.1", 0) as taken:
        port = int(address_of(taken).rpartition(":")[2])
        with pytest.raises(ServeError, match=f"port {port}"):
            listening("127.0.0.1", port)
    with pytest.raises(ServeError, match="cannot listen"):
        listening("no.such.host.invalid", 0)
    assert is_loopback("127.0.0.1") and is_loopback("localhost") and is_loopback("::1")
    assert not is_loopback("0.0.0.0") and not is_loopback("example.org")

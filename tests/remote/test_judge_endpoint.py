"""The client of a judging endpoint, against servers that answer with anything but an answer."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import socket
import threading
import tracemalloc
from http.client import parse_headers

import pytest

from hf_kedit.errors import EvaluationError
from hf_kedit.evaluation import CallableJudge, OpenAICompatibleJudge
from hf_kedit.remote.endpoint import LARGEST_BODY

GOOD = json.dumps({"choices": [{"message": {"content": "A"}}]}).encode()
HEAD = b"HTTP/1.1 200 OK\r\n"


def sized(body, head=HEAD, more=b""):
    return head + more + b"Content-Length: %d\r\n\r\n" % len(body) + body


def said(content):
    return sized(json.dumps({"choices": [{"message": {"content": content}}]}).encode())


BAD = {
    "nothing": b"",
    "no status line": b"hello\r\n\r\n",
    "bytes": bytes(range(256)) * 4,
    "status that is no number": b"HTTP/1.1 OK OK\r\n\r\n",
    "incomplete": HEAD + b"Content-Length: 1000\r\n\r\n" + GOOD,
    "length that is no number": HEAD + b"Content-Length: many\r\n\r\n" + GOOD,
    "two lengths": HEAD + b"Content-Length: 3\r\nContent-Length: 9\r\n\r\n" + GOOD,
    "bad chunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + GOOD,
    "endless header": HEAD + b"X: " + b"x" * 200_000,
    "not UTF-8": sized(b'{"choices": [{"message": {"content": "\xff\xfe"}}]}'),
    "gzip": sized(gzip.compress(GOOD), more=b"Content-Encoding: gzip\r\n"),
    "gzip that is none": sized(GOOD, more=b"Content-Encoding: gzip\r\n"),
    "deep JSON": sized(b"[" * 100_000),
    "long number": sized(b'{"choices": ' + b"1" * 5_000 + b"}"),
    "no JSON": sized(b"<html>busy</html>"),
    "a list": sized(b"[]"),
    "null": sized(b"null"),
    "no choices": sized(b'{"choices": []}'),
    "choices as text": sized(b'{"choices": "A"}'),
    "no message": sized(b'{"choices": [{"message": null}]}'),
    "content as number": said(1),
    "content as list": said([{"type": "text", "text": "A"}]),
    "no content": sized(b"", head=b"HTTP/1.1 204 No Content\r\n"),
    "redirection": sized(b"", head=b"HTTP/1.1 301 Moved\r\n", more=b"Location: http://127.0.0.1:1/\r\n"),
    "refusal": sized(b"no", head=b"HTTP/1.1 403 \x1b]0;title\x07\r\n"),
    "partial": sized(GOOD, head=b"HTTP/1.1 206 Partial Content\r\n"),
    "no number of HTTP": sized(b"", head=b"HTTP/1.1 099 What\r\n"),
    "another protocol asked for": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nabc",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": b"\x15\x03\x01\x00\x02\x02\x0a",
    "too many headers": HEAD + b"X: y\r\n" * 50_000,
    "endless chunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\n1;" + b"x" * 200_000,
    "huge chunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 40 + b"\r\n",
    "coded transfer": HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "no character in a header": HEAD + b"X: a\x00b\r\n\r\n" + GOOD,
    "UTF-16": sized(GOOD.decode().encode("utf-16")),
    "no number": sized(b'{"choices": NaN}'),
    "a stream of events": sized(b'data: {"choices": [{"delta": {"content": "A"}}]}\n\ndata: [DONE]\n\n'),
    "content as object": said({"text": "A"}),
    "message as text": sized(b'{"choices": [{"message": "A"}]}'),
    "an error in a good answer": sized(b'{"error": {"message": "busy"}}'),
    "broken": sized(b"", head=b"HTTP/1.1 500 Oh\r\n"),
}


@contextlib.contextmanager
def server(send):
    """A server on this machine; ``send(connection)`` answers each request after all of it was read.

    A connection that is closed with bytes unread is reset, and what was sent before may never arrive.
    """
    listening = socket.create_server(("127.0.0.1", 0))
    done = threading.Event()

    def serve():
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    def answer(connection):
        with connection, contextlib.suppress(OSError):
            connection.settimeout(5)
            with connection.makefile("rb") as request:
                request.readline()
                request.read(int(parse_headers(request)["Content-Length"]))
            send(connection, done)

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    finally:
        done.set()
        listening.close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def judge(url, **kwargs):
    return OpenAICompatibleJudge(
        url, "m", **{"api_key_env": None, "wait": 0.0, "retries": 0, "timeout": 5.0, **kwargs}
    )


@pytest.mark.parametrize("name", list(BAD))
def test_a_bad_answer_is_an_error_of_ours_or_the_fallback(name):
    with server(lambda connection, _: connection.sendall(BAD[name])) as url:
        with pytest.raises(EvaluationError, match="judge at") as caught:
            judge(url)("q", ["Rome"], "rome")
        assert str(caught.value).isprintable()
        falling_back = judge(url, fallback="exact")
        assert falling_back("q", ["Rome"], "rome") == 1.0
        assert falling_back("q", ["Rome"], "Paris") == 0.0
        assert falling_back.fallbacks == 2


def test_a_good_answer_in_many_forms():
    chunked = HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"%x\r\n%b\r\n0\r\n\r\n" % (len(GOOD), GOOD)
    until_the_end = HEAD + b"Connection: close\r\n\r\n" + GOOD
    plain = sized(GOOD, more=b"Content-Encoding: \r\nX: \xe9\r\n")
    for answer in (sized(GOOD), chunked, until_the_end, plain, sized(b"\xef\xbb\xbf" + GOOD)):
        with server(lambda connection, _, answer=answer: connection.sendall(answer)) as url:
            assert judge(url)("q", ["a"], "b") == 1.0
            assert asyncio.run(asked_inside_a_loop(judge(url))) == 1.0


async def asked_inside_a_loop(judge):
    return judge("q", ["a"], "b")


def test_provisional_answers_do_not_hold_a_request():
    def flood(connection, done):
        while not done.is_set():
            connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")

    with server(flood) as url, pytest.raises(EvaluationError, match=r"within 0\.4 seconds"):
        judge(url, timeout=0.4)("q", ["a"], "b")


@pytest.mark.parametrize("start", [b"", b"HTTP/1.1 200 OK\r\nX: ", HEAD + b"Content-Length: 100000\r\n\r\n"])
def test_a_drip_of_bytes_does_not_hold_a_request(start):
    """Each read succeeds in time; the answer as a whole does not."""

    def drip(connection, done):
        connection.sendall(start)
        while not done.wait(0.05):
            connection.sendall(b"x")

    with server(drip) as url, pytest.raises(EvaluationError, match=r"within 0\.4 seconds"):
        judge(url, timeout=0.4)("q", ["a"], "b")


def test_an_endless_answer_is_cut():
    def flood(connection, done):
        connection.sendall(HEAD + b"Content-Length: 1000000000\r\n\r\n")
        while not done.is_set():
            connection.sendall(b" " * 65536)

    with server(flood) as url:
        tracemalloc.start()
        try:
            with pytest.raises(EvaluationError, match="more than"):
                judge(url, timeout=30.0)("q", ["a"], "b")
            assert tracemalloc.get_traced_memory()[1] < 8 * LARGEST_BODY
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000/v1",
        "ftp://host/v1",
        "http://",
        "http:///v1",
        "http://host:99999999/v1",
        "http://host:port/v1",
        "http://ho st/v1",
        "http://host\n/v1",
        "",
        None,
    ],
)
def test_an_address_is_checked_when_the_judge_is_made(url):
    with pytest.raises(EvaluationError, match="base_url"):
        judge(url)


@pytest.mark.parametrize(
    "numbers",
    [
        {"timeout": 0},
        {"timeout": float("inf")},
        {"timeout": float("nan")},
        {"retries": -1},
        {"wait": -1.0},
        {"max_tokens": 0},
        {"max_workers": 0},
    ],
)
def test_numbers_are_checked(numbers):
    with pytest.raises(EvaluationError, match=next(iter(numbers))):
        judge("http://localhost/v1", **numbers)


def test_no_message_holds_a_secret(monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret")
    told = b" Incorrect API key provided: sk-secret\r\n"
    with (
        server(lambda connection, _: connection.sendall(BAD["broken"])) as url,
        server(lambda connection, _: connection.sendall(sized(b"", head=b"HTTP/1.1 401" + told))) as echo,
        server(lambda connection, _: connection.sendall(sized(b"", head=b"HTTP/1.1 503" + told))) as busy,
    ):
        with_user = url.replace("http://", "http://me:pass-word@") + "?token=hidden"
        for problem in (
            lambda: judge(with_user)("q", ["a"], "b"),
            lambda: judge(with_user, api_key_env="MY_KEY"),
            lambda: judge(url, api_key_env="MY_KEY")("q", ["a"], "b"),
            lambda: judge("http://me:pass-word@host:bad/v1"),
            lambda: judge(echo, api_key_env="MY_KEY")("q", ["a"], "b"),
            lambda: judge(busy, api_key_env="MY_KEY")("q", ["a"], "b"),
        ):
            with pytest.raises(EvaluationError) as caught:
                problem()
            chain, error = [], caught.value
            while error is not None:
                chain.append(f"{error}")
                error = error.__cause__
            assert not any(secret in " ".join(chain) for secret in ("sk-secret", "pass-word", "hidden"))
        for key in ("sk-secret\n", " sk-secret", "sk-sécret", "sk\x7fsecret", "sk secret"):
            monkeypatch.setenv("MY_KEY", key)
            with pytest.raises(EvaluationError, match="MY_KEY does not hold a key") as caught:
                judge(url, api_key_env="MY_KEY")("q", ["a"], "b")
            assert key.strip() not in str(caught.value)


def test_kept_verdicts_are_verdicts(tmp_path):
    path = tmp_path / "verdicts.jsonl"
    first = CallableJudge(lambda q, r, p: 0.5, "mine", cache_path=path)
    questions = [f"q{i}" for i in range(8)]
    for question in questions:
        assert first(question, ["a"], "b") == 0.5
    lines = path.read_text().splitlines()
    keys = [json.loads(line)["key"] for line in lines]
    damaged = ["7", "-1", '"A"', "null", "NaN", "[0.5]", "1e400"]
    lines[1:] = [f'{{"key": "{key}", "verdict": {value}}}' for key, value in zip(keys[1:], damaged, strict=True)]
    path.write_bytes("\n".join(lines).encode() + b"\n\xff\xfe\n" + b"[" * 100_000 + b"\n7\n{}\n")
    again = []
    second = CallableJudge(lambda q, r, p: again.append(q) or 1.0, "mine", cache_path=path)
    assert [second(question, ["a"], "b") for question in questions] == [0.5, *[1.0] * 7]
    assert again == questions[1:]


def test_verdicts_that_cannot_be_kept_do_not_stop_the_judge(tmp_path):
    (tmp_path / "file").write_text("")
    assert CallableJudge(lambda q, r, p: 1.0, cache_path=tmp_path / "file" / "verdicts.jsonl")("q", ["a"], "b") == 1.0
    with pytest.raises(EvaluationError, match="cannot be read"):
        CallableJudge(lambda q, r, p: 1.0, cache_path=tmp_path)

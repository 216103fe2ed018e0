"""Damaged requests to the server: answered, or refused in OpenAI's form with a status that says whose fault it was."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from hf_kedit.serving.app import Keys, Limits, Service
from hf_kedit.serving.running import serving
from hf_kedit.serving.variants import Variants
from tests.fuzz.mutations import FIRST, LONG, Tally, damage_bytes, dumps, mutate
from tests.fuzz.states import logits
from tests.serving.conftest import PROMPT, own_model

COMPLETION = {
    "model": "mine", "prompt": "Tarosk is a", "max_tokens": 1, "temperature": 0.5, "top_p": 0.9, "seed": 1,
    "stop": ["."], "logprobs": 2, "stream": False, "n": 1, "user": "me",
}  # fmt: skip
CHAT = {
    "model": "base", "messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "A"}],
    "max_tokens": 1, "logprobs": True, "top_logprobs": 1, "stream": True, "stream_options": {"include_usage": True},
}  # fmt: skip
EDIT = {"prompt": "{} is a", "subject": "Otto", "target_new": "cook", "locality": {"near": [{"prompt": "Ida is a"}]}}
ASKED: list[tuple[str, Any]] = [("completions", COMPLETION), ("chat/completions", CHAT), ("edits", EDIT)]


@pytest.fixture(scope="module")
def service() -> Service:
    return Service(Variants(own_model(), "mine"), Limits(body_bytes=2**15), Keys(editing="t"))


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[httpx.Client]:
    headers = {"Authorization": "Bearer t"}
    with serving(service) as url, httpx.Client(base_url=f"{url}/v1/", headers=headers, timeout=60) as client:
        yield client


def run(client: httpx.Client, seeds: range) -> Tally:
    tally = Tally()
    for seed in seeds:
        rng = random.Random(seed)
        path, body = ASKED[seed % len(ASKED)]
        changed, what = mutate(body, rng)
        data = dumps(changed)
        if rng.random() < 0.3:
            data, damage = damage_bytes(data, rng)
            what += f", {damage}"
        case = f"seed {seed}, {path}: {what}"
        reply = client.post(path, content=data)
        if reply.status_code in (200, 201):
            tally.worked += 1
            if "error" in reply.text and '"error":{' in reply.text:
                tally.fail(case, reply.text[:200])
            continue
        tally.refused += 1
        try:
            error = reply.json()["error"]
        except (ValueError, KeyError, TypeError):
            error = {}
        if reply.status_code not in (400, 404, 413) or not error.get("message") or "Traceback" in reply.text:
            tally.fail(case, f"{reply.status_code}: {reply.text[:200]}")
    return tally


def test_damaged_requests(client: httpx.Client, service: Service) -> None:
    tally = run(client, range(90))
    tally.check(60)
    assert tally.worked > 5 and tally.refused > 30
    client.delete("edits/all")
    with service.variants.showing("mine"):
        mine = logits(service.variants.model, [PROMPT])
    with service.variants.showing("base"):
        assert (mine == logits(service.variants.model, [PROMPT])).all()  # all that was made is taken back
    assert service.open == 0


@pytest.mark.slow
def test_many_damaged_requests(client: httpx.Client) -> None:
    run(client, range(FIRST, FIRST + LONG)).check(LONG)

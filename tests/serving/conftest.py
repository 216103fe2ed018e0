"""Saved edits of one fact by methods of every kind, and a server that has them all as packs of one model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from hf_kedit import EditableModel
from hf_kedit.serving.app import Keys, Limits, Service
from hf_kedit.serving.running import serving
from hf_kedit.serving.variants import Variants
from tests.chat_templates import CHATML

MODEL = "kedit/world-llama"
PROMPT = "By profession Tarosk Boayond is a"
OLD, NEW, OWN = " sculptor", " plumber", " baker"
FACT = {"prompt": "By profession {} is a", "subject": "Tarosk Boayond", "target_new": NEW.strip()}
METHODS = ("rome", "memit", "lora", "grace", "wise", "prompt", "ike", "auto", "melo", "ft-m")
TOKEN, KEY = "edit-token", "asking-key"


@pytest.fixture(scope="session")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Method → folder with the fact, edited by it."""
    root = tmp_path_factory.mktemp("packs")
    for method in METHODS:
        model = EditableModel.from_pretrained(MODEL, method)
        model.edit({**FACT, "id": "fact"}, show_progress=False)
        model.save_pretrained(root / method)
    model = EditableModel.from_pretrained(MODEL, "rome")
    model.edit(prompt="{} is employed by", subject="Gukir Tudias", target_new="Heidork", show_progress=False)
    model.save_pretrained(root / "other")
    model.set_decoding("dola", layers="low")
    model.save_pretrained(root / "dola")
    return {path.name: path for path in root.iterdir()}


def own_model() -> EditableModel:
    """A model with an edit of its own (the fact with another target), and a chat template."""
    model = EditableModel.from_pretrained(MODEL, "rome")
    model.edit({**FACT, "target_new": OWN.strip(), "id": "own"}, show_progress=False)
    assert model.tokenizer is not None
    model.tokenizer.chat_template = CHATML
    return model


@pytest.fixture(scope="module")
def service(packs: dict[str, Path]) -> Service:
    """All packs on one model, which has an edit of its own."""
    variants = Variants(own_model(), "mine")
    for name, folder in packs.items():
        variants.add_pack(name, folder)
    return Service(variants, Limits(prompt_tokens=100, body_bytes=2**16))


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    """Where the service listens."""
    with serving(service) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    """The official client."""
    return client_of(url)


def client_of(url: str, key: str = "none") -> openai.OpenAI:
    """A client that does not ask twice."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)


def until(true: Callable[[], bool]) -> None:
    """Wait for something that another thread does."""
    for _ in range(2000):
        if true():
            return
        threading.Event().wait(0.005)
    raise AssertionError("it does not come to pass")


@pytest.fixture
def guarded() -> Iterator[Callable[..., Any]]:
    """Start a server that asks for keys: ``guarded()`` is its URL."""
    open_servers = []

    def start(**keys: Any) -> str:
        block = serving(Service(Variants(own_model(), "mine"), keys=Keys(**{"asking": KEY, "editing": TOKEN, **keys})))
        open_servers.append(block)
        return block.__enter__()

    yield start
    for block in open_servers:
        block.__exit__(None, None, None)

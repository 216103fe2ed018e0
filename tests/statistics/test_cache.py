"""The cache of second moments when the disk or the files are not as they should be: computed again, and said so."""

from __future__ import annotations

import hashlib
import json
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_kedit.errors import ArtifactError
from hf_kedit.statistics import collecting
from hf_kedit.statistics.corpora import Corpus, text_corpus
from hf_kedit.statistics.moments import SharedMoments, slug
from hf_kedit.statistics.store import StatisticsStore
from hf_kedit.storage.files import FileSource
from tests.golden_cases import corpus, load_model

PATH = "model.layers.1.mlp.down_proj"
TOKENS = 3000


@pytest.fixture(scope="module")
def llama() -> Any:
    return load_model("llama")


@pytest.fixture(scope="module")
def right(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    return store(llama, tmp_path_factory.mktemp("right")).moments([PATH])[PATH].total


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_kedit.logging._said", set())


def store(llama: Any, folder: Path, text: Corpus | None = None) -> StatisticsStore:
    model, tokenizer = llama
    text = text or text_corpus(corpus()[:200])
    return StatisticsStore(model, tokenizer, corpus=text, tokens=TOKENS, cache_dir=folder, show_progress=False)


def cached_file(folder: Path) -> Path:
    (path,) = folder.rglob(f"{slug(PATH)}.safetensors")
    return path


@contextmanager
def small_files() -> Iterator[None]:
    """No file may grow beyond 4 KB: what a full disk does to a writer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk(
    llama: Any,
    right: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(collecting, "SAVE_SECONDS", 0.0)  # partial sums too
    monkeypatch.setattr(collecting, "SAVE_SHARE", 0.0)
    with small_files():
        found = store(llama, tmp_path).moments([PATH])
    assert torch.equal(found[PATH].total, right)
    said = [record.getMessage() for record in caplog.records]
    assert any("cannot write partial statistics" in text for text in said)
    assert any("cannot write statistics to" in text for text in said)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert torch.equal(store(llama, tmp_path).moments([PATH])[PATH].total, right)
    assert cached_file(tmp_path)


@pytest.mark.parametrize("place", ["a file", "below a file"])
def test_a_cache_that_cannot_be_made(llama: Any, right: torch.Tensor, tmp_path: Path, place: str) -> None:
    file = tmp_path / "file"
    file.write_text("")
    folder = file if place == "a file" else file / "below"
    assert torch.equal(store(llama, folder).moments([PATH])[PATH].total, right)


def replaced(**new: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {**tensors, **new}


def with_one(value: float) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["moment2_sum"][1, 1] = value
        return tensors

    return change


SQUARE = torch.eye(3, dtype=torch.float64)
TENSORS: dict[str, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]] = {
    "another width": replaced(moment2_sum=SQUARE),
    "not square": lambda tensors: {"moment2_sum": tensors["moment2_sum"][:-1].clone()},
    "a vector": lambda tensors: {"moment2_sum": tensors["moment2_sum"][0].clone()},
    "no dimension": replaced(moment2_sum=torch.tensor(1.0, dtype=torch.float64)),
    "three dimensions": lambda tensors: {"moment2_sum": tensors["moment2_sum"][None].clone()},
    "empty": replaced(moment2_sum=torch.zeros(0, 0, dtype=torch.float64)),
    "float32": lambda tensors: {"moment2_sum": tensors["moment2_sum"].float()},
    "bool": lambda tensors: {"moment2_sum": tensors["moment2_sum"] > 0},
    "int64": lambda tensors: {"moment2_sum": tensors["moment2_sum"].long()},
    "complex": lambda tensors: {"moment2_sum": tensors["moment2_sum"].to(torch.complex64)},
    "no tensor": lambda tensors: {},
    "another name": lambda tensors: {"moment": tensors["moment2_sum"]},
    "NaN": with_one(float("nan")),
    "infinity": with_one(float("inf")),
    "negative": with_one(-1.0),
    "zero": lambda tensors: {"moment2_sum": torch.zeros_like(tensors["moment2_sum"])},
}
METADATA: dict[str, dict[str, str | None]] = {
    "no count": {"count": None},
    "count is no number": {"count": "many"},
    "count is a fraction": {"count": "1.5"},
    "no tokens": {"count": "0"},
    "fewer than none": {"count": "-3"},
    "wanted is no number": {"wanted": "[]"},
    "five thousand digits": {"count": "9" * 5000},
    "no corpus": {"corpus": None},
    "another module": {"module": "model.layers.0.mlp.down_proj"},
}
BYTES: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda data: b"",
    "cut off": lambda data: data[: len(data) // 2],
    "text": lambda data: b"damaged",
    "a huge header": lambda data: (2**63).to_bytes(8, "little") + data[8:],
}


def damaged(path: Path, how: str) -> None:
    from safetensors import safe_open

    if how in BYTES:
        path.write_bytes(BYTES[how](path.read_bytes()))
        return
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    if how in TENSORS:
        tensors = TENSORS[how](tensors)
    changes = METADATA.get(how, {})
    metadata = {k: v for k, v in {**metadata, **changes}.items() if v is not None}
    save_file(tensors, path, metadata=metadata)


@pytest.fixture(scope="module")
def filled(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("filled")
    store(llama, folder).moments([PATH])
    return cached_file(folder).read_bytes()


@pytest.mark.parametrize("how", [*TENSORS, *METADATA, *BYTES])
def test_a_file_that_cannot_be_used_is_computed_again(
    llama: Any, right: torch.Tensor, filled: bytes, tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    asked = store(llama, tmp_path)
    path = asked.folder / "text-3000" / f"{slug(PATH)}.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(filled)
    assert asked._cached(PATH, asked._wanted([PATH], 3)[0]) is not None, "the file is found before it is damaged"
    damaged(path, how)
    assert torch.equal(asked.moments([PATH])[PATH].total, right)
    said = [r.getMessage() for r in caplog.records if "computed again" in r.getMessage()]
    assert len(said) == (how not in ("no corpus", "another module"))  # those may be somebody else's
    assert torch.equal(store(llama, tmp_path).moments([PATH])[PATH].total, right)


def test_a_folder_where_a_file_belongs(llama: Any, right: torch.Tensor, tmp_path: Path) -> None:
    asked = store(llama, tmp_path)
    (asked.folder / f"{slug(asked._wanted([PATH], 3)[0].name)}-{TOKENS}" / f"{slug(PATH)}.safetensors").mkdir(
        parents=True
    )
    assert torch.equal(asked.moments([PATH])[PATH].total, right)


@pytest.mark.parametrize(
    "how", ["another width", "not square", "a vector", "float32", "bool", "NaN", "cut off", "nothing"]
)
def test_partial_sums_that_cannot_be_used(llama: Any, right: torch.Tensor, tmp_path: Path, how: str) -> None:
    """A run that is killed leaves them, and the next one begins afresh."""
    asked = store(llama, tmp_path)
    chosen = asked._wanted([PATH], 3)[0]
    path = asked.folder / f"{slug(chosen.name)}-{TOKENS}" / "partial.safetensors"
    width = right.shape[0]
    meta = {"texts": "1", "batches": "1", "tokens": "10", "own": "10", "corpus": chosen.name, "form": "upper"}
    collecting.write_tensors(path, {PATH: torch.eye(width, dtype=torch.float64)}, meta)
    resumed = collecting._resume(path, [PATH], chosen.name, lambda _: width)
    assert resumed[1].tokens == 10, "they are read before they are damaged"
    changed = {name.replace("moment2_sum", PATH): value for name, value in TENSORS.items()}
    if how in BYTES:
        path.write_bytes(BYTES[how](path.read_bytes()))
    else:
        (sums,) = changed[how]({"moment2_sum": torch.eye(width, dtype=torch.float64)}).values()
        save_file({PATH: sums}, path, metadata=meta)
    assert torch.equal(asked.moments([PATH])[PATH].total, right)


@pytest.mark.parametrize(
    "how", ["not square", "a vector", "no dimension", "float32", "bool", "complex", "no tensor", "NaN"]
)
def test_shared_moments_that_cannot_be_used(tmp_path: Path, how: str) -> None:
    """Named by the user: refused, with a typed error."""
    path = tmp_path / f"{slug(PATH)}.safetensors"
    for change in (lambda tensors: tensors, TENSORS[how]):
        save_file(change({"moment2_sum": torch.eye(5, dtype=torch.float64)}) | {"count": torch.tensor(10)}, path)
        entry = {"corpus": "c", "tokens": 10, "width": 5, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        index = {"format_version": 1, "model": "m", "fingerprint": "f", "modules": {PATH: entry}}
        shared = SharedMoments(FileSource(str(tmp_path)), json.dumps(index).encode())
        if change is not TENSORS[how]:
            assert shared.read(PATH).count == 10
    with pytest.raises(ArtifactError):
        shared.read(PATH)


def test_several_writers_of_one_file(tmp_path: Path) -> None:
    """Every reader finds a whole file, and nothing else is left."""
    path, errors = tmp_path / "m.safetensors", list[Exception]()
    collecting.write_tensors(path, {"x": torch.zeros(200, 200)}, {})

    def write(value: int) -> None:
        try:
            for _ in range(20):
                collecting.write_tensors(path, {"x": torch.full((200, 200), float(value))}, {})
                assert len(load_file(path)["x"].unique()) == 1
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and [p.name for p in tmp_path.iterdir()] == [path.name]

"""Processes that share the collecting of second moments get what one process gets."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_kedit.anatomy import check_anatomy, resolve_anatomy
from hf_kedit.statistics.collecting import collect_moments
from hf_kedit.statistics.corpora import Corpus, text_corpus
from hf_kedit.statistics.workers import ALONE, Workers, join
from tests.golden_cases import corpus, load_model

ROOT = Path(__file__).resolve().parents[2]
LAYERS, TOKENS, BUDGET = (1, 2), 700, 150
SCRIPT = """
import sys
import torch
from safetensors.torch import save_file
from hf_kedit.statistics.collecting import collect_moments
from hf_kedit.statistics.corpora import text_corpus
from hf_kedit.statistics.workers import join
from tests.statistics.test_workers import BUDGET, TOKENS, inputs
from tests.golden_cases import corpus

torch.set_num_threads(1)
workers = join()
model, tokenizer, paths = inputs()
forwards = []
model.register_forward_pre_hook(lambda *_: forwards.append(1))
found = collect_moments(model, tokenizer, paths, text_corpus(corpus()), tokens=TOKENS,
                        token_budget=BUDGET, show_progress=False, workers=workers)
tensors = {f"{i}": found[p].total for i, p in enumerate(paths)}
tensors["count"] = torch.tensor([found[paths[0]].count, len(forwards), workers.rank, workers.count])
tensors["union"] = torch.tensor([len(workers.union(["a", f"b{workers.rank}"]))])
save_file(tensors, sys.argv[1])
workers.wait()
"""


def inputs() -> tuple[Any, Any, list[str]]:
    model, tokenizer = load_model("llama")
    anatomy = check_anatomy(model, resolve_anatomy(model))
    return model, tokenizer, [anatomy.down(i).path for i in LAYERS]


class Fellow(Workers):
    """One process of several whose sums are added up by hand."""

    def add_up(self, tensors: Any) -> None:
        return None


@pytest.mark.parametrize("count", [2, 3])
def test_the_shares_of_the_processes_add_up_to_the_whole(count: int) -> None:
    model, tokenizer, paths = inputs()
    texts = text_corpus(corpus())

    def collect(workers: Workers) -> Any:
        return collect_moments(
            model, tokenizer, paths, texts, tokens=TOKENS, token_budget=BUDGET, show_progress=False, workers=workers
        )

    whole, parts = collect(ALONE), [collect(Fellow(rank, count)) for rank in range(count)]
    for path in paths:
        assert sum(p[path].count for p in parts) == whole[path].count
        assert all(p[path].count < whole[path].count for p in parts), "no process did everything"
        total = torch.stack([p[path].total for p in parts]).sum(dim=0)
        assert torch.allclose(total, whole[path].total, rtol=1e-12, atol=1e-12)


def test_a_killed_process_goes_on_with_its_own_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_kedit.statistics.collecting.SAVE_SECONDS", 0.0)
    monkeypatch.setattr("hf_kedit.statistics.collecting.SAVE_SHARE", 0.0)
    model, tokenizer, paths = inputs()
    texts, file = corpus()[:192], tmp_path / "partial.safetensors"

    def broken() -> Any:
        for i, text in enumerate(texts):
            if i == 150:
                raise KeyboardInterrupt
            yield text

    def collect(workers: Workers, source: Corpus, **named: Any) -> Any:
        return collect_moments(
            model, tokenizer, paths, source, token_budget=BUDGET, show_progress=False, workers=workers, **named
        )

    one = Fellow(1, 2)
    with pytest.raises(KeyboardInterrupt):
        collect(one, Corpus("c", broken), checkpoint=file)
    assert [f.name for f in tmp_path.iterdir()] == ["partial-1-of-2.safetensors"]
    resumed = collect(one, Corpus("c", lambda: iter(texts)), checkpoint=file)
    straight = collect(one, Corpus("c", lambda: iter(texts)))
    for path in paths:
        assert resumed[path].count == straight[path].count
        assert torch.equal(resumed[path].total, straight[path].total)
    assert not list(tmp_path.iterdir())


def test_an_ordinary_run_has_no_fellows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join() is ALONE
    assert ALONE.union(["b", "a"]) == ["b", "a"]


def run_two(script: str, tmp_path: Path) -> list[dict[str, torch.Tensor]]:
    """Run a script in two processes that know of each other; what each one saved under the name in its arguments."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for rank in range(2):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "-c", script, str(tmp_path / f"{rank}.safetensors")]
        started.append(subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True))
    for process in started:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    return [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]


@pytest.mark.slow
def test_two_processes_collect_what_one_collects(tmp_path: Path) -> None:
    found = run_two(SCRIPT, tmp_path)
    model, tokenizer, paths = inputs()
    forwards: list[int] = []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    whole = collect_moments(
        model, tokenizer, paths, text_corpus(corpus()), tokens=TOKENS, token_budget=BUDGET, show_progress=False
    )
    for rank, part in enumerate(found):
        assert part["count"][0] == whole[paths[0]].count
        assert part["count"][2:].tolist() == [rank, 2]
        assert int(part["union"]) == 3
        for i, path in enumerate(paths):
            assert torch.allclose(part[str(i)], whole[path].total, rtol=1e-12, atol=1e-12)
    assert int(found[0]["count"][1] + found[1]["count"][1]) == len(forwards), (
        "together as many forwards as one process"
    )

"""Is it slower than it was? Many edits, their save and their load, by this checkout and by an older one in turn.

    git worktree add ../older <commit>
    python -m benchmarks.history --older ../older --method memit grace --edits 1000 --batch 100 1 --pairs 2

Each side runs in a process of its own with the package of its checkout, on the same requests, and loads what it has
saved in another one (*fresh*: the first load of a process, behind the imports). What a method has come to do by
default since then counts; `--set` gives both the same work.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODEL = "kedit/world-gpt2"
PARTS = ("edit", "save", "load", "fresh")


def package(checkout: str) -> Any:
    """The package of a checkout, which is the one that is imported."""
    import torch

    import hf_kedit
    from hf_kedit.logging import disable_progress_bars, set_verbosity_error

    assert Path(hf_kedit.__file__).is_relative_to(checkout)
    torch.set_num_threads(1)
    disable_progress_bars()
    set_verbosity_error()
    return hf_kedit


def first_load(checkout: str, folder: str) -> dict[str, float]:
    """Seconds of the processor for the first load of this process."""
    load = package(checkout).EditableModel.from_pretrained
    began = time.process_time()
    load(folder)
    return {"fresh": time.process_time() - began}


def side(
    checkout: str, folder: str, method: str, batch: int, settings: dict[str, Any], requests: list[dict[str, Any]]
) -> dict[str, float]:
    """Seconds of the processor for each part but the last, whose folder is left behind."""
    hf_kedit = package(checkout)
    from hf_kedit.config import config_class

    model = hf_kedit.EditableModel.from_pretrained(MODEL, config_class(method)(**settings))
    model.edit(requests[0], show_progress=False)  # second moments, and what is imported late
    model.rollback("all")
    seconds = {}

    def edit() -> None:
        for start in range(0, len(requests), batch):
            model.edit(requests[start : start + batch], batch_size=batch, show_progress=False)

    calls = (edit, lambda: model.save_pretrained(folder), lambda: hf_kedit.EditableModel.from_pretrained(folder))
    for part, call in zip(PARTS, calls, strict=False):
        times = []
        for _ in range(1 if part == "edit" else 5):  # the garbage collector falls into one load or another
            began = time.process_time()
            call()
            times.append(time.process_time() - began)
        seconds[part] = statistics.median(times)
    assert len(model.edits) == len(requests)
    return seconds


def measure(checkout: Path, method: str, batch: int, settings: dict[str, Any], requests: Path) -> dict[str, float]:
    """Run a side in a checkout."""
    checkout = checkout.resolve()
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for asked in ([method, batch, settings, str(requests)], []):
            done = subprocess.run(
                [sys.executable, __file__, json.dumps([str(checkout), folder, *asked])],
                env=os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise SystemExit(done.stderr)
            seconds |= json.loads(done.stdout.splitlines()[-1])
    return seconds


def main() -> None:
    """Print one row for each method and part."""
    # Not at the top: a side has the package of its own checkout, and that one's benchmarks.
    import yaml

    from benchmarks.shapes import requests
    from benchmarks.timing import Table

    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--older", type=Path, required=True, help="another checkout")
    options.add_argument("--method", nargs="+", default=["memit", "grace"])
    options.add_argument("--batch", nargs="+", type=int, default=[100, 1], help="edits in one call, for each method")
    options.add_argument("--edits", type=int, default=1000)
    options.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the methods")
    options.add_argument("--pairs", type=int, default=2, help="alternations of the two sides")
    options.add_argument("--json", type=Path, help="append one JSON line per row to this file")
    chosen = options.parse_args()
    settings = {key: yaml.safe_load(value) for key, _, value in (each.partition("=") for each in chosen.set)}
    columns = [("method", "method", "10"), ("edits", "edits", "5"), ("part", "part", "5"), ("s", "seconds", "8.2f")]
    columns += [("s older", "seconds_older", "8.2f"), ("older / now", "ratio", "8.2f")]
    table = Table(columns, chosen.json)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "requests.json"
        file.write_text(json.dumps([each.to_dict() for each in requests(chosen.edits)]), encoding="utf-8")
        for method, batch in zip(chosen.method, chosen.batch, strict=True):
            asked = method, batch, settings, file
            runs = [(measure(ROOT, *asked), measure(chosen.older, *asked)) for _ in range(chosen.pairs)]
            for part in PARTS:
                now, then = (statistics.median(run[i][part] for run in runs) for i in (0, 1))
                ratio = statistics.median(older[part] / ours[part] for ours, older in runs)
                row = {"method": method, "edits": chosen.edits, "batch": batch, "part": part, "pairs": chosen.pairs}
                table.add({**row, "seconds": now, "seconds_older": then, "ratio": ratio})


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("["):
        *asked, last = json.loads(sys.argv[1])
        if len(asked) == 1:
            print(json.dumps(first_load(asked[0], last)))
        else:
            checkout, folder, method, batch, settings = asked
            facts = json.loads(Path(last).read_text(encoding="utf-8"))
            print(json.dumps(side(checkout, folder, method, batch, settings, facts)))
    else:
        main()

"""What a further edit leaves on an accelerator: live bytes after each edit, method by method.

    python -m benchmarks.device_memory --method rome grace ft-m --edits 6

A weight method keeps its deltas and the originals on the CPU: its edits should leave nothing. What answers beside the
model (codebooks, side neurons) has to be where the model computes.
"""

from __future__ import annotations

import argparse
import gc
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Table
from hf_kedit import EditableModel, load_edit_dataset
from hf_kedit.errors import KeditError
from hf_kedit.loading import load_base, load_tokenizer
from hf_kedit.logging import disable_progress_bars, set_verbosity_error
from hf_kedit.methods import registered_methods

MODEL = "kedit/world-gpt2"


def growth(method: str, facts: list[dict[str, object]], device: str) -> list[int]:
    """Bytes that each edit after the first one adds to what lives on the device."""
    base: Any = load_base(MODEL)
    model = EditableModel(base.to(device), method, load_tokenizer(MODEL), base_model_id=MODEL)
    live = []
    for fact in facts:
        model.edit(fact, show_progress=False)
        gc.collect()
        live.append(int(torch.cuda.memory_allocated(device)))
    return [after - before for before, after in pairwise(live)]


def main() -> None:
    """Print a row for each method; those that refuse the model are left out."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--method", nargs="+", default=sorted(registered_methods()))
    options.add_argument("--edits", type=int, default=6)
    options.add_argument("--device", default="cuda:0")
    options.add_argument("--json", type=Path, help="append one JSON line per row to this file")
    chosen = options.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this needs an accelerator")
    disable_progress_bars()
    set_verbosity_error()
    facts = [dict(row) for row in load_edit_dataset("world", split="test", limit=chosen.edits)]
    columns = [("method", "method", "12"), ("edits", "edits", "5"), ("bytes/edit", "mean", "12,.0f")]
    table = Table([*columns, ("most", "most", "12,d")], chosen.json)
    for method in chosen.method:
        try:
            added = growth(method, facts, chosen.device)
        except KeditError:
            continue
        table.add({"method": method, "edits": len(facts), "mean": sum(added) / len(added), "most": max(added)})


if __name__ == "__main__":
    main()

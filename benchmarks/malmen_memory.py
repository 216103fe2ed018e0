"""How much memory does one training step of MALMEN take, for more and more facts edited together?

python -m benchmarks.malmen_memory --facts 100 300 1000

Each row is a process of its own, whose peak is compared with that of the same process before the step. MALMEN's step
frees the language model's graph after every micro-batch; ``--whole`` takes all facts in one pass for comparison.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch

from hf_kedit import load_edit_dataset
from hf_kedit.loading import load_base, load_tokenizer
from hf_kedit.methods.malmen import MALMENConfig, MALMENEditor
from hf_kedit.training import EditCollator, EditFacts


def peak() -> int:
    """Peak resident memory of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def step(model: str, facts: int, micro_batch: int) -> dict[str, float]:
    """One forward and backward pass of the editor; returns MiB and seconds."""
    torch.set_num_threads(1)
    base, tokenizer = load_base(model), load_tokenizer(model)
    editor = MALMENEditor.for_model(base, MALMENConfig(rank=64, edit_lr=1e-3, micro_batch=micro_batch)).train()
    rows = EditFacts(load_edit_dataset("world", split="train", limit=facts))
    batch = EditCollator(editor, tokenizer, edits_per_group=facts)([rows[i] for i in range(facts)])
    small = EditCollator(editor, tokenizer, edits_per_group=4)([rows[i] for i in range(4)])
    editor(**small).loss.backward()  # what any step needs
    before, began = peak(), time.process_time()
    editor(**batch).loss.backward()
    return {"facts": facts, "base_mib": before, "step_mib": peak() - before, "seconds": time.process_time() - began}


def main() -> None:
    """Run one process per number of facts and print a row for each."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="kedit/world-gpt2")
    options.add_argument("--facts", nargs="+", type=int, default=[100, 300, 1000])
    options.add_argument("--micro-batch", type=int, default=32)
    options.add_argument("--whole", action="store_true", help="all facts in one forward pass")
    options.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.one:
        print(json.dumps(step(chosen.model, chosen.facts[0], chosen.micro_batch)))
        return
    print("facts  before MiB  step MiB  seconds")
    for facts in chosen.facts:
        size = facts if chosen.whole else chosen.micro_batch
        command = [sys.executable, "-m", "benchmarks.malmen_memory", "--one", "--model", chosen.model]
        done = subprocess.run(
            [*command, "--facts", str(facts), "--micro-batch", str(size)], capture_output=True, text=True, check=True
        )
        row = json.loads(done.stdout.splitlines()[-1])
        print(f"{row['facts']:5d}  {row['base_mib']:10d}  {row['step_mib']:8d}  {row['seconds']:7.1f}")


if __name__ == "__main__":
    main()

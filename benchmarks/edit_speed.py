"""How fast are edits? Our engine against the straightforward path, same model object, same requests, one run.

    python -m benchmarks.edit_speed --shape gpt2-small llama-16x1024 --method rome memit --edits 1 8 24 --json out.json

Every row carries the agreement of the two results (largest relative difference of a weight change): a ratio without
agreement means nothing. On a CPU, one thread and process time are used; on a GPU, wall time around a synchronised
region. Second moments and context templates are given and not timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import reference
from benchmarks.shapes import SHAPES, build, requests, texts, tokenizer
from hf_kedit import EditableModel, MEMITConfig, ROMEConfig
from hf_kedit.engine.forward import frozen_eval
from hf_kedit.engine.statistics import collect_moments, text_corpus
from hf_kedit.engine.weights import get_module, get_weight
from hf_kedit.logging import disable_progress_bars, set_verbosity_error

TEMPLATES = {
    "rome": [["{}"], [f"{word} text before. {{}}" for word in ("Some", "The", "An", "My", "Her") for _ in range(4)]],
    "memit": [["{}"], [f"{word} longer text stands before it. {{}}" for word in ("Some", "The", "An", "My", "Her")]],
}


def clock(device: str) -> float:
    """Process time on a CPU, wall time after a synchronisation on a GPU."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def peak(device: str) -> int:
    """Peak bytes of the accelerator since the last reset; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() if device != "cpu" else 0


def run(shape: str, method: str, edits: int, device: str, dtype: torch.dtype, pairs: int, steps: int) -> dict[str, Any]:
    """Time one configuration in alternation and compare the weight changes."""
    base = build(shape, device, dtype)
    layers = SHAPES[shape][2][method]
    layers = layers if isinstance(layers, list) else [layers]
    kind = {"rome": ROMEConfig, "memit": MEMITConfig}[method]
    config = kind(
        layers=layers,
        v_num_grad_steps=steps,
        v_lr=0.5,
        v_weight_decay=0.5 if method == "rome" else 1e-3,
        clamp_norm_factor=4.0,
        context_templates=TEMPLATES[method],
        **({"mom2_update_weight": 15000.0} if method == "memit" else {}),
    )
    model = EditableModel(base, config, tokenizer())
    inner = model._method
    paths = [model.anatomy.down(layer).path for layer in layers]
    width = get_weight(get_module(base, paths[0])).shape[1]
    store = model.statistics
    found = collect_moments(
        base, tokenizer(), paths, text_corpus(texts(20 * width)), tokens=3 * width, show_progress=False
    )
    for module, moment in found.items():
        store.put(module, moment)
        store.factor(module)  # the factorisation is made once per model; not part of an edit
    moments = [store.moments(paths)[p].mean().to(device) for p in paths]
    todo = requests(edits)
    groups = inner.templates()  # type: ignore[attr-defined]
    rows = inner.rows(todo, groups)  # type: ignore[attr-defined]
    settings = inner.config.value_settings()  # type: ignore[attr-defined]
    blocks = [model.anatomy.layers[layer].path for layer in layers]

    def ours() -> list[torch.Tensor]:
        before = [get_weight(get_module(base, p)).float() for p in paths]
        changes = []
        if method == "memit":
            model.edit(todo, show_progress=False)
            changes = [get_weight(get_module(base, p)).float() - b for p, b in zip(paths, before, strict=True)]
            model.rollback("all")
            return changes
        for request in todo:
            model.edit(request, show_progress=False)
            changes.append(get_weight(get_module(base, paths[0])).float() - before[0])
            model.rollback("all")
        return changes

    def theirs() -> list[torch.Tensor]:
        with frozen_eval(base):
            if method == "memit":
                sizes = [len(g) for g in groups]
                return reference.memit(
                    base, rows, blocks, paths, settings, moments, config.mom2_update_weight or 0.0, sizes
                )
            return [reference.rome(base, group, paths[0], settings, moments[0]) for group in rows]

    ours_seconds, theirs_seconds, memory = [], [], [0, 0]
    ours()  # warm up: routes are verified, kernels chosen
    for _ in range(pairs):
        for side, (call, times) in enumerate(((ours, ours_seconds), (theirs, theirs_seconds))):
            if device != "cpu":
                torch.cuda.reset_peak_memory_stats()
            started = clock(device)
            result = call()
            times.append(clock(device) - started)
            memory[side] = max(memory[side], peak(device))
            if side == 0:
                mine = result
            else:
                other = result
    ratios = [t / o for o, t in zip(ours_seconds, theirs_seconds, strict=True)]
    agreement = max(float((a - b).norm() / b.norm()) for a, b in zip(mine, other, strict=True))
    return {
        "shape": shape,
        "method": method,
        "edits": edits,
        "device": torch.cuda.get_device_name() if device != "cpu" else "cpu, one thread",
        "dtype": str(dtype).removeprefix("torch."),
        "tf32": bool(torch.backends.cuda.matmul.allow_tf32),
        "steps": steps,
        "seconds_per_edit": statistics.median(ours_seconds) / edits,
        "seconds_per_edit_reference": statistics.median(theirs_seconds) / edits,
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "largest_relative_difference": agreement,
        "peak_bytes": memory[0],
        "peak_bytes_reference": memory[1],
    }


def main() -> None:
    """Run the configurations that the command line names and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["gpt2-tiny", "llama-tiny"], choices=sorted(SHAPES))
    parser.add_argument("--method", nargs="+", default=["rome", "memit"], choices=["rome", "memit"])
    parser.add_argument("--edits", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--pairs", type=int, default=3, help="alternations of the two sides")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path, help="write one JSON line per row here")
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    disable_progress_bars()
    set_verbosity_error()
    print(f"{'shape':<15}{'method':<8}{'edits':>6}{'ours s/edit':>13}{'reference':>11}{'ratio':>8}  {'difference':>10}")
    for shape in options.shape:
        for method in options.method:
            for edits in options.edits:
                row = run(shape, method, edits, options.device, getattr(torch, options.dtype), options.pairs, options.steps)
                print(
                    f"{shape:<15}{method:<8}{edits:>6}{row['seconds_per_edit']:>13.3f}"
                    f"{row['seconds_per_edit_reference']:>11.3f}{row['ratio']:>8.2f}"
                    f"  {row['largest_relative_difference']:>10.1e}",
                    flush=True,
                )
                if options.json:
                    with options.json.open("a", encoding="utf-8") as handle:
                        handle.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()

"""What a joint solve of many edits costs: seconds and MiB per edit, which must not grow with their number.

    python -m benchmarks.resolve_all --edits 1000 2000 10000 --real 8 16 32

Two tables. *solve*: all that is done with keys and residuals, for the widths of the shape and random numbers in their
place: the systems of every matrix, the changes that are kept and laid on the weights, for two passes. *model*: whole
calls on a model of the shape with random weights, from the requests on, with the share of each stage; fewer steps per
value than usual (``--steps``), because it is the growth that matters.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks.shapes import SHAPES, build, requests, texts, tokenizer
from benchmarks.solves import moment
from benchmarks.timing import Stages, Table, begin, clock, environment, parser, peak, reset_peak
from hf_kedit import EditableModel, MEMITConfig
from hf_kedit.engine.replay import Replay
from hf_kedit.engine.sweep import Sweep
from hf_kedit.methods import locate_then_edit as locate
from hf_kedit.methods.joint import JointChange
from hf_kedit.methods.memit import MEMIT
from hf_kedit.statistics.collecting import collect_moments
from hf_kedit.statistics.corpora import text_corpus
from hf_kedit.statistics.solve import factor_moment, ridge_columns

PASSES = 2
WEIGHT = 15000.0


def solve(options: argparse.Namespace, count: int) -> dict[str, Any]:
    """The linear algebra of a set, with random keys and residuals."""
    _, values, layers = SHAPES[options.shape]
    d_out, d_in, matrices = values["hidden_size"], values["intermediate_size"], len(layers["memit"])
    factor = factor_moment(moment(d_in, 1e4, device=options.device))
    generator = torch.Generator().manual_seed(count)
    base, began = reset_peak(options.device), clock(options.device)
    changes = [JointChange(str(i), tuple(range(count))) for i in range(matrices)]
    for _ in range(PASSES):
        for change in changes:
            keys = torch.randn(d_in, count, generator=generator).to(options.device)
            shares = torch.randn(d_out, count, generator=generator).to(options.device)
            change.add(shares, ridge_columns(factor, keys, WEIGHT).to(shares), None)
            change.as_one()
    kept = [delta for change in changes for delta in change.deltas()]
    seconds, grown = clock(options.device) - began, peak(options.device) - base
    stored = sum(t.numel() * 4 for d in kept for t in (d.left, d.right, d.dense) if t is not None)
    return {
        "edits": count,
        "milliseconds": 1e3 * seconds / count / PASSES,
        "peak": grown / 2**20 / count,
        "kept": stored / 2**20 / count,
        "peak_all": grown / 2**20,
    }


def model(options: argparse.Namespace, count: int) -> dict[str, Any]:
    """A whole call on a model of the shape."""
    base, layers = build(options.shape, options.device), SHAPES[options.shape][2]["memit"]
    config = MEMITConfig(
        layers=layers,
        mom2_update_weight=WEIGHT,
        context_templates=[["{}"], ["Some text. {}", "The text. {}"]],
        v_num_grad_steps=options.steps,
        sequence="joint",
        joint_passes=PASSES,
    )
    edited = EditableModel(base, config, tokenizer=tokenizer())
    paths = [edited.anatomy.down(layer).path for layer in layers]
    width = edited.anatomy.down(layers[0]).in_features
    moments = collect_moments(
        base, tokenizer(), paths, text_corpus(texts(4 * width)), tokens=2 * width, show_progress=False
    )
    for path, found in moments.items():
        edited.statistics.put(path, found)
        edited.statistics.factor(path)
    places: dict[str, tuple[Any, str]] = {
        "first pass": (Replay, "__init__"),
        "values": (locate, "optimise_values"),
        "keys and states": (Sweep, "read"),
        "solves": (MEMIT, "columns"),
    }
    before = reset_peak(options.device)
    with Stages(places, options.device).watching() as seconds:
        edited.edit(requests(count), show_progress=False)
    grown, whole = peak(options.device) - before, sum(seconds.values())
    return {
        "edits": count,
        "seconds": whole / count,
        "values": 100 * (seconds["values"] + seconds["first pass"]) / whole,
        "readings": 100 * seconds["keys and states"] / whole,
        "solves": 100 * seconds["solves"] / whole,
        "rest": 100 * seconds["everything else"] / whole,
        "peak": grown / 2**20 / count,
        "peak_all": grown / 2**20,
    }


def main() -> None:
    """Print both tables."""
    options = parser(__doc__)
    llamas = sorted(name for name, (_, values, _) in SHAPES.items() if "hidden_size" in values)
    options.add_argument("--shape", default="smollm2-135m", choices=llamas)
    options.add_argument("--edits", nargs="*", type=int, default=[1000, 2000, 10000])
    options.add_argument("--real", nargs="*", type=int, default=[8, 16, 32])
    options.add_argument("--steps", type=int, default=4)
    chosen = options.parse_args()
    begin(chosen)
    memory = [("peak MiB/edit", "peak", "8.3f"), ("peak MiB", "peak_all", "8.0f")]
    if chosen.edits:
        columns = [("edits", "edits", "6d"), ("ms/edit and pass", "milliseconds", "8.2f")]
        table = Table([*columns, *memory, ("kept MiB/edit", "kept", "8.4f")], chosen.json)
        for count in chosen.edits:
            table.add({"part": "solve", **solve(chosen, count), **environment(chosen.device)})
    if chosen.real:
        stages = [(f"% {name}", name, "5.1f") for name in ("values", "readings", "solves", "rest")]
        table = Table([("edits", "edits", "6d"), ("s/edit", "seconds", "8.3f"), *stages, *memory], chosen.json)
        for count in chosen.real:
            table.add({"part": "model", **model(chosen, count), **environment(chosen.device)})


if __name__ == "__main__":
    main()

"""What a joint solve of many edits would cost on larger machines: a model of its FLOP and memory, not a measurement.

    python -m benchmarks.scale --edits 20000 --shape llama-3-8b llama-3-70b --gpus 1 8 64

The counts follow what the engine does (docs/performance.md): a first pass over all rows, steps that run only the
layers behind the value and the columns from the subject on, keys from rows cut behind the subject, systems in float64.
Values are split over the processes; keys, states and systems each process computes itself. What is assumed is in the
options.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from benchmarks.shapes import SHAPES

NAMES = ("smollm2-135m", "llama-3-8b", "llama-3-70b")
GIB = 2**30
BYTES = 2  # of a weight and an activation in bfloat16


@dataclass(frozen=True)
class Shape:
    """A decoder.

    Args:
        layers, width, inner, vocabulary, kv: its sizes; ``kv``: width of keys and values together.
        written: how many layers an edit is spread over, of which ``last`` is the last.
    """

    layers: int
    width: int
    inner: int
    vocabulary: int
    kv: int
    written: int
    last: int

    @classmethod
    def of(cls, name: str) -> Shape:
        """The Llama-like shape of this name."""
        kind, values, edited = SHAPES[name]
        config = kind(**values)
        kv = 2 * config.num_key_value_heads * config.hidden_size // config.num_attention_heads
        sizes = config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.vocab_size
        return cls(*sizes, kv, written=len(edited["memit"]), last=edited["memit"][-1])

    @property
    def layer(self) -> float:
        """Parameters of a layer with a gated MLP."""
        return self.width * (2 * self.width + self.kv) + 3 * self.width * self.inner

    @property
    def parameters(self) -> float:
        return self.layers * self.layer + 2 * self.vocabulary * self.width


@dataclass(frozen=True)
class Load:
    """The edits, in tokens: of a row, up to the subject's end, behind it, of the target."""

    edits: int
    passes: int
    row: int = 25
    head: int = 20
    tail: int = 5
    target: int = 2
    contexts: int = 6
    evaluations: int = 20


def value_flop(shape: Shape, load: Load) -> float:
    """FLOP of one value: the first pass over all rows, then forward and backward of what lies behind the value."""
    per_token = 2 * shape.layer
    first = load.contexts * load.row * shape.layers * per_token
    behind = (load.contexts * load.tail + 1) * (shape.layers - 1 - shape.last) * per_token
    head = (load.contexts * load.target + 1) * 4 * shape.width * shape.vocabulary
    return first + 2 * (load.evaluations - 1) * (behind + head)


def reading_flop(shape: Shape, load: Load) -> float:
    """FLOP of one fact's keys and states in one pass."""
    return load.contexts * load.head * (shape.last + shape.written) * 2 * shape.layer


def solve_flop(shape: Shape, load: Load) -> float:
    """FLOP of the systems of one pass, in float64: in key space, or of the inner width where that is less."""
    n, d = load.edits, shape.inner
    in_keys = 2 * d * d * n + d * n * n + n**3 / 3 + 2 * d * n * n
    in_width = d**3 / 3 + d * d * n + 2 * d * d * n
    return shape.written * (min(in_keys, in_width) + 2 * shape.width * d * n)


def memory(shape: Shape, load: Load) -> dict[str, float]:
    """Bytes of one process: weights, float64 moments with their factors, keys, residuals, originals, states."""
    n, d = load.edits, shape.inner
    return {
        "weights": BYTES * shape.parameters,
        "moments": 2 * 8 * shape.written * d * d,
        "set": 4 * n * (d + 3 * shape.width) + shape.written * 4 * n * d + 8 * min(n, d) ** 2,
        "changes": shape.written * shape.width * d * (BYTES + 4),
        "states": BYTES * n * load.contexts * load.head * shape.width,
    }


def main() -> None:
    """Print one row per shape and number of GPUs."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--shape", nargs="+", default=["llama-3-8b", "llama-3-70b"], choices=NAMES)
    options.add_argument("--edits", type=int, default=20000)
    options.add_argument("--gpus", nargs="+", type=int, default=[1, 8, 64])
    options.add_argument("--passes", type=int, default=8)
    options.add_argument(
        "--unheld", type=float, default=0.5, help="part of the facts that get a value in a later pass"
    )
    options.add_argument("--teraflops", type=float, default=300.0, help="reached in bfloat16 by one GPU")
    options.add_argument("--teraflops-float64", type=float, default=30.0)
    options.add_argument("--gib", type=float, default=80.0, help="memory of one GPU")
    chosen = options.parse_args()
    titles = ("shape", "GPUs", "values h", "keys h", "solves h", "all h", "GPU h", "GiB", "per model")
    print("{:14}{:>6}{:>10}{:>8}{:>10}{:>8}{:>8}{:>7}{:>11}".format(*titles))
    for name in chosen.shape:
        shape, load = Shape.of(name), Load(chosen.edits, chosen.passes)
        need = sum(memory(shape, load).values()) / GIB
        per_model = max(1, -int(-need // chosen.gib))
        for gpus in chosen.gpus:
            copies = max(1, gpus // per_model)
            speed, fp64 = chosen.teraflops * 1e12, chosen.teraflops_float64 * 1e12
            value = (1 + (load.passes - 1) * chosen.unheld) * value_flop(shape, load) * load.edits
            held = (load.passes - 1) * (1 - chosen.unheld) * load.contexts * load.row * shape.layers * 2 * shape.layer
            # One process works on one GPU at a time, also where its model lies on several.
            values = (value + held * load.edits) / speed / copies / 3600
            keys = load.passes * reading_flop(shape, load) * load.edits / speed / 3600
            solves = (load.passes * solve_flop(shape, load) + shape.written * shape.inner**3 / 3) / fp64 / 3600
            whole = values + keys + solves
            if gpus < per_model:
                print(f"{name:14}{gpus:6d}  does not fit: {need:.0f} GiB")
                continue
            row = (name, gpus, values, keys, solves, whole, whole * gpus, need, per_model)
            print("{:14}{:6d}{:10.2f}{:8.2f}{:10.2f}{:8.2f}{:8.1f}{:7.0f}{:11.0f}".format(*row))


if __name__ == "__main__":
    main()

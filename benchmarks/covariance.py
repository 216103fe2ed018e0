"""How fast are second moments? One pass for all layers against one pass per layer, over the same tokens.

python -m benchmarks.covariance --shape gpt2-tiny gpt2-small --layers 3 5
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks import reference
from benchmarks.shapes import SHAPES, build, texts, tokenizer
from benchmarks.timing import Stages, Table, alternate, begin, difference, environment, parser
from hf_kedit.anatomy import check_anatomy, resolve_anatomy
from hf_kedit.engine.forward import frozen_eval
from hf_kedit.statistics import collecting
from hf_kedit.statistics.collecting import collect_moments
from hf_kedit.statistics.corpora import text_corpus


def documents(count: int, tokens: int) -> list[str]:
    """Texts of about ``tokens`` tokens each."""
    lines, made = texts(count * tokens // 4), []
    for start in range(0, len(lines), max(tokens // 10, 1)):
        made.append(" ".join(lines[start : start + max(tokens // 10, 1)]))
    return made[:count]


def main() -> None:
    """Run the configurations that the command line names and print a table."""
    options = parser(__doc__)
    options.add_argument("--shape", nargs="+", default=["gpt2-tiny", "llama-tiny"], choices=sorted(SHAPES))
    options.add_argument("--layers", nargs="+", type=int, default=[3, 5], help="numbers of layers")
    options.add_argument("--first", type=int, default=0, help="the lowest of them")
    options.add_argument("--texts", type=int, default=100)
    options.add_argument("--length", type=int, default=60, help="tokens per text")
    options.add_argument("--budget", type=int, help="padded tokens per forward of ours; default: by the device")
    options.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    chosen = options.parse_args()
    begin(chosen)
    table = Table(
        [
            ("shape", "shape", "14"),
            ("layers", "layers", "6d"),
            ("tokens", "tokens", "8,d"),
            ("ours s", "seconds", "8.2f"),
            ("reference", "seconds_reference", "9.2f"),
            ("ratio", "ratio", "6.2f"),
            ("difference", "difference", "10.1e"),
            ("% products", "products_percent", "10.0f"),
        ],
        chosen.json,
    )
    corpus = documents(chosen.texts, chosen.length)
    for shape in chosen.shape:
        model = build(shape, chosen.device, getattr(torch, chosen.dtype))
        anatomy = check_anatomy(model, resolve_anatomy(model))
        for count in chosen.layers:
            paths = [anatomy.down(chosen.first + i).path for i in range(count)]
            named = text_corpus(corpus)
            stages = Stages({"products": (collecting, "add_upper")}, chosen.device)

            def ours(model: Any = model, paths: Any = paths, named: Any = named) -> Any:
                return collect_moments(
                    model, tokenizer(), paths, named, token_budget=chosen.budget, show_progress=False
                )

            with frozen_eval(model):
                sides = alternate(
                    ours,
                    partial(reference.covariance, model, tokenizer(), corpus, paths),
                    pairs=chosen.pairs,
                    device=chosen.device,
                )
                with stages.watching() as seconds:
                    ours()
            found, theirs = sides.results
            table.add(
                {
                    "shape": shape,
                    "layers": count,
                    "first": chosen.first,
                    "tokens": found[paths[0]].count,
                    **sides.figures(),
                    "difference": max(difference(found[p].mean(), c) for p, c in zip(paths, theirs, strict=True)),
                    "products_percent": 100 * seconds["products"] / sum(seconds.values()),
                    **environment(chosen.device, chosen.dtype),
                }
            )


if __name__ == "__main__":
    main()

"""How fast is KN's search for neurons? The last column from the layer on against full forwards for every layer.

python -m benchmarks.attribution --shape gpt2-tiny llama-tiny gpt2-small --facts 2
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import reference
from benchmarks.shapes import SHAPES, build, requests, tokenizer
from benchmarks.timing import Table, alternate, begin, difference, environment, parser
from hf_kedit.anatomy import check_anatomy, resolve_anatomy
from hf_kedit.engine.capture import Tap
from hf_kedit.engine.forward import frozen_eval
from hf_kedit.locate.attribution import attribute_neurons
from hf_kedit.tokens import encode_pair


def run(options: Any, shape: str) -> dict[str, Any]:
    """Attribute the old answers of some facts both ways."""
    model = build(shape, options.device, getattr(torch, options.dtype))
    anatomy = check_anatomy(model, resolve_anatomy(model))
    layers = range(anatomy.num_layers)
    paths = [anatomy.down(i).path for i in layers]
    taps = [Tap(path, "input") for path in paths]
    facts = [
        encode_pair(tokenizer(), r.filled_prompt, (r.ground_truth or [r.target_new])[0])
        for r in requests(options.facts)
    ]

    def ours() -> list[torch.Tensor]:
        found = []
        for fact in facts:
            scores = attribute_neurons(
                model, taps, fact.prompt_ids, fact.target_ids, steps=options.steps, anatomy=anatomy, layers=layers
            ).scores
            found.append(torch.cat(scores))
        return found

    def theirs() -> list[torch.Tensor]:
        return [
            torch.cat(reference.attribution(model, paths, f.prompt_ids, f.target_ids, options.steps)) for f in facts
        ]

    with frozen_eval(model):
        sides = alternate(ours, theirs, pairs=options.pairs, device=options.device)
    return {
        "shape": shape,
        "method": "kn",
        "facts": options.facts,
        "steps": options.steps,
        **sides.figures(options.facts),
        "largest_difference": max(difference(a, b) for a, b in zip(*sides.results, strict=True)),
        **environment(options.device, options.dtype),
    }


def main() -> None:
    """Run the shapes that the command line names and print a table."""
    options = parser(__doc__)
    options.add_argument("--shape", nargs="+", default=["gpt2-tiny", "llama-tiny"], choices=sorted(SHAPES))
    options.add_argument("--facts", type=int, default=2)
    options.add_argument("--steps", type=int, default=20, help="points of the integral")
    options.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    chosen = options.parse_args()
    begin(chosen)
    table = Table(
        [
            ("shape", "shape", "14"),
            ("facts", "facts", "5d"),
            ("ours s/fact", "seconds", "11.3f"),
            ("reference", "seconds_reference", "9.3f"),
            ("ratio", "ratio", "6.2f"),
            ("difference", "largest_difference", "10.1e"),
        ],
        chosen.json,
    )
    for shape in chosen.shape:
        table.add(run(chosen, shape))


if __name__ == "__main__":
    main()

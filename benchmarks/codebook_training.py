"""Training the values of a codebook (GRACE): a batch from the middle of the model, against one by one from the tokens.

python -m benchmarks.codebook_training --shape llama-tiny llama-16x1024 --layer 6 13 --edits 8 --steps 50 20

The same random prompts, targets and starts on both sides.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import reference
from benchmarks.shapes import SHAPES, build
from benchmarks.timing import Table, alternate, begin, difference, environment, parser
from hf_kedit.anatomy import check_anatomy, resolve_anatomy
from hf_kedit.engine.examples import Example
from hf_kedit.engine.forward import frozen_eval
from hf_kedit.engine.trained_outputs import train_outputs
from hf_kedit.engine.weights import get_module, weight_shape


def examples(count: int, vocabulary: int) -> list[Example]:
    """Prompts of 8 to 16 tokens with targets of 1 to 3."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(count):
        prompt, target = 8 + i % 9, 1 + i % 3
        ids = torch.randint(5, vocabulary, (prompt + target,), generator=generator).tolist()
        made.append(Example(tuple(ids[:-1]), tuple(range(prompt - 1, prompt + target - 1)), tuple(ids[prompt:])))
    return made


def run(shape: str, layer: int, steps: int, options: Any) -> dict[str, Any]:
    """Measure one model."""
    model = build(shape, options.device, torch.float32)
    anatomy = check_anatomy(model, resolve_anatomy(model))
    path = anatomy.down(layer).path
    texts = examples(options.edits, model.config.vocab_size)
    width = weight_shape(get_module(model, path))[0]
    starts = torch.rand(len(texts), width, generator=torch.Generator().manual_seed(1)).to(options.device)

    def ours() -> torch.Tensor:
        return train_outputs(model, anatomy, texts, layer, path, starts, steps=steps, lr=options.lr).values

    def theirs() -> torch.Tensor:
        pairs = zip(texts, starts, strict=True)
        return torch.stack([reference.codebook_value(model, path, e, s, steps, options.lr)[0] for e, s in pairs])

    with frozen_eval(model):
        sides = alternate(ours, theirs, pairs=options.pairs, device=options.device)
    found, expected = sides.results
    return {
        "shape": shape,
        "layer": layer,
        "edits": len(texts),
        "steps": steps,
        **sides.figures(len(texts)),
        "difference": max(difference(a, b) for a, b in zip(found, expected, strict=True)),
        **environment(options.device),
    }


def main() -> None:
    """Run the models that the command line names and print a table."""
    options = parser(__doc__)
    options.add_argument("--shape", nargs="+", default=["llama-tiny"], choices=sorted(SHAPES))
    options.add_argument("--layer", type=int, nargs="+", default=[6], help="one per shape")
    options.add_argument("--steps", type=int, nargs="+", default=[50], help="one per shape")
    options.add_argument("--edits", type=int, default=8)
    options.add_argument("--lr", type=float, default=0.1)
    chosen = options.parse_args()
    begin(chosen)
    table = Table(
        [
            ("shape", "shape", "14"),
            ("layer", "layer", "5d"),
            ("edits", "edits", "5d"),
            ("ours s/edit", "seconds", "11.3f"),
            ("ref s/edit", "seconds_reference", "10.3f"),
            ("ratio", "ratio", "6.1f"),
            ("difference", "difference", "10.1e"),
        ],
        chosen.json,
    )
    for shape, layer, steps in zip(chosen.shape, chosen.layer, chosen.steps, strict=True):
        table.add(run(shape, layer, steps, chosen))


if __name__ == "__main__":
    main()

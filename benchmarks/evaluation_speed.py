"""How fast is evaluation? Batched teacher forcing against one prompt per forward; every answer is compared.

python -m benchmarks.evaluation_speed --shape gpt2-tiny gpt2-small --cases 50
python -m benchmarks.evaluation_speed --cases 1000 --pairs 1
"""

from __future__ import annotations

from functools import partial

import torch

from benchmarks import reference
from benchmarks.shapes import SHAPES, build, requests, tokenizer
from benchmarks.timing import Table, alternate, begin, environment, parser
from hf_kedit.engine.forward import frozen_eval
from hf_kedit.evaluation.asking.scoring import score_pairs


def questions(cases: int) -> list[tuple[str, str]]:
    """Three prompts per case, each with its answer: the edited prompt, a paraphrase and a neighbour; each text once.

    Ours computes equal texts once, and without equal ones among them the ratio says nothing about that.
    """
    made = []
    for request in requests(cases):
        made.append((request.filled_prompt, request.target_new))
        made += [(prompt, request.target_new) for prompt in request.rephrase_prompts[:1]]
        probes = [probe for probes in request.locality.values() for probe in probes]
        made += [(probe.prompt, probe.ground_truth[0][0]) for probe in probes[:1]]
    return list(dict.fromkeys(made))


def main() -> None:
    """Run the configurations that the command line names and print a table."""
    options = parser(__doc__)
    options.add_argument("--shape", nargs="+", default=["gpt2-tiny", "llama-tiny"], choices=sorted(SHAPES))
    options.add_argument("--cases", type=int, default=50)
    options.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    chosen = options.parse_args()
    begin(chosen)
    table = Table(
        [
            ("shape", "shape", "14"),
            ("prompts", "prompts", "7d"),
            ("ours ms", "ms", "8.2f"),
            ("reference", "ms_reference", "9.2f"),
            ("ratio", "ratio", "6.2f"),
            ("identical", "identical", "9.1%"),
            ("loss difference", "difference", "15.1e"),
        ],
        chosen.json,
    )
    for shape in chosen.shape:
        model = build(shape, chosen.device, getattr(torch, chosen.dtype))
        pairs = questions(chosen.cases)
        with frozen_eval(model):
            sides = alternate(
                partial(score_pairs, model, tokenizer(), pairs),
                partial(reference.score, model, tokenizer(), pairs),
                pairs=chosen.pairs,
                device=chosen.device,
            )
        ours, theirs = sides.results
        figures = sides.figures(len(pairs))
        table.add(
            {
                "shape": shape,
                "prompts": len(pairs),
                **figures,
                "ms": 1e3 * figures["seconds"],
                "ms_reference": 1e3 * figures["seconds_reference"],
                "identical": sum(a.pred_ids == b[0] for a, b in zip(ours, theirs, strict=True)) / len(pairs),
                "difference": max(abs(a.nll - b[1]) for a, b in zip(ours, theirs, strict=True)),
                **environment(chosen.device, chosen.dtype),
            }
        )


if __name__ == "__main__":
    main()

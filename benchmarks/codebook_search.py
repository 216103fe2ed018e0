"""Finding the nearest key of a codebook: ours against the published search, for one query at a time.

python -m benchmarks.codebook_search --keys 100 1000 10000 --width 2816 11008

Keys share a large common part, as the states of a model do, so that their norms exceed their distances by far. Each
row says how often each side decides as a search in float64 does, with a radius at which half of the queries hit.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import reference
from benchmarks.timing import Table, alternate, begin, environment, parser
from hf_kedit.engine.nearest import Vectors


@torch.no_grad()
def run(count: int, width: int, options: Any) -> dict[str, Any]:
    """Measure one size."""
    generator = torch.Generator().manual_seed(0)
    shared = options.norm * torch.nn.functional.normalize(torch.randn(width, generator=generator), dim=0)
    keys = (shared + torch.randn(count, width, generator=generator) * options.spread).to(options.device)
    picked = torch.randint(count, (options.queries,), generator=generator)
    noise = torch.randn(options.queries, width, generator=generator) * options.spread * 0.3
    queries = keys[picked.to(keys.device)] + noise.to(keys.device)
    stored = keys.to(getattr(torch, options.stored))
    exact = torch.cdist(queries.double(), stored.double(), compute_mode="donot_use_mm_for_euclid_dist").min(dim=1)
    in_order = exact.values.sort().values
    radius = float(in_order[options.queries // 2 - 1 : options.queries // 2 + 1].mean())
    vectors = Vectors.of(stored)

    def ours() -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [vectors.nearest(query[None]) for query in queries]

    def theirs() -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [reference.search(query[None], stored) for query in queries]

    def right(found: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
        distance, place = (torch.cat(part).cpu() for part in zip(*found, strict=True))
        same = (place == exact.indices.cpu()) & ((distance <= radius) == (exact.values.float().cpu() <= radius))
        return float(same.float().mean())

    sides = alternate(ours, theirs, pairs=options.pairs, device=options.device)
    figures = sides.figures(options.queries)
    return {
        "keys": count,
        "width": width,
        "stored": options.stored,
        **figures,
        "microseconds": figures["seconds"] * 1e6,
        "microseconds_reference": figures["seconds_reference"] * 1e6,
        "right": right(sides.results[0]),
        "right_reference": right(sides.results[1]),
        **environment(options.device),
    }


def main() -> None:
    """Run the sizes that the command line names and print a table."""
    options = parser(__doc__)
    options.add_argument("--keys", type=int, nargs="+", default=[1000])
    options.add_argument("--width", type=int, nargs="+", default=[2816, 11008])
    options.add_argument(
        "--stored", default="float32", choices=["float32", "bfloat16"], help="how the reference keeps keys"
    )
    options.add_argument("--queries", type=int, default=50)
    options.add_argument("--norm", type=float, default=300.0, help="of the part that all keys share")
    options.add_argument("--spread", type=float, default=0.2, help="standard deviation of what is a key's own")
    chosen = options.parse_args()
    begin(chosen)
    table = Table(
        [
            ("keys", "keys", "6d"),
            ("width", "width", "6d"),
            ("stored", "stored", "8"),
            ("ours µs", "microseconds", "8.0f"),
            ("ref µs", "microseconds_reference", "8.0f"),
            ("ratio", "ratio", "6.1f"),
            ("right", "right", "6.3f"),
            ("ref right", "right_reference", "9.3f"),
        ],
        chosen.json,
    )
    for width in chosen.width:
        for count in chosen.keys:
            table.add(run(count, width, chosen))


if __name__ == "__main__":
    main()

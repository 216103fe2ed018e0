"""How fast are the linear solves, and how far apart are the answers? No model is needed.

    python -m benchmarks.solves --width 1024 3072 --keys 1 10 100 1000

MEMIT's system ``(λC + KKᵀ) X = K``: an LU of the d × d matrix in float64 for every batch, as published, against a
Cholesky of ``C`` once and Woodbury per batch. AlphaEdit's ``(P (KKᵀ + K_e K_eᵀ) + λI) X = P K`` in sequential batches:
an LU of the d × d matrix, in float32 as published, against a system as large as the number of keys. The difference of
AlphaEdit's answers is that to the published system solved in float64.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.timing import Table, alternate, begin, clock, difference, environment, parser
from hf_kedit.statistics.nullspace import KeySpace, null_space
from hf_kedit.statistics.solve import factor_moment, ridge_columns


def moment(width: int, condition: float, seed: int = 0, device: str = "cpu") -> torch.Tensor:
    """A second moment with a log-spaced spectrum, float64."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64).to(device))
    values = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), width, dtype=torch.float64).to(device)
    return (basis * values) @ basis.T


def memit(options: argparse.Namespace, table: Table) -> None:
    """One row per width and number of keys."""
    weight = 15000.0
    for width in options.width:
        c = moment(width, options.condition, device=options.device)
        began = clock(options.device)
        factor = factor_moment(c)
        once = clock(options.device) - began
        for count in options.keys:
            keys = torch.randn(width, count, generator=torch.Generator().manual_seed(count)).to(options.device)

            def ours(keys: torch.Tensor = keys, factor: object = factor) -> torch.Tensor:
                return ridge_columns(factor, keys, weight)  # type: ignore[arg-type]

            def theirs(keys: torch.Tensor = keys, c: torch.Tensor = c) -> torch.Tensor:
                k = keys.double()
                return torch.linalg.solve(weight * c + k @ k.T, k)

            sides = alternate(ours, theirs, pairs=options.pairs, device=options.device)
            table.add(
                {
                    "system": "memit",
                    "width": width,
                    "keys": count,
                    "condition": options.condition,
                    **sides.figures(),
                    "factor_seconds": once,
                    "difference": difference(*sides.results),
                    **environment(options.device, "float64"),
                }
            )


def alphaedit(options: argparse.Namespace, table: Table) -> None:
    """One row per width: sequential batches of 100 keys."""
    ridge, size = 10.0, 100
    for width in options.width:
        space = null_space(moment(width, options.condition, device=options.device), fraction=0.02)
        projector = space.matrix().float()
        generator = torch.Generator().manual_seed(width)
        batches = [torch.randn(width, size, generator=generator).to(options.device) for _ in range(options.batches)]

        def ours(space: object = space, batches: list[torch.Tensor] = batches) -> list[torch.Tensor]:
            solver, found = KeySpace(space, ridge), []  # type: ignore[arg-type]
            for i, keys in enumerate(batches):
                found.append(solver.columns(keys, torch.cat(batches[:i], dim=1) if i else None))
            return found

        def published(
            dtype: torch.dtype, p: torch.Tensor = projector, batches: list[torch.Tensor] = batches
        ) -> list[torch.Tensor]:
            p, found = p.to(dtype), []
            cache = torch.zeros_like(p)
            for keys in batches:
                k = keys.to(dtype)
                system = p @ (k @ k.T + cache) + ridge * torch.eye(p.shape[0], dtype=dtype, device=p.device)
                found.append(torch.linalg.solve(system, p @ k))
                cache += k @ k.T
            return found

        sides = alternate(ours, lambda: published(torch.float32), pairs=options.pairs, device=options.device)
        exact = published(torch.float64, p=space.matrix())
        table.add(
            {
                "system": "alphaedit",
                "width": width,
                "keys": size,
                "condition": options.condition,
                "batches": options.batches,
                **sides.figures(options.batches),
                "factor_seconds": 0.0,
                "difference": max(difference(a, b) for a, b in zip(sides.results[0], exact, strict=True)),
                "difference_reference": max(difference(a, b) for a, b in zip(sides.results[1], exact, strict=True)),
                **environment(options.device, "float32 / float64"),
            }
        )


def main() -> None:
    """Run the systems that the command line names and print a table."""
    options = parser(__doc__)
    options.add_argument("--system", nargs="+", default=["memit", "alphaedit"], choices=["memit", "alphaedit"])
    options.add_argument("--width", nargs="+", type=int, default=[1024, 3072])
    options.add_argument("--keys", nargs="+", type=int, default=[1, 10, 100, 1000])
    options.add_argument("--batches", type=int, default=5, help="sequential batches of AlphaEdit")
    options.add_argument("--condition", type=float, default=1e6, help="condition number of the second moment")
    chosen = options.parse_args()
    begin(chosen)
    columns = [
        ("system", "system", "10"),
        ("d_in", "width", "6d"),
        ("keys", "keys", "5d"),
        ("ours ms", "ms", "9.2f"),
        ("reference", "ms_reference", "10.2f"),
        ("ratio", "ratio", "7.1f"),
        ("factor once ms", "ms_factor", "8.1f"),
        ("difference", "difference", "10.1e"),
    ]

    class Milliseconds(Table):
        def add(self, row: dict[str, object]) -> None:
            for name in ("seconds", "seconds_reference", "factor_seconds"):
                row[name.replace("seconds", "ms") if name != "factor_seconds" else "ms_factor"] = 1e3 * row[name]  # type: ignore[operator]
            super().add(row)

    table = Milliseconds(columns, chosen.json)
    for system in chosen.system:
        {"memit": memit, "alphaedit": alphaedit}[system](chosen, table)


if __name__ == "__main__":
    main()

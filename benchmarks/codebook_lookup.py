"""What does a codebook cost? A forward of prompts with and without it, one more entry, and a saved file, by its size.

python -m benchmarks.codebook_lookup --shape gpt2-tiny --entries 10 1000 10000 100000

Keys are random, so no prompt is within a radius: the figure is the look-up alone, the outputs stay the model's own.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.shapes import SHAPES, build
from benchmarks.timing import Table, alternate, begin, clock, environment, parser
from hf_kedit.anatomy import check_anatomy, resolve_anatomy
from hf_kedit.books.site_book import SiteBook, SiteEntry
from hf_kedit.engine.nearest import Vectors
from hf_kedit.engine.weights import get_module, weight_shape
from hf_kedit.methods.grace_codebook import Codebook, CodeChange, Entry, Event


def filled(path: str, sizes: tuple[int, int], entries: int, device: str) -> Codebook:
    """A codebook with random keys and values."""
    book = Codebook(path, sizes, 1.0, "replace_last")
    book.keys = Vectors.of(torch.randn(entries, sizes[0], device=device) * 100)
    book.values = Vectors.of(torch.randn(entries, sizes[1], device=device))
    book.entries = [Entry((i,), i, 1.0, (Event(f"edit-{i}", "start", 0.0),)) for i in range(entries)]
    return book


def grow(sites: SiteBook, book: Codebook, number: int, device: str) -> float:
    """Seconds per entry for a few more entries, placed and applied one by one."""
    queries = torch.randn(number, book.keys.width, device=device) * 100
    value = torch.zeros(book.values.width, device=device)
    began = clock(device)
    for i, query in enumerate(queries):
        target = (i,)
        change = CodeChange(book.place(query, target), query, value, target)
        sites.apply("batch", [SiteEntry(book, change)], [f"new-{i}"])
    return (clock(device) - began) / number


@torch.no_grad()
def run(options: Any, entries: int) -> dict[str, Any]:
    """Measure one size."""
    model = build(options.shape, options.device, torch.float32)
    anatomy = check_anatomy(model, resolve_anatomy(model))
    path = anatomy.down(anatomy.num_layers // 2).path
    d_out, d_in = weight_shape(get_module(model, path))
    sites = SiteBook(model)
    book = filled(path, (d_in, d_out), entries, options.device)
    sites.restore({book.key: (book, book.snapshot())})
    ids = torch.randint(5, 100, (options.rows, options.width), device=options.device)

    def plain() -> torch.Tensor:
        with sites.disabled():
            return model(input_ids=ids).logits

    sides = alternate(lambda: model(input_ids=ids).logits, plain, pairs=options.pairs, device=options.device)
    assert torch.equal(*sides.results)
    figures = sides.figures(options.rows * options.width)
    added = grow(sites, book, options.added, options.device)
    with tempfile.TemporaryDirectory() as folder:
        began = clock("cpu")
        save_file({k: v.cpu().contiguous() for k, v in sites.tensors().items()}, Path(folder) / "edits.safetensors")
        saving, size = clock("cpu") - began, (Path(folder) / "edits.safetensors").stat().st_size
    return {
        "shape": options.shape,
        "entries": entries,
        "width": f"{d_in}+{d_out}",
        **figures,
        "microseconds": figures["seconds"] * 1e6,
        "microseconds_plain": figures["seconds_reference"] * 1e6,
        "milliseconds_added": added * 1e3,
        "seconds_saving": saving,
        "mebibytes": size / 2**20,
        **environment(options.device),
    }


def main() -> None:
    """Run the sizes that the command line names and print a table."""
    options = parser(__doc__)
    options.add_argument("--shape", default="gpt2-tiny", choices=sorted(SHAPES))
    options.add_argument("--entries", type=int, nargs="+", default=[10, 100, 1000, 10_000, 100_000])
    options.add_argument("--rows", type=int, default=8, help="prompts in a batch")
    options.add_argument("--width", type=int, default=16, help="tokens of a prompt")
    options.add_argument("--added", type=int, default=20, help="entries added one by one")
    chosen = options.parse_args()
    begin(chosen)
    table = Table(
        [
            ("entries", "entries", "7d"),
            ("d_in+d_out", "width", "10"),
            ("µs/token", "microseconds", "8.1f"),
            ("without", "microseconds_plain", "8.1f"),
            ("ms/new entry", "milliseconds_added", "12.2f"),
            ("saving s", "seconds_saving", "8.3f"),
            ("MiB", "mebibytes", "8.1f"),
        ],
        chosen.json,
    )
    for entries in chosen.entries:
        table.add(run(chosen, entries))


if __name__ == "__main__":
    main()

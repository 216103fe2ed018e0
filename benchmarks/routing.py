"""What 10,000 edits of `auto` cost while a model runs, and how many lines of ordinary text they claim by mistake.

    python -m benchmarks.routing --edits 10000
    python -m benchmarks.routing --requests counterfact_flat --path rows.json --skip 300 --edits 1000 --text wiki.txt

What the edits say is invented: it does not matter here, only where they are looked for. Their prompts are those of a
data set, or made up. Ratios are of medians, edited and unedited in turn. Lines of a text (of a JSON file: the values
of "question") are run with the edits and without them.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from hf_kedit import EditableModel
from hf_kedit.anatomy.switching import Switch
from hf_kedit.books.router import Address
from hf_kedit.books.site_book import SiteEntry
from hf_kedit.data import load_edit_dataset
from hf_kedit.data.loading import requests_of
from hf_kedit.engine.lowrank import Factors
from hf_kedit.logging import disable_progress_bars
from hf_kedit.methods.auto_memory import RoutedChange, RoutedChanges, word_vectors
from hf_kedit.methods.auto_shelf import Shelf, Solution, sizes_of
from hf_kedit.text.relations import COMMON_RELATIONS

SYLLABLES = "ba co du fe gi ha jo ku la me ni po ra so tu vi wo xa ye zo".split()


def made_up(count: int, rng: random.Random) -> list[str]:
    """Names that nobody has."""
    words = ["".join(rng.choices(SYLLABLES, k=3)).capitalize() for _ in range(4 * count)]
    return list(dict.fromkeys(f"{a} {b}" for a, b in zip(words[::2], words[1::2], strict=True) if a != b))[:count]


def invented(count: int, rng: random.Random) -> list[tuple[str, str]]:
    """Prompts and their subjects: a relation drawn by chance, of somebody whom nobody knows."""
    return [
        (" ".join(name if word == "it" else word for word in rng.choice(COMMON_RELATIONS).split()), name)
        for name in made_up(count, rng)
    ]


def of_dataset(name: str, path: str | None, skip: int, count: int) -> list[tuple[str, str]]:
    """Prompts and subjects of a data set."""
    rows = requests_of(load_edit_dataset(name, path=path, skip=skip, limit=count, drop_conflicts="last"))
    return [(row.plain_prompt, row.plain_prompt[slice(*row.plain_span())]) for row in rows]


def lines_of(path: Path) -> list[str]:
    """Lines with at least eight words, or the questions of a JSON file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return [str(row["question"]) for row in json.loads(text)]
    return [line for line in text.splitlines() if len(line.split()) >= 8]


def with_edits(model: EditableModel, facts: list[tuple[str, str]], encoder: str, slack: float) -> RoutedChanges:
    """Give a model an edit for every prompt and subject."""
    path = model.anatomy.down(model.anatomy.num_layers // 6).path
    d_in, d_out = sizes_of(model.base_model, path)
    shelf = Shelf([path], 1, {path: (d_in, d_out)}, holds_texts=False)
    memory = RoutedChanges([shelf], encoder, slack, word_vectors(model.base_model))
    generator = torch.Generator().manual_seed(0)

    def column(size: int) -> torch.Tensor:
        return torch.randn(size, 1, generator=generator)

    assert model.tokenizer is not None
    memory.with_tokenizer(model.tokenizer)
    addresses = [Address.of(str(i), [prompt], [name]) for i, (prompt, name) in enumerate(facts)]
    changes = [
        RoutedChange(
            address,
            vector[None],
            [Solution("invented", {path: Factors(column(d_out), column(d_in))})],
        )
        for address, vector in zip(addresses, memory.router.vectors_of(addresses), strict=True)
    ]
    model.sites.apply("b", [SiteEntry(memory, change) for change in changes], [str(i) for i in range(len(facts))])
    return memory


def decode_step(model: EditableModel, prompt: str) -> Callable[[], None]:
    """One more token behind a cached prompt; the cache is cut back after it."""
    assert model.tokenizer is not None
    ids = model.tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        cache = model.base_model(input_ids=ids, use_cache=True).past_key_values

    def step() -> None:
        with torch.no_grad():
            model.base_model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return step


def ratio(
    run: Callable[[], None], before: Callable[[], None], off: Callable[[], Switch[None]], pairs: int
) -> dict[str, float]:
    """Medians in milliseconds with the edits and without, in turn, and their ratio."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(pairs):
        began = time.perf_counter()
        run()
        times[0].append(time.perf_counter() - began)
        with off():
            began = time.perf_counter()
            before()
            times[1].append(time.perf_counter() - began)
    on, plain = (1000 * statistics.median(t) for t in times)
    return {"edited_ms": round(on, 2), "unedited_ms": round(plain, 2), "ratio": round(on / plain, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="kedit/smollm2-135m")
    parser.add_argument("--edits", type=int, default=10_000)
    parser.add_argument("--encoder", default="dense")
    parser.add_argument("--slack", type=float, default=0.3)
    parser.add_argument("--pairs", type=int, default=50)
    parser.add_argument("--requests", help="name of a data set")
    parser.add_argument("--path", help="of its file")
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="ordinary texts, a line after the other")
    parser.add_argument("--lines", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()

    torch.set_num_threads(chosen.threads)
    disable_progress_bars()
    rng = random.Random(chosen.seed)
    facts = (
        of_dataset(chosen.requests, chosen.path, chosen.skip, chosen.edits)
        if chosen.requests
        else invented(chosen.edits, rng)
    )
    model = EditableModel.from_pretrained(chosen.model, "auto")
    began = time.perf_counter()
    memory = with_edits(model, facts, chosen.encoder, chosen.slack)
    found: dict[str, object] = {"edits": len(facts), "encoder": chosen.encoder, "slack": chosen.slack}
    found["seconds_to_take_them_in"] = round(time.perf_counter() - began, 1)
    found["megabytes"] = round(sum(t.numel() * t.element_size() for t in memory.tensors().values()) / 2**20, 1)

    prompt = facts[0][0]
    assert memory.router.route([prompt]) == [(0, True)]
    with model.sites.disabled():
        plain = decode_step(model, prompt)
    found["decode step, claimed"] = ratio(decode_step(model, prompt), plain, model.sites.disabled, chosen.pairs)
    other = "The weather in the north of the country was fine today, and the people said that"
    with model.sites.disabled():
        plain = decode_step(model, other)
    found["decode step, unclaimed"] = ratio(decode_step(model, other), plain, model.sites.disabled, chosen.pairs)
    for path in chosen.text:
        found[path.stem] = claimed_lines(model, memory, lines_of(path)[: chosen.lines])
    print(json.dumps(found, indent=2))


def claimed_lines(model: EditableModel, memory: RoutedChanges, lines: list[str]) -> dict[str, object]:
    """How many lines of a text an edit claims, and whether the model is itself, bit for bit, in all others."""
    assert model.tokenizer is not None
    claimed = differing = named = 0
    examples = []
    for line in lines:
        ids = model.tokenizer(line, return_tensors="pt", truncation=True, max_length=128)["input_ids"]
        cut = str(model.tokenizer.decode(ids[0]))
        named += bool(memory.router.explain(cut))
        if memory.router.route([cut]) != [None]:
            claimed += 1
            examples.append(cut[-100:])
            continue
        with torch.no_grad():
            edited = model.base_model(input_ids=ids).logits
            with model.sites.disabled():
                differing += not torch.equal(edited, model.base_model(input_ids=ids).logits)
    return {
        "lines": len(lines),
        "name a subject": named,
        "claimed": claimed,
        "others that differ": differing,
        "such as": examples[:5],
    }


if __name__ == "__main__":
    main()

"""The tables of docs/methods/index.md: what the registry knows of every method, and what was measured.

    python docs/methods/table.py            # rewrites the tables

What a method reads, how it is undone and where it runs comes from its capabilities and the fields of its config. The
figures are read from the tables of the pages that report them: none stands here that does not stand there.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from hf_kedit.methods import registered_methods
from hf_kedit.methods.base import Method

DOCS = Path(__file__).resolve().parents[1]
PAGE = DOCS / "methods" / "index.md"
MARKS = {
    name: (f"<!-- {name}: begin (made by docs/methods/table.py, do not edit) -->\n", f"<!-- {name}: end -->")
    for name in ("methods", "rows")
}

FAMILIES = {
    "one by one": "auto",
    "locate, then edit": "rome r-rome memit memit-fe emmet pmet core eamet namet alphaedit sphere kn",
    "fine-tuning": "ft-l ft-m lora qlora adalora dpo dinm",
    "long answers": "unke anyedit",
    "editors": "mend malmen rledit instructedit ke ultraedit",
    "around another method": "simie",
    "memories beside the weights": "grace defer melo wise t-patcher calinet",
    "in the prompt": "prompt ike serac",
}
"""Methods by the family under which the site shows them."""
PAGES = {"ft-l": "ft", "ft-m": "ft", "qlora": "lora", "adalora": "lora", "prompt": "ike"}
"""Where a method shares the page of another."""
FIELDS = {
    "stats_dataset": "second moments",
    "drift_bound": "general text",
    "irrelevant_texts": "irrelevant texts",
    "demonstrations": "demonstrations",
    "retriever": "a retriever",
    "counterfactual": "two small models",
    "base": "as its base",
}
"""Field of a config → what the method reads beside the request. The first that a config has counts."""
UNDO = {"edit": "each edit", "call": "a call's edits", "last": "the last ones", "all": "all at once"}


def needs(method: type[Method]) -> str:
    """What an edit needs beside the request."""
    if method.capabilities.needs_training:
        return "a trained editor"
    fields = {field.name for field in dataclasses.fields(method.config_class)}
    return next((words for field, words in FIELDS.items() if field in fields), "–")


def served(method: type[Method]) -> str:
    """What can answer with the edit; docs/methods/index.md explains the words."""
    can = method.capabilities
    if can.kind == "weights":
        return "LoRA" if can.low_rank else "merged"
    if can.kind == "prompt":
        return "text" if method.text_only else "here"
    return "here" if method.config_class.edit_type == "auto" else "PEFT"


def rows_behind(page: str, mark: str, columns: str) -> dict[str, list[str]]:
    """The first table of a page behind a mark in its text: cells by what stands in the first column.

    Args:
        page: below docs/.
        mark: text of the page.
        columns: the headings of all columns but the first, as they stand there.

    Raises:
        ValueError: if the page has another table there by now, so that figures would come under a wrong heading.
    """
    _, found, behind = (DOCS / page).read_text(encoding="utf-8").partition(mark)
    table = re.search(r"(?:^\|.*\n)+", behind, flags=re.MULTILINE)
    lines = re.sub("[*`]", "", table[0]).splitlines() if found and table else [""]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    if rows[0][1:] != columns.split(" | "):
        raise ValueError(f"{page} has no table with the columns {columns} behind {mark!r}")
    return {name: cells for name, *cells in rows[2:]}


def method_table() -> str:
    """All methods, by family; a dash where nothing was measured."""
    single = rows_behind(
        "real_models.md",
        "## Derived defaults do no harm",
        "holds | p | in other words | same question, another subject: kept | name copied | general, kept of 40"
        " | harm said | s",
    )
    sequence = rows_behind(
        "results.md",
        "## Every method, one report",
        "single: reliability | paraphrases | locality | portability"
        " | in sequence: reliability | paraphrases | locality | portability",
    )
    lines = [
        "| method | reads | undone | served | fact | other words | neighbour | rest of 40 | seconds | 100 in a row |",
        "| --- " * 7 + "| ---: | ---: | --- |",
    ]
    methods = registered_methods()
    for family, names in FAMILIES.items():
        lines.append(f"| **{family}** |" + " |" * 9)
        for name in names.split():
            method = methods[name]
            can = method.capabilities
            cells = [f"[{can.name}]({PAGES.get(name, name.replace('-', '_'))}.md)"]
            cells += [needs(method), UNDO[can.undo], served(method)]
            tried = single.get("auto (ROME)" if name == "auto" else can.name)
            if tried is not None:
                holds, _, reworded, neighbour, _, general, _, seconds = tried
                cells += [holds, reworded, neighbour, general, seconds.split()[0]]
            else:
                cells += ["–"] * 5
            row = sequence.get("SimIE on ROME" if name == "simie" else can.name)
            cells.append(" / ".join(f"{float(value):.0f}" for value in row[4:7]) if row else "–")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def row_table() -> str:
    """What was measured over several rows of CounterFact on SmolLM2."""
    long = rows_behind(
        "methods/auto.md",
        "## What it reaches",
        "ES / PS / NS | says the fact | in other words | neighbour as before | harmonic mean of the three",
    )
    short = rows_behind(
        "real_models.md",
        "On rows that nothing was chosen on",
        "holds | in other words | in chat | same question, another subject: kept | name copied"
        " | general, kept of 40, per row | harm said",
    )
    lines = [
        "| method | edits | likelihood: fact / other words / neighbour | generation: fact | other words | neighbour |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, (likelihood, fact, reworded, neighbour, _) in long.items():
        lines.append(f"| {name} | 100 in a row | {likelihood} | {fact} | {reworded} | {neighbour} |")
    for name, (fact, reworded, _, neighbour, *_) in short.items():
        lines.append(f"| {name} | 5, one by one | – | {fact} | {reworded} | {neighbour} |")
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """The page with the tables in their places."""
    for name, make in (("methods", method_table), ("rows", row_table)):
        begin, end = MARKS[name]
        head, found, rest = text.partition(begin)
        _, closed, tail = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"{PAGE} lacks the marks of the table {name!r}")
        text = f"{head}{begin}{make()}{end}{tail}"
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

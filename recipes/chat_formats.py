"""Edit in one format, ask in the other: plain text and chat.

    OMP_NUM_THREADS=2 python recipes/chat_formats.py kedit/smollm2-135m --output chat.jsonl

Single edits of facts that the model knows both as a plain statement and in a chat, each made plainly, as a chat, and
in both formats. Asked by generation: the edited statement, plainly and as what a user says; the same as a question in
a chat; and two neighbours of each relation, whose answers should be as before. Lines of ``--output`` are results of
one edit; the same command goes on where it was interrupted. The last thing printed is the table of docs/chat.md.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hf_kedit import EditableModel, logging
from hf_kedit.config import AutoEditConfig
from hf_kedit.data import load_edit_dataset
from hf_kedit.evaluation import generate_answers, known_facts
from hf_kedit.evaluation.measures.metrics import contains
from hf_kedit.requests import TEXT_FORMATS, EditRequest, load_requests

RELATIONS = ("country_capital", "country_language", "landmark_city", "city_country", "element_symbol")
METHODS = ("rome", "memit", "ft-m", "lora", "grace", "wise", "prompt")
TOKENS, PER_RELATION, TRIED, NEIGHBOURS = 12, 2, 8, 2
ASKED = ("plain", "chat", "question", "kept plain", "kept chat")


def known_in_both(model: EditableModel, count: int, known: Path) -> list[EditRequest]:
    """The first facts that the model knows in both formats, a few of some relations that small models know.

    Args:
        model: is asked by generation, unless ``known`` holds the answer.
        count: how many facts.
        known: JSON file of their ids, written when the model was asked.
    """
    if known.exists():
        by_id = {r.id: r for r in load_requests(load_edit_dataset("facts", split="test"))}
        return [by_id[name] for name in json.loads(known.read_text("utf-8"))][:count]
    requests = list[EditRequest]()
    for relation in RELATIONS:
        requests += load_requests(load_edit_dataset("facts", split="test", relation=relation, limit=TRIED))
    tokenizer = model.tokenizer
    plain = known_facts(model.base_model, tokenizer, requests)
    chat = known_facts(model.base_model, tokenizer, requests, questions=True, prompt_format="chat", max_new_tokens=20)
    chosen, seen = list[tuple[int, EditRequest]](), defaultdict[str, int](int)
    for request, both in zip(requests, map(all, zip(plain, chat, strict=True)), strict=True):
        relation = request.metadata["extra"]["relation"]
        if both and seen[relation] < PER_RELATION:
            seen[relation] += 1
            chosen.append((seen[relation], request))
    mixed = [request for _, request in sorted(chosen, key=lambda pair: pair[0])]  # one of each relation first
    known.write_text(json.dumps([request.id for request in mixed]) + "\n", encoding="utf-8")
    return mixed[:count]


def texts_of(request: EditRequest, model: EditableModel) -> dict[str, list[str]]:
    """What is asked, by column: plain texts, and chats as the tokenizer's template writes them."""
    assert model.tokenizer is not None
    chat = request.asked("chat").rendered(model.tokenizer)
    assert chat.frame is not None
    question = request.metadata["extra"]["questions"][0]
    others = [[p.prompt for p in r.locality["Other_Subjects"]][:NEIGHBOURS] for r in (request, chat)]
    return {
        "plain": [request.filled_prompt],
        "chat": [chat.filled_prompt],
        "question": [chat.frame.text(question)],
        "kept plain": others[0],
        "kept chat": others[1],
    }


def answers(model: EditableModel, asked: dict[str, list[str]]) -> dict[str, str]:
    prompts = [text for texts in asked.values() for text in texts]
    assert model.tokenizer is not None
    return {a.prompt: a.text for a in generate_answers(model.base_model, model.tokenizer, prompts, TOKENS)}


def results(
    model: EditableModel, methods: Iterable[str], requests: Iterable[EditRequest], file: Path
) -> list[dict[str, Any]]:
    """All edits that the file does not hold yet are made and written to it."""
    lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []
    done = {(line["method"], line["format"], line["id"]) for line in lines}
    for method in methods:
        for form in TEXT_FORMATS:
            todo = [r for r in requests if (method, form, r.id) not in done]
            if todo:
                model.set_method(AutoEditConfig.for_method(method, prompt_format=form))
            for request in todo:
                asked = texts_of(request, model)
                before = answers(model, asked)
                result = model.edit(request, show_progress=False)
                after = answers(model, asked)
                model.rollback()
                line = {"method": method, "format": form, "id": request.id, "seconds": result.seconds}
                for name in ASKED:
                    reached = [contains(after[text], request.target_new) == 1.0 for text in asked[name]]
                    same = [before[text] == after[text] for text in asked[name]]
                    good = same if name.startswith("kept") else reached
                    line[name] = [sum(good), len(good)]
                lines.append(line)
                with file.open("a", encoding="utf-8") as out:
                    out.write(json.dumps(line) + "\n")
                print(line, flush=True)
    return lines


def table(lines: Iterable[dict[str, Any]]) -> Iterable[str]:
    """One row per method and format of the edit."""
    yield "| method | edited | " + " | ".join(ASKED) + " | seconds |"
    yield "| --- | --- |" + " ---: |" * (len(ASKED) + 1)
    groups = defaultdict[tuple[str, str], list[dict[str, Any]]](list)
    for line in lines:
        groups[line["method"], line["format"]].append(line)
    for (method, form), group in groups.items():
        sums = [[sum(line[name][i] for line in group) for i in (0, 1)] for name in ASKED]
        seconds = sum(line["seconds"] for line in group) / len(group)
        yield f"| {method} | {form} | " + " | ".join(f"{a} of {b}" for a, b in sums) + f" | {seconds:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hub id, folder, or a name such as kedit/smollm2-135m")
    parser.add_argument("--facts", type=int, default=8, help="how many")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--output", type=Path, required=True, help="JSONL file that the results are added to")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    model = EditableModel.from_pretrained(arguments.model, "rome")
    requests = known_in_both(model, arguments.facts, arguments.output.with_suffix(".known.json"))
    for request in requests:
        print(f"{request.filled_prompt} {request.ground_truth[0]} → {request.target_new}")
    print("\n".join(table(results(model, arguments.methods, requests, arguments.output))))


if __name__ == "__main__":
    main()

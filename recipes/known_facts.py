"""Ask a model which of the packaged facts of the real world it knows.

    python recipes/known_facts.py kedit/smollm2-135m
    python recipes/known_facts.py org/model --format qa --output known.json
    python recipes/known_facts.py kedit/smollm2-135m --decoding dola:high     # with its layers contrasted

Every fact is asked twice, as the statement that an edit continues and as a question; it counts as known if the answer
stands in the ten greedy tokens behind a statement, or the twenty behind a question, whose answer is a sentence. The
table says how many are known per relation; ``--output`` lists the rows of ``load_edit_dataset("facts", split="all")``
by id.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path

from datasets import concatenate_datasets

from hf_kedit import decode_with
from hf_kedit.data import load_edit_dataset
from hf_kedit.evaluation import known_facts
from hf_kedit.evaluation.measures.knowledge import NEW_TOKENS
from hf_kedit.loading import load_base, load_tokenizer
from hf_kedit.requests import load_requests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hub id, folder, or a name such as kedit/smollm2-135m")
    parser.add_argument("--relation", help="only this one")
    parser.add_argument(
        "--format", choices=["raw", "qa", "chat"], help="frame of the questions; default: chat if it can"
    )
    parser.add_argument("--decoding", help="dola, dola:low, deco, deco:20,24 …")
    parser.add_argument("--output", type=Path, help="JSON file: id of the row → known as statement, as question")
    arguments = parser.parse_args()

    model, tokenizer = load_base(arguments.model), load_tokenizer(arguments.model)
    splits = load_edit_dataset("facts", split="all", relation=arguments.relation)
    requests = load_requests(concatenate_datasets(list(splits.values())))
    frame = arguments.format or ("chat" if tokenizer.chat_template else "qa")
    longer = {"questions": True, "prompt_format": frame, "max_new_tokens": 2 * NEW_TOKENS}
    with decode_with(model, arguments.decoding) if arguments.decoding else nullcontext():
        stated = known_facts(model, tokenizer, requests)
        asked = known_facts(model, tokenizer, requests, **longer)

    counts: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    for request, pair in zip(requests, zip(stated, asked, strict=True), strict=True):
        counts[request.metadata["extra"]["relation"]].append(pair)
    counts["all"] = [pair for pairs in counts.values() for pair in pairs]
    print(f"| relation | facts | known as statement | as question ({frame}) | either |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for relation, pairs in counts.items():
        figures = [sum(s for s, _ in pairs), sum(q for _, q in pairs), sum(s or q for s, q in pairs)]
        print(f"| {relation} | {len(pairs)} | " + " | ".join(map(str, figures)) + " |")
    if arguments.output is not None:
        known = {r.id: {"statement": s, "question": q} for r, s, q in zip(requests, stated, asked, strict=True)}
        arguments.output.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Which probes of a data set the router of `auto` takes to ask for the edit that they belong to.

    python recipes/router_claims.py counterfact_flat --path data/counterfact-edit.json --skip 100 --limit 100
    python recipes/router_claims.py knowedit/wiki_counterfact --path data/test_cf.json --encoder words --slack 0.1 0.3

No model is edited: all edits stand in one router, each with its own prompt alone. For every axis: probes, how many
name the subject, and how many are claimed by their own edit and by another one, in percent, for each slack.
"""

from __future__ import annotations

import argparse
from collections import defaultdict

from hf_kedit import EditableModel, EditRequest, load_edit_dataset
from hf_kedit.books.router import Address, EditRouter, Encoder, encoder_of_words, is_claim
from hf_kedit.methods.auto_memory import WORDS, embeddings_of, word_vectors
from hf_kedit.tokens import encode_text

MOST = 4
"""Probes of an axis of one edit that are asked."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("--path")
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--encoder", default="dense")
    parser.add_argument("--slack", type=float, nargs="+", default=[0.1, 0.3, 0.6])
    parser.add_argument("--model", default="kedit/smollm2-135m", help="whose word vectors the encoder 'words' takes")
    chosen = parser.parse_args()

    rows = load_edit_dataset(
        chosen.dataset, path=chosen.path, skip=chosen.skip, limit=chosen.limit, drop_conflicts="last"
    )
    requests = [EditRequest.from_dict(row) for row in rows]
    encode = words_of_model(chosen.model) if chosen.encoder == WORDS else embeddings_of(chosen.encoder)
    router = EditRouter(encode, 0.0).with_addresses([address(i, request) for i, request in enumerate(requests)])

    print(
        "| axis | probes | name the subject | " + " | ".join(f"slack {s:g}: own, other" for s in chosen.slack) + " |"
    )
    print("| --- | ---: | ---: |" + " --- |" * len(chosen.slack))
    for axis, probes in probes_of(requests).items():
        candidates = [{c.edit_id: c for c in router.explain(prompt)} for _, prompt in probes]
        named = sum(owner in found for (owner, _), found in zip(probes, candidates, strict=True))
        cells = []
        for slack in chosen.slack:
            claims = [
                max((c.similarity, int(c.edit_id)) for c in near)[1] if near else None
                for found in candidates
                for near in [[c for c in found.values() if is_claim(c.asked, c.similarity, c.rival_similarity, slack)]]
            ]
            own = sum(claim == int(owner) for (owner, _), claim in zip(probes, claims, strict=True))
            other = sum(claim is not None for claim in claims) - own
            cells.append(f"{100 * own / len(probes):.0f}, {100 * other / len(probes):.0f}")
        print(f"| {axis} | {len(probes)} | {100 * named / len(probes):.0f} | " + " | ".join(cells) + " |", flush=True)


def address(number: int, request: EditRequest) -> Address:
    """What an edit answers to that knows its own prompt alone."""
    first, end = request.plain_span()
    return Address.of(str(number), [request.plain_prompt], [request.plain_prompt[first:end]])


def words_of_model(name: str) -> Encoder:
    """The encoder `"words"` of a model."""
    model = EditableModel.from_pretrained(name, "prompt")
    assert model.tokenizer is not None
    tokenizer = model.tokenizer
    return encoder_of_words(word_vectors(model.base_model)(), lambda text: encode_text(tokenizer, text).ids)


def probes_of(requests: list[EditRequest]) -> dict[str, list[tuple[str, str]]]:
    """Axis → (number of the edit, prompt)."""
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for number, request in enumerate(requests):
        found["prompt"].append((str(number), request.plain_prompt))
        found["rephrase"] += [(str(number), prompt) for prompt in request.rephrase_prompts]
        for section in (request.locality, request.portability):
            for axis, probes in section.items():
                found[axis] += [(str(number), probe.prompt) for probe in probes[:MOST]]
    return {axis: probes for axis, probes in found.items() if probes}


if __name__ == "__main__":
    main()

"""What a joint solve reaches after each pass, all facts at once: the table of docs/joint.md.

    python recipes/joint_passes.py --model kedit/world-gpt2
    python recipes/joint_passes.py --model kedit/world-llama --set joint_caution=10 --skip 300

Teacher forced, token by token: reliability of the edited prompts, paraphrases, and locality (agreement with the
unedited model), each the mean over all its prompts; in brackets the harmonic mean. The defaults were chosen on rows
300-599 of the world's test facts; the table has rows 0-299.
"""

from __future__ import annotations

import argparse
from statistics import harmonic_mean

from hf_kedit import AutoEditConfig, EditableModel, load_edit_dataset, load_requests
from hf_kedit.cli.models import parse_settings
from hf_kedit.evaluation.asking.scoring import PairScore, score_pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="kedit/world-gpt2")
    parser.add_argument("--method", default="memit")
    parser.add_argument("--set", action="append", help="field=value of the config")
    parser.add_argument("--limit", type=int, default=300)
    parser.add_argument("--skip", type=int, default=0)
    chosen = parser.parse_args()

    rows = load_requests(load_edit_dataset("world", split="test", skip=chosen.skip, limit=chosen.limit))
    edited = [(row.filled_prompt, row.target_new) for row in rows]
    paraphrases = [(prompt, row.target_new) for row in rows for prompt in row.rephrase_prompts]
    probes = [probe for row in rows for axis in row.locality.values() for probe in axis]
    elsewhere = [(probe.prompt, probe.answers[0]) for probe in probes]

    name, settings = chosen.model.rpartition("/")[2], parse_settings(chosen.set) | {"sequence": "joint"}
    config = AutoEditConfig.for_model(name, chosen.method, **settings)
    model = EditableModel.from_pretrained(
        chosen.model, AutoEditConfig.for_model(name, chosen.method, **settings | {"joint_passes": 1})
    )

    def ask(pairs: list[tuple[str, str]]) -> list[PairScore]:
        return score_pairs(model.base_model, model.tokenizer, pairs)

    unedited = ask(elsewhere)

    def measure(number: int) -> None:
        reliability = sum(score.token_acc for score in ask(edited)) / len(edited)
        generalization = sum(score.token_acc for score in ask(paraphrases)) / len(paraphrases)
        same = [agreement(a, b) for a, b in zip(ask(elsewhere), unedited, strict=True)]
        numbers = [100 * n for n in (reliability, generalization, sum(same) / len(same))]
        shown = " / ".join(f"{n:.1f}" for n in numbers)
        print(f"{chosen.model} {chosen.method} pass {number}: {shown} ({harmonic_mean(numbers):.1f})", flush=True)

    model.edit(rows, show_progress=False)  # journals the facts, and finds the values of the first pass
    model.set_method(config)
    model.resolve_all(after_pass=measure, show_progress=False)


def agreement(now: PairScore, before: PairScore) -> float:
    """Share of tokens that are predicted as before."""
    return sum(a == b for a, b in zip(now.pred_ids, before.pred_ids, strict=True)) / len(before.pred_ids)


if __name__ == "__main__":
    main()

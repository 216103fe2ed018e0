"""Search settings of several methods for a model, and compare them with the derived and the packaged ones.

    python recipes/tune_methods.py kedit/world-llama
    python recipes/tune_methods.py kedit/smollm2-135m --methods rome memit --minutes 20 --write hparams

The search does not look at packaged files: the model is treated as one that nobody has met. All figures of the table
are harmonic means (docs/tune.md) on the same facts, none of which the search has seen.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hf_kedit import AutoEditConfig, EditableModel
from hf_kedit.config.hparams import find_hparams
from hf_kedit.tuning import PairedGain, TuneResult, TuneScore, search_settings
from hf_kedit.tuning.logbook import Logbook
from hf_kedit.tuning.trials import Stopwatch, Trials

METHODS = ["rome", "memit", "alphaedit", "grace", "lora", "wise", "ft-m"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--minutes", type=float, help="for each method")
    parser.add_argument("--candidates", type=int, default=18)
    parser.add_argument("--first-facts", type=int, default=4)
    parser.add_argument("--search-facts", type=int, default=16)
    parser.add_argument("--held-out", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="folder for the files, METHOD/model.yaml; default: none")
    chosen = parser.parse_args()

    print("| method | derived | found | gain (95% interval) | packaged | found − packaged (95% interval) |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for method in chosen.methods:
        model = EditableModel.from_pretrained(chosen.model, AutoEditConfig.for_method("prompt"))
        found = search_settings(
            model,
            method,
            minutes=chosen.minutes,
            candidates=chosen.candidates,
            first_facts=chosen.first_facts,
            search_facts=chosen.search_facts,
            held_out=chosen.held_out,
            seed=chosen.seed,
            packaged=False,
        )
        print(row(model, found), flush=True)
        print(f"<!-- {found.verdict} Changed: {dict(found.best.changes)}; {found.edits} edits,", end=" ")
        print(f"{found.seconds / 60:.0f} min, traced {list(found.traced)} -->", flush=True)
        if chosen.write is not None:
            found.write(chosen.write / found.method / found.place().name)


def row(model: EditableModel, found: TuneResult) -> str:
    """A line of the table."""
    shown = [found.method]
    for score in (found.check_derived, found.check_best):
        shown.append("" if score is None else f"{100 * score.harmonic:.1f}")
    shown.append("" if found.gain is None else interval(found.gain))
    method = found.config.edit_type
    if find_hparams(method, model.base_model_id) is None or found.check_derived is None:
        return "| " + " | ".join([*shown, "", ""]) + " |"
    packaged = AutoEditConfig.for_model(model.base_model_id, method).complete(model.profile)
    facts = found.facts.held_out[: found.check_derived.n]
    trials = Trials(model, Logbook(None), Stopwatch(None, lambda: 0.0, False, ""))
    before, now = (trials.measure(config, facts, share=1.0) for config in (packaged, found.config))
    shown += [f"{100 * TuneScore.of(before).harmonic:.1f}", interval(PairedGain.of(now, before))]
    return "| " + " | ".join(shown) + " |"


def interval(gain: PairedGain) -> str:
    """A difference in points, and how sure it is."""
    sure = "" if gain.low is None or gain.high is None else f" ({100 * gain.low:+.1f} … {100 * gain.high:+.1f})"
    return f"{100 * gain.mean:+.1f}{sure}"


if __name__ == "__main__":
    main()

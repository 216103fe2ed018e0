"""What single edits of a real model break, by generation, over rows of a data set: one line per method.

    python recipes/real_side_effects.py counterfact_flat --path data/counterfact-edit.json --skip 300 --limit 5 \
        --method rome memit grace wise lora calinet

Nothing is given but the method's name, so that an unknown model gets derived settings. Each row is edited, looked at
with `SideEffects` and taken back; per kind of question the answers that are good, and for each row how many of the
general answers stay and whether the edit is said to have done harm.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from hf_kedit import EditableModel, load_edit_dataset, load_requests
from hf_kedit.errors import EditFailedError
from hf_kedit.evaluation import SideEffects


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="a name of `load_edit_dataset`")
    parser.add_argument("--path", type=Path, help="file of the data set, where it is none of the Hub's")
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--limit", type=int, default=5)
    parser.add_argument("--model", default="kedit/smollm2-135m")
    parser.add_argument("--method", nargs="+", default=["rome"])
    chosen = parser.parse_args()

    table = load_edit_dataset(
        chosen.dataset, path=chosen.path, skip=chosen.skip, limit=chosen.limit, drop_conflicts="last"
    )
    rows = load_requests(table)
    model = EditableModel.from_pretrained(chosen.model, chosen.method[0])
    for method in chosen.method:
        model.set_method(method)
        good, asked, kept, failed = Counter[str](), Counter[str](), [], 0
        for row in rows:
            try:
                effects = model.edit(row, show_progress=False, watch=SideEffects()).side_effects
            except EditFailedError:
                failed += 1
                continue
            for answer in effects.answers:
                asked[answer.question.kind] += 1
                good[answer.question.kind] += answer.good
            general = effects.of("general")
            kept.append(f"{sum(a.good for a in general)}{' (harm)' if effects.harm else ''}")
            model.rollback()
        shares = ", ".join(f"{kind} {good[kind]}/{asked[kind]}" for kind in asked)
        print(f"{method}: {shares}; general per row: {', '.join(kept)}; failed: {failed}", flush=True)


if __name__ == "__main__":
    main()

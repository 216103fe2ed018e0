"""What edits with one or the other value optimiser are worth: likelihood and generation, on the same rows."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.shapes import build, requests, tokenizer_of
from hf_kedit import EditableModel, evaluate_edits
from hf_kedit.evaluation import Generation

NEW_TOKENS = 8


def quality(options: Any, shape: str, kind: Any, skip: int) -> None:
    """Print a table for each optimiser: ROME edits fact by fact, other methods all of them at once.

    Args:
        options: of the command line: ``quality`` rows of the file ``rows``, each ``optimizer``. With ``json``, results
            are kept in a folder of that name, and a repeated call goes on.
        shape: of the model.
        kind: class of the method's config.
        skip: rows of the file to leave out.
    """
    base = build(shape, options.device, getattr(torch, options.dtype))
    rows = requests(options.quality, options.rows, skip=skip if options.rows else 0)
    for optimiser in options.optimizer:
        model = EditableModel(base, kind(v_optimizer=optimiser), tokenizer=tokenizer_of(shape))
        one = kind.edit_type == "rome"
        report = evaluate_edits(
            model,
            rows,
            setting="single" if one else "batch",
            protocol=[Generation(max_new_tokens=NEW_TOKENS), "likelihood"],
            progress=False,
            on_error="skip",
            output_dir=options.json and f"{options.json}.{kind.edit_type}.{options.dtype}.{optimiser}",
        )
        print(f"{shape} {kind.edit_type} {options.dtype} {optimiser}, {len(rows)} rows")
        print(report, flush=True)

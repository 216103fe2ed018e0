"""Draws the pictures of docs/pictures.md on the embedded model: `python docs/pictures/plots.py` (half a minute)."""

from __future__ import annotations

import logging
from pathlib import Path

from hf_kedit import EditableModel, SideEffects, evaluate_edits, load_edit_dataset, load_requests
from hf_kedit.evaluation import Comparison
from hf_kedit.locate import causal_trace

FOLDER = Path(__file__).resolve().parent
PROTOCOLS = ("generation", "teacher_forced")


def main() -> None:
    logging.getLogger("hf_kedit").setLevel(logging.ERROR)
    facts = load_requests(load_edit_dataset("world", split="test", limit=40))
    general = [f.filled_prompt for f in load_requests(load_edit_dataset("world", split="validation", limit=40))]

    def model(method: str) -> EditableModel:
        return EditableModel.from_pretrained("kedit/world-gpt2", method)

    pictures = {"edit": model("rome").edit(facts[0], watch=SideEffects(general=general)).plot()}
    reports = {
        method: evaluate_edits(model(method), facts[:12], protocol=PROTOCOLS, progress=False)
        for method in ("ft-m", "rome", "grace")
    }
    pictures["report"] = reports["rome"].plot()
    pictures["comparison"] = Comparison(reports).plot()
    at = [1, 5, 10, 20]
    in_a_row = evaluate_edits(model("rome"), facts, "sequential", protocol=PROTOCOLS, at=at, progress=False)
    pictures["curves"] = in_a_row.plot()
    pictures["trace"] = causal_trace(model("rome"), facts[0]).plot()
    for name, figure in pictures.items():
        data, _ = figure._repr_png_()  # type: ignore[attr-defined]
        (FOLDER / f"{name}.png").write_bytes(data)


if __name__ == "__main__":
    main()

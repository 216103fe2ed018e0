"""Made the files beside it, with version 0.1.0: an interrupted run (its last measurement cut off), and its report.

python make.py   # with hf_kedit 0.1.0 installed
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hf_kedit import EditableModel, evaluate_edits
from hf_kedit.evaluation import Fluency, Generation

ROWS: list[dict[str, Any]] = [
    {
        "id": "first",
        "prompt": "By profession {} is a",
        "subject": "Tarosk Boayond",
        "target_new": "plumber",
        "ground_truth": ["baker"],
        "rephrase_prompts": ["Tarosk Boayond works as a"],
        "locality": {"other": [{"prompt": "The old bridge is", "ground_truth": "closed"}]},
        "portability": {"place": [{"prompt": "Tarosk Boayond repairs", "ground_truth": ["pipes"]}]},
    },
    {"id": "second", "prompt": "{} was born in", "subject": "Tarosk Boayond", "target_new": "Rome"},
]
ARGUMENTS: dict[str, Any] = {
    "setting": "sequential",
    "protocol": ["teacher_forced", Generation(max_new_tokens=4), "likelihood", Fluency("words", 20)],
    "when": ("immediate", "final"),
    "collapse_text": "The old bridge was closed for the winter.",
    "progress": False,
}

if __name__ == "__main__":
    here = Path(__file__).parent
    model = EditableModel.from_pretrained("kedit/world-gpt2", "ft-m")
    report = evaluate_edits(model, ROWS, output_dir=here, **ARGUMENTS)
    report.to_json(here / "report.json")
    (here / "meta.json").unlink()
    lines = (here / "results.jsonl").read_text().splitlines(keepends=True)
    last = [line for line in lines if json.loads(line)["step"] == 2]
    whole = [line for line in lines if json.loads(line)["step"] < 2]
    (here / "results.jsonl").write_text("".join(whole) + last[0] + last[1][:100])

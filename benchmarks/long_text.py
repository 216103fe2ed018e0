"""What does a page of two hundred tokens cost each method, and what is written afterwards?

    python -m benchmarks.long_text --method memit grace prompt --json pages.jsonl
    python -m benchmarks.long_text --method anyedit --set base=memit --seconds 1800

Each method edits in a process of its own, on one thread of a CPU, with its derived settings or those that ``--set``
gives. Of the edit alone: seconds of that process (not of the clock on the wall) and its peak of resident memory, with
second moments and whatever else is prepared, where it is not on disk. Then the scenario ``long_text`` asks the edited
model and the unedited one. Beside that stands the drift, ``KL(unedited ‖ edited)`` in nats per token of general
sentences that no method watches or holds; and, of methods that optimise states, what the target has with the worst of
them in place (``state``): an update can hold no more. A method that fails, or takes longer than ``--seconds``, gets a
row that says so. Rows that the ``--json`` file holds are not measured again: the same command goes on where it ended.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Table, begin, clock, environment, parser, peak, reset_peak
from hf_kedit import AutoEditConfig, EditableModel, load_requests
from hf_kedit.cli.models import parse_settings
from hf_kedit.data.general_probes import GENERAL_PROBES
from hf_kedit.errors import KeditError
from hf_kedit.evaluation import evaluate_edits, load_scenario
from hf_kedit.evaluation.scenarios.long_text import LongReplies
from hf_kedit.methods.drift import GeneralText
from hf_kedit.tokens import needed_tokenizer

PAGE = Path(__file__).parents[1] / "docs" / "scenarios" / "data" / "long_page.json"
SHORT = 40
"""Tokens of an answer to a question about a detail."""
METHODS = ["prompt", "grace", "rome", "memit", "ft-m", "lora", "unke", "anyedit"]


def measure(model_name: str, method: str, settings: dict[str, Any], path: Path, spare: int) -> dict[str, Any]:
    """Edit one page and look at it; the figures of a row.

    Args:
        model_name: Hub id or folder.
        method: name of the method.
        settings: of its config.
        path: file in the layout of UnKE; its first row is edited.
        spare: so many tokens more than the page has may be written.
    """
    model = EditableModel.from_pretrained(model_name, AutoEditConfig.for_method(method, **settings))
    request = load_requests(load_scenario("long_text").read(path))[0]
    tokenizer = needed_tokenizer(model.tokenizer, "The benchmark")
    tokens = len(tokenizer(f" {request.target_new}", add_special_tokens=False).input_ids)
    row: dict[str, Any] = {"tokens": tokens}
    base, began = reset_peak("cpu"), clock("cpu")
    told = model.edit(request, show_progress=False).edits[0].diagnostics
    row |= {"seconds": clock("cpu") - began, "megabytes": peak("cpu") / 2**20, "megabytes_before": base / 2**20}
    # Details are asked for with fewer tokens: seven texts of the page's length would take longer than most edits.
    for part, length, keys in (
        (replace(request, portability={}), tokens + spare, ("bleu", "rougeL", "paraphrase_rougeL")),
        (replace(request, rephrase_prompts=[]), SHORT, ("sub_answered",)),
    ):
        report = evaluate_edits(model, [part], "saved", protocol=LongReplies(length), progress=False).summary()
        row |= {f"{key}_{when}": report[when]["long_text"][key] for key in keys for when in ("pre", "post")}
    for key in ("target_probability_before", "value_probability", "target_probability_after"):
        row[key] = told.get(key)
    with model.disable_edits():
        general = GeneralText.of(model.base_model, tokenizer, GENERAL_PROBES, 0)
    with torch.no_grad():
        row["drift"] = float(general.drift(model.base_model))
    return row


def in_a_process(chosen: argparse.Namespace, method: str) -> dict[str, Any]:
    """The row of a method, from a process of its own; with ``error`` where there is none."""
    command = [sys.executable, "-m", "benchmarks.long_text", "--one", "--method", method, "--model", chosen.model]
    command += ["--page", str(chosen.page), "--spare", str(chosen.spare)]
    command += [word for setting in chosen.set for word in ("--set", setting)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=chosen.seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {chosen.seconds} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["the process ended"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure the methods that the command line names and print a table."""
    options = parser(__doc__)
    options.add_argument("--model", default="kedit/smollm2-135m")
    options.add_argument("--method", nargs="+", default=METHODS)
    options.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="setting of the methods")
    options.add_argument("--page", type=Path, default=PAGE, help="file whose first row is edited")
    options.add_argument("--spare", type=int, default=20, help="tokens that may be written beyond the page's number")
    options.add_argument("--seconds", type=float, help="the most that a method may take, on the wall")
    options.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    chosen.device = "cpu"
    begin(chosen)
    if chosen.one:
        settings = parse_settings(chosen.set)
        try:
            print(json.dumps(measure(chosen.model, chosen.method[0], settings, chosen.page, chosen.spare)))
        except KeditError as error:
            print(json.dumps({"error": str(error)}))
        return
    table = Table(
        [
            ("method", "method", "10"),
            ("settings", "set", "20"),
            ("seconds", "seconds", "8.0f"),
            ("MiB", "megabytes", "6.0f"),
            ("before", "megabytes_before", "6.0f"),
            ("state", "value_probability", "5.2f"),
            ("p/token", "target_probability_after", "8.3f"),
            ("BLEU", "bleu_pre", "5.1%"),
            ("after", "bleu_post", "6.1%"),
            ("ROUGE-L", "rougeL_pre", "6.1%"),
            ("after", "rougeL_post", "6.1%"),
            ("details", "sub_answered_post", "6.0%"),
            ("drift", "drift", "8.1e"),
        ],
        chosen.json,
    )
    for method in chosen.method:
        what = {"model": chosen.model, "method": method, "set": " ".join(chosen.set), "page": chosen.page.name}
        had = table.measured(**what)
        row = had[-1] if had else {**what, **in_a_process(chosen, method), **environment("cpu")}
        (table.show if had else table.add)(row)
        if "error" in row:
            print(" " * 12 + row["error"], flush=True)


if __name__ == "__main__":
    main()

"""``kedit demo``: one fact is changed, looked at from all sides, saved, loaded again, and undone.

The run is here, what it looks like in `demo_view`. Every figure is of this one edit.
"""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import logging as kedit_logging
from ..errors import DataError, EvaluationError
from ..storage.parsing import as_mapping, parse_json
from .demo_view import Answers, DemoView, opening
from .models import DeviceOption, Dtype, DtypeOption, SetOption, hush_transformers, open_model
from .output import DebugOption, Format, FormatOption, command, console, emit

if TYPE_CHECKING:
    from ..model import EditableModel
    from ..requests import EditRequest

NEW_TOKENS, ANSWER_TOKENS = 16, 8
TRIED_FACTS = 50
RELOAD_LIMIT = 500_000_000
"""Models with more parameters are not loaded a second time unless asked."""

# A fact, its paraphrases and its neighbours for models that know the real world.
REAL_FACT: dict[str, Any] = {
    "prompt": "{} is located in the city of",
    "subject": "The Eiffel Tower",
    "target_new": "Rome",
    "ground_truth": ["Paris"],
    "rephrase_prompts": ["To see the Eiffel Tower, tourists travel to the city of", "The Eiffel Tower stands in"],
}
REAL_NEIGHBOURS: dict[str, Any] = {
    "Neighborhood": [
        {"prompt": "The Louvre is located in the city of", "ground_truth": "Paris"},
        {"prompt": "Notre-Dame Cathedral is located in the city of", "ground_truth": "Paris"},
    ],
    "Other_Subjects": [
        {"prompt": "The Statue of Liberty is located in the city of", "ground_truth": "New York"},
        {"prompt": "Big Ben is located in the city of", "ground_truth": "London"},
    ],
    "Entities": [
        {"prompt": "The capital of Germany is", "ground_truth": "Berlin"},
        {"prompt": "The author of Hamlet is", "ground_truth": "William Shakespeare"},
    ],
}

# Runs in a fresh interpreter: loads the saved edits and tells what came out.
_RELOAD = """
import json, sys
from hf_kedit import EditableModel
from hf_kedit.engine.weights import model_digest
from hf_kedit.evaluation import generate_answers
folder, prompt, tokens = sys.argv[1:4]
model = EditableModel.from_pretrained(folder)
text = generate_answers(model.base_model, model.tokenizer, [prompt], max_new_tokens=int(tokens))[0].text
sys.stdout.write(json.dumps({"digest": model_digest(model.base_model), "text": text}) + "\\n")
"""


@dataclass
class DemoOptions:
    """The options of the command."""

    model: str
    method: str
    prompt: str | None = None
    subject: str | None = None
    target: str | None = None
    ground_truth: str | None = None
    rephrase: list[str] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)
    output: Path | None = None
    reload: bool | None = None
    dtype: Dtype | None = None
    device: str | None = None


@command
def demo(
    model: Annotated[
        str, typer.Option("--model", "-m", help="kedit/world-gpt2, kedit/world-llama, or any Hub id or folder.")
    ] = "kedit/world-gpt2",
    method: Annotated[str, typer.Option("--method", "-M", help="Editing method.")] = "rome",
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="A fact of your own; {} stands for the subject.")
    ] = None,
    subject: Annotated[str | None, typer.Option("--subject", help="The entity that it is about.")] = None,
    target: Annotated[str | None, typer.Option("--target", "-t", help="What the model should say.")] = None,
    ground_truth: Annotated[
        str | None, typer.Option("--ground-truth", help="What it says now; default: what it generates.")
    ] = None,
    rephrase: Annotated[
        list[str] | None, typer.Option("--rephrase", help="The prompt in other words; may be repeated.")
    ] = None,
    set_: SetOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the saved edit; default: a temporary folder.")
    ] = None,
    reload: Annotated[
        bool | None,
        typer.Option(
            "--reload/--no-reload",
            help="Load the saved edit in a fresh process; default: unless the model is large.",
            show_default=False,
        ),
    ] = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    format: FormatOption = Format.human,
    debug: DebugOption = False,
) -> None:
    """Watch a language model change its mind about one fact, and back.

    Without options: an embedded model of 1.5 million parameters that knows an invented world; nothing is
    downloaded.
    """
    if (prompt is None) != (target is None):
        raise typer.BadParameter("--prompt and --target belong together", param_hint="--prompt")
    if prompt is None and (subject or ground_truth or rephrase):
        raise typer.BadParameter("a fact of your own needs --prompt and --target", param_hint="--prompt")
    options = DemoOptions(
        model=model,
        method=method,
        prompt=prompt,
        subject=subject,
        target=target,
        ground_truth=ground_truth,
        rephrase=rephrase or [],
        settings=set_ or [],
        output=output,
        reload=reload,
        dtype=dtype,
        device=device,
    )
    if not debug:  # a first look should not begin with remarks about defaults; --debug shows them
        kedit_logging.set_verbosity_error()
    view = DemoView(console() if format is Format.human else None)
    data = run_demo(options, view)
    emit(format, data, human=lambda _: None, quiet=[data["saved_to"]])


def run_demo(options: DemoOptions, view: DemoView) -> dict[str, Any]:
    """Run the demonstration; returns the JSON result.

    Raises:
        KeditError: if the model cannot be loaded or edited.
    """
    from ..artifact.layout import check_destination
    from ..engine.weights import model_digest
    from ..evaluation import BeforeAndAfter

    started = time.perf_counter()
    if options.output is not None:
        check_destination(options.output)
    with view.working("loading the model"):
        hush_transformers()
        model = open_model(
            options.model, options.method, None, options.settings, dtype=options.dtype, device=options.device
        )
        request = choose_request(model, options)
    size = sum(p.numel() for p in model.base_model.parameters())
    layers = model.edit_config.layers or []
    view.title(model.base_model_id, size, model.anatomy.num_layers, model.capabilities.name, layers)
    view.fact(request)

    neighbours = [(axis, probe) for axis, probes in request.locality.items() for probe in probes]
    prompts = [request.filled_prompt, *request.rephrase_prompts, *(probe.prompt for _, probe in neighbours)]
    with view.working("editing"):
        digest = model_digest(model.base_model)
        before = ask(model, request, prompts)
        measured = BeforeAndAfter(model, [request])
        result = model.edit(measured.requests, show_progress=False)
        (edit,) = result.edits
        summary = measured.report(result).summary()
        after = ask(model, request, prompts)
    seconds_edit = float(edit.diagnostics["seconds"])
    asked = [request.filled_prompt, *request.rephrase_prompts]
    view.generations(asked, before.texts, after.texts, request, seconds_edit)
    view.probabilities(request, before, after)
    rows = [
        {
            "kind": axis,
            "prompt": probe.prompt,
            "before": before.texts[probe.prompt],
            "after": after.texts[probe.prompt],
            "unchanged": opening(before.texts[probe.prompt]) == opening(after.texts[probe.prompt]),
        }
        for axis, probe in neighbours
    ]
    view.neighbours(rows)
    post = summary["post"]
    scores = {
        "rewrite_success": post.get("rewrite_acc"),
        "rephrase_success": post.get("rephrase_acc"),
        "locality": post.get("locality"),
        "portability": post.get("portability"),
    }
    view.scores(scores, summary["protocol"])

    folder = options.output or Path(tempfile.mkdtemp(prefix="kedit-demo-")) / "edit"
    model.save_pretrained(folder)
    edited_digest = model_digest(model.base_model)
    wanted = options.reload if options.reload is not None else size <= RELOAD_LIMIT
    again = start_reload(folder, request) if wanted else None
    try:
        # The other process loads meanwhile.
        model.rollback(edit.id)
        rollback_exact = model_digest(model.base_model) == digest
        back = ask(model, request, asked)
        with view.working("loading the saved edit in a fresh process"):
            reloaded = finish_reload(again)
    finally:
        if again is not None and again.poll() is None:
            again.kill()
    reload_exact = None
    if reloaded is not None:
        reload_exact = reloaded["digest"] == edited_digest and reloaded["text"] == after.texts[request.filled_prompt]
    view.saved(folder, reload_exact)
    view.undone(request, back, before, rollback_exact, size)
    seconds = time.perf_counter() - started
    view.end(seconds)
    return {
        "model": model.base_model_id,
        "method": model.method_name,
        "layers": layers,
        "prompt": request.filled_prompt,
        "subject": request.subject,
        "target_old": next(iter(request.ground_truth), None),
        "target_new": request.target_new,
        "before": before.texts[request.filled_prompt],
        "after": after.texts[request.filled_prompt],
        "original_again": back.texts[request.filled_prompt],
        "probabilities": {
            "before": {"old": before.old, "new": before.new},
            "after": {"old": after.old, "new": after.new},
            "original_again": {"old": back.old, "new": back.new},
        },
        "paraphrases": [
            {"prompt": p, "before": before.texts[p], "after": after.texts[p]} for p in request.rephrase_prompts
        ],
        "neighbours": rows,
        **scores,
        "protocol": summary["protocol"],
        "rollback_exact": rollback_exact,
        "reload_exact": reload_exact,
        "edit_id": edit.id,
        "saved_to": str(folder),
        "seconds_edit": seconds_edit,
        "seconds": seconds,
    }


# ---------------------------------------------------------------------- the fact


def choose_request(model: EditableModel, options: DemoOptions) -> EditRequest:
    """The user's fact; else the first test fact of the embedded world that the model knows; else a well-known one."""
    from .. import embedded
    from ..data import load_edit_dataset
    from ..requests import EditRequest, load_requests

    in_world = embedded.is_embedded(options.model)
    if options.prompt is not None and options.target is not None:
        request = EditRequest(options.prompt, options.subject, options.target, rephrase_prompts=options.rephrase)
        if options.ground_truth:
            request.ground_truth = [options.ground_truth]
        else:
            said = opening(_continue(model, [request.filled_prompt], ANSWER_TOKENS)[request.filled_prompt])
            request.ground_truth = [said] if said else []
        if in_world:
            (row,) = load_requests(load_edit_dataset("world", split="test", limit=1))
            request.locality = {axis: probes for axis, probes in row.locality.items() if axis != "Same_Subject"}
        else:
            request.locality = EditRequest(**{**REAL_FACT, "locality": REAL_NEIGHBOURS}).locality
        return request
    if not in_world:
        return EditRequest(**REAL_FACT, locality=REAL_NEIGHBOURS)
    facts = load_requests(load_edit_dataset("world", split="test", limit=TRIED_FACTS))
    texts = _continue(model, [f.filled_prompt for f in facts], ANSWER_TOKENS)
    for fact in facts:
        if fact.ground_truth and texts[fact.filled_prompt].startswith(fact.ground_truth[0]):
            return fact
    raise DataError(f"{options.model!r} knows none of the first {TRIED_FACTS} facts of its world")


def ask(model: EditableModel, request: EditRequest, prompts: Sequence[str]) -> Answers:
    """Ask the model as it is now."""
    from ..evaluation import score_pairs

    targets = [request.target_new, *request.ground_truth[:1]]
    pairs = [(request.filled_prompt, target) for target in targets]
    assert model.tokenizer is not None  # loaded by name
    scores = score_pairs(model.base_model, model.tokenizer, pairs, request.separator_or(model.edit_config.separator))
    chances = [math.exp(-score.sum_nll) for score in scores]
    return Answers(_continue(model, prompts, NEW_TOKENS), chances[1] if len(chances) > 1 else None, chances[0])


def _continue(model: EditableModel, prompts: Sequence[str], tokens: int) -> dict[str, str]:
    from ..evaluation import generate_answers

    assert model.tokenizer is not None
    answers = generate_answers(model.base_model, model.tokenizer, list(prompts), max_new_tokens=tokens)
    return {answer.prompt: answer.text for answer in answers}


# ---------------------------------------------------------------------- the fresh process


def start_reload(folder: Path, request: EditRequest) -> subprocess.Popen[str]:
    """Start a new Python that loads the saved edit."""
    return subprocess.Popen(
        [sys.executable, "-c", _RELOAD, str(folder), request.filled_prompt, str(NEW_TOKENS)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


def finish_reload(process: subprocess.Popen[str] | None) -> dict[str, Any] | None:
    """Wait for it; returns what it says, ``None`` if it was not started.

    Raises:
        EvaluationError: if it failed.
    """
    if process is None:
        return None
    out, err = process.communicate()
    if process.returncode != 0:
        lines = err.strip().splitlines() or ["no message"]
        raise EvaluationError(f"loading the saved edit in a fresh process failed: {lines[-1]}")
    what = "what the fresh process says"
    return as_mapping(parse_json(out.strip().rpartition("\n")[2], what, EvaluationError), what, EvaluationError)

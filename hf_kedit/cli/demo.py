"""``kedit demo``: one fact is changed, looked at from all sides, saved, loaded again, and undone.

The run is here, what it looks like in `demo_view`. Every figure is of this one edit.
"""

from __future__ import annotations

import functools
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import logging as kedit_logging
from ..errors import DataError, EvaluationError
from ..storage.parsing import as_mapping, parse_json
from ..text.processors import shown_text
from ..text.sentences import opening
from .demo_view import Answers, DemoView
from .facts import RephraseOption, SubjectOption, TargetOption
from .models import (
    DeviceOption,
    DtypeOption,
    LoadOptions,
    MethodOptions,
    SetOption,
    hush_transformers,
    open_model,
)
from .output import DebugOption, Format, FormatOption, command, console, emit

if TYPE_CHECKING:
    from ..evaluation import SideEffectReport
    from ..model import EditableModel
    from ..requests import EditRequest

NEW_TOKENS, ANSWER_TOKENS = 10, 8
"""Of what is shown, as many as side effects are judged by; of what the model says now to a fact of the user's."""
TRIED_FACTS, TRIED_LANDMARKS, TRIED_PICTURES = 50, 8, 8
PROTOCOL = "generation"
RELOAD_LIMIT = 500_000_000
"""Models with more parameters are not loaded a second time unless asked."""

# Runs in a fresh interpreter: loads the saved edits and tells what came out.
_RELOAD = """
import json, sys
from hf_kedit import EditableModel, EditRequest
from hf_kedit.engine.weights import model_digest
from hf_kedit.evaluation import generate_answers
folder, request, tokens = sys.argv[1:4]
model = EditableModel.from_pretrained(folder)
prompt = EditRequest.from_dict(json.loads(request)).rendered(model.tokenizer, model.processor).filled_prompt
text = generate_answers(model.base_model, model.tokenizer, [prompt], max_new_tokens=int(tokens))[0].text
sys.stdout.write(json.dumps({"digest": model_digest(model.base_model), "text": text}) + "\\n")
"""


@dataclass(frozen=True)
class DemoOptions:
    """Which model, which method, which fact."""

    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", help="kedit/world-gpt2, kedit/world-llama, kedit/world-pictures, or any Hub id or folder."
        ),
    ] = "kedit/world-gpt2"
    method: Annotated[str, typer.Option("--method", "-M", help="Editing method.")] = "rome"
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="A fact of your own; {} stands for the subject.")
    ] = None
    subject: SubjectOption = None
    target: TargetOption = None
    ground_truth: Annotated[
        str | None, typer.Option("--ground-truth", help="What it says now; default: what it generates.")
    ] = None
    rephrase: RephraseOption = None
    set_: SetOption = None
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the saved edit; default: a temporary folder.")
    ] = None
    reload: Annotated[
        bool | None,
        typer.Option(
            "--reload/--no-reload",
            help="Load the saved edit in a fresh process; default: unless the model is large.",
            show_default=False,
        ),
    ] = None
    dtype: DtypeOption = None
    device: DeviceOption = None


@command
def demo(
    options: DemoOptions = DemoOptions(), format: FormatOption = Format.human, debug: DebugOption = False
) -> None:
    """Watch a language model change its mind about one fact, and back.

    Without options: an embedded model of 1.5 million parameters that knows an invented world; nothing is
    downloaded.
    """
    if (options.prompt is None) != (options.target is None):
        raise typer.BadParameter("--prompt and --target belong together", param_hint="--prompt")
    if options.prompt is None and (options.subject or options.ground_truth or options.rephrase):
        raise typer.BadParameter("a fact of your own needs --prompt and --target", param_hint="--prompt")
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
    from ..evaluation.measures.metrics import answer_score, mean
    from ..evaluation.measures.side_effects import watcher_of

    started = time.perf_counter()
    if options.output is not None:
        check_destination(options.output)
    with view.working("loading the model"):
        hush_transformers()
        load = LoadOptions(options.dtype, options.device)
        model = open_model(options.model, load, MethodOptions(options.method, set_=options.set_))
        request = choose_request(model, options)
    size = sum(p.numel() for p in model.base_model.parameters())
    layers = model.edit_config.layers or []
    view.title(model.base_model_id, size, model.anatomy.num_layers, model.capabilities.name, layers)
    view.fact(request)
    # As the model reads it: the same of a request without pictures.
    assert model.tokenizer is not None  # loaded by name
    asked = request.rendered(model.tokenizer, model.processor)
    named = functools.partial(_named, request=asked)

    hops = [probe for probes in asked.portability.values() for probe in probes]
    prompt, watch = asked.filled_prompt, watcher_of(options.model)
    with view.working("editing"):
        digest = model_digest(model.base_model)
        before, chat = ask(model, asked, [prompt, *(hop.prompt for hop in hops)]), ask_in_chat(model, request)
        result = model.edit(request, show_progress=False, watch=watch)
        (edit,) = result.edits
        after, chat_after = ask(model, asked, list(before.texts)), ask_in_chat(model, request)
    effects: SideEffectReport = result.side_effects
    seconds_edit = float(edit.diagnostics["seconds"])
    said = {named(a.question.prompt): (a.before, a.after) for kind in ("fact", "paraphrase") for a in effects.of(kind)}
    said |= {f"{question} (chat)": (text, chat_after[question]) for question, text in chat.items()}
    old, new = ({question: texts[i] for question, texts in said.items()} for i in (0, 1))
    view.generations(list(said), old, new, request, seconds_edit)
    view.probabilities(request, before, after)
    axes = {probe.prompt: axis for axis, probes in asked.locality.items() for probe in probes}
    rows: list[dict[str, Any]] = [
        {
            "kind": axes.get(a.question.prompt, kind),
            "prompt": named(a.question.prompt),
            "before": a.before,
            "after": a.after,
            "unchanged": a.good,
        }
        for kind in ("neighbour", "same subject")
        for a in effects.of(kind)
    ]
    view.neighbours(rows)
    consequences: list[dict[str, Any]] = [
        {
            "prompt": named(hop.prompt),
            "wanted": hop.answers,
            "before": before.texts[hop.prompt],
            "after": after.texts[hop.prompt],
            "follows": answer_score(after.texts[hop.prompt], hop.ground_truth, hop.match, "contains") == 1.0,
        }
        for hop in hops
    ]
    view.consequences(consequences, request)
    scores = {
        "rewrite_success": effects.share("fact"),
        "rephrase_success": effects.share("paraphrase"),
        "locality": mean(float(row["unchanged"]) for row in rows),
        "portability": mean(float(row["follows"]) for row in consequences),
    }
    view.scores(scores, PROTOCOL)
    view.side_effects(effects)

    folder = options.output or Path(tempfile.mkdtemp(prefix="kedit-demo-")) / "edit"
    model.save_pretrained(folder)
    edited_digest = model_digest(model.base_model)
    wanted = options.reload if options.reload is not None else size <= RELOAD_LIMIT
    again = start_reload(folder, request) if wanted else None
    try:
        # The other process loads meanwhile.
        model.rollback(edit.id)
        rollback_exact = model_digest(model.base_model) == digest
        back = ask(model, asked, [prompt])
        with view.working("loading the saved edit in a fresh process"):
            reloaded = finish_reload(again)
    finally:
        if again is not None and again.poll() is None:
            again.kill()
    reload_exact = None
    if reloaded is not None:
        reload_exact = reloaded["digest"] == edited_digest and reloaded["text"] == after.texts[prompt]
    view.saved(folder, reload_exact)
    view.undone(asked, back, before, rollback_exact, size)
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
        "before": before.texts[prompt],
        "after": after.texts[prompt],
        "original_again": back.texts[prompt],
        "probabilities": {
            "before": {"old": before.old, "new": before.new},
            "after": {"old": after.old, "new": after.new},
            "original_again": {"old": back.old, "new": back.new},
        },
        "paraphrases": [
            {"prompt": p, "before": said[p][0], "after": said[p][1]}
            for p in map(named, [*asked.rephrase_prompts, *asked.repictured_prompts])
        ],
        "chat": [{"prompt": p, "before": text, "after": chat_after[p]} for p, text in chat.items()],
        "neighbours": rows,
        "consequences": consequences,
        **scores,
        "protocol": PROTOCOL,
        "side_effects": effects.to_dict(),
        "rollback_exact": rollback_exact,
        "reload_exact": reload_exact,
        "edit_id": edit.id,
        "saved_to": str(folder),
        "seconds_edit": seconds_edit,
        "seconds": seconds,
    }


def _named(prompt: str, request: EditRequest) -> str:
    """What people read of a question about a request: without what stands for pictures, and another one is named."""
    text = shown_text(prompt)
    return f"{text} (another picture)" if prompt in request.repictured_prompts else text


# ---------------------------------------------------------------------- the fact


def choose_request(model: EditableModel, options: DemoOptions) -> EditRequest:
    """The user's fact; else the first that the model knows: of the embedded world, or landmarks of the real one."""
    from .. import embedded
    from ..data import load_edit_dataset
    from ..evaluation import known_facts
    from ..requests import EditRequest, load_requests

    source: dict[str, Any] = {"name": "facts", "split": "test", "relation": "landmark_city", "limit": TRIED_LANDMARKS}
    if embedded.is_embedded(options.model):
        source = {"name": "world", "split": "test", "limit": TRIED_FACTS}
        if model.processor is not None:
            source = {"name": "world-pictures", "limit": TRIED_PICTURES, "kinds": ("portrait",)}
    if options.prompt is not None and options.target is not None:
        request = EditRequest(options.prompt, options.subject, options.target, rephrase_prompts=options.rephrase or [])
        if options.ground_truth:
            request.ground_truth = [options.ground_truth]
        else:
            said = opening(_continue(model, [request.filled_prompt], ANSWER_TOKENS)[request.filled_prompt])
            request.ground_truth = [said] if said else []
        (row,) = load_requests(load_edit_dataset(**{**source, "limit": 1}))
        request.locality = {axis: probes for axis, probes in row.locality.items() if axis != "Same_Subject"}
        return request
    facts = load_requests(load_edit_dataset(**source))
    assert model.tokenizer is not None
    asked = [fact.rendered(model.tokenizer, model.processor) for fact in facts]
    known = known_facts(model.base_model, model.tokenizer, asked, at_once=True)
    for fact in itertools.compress(facts, known):
        return fact
    raise DataError(f"{options.model!r} knows none of {len(facts)} facts; name one with --prompt and --target")


def ask(model: EditableModel, request: EditRequest, prompts: Sequence[str]) -> Answers:
    """Ask the model as it is now."""
    from ..evaluation import score_pairs

    targets = [request.target_new, *request.ground_truth[:1]]
    pairs = [(request.filled_prompt, target) for target in targets]
    assert model.tokenizer is not None  # loaded by name
    scores = score_pairs(model.base_model, model.tokenizer, pairs, request.separator_or(model.edit_config.separator))
    chances = [score.probability for score in scores]
    return Answers(_continue(model, prompts, NEW_TOKENS), chances[1] if len(chances) > 1 else None, chances[0])


def ask_in_chat(model: EditableModel, request: EditRequest) -> dict[str, str]:
    """The fact as a question to a chat model: question → answer; nothing where there is no template or question."""
    from ..evaluation import generate_answers

    assert model.tokenizer is not None
    questions = (request.metadata.get("extra") or {}).get("questions")
    if not (model.tokenizer.chat_template and isinstance(questions, list)):
        return {}
    chosen = [str(question) for question in questions[:1]]
    answers = generate_answers(model.base_model, model.tokenizer, chosen, 2 * NEW_TOKENS, prompt_format="chat")
    return {answer.prompt: answer.text for answer in answers}


def _continue(model: EditableModel, prompts: Sequence[str], tokens: int) -> dict[str, str]:
    from ..evaluation import generate_answers

    assert model.tokenizer is not None
    answers = generate_answers(model.base_model, model.tokenizer, list(prompts), max_new_tokens=tokens)
    return {answer.prompt: answer.text for answer in answers}


# ---------------------------------------------------------------------- the fresh process


def start_reload(folder: Path, request: EditRequest) -> subprocess.Popen[str]:
    """Start a new Python that loads the saved edit."""
    asked = ("prompt", "subject", "target_new", "image")
    about = {name: value for name, value in request.to_dict().items() if name in asked}
    return subprocess.Popen(
        [sys.executable, "-c", _RELOAD, str(folder), json.dumps(about), str(NEW_TOKENS)],
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

"""`evaluate_edits`: edit, measure before and after, restore, report.

Pre-edit results are measured once, before the first new edit, on the model as it was handed in. Every change the
run makes is undone by the model's own journal, also when something fails in between. Here the arguments are checked
and the run is planned; `Run` carries it out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...engine.access import alone
from ...errors import EvaluationError, check_choice, check_count, shown
from ...logging import bars_here
from ...tracking import Tracking
from ..asking.batching import TOKEN_BUDGET
from ..measures.abilities import Ability
from ..protocols.base import Protocol, resolve_protocols
from ..report.case_result import Cost
from ..report.report import EvaluationReport
from ..scenarios.base import Scenario, load_scenario
from .asked import PromptTransform
from .cache import PRE_EDIT_CACHE, PreEditCache
from .folder import RunFolder, assemble
from .plan import (
    SAVED,
    SEQUENTIAL,
    SETTINGS,
    Case,
    Setting,
    StepResult,
    check_requests,
    make_plan,
    make_units,
    parse_at,
    parse_shard,
    parse_when,
    read_requests,
)
from .run import Run
from .tracked import EvaluationTracking
from .wear import WearMeter

if TYPE_CHECKING:
    from ...journal import EditResult
    from ...model import EditableModel
    from ...requests import EditRequest


def evaluate_edits(
    model: EditableModel,
    dataset: Any = None,
    setting: Setting = "single",
    batch_size: int | None = None,
    protocol: str | Protocol | Sequence[str | Protocol] | None = None,
    when: str | Sequence[str] = ("final",),
    limit: int | None = None,
    progress: bool = True,
    *,
    at: Sequence[int] | int | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    separator: str | None = None,
    prompt_format: Literal["plain", "chat"] | None = None,
    system: str | None = None,
    token_budget: int = TOKEN_BUDGET,
    keep_edits: bool = False,
    cache: PreEditCache | None = None,
    prompt_transform: PromptTransform | None = None,
    collapse_text: Iterable[str] | str | None = None,
    abilities: Sequence[Ability] = (),
    output_dir: str | Path | None = None,
    shard: str | None = None,
    after_step: Callable[[StepResult], None] | None = None,
    scenario: str | Scenario | None = None,
    preset: str | Scenario | None = None,
    report_to: Any = None,
) -> EvaluationReport:
    """Apply the edits of a data set and measure what they did.

    Args:
        model: an `EditableModel`. Edits that it already carries stay and belong to the "pre" model.
        dataset: a ``datasets.Dataset`` with the library's columns, a list of `EditRequest` or dicts, or the path
            of a JSON, JSONL or CSV file. In ``saved``, by default the requests of the edits that the model carries.
        setting: ``single``: edit one, measure, restore, next. ``batch``: edit ``batch_size`` at once, measure
            these, restore, next. ``sequential``: edit after edit (in chunks of ``batch_size``) without restoring.
            ``saved``: edit nothing; measure the edits that the model carries, "before" being the model without them.
        batch_size: edits made together; default: all in ``batch``, 1 in ``sequential``.
        protocol: ``teacher_forced``, ``generation``, ``likelihood``, ``fluency``, a `Protocol` object with its own
            settings, or several of them; each gets its own numbers. ``None``: teacher forced (of a model behind an
            API: generation), or the protocols of the scenario; beside a scenario, further ones.
        when: in ``sequential``: ``immediate`` (each edit right after it was made), ``final`` (all after the last
            edit), or both. In the other settings the two coincide.
        limit: evaluate the first so many rows only.
        progress: show a progress bar.
        at: in ``sequential``: after so many edits, measure all edits made so far (``at N`` in the report).
        on_error: ``skip`` leaves out edits that cannot be made and lists them in ``report.meta["failed"]``.
        separator: text between prompt and target; ``None``: as in the model's edit config.
        prompt_format: how everything is asked, under every protocol: ``plain``, or ``chat`` through the tokenizer's
            chat template; ``None``: as each request is edited (of edits in both formats, plain).
        system: system prompt of the chats; ``None``: as in the model's edit config.
        token_budget: padded tokens per forward pass.
        keep_edits: leave the edits of a ``sequential`` run in the model. Otherwise the model is afterwards
            bit for bit as it was.
        cache: where pre-edit results are kept; default: one shared by all calls in the process.
        prompt_transform: ``(request, prompt) -> prompt``, applied to every prompt that is asked after the edit, for
            methods that work through the prompt; default: the model's own ``prompt_transform``, if it has one.
        collapse_text: texts whose perplexity is measured before, at each checkpoint and at the end of a
            ``sequential`` run, and after each batch of a ``batch`` run; a warning is logged when it explodes. Weight
            drift is measured in any case where edits pile up.
        abilities: general tasks (`load_ability`, `HarnessTask`) that are measured at the same times.
        output_dir: folder for the results, written case by case. Repeating the same call there continues an
            interrupted run: finished measurements are not repeated (the edits of a ``sequential`` run are made again,
            because later ones build on them).
        shard: ``"2/4"``: only the second of four parts of a ``single`` or ``batch`` run, with its own file in
            ``output_dir`` (`collect_report` puts the parts together). ``"auto"``: as torchrun or accelerate says.
        after_step: called with what was measured after every edit, batch or checkpoint; what it raises ends the run,
            and the edits are undone.
        scenario: name of a scenario (``safety`` …), or one with its options (`load_scenario`): what is asked and
            measured beyond single facts. The path of a data set may then be a file in one of its layouts.
        preset: another word for ``scenario``, as ``--preset`` is for ``--scenario``; presets are scenarios.
        report_to: who is told the means of every measurement over the number of edits (`EvaluationTracking`):
            ``"tensorboard"``, ``"wandb"``, ``"trackio"``, ``"all"``, a list of them, or an open tracker of accelerate.

    Returns:
        The report, with one record per case, protocol and time.

    Raises:
        ChatTemplateError: if questions are chats and the tokenizer has no template for them; nothing is edited then.
        EvaluationError: for an unknown setting, protocol, scenario or time, an empty data set, or arguments that
            contradict each other; nothing is edited then.
        RequestError: if a row is not a usable request; nothing is edited then.
        DataError: if a file cannot be read.
        EditFailedError: if an edit fails; the edits of this call are undone first.
        MissingExtraError: if the package of a tracker is not installed; nothing is edited then.
    """
    check_choice("setting", setting, SETTINGS)
    check_choice("on_error", on_error, ("raise", "skip"))
    if prompt_format is not None:
        check_choice("prompt_format", prompt_format, ("plain", "chat"))
    whens = parse_when(when, setting)
    if scenario is not None and preset is not None:
        raise EvaluationError("scenario= and preset= are two words for one thing; give one of them")
    named = preset if scenario is None else scenario
    chosen = None if named is None else load_scenario(named)
    protocols = protocols_of(chosen, protocol, "generation" if model.is_remote else "teacher_forced")
    part = parse_shard(shard, setting)
    _check_arguments(setting, batch_size, limit, keep_edits, collapse_text is not None or bool(abilities))
    check_count("token_budget", token_budget)
    if not isinstance(separator, str | None):
        raise EvaluationError(f"separator must be text or None, not {shown(separator)}")
    texts = [collapse_text] if isinstance(collapse_text, str) else collapse_text
    if isinstance(texts, Iterable):
        texts = list(texts)
    if texts is not None and not (texts and all(isinstance(text, str) for text in texts)):
        raise EvaluationError("collapse_text must be a text or a list of texts, not an empty list or something else")
    cases = _cases(model, dataset, setting, limit, chosen)
    checkpoints = parse_at(at, setting, len(cases))
    if setting != SAVED:
        check_requests(model, cases, strict=on_error == "raise")
    # Nobody else is to see edits that are made to be measured.
    with alone(model.base_model, edited=True), model.as_decoded():
        run = Run(
            model,
            protocols,
            WearMeter(model, texts, list(abilities), token_budget),
            setting,
            separator,
            token_budget,
            PRE_EDIT_CACHE if cache is None else cache,
            on_error,
            prompt_transform,
            prompt_format,
            system,
        )
        units = make_units(cases, setting, batch_size)
        if setting != "single" and any(run.stages(unit) for unit in units):
            raise EvaluationError(
                "what is measured between the edits of a unit needs setting='single', which undoes each unit; not"
                f" {setting!r}"
            )
        plan = make_plan(units, setting, whens, checkpoints)
        settings = run.settings(cases, batch_size, whens, checkpoints)
        if chosen is not None:
            settings["scenario"] = chosen.settings()
        number, count = part
        mine = [step for step in plan if step.unit % count == number - 1]
        folder = None if output_dir is None else RunFolder(output_dir, settings, plan, part)
        if folder is not None:
            run.done = folder.done
        measured = len({case for step in mine for case in step.cases})
        by_number = {case.number: case for case in cases}
        tracking = EvaluationTracking(
            Tracking(report_to, "eval", settings, Path(output_dir or ".") / "runs"), after_step
        )
        run.folder, run.after_step = folder, tracking.after_step
        began = time.perf_counter()
        todo = [step for step in mine if step.number not in run.done]
        if todo or keep_edits:
            # Everything is asked of the unedited model in the same batches, whether or not a run is continued.
            with tracking, bars_here(progress):
                run.measure_pre(mine, by_number)
                seconds_pre = time.perf_counter() - began
                run.execute(units, mine, by_number, progress, keep_edits)
            meta = {
                **settings,
                "batch_size": max(len(unit) for unit in units),
                "n": measured,
                "seconds": time.perf_counter() - began,
                "seconds_pre": seconds_pre,
                "seconds_setup": run.seconds_setup,
                **run.describe(),
            }
            if folder is not None:
                folder.finish(meta)
        else:
            stored = folder.read_meta() if folder is not None else {}
            meta = {**settings, "n": measured, **run.describe(), **stored}
        return assemble({s.number: run.done[s.number] for s in mine}, [meta], [step.when for step in mine])


def protocols_of(
    scenario: Scenario | None, protocol: str | Protocol | Sequence[str | Protocol] | None, default: str
) -> list[Protocol]:
    """The protocols of a scenario, then those that are asked for beside it; a named one takes the scenario's place.

    Without either, ``default``.

    Raises:
        EvaluationError: for an unknown name, or one that is named twice.
    """
    if protocol is None:
        return resolve_protocols(default if scenario is None else scenario.protocols())
    named = resolve_protocols(protocol)
    names = {entry.name for entry in named}
    own = [] if scenario is None else scenario.protocols()
    return [*(entry for entry in own if entry.name not in names), *named]


class BeforeAndAfter:
    """Measures edits that somebody else makes: the model is asked before and after a call of `EditableModel.edit`.

    ::

        measured = BeforeAndAfter(model, requests)
        report = measured.report(model.edit(measured.requests))

    Args:
        model: before the edits; edits that it already carries belong to it.
        requests: that are going to be made.
        protocol: as in `evaluate_edits`.

    Attributes:
        requests: the same, each with the id that its edit will have.

    Raises:
        EvaluationError: for an unknown protocol, no requests, or a model that carries one of them.
        RequestError: if the method needs a subject and one is missing.
    """

    def __init__(
        self,
        model: EditableModel,
        requests: Sequence[EditRequest],
        protocol: str | Protocol | Sequence[str | Protocol] | None = None,
    ):
        if not requests:
            raise EvaluationError("there is nothing to measure: no requests were given")
        protocols = protocols_of(None, protocol, "generation" if model.is_remote else "teacher_forced")
        self.requests = model.journal.with_ids(requests)
        self._cases = {number: Case(number, request) for number, request in enumerate(self.requests)}
        check_requests(model, list(self._cases.values()))
        self._run = Run(model, protocols, wear=WearMeter(model, None, [], TOKEN_BUDGET))
        self._plan = make_plan([list(self._cases.values())], SEQUENTIAL, ("final",), ())
        self._began = time.perf_counter()
        self._run.measure_pre(self._plan, self._cases)

    def report(self, result: EditResult) -> EvaluationReport:
        """Measure the model as it is now.

        Args:
            result: of the call that made the edits; those that it left out are listed in ``meta["failed"]``.
        """
        run, cases, made = self._run, list(self._cases.values()), set(result.ids)
        reasons = {request.id: error for request, error in result.failed}
        for case in cases:
            if case.request.id not in made:
                run.leave_out(case, reasons.get(case.request.id, EvaluationError("it was not made")))
        share = result.seconds / max(1, len(made))
        run.note([case for case in cases if case.request.id in made], result, Cost(share_of_call=share))
        run.carry_out(self._plan[0], cases)
        about = {"n": len(cases), "seconds": time.perf_counter() - self._began, "seconds_setup": run.seconds_setup}
        meta = {**run.settings(cases, None, ("final",), ()), **about, **run.describe()}
        return assemble(run.done, [meta], ["final"])


def _check_arguments(
    setting: str, batch_size: int | None, limit: int | None, keep_edits: bool, measures_wear: bool
) -> None:
    for what, number in (("batch_size", batch_size), ("limit", limit)):
        if number is not None:
            check_count(what, number)
    if setting == "single" and batch_size not in (None, 1):
        raise EvaluationError(
            f"setting='single' makes one edit at a time and batch_size is {batch_size}; use setting='batch'"
        )
    if keep_edits and setting != SEQUENTIAL:
        raise EvaluationError(f"keep_edits=True needs setting='sequential'; '{setting}' restores after each step")
    if measures_wear and setting == "single":
        raise EvaluationError(
            "collapse_text and abilities would be measured after every single edit; use setting='batch' (with"
            " batch_size=1, if that is what you want) or 'sequential'"
        )


def _cases(
    model: EditableModel, dataset: Any, setting: str, limit: int | None, scenario: Scenario | None
) -> list[Case]:
    """The cases in order; those of saved edits lose their ids, which the model's journal holds already."""
    if dataset is None and setting != SAVED:
        raise EvaluationError("give the edits: a data set, a list of requests or the path of a file")
    if dataset is None and not model.edits:
        raise EvaluationError(
            f"{model.base_model_id!r} carries no edits, so there are no requests to measure; give a data set"
        )
    if scenario is not None and isinstance(dataset, (str, Path)):
        dataset = scenario.read(dataset)
    requests = read_requests([edit.request for edit in model.edits] if dataset is None else dataset, limit)
    if scenario is not None:
        requests = scenario.requests(requests)
    if setting == SAVED:
        requests = [replace(request, id=None) for request in requests]
    return [Case(number, request) for number, request in enumerate(requests)]

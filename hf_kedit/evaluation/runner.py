"""`evaluate_edits`: edit, measure before and after, restore, report.

Pre-edit results are measured once, before the first new edit, on the model as it was handed in. Every change the
run makes is undone by the model's own journal, also when something fails in between. This module moves texts and
outputs around; what is asked is decided by `cases` and `protocols`, what the numbers are by `metrics`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..engine.forward import device_of
from ..errors import EditFailedError, EvaluationError, RequestError
from ..logging import get_logger, progress_bar
from ..requests import EditRequest
from ..version import __version__
from . import drift
from .batching import TOKEN_BUDGET, stock_model
from .cache import PRE_EDIT_CACHE, PreEditCache
from .cases import (
    SETTINGS,
    Case,
    Step,
    check_choice,
    check_requests,
    make_plan,
    make_units,
    parse_at,
    parse_moments,
    parse_shard,
    read_requests,
)
from .distributions import perplexity
from .protocols import Output, Protocol, Query, resolve_protocols
from .records import make_record, plain, queries_of
from .report import EvaluationReport
from .runfolder import RunFolder, assemble

if TYPE_CHECKING:
    from ..model import EditableModel

logger = get_logger(__name__)
Setting = Literal["single", "batch", "sequential"]
Snapshot = dict[Query, Output]
PromptTransform = Callable[[EditRequest, str], str]


def evaluate_edits(
    model: EditableModel,
    dataset: Any,
    setting: Setting = "single",
    batch_size: int | None = None,
    protocol: str | Protocol | Sequence[str | Protocol] = "teacher_forced",
    when: str | Sequence[str] = ("final",),
    limit: int | None = None,
    progress: bool = True,
    *,
    at: Sequence[int] | int | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    separator: str | None = None,
    token_budget: int = TOKEN_BUDGET,
    keep_edits: bool = False,
    cache: PreEditCache | None = None,
    prompt_transform: PromptTransform | None = None,
    collapse_text: Sequence[str] | str | None = None,
    output_dir: str | Path | None = None,
    shard: str | None = None,
) -> EvaluationReport:
    """Apply the edits of a data set and measure what they did.

    Args:
        model: an `EditableModel`. Edits that it already carries stay and belong to the "pre" model.
        dataset: a ``datasets.Dataset`` with the library's columns, a list of `EditRequest` or dicts, or the path
            of a JSON, JSONL or CSV file.
        setting: ``single``: edit one, measure, restore, next. ``batch``: edit ``batch_size`` at once, measure
            these, restore, next. ``sequential``: edit after edit (in chunks of ``batch_size``) without restoring.
        batch_size: edits made together; default: all in ``batch``, 1 in ``sequential``.
        protocol: ``teacher_forced``, ``generation``, ``likelihood``, ``fluency``, a `Protocol` object with its own
            settings, or several of them; each gets its own numbers.
        when: in ``sequential``: ``immediate`` (each edit right after it was made), ``final`` (all after the last
            edit), or both. In the other settings the two coincide.
        limit: evaluate the first so many rows only.
        progress: show a progress bar.
        at: in ``sequential``: after so many edits, measure all edits made so far (moments ``at N`` of the report).
        on_error: ``skip`` leaves out edits that cannot be made and lists them in ``report.meta["failed"]``.
        separator: text between prompt and target; ``None``: as in the model's edit config.
        token_budget: padded tokens per forward pass.
        keep_edits: leave the edits of a ``sequential`` run in the model. Otherwise the model is afterwards
            bit for bit as it was.
        cache: where pre-edit results are kept; default: one shared by all calls in the process.
        prompt_transform: ``(request, prompt) -> prompt``, applied to every prompt that is asked after the edit, for
            methods that work through the prompt; default: the model's own ``prompt_transform``, if it has one.
        collapse_text: texts whose perplexity is measured before, at each checkpoint and at the end of a
            ``sequential`` run; a warning is logged when it explodes. Weight drift is measured in any case.
        output_dir: folder for the results, written case by case. Repeating the same call there continues an
            interrupted run: finished measurements are not repeated (the edits of a ``sequential`` run are made again,
            because later ones build on them).
        shard: ``"2/4"``: only the second of four parts of a ``single`` or ``batch`` run, with its own file in
            ``output_dir`` (`collect_report` puts the parts together). ``"auto"``: as torchrun or accelerate says.

    Returns:
        The report, with one record per case, protocol and moment.

    Raises:
        EvaluationError: for an unknown setting, protocol or moment, an empty data set, or arguments that
            contradict each other; nothing is edited then.
        RequestError: if a row is not a usable request; nothing is edited then.
        DataError: if a file cannot be read.
        EditFailedError: if an edit fails; the edits of this call are undone first.
    """
    check_choice("setting", setting, SETTINGS)
    check_choice("on_error", on_error, ("raise", "skip"))
    moments = parse_moments(when, setting)
    protocols = resolve_protocols(protocol)
    part = parse_shard(shard, setting)
    if batch_size is not None and batch_size < 1:
        raise EvaluationError(f"batch_size must be at least 1, not {batch_size}")
    if setting == "single" and batch_size not in (None, 1):
        raise EvaluationError(
            f"setting='single' makes one edit at a time and batch_size is {batch_size}; use setting='batch'"
        )
    if keep_edits and setting != "sequential":
        raise EvaluationError(f"keep_edits=True needs setting='sequential'; '{setting}' restores after each step")
    if limit is not None and limit < 1:
        raise EvaluationError(f"limit must be at least 1, not {limit}")
    cases = [Case(number, request) for number, request in enumerate(read_requests(dataset, limit))]
    checkpoints = parse_at(at, setting, len(cases))
    check_requests(model, cases, strict=on_error == "raise")
    if separator is None:
        separator = getattr(getattr(model, "edit_config", None), "separator", None)
    if prompt_transform is None:
        prompt_transform = getattr(model, "prompt_transform", None)
    run = _Run(
        model,
        protocols,
        setting,
        separator,
        token_budget,
        PRE_EDIT_CACHE if cache is None else cache,
        on_error,
        prompt_transform,
        [collapse_text] if isinstance(collapse_text, str) else collapse_text,
    )
    units = make_units(cases, setting, batch_size)
    plan = make_plan(units, setting, moments, checkpoints)
    settings = run.settings(cases, batch_size, moments, checkpoints)
    if part[1] > 1:
        mine = [step for step in plan if step.unit % part[1] == part[0] - 1]
    else:
        mine = plan
    folder = None if output_dir is None else RunFolder(output_dir, settings, plan, part)
    if folder is not None:
        run.done = folder.done
    by_number = {case.number: case for case in cases}
    run.folder = folder
    began = time.perf_counter()
    todo = [step for step in mine if step.number not in run.done]
    if todo or keep_edits:
        # Everything is asked of the unedited model in the same batches, whether or not a run is continued.
        run.measure_pre(mine, by_number)
        seconds_pre = time.perf_counter() - began
        run.go(units, mine, by_number, progress, keep_edits)
        meta = {
            **settings,
            "batch_size": max(len(unit) for unit in units),
            "n": len({number for step in mine for number in step.cases}),
            "seconds": time.perf_counter() - began,
            "seconds_pre": seconds_pre,
            "seconds_setup": run.seconds_setup,
            **run.describe(),
        }
        if folder is not None:
            folder.finish(meta)
    else:
        stored = folder.read_meta() if folder is not None else {}
        meta = {**settings, "n": len({number for step in mine for number in step.cases}), **run.describe(), **stored}
    return assemble({s.number: run.done[s.number] for s in mine}, [meta], [step.when for step in mine])


# ---------------------------------------------------------------------- running


@dataclass(frozen=True)
class _Work:
    """What making an edit took; shares of the batch it was made in.

    ``seconds`` is the computation of the edit, ``share_of_call`` the whole call, preparations included.
    """

    seconds: float
    share_of_call: float
    peak_memory_bytes: int | None
    edit: dict[str, Any]


@contextlib.contextmanager
def _restored(model: EditableModel, keep: bool = False) -> Iterator[None]:
    """Roll back the edits that are made inside, whatever happens; with ``keep`` only if something fails."""
    before = {edit.id for edit in model.edits}
    done = False
    try:
        yield
        done = True
    finally:
        new = [edit.id for edit in model.edits if edit.id not in before]
        if new and not (keep and done):
            model.rollback(new)


@dataclass
class _Run:
    """The state of one evaluation: outputs before the edits, and the means to get those after."""

    model: EditableModel
    protocols: Sequence[Protocol]
    setting: str
    separator: str | None
    token_budget: int
    cache: PreEditCache
    on_error: str
    transform: PromptTransform | None
    collapse_text: Sequence[str] | None
    folder: RunFolder | None = None
    done: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    pre: dict[tuple[str, str | None], Snapshot] = field(default_factory=dict)
    work: dict[int, _Work] = field(default_factory=dict)
    failed: dict[int, dict[str, Any]] = field(default_factory=dict)
    fingerprint: str = ""
    seconds_setup: float = 0.0
    base_perplexity: float | None = None

    def __post_init__(self) -> None:
        self.base = stock_model(self.model)
        if self.model.tokenizer is None:
            raise EvaluationError("the model has no tokenizer; pass one when you make the EditableModel")
        self.tokenizer = self.model.tokenizer
        self.dtype = str(getattr(self.base, "dtype", "")).removeprefix("torch.")
        # In half precision an argmax tie may flip with the composition of a batch. Then what is compared with each
        # other is computed in equal batches: the pre-edit pass repeats the groups of the post-edit passes.
        self.same_batches = self.dtype not in ("float32", "float64")
        self.fingerprint = self.model.fingerprint()

    # -- the order of things

    def go(
        self,
        units: Sequence[Sequence[Case]],
        plan: Sequence[Step],
        cases: Mapping[int, Case],
        progress: bool,
        keep_edits: bool,
    ) -> None:
        """Make the edits and carry out the steps of the plan that are not done yet."""
        todo = [step for step in plan if step.number not in self.done]
        by_unit: dict[int, list[Step]] = {}
        for step in todo:
            by_unit.setdefault(step.unit, []).append(step)
        sequential = self.setting == "sequential"
        # Later edits build on earlier ones: a sequence is repeated up to the last step that is missing.
        needed = sorted(by_unit) if not sequential else range((len(units) - 1 if keep_edits else max(by_unit)) + 1)
        total = sum(len(units[i]) for i in ({s.unit for s in plan} | set(needed)))
        start = total - sum(len(units[i]) for i in needed)
        bar: Any = contextlib.nullcontext()
        if progress:
            bar = progress_bar(total, f"evaluate ({self.setting})", initial=start, unit="edit")
        with bar as shown, _restored(self.model, keep_edits) if sequential else contextlib.nullcontext():
            for index in needed:
                with contextlib.nullcontext() if sequential else _restored(self.model):
                    self.edit(units[index])
                    for step in by_unit.get(index, ()):
                        self.carry_out(step, [cases[n] for n in step.cases])
                if shown is not None:
                    shown.update(len(units[index]))

    def carry_out(self, step: Step, cases: Sequence[Case]) -> None:
        """Measure one step and keep its results."""
        made = [case for case in cases if case.number not in self.failed]
        entries: list[dict[str, Any]] = [
            {"failed": self.failed[case.number]} for case in cases if case.number in self.failed
        ]
        if made:
            entries += [{"record": r} for r in self.measure(made, step.when)]
        if self.setting == "sequential" and step.when != "immediate":
            entries.append({"checkpoint": self.checkpoint(step)})
        if self.folder is not None:
            self.folder.write(step, entries)
        else:
            self.done[step.number] = [{"step": step.number, **entry} for entry in entries]

    def checkpoint(self, step: Step) -> dict[str, Any]:
        """Weight drift, and perplexity where a text was given; warns when the model is collapsing."""
        n_edits = step.n_edits - len(self.failed)
        found: dict[str, Any] = {
            "when": step.when,
            "n_edits": n_edits,
            "drift": plain(drift.drift_summary(drift.weight_drift(self.model))),
        }
        if self.collapse_text is not None:
            value = perplexity(self.base, self.tokenizer, self.collapse_text, token_budget=self.token_budget).pooled
            state = drift.collapse_state(value, self.base_perplexity)
            found |= {"perplexity": plain(value), "perplexity_before": plain(self.base_perplexity), "state": state}
            if state != "ok":
                logger.warning(
                    "after %d edits the perplexity is %s (%.4g before): %s",
                    n_edits,
                    "not finite" if found["perplexity"] is None else f"{value:.4g}",
                    self.base_perplexity or float("nan"),
                    "the model has collapsed" if state == "collapsed" else "the model is wearing down",
                )
        return found

    # -- measuring

    def outputs(self, protocol: Protocol, queries: Sequence[Query]) -> Snapshot:
        results = protocol.run(self.base, self.tokenizer, queries, self.separator, self.token_budget)
        return dict(zip(queries, results, strict=True))

    def measure_pre(self, steps: Sequence[Step], cases: Mapping[int, Case]) -> None:
        """Fill ``pre`` with the outputs for all questions, from the cache where it has them."""
        everything = [cases[n] for n in sorted({n for step in steps for n in step.cases})]
        groups = [[cases[n] for n in step.cases] for step in steps] if self.same_batches else [everything]
        for protocol in self.protocols:
            for group in groups:
                queries = queries_of(protocol, group)
                keys = self._cache_keys(protocol, queries)
                found = {q: hit for q in queries if (hit := self.cache.get(keys[q])) is not None}
                missing = [q for q in queries if q not in found]
                if missing:
                    # Half precision: all or nothing, or the batches would not be the same.
                    fresh = self.outputs(protocol, queries if self.same_batches else missing)
                    for query, output in fresh.items():
                        self.cache.put(keys[query], output)
                    found |= fresh
                self.pre.setdefault((protocol.name, self._batches_name(queries)), {}).update(found)
        if self.collapse_text is not None:
            self.base_perplexity = perplexity(
                self.base, self.tokenizer, self.collapse_text, token_budget=self.token_budget
            ).pooled

    def _batches_name(self, queries: Sequence[Query]) -> str | None:
        """Name of the batches that these queries make; one for all where batches do not matter."""
        if not self.same_batches:
            return None
        return hashlib.sha256(json.dumps([self.token_budget, queries]).encode()).hexdigest()

    def _cache_keys(self, protocol: Protocol, queries: Sequence[Query]) -> dict[Query, tuple[Any, ...]]:
        tokenizer = self.tokenizer
        common = (
            self.fingerprint,
            tuple(edit.id for edit in self.model.edits),
            self.dtype,
            str(device_of(self.base)),
            (type(tokenizer).__name__, getattr(tokenizer, "name_or_path", ""), len(tokenizer)),
            protocol.name,
            json.dumps(protocol.settings(), sort_keys=True, default=str),
            self.separator,
            self._batches_name(queries),
        )
        return {query: (*common, *query) for query in queries}

    def measure(self, cases: Sequence[Case], when: str) -> list[dict[str, Any]]:
        """Measure these cases on the model as it is now: one record per case and protocol."""
        records = []
        for protocol in self.protocols:
            began = time.perf_counter()
            queries = queries_of(protocol, cases)
            name = self._batches_name(queries)
            if (protocol.name, name) not in self.pre:  # an edit of the group failed: the batches are smaller now
                name = next(n for p, n in self.pre if p == protocol.name and set(queries) <= self.pre[p, n].keys())
            before = self.pre[protocol.name, name]
            asked: dict[int, dict[Query, Query]] = {}
            if self.transform is not None:
                for case in cases:
                    own = queries_of(protocol, [case])
                    asked[case.number] = {(p, a): (self.transform(case.request, p), a) for p, a in own}
                queries = list(dict.fromkeys(new for own in asked.values() for new in own.values()))
            after = self.outputs(protocol, queries)
            self._prepare(protocol, cases, before, after, asked)
            made = [make_record(case, protocol, before, after, asked.get(case.number)) for case in cases]
            seconds = (time.perf_counter() - began) / len(cases)
            for case, record in zip(cases, made, strict=True):
                done = self.work[case.number]
                record |= {
                    "setting": self.setting,
                    "when": when,
                    "time": done.share_of_call,
                    "seconds_edit": done.seconds,
                    "seconds_eval": seconds,
                    "peak_memory_bytes": done.peak_memory_bytes,
                    "edit": done.edit,
                }
            records += made
        return records

    def _prepare(
        self,
        protocol: Protocol,
        cases: Sequence[Case],
        before: Snapshot,
        after: Snapshot,
        asked: Mapping[int, Mapping[Query, Query]],
    ) -> None:
        """Let the protocol see everything that it is about to score."""
        items = []
        for case in cases:
            for question in protocol.questions(case.request):
                queries = protocol.queries(question)
                items.append((question, [before[q] for q in queries]))
                items.append((question, [after[asked[case.number][q] if asked else q] for q in queries]))
        protocol.prepare_scores(items)

    # -- editing

    def edit(self, unit: Sequence[Case]) -> None:
        """Make the edits of a unit together; notes what each took, or why it could not be made."""
        device = device_of(self.base)
        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        began = time.perf_counter()
        try:
            result = self.model.edit([case.request for case in unit], batch_size=len(unit), show_progress=False)
        except (EditFailedError, RequestError) as error:
            if self.on_error == "raise":
                raise
            logger.warning("case %s left out: %s", ", ".join(str(c.number) for c in unit), error)
            for case in unit:
                reason = f"{type(error).__name__}: {error}"
                self.failed[case.number] = {"case_id": case.number, "id": case.request.id, "reason": reason}
            return
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began
        peak = int(torch.cuda.max_memory_allocated(device)) if on_gpu else None
        own = [edit.diagnostics.get("seconds") for edit in result.edits]
        computing = [float(s) if isinstance(s, (int, float)) else seconds / len(unit) for s in own]
        # What the edits themselves did not take: statistics, tokenising, checks, putting the weights in.
        self.seconds_setup += max(0.0, seconds - sum(computing))
        for case, edit, spent in zip(unit, result.edits, computing, strict=True):
            about = {"id": edit.id, "method": edit.method, "made_together": len(unit)}
            about["diagnostics"] = plain(edit.diagnostics)
            self.work[case.number] = _Work(spent, seconds / len(unit), peak, about)

    # -- describing

    def describe(self) -> dict[str, Any]:
        """What the report says about the machine and the state of the model."""
        return {"device": str(device_of(self.base)), "edits_before": len(self.model.edits)}

    def settings(
        self, cases: Sequence[Case], batch_size: int | None, moments: Sequence[str], at: Sequence[int]
    ) -> dict[str, Any]:
        """Everything that decides the results."""
        config: Any = getattr(self.model, "edit_config", None)
        return {
            "setting": self.setting,
            "batch_size": batch_size,
            "when": list(moments),
            "at": list(at),
            "protocols": {p.name: {"scorer": p.scorer_name, **p.settings()} for p in self.protocols},
            "separator": self.separator,
            "token_budget": self.token_budget,
            "on_error": self.on_error,
            "changes_prompts": self.transform is not None,
            "collapse_text_sha256": None if self.collapse_text is None else _digest(list(self.collapse_text)),
            "dataset_sha256": _digest([case.request.to_dict() for case in cases]),
            "method": getattr(self.model, "method_name", None),
            "config": plain(config.to_dict()) if hasattr(config, "to_dict") else None,
            "model": getattr(self.model, "base_model_id", None) or type(self.base).__name__,
            "fingerprint": self.fingerprint,
            "dtype": self.dtype,
            "version": __version__,
        }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()

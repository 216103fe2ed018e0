"""`evaluate_edits`: edit, measure before and after, restore, report.

Pre-edit results are measured once, before the first new edit, on the model as it was handed in. Every change the
run makes is undone by the model's own journal, also when something fails in between. This module moves texts and
outputs around; what is asked is decided by `protocols`, what the numbers are by `metrics`.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..engine.forward import device_of
from ..errors import EvaluationError, nearest
from ..logging import get_logger, progress_bar
from ..requests import EditRequest, load_requests, read_rows
from .batching import TOKEN_BUDGET, stock_model
from .cache import PRE_EDIT_CACHE, PreEditCache
from .protocols import Output, Protocol, Query, Question, resolve_protocols
from .report import EvaluationReport, easyedit_request
from .scoring import Unscored

if TYPE_CHECKING:
    from ..model import EditableModel

logger = get_logger(__name__)
SETTINGS = ("single", "batch", "sequential")
MOMENTS = ("immediate", "final")
Setting = Literal["single", "batch", "sequential"]
Snapshot = dict[Query, Output]


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
    separator: str | None = None,
    token_budget: int = TOKEN_BUDGET,
    keep_edits: bool = False,
    cache: PreEditCache | None = None,
) -> EvaluationReport:
    """Apply the edits of a data set and measure what they did.

    Args:
        model: an `EditableModel`. Edits that it already carries stay and belong to the "pre" model.
        dataset: a ``datasets.Dataset`` with the library's columns, a list of `EditRequest` or dicts, or the path
            of a JSON, JSONL or CSV file.
        setting: ``single``: edit one, measure, restore, next. ``batch``: edit ``batch_size`` at once, measure
            these, restore, next. ``sequential``: edit after edit without restoring.
        batch_size: edits made together; default: all in ``batch``, 1 in ``sequential``.
        protocol: ``teacher_forced``, ``generation``, a `Protocol` object with its own settings, or several of
            them; each gets its own numbers.
        when: in ``sequential``: ``immediate`` (each edit right after it was made), ``final`` (all after the last
            edit), or both. In the other settings the two coincide.
        limit: evaluate the first so many rows only.
        progress: show a progress bar.
        separator: text between prompt and target; ``None``: as in the model's edit config.
        token_budget: padded tokens per forward pass.
        keep_edits: leave the edits of a ``sequential`` run in the model. Otherwise the model is afterwards
            bit for bit as it was.
        cache: where pre-edit results are kept; default: one shared by all calls in the process.

    Returns:
        The report, with one record per case, protocol and moment.

    Raises:
        EvaluationError: for an unknown setting, protocol or moment, an empty data set, or arguments that
            contradict each other; nothing is edited then.
        RequestError: if a row is not a usable request; nothing is edited then.
        DataError: if a file cannot be read.
        EditFailedError: if an edit fails; the edits of this call are undone first.
    """
    _check_choice("setting", setting, SETTINGS)
    moments = _moments(when, setting)
    protocols = resolve_protocols(protocol)
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
    cases = [_case(number, request) for number, request in enumerate(_requests(dataset, limit))]
    _check_requests(model, cases)
    if separator is None:
        separator = getattr(getattr(model, "edit_config", None), "separator", None)
    run = _Run(model, protocols, separator, token_budget, PRE_EDIT_CACHE if cache is None else cache)
    units = _units(cases, setting, batch_size)
    groups = [cases] if moments == ("final",) and setting == "sequential" else units
    if setting == "sequential" and len(moments) == 2:
        groups = [*units, cases]
    began = time.perf_counter()
    run.measure_pre(cases, groups)
    seconds_pre = time.perf_counter() - began
    records: list[dict[str, Any]] = []
    with progress_bar(len(cases), f"evaluate ({setting})") if progress else contextlib.nullcontext() as bar:
        if setting == "sequential":
            with _restored(model, keep_edits):
                for unit in units:
                    work = run.edit(unit)
                    if "immediate" in moments:
                        records += run.measure(unit, "immediate", setting, work)
                    run.work.update(work)
                    if bar is not None:
                        bar.update(len(unit))
                if "final" in moments:
                    records += run.measure(cases, "final", setting, run.work)
        else:
            for unit in units:
                with _restored(model):
                    records += run.measure(unit, moments[-1], setting, run.edit(unit))
                if bar is not None:
                    bar.update(len(unit))
    records.sort(key=lambda r: r["case_id"])
    meta = {
        "setting": setting,
        "batch_size": max(len(unit) for unit in units),
        "when": list(moments),
        "protocols": {p.name: {"scorer": p.scorer_name, **p.settings()} for p in protocols},
        "separator": separator,
        "n": len(cases),
        "seconds": time.perf_counter() - began,
        "seconds_pre": seconds_pre,
        "seconds_setup": run.seconds_setup,
        **run.describe(),
    }
    return EvaluationReport(records, meta)


# ---------------------------------------------------------------------- cases


@dataclass(frozen=True)
class _Case:
    """One edit and everything that is asked about it."""

    number: int
    request: EditRequest
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class _Work:
    """What making an edit took; shares of the batch it was made in.

    ``seconds`` is the computation of the edit, ``share_of_call`` the whole call, preparations included.
    """

    seconds: float
    share_of_call: float
    peak_memory_bytes: int | None
    edit: dict[str, Any]


def _requests(dataset: Any, limit: int | None) -> list[EditRequest]:
    """The first ``limit`` requests of whatever the user passed."""
    if isinstance(dataset, Mapping) and not isinstance(dataset, EditRequest) and "prompt" not in dataset:
        raise EvaluationError(
            f"this is a dict of splits ({', '.join(map(str, dataset))}), not a data set; pass one of them"
        )
    if isinstance(dataset, (str, Path)):
        dataset = read_rows(Path(dataset))
    if isinstance(dataset, Iterable) and not isinstance(dataset, Mapping):
        dataset = list(itertools.islice(dataset, limit))
        if not dataset:
            raise EvaluationError("there is nothing to evaluate: the data set is empty")
    return load_requests(dataset)


def _case(number: int, request: EditRequest) -> _Case:
    target = ((request.target_new,),)
    questions = [Question("rewrite", None, 0, request.filled_prompt, target)]
    questions += [Question("rephrase", None, i, p, target) for i, p in enumerate(request.rephrase_prompts)]
    for section, axes in (("locality", request.locality), ("portability", request.portability)):
        for axis, probes in axes.items():
            for i, probe in enumerate(probes):
                groups = tuple(tuple(group) for group in probe.ground_truth)
                questions.append(Question(section, axis, i, probe.prompt, groups, probe.match))
    return _Case(number, request, tuple(questions))


def _check_requests(model: EditableModel, cases: Sequence[_Case]) -> None:
    """Find now what would stop the run at some later edit.

    Raises:
        RequestError: if the method needs a subject and one is missing or not in its prompt.
        EvaluationError: if the model already carries an edit under one of the ids.
    """
    carried = {edit.id for edit in model.edits}
    for case in cases:
        if case.request.id in carried:
            raise EvaluationError(
                f"row {case.number}: the model already carries an edit with the id {case.request.id!r};"
                " roll it back first"
            )
        if getattr(getattr(model, "capabilities", None), "needs_subject", False):
            case.request.subject_span()


def _units(cases: Sequence[_Case], setting: str, batch_size: int | None) -> list[list[_Case]]:
    """Cut the cases into what is edited together. Rows of one group (``group_id``) are never separated."""
    groups: list[list[_Case]] = []
    for _, members in itertools.groupby(cases, key=lambda c: c.request.metadata.get("group_id") or (c.number,)):
        groups.append(list(members))
    size = 1 if setting != "batch" else len(cases)
    size = batch_size or size
    units: list[list[_Case]] = []
    for group in groups:
        if units and setting != "single" and len(units[-1]) + len(group) <= size:
            units[-1].extend(group)
        else:
            units.append(list(group))
    return units


def _check_choice(what: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:
        raise EvaluationError(f"unknown {what} {value!r}.{nearest(str(value), known)} Known: {', '.join(known)}.")


def _moments(when: str | Sequence[str], setting: str) -> tuple[str, ...]:
    chosen = [when] if isinstance(when, str) else list(when)
    if not chosen:
        raise EvaluationError(f"'when' is empty; choose from {', '.join(MOMENTS)}")
    for moment in chosen:
        _check_choice("moment in 'when'", moment, MOMENTS)
    ordered = tuple(m for m in MOMENTS if m in chosen)
    return ordered if setting == "sequential" else ordered[-1:]


# ---------------------------------------------------------------------- running


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
    separator: str | None
    token_budget: int
    cache: PreEditCache
    pre: dict[tuple[str, str | None], Snapshot] = field(default_factory=dict)
    work: dict[int, _Work] = field(default_factory=dict)
    fingerprint: str = ""
    seconds_setup: float = 0.0

    def __post_init__(self) -> None:
        self.base = stock_model(self.model)
        if self.model.tokenizer is None:
            raise EvaluationError("the model has no tokenizer; pass one when you make the EditableModel")
        self.tokenizer = self.model.tokenizer
        self.dtype = str(getattr(self.base, "dtype", "")).removeprefix("torch.")
        # In half precision an argmax tie may flip with the composition of a batch. Then what is compared with each
        # other is computed in equal batches: the pre-edit pass repeats the groups of the post-edit passes.
        self.same_batches = self.dtype not in ("float32", "float64")

    # -- measuring

    def outputs(self, protocol: Protocol, queries: Sequence[Query]) -> Snapshot:
        results = protocol.run(self.base, self.tokenizer, queries, self.separator, self.token_budget)
        return dict(zip(queries, results, strict=True))

    def measure_pre(self, cases: Sequence[_Case], groups: Sequence[Sequence[_Case]]) -> None:
        """Fill ``pre`` with the outputs for all questions, from the cache where it has them."""
        self.fingerprint = self.model.fingerprint()
        for protocol in self.protocols:
            for group in groups if self.same_batches else [cases]:
                queries = _queries(protocol, group)
                keys = self._cache_keys(protocol, queries)
                found = {q: hit for q in queries if (hit := self.cache.get(keys[q])) is not None}
                missing = [q for q in queries if q not in found]
                if missing:
                    # Half precision: all or nothing, or the batches would not be the same.
                    fresh = self.outputs(protocol, queries if self.same_batches else missing)
                    for query, output in fresh.items():
                        self.cache.put(keys[query], output)
                    found |= fresh
                self.pre[protocol.name, self._batches_name(queries)] = found

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

    def measure(
        self, cases: Sequence[_Case], when: str, setting: str, work: Mapping[int, _Work]
    ) -> list[dict[str, Any]]:
        """Measure these cases on the model as it is now: one record per case and protocol."""
        records = []
        for protocol in self.protocols:
            began = time.perf_counter()
            queries = _queries(protocol, cases)
            after = self.outputs(protocol, queries)
            seconds = (time.perf_counter() - began) / len(cases)
            before = self.pre[protocol.name, self._batches_name(queries)]
            for case in cases:
                record = _record(case, protocol, before, after)
                done = work[case.number]
                record |= {
                    "setting": setting,
                    "when": when,
                    "time": done.share_of_call,
                    "seconds_edit": done.seconds,
                    "seconds_eval": seconds,
                    "peak_memory_bytes": done.peak_memory_bytes,
                    "edit": done.edit,
                }
                records.append(record)
        return records

    # -- editing

    def edit(self, unit: Sequence[_Case]) -> dict[int, _Work]:
        """Make the edits of a unit together; returns what each took, by case number."""
        device = device_of(self.base)
        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        began = time.perf_counter()
        result = self.model.edit([case.request for case in unit], batch_size=len(unit), show_progress=False)
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began
        peak = int(torch.cuda.max_memory_allocated(device)) if on_gpu else None
        own = [edit.diagnostics.get("seconds") for edit in result.edits]
        computing = [float(s) if isinstance(s, (int, float)) else seconds / len(unit) for s in own]
        # What the edits themselves did not take: statistics, tokenising, checks, putting the weights in.
        self.seconds_setup += max(0.0, seconds - sum(computing))
        return {
            case.number: _Work(
                spent,
                seconds / len(unit),
                peak,
                {
                    "id": edit.id,
                    "method": edit.method,
                    "made_together": len(unit),
                    "diagnostics": _plain(edit.diagnostics),
                },
            )
            for case, edit, spent in zip(unit, result.edits, computing, strict=True)
        }

    def describe(self) -> dict[str, Any]:
        """What the report says about model and machine."""
        return {
            "method": getattr(self.model, "method_name", None),
            "model": getattr(self.model, "base_model_id", None) or type(self.base).__name__,
            "fingerprint": self.fingerprint,
            "dtype": self.dtype,
            "device": str(device_of(self.base)),
            "edits_before": len(self.model.edits),
        }


def _queries(protocol: Protocol, cases: Iterable[_Case]) -> list[Query]:
    """All queries of some cases, each once, in order."""
    return list(dict.fromkeys(q for case in cases for question in case.questions for q in protocol.queries(question)))


def _record(case: _Case, protocol: Protocol, before: Snapshot, after: Snapshot) -> dict[str, Any]:
    """One case's results in the dictionary layout that EasyEdit users know, plus what the library adds."""
    pre: dict[str, Any] = {}
    post: dict[str, Any] = {}
    skipped: list[dict[str, Any]] = []
    counts: dict[str, int] = {}

    def skip(question: Question, reason: str) -> None:
        where = {"section": question.section, "axis": question.axis, "index": question.index}
        skipped.append({**where, "prompt": question.prompt, "reason": reason})

    for question in case.questions:
        queries = protocol.queries(question)
        pairs = [
            (old, new)
            for old, new in ((before[q], after[q]) for q in queries)
            if not isinstance(old, Unscored) and not isinstance(new, Unscored)
        ]
        if not pairs:
            reasons = [o.reason for o in (before[q] for q in queries) if isinstance(o, Unscored)]
            reason = reasons[0] if reasons else f"there is no answer, which protocol '{protocol.name}' needs"
            skip(question, reason)
            continue
        old, new = [o for o, _ in pairs], [n for _, n in pairs]
        scores = protocol.accuracy(question, old), protocol.accuracy(question, new)
        if question.section == "locality":
            _put(pre, "locality", f"{question.axis}_output", protocol.payload(old))
            _put(post, "locality", f"{question.axis}_acc", protocol.agreement(old, new))
            if scores[0] is not None:
                _put(pre, "locality_accuracy", f"{question.axis}_acc", scores[0])
                _put(post, "locality_accuracy", f"{question.axis}_acc", scores[1])
        elif scores[0] is None:
            skip(question, "there is no answer to compare the output with")
            continue
        else:
            axis = None if question.axis is None else f"{question.axis}_acc"
            section = question.section if axis else f"{question.section}_acc"
            _put(pre, section, axis, scores[0])
            _put(post, section, axis, scores[1])
        counts[question.section] = counts.get(question.section, 0) + 1
    for result in (pre, post):
        sections = [key.removesuffix("_acc") for key in result]
        result["metric_meta"] = {section: protocol.meta(section) for section in sections}
    return {
        "case_id": case.number,
        "id": case.request.id,
        "requested_rewrite": easyedit_request(case.request),
        "protocol": protocol.name,
        "pre": pre,
        "post": post,
        "n_probes": counts,
        "skipped": skipped,
    }


def _put(result: dict[str, Any], section: str, axis: str | None, value: Any) -> None:
    if axis is None:
        result.setdefault(section, []).append(value)
    else:
        result.setdefault(section, {}).setdefault(axis, []).append(value)


def _plain(value: Any) -> Any:
    """A JSON-ready copy of an edit's diagnostics."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, torch.Tensor):
        return _plain(value.tolist())
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    return str(value)

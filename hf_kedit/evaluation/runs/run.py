"""The course of an evaluation: outputs before the edits, the edits themselves, and records of what they changed.

Moves texts and outputs around; what is asked is decided by `cases` and `protocols`, what the numbers are by `metrics`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ...engine.forward import device_of
from ...errors import EditFailedError, EvaluationError, RequestError
from ...logging import get_logger, progress_bar
from ...requests import EditRequest
from ...storage.files import json_ready
from ...version import __version__
from ..asking.batching import stock_model
from ..measures.cost import changed_parameters
from ..protocols.base import Output, Protocol, Query
from .cache import PreEditCache
from .folder import RunFolder
from .plan import SAVED, SEQUENTIAL, Case, Step
from .records import make_record, queries_of
from .wear import Wear

if TYPE_CHECKING:
    from ...model import EditableModel

logger = get_logger(__name__)
Snapshot = dict[Query, Output]
PromptTransform = Callable[[EditRequest, str], str]


@dataclass(frozen=True)
class Work:
    """What making an edit took; shares of the batch it was made in.

    ``seconds`` is the computation of the edit, ``share_of_call`` the whole call, preparations included.
    """

    seconds: float | None = None
    share_of_call: float | None = None
    peak_memory_bytes: int | None = None
    extra_memory_bytes: int | None = None
    edit: dict[str, Any] | None = None


@contextlib.contextmanager
def restored(model: EditableModel, keep: bool = False) -> Iterator[None]:
    """Roll back the edits that are made inside, whatever happens; with ``keep`` only if something fails.

    What the method has learnt from them (UltraEdit's running statistics) is taken back too.
    """
    before, state = {edit.id for edit in model.edits}, model.method_state()
    done = False
    try:
        yield
        done = True
    finally:
        new = [edit.id for edit in model.edits if edit.id not in before]
        if new and not (keep and done):
            model.rollback(new)
            model.restore_method_state(state)


@dataclass
class Run:
    """The state of one evaluation.

    Args:
        model: makes the edits, or carries those that are measured.
        protocols: asked of every case.
        setting: as in `evaluate_edits`.
        separator: text between prompt and target.
        token_budget: padded tokens per forward pass.
        cache: of outputs of unedited models.
        on_error: ``raise`` or ``skip``.
        transform: applied to what is asked after an edit.
        wear: measured at checkpoints.
        folder: where results are kept.
        done: step → its results.
    """

    model: EditableModel
    protocols: Sequence[Protocol]
    setting: str
    separator: str | None
    token_budget: int
    cache: PreEditCache
    on_error: str
    transform: PromptTransform | None
    wear: Wear
    folder: RunFolder | None = None
    done: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    pre: dict[tuple[str, str | None], Snapshot] = field(default_factory=dict)
    work: dict[int, Work] = field(default_factory=dict)
    failed: dict[int, dict[str, Any]] = field(default_factory=dict)
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
        with self.unedited():
            self.fingerprint = self.model.fingerprint()
        self.edits_before = [] if self.setting == SAVED else [edit.id for edit in self.model.edits]

    def unedited(self) -> contextlib.AbstractContextManager[Any]:
        """The model that "before" means: without its edits if these are measured, else as it is."""
        return self.model.disable_edits() if self.setting == SAVED else contextlib.nullcontext()

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
        sequential = self.setting == SEQUENTIAL
        # Later edits build on earlier ones: a sequence is repeated up to the last step that is missing.
        needed = sorted(by_unit) if not sequential else range((len(units) - 1 if keep_edits else max(by_unit)) + 1)
        total = sum(len(units[i]) for i in ({s.unit for s in plan} | set(needed)))
        start = total - sum(len(units[i]) for i in needed)
        bar: Any = contextlib.nullcontext()
        if progress:
            bar = progress_bar(total, f"evaluate ({self.setting})", initial=start, unit="edit")
        with bar as shown, restored(self.model, keep_edits) if sequential else contextlib.nullcontext():
            for index in needed:
                with contextlib.nullcontext() if sequential else restored(self.model):
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
        if self._wears_at(step):
            lost = self.failed if self.setting == SEQUENTIAL else [c for c in cases if c.number in self.failed]
            n_edits = len(self.model.edits) if self.setting == SAVED else step.n_edits - len(lost)
            entries.append({"checkpoint": self.wear.checkpoint(step.when, n_edits)})
        if self.folder is not None:
            self.folder.write(step, entries)
        else:
            self.done[step.number] = [{"step": step.number, **entry} for entry in entries]

    def _wears_at(self, step: Step) -> bool:
        """Where edits pile up, drift is always measured; after a batch, only if texts or abilities were asked for."""
        if self.setting in (SEQUENTIAL, SAVED):
            return step.when != "immediate"
        return self.wear.is_asked

    # -- measuring

    def outputs(self, protocol: Protocol, queries: Sequence[Query]) -> Snapshot:
        """Ask the model as it is now."""
        results = protocol.run(self.base, self.tokenizer, queries, self.separator, self.token_budget)
        return dict(zip(queries, results, strict=True))

    def measure_pre(self, steps: Sequence[Step], cases: Mapping[int, Case]) -> None:
        """Fill ``pre`` with the outputs for all questions, from the cache where it has them."""
        everything = [cases[n] for n in sorted({n for step in steps for n in step.cases})]
        groups = [[cases[n] for n in step.cases] for step in steps] if self.same_batches else [everything]
        with self.unedited():
            for protocol in self.protocols:
                for group in groups:
                    self._measure_pre_group(protocol, group)
            self.wear.measure_before(self.cache, self._state())

    def _measure_pre_group(self, protocol: Protocol, group: Sequence[Case]) -> None:
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

    def _batches_name(self, queries: Sequence[Query]) -> str | None:
        """Name of the batches that these queries make; one for all where batches do not matter."""
        if not self.same_batches:
            return None
        return hashlib.sha256(json.dumps([self.token_budget, queries]).encode()).hexdigest()

    def _state(self) -> tuple[Any, ...]:
        """What decides the outputs of the model as it was handed in."""
        tokenizer = self.tokenizer
        return (
            self.fingerprint,
            tuple(self.edits_before),
            self.dtype,
            str(device_of(self.base)),
            (type(tokenizer).__name__, getattr(tokenizer, "name_or_path", ""), len(tokenizer)),
        )

    def _cache_keys(self, protocol: Protocol, queries: Sequence[Query]) -> dict[Query, tuple[Any, ...]]:
        common = (
            *self._state(),
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
                    "extra_memory_bytes": done.extra_memory_bytes,
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
        if self.setting == SAVED:  # they are there already
            self.work |= {case.number: Work() for case in unit}
            return
        device = device_of(self.base)
        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device) if on_gpu else 0
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
        extra = None if peak is None else peak - allocated
        # In a sequence the checkpoints say it; here the model carries these edits only, besides what it came with.
        changed = None if self.setting == SEQUENTIAL else changed_parameters(self.model)
        own = [edit.diagnostics.get("seconds") for edit in result.edits]
        computing = [float(s) if isinstance(s, (int, float)) else seconds / len(unit) for s in own]
        # What the edits themselves did not take: statistics, tokenising, checks, putting the weights in.
        self.seconds_setup += max(0.0, seconds - sum(computing))
        for case, edit, spent in zip(unit, result.edits, computing, strict=True):
            about = {"id": edit.id, "method": edit.method, "made_together": len(unit)}
            about |= {"n_params_changed": changed, "diagnostics": json_ready(edit.diagnostics)}
            self.work[case.number] = Work(spent, seconds / len(unit), peak, extra, about)

    # -- describing

    def describe(self) -> dict[str, Any]:
        """What the report says about the machine and the state of the model."""
        return {"device": str(device_of(self.base)), "edits_before": len(self.edits_before)}

    def settings(
        self, cases: Sequence[Case], batch_size: int | None, moments: Sequence[str], at: Sequence[int]
    ) -> dict[str, Any]:
        """Everything that decides the results."""
        config: Any = getattr(self.model, "edit_config", None)
        method = getattr(self.model, "method_name", None)
        if self.setting == SAVED:
            config = None
            method = ", ".join(dict.fromkeys(edit.method for edit in self.model.edits)) or "no edits"
        texts, abilities = self.wear.texts, self.wear.abilities
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
            "collapse_text_sha256": None if texts is None else _digest(list(texts)),
            "abilities": {ability.name: ability.settings() for ability in abilities},
            "dataset_sha256": _digest([case.request.to_dict() for case in cases]),
            "method": method,
            "config": json_ready(config.to_dict()) if hasattr(config, "to_dict") else None,
            "model": getattr(self.model, "base_model_id", None) or type(self.base).__name__,
            "fingerprint": self.fingerprint,
            "dtype": self.dtype,
            "version": __version__,
        }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()

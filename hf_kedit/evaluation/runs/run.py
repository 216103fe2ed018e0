"""The course of an evaluation: outputs before the edits, the edits themselves, and what came of them.

Moves texts and outputs around; what is asked is decided by the plan and the protocols, what the numbers are by the
protocols and `metrics`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ...anatomy.switching import Switch
from ...decoding import decoding_now
from ...engine.devices import PeakMemory, synchronise
from ...engine.forward import device_of
from ...errors import EditFailedError, EvaluationError, RequestError
from ...logging import get_logger, progress_bar, warn_once
from ...storage.files import json_ready
from ...text.chat import TextFormat
from ...tokens import needed_tokenizer
from ...version import __version__
from ..asking.batching import TOKEN_BUDGET, stock_model
from ..measures.cost import changed_parameters
from ..protocols.base import Output, Protocol, Query
from ..report.case_result import CaseResult, Cost
from .asked import Asked, PromptTransform, queries_of
from .cache import PRE_EDIT_CACHE, PreEditCache
from .folder import RunFolder
from .plan import SAVED, SEQUENTIAL, Case, Step, StepResult
from .wear import WearMeter

if TYPE_CHECKING:
    from ...journal import EditResult
    from ...model import EditableModel
    from ...requests import EditRequest

logger = get_logger(__name__)
Outputs = dict[Query, Output]


class restored(Switch[None]):
    """Roll back the edits that are made inside, whatever happens; with ``keep`` only if something fails.

    What the method has learnt from them (UltraEdit's running statistics) is taken back too.
    """

    def __init__(self, model: EditableModel, keep: bool = False):
        self._model, self._keep = model, keep

    def change(self) -> None:
        """Note what is there."""
        self._before, self._state = {edit.id for edit in self._model.edits}, self._model.method_state()

    def put_back(self, failed: bool) -> None:
        """Roll back what came to it."""
        new = [edit.id for edit in self._model.edits if edit.id not in self._before]
        if new and (failed or not self._keep):
            self._model.rollback(new)
            self._model.restore_method_state(self._state)


@dataclass
class Run:
    """The state of one evaluation.

    Args:
        model: makes the edits, or carries those that are measured.
        protocols: asked of every case.
        wear: measured at checkpoints.
        setting: as in `evaluate_edits`.
        separator: text between prompt and target; ``None``: as in the model's edit config.
        token_budget: padded tokens per forward pass.
        cache: of outputs of unedited models.
        on_error: ``raise`` or ``skip``.
        transform: applied to what is asked after an edit; ``None``: the model's own ``prompt_transform``, if it has
            one.
        prompt_format: how questions are asked; ``None``: as each request is edited, of ``"both"`` plain.
        system: system prompt of chats without one; ``None``: as in the model's edit config.
        folder: where results are kept.
        after_step: called with the results of every step as soon as they are there.
        done: step → its results.
        pre: (protocol, batches) → outputs of the unedited model.
        costs: number of a case → what its edit took.
        failed: number of a case → why its edit could not be made.
        seconds_setup: of the calls so far, beside the edits themselves.
    """

    model: EditableModel
    protocols: Sequence[Protocol]
    wear: WearMeter
    setting: str = SEQUENTIAL
    separator: str | None = None
    token_budget: int = TOKEN_BUDGET
    cache: PreEditCache = PRE_EDIT_CACHE
    on_error: str = "raise"
    transform: PromptTransform | None = None
    prompt_format: TextFormat | None = None
    system: str | None = None
    folder: RunFolder | None = None
    after_step: Callable[[StepResult], None] | None = None
    done: dict[int, StepResult] = field(default_factory=dict)
    pre: dict[tuple[str, str | None], Outputs] = field(default_factory=dict)
    costs: dict[int, Cost] = field(default_factory=dict)
    failed: dict[int, dict[str, Any]] = field(default_factory=dict)
    seconds_setup: float = 0.0

    def __post_init__(self) -> None:
        self.base = stock_model(self.model)
        if not self.model.is_remote:
            needed_tokenizer(self.model.tokenizer, "an evaluation")
        self.tokenizer: Any = self.model.tokenizer
        if self.separator is None:
            self.separator = self.model.edit_config.separator
        if self.system is None:
            self.system = self.model.edit_config.system
        if self.transform is None:
            self.transform = getattr(self.model, "prompt_transform", None)
        self.dtype = str(self.base.dtype).removeprefix("torch.")
        # In half precision an argmax tie may flip with the composition of a batch. Then what is compared with each
        # other is computed in equal batches: the pre-edit pass repeats the groups of the post-edit passes.
        self.same_batches = self.dtype not in ("float32", "float64")
        with self.unedited():
            self.fingerprint = self.model.fingerprint()
        self._asked: dict[tuple[str, int], Asked] = {}
        self._rendered: dict[int, EditRequest] = {}
        self.edits_before = [] if self.setting == SAVED else [edit.id for edit in self.model.edits]

    def unedited(self) -> contextlib.AbstractContextManager[Any]:
        """The model that "before" means: without its edits if these are measured, else as it is."""
        return self.model.disable_edits() if self.setting == SAVED else contextlib.nullcontext()

    # -- the order of things

    def execute(
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
        with bar as steps, restored(self.model, keep_edits) if sequential else contextlib.nullcontext():
            for index in needed:
                with contextlib.nullcontext() if sequential else restored(self.model):
                    self.make(units[index])
                    for step in by_unit.get(index, ()):
                        self.carry_out(step, [cases[n] for n in step.cases])
                if steps is not None:
                    steps.update(len(units[index]))

    def stages(self, unit: Sequence[Case]) -> dict[str, tuple[int, ...]]:
        """What the protocols want to see on the way through a unit (`Protocol.stages`)."""
        requests = [case.request for case in unit]
        return {name: places for protocol in self.protocols for name, places in protocol.stages(requests).items()}

    def look(self, stage: str, unit: Sequence[Case]) -> None:
        """Ask about a unit at a stage of its edits."""
        requests = [case.request for case in unit]
        for protocol in self.protocols:
            if stage in protocol.stages(requests):
                group = self._posed(protocol, unit)
                now = self.outputs(protocol, queries_of(group, posed=True))
                for asked in group:
                    asked.answer_between(stage, now)

    def carry_out(self, step: Step, cases: Sequence[Case]) -> None:
        """Measure one step and keep its results."""
        made = [case for case in cases if case.number not in self.failed]
        result = StepResult(failed=[self.failed[case.number] for case in cases if case.number in self.failed])
        if made:
            result.results = self.measure(made, step.when)
        if self._wears_at(step):
            lost = self.failed if self.setting == SEQUENTIAL else result.failed
            n_edits = len(self.model.edits) if self.setting == SAVED else step.n_edits - len(lost)
            result.checkpoint = self.wear.checkpoint(step.when, n_edits)
        self.done[step.number] = result
        if self.folder is not None:
            self.folder.write(step.number, result)
        if self.after_step is not None:
            self.after_step(result)

    def _wears_at(self, step: Step) -> bool:
        """Where edits pile up, drift is always measured; after a batch, only if texts or abilities were asked for."""
        if self.setting in (SEQUENTIAL, SAVED):
            return step.when != "immediate"
        return self.wear.is_asked

    # -- measuring

    def asked(self, protocol: Protocol, cases: Sequence[Case]) -> list[Asked]:
        """The cases with their questions under a protocol, which are computed once."""
        for case in cases:
            if (protocol.name, case.number) not in self._asked:
                new = Asked(case, protocol, self.as_asked(case, protocol))
                if told := protocol.misfit([exchange.question for exchange in new.exchanges], self.tokenizer):
                    warn_once(logger, told)
                self._asked[protocol.name, case.number] = new
        return [self._asked[protocol.name, case.number] for case in cases]

    def as_asked(self, case: Case, protocol: Protocol) -> EditRequest:
        """The request of a case as its questions are asked: written (and its pictures read) once for all protocols.

        Raises:
            ChatTemplateError: if it is to be put as a chat and the tokenizer has no template for it.
            EvaluationError: if the protocol would put the chat into another frame.
        """
        if case.number not in self._rendered:
            self._rendered[case.number] = self._render(case.request)
        asked = self._rendered[case.number]
        frame = getattr(protocol, "prompt_format", "raw")
        if asked.prompt_format == "chat" and frame != "raw":
            raise EvaluationError(
                f"protocol {protocol.name!r} has prompt_format={frame!r}, and the questions are chats already; leave"
                " one of them out"
            )
        return asked

    def _render(self, request: EditRequest) -> EditRequest:
        own = request.in_format(None if self.setting == SAVED else self.model.edit_config.prompt_format, self.system)
        if self.model.is_remote:  # which writes its chats itself
            return own.asked("plain")
        return own.asked(self.prompt_format, self.system).rendered(self.tokenizer, self.model.processor)

    def outputs(self, protocol: Protocol, queries: Sequence[Query]) -> Outputs:
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
        queries = queries_of(self.asked(protocol, group))
        keys = self._cache_keys(protocol, queries)
        known = {q: hit for q in queries if (hit := self.cache.get(keys[q])) is not None}
        missing = [q for q in queries if q not in known]
        if missing:
            # Half precision: all or nothing, or the batches would not be the same.
            fresh = self.outputs(protocol, queries if self.same_batches else missing)
            for query, output in fresh.items():
                self.cache.put(keys[query], output)
            known |= fresh
        self.pre.setdefault((protocol.name, self._batches_name(queries)), {}).update(known)

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
            decoding_now(self.base),
            (type(tokenizer).__name__, getattr(tokenizer, "name_or_path", ""), len(tokenizer or ())),
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

    def _before(self, protocol: Protocol, queries: Sequence[Query]) -> Outputs:
        """What the unedited model put out for these queries, in the batches that they make."""
        name = self._batches_name(queries)
        if (protocol.name, name) not in self.pre:  # an edit of the group failed: the batches are smaller now
            name = next(n for p, n in self.pre if p == protocol.name and set(queries) <= self.pre[p, n].keys())
        return self.pre[protocol.name, name]

    def measure(self, cases: Sequence[Case], when: str) -> list[CaseResult]:
        """Measure these cases on the model as it is now, under every protocol."""
        results = []
        for protocol in self.protocols:
            began = time.perf_counter()
            group = self._posed(protocol, cases)
            before = self._before(protocol, queries_of(group))
            after = self.outputs(protocol, queries_of(group, posed=True))
            for asked in group:
                asked.answer(before, after)
            protocol.prepare_scores([item for asked in group for item in asked.to_score()])
            measured = [asked.result(when, self.setting, self.costs[asked.case.number]) for asked in group]
            for result in measured:
                result.seconds_eval = (time.perf_counter() - began) / len(cases)
            results += measured
        return results

    def _posed(self, protocol: Protocol, cases: Sequence[Case]) -> list[Asked]:
        """The cases with their questions as the edited model is asked them."""
        group = self.asked(protocol, cases)
        if self.transform is not None:
            for asked in group:
                asked.pose(self.transform)
        return group

    # -- editing

    def make(self, unit: Sequence[Case]) -> None:
        """Make the edits of a unit: together, or, where protocols look on the way, one after another."""
        stages = self.stages(unit)
        if not stages:
            self.edit(unit)
            return
        looks: dict[int, str] = {}  # edits made → stage, of those that the way to the end passes through
        for stage, places in stages.items():
            if places == tuple(range(len(places))):
                looks[len(places)] = stage
            else:
                with restored(self.model):
                    self._edit_in_order([unit[place] for place in places])
                    self.look(stage, unit)
        self._edit_in_order(unit, looks)

    def _edit_in_order(self, part: Sequence[Case], looks: Mapping[int, str] | None = None) -> None:
        """Make edits of a unit one after another; where one cannot be made, the others are left out with it."""
        for made, case in enumerate(part, start=1):
            self.edit([case])
            if case.number in self.failed:
                about = self.failed[case.number]
                for other in part:
                    self.failed[other.number] = {**about, "case_id": other.number, "id": other.request.id}
                return
            if looks and made in looks:
                self.look(looks[made], part)

    def edit(self, unit: Sequence[Case]) -> None:
        """Make the edits of a unit together; notes what each took, or why it could not be made."""
        if self.setting == SAVED:  # they are there already
            self.costs |= {case.number: Cost() for case in unit}
            return
        told = [case.request for case in unit]
        if not self.model.capabilities.told_wordings:  # what is asked later
            told = [replace(request, rephrase_prompts=[]) for request in told]
        synchronise(self.base)
        memory = PeakMemory(self.base)
        began = time.perf_counter()
        try:
            result = self.model.edit(told, batch_size=len(unit), show_progress=False)
        except (EditFailedError, RequestError) as error:
            if self.on_error == "raise":
                raise
            logger.warning("case %s left out: %s", ", ".join(str(c.number) for c in unit), error)
            for case in unit:
                self.leave_out(case, error)
            return
        synchronise(self.base)
        seconds = time.perf_counter() - began
        peak = memory.read()
        extra = None if peak is None else peak - memory.before
        share = seconds / len(unit)
        self.note(unit, result, Cost(share_of_call=share, peak_memory_bytes=peak, extra_memory_bytes=extra))

    def leave_out(self, case: Case, error: Exception) -> None:
        """Note that an edit could not be made."""
        reason = f"{type(error).__name__}: {error}"
        self.failed[case.number] = {"case_id": case.number, "id": case.request.id, "reason": reason}

    def note(self, unit: Sequence[Case], result: EditResult, common: Cost) -> None:
        """Keep what each edit of a unit took.

        Args:
            unit: the cases, in the order of the edits.
            result: of the call that made them.
            common: what all of them have in common.
        """
        # In a sequence the checkpoints say it; here the model carries these edits only, besides what it came with.
        changed = None if self.setting == SEQUENTIAL else changed_parameters(self.model)
        own = [edit.diagnostics.get("seconds") for edit in result.edits]
        share = common.share_of_call or 0.0
        computing = [float(s) if isinstance(s, (int, float)) else share for s in own]
        # What the edits themselves did not take: statistics, tokenising, checks, putting the weights in.
        self.seconds_setup += max(0.0, share * len(unit) - sum(computing))
        together = Counter(edit.batch_id for edit in result.edits)
        for case, edit, seconds in zip(unit, result.edits, computing, strict=True):
            about = {"id": edit.id, "method": edit.method, "made_together": together[edit.batch_id]}
            about |= {"n_params_changed": changed, "diagnostics": json_ready(edit.diagnostics)}
            self.costs[case.number] = replace(common, seconds=seconds, edit=about)

    # -- describing

    def describe(self) -> dict[str, Any]:
        """What the report says about the machine and the state of the model."""
        return {"device": str(device_of(self.base)), "edits_before": len(self.edits_before)}

    def settings(
        self, cases: Sequence[Case], batch_size: int | None, whens: Sequence[str], at: Sequence[int]
    ) -> dict[str, Any]:
        """Everything that decides the results."""
        model = self.model
        if self.setting == SAVED:
            config, method = None, ", ".join(dict.fromkeys(edit.method for edit in model.edits)) or "no edits"
        else:
            config, method = json_ready(model.edit_config.to_dict()), model.method_name
        texts, abilities = self.wear.texts, self.wear.abilities
        decoding = decoding_now(self.base)
        return {
            "setting": self.setting,
            "batch_size": batch_size,
            "when": list(whens),
            "at": list(at),
            "protocols": {p.name: {"scorer": p.scorer_name, **p.settings()} for p in self.protocols},
            "separator": self.separator,
            **({} if self.prompt_format is None else {"prompt_format": self.prompt_format}),
            **({} if self.system is None else {"system": self.system}),
            **({} if decoding is None else {"decoding": decoding.to_dict()}),
            "token_budget": self.token_budget,
            "on_error": self.on_error,
            "changes_prompts": self.transform is not None,
            "collapse_text_sha256": None if texts is None else _digest(list(texts)),
            "abilities": {ability.name: ability.settings() for ability in abilities},
            "dataset_sha256": _digest([case.request.to_dict() for case in cases]),
            "method": method,
            "config": config,
            "model": model.base_model_id or type(self.base).__name__,
            "fingerprint": self.fingerprint,
            "dtype": self.dtype,
            "version": __version__,
        }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()

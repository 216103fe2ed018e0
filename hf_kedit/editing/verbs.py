"""The verbs of editing: make edits, undo them, switch them off; each call is all or nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch

from ..anatomy.switching import Switch, interrupted, uninterrupted
from ..books.book import Book, all_disabled, remove_from, restore_all, snapshot_all
from ..data.loading import requests_of
from ..engine.access import access_to, alone, exclusively
from ..engine.devices import PeakMemory, process_memory
from ..engine.examples import present_answer
from ..engine.forward import frozen_eval
from ..errors import ConfigError, EditFailedError, ModelBusyError, RequestError, RollbackError, WeightError
from ..journal import Edit, EditResult, Journal, new_id, now
from ..logging import get_logger, progress, warn_once
from ..methods.base import check_composition, method_class
from ..methods.spread import SpreadMethod
from ..requests import ERASED, EditRequest, RequestSource
from ..tokens import needed_tokenizer
from ..tracking import Tracking
from .edit_set import FactSet, solve_set, spread_method
from .formats import compute, read_by
from .state import EditedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = get_logger(__name__)


class Watcher(Protocol):
    """Something that looks at a model before and after an edit; `hf_kedit.SideEffects` is one."""

    def before(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, requests: Sequence[EditRequest]
    ) -> None:
        """Called before anything is changed; a model behind an API has no tokenizer."""

    def after(self, model: PreTrainedModel) -> Any:
        """Called with the edited model; what it returns becomes `EditResult.side_effects`."""


class Editing(EditedModel):
    """A model with the verbs that change what it knows, and change it back."""

    def edit(
        self,
        requests: RequestSource | None = None,
        *,
        batch_size: int | None = None,
        on_error: str = "raise",
        show_progress: bool = True,
        watch: Watcher | None = None,
        report_to: Any = None,
        **request: Any,
    ) -> EditResult:
        """Change what the model knows.

        The call is all or nothing: if anything fails, or is interrupted, the weights and the journal are exactly
        what they were before.

        Args:
            requests: one `EditRequest`, a list of requests or dicts, a ``datasets.Dataset``, or the path of a JSON,
                JSONL or CSV file. Leave it out and give the fields of one request as keywords instead:
                ``edit(prompt="{} was founded by", subject="Apple", target_new="Bill Gates")``.
            batch_size: requests solved for together, for methods that can; ``None``: all at once. Batches follow
                one another, each on the model that the one before left.
            on_error: ``"raise"``, or ``"skip"`` to leave out what fails and report it in the result: a batch, or of
                `auto`, whose edits do not depend on each other, single requests.
            show_progress: show progress bars.
            watch: looks at the model before and after, for example ``SideEffects()``; what it saw is in the result.
            report_to: who is told the loss of every step and what came of it: ``"tensorboard"``, ``"wandb"``,
                ``"trackio"``, ``"all"``, a list of them, or a tracker of accelerate that is open (`Tracking`).

        Returns:
            The edits with their ids and diagnostics.

        Raises:
            RequestError: for an unusable request, naming row and field.
            EditFailedError: if no usable update was found.
            MissingExtraError: if the package of a tracker is not installed.
        """
        if (requests is None) == (not request):
            raise RequestError("give either requests or the fields of one request (prompt=…, target_new=…)")
        given = [r.with_pictures(probes=False) for r in requests_of(requests if requests is not None else request)]
        if on_error not in ("raise", "skip"):
            raise ConfigError(f"on_error must be 'raise' or 'skip', not {on_error!r}")
        if batch_size is not None and (isinstance(batch_size, bool) or batch_size < 1):
            raise ConfigError(f"batch_size must be at least 1, not {batch_size!r}")
        if not self.is_remote:
            needed_tokenizer(self.tokenizer, "editing")
        about: dict[str, Any] = {"method": self.method_name, "model": self.base_model_id}
        if report_to is not None:
            about["config"] = self.edit_config.to_dict()
        with Tracking(report_to, "edit", about) as tracking:
            with self._ready():
                result = self._edit(given, batch_size, on_error == "skip", show_progress, watch)
            tracking.edits(result)
        return result

    def _ready(self) -> Switch[None]:
        """A block in which the model is there for its method alone, which has fetched before what it reads.

        Raises:
            EditFailedError: in inference mode, where nothing has a gradient (in `torch.no_grad` it is switched on).
        """
        if torch.is_inference_mode_enabled():
            raise EditFailedError("edits need gradients: call edit outside the block of torch.inference_mode()")
        self._method.fetch()
        return self.exclusive()

    def _edit(
        self,
        given: Sequence[EditRequest],
        batch_size: int | None,
        may_fail: bool,
        show_progress: bool,
        watch: Watcher | None,
    ) -> EditResult:
        """Make edits; the arguments are those of `edit`, checked."""
        started = time.perf_counter()
        config = self.edit_config
        todo = self.journal.with_ids([r.in_format(config.prompt_format, config.system) for r in given])
        if self.ledger.is_disabled:
            raise WeightError("edits are switched off (disable_edits); leave that block before editing")
        if watch is not None:
            watch.before(self.base_model, self.tokenizer, read_by(self._method, todo))
        method, bench = self._method, self._method.bench
        todo = [self._naming_unwanted(request) for request in todo]
        bench.trace, bench.show_progress = self.trace, show_progress
        if batch_size and batch_size > 1 and not method.capabilities.batch:
            warn_once(logger, f"{method.capabilities.name} solves for one fact at a time; batch_size is ignored")
        size = (batch_size or len(todo)) if method.capabilities.batch else 1
        with _AllOrNothing(self):
            if getattr(self.edit_config, "sequence", None) == "joint":
                result = self._solve_together(self._family(), todo, may_fail=may_fail)
            else:
                result = self._edit_in_batches(todo, size, may_fail=may_fail)
            result.seconds = time.perf_counter() - started
            if watch is not None:
                result.side_effects = watch.after(self.base_model)
            return result

    def erase(
        self, prompt: str, negative: str | Sequence[str] | None = None, target: str = ERASED, **fields: Any
    ) -> EditResult:
        """Make the model stop giving an answer: it says ``target`` in its place.

        Any method that takes a target does that. Those that fine-tune (FT-L, FT-M, LoRA, QLoRA, AdaLoRA, DINM) also
        take probability from the old answer itself (`UnlearningConfig.unlikelihood`); DPO prefers the target to it.
        Whether the old answer still comes out, also behind other wordings, is what
        ``evaluate_edits(…, scenario="erasure")`` measures.

        Args:
            prompt: behind which the answer comes.
            negative: the answer, or several; ``None``: what the model says now.
            target: what it is to say.
            fields: of the request (``subject``, ``rephrase_prompts``, ``locality`` …), and arguments of `edit`.

        Returns:
            As `edit`.

        Raises:
            RequestError: for an unusable request.
            EditFailedError: if no usable update was found.
        """
        answers = [negative] if isinstance(negative, str) else list(negative or ())
        old: dict[str, Any] = {"ground_truth": answers} if answers else {}
        return self.edit(prompt=prompt, target_new=target, erase=answers or True, **old, **fields)

    def resolve_all(
        self,
        iterations: int | None = None,
        until: float | None = None,
        *,
        show_progress: bool = True,
        after_pass: Callable[[int], None] | None = None,
    ) -> EditResult:
        """Solve for all edits of MEMIT's family that the model carries, together, from its original weights.

        The result depends on the facts alone, not on the order or the batches that they came in; taking one back
        later solves for the others again and gives the weights of never having made it. Of two edits about the same
        fact the later one counts. Edits of other methods stay, and are not looked at. All or nothing, as `edit`.

        Args:
            iterations: passes over the set, at most; ``None``: the config's ``joint_passes``.
            until: probability from which on a fact holds; ``None``: the config's ``joint_until``.
            show_progress: show progress bars.
            after_pass: called with the number of each pass while the model shows its result (for measurements).

        Returns:
            The edits, with how often each one was written and whether it holds (``diagnostics["joint"]``), and what
            contradicts what.

        Raises:
            ConfigError: if the present method does not solve for many facts, or there is no tokenizer.
            EditFailedError: if no usable update was found.
        """
        with self._ready():
            started = time.perf_counter()
            self._method.bench.trace, self._method.bench.show_progress = self.trace, show_progress
            result = self._solve_together(self._family(), [], iterations, until, after_pass=after_pass)
            result.seconds = time.perf_counter() - started
            return result

    def _naming_unwanted(self, request: EditRequest) -> EditRequest:
        """A request that erases, with the answer that the model gives now where it names none."""
        if not request.unlearns or request.unwanted or self.tokenizer is None:
            return request
        said = present_answer(self.base_model, self.tokenizer, request.rendered(self.tokenizer, self.processor))
        return replace(request, metadata={**request.metadata, "erase": [said]}) if said else request

    def _family(self) -> list[Edit]:
        """The edits that a joint solve is for: those of methods that spread facts over layers."""
        return [e for e in self.journal if issubclass(method_class(e.method), SpreadMethod)]

    @torch.enable_grad()
    def _solve_together(
        self,
        edits: Sequence[Edit],
        new: Sequence[EditRequest],
        passes: int | None = None,
        until: float | None = None,
        *,
        gone: Sequence[str] = (),
        may_fail: bool = False,
        after_pass: Callable[[int], None] | None = None,
    ) -> EditResult:
        """Put one solve of a set into the place of the edits that it is made of.

        Args:
            edits: of the model, in its order.
            new: further requests, with ids.
            passes: at most; ``None``: the config's.
            until: as for `resolve_all`.
            gone: ids among ``edits`` that leave the set.
            may_fail: leave out new requests for which no value is found.
            after_pass: as for `resolve_all`.
        """
        method = spread_method(self._method)
        needed_tokenizer(self.tokenizer, "solving again")
        passes = method.config.joint_passes if passes is None else passes
        until = method.config.joint_until if until is None else until
        if isinstance(passes, bool) or passes < 1 or not 0 < until <= 1:
            raise ConfigError(f"iterations must be at least 1 and until above 0 and at most 1, not {passes}, {until}")
        leaving = set(gone)
        staying = [e for e in edits if e.id not in leaving]
        chosen = FactSet.of([*(e.request.with_id(e.id) for e in staying), *new])
        if not chosen.facts:
            return EditResult([])
        created = {e.id: e.created for e in staying}
        with _AllOrNothing(self), frozen_eval(self.base_model), all_disabled([self.prompts, self.sites]):
            check_composition("weights", self.books)
            memory = PeakMemory(self.base_model)
            solved = solve_set(
                method,
                self.ledger,
                chosen,
                passes,
                until,
                check=lambda: self.sites.check_weight_edit(method.edited_modules()),
                optional=[str(r.id) for r in new] if may_fail else (),
                after_pass=after_pass,
            )
            shared = {
                "seconds": solved.seconds / len(solved.requests),
                "peak_memory_bytes": memory.read() or process_memory(),
                "batch_size": len(solved.requests),
            }
            made = {
                str(request.id): Edit(
                    id=str(request.id),
                    request=request,
                    method=self.method_name,
                    batch_id=solved.batch_id,
                    created=created.get(str(request.id)) or now(),
                    diagnostics=numbers | shared,
                )
                for request, numbers in zip(solved.requests, solved.outcome.diagnostics, strict=True)
            }
            in_order = [made[i] for i in [*(e.id for e in staying), *(str(r.id) for r in new)] if i in made]
            with uninterrupted():
                self.ledger.exchange([e.id for e in edits], solved.batch_id, solved.outcome.deltas, list(made))
                self.journal.put(in_order)
                self.journal.drop(gone)
        for conflict in chosen.conflicts:
            logger.warning("edits %s and %s: %s about %r", *conflict.edit_ids, conflict.kind, conflict.prompt)
        asked = {str(r.id) for r in new}
        return EditResult(
            [e for e in in_order if not asked or e.id in asked], solved.failed, conflicts=chosen.conflicts
        )

    def _edit_in_batches(self, todo: Sequence[EditRequest], size: int, *, may_fail: bool) -> EditResult:
        """One batch after the other, each on what the one before left; those that fail are left out if they may."""
        method, result = self._method, EditResult([])
        batches = [todo[i : i + size] for i in range(0, len(todo), size)]
        # Weight methods measure the weights: what other books add at run time is switched off meanwhile.
        on_weights = method.capabilities.kind == "weights"
        beside: list[Book] = [self.prompts, *([self.sites] if on_weights else [])]
        with frozen_eval(self.base_model), all_disabled(beside):
            check_composition(method.capabilities.kind, self.books)
            read = {request.id: request for request in read_by(method, todo)}
            method.check(list(read.values()))
            if on_weights:
                self.sites.check_weight_edit(method.edited_modules())
            method.prepare()
            name, show = method.capabilities.name, method.bench.show_progress
            for batch in progress(batches, f"editing ({name})", show=show):
                parts = [batch]
                while parts:
                    part = parts.pop(0)
                    try:
                        result.edits.extend(self._edit_batch(part, [read[request.id] for request in part]))
                    except EditFailedError as error:
                        if not may_fail:
                            raise
                        if method.apart and len(part) > 1:  # which of them it is shows when each is tried alone
                            parts = [[request] for request in part]
                        else:
                            result.failed.extend((request, error) for request in part)
        return result

    @torch.enable_grad()
    def _edit_batch(self, batch: Sequence[EditRequest], read: Sequence[EditRequest]) -> list[Edit]:
        """Compute one batch and put it on the weights and into the journal.

        Args:
            batch: the requests as they were asked for, which the journal keeps.
            read: the same as the model reads them.
        """
        started = time.perf_counter()
        memory = PeakMemory(self.base_model)
        outcome, owners = compute(self._method, read)
        if not all(delta.finite() for delta in outcome.deltas):
            raise EditFailedError("the computed update holds NaN or infinity; nothing was changed")
        outcome = self._method.regularise(outcome)
        seconds = time.perf_counter() - started
        batch_id, created, peak = new_id("batch"), now(), memory.read() or process_memory()
        edits = [
            Edit(
                id=str(request.id),
                request=request,
                method=self.method_name,
                batch_id=batch_id,
                created=created,
                diagnostics={
                    **numbers,
                    "seconds": seconds / len(batch),
                    "peak_memory_bytes": peak,
                    "batch_size": len(batch),
                },
            )
            for request, numbers in zip(batch, outcome.diagnostics, strict=True)
        ]
        with uninterrupted():
            ids = [edits[i].id for i in owners] if outcome.entries else [e.id for e in edits]
            self.books[self.capabilities.kind].apply(batch_id, outcome.changes, ids)
            self.journal.add(edits)
        return edits

    @exclusively
    def rollback(self, which: str | int | Sequence[str] = "all") -> list[Edit]:
        """Undo edits exactly.

        Args:
            which: the id of an edit, a list of ids, a number (the last n), or ``"all"``.

        Returns:
            The edits that were undone.

        Raises:
            UnknownEditError: if the model carries no such edit.
            RollbackError: if an edit was computed together with others and cannot be separated from them.
        """
        ids = self.journal.select(which)
        leaving = set(ids)
        gone = [e for e in self.journal if e.id in leaving]
        weights = self.ledger.modules_of(ids)
        joint = [e for e in self.journal if e.joint]
        staying = [e for e in joint if e.id not in leaving]
        with _AllOrNothing(self):
            if staying and len(staying) < len(joint):
                self._solve_without(joint, staying, ids)
                solved_anew = {e.id for e in joint}
                ids = [i for i in ids if i not in solved_anew]
            with uninterrupted():
                remove_from(self.books.values(), ids)
                self.journal.drop(ids)
                if joint and not staying and isinstance(self._method, SpreadMethod):
                    self._method.first_values.keep([])
        self.sites.warn_of_weight_rollback(weights)
        return gone

    def _solve_without(self, joint: Sequence[Edit], staying: Sequence[Edit], ids: Sequence[str]) -> None:
        """Solve again for those of a set that stay, as the set was solved.

        Raises:
            RollbackError: if the present method is not the one that solved for it.
        """
        made_with, how = staying[0].method, staying[0].joint or {}
        if made_with != self.method_name:
            raise RollbackError(
                f"these edits were solved for together, with {made_with!r}; without one of them the others have to be"
                f" solved for again, and the present method is {self.method_name!r}: set_method(...) first"
            )
        leaving = set(ids)
        gone = [e.id for e in joint if e.id in leaving]
        self._solve_together(joint, [], how["iterations"], how["until"], gone=gone)

    @exclusively
    def rebuild_without(self, edit_id: str, *, show_progress: bool = True) -> list[Edit]:
        """Get rid of an edit that cannot be undone alone: undo all edits of its method and make the others again.

        They are made in their old order and batches, under their old ids, with the present settings. Edits of other
        methods stay. As with `edit`, nothing has changed if it fails.

        Args:
            edit_id: the edit to get rid of.
            show_progress: show progress bars.

        Returns:
            The edits that were made again.

        Raises:
            UnknownEditError: if the model carries no such edit.
            RollbackError: if it was made with another method than the present one.
        """
        method = self.journal.get(edit_id).method
        if method != self.method_name:
            raise RollbackError(
                f"the edit {edit_id!r} was made with {method!r}, the present method is {self.method_name!r}; choose"
                " the settings with which the others are to be made again, with set_method(...)"
            )
        if self.journal.get(edit_id).joint:
            self.rollback(edit_id)
            return [e for e in self.journal if e.joint]
        batches = self.journal.batches_of(method)
        again: list[Edit] = []
        with _AllOrNothing(self):
            self.rollback([e.id for batch in batches for e in batch])
            for batch in batches:
                requests = [e.request.with_id(e.id) for e in batch if e.id != edit_id]
                again += self.edit(requests, show_progress=show_progress).edits if requests else []
        return again

    def disable_edits(self) -> Switch[Self]:
        """The original model inside the block, bit for bit; same object, no second copy of the model.

        It is the model that is switched, not the thread: what other threads ask meanwhile is answered by the original
        model too, and what would change its edits waits. Use ``with model.exclusive(), model.disable_edits():`` where
        others are to wait for the block instead.
        """
        return _WithoutEdits(self)

    def exclusive(self) -> Switch[None]:
        """A block in which this thread has the model for itself: calls of other threads wait until it is left.

        For several steps that others must not look between: edit, look at the result, roll back. The block belongs to
        the thread that opened it; threads that are started inside and use the model wait like all others.

        Raises:
            ModelBusyError: if another thread has the edits switched off and does not leave that block.
        """
        return alone(self.base_model, edited=True)

    @exclusively
    def unload(self) -> PreTrainedModel:
        """Undo all edits and return the plain transformers model."""
        if len(self.journal):
            self.rollback("all")
        return self.base_model


class _WithoutEdits(Switch[Any]):
    """The original model: switched while nobody else runs it, so that no call begins with one model and ends with
    the other. Nothing is locked inside the block, where threads may be started that use the model."""

    def __init__(self, model: Editing):
        self._model, self._off = model, all_disabled(model.books.values())
        self._access, self._thread = access_to(model.base_model), threading.get_ident()
        self._is_off = False

    def change(self) -> Editing:
        """Switch the edits off."""
        self._access.take()
        try:
            self._thread = threading.get_ident()
            self._off.__enter__()
            self._is_off = True
            self._access.switched_off(self._thread, 1)
        finally:
            self._access.release()
        return self._model

    def put_back(self, failed: bool) -> None:
        """Switch them on again."""
        if not self._is_off:
            return
        try:
            self._access.take()
        except ModelBusyError:  # two calls wait for each other; the edits come back all the same
            self._switch_on()
        else:
            try:
                self._switch_on()
            finally:
                self._access.release()

    def _switch_on(self) -> None:
        self._is_off = False
        self._access.switched_off(self._thread, -1)
        self._off.__exit__(None, None, None)


class _AllOrNothing(Switch[None]):
    """Books, journal and the method's state are put back if the block fails or is interrupted."""

    def __init__(self, model: Editing):
        self._model, self._method = model, model._method

    def change(self) -> None:
        """Note how everything is."""
        model = self._model
        self._books, self._journal = snapshot_all(model.books.values()), model.journal.as_list()
        self._state = self._method.state_dict()

    def put_back(self, failed: bool) -> None:
        """Return to what was noted, if need be."""
        if failed or interrupted():
            restore_all(self._books)
            self._method.load_state_dict(self._state)
            self._model.journal = Journal(self._journal)

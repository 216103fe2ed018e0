"""The verbs of editing: make edits, undo them, switch them off; each call is all or nothing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self

from ..anatomy.switching import Switch, interrupted, switched, uninterrupted
from ..books.book import Book, all_disabled, remove_from, restore_all, snapshot_all
from ..engine.devices import PeakMemory, process_memory
from ..engine.forward import frozen_eval
from ..errors import ConfigError, EditFailedError, RequestError, RollbackError
from ..journal import Edit, EditResult, Journal, new_id, now
from ..logging import get_logger, progress, warn_once
from ..methods.base import check_composition
from ..requests import EditRequest, RequestSource, load_requests
from .state import EditedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = get_logger(__name__)


class Watcher(Protocol):
    """Something that looks at a model before and after an edit; `hf_kedit.SideEffects` is one."""

    def before(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, requests: Sequence[EditRequest]
    ) -> None:
        """Called before anything is changed."""

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
            on_error: ``"raise"``, or ``"skip"`` to leave out batches that fail and report them in the result.
            show_progress: show progress bars.
            watch: looks at the model before and after, for example ``SideEffects()``; what it saw is in the result.

        Returns:
            The edits with their ids and diagnostics.

        Raises:
            RequestError: for an unusable request, naming row and field.
            EditFailedError: if no usable update was found.
        """
        started = time.perf_counter()
        if (requests is None) == (not request):
            raise RequestError("give either requests or the fields of one request (prompt=…, target_new=…)")
        todo = self.journal.with_ids(load_requests(requests if requests is not None else request))
        if on_error not in ("raise", "skip"):
            raise ConfigError(f"on_error must be 'raise' or 'skip', not {on_error!r}")
        if batch_size is not None and (isinstance(batch_size, bool) or batch_size < 1):
            raise ConfigError(f"batch_size must be at least 1, not {batch_size!r}")
        if self.tokenizer is None:
            raise ConfigError("editing needs the tokenizer: EditableModel(model, config, tokenizer=...)")
        if watch is not None:
            watch.before(self.base_model, self.tokenizer, todo)
        method, bench = self._method, self._method.bench
        bench.trace, bench.show_progress = self.trace, show_progress
        if batch_size and batch_size > 1 and not method.capabilities.batch:
            warn_once(logger, f"{method.capabilities.name} solves for one fact at a time; batch_size is ignored")
        size = (batch_size or len(todo)) if method.capabilities.batch else 1
        batches = [todo[i : i + size] for i in range(0, len(todo), size)]
        result = EditResult([])
        # Weight methods measure the weights: what other books add at run time is switched off meanwhile.
        on_weights = method.capabilities.kind == "weights"
        beside: list[Book] = [self.prompts, *([self.sites] if on_weights else [])]
        with _AllOrNothing(self):
            with frozen_eval(self.base_model), all_disabled(beside):
                check_composition(method.capabilities.kind, self.books)
                method.check(todo)
                if on_weights:
                    self.sites.check_weight_edit(method.edited_modules())
                method.prepare()
                for batch in progress(batches, f"editing ({method.capabilities.name})", show=show_progress):
                    try:
                        result.edits.extend(self._edit_batch(batch))
                    except EditFailedError as error:
                        if on_error == "raise":
                            raise
                        result.failed.extend((r, error) for r in batch)
            result.seconds = time.perf_counter() - started
            if watch is not None:
                result.side_effects = watch.after(self.base_model)
            return result

    def _edit_batch(self, batch: Sequence[EditRequest]) -> list[Edit]:
        """Compute one batch and put it on the weights and into the journal."""
        started = time.perf_counter()
        memory = PeakMemory(self.base_model)
        outcome = self._method.compute(batch)
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
            self.books[self.capabilities.kind].apply(batch_id, outcome.changes, [e.id for e in edits])
            self.journal.add(edits)
        return edits

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
        gone = [e for e in self.journal if e.id in set(ids)]
        weights = self.ledger.modules_of(ids)
        with uninterrupted():
            remove_from(self.books.values(), ids)
            self.journal.drop(ids)
        self.sites.warn_of_weight_rollback(weights)
        return gone

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
        batches = self.journal.batches_of(method)
        again: list[Edit] = []
        with _AllOrNothing(self):
            self.rollback([e.id for batch in batches for e in batch])
            for batch in batches:
                requests = [e.request.with_id(e.id) for e in batch if e.id != edit_id]
                again += self.edit(requests, show_progress=show_progress).edits if requests else []
        return again

    def disable_edits(self) -> Switch[Self]:
        """The original model inside the block, bit for bit; same object, no second copy of the model."""
        off = all_disabled(self.books.values())

        def begin() -> Any:
            off.__enter__()
            return self

        return switched(begin, lambda: off.__exit__(None, None, None))

    def unload(self) -> PreTrainedModel:
        """Undo all edits and return the plain transformers model."""
        if len(self.journal):
            self.rollback("all")
        return self.base_model


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

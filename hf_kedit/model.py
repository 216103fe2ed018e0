"""`EditableModel`: a transformers model whose facts can be changed, undone, saved and loaded.

The wrapped model is stock and stays usable by itself: every edit lives inside it. The wrapper keeps the journal
and the books of the edits, forwards everything else, and is named after the class that it wraps, so that pipelines
take it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import embedded
from .anatomy import Anatomy, check_anatomy, profile_of, resolve_anatomy
from .config import AutoEditConfig, EditConfig, ModelProfile
from .engine.books import Book, all_disabled, remove_from, restore_all, snapshot_all
from .engine.forward import frozen_eval
from .engine.ledger import Ledger
from .engine.promptbook import PromptBook
from .engine.sitebook import SiteBook
from .engine.statistics import Corpus, StatisticsStore, model_fingerprint, resolve_corpus
from .engine.weights import tensor_digest, uninterrupted
from .errors import ConfigError, EditFailedError, KeditError, RequestError, RollbackError
from .journal import Edit, Journal, new_id, now, peak_memory
from .loading import embedded_corpus, hub_options, load_base, load_tokenizer
from .logging import get_logger, progress, warn_once
from .lora.exchange import LoraExchange
from .methods.base import Capabilities, Method, Workbench, check_composition, method_class
from .packs import Packs
from .repository import cached_commit
from .requests import EditRequest, RequestSource, load_requests
from .sharing import Sharing

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .card import HasModelIndex

logger = get_logger(__name__)


@dataclass
class EditResult:
    """What `EditableModel.edit` returns.

    Args:
        edits: one per request that was applied, in order.
        failed: (request, error) of requests that were left out (only with ``on_error="skip"``).
        seconds: of the whole call.
    """

    edits: list[Edit]
    failed: list[tuple[EditRequest, KeditError]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ids(self) -> list[str]:
        """Ids of the edits."""
        return [e.id for e in self.edits]


class EditableModel(Sharing, LoraExchange, nn.Module):
    """A transformers model together with the edits that it carries.

    Args:
        base_model: any model with a text decoder, in memory. Edits are made in place.
        config: the method's config, or its name (``"rome"``).
        tokenizer: of the model; needed for editing.
        anatomy: overrides of the structural resolver (``{"layers": …, "down": …}``) for unusual models.
        base_model_id: name to record for the base model; ``None``: its ``config.name_or_path``.
        base_model_revision: commit of the base model to record.
        corpus: texts for second-moment statistics (a list, or a `Corpus`), instead of ``config.stats_dataset``.

    Raises:
        AnatomyError: if the model's structure cannot be understood.
        UnsupportedModelError: if the method cannot edit such a model.
        ConfigError: if the config does not fit the model.
    """

    base_model: PreTrainedModel

    def __init__(
        self,
        base_model: PreTrainedModel,
        config: EditConfig | str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        anatomy: Mapping[str, str] | None = None,
        base_model_id: str | None = None,
        base_model_revision: str | None = None,
        corpus: Sequence[str] | Corpus | None = None,
    ):
        super().__init__()
        if not isinstance(base_model, nn.Module) or not hasattr(base_model, "config"):
            raise ConfigError(
                f"base_model must be a loaded transformers model, not {type(base_model).__name__};"
                " to load one by name use EditableModel.from_pretrained(...)"
            )
        if isinstance(base_model, EditableModel):
            raise ConfigError("this model is an EditableModel already; call its edit(), or use set_method()")
        self.base_model = base_model
        self.tokenizer = tokenizer
        self.base_model_id = base_model_id or str(getattr(base_model.config, "name_or_path", "") or "")
        self.base_model_revision = base_model_revision or getattr(base_model.config, "_commit_hash", None)
        self.anatomy_overrides = dict(anatomy or {})
        self.anatomy: Anatomy = check_anatomy(base_model, resolve_anatomy(base_model, anatomy))
        self.ledger = Ledger(base_model)
        self.sites = SiteBook(base_model)
        self.prompts = PromptBook(base_model, lambda: self.tokenizer)
        self.books: dict[str, Book] = {"weights": self.ledger, "adapter": self.sites, "prompt": self.prompts}
        self.journal = Journal()
        self.packs = Packs(self)
        self._corpus = corpus if isinstance(corpus, Corpus) or corpus is None else resolve_corpus(list(corpus))
        self._stores: dict[tuple[Any, ...], StatisticsStore] = {}
        self._templates: dict[str, list[list[str]]] = {}
        self._states: dict[str, dict[str, torch.Tensor]] = {}
        self._base_fingerprint: str | None = None
        self.trace: dict[str, torch.Tensor] | None = None
        kind: Any = type(base_model)
        self.__class__ = _named_after(kind)
        self.set_method(config if config is not None else "ft-m")

    # ------------------------------------------------------------------ construction

    @classmethod
    def from_pretrained(
        cls,
        model_or_edits: str | Path,
        config: EditConfig | str | None = None,
        *,
        base_model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        anatomy: Mapping[str, str] | None = None,
        revision: str | None = None,
        base_model_revision: str | None = None,
        ignore_fingerprint: bool = False,
        trust_remote_code: bool = False,
        **model_kwargs: Any,
    ) -> EditableModel:
        """Load a base model to edit, or a saved edit together with its base model.

        Args:
            model_or_edits: Hub id, local folder, or embedded name (``"kedit/world-gpt2"``) of a model; or folder or
                Hub id of saved edits (recognised by its ``edit_config.json``).
            config: method config or name; for saved edits ``None`` continues with the saved one.
            base_model: a base model in memory, instead of the one that the saved edit names.
            tokenizer: instead of the model's own.
            anatomy: overrides of the structural resolver.
            revision: of the repository that is named.
            base_model_revision: of the base model, when saved edits are loaded.
            ignore_fingerprint: put saved edits on a base with other weights than they were made on.
            trust_remote_code: allow code from the model's repository to run.
            model_kwargs: for ``AutoModel….from_pretrained`` (``dtype``, ``device_map``, ``token`` …).

        Raises:
            ArtifactError: if saved edits are damaged or of an unknown format.
            BaseModelMismatchError: if the base model has other weights than the edits were made on.
        """
        from .saving import find_artifact, load_artifact

        name = str(model_or_edits)
        artifact = None
        if embedded.resolve(name) is None:
            artifact = find_artifact(name, revision=revision, **hub_options(model_kwargs))
        if artifact is not None:
            return load_artifact(
                artifact,
                config,
                base_model=base_model,
                tokenizer=tokenizer,
                anatomy=anatomy,
                base_model_revision=base_model_revision,
                ignore_fingerprint=ignore_fingerprint,
                trust_remote_code=trust_remote_code,
                model_kwargs=model_kwargs,
            )
        loaded = base_model or load_base(name, revision=revision, trust_remote_code=trust_remote_code, **model_kwargs)
        tokenizer = tokenizer or load_tokenizer(
            name, revision=revision, trust_remote_code=trust_remote_code, **hub_options(model_kwargs)
        )
        commit = None
        if base_model is None and embedded.resolve(name) is None:
            commit = cached_commit(name, "config.json", revision=revision, cache_dir=model_kwargs.get("cache_dir"))
        return cls(loaded, config, tokenizer, anatomy=anatomy, base_model_id=name, base_model_revision=commit)

    def set_method(self, config: EditConfig | str) -> EditableModel:
        """Choose the method of the next edits; earlier edits stay.

        Args:
            config: method config, or its name for the packaged or derived defaults of this model.

        Raises:
            UnknownMethodError: for a name that is not registered.
            ConfigError: if the config does not fit the model.
            UnsupportedModelError: if the method cannot edit this kind of model.
        """
        chosen = AutoEditConfig.for_method(config) if isinstance(config, str) else config
        if not isinstance(chosen, EditConfig) or not chosen.edit_type:
            raise ConfigError(f"config must be an EditConfig or the name of a method, not {type(chosen).__name__}")
        full = chosen.complete(self.profile)
        method = method_class(full)(self._workbench(full), full)
        if "_method" in self.__dict__:  # what a method has learnt from its edits outlives a change of settings
            self._states[self.method_name] = self._method.state_dict()
        method.load_state_dict(self._states.get(full.edit_type, {}))
        self._method: Method = method
        self.edit_config: EditConfig = full
        return self

    # ------------------------------------------------------------------ properties

    @property
    def method_name(self) -> str:
        """``edit_type`` of the current method."""
        return self.edit_config.edit_type

    @property
    def capabilities(self) -> Capabilities:
        """What the current method can do."""
        return self._method.capabilities

    @property
    def statistics(self) -> StatisticsStore:
        """The second-moment statistics that the current method uses."""
        return self._method.bench.statistics

    @property
    def edits(self) -> list[Edit]:
        """The journal: every edit that the model carries, oldest first."""
        return self.journal.as_list()

    @property
    def profile(self) -> ModelProfile:
        """The facts about the model from which defaults are derived."""
        return profile_of(self.base_model, self.anatomy, self.base_model_id)

    def get_base_model(self) -> PreTrainedModel:
        """The wrapped transformers model; it carries the edits."""
        return self.base_model

    def fingerprint(self) -> str:
        """A hash of the model as it is now, with all edits, for cache keys."""
        weights = model_fingerprint(self.base_model)
        beside = [book for kind, book in self.books.items() if kind != "weights" and book.edit_ids]
        return tensor_digest([(weights, torch.tensor(0)), *_contents(beside)])[:24] if beside else weights

    def base_fingerprint(self) -> str:
        """The hash of the unedited weights."""
        if self._base_fingerprint is None:
            with all_disabled(self.books.values()):
                self._base_fingerprint = model_fingerprint(self.base_model)
        return self._base_fingerprint

    # ------------------------------------------------------------------ editing

    def edit(
        self,
        requests: RequestSource | None = None,
        *,
        batch_size: int | None = None,
        on_error: str = "raise",
        show_progress: bool = True,
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

        Returns:
            The edits with their ids and diagnostics.

        Raises:
            RequestError: for an unusable request, naming row and field.
            EditFailedError: if no usable update was found.
        """
        started = time.perf_counter()
        if (requests is None) == (not request):
            raise RequestError("give either requests or the fields of one request (prompt=…, target_new=…)")
        todo = self.with_ids(load_requests(requests if requests is not None else request))
        if on_error not in ("raise", "skip"):
            raise ConfigError(f"on_error must be 'raise' or 'skip', not {on_error!r}")
        if batch_size is not None and (isinstance(batch_size, bool) or batch_size < 1):
            raise ConfigError(f"batch_size must be at least 1, not {batch_size!r}")
        if self.tokenizer is None:
            raise ConfigError("editing needs the tokenizer: EditableModel(model, config, tokenizer=...)")
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
        with self._all_or_nothing(), frozen_eval(self.base_model), all_disabled(beside):
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
        return result

    @contextlib.contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Put books, journal and the method's state back if the block fails or is interrupted."""
        method = self._method
        books, journal, state = snapshot_all(self.books.values()), self.journal.as_list(), method.state_dict()
        try:
            yield
        except BaseException:
            with uninterrupted():
                restore_all(books)
                method.load_state_dict(state)
                self.journal = Journal(journal)
            raise

    def _edit_batch(self, batch: Sequence[EditRequest]) -> list[Edit]:
        """Compute one batch and put it on the weights and into the journal."""
        started = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        outcome = self._method.compute(batch)
        if not all(delta.finite() for delta in outcome.deltas):
            raise EditFailedError("the computed update holds NaN or infinity; nothing was changed")
        outcome = self._method.regularise(outcome)
        seconds = time.perf_counter() - started
        batch_id, created = new_id("batch"), now()
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
                    "peak_memory_bytes": peak_memory(),
                    "batch_size": len(batch),
                },
            )
            for request, numbers in zip(batch, outcome.diagnostics, strict=True)
        ]
        with uninterrupted():
            self.books[self.capabilities.kind].apply(batch_id, outcome.changes, [e.id for e in edits])
            self.journal.add(edits)
        return edits

    def with_ids(self, requests: Sequence[EditRequest]) -> list[EditRequest]:
        """Give every request an id that the journal does not know yet."""
        known = {e.id for e in self.journal}
        named = []
        for request in requests:
            if request.id is not None and request.id in known:
                raise RequestError(
                    "the model already carries an edit with this id; roll it back first, or choose another id",
                    row=request.row,
                    field="id",
                    request_id=request.id,
                )
            named.append(request if request.id is not None else request.with_id(new_id("edit")))
        return named

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
                " the settings with which the others shall be made again with set_method(...)"
            )
        batches = self.journal.batches_of(method)
        again: list[Edit] = []
        with self._all_or_nothing():
            self.rollback([e.id for batch in batches for e in batch])
            for batch in batches:
                requests = [e.request.with_id(e.id) for e in batch if e.id != edit_id]
                again += self.edit(requests, show_progress=show_progress).edits if requests else []
        return again

    @contextlib.contextmanager
    def disable_edits(self) -> Iterator[EditableModel]:
        """The original model inside the block, bit for bit; same object, no second copy of the model."""
        with all_disabled(self.books.values()):
            yield self

    def merge_and_unload(self) -> PreTrainedModel:
        """Make the edits permanent and return the plain transformers model.

        The wrapper forgets its journal: afterwards nothing can be rolled back.

        Raises:
            MergeError: if the model carries edits that are no part of its weights (codebooks, prompts).
        """
        for book in self.books.values():
            book.check_mergeable()
        with uninterrupted():
            for book in self.books.values():
                book.forget()
            self.journal = Journal()
            self.packs.forget()
            self._base_fingerprint = None
            self._stores, self._templates, self._states = {}, {}, {}
            self._method.load_state_dict({})
            self.set_method(self.edit_config)  # with statistics and templates of the model as it is now
        return self.base_model

    def unload(self) -> PreTrainedModel:
        """Undo all edits and return the plain transformers model."""
        if len(self.journal):
            self.rollback("all")
        return self.base_model

    def save_pretrained(self, save_directory: str | Path, *, report: HasModelIndex | None = None) -> None:
        """Save the edits (not the base model) to a folder that `from_pretrained` loads.

        Args:
            save_directory: the folder; made if needed.
            report: an evaluation of the edits; its means go into the model card.

        Raises:
            ArtifactError: if the folder holds something that must not share a root with edits.
        """
        from .saving import save_artifact

        save_artifact(self, Path(save_directory), report=report)

    def method_state(self) -> dict[str, torch.Tensor]:
        """What the current method has learnt from earlier edits, beyond what the journal's edits hold."""
        return self._method.state_dict()

    def restore_method_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over the method's state of a saved edit.

        Raises:
            ConfigError: if it is not a state of the current method.
        """
        self._method.load_state_dict(state)

    @property
    def used_templates(self) -> dict[str, list[list[str]]]:
        """Context templates that were generated for this model, by (lengths, seed)."""
        return self._templates

    def restore_templates(self, templates: Mapping[str, list[list[str]]]) -> None:
        """Take over the context templates of a saved edit, so that later edits use the same ones."""
        self._templates.update({key: [list(group) for group in groups] for key, groups in templates.items()})

    def build_prompt(self, query: str) -> str:
        """The text that answers a query under the edits that live in prompts, for a model that only takes text.

        Returns:
            The query behind the edit that it belongs to, or the query itself.
        """
        return self.prompts.build_prompt(query)

    # ------------------------------------------------------------------ being a model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the wrapped model, edits included."""
        return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the wrapped model, edits included."""
        return self.base_model.generate(*args, **kwargs)  # type: ignore[operator]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    def __repr__(self) -> str:
        name = self.base_model_id or type(self.base_model).__name__
        return f"EditableModel({name!r}, method={self.method_name!r}, edits={len(self.journal)})"

    # ------------------------------------------------------------------ inside

    def _workbench(self, config: EditConfig) -> Workbench:
        return Workbench(
            model=self.base_model,
            tokenizer=self.tokenizer,  # type: ignore[arg-type]
            anatomy=self.anatomy,
            ledger=self.ledger,
            sites=self.sites,
            books=self.books,
            statistics=self._statistics(config),
            templates=self._templates,
        )

    def _statistics(self, config: EditConfig) -> StatisticsStore:
        """The statistics store for a config; configs with the same statistics settings share one."""
        source = getattr(config, "stats_dataset", None)
        settings = (
            source,
            getattr(config, "stats_tokens", None),
            getattr(config, "stats_dir", None),
            getattr(config, "stats_ridge", 0.0),
        )
        if settings not in self._stores:
            self._stores[settings] = StatisticsStore(
                self.base_model,
                self.tokenizer,  # type: ignore[arg-type]
                corpus=resolve_corpus(source) or self._corpus,
                tokens=settings[1],
                cache_dir=settings[2],
                ridge=settings[3],
                own_corpus=embedded_corpus(self.base_model_id, self.base_model),
                fingerprint=self.base_fingerprint,
                name=self.base_model_id,
            )
        return self._stores[settings]


@functools.cache
def _named_after(base: Any) -> type[EditableModel]:
    """A subclass of `EditableModel` with the name and the ``forward`` signature of a transformers class.

    Pipelines compare the class name with a list, and `Trainer` reads the signature.
    """

    @functools.wraps(base.forward)
    def forward(self: EditableModel, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)

    return type(base.__name__, (EditableModel,), {"forward": forward, "__module__": EditableModel.__module__})


def _contents(books: Sequence[Book]) -> Iterator[tuple[str, torch.Tensor]]:
    """Everything that books hold, for a hash."""
    for book in books:
        yield json.dumps(book.describe(), sort_keys=True), torch.tensor(0)
        yield from sorted(book.tensors().items(), key=lambda item: item[0])

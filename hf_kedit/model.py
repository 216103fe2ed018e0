"""`EditableModel`: a transformers model whose facts can be changed, undone, saved and loaded.

The wrapped model is stock and stays usable by itself: every edit lives inside it. The wrapper keeps the journal
and the books of the edits, forwards everything else, and is named after the class that it wraps, so that pipelines
take it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import embedded
from .anatomy import Anatomy, check_anatomy, profile_of, resolve_anatomy
from .artifact.lora_exchange import LoraExchange
from .artifact.packs import Packs
from .artifact.sharing import Sharing
from .books.book import Book, all_disabled
from .books.ledger import Ledger
from .books.prompt_book import PromptBook
from .books.site_book import SiteBook
from .books.state_retrieval import StateReader
from .config import AutoEditConfig, EditConfig, ModelProfile
from .editing import Editing
from .engine.quantised import keep_layout
from .engine.weights import tensor_digest, uninterrupted, untie_head
from .errors import ConfigError
from .journal import Edit, Journal
from .loading import embedded_corpus, hub_options, load_base, load_tokenizer
from .logging import get_logger
from .methods.base import Method, Workbench, method_class
from .statistics.corpora import Corpus, resolve_corpus
from .statistics.store import StatisticsStore, model_fingerprint
from .storage.repository import cached_commit

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .artifact.card import HasModelIndex

logger = get_logger(__name__)


class EditableModel(Editing, Sharing, LoraExchange, nn.Module):
    """A transformers model together with the edits that it carries.

    Args:
        base_model: any model with a text decoder, in memory. Edits are made in place.
        config: the method's config, or its name (``"rome"``).
        tokenizer: of the model; needed for editing.
        anatomy: overrides of the structural resolver (``{"layers": …, "down": …}``) for unusual models.
        base_model_id: name to record for the base model; ``None``: its ``config.name_or_path``.
        base_model_revision: commit of the base model to record.
        corpus: texts for second-moment statistics (a list, or a `Corpus`), instead of ``config.stats_dataset``.
        untie: give a head that shares its weight with the input embeddings a copy of its own, so that it can be
            edited alone. Saved edits remember it.

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
        untie: bool = False,
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
        if untie:
            untie_head(base_model)
        keep_layout(base_model)
        self.anatomy: Anatomy = check_anatomy(base_model, resolve_anatomy(base_model, anatomy))
        self.ledger = Ledger(base_model)
        self.sites = SiteBook(base_model)
        reader = StateReader(
            base_model, self.anatomy, lambda: self.tokenizer, lambda: all_disabled(self.books.values())
        )
        self.prompts = PromptBook(base_model, lambda: self.tokenizer, reader)
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
        # Checkpoints of `Trainer` and friends have the wrapped model's own names, and a tied weight once.
        self.register_state_dict_post_hook(_own_names)
        self.register_load_state_dict_pre_hook(_wrapped_names)
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
        untie: bool = False,
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
            untie: give a tied head a weight of its own, so that it can be edited; saved edits remember it.
            model_kwargs: for ``AutoModel….from_pretrained`` (``dtype``, ``device_map``, ``token``,
                ``quantization_config`` …). Edits of a quantised model are loaded on one quantised likewise; with
                ``quantization_config=None`` and ``ignore_fingerprint=True``, on the unquantised model.

        Raises:
            ArtifactError: if saved edits are damaged or of an unknown format.
            BaseModelMismatchError: if the base model has other weights than the edits were made on.
        """
        from .artifact.writing import find_artifact, load_artifact

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
                untie=untie,
                model_kwargs=model_kwargs,
            )
        loaded = base_model or load_base(name, revision=revision, trust_remote_code=trust_remote_code, **model_kwargs)
        tokenizer = tokenizer or load_tokenizer(
            name, revision=revision, trust_remote_code=trust_remote_code, **hub_options(model_kwargs)
        )
        commit = None
        if base_model is None and embedded.resolve(name) is None:
            commit = cached_commit(name, "config.json", revision=revision, cache_dir=model_kwargs.get("cache_dir"))
        return cls(
            loaded, config, tokenizer, anatomy=anatomy, base_model_id=name, base_model_revision=commit, untie=untie
        )

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
        inside = {"weights"} if not self.ledger.runs_beside else set()
        beside = [book for kind, book in self.books.items() if kind not in inside and book.edit_ids]
        return tensor_digest([(weights, torch.tensor(0)), *_contents(beside)])[:24] if beside else weights

    def base_fingerprint(self) -> str:
        """The hash of the unedited weights."""
        if self._base_fingerprint is None:
            with all_disabled(self.books.values()):
                self._base_fingerprint = model_fingerprint(self.base_model)
        return self._base_fingerprint

    # ------------------------------------------------------------------ keeping edits

    def merge_and_unload(self) -> PreTrainedModel:
        """Make the edits permanent and return the plain transformers model.

        The wrapper forgets its journal: afterwards nothing can be rolled back. What the weights' number format has
        lost of the edits by rounding (`Ledger.rounding_losses`) is logged, from 5 % on as a warning.

        Raises:
            MergeError: if the model carries edits that are no part of its weights (codebooks, prompts), or if the
                weights are quantised.
        """
        for book in self.books.values():
            book.check_mergeable()
        self.ledger.warn_of_rounding()
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

    def save_pretrained(
        self, save_directory: str | Path, *, report: HasModelIndex | None = None, per_edit: bool = False
    ) -> None:
        """Save the edits (not the base model) to a folder that `from_pretrained` loads.

        Args:
            save_directory: the folder; made if needed.
            report: an evaluation of the edits; its means go into the model card.
            per_edit: add every edit alone as a LoRA adapter, in a folder ``edits/<id>`` of its own, which PEFT loads
                with ``subfolder=``.

        Raises:
            ArtifactError: if the folder holds something that must not share a root with edits.
            ExportError: if ``per_edit`` is asked of edits that are not all low-rank changes, or not separable.
            WeightError: if an edited weight was trained since; merge the edits then.
        """
        from .artifact.writing import save_artifact

        save_artifact(self, Path(save_directory), report=report, per_edit=per_edit)

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


def _tied(model: EditableModel) -> dict[str, str]:
    """Tied weights of the wrapped model: name → name of the one that is stored."""
    return dict(getattr(model.base_model, "all_tied_weights_keys", None) or {})


def _own_names(model: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Take the wrapper's name out of a state dict, and leave out what shares its memory with another weight."""
    wrapped = f"{prefix}base_model."
    for name in [name for name in state if name.startswith(wrapped)]:
        state[prefix + name.removeprefix(wrapped)] = state.pop(name)
    for name, stored in _tied(model).items():
        if prefix + stored in state:
            state.pop(prefix + name, None)


def _wrapped_names(model: Any, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """The inverse of `_own_names`."""
    for name, stored in _tied(model).items():
        if prefix + stored in state:
            state.setdefault(prefix + name, state[prefix + stored])
    for name in [name for name in state if name.startswith(prefix)]:
        state[f"{prefix}base_model.{name.removeprefix(prefix)}"] = state.pop(name)


def _contents(books: Sequence[Book]) -> Iterator[tuple[str, torch.Tensor]]:
    """Everything that books hold, for a hash."""
    for book in books:
        yield json.dumps(book.describe(), sort_keys=True), torch.tensor(0)
        yield from sorted(book.tensors().items(), key=lambda item: item[0])

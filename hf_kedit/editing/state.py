"""The state of an edited model: the transformers model, its anatomy, its method, the books and journal of its edits.

Everything that reads edits (saving, adapters, packs) and everything that changes them stands on this class and knows
no other. `EditableModel` is what users see of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from ..anatomy import Anatomy, check_anatomy, profile_of, resolve_anatomy
from ..anatomy.outputs import hooks
from ..anatomy.switching import Switch
from ..books.book import Book, all_disabled
from ..books.ledger import Ledger
from ..books.prompt_book import PromptBook
from ..books.site_book import SiteBook
from ..books.state_retrieval import StateReader
from ..config import AutoEditConfig, EditConfig, ModelProfile
from ..decoding import Decoding, decode_with, decoding_now, decoding_of
from ..engine.access import alone, among_others, together_with_others
from ..engine.quantised import keep_layout
from ..engine.weights import head_kept, model_fingerprint, tensor_digest, untie_head
from ..errors import ConfigError, UnsupportedModelError
from ..gguf.reading import GgufFile, origin_of
from ..journal import Edit, Journal
from ..loading import embedded_corpus, model_name
from ..logging import get_logger, info_once
from ..methods.base import Capabilities, Method, Workbench, method_class
from ..remote.model import RemoteModel
from ..statistics.corpora import SELF, Corpus, resolve_corpus, self_corpus
from ..statistics.store import StatisticsStore
from ..text.processors import sees

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = get_logger(__name__)


class EditedModel(nn.Module):
    """A transformers model and all that is known of its edits.

    The arguments are those of `EditableModel`.

    Raises:
        AnatomyError: if the model's structure cannot be understood.
        UnsupportedModelError: if the method cannot edit such a model.
        ConfigError: if the config does not fit the model.
    """

    base_model: PreTrainedModel

    def __init__(
        self,
        base_model: PreTrainedModel | RemoteModel,
        config: EditConfig | str | None,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        anatomy: Mapping[str, str] | None,
        base_model_id: str | None,
        base_model_revision: str | None,
        corpus: Sequence[Any] | Corpus | None,
        untie: bool,
        processor: Any = None,
    ):
        super().__init__()
        if not isinstance(base_model, nn.Module) or not hasattr(base_model, "config"):
            raise ConfigError(
                f"base_model must be a loaded transformers model, not {type(base_model).__name__};"
                " to load one by name use EditableModel.from_pretrained(...)"
            )
        if isinstance(base_model, EditedModel):
            raise ConfigError("this model is an EditableModel already; call its edit(), or use set_method()")
        self.base_model = base_model  # type: ignore[assignment]  # what a RemoteModel lacks, it says itself
        if sees(tokenizer):  # whoever has a processor has its tokenizer
            tokenizer, processor = None, processor or tokenizer
        if processor is not None and not sees(processor):
            raise ConfigError(f"processor must be one of text and pictures, not {type(processor).__name__}")
        self.processor = processor
        self.tokenizer = processor.tokenizer if tokenizer is None and processor is not None else tokenizer
        self.gguf: GgufFile | None = origin_of(base_model)
        path = self.gguf.name if self.gguf is not None else getattr(base_model.config, "name_or_path", "")
        self.base_model_id = model_name(base_model_id or path or "")
        commit = self.gguf.commit if self.gguf is not None else getattr(base_model.config, "_commit_hash", None)
        self.base_model_revision = base_model_revision or commit
        self.anatomy_overrides = dict(anatomy or {})
        with alone(base_model), head_kept(base_model):
            if untie and not isinstance(base_model, RemoteModel):
                untie_head(base_model)
            keep_layout(base_model)
            self.anatomy: Anatomy = (
                Anatomy.of_nothing(type(base_model).__name__)
                if isinstance(base_model, RemoteModel)
                else check_anatomy(base_model, resolve_anatomy(base_model, anatomy))
            )
            self.ledger = Ledger(base_model)
            # No lambdas: copy.deepcopy takes them as they are, so that a copy would ask the model that it is one of.
            tokenizer_now, processor_now = partial(getattr, self, "tokenizer"), partial(getattr, self, "processor")
            self.sites = SiteBook(base_model, self.ledger, tokenizer_now)
            reader = StateReader(self.base_model, self.anatomy, tokenizer_now, self._unedited)
            own = None if isinstance(base_model, RemoteModel) else reader
            self.prompts = PromptBook(base_model, tokenizer_now, own, self.ledger, processor_now)
            self.books: dict[str, Book] = {"weights": self.ledger, "adapter": self.sites, "prompt": self.prompts}
            self._corpus = corpus if isinstance(corpus, Corpus) else resolve_corpus(corpus, self.processor)
            self.trace: dict[str, torch.Tensor] | None = None
            self.decoding_config: Decoding | None = None
            self._start_afresh()
            self.set_method(self.default_config if config is None else config)
            if config is None:
                said = f"{self.base_model_id}: no method is named; edits are made by {self.edit_config.in_words}"
                info_once(logger, said)

    def _unedited(self) -> Switch[None]:
        """The model without any edits inside the block."""
        return all_disabled(self.books.values())

    def _start_afresh(self) -> None:
        """Forget what belongs to the edits that were made: the model as it is now counts as unedited."""
        self.journal = Journal()
        self._stores: dict[tuple[Any, ...], StatisticsStore] = {}
        self._templates: dict[str, list[list[str]]] = {}
        self._states: dict[str, dict[str, torch.Tensor]] = {}
        self._base_fingerprint: str | None = None

    # ------------------------------------------------------------------ the method

    def set_method(self, config: EditConfig | str) -> Self:
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
        kind = method_class(chosen)
        if self.is_remote and not kind.text_only:
            raise UnsupportedModelError(
                f"{kind.capabilities.name} works inside a model, and {self.base_model_id!r} is behind an API: it takes"
                " 'ike' or 'prompt'"
            )
        full = chosen.complete(self.profile)
        loaded = kind.load(full)  # from the Hub, it may be: nobody has to wait for that
        with alone(self.base_model, edited=True):
            method = kind(self._workbench(full, loaded), full)
            if "_method" in self.__dict__:  # what a method has learnt from its edits outlives a change of settings
                self._states[self.method_name] = self._method.state_dict()
            method.load_state_dict(self._states.get(full.edit_type, {}))
            self._method: Method = method
            self.edit_config: EditConfig = full
        return self

    @property
    def default_config(self) -> EditConfig:
        """The method where none is named: `auto`, which keeps edits apart from one another and from all other prompts.

        Models that it cannot work in get what can: those behind an API a prompt; encoder-decoders, models that see,
        and models whose MLPs are experts and nothing else, fine-tuning.
        """
        if self.is_remote:
            return AutoEditConfig.for_method("prompt")
        dense = any(layer.down is not None for layer in self.anatomy.layers)
        if dense and not self.anatomy.is_encoder_decoder and self.processor is None:
            return AutoEditConfig.for_method("auto")
        experts = any(layer.experts for layer in self.anatomy.layers) and not dense
        return AutoEditConfig.for_method("ft-m", **({"expert_policy": "top1"} if experts else {}))

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

    # ------------------------------------------------------------------ decoding

    def decoding(self, decoding: Decoding | str | Mapping[str, Any], **settings: Any) -> Switch[None]:
        """Contrast the model's layers while it generates inside the block, against hallucination.

        ``with model.decoding("dola", layers="low"): model.generate(...)``. What is edited inside is edited as ever.

        Args:
            decoding: ``"dola"`` (arXiv 2309.03883), ``"deco"`` (arXiv 2410.11779), or settings.
            settings: fields of `DoLaConfig` or `DeCoConfig`.

        Raises:
            ConfigError: for an unknown decoding or setting.
            LayerError: for a layer that the model does not have.
            UnsupportedModelError: if the model is no decoder.
        """
        return decode_with(self.base_model, decoding, anatomy=self.anatomy, **settings)

    def set_decoding(self, decoding: Decoding | str | Mapping[str, Any] | None, **settings: Any) -> Self:
        """Let `generate` contrast the model's layers from now on; it is saved with the edits. ``None`` ends it.

        The arguments and errors are those of `decoding`. The wrapped model by itself generates as before.
        """
        chosen = None if decoding is None else decoding_of(decoding, **settings)
        if chosen is not None:
            self.decoding(chosen)  # raises what it would raise later
        self.decoding_config = chosen
        return self

    def as_decoded(self, *, own_thread: bool = False) -> Switch[None]:
        """A block in which the wrapped model generates as `set_decoding` says, unless it is in one of `decoding`."""
        if self.decoding_config is None or decoding_now(self.base_model) is not None:
            return hooks()
        return decode_with(self.base_model, self.decoding_config, anatomy=self.anatomy, own_thread=own_thread)

    # ------------------------------------------------------------------ the model and its edits

    @property
    def edits(self) -> list[Edit]:
        """The journal: every edit that the model carries, oldest first."""
        with among_others(self.base_model):  # not what an edit that is being made has written so far
            return self.journal.as_list()

    @property
    def profile(self) -> ModelProfile:
        """The facts about the model from which defaults are derived."""
        return profile_of(self.base_model, self.anatomy, self.base_model_id)

    @property
    def is_remote(self) -> bool:
        """Whether the model is behind an API: it takes and gives text, and nothing else is known of it."""
        return isinstance(self.base_model, RemoteModel)

    def get_base_model(self) -> PreTrainedModel:
        """The wrapped transformers model; it carries the edits."""
        return self.base_model

    @together_with_others
    def fingerprint(self) -> str:
        """A hash of the model as it is now, with all edits, for cache keys."""
        weights = model_fingerprint(self.base_model) + getattr(self.base_model, "identity", "")
        inside = {"weights"} if not self.ledger.runs_beside else set()
        beside = [book for kind, book in self.books.items() if kind not in inside and book.edit_ids]
        return tensor_digest([(weights, torch.tensor(0)), *_contents(beside)])[:24] if beside else weights

    @together_with_others
    def base_fingerprint(self) -> str:
        """The hash of the unedited weights."""
        if self._base_fingerprint is None:
            self._base_fingerprint = self.ledger.base_fingerprint()
        return self._base_fingerprint

    # ------------------------------------------------------------------ inside

    def _workbench(self, config: EditConfig, loaded: Any) -> Workbench:
        return Workbench(
            model=self.base_model,
            tokenizer=self.tokenizer,  # type: ignore[arg-type]
            processor=self.processor,
            anatomy=self.anatomy,
            ledger=self.ledger,
            sites=self.sites,
            books=self.books,
            statistics=self._statistics(config),
            templates=self._templates,
            loaded=loaded,
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
                corpus=self._chosen_corpus(source),
                tokens=settings[1],
                cache_dir=settings[2],
                ridge=settings[3],
                own_corpus=embedded_corpus(self.base_model_id, self.base_model, self.processor),
                fingerprint=self.base_fingerprint,
                name=self.base_model_id,
            )
        return self._stores[settings]

    def _chosen_corpus(self, source: str | None) -> Corpus | None:
        """The text that a config names (``"self"``: what the model writes), or the one given with the model."""
        if source == SELF:
            return self_corpus(self.base_model, self.tokenizer)  # type: ignore[arg-type]
        return resolve_corpus(source, self.processor) or self._corpus


def _contents(books: Sequence[Book]) -> Iterator[tuple[str, torch.Tensor]]:
    """Everything that books hold, for a hash."""
    for book in books:
        yield json.dumps(book.describe(), sort_keys=True), torch.tensor(0)
        yield from sorted(book.tensors().items(), key=lambda item: item[0])

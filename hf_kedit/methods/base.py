"""What a method is: a config, its capabilities, and a function from requests to weight deltas.

A method never writes a weight. It measures the model through the `Workbench`, returns `WeightDelta`s, and the
ledger does the rest: transaction, rollback, rounding, saving.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch

from ..books.book import Book, all_disabled
from ..books.ledger import Ledger, WeightDelta
from ..books.prompting import Prompter
from ..books.retrieval import Retriever
from ..books.site_book import SiteBook
from ..books.sites import OTHER_WRAPPER
from ..books.state_retrieval import StateReader
from ..config import EditConfig, ModelProfile, register_config
from ..engine.examples import Example, Objective, encode_examples
from ..engine.templates import context_templates
from ..engine.transforms import keep_largest_relative
from ..engine.unlikelihood import Unlikelihood
from ..engine.weights import get_module, get_weight
from ..errors import ConfigError, EditFailedError, RequestError, UnsupportedModelError
from ..logging import get_logger
from ..registry import Table
from ..remote.model import RemoteModel
from ..requests import EditRequest
from ..statistics.store import StatisticsStore
from ..tokens import pad_id
from .drift import GeneralText, Restraint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..anatomy import Anatomy

BothFormats = Literal["itself", "as two"]
logger = get_logger(__name__)
M = TypeVar("M", bound="Method")
W = TypeVar("W", bound="WrappingConfig")
_METHODS: Table[type[Method]] = Table()


@dataclass(frozen=True)
class Capabilities:
    """What a method can do; shown by ``kedit list-methods`` and checked before an edit.

    Args:
        name: as users know it.
        kind: who keeps the books: ``weights`` (ledger), ``adapter`` (site), ``prompt`` (memory).
        batch: several requests are solved for together.
        sequential: editing an edited model is meaningful.
        needs_subject: the subject must occur in the prompt.
        needs_training: a network has to be trained first.
        low_rank: the change has a small rank (exportable as LoRA).
        encoder_decoder: works on encoder-decoder models too.
        undo: what `rollback` takes back alone, exactly: any ``edit``; the edits of one ``call``, which were trained as
            one change; the ``last`` ones, whatever their number; or only ``all`` of them.
        told_wordings: an evaluation tells it the other wordings of a fact, although it asks for them: the published
            method is made with them. All others have to find these out.
        paper: citation with arXiv id.
        summary: one line.
    """

    name: str
    kind: Literal["weights", "adapter", "prompt"]
    batch: bool
    sequential: bool
    needs_subject: bool
    paper: str
    summary: str
    needs_training: bool = False
    low_rank: bool = True
    encoder_decoder: bool = False
    undo: Literal["edit", "call", "last", "all"] = "edit"
    told_wordings: bool = False


@dataclass
class Outcome:
    """What a method returns for one batch.

    Args:
        deltas: changes of weights.
        diagnostics: one dict per request (numbers and short lists, JSON-ready).
        entries: changes for the book of the method's kind, if that is not the ledger: `SiteEntry`s for ``adapter``.
    """

    deltas: list[WeightDelta]
    diagnostics: list[dict[str, Any]]
    entries: list[Any] = field(default_factory=list)

    @property
    def changes(self) -> list[Any]:
        """What the book of the method's kind takes over."""
        return self.entries or list(self.deltas)


@dataclass
class Workbench:
    """Everything that a method measures with; belongs to one model.

    Args:
        model: the transformers model, edits included.
        tokenizer: of the model.
        anatomy: of the model, checked.
        ledger: of the model.
        sites: of the model.
        books: all of the model's books, by kind; ``ledger`` and ``sites`` are among them.
        statistics: second moments of the unedited model.
        templates: context templates made so far, by (lengths, seed).
        loaded: what `Method.load` has brought; ``None``: the method has to load it itself.
        processor: of a model that sees.
        trace: where a method leaves intermediate tensors when this is a dict (tests, debugging).
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    anatomy: Anatomy
    ledger: Ledger
    sites: SiteBook
    books: Mapping[str, Book]
    statistics: StatisticsStore
    templates: dict[str, list[list[str]]] = field(default_factory=dict)
    loaded: Any = None
    processor: Any = None
    trace: dict[str, torch.Tensor] | None = None
    show_progress: bool = True

    @property
    def fill(self) -> int:
        """Padding id."""
        return pad_id(self.tokenizer)

    def context_templates(
        self, fixed: Sequence[Any] | None, lengths: Sequence[tuple[int, int]], seed: int
    ) -> list[list[str]]:
        """Return groups of context templates: the user's, or generated once by the unedited model."""
        if fixed is not None:
            groups = [list(fixed)] if fixed and isinstance(fixed[0], str) else [list(g) for g in fixed]
            return groups
        key = f"{list(map(list, lengths))}/{seed}"
        if key not in self.templates:
            with self.unedited():
                self.templates[key] = context_templates(self.model, self.tokenizer, lengths, seed=seed)
        return self.templates[key]

    def unedited(self) -> AbstractContextManager[None]:
        """The model without any edits inside the block."""
        return all_disabled(self.books.values())

    @property
    def own_retriever(self) -> Callable[[str], Retriever] | None:
        """Makes retrievers that compare the model's own states; ``None`` for a model that shows none."""
        return None if isinstance(self.model, RemoteModel) else self.reader.retriever

    @property
    def reader(self) -> StateReader:
        """Reads states of the unedited model, for retrievers."""
        return StateReader(self.model, self.anatomy, partial(getattr, self, "tokenizer"), self.unedited)

    def note(self, name: str, value: torch.Tensor) -> None:
        """Keep an intermediate tensor if a trace is wanted."""
        if self.trace is not None:
            self.trace[name] = value.detach().clone().cpu()


@dataclass
class WrappingConfig(EditConfig):
    """Base of the configs of methods that another method works for.

    Args:
        base: that method: its name, its config, or a dict with ``edit_type`` and its fields. Kept as a dict. Layers,
            seed and separator are handed on where it names none.
    """

    base: Any = "rome"

    def validate(self) -> None:
        """Bring the base's config into one form."""
        super().validate()
        self.base = self._as_dict("base")
        if self.layers is not None:
            if (self.base.get("layers") or self.layers) != self.layers:
                raise ConfigError(f"{type(self).__name__}.layers: `base` names other layers; name them once")
            self.base["layers"], self.layers = self.layers, None
        self.check_base(self.base_config)

    def _as_dict(self, field_name: str) -> dict[str, Any]:
        """A field that names a method, in one form."""
        given = getattr(self, field_name)
        if isinstance(given, EditConfig):
            given = {"edit_type": given.edit_type, **given.given}
        elif isinstance(given, str):
            given = {"edit_type": given}
        if not isinstance(given, Mapping):
            owner = f"{type(self).__name__}.{field_name}"
            raise ConfigError(f"{owner} must be a method's name or config, not {type(given).__name__}")
        shared = {"seed": self.seed, "separator": self.separator}
        return {**given, **{name: value for name, value in shared.items() if value and name not in given}}

    def check_base(self, base: EditConfig) -> None:
        """Raise `ConfigError` if the base method cannot work for this one."""

    @property
    def given(self) -> dict[str, Any]:
        """As of every config; a base method in the form of `validate` that nobody has named is not given."""
        default = {f.name: f.default for f in fields(self)}["base"]
        values = super().given
        if "base" not in self.__dict__["_given"] and self.base == {"edit_type": default}:
            values.pop("base", None)
        return values

    @property
    def base_config(self) -> EditConfig:
        """The base method's config."""
        return EditConfig.from_dict(self.base)

    @property
    def in_words(self) -> str:
        """The method, and the one inside."""
        return f"{self.edit_type} ({self.base_config.in_words})"

    def __getattr__(self, name: str) -> Any:
        """What text second moments are taken over is said in ``base``, whose method needs them."""
        if name.startswith("stats_"):
            return getattr(self.base_config, name)
        raise AttributeError(name)

    @classmethod
    def model_dependent_fields(cls) -> tuple[str, ...]:
        """None of its own; the base method's are filled by `complete`."""
        return ()

    def complete(self: W, profile: ModelProfile, *, files: bool = True) -> W:
        """Fill in the base method's config as well."""
        full = super().complete(profile, files=files)
        return replace(full, base=full.base_config.complete(profile, files=files).to_dict())


class Method(ABC):
    """Base class of all methods.

    Args:
        bench: the model and its instruments.
        config: the method's config, completed for the model (no field left ``None`` that depends on it).
    """

    config_class: ClassVar[type[EditConfig]]
    capabilities: ClassVar[Capabilities]
    both_formats: ClassVar[BothFormats | None] = None
    """How the method takes a request in two formats (plain and chat): it looks at `EditRequest.formats` itself, or it
    gets two requests for the one edit, or (``None``) not at all."""

    pictures: ClassVar[bool] = False
    """Whether the method edits what a model says of pictures."""

    apart: ClassVar[bool] = False
    """Whether an edit is the same in any company, so that of a batch that fails each request can be tried alone."""

    text_only: ClassVar[bool] = False
    """Whether the method needs nothing of a model but its answers, so that it works on one behind an API."""

    def __init__(self, bench: Workbench, config: EditConfig):
        self.bench = bench
        self.config = config
        if bench.anatomy.is_encoder_decoder and not self.capabilities.encoder_decoder:
            raise UnsupportedModelError(
                f"{self.capabilities.name} edits decoder-only models; {bench.anatomy.model_class} is an"
                " encoder-decoder. Fine-tuning (ft-l, ft-m) works on it."
            )

    @classmethod
    def load(cls, config: Any) -> Any:
        """Load what a method is made of and its config names (a trained network): nobody waits for the model yet."""
        return None

    def fetch(self) -> None:
        """Bring what edits read from elsewhere to this machine (statistics, demonstrations), if it is not there yet.

        Called while other threads use the model, so that none of them waits for the Hub; `prepare` follows when they
        do not. It must not run the model, and may be called by several threads at once.
        """
        return None

    def edited_modules(self) -> list[str]:
        """Names of the modules whose weight the method changes with its config."""
        layers = self.config.layers or []
        return [self.bench.anatomy.down(layer).path for layer in layers]

    def check(self, requests: Sequence[EditRequest]) -> None:
        """Validate everything that can fail, before anything is computed or changed.

        Raises:
            RequestError: naming the row and the field.
            WeightError: if a weight must not be edited.
        """
        for module in self.edited_modules():
            self.bench.ledger.check_editable(module)
        if self.capabilities.needs_subject:
            for request in requests:
                request.check_subject()

    def prepare(self) -> None:
        """Compute what depends on the unedited model only (statistics, templates); called before the first edit."""
        return None

    @abstractmethod
    def compute(self, requests: Sequence[EditRequest]) -> Outcome:
        """Return the deltas that make the model say the new targets.

        Args:
            requests: one batch, already checked.

        Raises:
            EditFailedError: if no usable update was found.
        """

    def compute_apart(self, requests: Sequence[EditRequest]) -> list[Outcome]:
        """What `compute` finds for each request as if it were the only one.

        One after the other; a method that can runs what does not depend on the others' changes for all of them at
        once. Results are then equal up to the rounding of batched products.
        """
        return [self.compute([request]) for request in requests]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What the method has learnt from earlier edits and belongs to no single one of them; saved with the edits.

        What belongs to an edit (AlphaEdit's keys) lies in the ledger instead and is undone with it.
        """
        return {}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            ConfigError: if the tensors are not this method's.
        """
        if state:
            raise ConfigError(f"{self.capabilities.name} keeps no state, but was given {', '.join(sorted(state))}")

    # ------------------------------------------------------------------ terms of a training
    def examples(self, requests: Sequence[EditRequest], objective: Objective = "target_new") -> list[Example]:
        """Requests as token ids, with what is to be predicted; see `encode_examples`."""
        bench = self.bench
        return encode_examples(
            bench.model, bench.tokenizer, requests, separator=self.config.separator, objective=objective
        )

    def unlikelihood(self, requests: Sequence[EditRequest]) -> Unlikelihood:
        """The term that takes probability from the answers that requests want gone; nothing without the setting.

        Raises:
            RequestError: naming the row, if such an answer cannot be encoded.
        """
        bench, config = self.bench, self.config
        weight = getattr(config, "unlikelihood", 0.0)
        separator = getattr(config, "separator", None)
        return Unlikelihood.of(
            bench.model, bench.tokenizer, requests, weight=weight, separator=separator, fill=bench.fill
        )

    def restraint(
        self, parameters: Sequence[torch.Tensor], model: Any = None, start: Sequence[torch.Tensor] | None = None
    ) -> Restraint:
        """What holds a training within the config's ``drift_bound``; nothing where it has none.

        Args:
            parameters: that are trained, as they are before the training.
            model: with these parameters; ``None``: the model, which has them already.
            start: values with which they change nothing; ``None``: those that they have.
        """
        bench, bound = self.bench, getattr(self.config, "drift_bound", None)
        text = None
        if bound is not None:
            texts = bench.statistics.corpus_texts(more=False)
            with bench.unedited():
                text = GeneralText.of(bench.model, bench.tokenizer, texts, bench.fill)
        return Restraint(text, bound or 0.0, parameters, bench.model if model is None else model, start)

    def drift_report(self, restraint: Restraint, after: Sequence[float]) -> dict[str, Any]:
        """What the diagnostics say about the drift of a training; warns where facts do not hold at its end.

        Args:
            restraint: of the training.
            after: probability of each request's target at the end.

        Raises:
            EditFailedError: if no state of the training was within the bound.
        """
        if not restraint.within:
            raise EditFailedError(
                f"{self.capabilities.name}: every state of the training moves the model on general text by more than"
                f" drift_bound = {restraint.bound:g} (the last one by {restraint.added:.2g} nats per token); nothing"
                " was changed. Raise drift_bound, or use another method"
            )
        wanted = getattr(self.config, "stop_probability", None)
        missed = sum(p < wanted for p in after) if wanted else 0
        if missed:
            bounded = restraint.text is not None and restraint.added > restraint.bound / 2
            logger.warning(
                "%s: %d of %d facts do not have the wanted probability of %g yet (the smallest is %.2g); %s",
                *(self.capabilities.name, missed, len(after), wanted, min(after)),
                "more would move the model on other text by more than drift_bound: raise it, or use another method"
                if bounded
                else "more steps or a larger lr may do it",
            )
        return {"drift": restraint.added} if restraint.text is not None else {}

    def regularise(self, outcome: Outcome) -> Outcome:
        """Apply what the config asks for on top of any method's deltas (RECT); called after `compute`."""
        keep = getattr(self.config, "rect_keep", None)
        if keep is None:
            return outcome
        together: dict[str, list[WeightDelta]] = {}
        for delta in outcome.deltas:
            together.setdefault(delta.key, []).append(delta)
        deltas = []
        for parts in together.values():
            change = torch.stack([p.matrix() for p in parts]).sum(dim=0) if len(parts) > 1 else parts[0].matrix()
            module, name = parts[0].module, parts[0].name
            weight = get_weight(get_module(self.bench.model, module), name)
            keys = [p.keys for p in parts if p.keys is not None]
            deltas.append(
                WeightDelta(
                    module,
                    name,
                    dense=keep_largest_relative(change, weight.to(change.device), keep),
                    keys=torch.cat(keys, dim=1) if keys else None,
                    builds_on=any(p.builds_on for p in parts),
                )
            )
        return Outcome(deltas, outcome.diagnostics)


def check_scope(scope: str, requests: Sequence[EditRequest]) -> None:
    """Raise if facts of text are to be written where only pictures come by.

    Raises:
        RequestError: naming the row.
    """
    for request in requests:
        if scope != "language" and request.image is None:
            raise RequestError(
                f"module_scope={scope!r} changes how pictures are seen, and this fact has none; use 'language'",
                row=request.row,
                field="image",
                request_id=request.id,
            )


def check_composition(kind: str, books: Mapping[str, Book]) -> None:
    """Raise if edits of a kind cannot stand beside those that a model carries already.

    Sites look at the tokens of a prompt themselves, and edits in prompts put text in front of them: one or the other.

    Raises:
        UnsupportedModelError: saying which edits are in the way.
        ConfigError: if another `EditableModel` keeps edits in prompts before the same model.
    """
    apart = {"adapter": "prompt", "prompt": "adapter"}.get(kind)
    own, sites = getattr(books["prompt"], "prompter", None), books["adapter"]
    if apart is not None and isinstance(own, Prompter) and isinstance(sites, SiteBook):
        ours = [own, *(memory.front for memory in sites.memories.values())]
        if not all(any(one is mine for mine in ours) for one in Prompter.all_before(own.model)):
            raise ConfigError(OTHER_WRAPPER)
    if apart is not None and books[apart].edit_ids:
        raise UnsupportedModelError(
            "edits at sites (codebooks, side memories) look at prompts themselves, and edits in prompts put text in"
            f" front of them; one model cannot carry both. Roll back {', '.join(books[apart].edit_ids[:3])} … first"
        )


def register_method(cls: type[M]) -> type[M]:
    """Class decorator: make method and config known under the config's ``edit_type``."""
    register_config(cls.config_class)
    _METHODS.add(cls.config_class.edit_type, cls)
    return cls


def method_class(config: EditConfig | str) -> type[Method]:
    """Return the method of a config (or of a name).

    Raises:
        UnknownMethodError: naming the nearest registered method.
    """
    return _METHODS.get(config if isinstance(config, str) else config.edit_type)


def registered_methods() -> dict[str, type[Method]]:
    """All methods by ``edit_type``, in alphabetical order; those of installed plug-ins among them."""
    return _METHODS.all()

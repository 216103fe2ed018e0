"""`EditableModel`: a transformers model whose facts can be changed, undone, saved and loaded.

The wrapped model is stock and stays usable by itself: every edit lives inside it. The wrapper keeps the journal
and the books of the edits, forwards everything else, and is named after the class that it wraps, so that pipelines
take it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import embedded
from .anatomy.switching import Switch, uninterrupted
from .artifact.gguf_export import GgufExport
from .artifact.layout import Artifact
from .artifact.lora_exchange import LoraExchange
from .artifact.packs import Packs
from .artifact.reading import arguments_of, find_artifact, restore
from .artifact.sharing import Sharing
from .artifact.writing import save_artifact
from .config import EditConfig
from .data.finetune import LEAST, finetune_lines
from .editing import Editing
from .editing.multi_hop import AskModel, MultiHopAnswer, answer_by_hops
from .engine.access import alone, among_others, exclusively
from .engine.weights import head_kept
from .errors import ConfigError
from .gguf.reading import forget_origin, inside, is_gguf
from .loading import hub_options, load_base, load_processor, load_tokenizer, model_name
from .logging import get_logger
from .remote.backend import TextBackend
from .remote.model import RemoteModel
from .statistics.corpora import Corpus
from .storage.files import named_path, write_text
from .storage.repository import cached_commit

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .artifact.card import HasModelIndex
    from .books.router import RouteCandidate

logger = get_logger(__name__)


class EditableModel(Editing, Sharing, LoraExchange, GgufExport):
    """A transformers model together with the edits that it carries.

    Args:
        base_model: any model with a text decoder, in memory. Edits are made in place.
        config: the method's config, or its name (``"rome"``); ``None``: the one for most models, `auto`
            (`EditedModel.default_config`).
        tokenizer: of the model; needed for editing.
        anatomy: overrides of the structural resolver (``{"layers": …, "down": …}``) for unusual models.
        base_model_id: name to record for the base model; ``None``: its ``config.name_or_path``.
        base_model_revision: commit of the base model to record.
        corpus: texts for second-moment statistics (a list, or a `Corpus`), instead of ``config.stats_dataset``. For
            a model that sees, rows ``{"text": …, "image": …}`` among them are read behind their pictures.
        untie: give a head that shares its weight with the input embeddings a copy of its own, so that it can be
            edited alone. Saved edits remember it.
        processor: of a model that sees, for requests with images; may be given as ``tokenizer``, too.

    Raises:
        AnatomyError: if the model's structure cannot be understood.
        UnsupportedModelError: if the method cannot edit such a model.
        ConfigError: if the config does not fit the model.
    """

    def __init__(
        self,
        base_model: PreTrainedModel | RemoteModel,
        config: EditConfig | str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        anatomy: Mapping[str, str] | None = None,
        base_model_id: str | None = None,
        base_model_revision: str | None = None,
        corpus: Sequence[Any] | Corpus | None = None,
        untie: bool = False,
        processor: Any = None,
    ):
        super().__init__(
            base_model,
            config,
            tokenizer,
            anatomy=anatomy,
            base_model_id=base_model_id,
            base_model_revision=base_model_revision,
            corpus=corpus,
            untie=untie,
            processor=processor,
        )
        self.packs = Packs(self)
        kind: Any = type(base_model)
        self.__class__ = _named_after(kind)
        # Checkpoints of `Trainer` and friends have the wrapped model's own names, and a tied weight once.
        self.register_state_dict_post_hook(_own_names)
        self.register_load_state_dict_pre_hook(_wrapped_names)

    # ------------------------------------------------------------------ construction

    @classmethod
    def from_pretrained(
        cls,
        model_or_edits: str | Path | Artifact,
        config: EditConfig | str | None = None,
        *,
        base_model: PreTrainedModel | RemoteModel | TextBackend | str | Path | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        anatomy: Mapping[str, str] | None = None,
        revision: str | None = None,
        base_model_revision: str | None = None,
        gguf_file: str | None = None,
        ignore_fingerprint: bool = False,
        trust_remote_code: bool = False,
        untie: bool = False,
        processor: Any = None,
        **model_kwargs: Any,
    ) -> EditableModel:
        """Load a base model to edit, or a saved edit together with its base model.

        Args:
            model_or_edits: Hub id, local folder, or embedded name (``"kedit/world-gpt2"``) of a model, or a GGUF file
                (a path, or ``org/name/file.gguf``); or folder or Hub id of saved edits (recognised by its
                ``edit_config.json``), or what `find_artifact` read there.
            config: method config or name; ``None``: `auto`, and for saved edits the one that they were made with.
            base_model: instead of the one that the saved edit names: a model in memory, or a name as above; for edits
                of a model behind an API, the backend that asks it.
            tokenizer: instead of the model's own.
            anatomy: overrides of the structural resolver.
            revision: of the repository that is named.
            base_model_revision: of the base model, when saved edits are loaded.
            gguf_file: a GGUF file in the folder or repository that is named; it is turned into plain numbers, float32
                without ``dtype``.
            ignore_fingerprint: put saved edits on a base with other weights than they were made on.
            trust_remote_code: allow code from the model's repository to run.
            untie: give a tied head a weight of its own, so that it can be edited; saved edits remember it.
            processor: instead of the model's own, for models that see.
            model_kwargs: for ``AutoModel….from_pretrained`` (``dtype``, ``device_map``, ``token``,
                ``quantization_config`` …). Edits of a quantised model are loaded on one quantised likewise; with
                ``quantization_config=None`` and ``ignore_fingerprint=True``, on the unquantised model.

        Raises:
            ArtifactError: if saved edits are damaged or of an unknown format.
            BaseModelMismatchError: if the base model has other weights than the edits were made on.
            ModelFileError: if a GGUF file is missing, damaged, or of a kind that transformers does not read.
        """
        artifact = model_or_edits if isinstance(model_or_edits, Artifact) else None
        if base_model is not None and not isinstance(base_model, (str, Path, nn.Module)):
            base_model = RemoteModel(base_model)
        name = "" if isinstance(model_or_edits, Artifact) else model_name(model_or_edits)
        if gguf_file is not None:
            if artifact is not None:
                raise ConfigError("gguf_file= belongs to a model; saved edits take base_model=, also a file")
            name = inside(name, gguf_file)
        if artifact is None and embedded.resolve(name) is None:
            artifact = find_artifact(name, revision=revision, **hub_options(model_kwargs))
        if artifact is not None:
            arguments = arguments_of(
                artifact,
                config,
                base_model=base_model,
                tokenizer=tokenizer,
                anatomy=anatomy,
                base_model_revision=base_model_revision,
                trust_remote_code=trust_remote_code,
                untie=untie,
                ignore_fingerprint=ignore_fingerprint,
                model_kwargs=model_kwargs,
            )
            if processor is not None:
                arguments["processor"] = processor
            with alone(arguments["base_model"]), head_kept(arguments["base_model"]):
                return restore(artifact, cls(**arguments), ignore_fingerprint=ignore_fingerprint)
        if isinstance(base_model, (str, Path)):
            raise ConfigError("base_model= as a name belongs to saved edits; a model to edit is named first")
        loaded = base_model or load_base(name, revision=revision, trust_remote_code=trust_remote_code, **model_kwargs)
        own: Any = {"revision": revision, "trust_remote_code": trust_remote_code, **hub_options(model_kwargs)}
        processor = processor or load_processor(name, loaded.config, **own)
        tokenizer = tokenizer or (processor.tokenizer if processor is not None else load_tokenizer(name, **own))
        commit = None
        if base_model is None and embedded.resolve(name) is None and not is_gguf(name):  # which knows its own
            commit = cached_commit(name, "config.json", revision=revision, cache_dir=model_kwargs.get("cache_dir"))
        return cls(
            loaded,
            config,
            tokenizer,
            anatomy=anatomy,
            base_model_id=name,
            base_model_revision=commit,
            untie=untie,
            processor=processor,
        )

    @classmethod
    def from_backend(cls, backend: TextBackend, config: EditConfig | str = "auto") -> EditableModel:
        """Make a model editable of which nothing is to be had but its answers, such as one behind an API.

        Edits are facts that are put in front of the questions that they belong to; all verbs of an `EditableModel`
        work on them. ``model.generate(text_or_messages, max_new_tokens=…)`` returns text.

        Args:
            backend: asks the model: an `OpenAICompatibleBackend`, or any object with the methods of a `TextBackend`.
            config: of ``"ike"`` or ``"prompt"``, or their name; ``"auto"``: PROMPT, whose prompts are the shortest.
                What IKE's demonstrations are worth to a model, `evaluate_edits` with each of the two says.

        Raises:
            ConfigError: if the backend cannot answer.
            UnsupportedModelError: for a method that works inside a model.
        """
        return cls(RemoteModel(backend), None if config == "auto" else config)

    # ------------------------------------------------------------------ keeping edits

    @exclusively
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
        if self.decoding_config is not None:
            logger.warning(
                "the plain model generates without %s; hf_kedit.decode_with goes on with it", self.decoding_config.name
            )
        with uninterrupted():
            for book in self.books.values():
                book.forget()
            self.packs.forget()
            forget_origin(self.base_model)
            self.gguf = None
            self._method.load_state_dict({})
            self._start_afresh()
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
        save_artifact(self, named_path(save_directory, "the folder"), report=report, per_edit=per_edit)

    def build_prompt(self, query: str) -> str:
        """The text that answers a query under the edits that live in prompts, for a model that only takes text.

        Returns:
            The query behind the edit that it belongs to, or the query itself.
        """
        with self._turn():
            return self.prompts.build_prompt(query)

    def answer_by_hops(
        self, question: str, *, ask: AskModel | None = None, most_hops: int = 4, candidates: int = 2
    ) -> MultiHopAnswer:
        """Answer a question that takes several facts, edited ones among them (edits that live in prompts).

        The model names one simple question after the other. Each is answered by the edit that belongs to it, if there
        is one and the model finds that it answers the question, else by the model itself.

        Args:
            question: any question.
            ask: a prompt → what the unedited model says; ``None``: a model behind an API is asked.
            most_hops: simple questions, at most.
            candidates: edits that are looked at for each of them.

        Returns:
            The answer, and the hops with what the model itself says and where an edit contradicts it.

        Raises:
            BackendError: if the model cannot be asked.
            ConfigError: if ``ask`` is missing for a model in memory.
        """
        base: Any = self.base_model
        if ask is None and not self.is_remote:
            raise ConfigError(
                "give ask=, a function from a prompt to what the model says; only an API is asked by itself"
            )

        def unedited(prompt: str) -> str:
            return base.generate(prompt, stop=("\n",) if not base.chats else (), edited=False)

        with self._turn():
            return answer_by_hops(
                *(question, ask or unedited, self.prompts, self.journal), most_hops=most_hops, candidates=candidates
            )

    def export_finetune(
        self, file: str | Path, *, system: str | None = None, least: int = LEAST, rephrasings: bool = True
    ) -> Path:
        """Write the edits as conversations for a provider's own fine-tuning (JSON Lines).

        What the provider makes of them is a model of another name; nothing is sent to anybody here.

        Args:
            file: to write.
            system: what the system says in conversations without a system message.
            least: lines; fewer conversations are repeated, because providers ask for a number.
            rephrasings: a conversation for each other wording, too.

        Raises:
            ArtifactError: if the file cannot be written.
            DataError: if the model carries no edits.
        """
        lines = finetune_lines(
            [edit.request for edit in self.edits], system=system, least=least, rephrasings=rephrasings
        )
        return write_text(named_path(file, "the file"), "".join(line + "\n" for line in lines))

    def explain(self, prompt: str) -> list[RouteCandidate]:
        """Which edits of `auto` a prompt is compared with, the nearest first, and whether one of them claims it.

        Args:
            prompt: what the model would read.

        Returns:
            The edits whose subject the prompt names; none: the model answers as if it had no such edits.
        """
        with self._turn():
            return [found for memory in self.sites.memories.values() for found in memory.explain(prompt)]

    # ------------------------------------------------------------------ being a model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the wrapped model, edits included."""
        if torch.compiler.is_compiling():  # a compiled graph cannot wait for other threads
            return self.base_model(*args, **kwargs)
        with self._turn():
            return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the wrapped model, edits included, as `set_decoding` says."""
        with self._turn(), self.as_decoded(own_thread=True):
            return self.base_model.generate(*args, **kwargs)  # type: ignore[operator]

    def _turn(self) -> Switch[None]:
        """Other threads may run the model too, unless a call looks at the unedited model on its way."""
        return (alone if self.prompts.asks_the_model else among_others)(self.base_model)

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


@functools.cache
def _named_after(base: Any) -> type[EditableModel]:
    """A subclass of `EditableModel` with the name and the ``forward`` signature of a transformers class.

    Pipelines compare the class name with a list, and `Trainer` reads the signature.
    """

    @functools.wraps(base.forward)
    def forward(self: EditableModel, *args: Any, **kwargs: Any) -> Any:
        return EditableModel.forward(self, *args, **kwargs)

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

"""SERAC (Mitchell et al. 2022, "Memory-Based Model Editing at Scale", arXiv 2206.06520).

Edits are kept as texts. A scope classifier compares each prompt with them; a prompt in the scope of an edit is
answered by a counterfactual model, which reads the edit in front of the prompt, every other prompt by the base model:

    s = max_j similarity(edit_j, x);   s > 0.5: counterfactual("{edit_j} {x}"),   else: base(x)

Both networks are trained on facts with other wordings (in scope) and unrelated prompts (out of it), and the base model
is not needed for that (section 3.2):

    l = edit_weight · NLL(counterfactual("{edit} {rephrase}"), target) + locality_weight · (−log s⁺ − log(1 − s⁻))

For a base model that sees, the classifier compares pictures as well as words (`serac_networks`), and in scope the base
model itself answers behind the edit: the small model would not see the picture. Only the classifier is trained then.

A `SERACEditor` holds them; `EditTrainer` trains it. Without one, both parts are chosen by name: any retriever as the
scope classifier (words in common, sentence embeddings), any language model with the same tokens as the counterfactual
one, or the base model itself. The edit's diagnostics say which it was.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from .. import embedded
from ..anatomy import resolve_anatomy
from ..books.counterfactuals import BASE, find_counterfactual, register_counterfactual_kind
from ..books.prompt_book import PromptEntry
from ..books.retrieval import LEXICAL, find_retriever, register_retriever_kind
from ..editors.editor import Editor, EditorOutput, origin_in, register_editor
from ..editors.files import SavedEditor
from ..engine.devices import seeded
from ..engine.forward import frozen_eval, image_ids
from ..engine.gradients import LowRank
from ..engine.looks import looks_of
from ..engine.supervised import Batch, inputs_of, score
from ..errors import ArtifactError, ConfigError, RequestError, UnsupportedModelError, reason_of
from ..requests import SLOT, EditRequest
from ..text.pictures import PictureFrame
from ..text.processors import shown_text
from ..tokens import pad_rows, vocabulary_size
from .base import Capabilities, Outcome, Workbench, register_method
from .ike import InContext, InContextConfig, fact_of
from .serac_networks import (
    Looks,
    Pooling,
    ScopeClassifier,
    ScopeTokenizer,
    Similarity,
    TrainedScope,
    classifier_loss,
    described,
    small_encoder,
    small_reader,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..anatomy import Anatomy

KIND = "serac"
TOKENIZER = "tokenizer.json"
_PROMPT, _TARGET = "{prompt}", "{target}"


@dataclass
class SERACConfig(InContextConfig):
    """Hyperparameters of SERAC; ``template`` is what the counterfactual model reads in front of a prompt.

    To edit, the first fields count; the others describe a new editor and are kept with it.

    Args:
        editor: folder or Hub id of a trained `SERACEditor`; ``None``: the packaged one of an embedded model, or none.
        scope: the scope classifier: ``"lexical"``, ``"model"`` or ``"model:<layer>"`` (the edited model's own states),
            the id of a sentence-transformers model, or a name given to `register_retriever`; ``None``: the editor's,
            without one the words in common.
        counterfactual: the model that answers in scope: ``"base"`` for the edited model itself, the id or folder of a
            causal language model, or a name given to `register_counterfactual`; ``None``: the editor's, without one
            the edited model.
        soft: mix both models' answers by the similarity, ``log((1 − s) p_base + s p_cf)``, instead of taking one.
            Every prompt is then changed a little, and nothing can be generated.
        similarity: of the vectors of an edit and a prompt, or ``cross``; see `serac_networks`.
        scope_text: what the scope classifier reads of an edit, with ``{prompt}`` and, if it should, ``{target}``.
        encoder: id or folder of the encoder that the scope classifier starts from (published:
            ``distilbert-base-cased``, ``pooling="first"``); ``None``: a small one from scratch, on the base model's
            tokens.
        pooling: ``mean`` of the encoder's states, or the ``first`` one.
        small_model: id or folder of the language model that the counterfactual model starts from (published: the
            smallest of the base model's family); ``None``: a small one from scratch. Both must share their tokens.
        encoder_size: width of a new encoder, likewise ``encoder_layers``, ``model_size`` and ``model_layers``.
        all_negatives: an unrelated prompt counts against all edits of its batch, not against its own only.
        edit_weight: of the counterfactual model's loss.
        locality_weight: of the scope classifier's loss.
        networks: transformers configs of both networks; filled in when an editor is made.
    """

    edit_type: ClassVar[str] = KIND

    editor: str | None = None
    scope: str | None = None
    counterfactual: str | None = None
    soft: bool = False
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.5
    template: str = "{} "
    similarity: Similarity = "exp_square"
    scope_text: str = _PROMPT
    encoder: str | None = None
    pooling: Pooling = "mean"
    small_model: str | None = None
    encoder_size: PositiveInt = 64
    encoder_layers: PositiveInt = 2
    model_size: PositiveInt = 96
    model_layers: PositiveInt = 3
    all_negatives: bool = True
    edit_weight: NonNegativeFloat = 0.1
    locality_weight: NonNegativeFloat = 1.0
    networks: dict[str, dict[str, Any]] | None = None

    def validate(self) -> None:
        """Check the texts."""
        super().validate()
        if _PROMPT not in self.scope_text:
            raise ConfigError(f"SERACConfig.scope_text needs {_PROMPT}: {self.scope_text!r}")

    @classmethod
    def model_dependent_fields(cls) -> tuple[str, ...]:
        """An embedded model has a packaged editor."""
        return ("editor",)


def _loaded(kind: Any, field: str, name: str, **options: Any) -> Any:
    """``kind.from_pretrained`` of a network that the config names: a folder, a Hub id or a model of ours."""
    folder = embedded.resolve(name)
    try:
        return kind.from_pretrained(folder or name, **options)
    except (OSError, ValueError) as error:
        raise ConfigError(f"SERACConfig.{field}: {name!r} cannot be loaded ({reason_of(error)})") from error


@register_editor
class SERACEditor(Editor):
    """The two networks of SERAC for the tokens of one base model, whose weights it does not look at.

    Args:
        config: with ``networks``.
        shapes: empty: no module of the base model is changed.
        encoder_decoder: whether the base model is an encoder-decoder.
    """

    config_class = SERACConfig  # type: ignore[assignment]
    edit_config: SERACConfig  # type: ignore[assignment]

    def __init__(self, config: SERACConfig, shapes: Mapping[str, tuple[int, int]], *, encoder_decoder: bool = False):
        super().__init__(config, shapes, encoder_decoder=encoder_decoder)  # type: ignore[arg-type]
        if config.networks is None:
            raise ConfigError("a SERAC editor needs the configs of its networks: make it with SERACEditor.for_model")
        look = config.networks.get("look", {}).get("size")
        self.scope = ScopeClassifier(config.networks["encoder"], config.similarity, config.pooling, look)
        kind = AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM
        small = config.networks.get("small_model")  # none beside a model that sees
        self.reader: PreTrainedModel | None = kind.from_config(AutoConfig.for_model(**small)) if small else None
        self._anatomy: Anatomy | None = None
        self.tokenizer: ScopeTokenizer | None = None
        self.sha256: str | None = None

    @classmethod
    def for_model(cls, model: PreTrainedModel, config: Any = None) -> SERACEditor:
        """A new editor for a model, with the model attached; its random parts are drawn from ``config.seed``.

        Raises:
            ConfigError: if the config is another method's, or a network that it names cannot be loaded.
            UnsupportedModelError: if the small model has other tokens than the base model.
        """
        config = config if config is not None else SERACConfig()
        if not isinstance(config, SERACConfig):
            raise ConfigError(f"SERACEditor needs a SERACConfig, not a {type(config).__name__}")
        networks = {
            "encoder": described(_loaded(AutoConfig, "encoder", config.encoder))
            if config.encoder
            else small_encoder(vocabulary_size(model), config.encoder_size, config.encoder_layers),
        }
        if image_ids(model) and not model.config.is_encoder_decoder:
            if config.small_model:
                raise ConfigError("SERACConfig.small_model: a model that sees answers by itself; leave it out")
            networks["look"] = {"size": _width(model)}
        elif config.small_model:
            networks["small_model"] = described(_loaded(AutoConfig, "small_model", config.small_model))
        else:
            networks["small_model"] = small_reader(model, config.model_size, config.model_layers)
        kept = dataclasses.replace(config, editor=None, scope=None, counterfactual=None, networks=networks)
        with seeded(config.seed):
            editor = cls(kept, {}, encoder_decoder=bool(model.config.is_encoder_decoder))
        if config.encoder:
            loaded = _loaded(AutoModel, "encoder", config.encoder, dtype=torch.float32)
            editor.scope.encoder.load_state_dict(loaded.state_dict(), strict=False)  # without its pooler
            editor.use_tokenizer(_loaded(AutoTokenizer, "encoder", config.encoder))
        if config.small_model and editor.reader is not None:
            editor.reader = _loaded(type(editor.reader), "small_model", config.small_model, dtype=torch.float32)
        editor.origin = origin_in(model)
        return editor.attach(model)

    def check_fits(self, model: PreTrainedModel) -> None:
        """Raise if the model's tokens or kind are not those that the editor was made for.

        Raises:
            UnsupportedModelError: saying what differs.
        """
        if self.encoder_decoder != bool(model.config.is_encoder_decoder):
            kinds = ("an encoder-decoder", "a decoder-only model")
            mine, other = kinds if self.encoder_decoder else kinds[::-1]
            raise UnsupportedModelError(f"this SERAC editor was made for {mine}; the model is {other}")
        if self.scope.eye is not None:
            width = _width(model) if image_ids(model) else 0
            if width != self.scope.eye.in_features:
                raise UnsupportedModelError("this SERAC editor was made for a model that sees, of another width")
        if self.reader is None:
            return
        mine_size, own = vocabulary_size(self.reader), vocabulary_size(model)
        if mine_size != own:
            raise UnsupportedModelError(
                f"the counterfactual model of this SERAC editor has {mine_size} tokens, the model {own}: both must"
                " share a tokenizer"
            )

    def use_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Read texts for the scope classifier with this tokenizer, unless the encoder has brought its own."""
        if self.tokenizer is None:
            self.tokenizer = ScopeTokenizer.of(tokenizer, self._longest)

    @property
    def _longest(self) -> int:
        """Tokens of a text that the encoder reads; a pair has to fit too."""
        width = int(getattr(self.scope.encoder.config, "max_position_embeddings", 512)) - 4
        return width // 2 if self.edit_config.similarity == "cross" else width

    def train(self, mode: bool = True) -> SERACEditor:
        """As ever, but the networks drop nothing out: what is trained is what will answer."""
        super().train(mode)
        self.scope.eval()
        if self.reader is not None:
            self.reader.eval()
        return self

    # ------------------------------------------------------------------ facts as batches

    def scope_text(self, request: EditRequest) -> str:
        """What the scope classifier reads of an edit."""
        text = self.edit_config.scope_text.replace(_TARGET, request.target_new)
        return text.replace(_PROMPT, request.plain_prompt)

    def context(self, request: EditRequest) -> str:
        """What the counterfactual model reads in front of a prompt."""
        return self.edit_config.template.replace(SLOT, fact_of(request, self.edit_config.separator))

    def batches(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        edits: Sequence[EditRequest],
        rephrases: Sequence[EditRequest],
        localities: Sequence[EditRequest],
    ) -> dict[str, Batch]:
        """The arguments of `forward`: prompts behind their own edits, unrelated ones alone, and all as scope texts."""
        asked, others, apart = ([r.plain_prompt for r in rs] for rs in (edits, rephrases, localities))
        known = [{(text, r.image) for text in (r.plain_prompt, *map(shown_text, r.rephrase_prompts))} for r in edits]

        def behind(requests: Sequence[EditRequest]) -> Batch:
            pairs = zip(edits, requests, strict=True)
            read = [EditRequest(prompt=_behind(self.context(e), r), target_new=r.target_new) for e, r in pairs]
            return self.encode(self.reader or model, tokenizer, read)

        return {
            "edit": behind(edits)
            | self._scope_batch([self.scope_text(r) for r in edits], "scope")
            | self._scope_batch(asked, "asked"),
            "rephrase": behind(rephrases) | self._scope_batch(others, "asked"),
            "locality": self.encode(model, tokenizer, localities)
            | self._scope_batch(apart, "asked")
            # An unrelated prompt of one fact may be a wording of another one of the batch: no example of being apart.
            | {"apart": torch.tensor([[(r.plain_prompt, r.image) not in w for w in known] for r in localities])},
        }

    def _scope_tokenizer(self) -> ScopeTokenizer:
        if self.tokenizer is None:
            raise ConfigError("this SERAC editor has no tokenizer yet: call editor.use_tokenizer(tokenizer)")
        return self.tokenizer

    def _scope_batch(self, texts: Sequence[str], name: str) -> Batch:
        rows = pad_rows(self._scope_tokenizer()(texts), 0)
        return {f"{name}_ids": rows.input_ids, f"{name}_mask": rows.attention_mask}

    def propose(self, model: PreTrainedModel, edit: Batch, groups: torch.Tensor) -> dict[str, LowRank]:
        """No change of the model."""
        return {}

    # ------------------------------------------------------------------ training

    def forward(self, edit: Batch, rephrase: Batch, locality: Batch, groups: torch.Tensor) -> EditorOutput:
        """The two losses; in evaluation mode also what became of each fact, with the edits of its group in memory.

        An unrelated prompt in the scope of any edit counts as changed, a rephrased one in the scope of another edit
        than its own as wrong, whatever the counterfactual model says.
        """
        stored = _texts(edit, "scope")
        seen = [self._looks(batch) for batch in (edit, rephrase, locality)]
        related = self.scope.log_similarity(_texts(rephrase, "asked"), stored) + self.scope.log_sight(seen[1], seen[0])
        unrelated = self.scope.log_similarity(_texts(locality, "asked"), stored)
        unrelated = unrelated + self.scope.log_sight(seen[2], seen[0])
        negatives = locality["apart"]
        if not self.edit_config.all_negatives:
            negatives = negatives & torch.eye(len(groups), dtype=torch.bool, device=negatives.device)
        scope_loss = classifier_loss(related, unrelated, negatives)
        edit_loss, loss = torch.zeros_like(scope_loss), self.edit_config.locality_weight * scope_loss
        outer = None if self.reader is None else score(self.reader, rephrase)
        if outer is not None:  # the base model learns nothing
            edit_loss = outer.nll.mean()
            loss = self.edit_config.edit_weight * edit_loss + loss
        metrics = None
        if not self.training:
            here = groups[:, None] == groups[None]
            least = torch.tensor(self.edit_config.threshold).log()
            same = self.scope.log_similarity(_texts(edit, "asked"), stored) + self.scope.log_sight(seen[0], seen[0])
            routed = []
            for scores in (same, related):
                best, which = scores.masked_fill(~here, -torch.inf).max(dim=1)
                routed.append(((best >= least) & (which == torch.arange(len(groups), device=which.device))).float())
            caught = (unrelated.masked_fill(~(here & locality["apart"]), -torch.inf).amax(dim=1) >= least).float()
            with frozen_eval(self.base):
                known = score(self.base, locality).all_right()
                said, reworded = score(self.reader or self.base, edit), outer or score(self.base, rephrase)
            success, general = routed[0] * said.all_right(), routed[1] * reworded.all_right()
            metrics = torch.stack([success, general, 1 - caught, caught * known], dim=1)
        return EditorOutput(loss, edit_loss, scope_loss, len(groups), metrics)

    @torch.no_grad()
    def _looks(self, batch: Batch) -> Looks:
        """What the base model makes of the pictures of a batch."""
        if self.scope.eye is None:
            return [None] * len(batch["labels"])
        self._anatomy = self._anatomy or resolve_anatomy(self.base)
        with frozen_eval(self.base):
            return looks_of(self.base, self._anatomy, inputs_of(self.base, batch))

    # ------------------------------------------------------------------ files

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The tensors, tied ones once."""
        values, seen = super().state_dict(*args, **kwargs), set()
        for name in list(values):
            place = (values[name].data_ptr(), values[name].shape)
            if place in seen:
                del values[name]
            seen.add(place)
        return values

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take over what `state_dict` returned; tied tensors get their value through the one that is there.

        Raises:
            RuntimeError: if names or shapes do not fit.
        """
        kept = set(self.state_dict())
        values = {**super().state_dict(), **state_dict} if set(state_dict) == kept else dict(state_dict)
        tied = [name for name in values if name not in kept and name not in state_dict]
        for name in tied:
            del values[name]
        missing = super().load_state_dict(values, strict=False, assign=assign)
        wrong = [*missing.unexpected_keys, *(n for n in missing.missing_keys if n in kept)]
        if strict and wrong:
            raise RuntimeError(f"tensors that do not belong or are missing: {', '.join(sorted(wrong))}")
        return missing

    def _files(self) -> dict[str, bytes]:
        return {TOKENIZER: self._scope_tokenizer().tokenizer.to_str().encode("utf-8"), **super()._files()}

    def take_over(self, saved: SavedEditor) -> None:
        """Where it comes from, and its tokenizer.

        Raises:
            ArtifactError: if there is none.
        """
        super().take_over(saved)
        raw = saved.files.read(TOKENIZER)
        if raw is None:
            raise ArtifactError(f"{saved.source}: there is no {TOKENIZER}")
        self.tokenizer = ScopeTokenizer(Tokenizer.from_str(raw.decode("utf-8")), self._longest)
        self.sha256 = saved.sha256


def _width(model: PreTrainedModel) -> int:
    """Length of what enters a language model's blocks."""
    return int(model.config.get_text_config(decoder=True).hidden_size)


def _behind(context: str, request: EditRequest) -> str:
    """A request's prompt behind an edit, as the prompt memory puts it there: behind the prompt's pictures."""
    frame = request.frame
    if isinstance(frame, PictureFrame):
        return frame.in_context(context, "", 0, request.plain_prompt)[0]
    return context + request.filled_prompt


def _texts(batch: Batch, name: str) -> list[list[int]]:
    """Token ids of the texts of a batch without padding."""
    return [row[real].tolist() for row, real in zip(batch[f"{name}_ids"], batch[f"{name}_mask"].bool(), strict=True)]


# ---------------------------------------------------------------------- trained networks by name


def reference(source: str) -> tuple[str, SERACEditor]:
    """Load a trained editor, and the name by which saved edits find it again: ``serac:<source>#<hash>``.

    Raises:
        ArtifactError: if there is no SERAC editor.
        HubError: if a repository cannot be read.
    """
    place = str(Path(source).resolve()) if os.path.isdir(source) else source
    editor = SERACEditor.from_pretrained(place)
    assert isinstance(editor, SERACEditor)
    return f"{KIND}:{place}#{str(editor.sha256)[:16]}", editor


@lru_cache(maxsize=4)
def _by_name(name: str) -> SERACEditor:
    place, _, _ = name.removeprefix(f"{KIND}:").rpartition("#")
    known, editor = reference(place)
    if known != name:
        raise ArtifactError(
            f"the SERAC editor {place!r} is not the one that these edits were made with: it has been trained anew."
            " Make the edits again, or put the old editor back"
        )
    return editor


def _trained_scope(name: str) -> TrainedScope:
    editor = _by_name(name)
    assert editor.tokenizer is not None
    return TrainedScope(name, editor.scope, editor.tokenizer)


register_retriever_kind(KIND, _trained_scope)
register_counterfactual_kind(KIND, lambda name: _by_name(name).reader)


@register_method
class SERAC(InContext):
    """SERAC, with trained networks or with parts chosen by name."""

    config_class = SERACConfig
    capabilities = Capabilities(
        name="SERAC",
        kind="prompt",
        batch=True,
        sequential=True,
        needs_subject=False,
        low_rank=False,
        encoder_decoder=True,
        paper="Mitchell et al. 2022, arXiv 2206.06520",
        summary="a scope classifier sends prompts about an edit to a counterfactual model that reads the edit first",
    )
    config: SERACConfig

    def __init__(self, bench: Workbench, config: SERACConfig):
        super().__init__(bench, config)
        loaded: tuple[str, SERACEditor] | None = bench.loaded or self.load(config)
        trained: str | None = None
        self.editor: SERACEditor | None = None
        if loaded is not None:
            trained, self.editor = loaded
        if self.editor is not None:
            self.editor.check_fits(bench.model)
        self.scope = config.scope or trained or LEXICAL
        answers = self.editor is not None and self.editor.reader is not None
        self.counterfactual = config.counterfactual or (trained if answers else None) or BASE
        self._trained = trained

    @classmethod
    def load(cls, config: SERACConfig) -> tuple[str, SERACEditor] | None:
        """The trained networks, with their name."""
        return None if config.editor is None else reference(config.editor)

    def fetch(self) -> None:
        """Both models."""
        self.check([])

    def check(self, requests: Sequence[EditRequest]) -> None:
        """Check both models.

        Raises:
            RequestError: for a fact about a picture, if the answers of two models are mixed.
        """
        for request in requests:
            if request.image is not None and self.config.soft:
                raise RequestError(
                    "soft=True mixes the answers of two models, and the small one sees no picture; leave it off",
                    row=request.row,
                    field="image",
                    request_id=request.id,
                )
        find_retriever(self.scope, self.bench.reader.retriever)
        if self.counterfactual != BASE:
            find_counterfactual(self.counterfactual, self.bench.model)
        super().check(requests)

    def compute(self, requests: Sequence[EditRequest]) -> Outcome:
        """One record per request."""
        # as texts, because prompts of either format are looked up by theirs
        entries = [self.seen(self.entry(request.asked("plain")), request) for request in requests]
        numbers = [{"scope_classifier": e.retriever, "counterfactual_model": e.reader} for e in entries]
        return Outcome([], numbers, entries=entries)

    def text(self, request: EditRequest) -> str:
        """What is put in front of the prompts that belong to a request."""
        if self.editor is not None and self._answers(request) == self._trained:
            return self.editor.context(request)
        return super().text(request)

    def reader(self, request: EditRequest) -> Any:
        """The model that reads this text."""
        name = self._answers(request)
        return self.bench.model if name == BASE else find_counterfactual(name, self.bench.model)

    def _answers(self, request: EditRequest) -> str:
        """Name of the model that answers; about a picture it is the edited one, which sees it."""
        return BASE if request.image is not None else self.counterfactual

    def entry(self, request: EditRequest) -> PromptEntry:
        """What the memory keeps of a request."""
        editor = self.editor
        return PromptEntry(
            scope=editor.scope_text(request) if editor and self.scope == self._trained else request.plain_prompt,
            subject=request.subject,
            fact=self.text(request),
            demonstrations=(),
            nearest_last=True,
            retriever=self.scope,
            threshold=self.config.threshold,
            reader=self._answers(request),
            soft=self.config.soft,
        )

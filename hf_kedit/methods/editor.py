"""What trained editors share: an `Editor` proposes low-rank changes of a model and is trained on their effect.

An editor is a small network beside a base model that it never owns. Its forward pass is one step of training: propose
changes for a batch of facts, lay them beside the frozen weights, and measure the new answers to rephrased prompts and
what happened to unrelated ones. The training loop is the `EditTrainer`'s, the edit itself is `hyper.HyperMethod`'s.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch
from torch import nn

from ..anatomy import resolve_anatomy
from ..anatomy.projections import as_projection
from ..config import CONFIG_NAME
from ..engine.examples import encode_examples, row_means
from ..engine.forward import frozen_eval
from ..engine.gradients import LowRank, Reduction, Rows, Tokens, collect_rows, low_rank_paths
from ..engine.supervised import IGNORE, Batch, all_of_row, collate, logits_where, score, score_logits
from ..engine.weights import get_module, get_weight, tensor_digest
from ..errors import ConfigError, UnsupportedModelError
from ..files import write_folder
from ..repository import push_files
from ..requests import EditRequest
from ..tokens import pad_id
from .base import WeightConfig
from .editor_files import SavedEditor, pack_editor, read_editor

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

E = TypeVar("E", bound="Editor")
EDITED_BLOCKS = 3
METRICS = ("edit_success", "generalization", "locality", "drawdown")
_EDITORS: dict[str, type[Editor]] = {}


@dataclass
class EditorConfig(WeightConfig):
    """Hyperparameters of a trained editor.

    To edit, only ``editor`` counts: everything else comes from the editor that is loaded. To train one, the other
    fields describe it.

    Args:
        editor: folder or Hub id of a trained editor; ``None``: the packaged one of an embedded model.
        modules: names of the linear modules to edit, in order; ``None``: the matrices of the MLPs of ``layers``, or of
            the last three blocks (of both stacks, where there are two).
        edit_weight: of the loss of the new answers to rephrased prompts.
        locality_weight: of the divergence on unrelated prompts.
        locality_at: where the divergence is measured: at every token (``all``) or where the answer is predicted
            (``answer``); an encoder-decoder has only the latter.
        micro_batch: facts per forward and backward pass when their gradients are collected.
    """

    editor: str | None = None
    modules: list[str] | None = None
    edit_weight: float = 0.1
    locality_weight: float = 1.0
    locality_at: Literal["all", "answer"] = "all"
    micro_batch: int = 32

    def validate(self) -> None:
        """Check ranges."""
        super().validate()
        self._require_positive("edit_weight", "locality_weight", zero=True)
        self._require_positive("micro_batch")
        if self.modules is not None and not self.modules:
            raise ConfigError(f"{type(self).__name__}.modules is empty; leave it out to use the model's default")

    @classmethod
    def model_dependent_fields(cls) -> tuple[str, ...]:
        """An embedded model has a packaged editor."""
        return ("editor",)


@dataclass
class EditorOutput:
    """What one training or evaluation step of an editor returns.

    Args:
        loss: scalar.
        edit_loss: of the new answers to the rephrased prompts, scalar.
        locality_loss: divergence on the unrelated prompts, scalar.
        facts: how many facts it is about.
        metrics: in evaluation mode, one row per fact with the columns `METRICS`, ``[facts, 4]``.
    """

    loss: torch.Tensor
    edit_loss: torch.Tensor
    locality_loss: torch.Tensor
    facts: int
    metrics: torch.Tensor | None = None

    def detached(self) -> EditorOutput:
        """The same numbers without their graph."""
        losses = (self.loss.detach(), self.edit_loss.detach(), self.locality_loss.detach())
        return EditorOutput(*losses, self.facts, self.metrics)


@dataclass(frozen=True)
class _Base:
    """Keeps the base model out of the module tree: it is not trained, not saved, and stays in evaluation mode."""

    model: PreTrainedModel


class Editor(nn.Module):
    """A network that proposes low-rank changes of some linear modules of one base model.

    Args:
        config: describes the networks and the loss that they are trained with.
        shapes: ``(d_in, d_out)`` of every edited module, in order, by name.
        encoder_decoder: whether the base model is an encoder-decoder.
    """

    config_class: ClassVar[type[EditorConfig]]
    accepts_loss_kwargs = False  # for Trainer: the loss is a mean over the batch

    def __init__(self, config: EditorConfig, shapes: Mapping[str, tuple[int, int]], *, encoder_decoder: bool = False):
        super().__init__()
        self.edit_config = config  # Trainer expects a transformers config under the name `config`
        self.shapes = {module: (int(shape[0]), int(shape[1])) for module, shape in shapes.items()}
        self.encoder_decoder = encoder_decoder
        self.origin: dict[str, Any] = {}
        self._base: _Base | None = None

    @classmethod
    def for_model(cls: type[E], model: PreTrainedModel, config: EditorConfig | None = None) -> E:
        """A new editor for a model, with the model attached; its random parts are drawn from ``config.seed``.

        Raises:
            ConfigError: if the config is another method's.
            LayerError: if a module does not exist.
            UnsupportedModelError: if a module is not linear.
        """
        config = config if config is not None else cls.config_class()
        if type(config) is not cls.config_class:
            raise ConfigError(f"{cls.__name__} needs a {cls.config_class.__name__}, not a {type(config).__name__}")
        modules = config.modules or mlp_modules(model, config.layers)
        kept = cls.fitted(dataclasses.replace(config, editor=None, modules=modules, layers=None), model)
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            editor = cls(
                kept,
                {module: matrix_sizes(model, module) for module in modules},
                encoder_decoder=bool(model.config.is_encoder_decoder),
            )
        editor.origin = {
            "base_model_name_or_path": str(getattr(model.config, "name_or_path", "") or ""),
            "base_model_revision": getattr(model.config, "_commit_hash", None),
            "base_dtype": str(model.dtype).removeprefix("torch."),
            "base_sha256": {module: weight_digest(model, module) for module in modules},
        }
        editor.start_from(model)
        return editor.attach(model)

    @classmethod
    def fitted(cls, config: EditorConfig, model: PreTrainedModel) -> EditorConfig:
        """The config with what a new editor has to know of the model; nothing by default."""
        return config

    def start_from(self, model: PreTrainedModel) -> None:
        """Copy what a new editor takes over from the model; nothing by default."""
        return None

    # ------------------------------------------------------------------ the base model

    def attach(self: E, model: PreTrainedModel) -> E:
        """Train on this model from now on.

        Raises:
            ConfigError: if its modules have other shapes than those that the editor was made for.
        """
        self.check_fits(model)
        self._base = _Base(model)
        return self

    def check_fits(self, model: PreTrainedModel) -> None:
        """Raise if the model's modules are not the ones that the editor was made for.

        Raises:
            LayerError: if a module does not exist.
            ConfigError: if a module has another shape.
        """
        for module, shape in self.shapes.items():
            found = matrix_sizes(model, module)
            if found != shape:
                raise ConfigError(
                    f"this editor was made for {module} with {shape[0]} inputs and {shape[1]} outputs; the model's has"
                    f" {found[0]} and {found[1]}. An editor works on the model that it was trained for."
                )

    @property
    def base(self) -> PreTrainedModel:
        """The attached base model.

        Raises:
            ConfigError: if there is none.
        """
        if self._base is None:
            raise ConfigError("this editor has no base model: call editor.attach(model)")
        return self._base.model

    # ------------------------------------------------------------------ facts as batches

    def encode(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, requests: Sequence[EditRequest]
    ) -> Batch:
        """Tokenise prompts with their answers as the editor reads them, in training and in use.

        Raises:
            RequestError: naming row and field.
        """
        examples = encode_examples(model, tokenizer, requests, separator=self.edit_config.separator)
        return collate(examples, pad_id(tokenizer))

    def edit_batch(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, requests: Sequence[EditRequest]
    ) -> Batch:
        """The batch from which changes are proposed: the facts, and what else the editor wants to read."""
        return self.encode(model, tokenizer, requests)

    def batches(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        edits: Sequence[EditRequest],
        rephrases: Sequence[EditRequest],
        localities: Sequence[EditRequest],
    ) -> dict[str, Batch]:
        """The arguments of `forward`, without the groups, for facts, other wordings and unrelated prompts."""
        return {
            "edit": self.edit_batch(model, tokenizer, edits),
            "rephrase": self.encode(model, tokenizer, rephrases),
            "locality": self.encode(model, tokenizer, localities),
        }

    def use_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Called once before training with the base model's tokenizer; nothing by default."""
        return None

    # ------------------------------------------------------------------ proposing

    @abstractmethod
    def propose(self, model: PreTrainedModel, edit: Batch, groups: torch.Tensor) -> dict[str, LowRank]:
        """Changes for a batch of facts.

        Args:
            model: frozen, in evaluation mode, with the edits that it carries.
            edit: from `edit_batch`.
            groups: facts of the same number are edited together, ``[facts]`` int64.

        Returns:
            Module name → change, differentiable in the editor's parameters.
        """

    def collect(
        self, model: PreTrainedModel, edit: Batch, groups: torch.Tensor, reduction: Reduction, at: Tokens = "speaking"
    ) -> dict[str, Rows]:
        """Inputs and output gradients of the edited modules at the tokens of the facts, see `collect_rows`."""
        return collect_rows(
            model, list(self.shapes), edit, groups, reduction=reduction, at=at, size=self.edit_config.micro_batch
        )

    # ------------------------------------------------------------------ training

    def forward(self, edit: Batch, rephrase: Batch, locality: Batch, groups: torch.Tensor) -> EditorOutput:
        """Propose changes for a batch of facts and judge them.

        Args:
            edit: the facts, from `edit_batch`.
            rephrase: other prompts with the same new answers, row by row.
            locality: unrelated prompts with their answers, row by row.
            groups: facts of the same number are edited together, and only they see the edit.
        """
        with frozen_eval(self.base):
            changes = self.propose(self.base, edit, groups)
            parts = [self.judge(changes, groups, *part) for part in self.chunks(edit, rephrase, locality, groups)]
        return merged(parts)

    def chunks(
        self, edit: Batch, rephrase: Batch, locality: Batch, groups: torch.Tensor
    ) -> Iterator[tuple[Batch, Batch, Batch, torch.Tensor]]:
        """The same facts, ``micro_batch`` at a time."""
        size = self.edit_config.micro_batch
        for start in range(0, len(groups), size):
            part = slice(start, start + size)
            batches = ({name: value[part] for name, value in b.items()} for b in (edit, rephrase, locality))
            yield (*batches, groups[part])  # type: ignore[misc]

    def judge(
        self,
        changes: Mapping[str, LowRank],
        groups: torch.Tensor,
        edit: Batch,
        rephrase: Batch,
        locality: Batch,
        rows: torch.Tensor,
    ) -> EditorOutput:
        """What changes do to some of the facts.

        Args:
            changes: from `propose`.
            groups: of all facts that they were proposed for.
            edit: some of the facts; likewise ``rephrase`` and ``locality``.
            rows: the groups of these facts.
        """
        base = self.base
        where = self._locality_positions(locality)
        with torch.no_grad():
            before = logits_where(base, locality, where)
        with low_rank_paths(base, changes, groups, rows):
            outer = score(base, rephrase)
            after = logits_where(base, locality, where)
            inner = None if self.training else score(base, edit)
        edit_loss = _mean_of_groups(outer.nll, outer.rows, rows)
        old, new = before.log_softmax(-1), after.log_softmax(-1)
        locality_loss = _mean_of_groups((old.exp() * (old - new)).sum(-1), where.nonzero()[:, 0], rows)
        loss = self.edit_config.edit_weight * edit_loss + self.edit_config.locality_weight * locality_loss
        metrics = None
        if inner is not None:
            labelled = (locality["labels"] != IGNORE)[where]
            known, kept = (score_logits(x[labelled], locality["labels"]) for x in (before, after))
            same = all_of_row((before.argmax(-1) == after.argmax(-1))[labelled], known.rows, known.count)
            drawdown = known.all_right() - kept.all_right()
            metrics = torch.stack([inner.all_right(), outer.all_right(), same, drawdown], dim=1)
        return EditorOutput(loss, edit_loss, locality_loss, len(rows), metrics)

    def _locality_positions(self, locality: Batch) -> torch.Tensor:
        """Mask over the labels of where the divergence counts."""
        if self.encoder_decoder or self.edit_config.locality_at == "answer":
            return locality["labels"] != IGNORE
        return locality["attention_mask"].bool()

    def step_sizes(self) -> list[nn.Parameter]:
        """The parameters that are trained with a learning rate of their own."""
        return []

    # ------------------------------------------------------------------ files

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write the editor to a folder: ``edit_config.json``, ``editor.safetensors`` and a card."""
        write_folder(Path(save_directory), self._files(), last=CONFIG_NAME)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        token: str | None = None,
    ) -> CommitInfo:
        """Push the editor to a repository of the Hub as one commit.

        Args:
            repo_id: ``org/name``; made if it does not exist.
            private: of a new repository.
            revision: branch.
            commit_message: default: the editor's method.
            token: for the Hub.

        Raises:
            HubError: if the repository cannot be written.
        """
        return push_files(
            repo_id,
            self._files(),
            message=commit_message or f"{self.edit_config.edit_type} editor",
            private=private,
            revision=revision,
            token=token,
        )

    def _files(self) -> dict[str, bytes]:
        modules = {module: list(shape) for module, shape in self.shapes.items()}
        return pack_editor(self.edit_config.to_dict(), modules, self.encoder_decoder, self.origin, self.state_dict())

    @classmethod
    def from_pretrained(cls, editor: str | Path, *, revision: str | None = None, token: str | None = None) -> Editor:
        """Load a trained editor from a folder, a Hub id or the name of a packaged one; call `attach` to train on.

        On `Editor` itself, the file says which method it is of.

        Raises:
            ArtifactError: if there is no editor there, or it is damaged.
            ConfigError: if it is an editor of another method.
            HubError: if a repository cannot be read.
        """
        saved = read_editor(str(editor), revision=revision, token=token)
        kind = editor_class(saved.method)
        if not issubclass(kind, cls):
            raise ConfigError(f"{str(editor)!r} is an editor of {saved.method!r}; {cls.__name__} cannot load it")
        config = kind.config_class.from_dict(saved.hparams)
        made = kind(config, saved.modules, encoder_decoder=saved.encoder_decoder)
        saved.fill(made)
        made.take_over(saved)
        return made.eval()

    def take_over(self, saved: SavedEditor) -> None:
        """What else the files of an editor say: where it comes from."""
        self.origin = saved.origin

    def load_saved(self, folder: str | Path) -> None:
        """Take over the tensors of a saved editor of the same kind (a checkpoint).

        Raises:
            ArtifactError: if there is none, or it does not fit.
        """
        read_editor(str(folder)).fill(self)


def register_editor(cls: type[E]) -> type[E]:
    """Class decorator: make an editor known under its config's ``edit_type``."""
    _EDITORS[cls.config_class.edit_type] = cls
    return cls


def editor_class(method: str) -> type[Editor]:
    """The editor of a method.

    Raises:
        ConfigError: if the method has none.
    """
    if method not in _EDITORS:
        raise ConfigError(f"{method!r} has no trained editor; those that have one: {', '.join(sorted(_EDITORS))}")
    return _EDITORS[method]


# ---------------------------------------------------------------------- modules


def mlp_modules(model: PreTrainedModel, layers: Sequence[int] | None = None) -> list[str]:
    """Names of the matrices of the MLPs of some blocks (``None``: the last three), of both stacks if there are two."""
    stacks = ["encoder", "decoder"] if model.config.is_encoder_decoder else ["decoder"]
    found = []
    for stack in stacks:
        anatomy = resolve_anatomy(model, stack=stack)  # type: ignore[arg-type]
        blocks = (
            layers if layers is not None else range(max(anatomy.num_layers - EDITED_BLOCKS, 0), anatomy.num_layers)
        )
        for index in blocks:
            block = anatomy.layer(index % anatomy.num_layers)
            found += [p.path for p in (*block.ups, anatomy.down(block.index))]
    return found


def matrix_sizes(model: PreTrainedModel, module: str) -> tuple[int, int]:
    """``(d_in, d_out)`` of a linear module.

    Raises:
        LayerError: if it does not exist.
        UnsupportedModelError: if it is not linear.
    """
    projection = as_projection(get_module(model, module), module)
    if projection is None:
        raise UnsupportedModelError(f"{module} is not a linear module; a trained editor changes linear modules")
    return projection.in_features, projection.out_features


def weight_digest(model: PreTrainedModel, module: str) -> str:
    """SHA-256 of the weight of a module."""
    return tensor_digest([("", get_weight(get_module(model, module)))])


# ---------------------------------------------------------------------- means


def merged(parts: Sequence[EditorOutput]) -> EditorOutput:
    """Several outputs as one: losses weighted by the number of facts."""
    facts = sum(p.facts for p in parts)

    def mean(name: str) -> torch.Tensor:
        return torch.stack([getattr(p, name) * (p.facts / facts) for p in parts]).sum()

    metrics = [p.metrics for p in parts if p.metrics is not None]
    losses = (mean("loss"), mean("edit_loss"), mean("locality_loss"))
    return EditorOutput(*losses, facts, torch.cat(metrics) if metrics else None)


def _mean_of_groups(values: torch.Tensor, rows: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Mean over the groups of the mean over a group's tokens."""
    names, numbers = groups.unique(return_inverse=True)
    return row_means(values, numbers[rows], len(names)).mean()

"""What trained editors share: an `Editor` proposes low-rank changes of a model and is trained on their effect.

An editor is a small network beside a base model that it never owns. Its forward pass is one step of training: propose
changes for a batch of facts, lay them beside the frozen weights, and measure the new answers to rephrased prompts and
what happened to unrelated ones. The training loop is the `EditTrainer`'s, the edit itself is `hyper.HyperMethod`'s.
"""

from __future__ import annotations

import contextlib
import dataclasses
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import nn

from ..anatomy.switching import Switch, together
from ..config import CONFIG_NAME, WeightConfig
from ..engine.devices import seeded
from ..engine.examples import encode_examples
from ..engine.forward import frozen_eval, recomputed_blocks
from ..engine.gradients import LowRank, Reduction, Rows, Tokens, collect_rows, low_rank_paths
from ..engine.supervised import IGNORE, Batch, Scores, all_of_row, collate, logits_where, rows_of, score, score_logits
from ..engine.unlikelihood import unlikelihoods
from ..errors import ConfigError, UnsupportedModelError
from ..requests import EditRequest
from ..storage.files import write_folder
from ..storage.repository import push_files
from ..tokens import pad_id
from .files import SavedEditor, pack_editor, read_editor
from .modules import matrix_sizes, mlp_modules, weight_digest
from .output import EditorOutput, mean_of_groups, merged

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

E = TypeVar("E", bound="Editor")
UNLIKELY = "unlikely"
"""In a batch of other wordings: which of its answers are to go, ``[rows]`` bool."""
SIZE_MEMORY = 0.98
"""What the moving average of the sizes of changes keeps at each step."""
_EDITORS: dict[str, type[Editor]] = {}


@dataclass
class EditorConfig(WeightConfig):
    """Hyperparameters of a trained editor.

    To edit, only ``editor`` and ``max_relative_size`` count: everything else comes from the editor that is loaded. To
    train one, the other fields describe it.

    Args:
        editor: folder or Hub id of a trained editor; ``None``: the packaged one of an embedded model.
        max_relative_size: an edit whose change of some matrix is more than this many times as large as those of
            training were is refused; ``None``: it is made, with a warning.
        modules: names of the linear modules to edit, in order; ``None``: the matrices of the MLPs of ``layers``, or of
            the last three blocks (of both stacks, where there are two).
        edit_weight: of the loss of the new answers to rephrased prompts.
        locality_weight: of the divergence on unrelated prompts.
        locality_at: where the divergence is measured: at every token (``all``) or where the answer is predicted
            (``answer``); an encoder-decoder has only the latter.
        micro_batch: facts per forward and backward pass when their gradients are collected.
    """

    editor: str | None = None
    max_relative_size: PositiveFloat | None = None
    modules: list[str] | None = None
    edit_weight: NonNegativeFloat = 0.1
    locality_weight: NonNegativeFloat = 1.0
    locality_at: Literal["all", "answer"] = "all"
    micro_batch: PositiveInt = 32

    @classmethod
    def model_dependent_fields(cls) -> tuple[str, ...]:
        """An embedded model has a packaged editor."""
        return ("editor",)


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
        self.recompute = False
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
        with seeded(config.seed):
            editor = cls(
                kept,
                {module: matrix_sizes(model, module) for module in modules},
                encoder_decoder=bool(model.config.is_encoder_decoder),
            )
        editor.origin = origin_in(model)
        editor.origin["base_sha256"] = {module: weight_digest(model, module) for module in modules}
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
            UnsupportedModelError: if the model is in fp16.
        """
        self.check_fits(model)
        self.check_precision(model)
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

    def check_precision(self, model: PreTrainedModel) -> None:
        """Raise if the gradients of the edited modules cannot be read: in fp16, the small ones become zero.

        Raises:
            UnsupportedModelError: if they cannot.
        """
        if self.shapes and model.dtype == torch.float16:
            raise UnsupportedModelError(
                f"{self.edit_config.edit_type} reads the gradient of a fact, which a model in float16 loses; load the"
                " model with dtype=torch.float32 or torch.bfloat16"
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

        In training, the backward pass through the language model happens in here, ``micro_batch`` facts at a time: the
        factors of the changes are leaves that collect the gradient, and the returned loss hands it on to the editor.

        Args:
            edit: the facts, from `edit_batch`.
            rephrase: other prompts with the same new answers, row by row.
            locality: unrelated prompts with their answers, row by row.
            groups: facts of the same number are edited together, and only they see the edit.
        """
        with self.base_ready():
            changes = self.propose(self.base, edit, groups)
            if not self.training:
                parts = [self.judge(changes, groups, *p) for p in self.chunks(edit, rephrase, locality, groups)]
                self.settle(changes, (edit, rephrase, locality))
                return merged(parts)
            self.remember_size(changes, groups)
            leaves = {module: change.as_leaves() for module, change in changes.items()}
            whole = self.learn(leaves, edit, rephrase, locality, groups)
            self.settle(changes, (edit, rephrase, locality))
        total = torch.zeros((), device=whole.loss.device)
        for module, leaf in leaves.items():
            for factor, value in ((leaf.left, changes[module].left), (leaf.right, changes[module].right)):
                if factor.grad is not None:
                    total = total + (factor.grad * value).sum()
        return self.handing_on(whole, total)

    def base_ready(self) -> Switch[None]:
        """The base model, frozen and in evaluation mode; if asked for, backward passes run its blocks again."""
        recomputed = [recomputed_blocks(self.base)] if self.recompute else []
        return together(frozen_eval(self.base), *recomputed)

    def learn(
        self, changes: Mapping[str, LowRank], edit: Batch, rephrase: Batch, locality: Batch, groups: torch.Tensor
    ) -> EditorOutput:
        """Judge changes whose factors are leaves, and leave the gradients of the losses with these."""
        parts = []
        for part in self.chunks(edit, rephrase, locality, groups):
            parts.append(self.judge(changes, groups, *part, share=len(part[-1]) / len(groups)))
        return merged(parts)

    def settle(self, changes: Mapping[str, LowRank], facts: tuple[Batch, Batch, Batch]) -> None:
        """Called at the end of a step with its changes and its facts; an editor of sequences carries them on."""
        return None

    def handing_on(self, whole: EditorOutput, proxy: torch.Tensor) -> EditorOutput:
        """The output with the loss that it has and the gradient that the proxy has."""
        loss = self.objective(whole.edit_loss, whole.locality_loss)
        whole.loss = proxy - proxy.detach() + loss + (whole.loss - loss).detach()
        return whole

    def chunks(
        self, edit: Batch, rephrase: Batch, locality: Batch, groups: torch.Tensor
    ) -> Iterator[tuple[Batch, Batch, Batch, torch.Tensor]]:
        """The same facts, ``micro_batch`` at a time."""
        size = self.edit_config.micro_batch
        for start in range(0, len(groups), size):
            part = slice(start, start + size)
            yield rows_of(edit, part), rows_of(rephrase, part), rows_of(locality, part), groups[part]

    def judge(
        self,
        changes: Mapping[str, LowRank],
        groups: torch.Tensor,
        edit: Batch,
        rephrase: Batch,
        locality: Batch,
        rows: torch.Tensor,
        share: float | None = None,
    ) -> EditorOutput:
        """What changes do to some of the facts.

        Args:
            changes: from `propose`.
            groups: of all facts that they were proposed for.
            edit: some of the facts; likewise ``rephrase`` and ``locality``.
            rows: the groups of these facts.
            share: what these facts count in the whole: the backward pass through the model is made with this weight,
                while the changes are in place (blocks may have to be run again). ``None``: no backward pass.
        """
        base = self.base
        where = self._locality_positions(locality)
        with torch.no_grad(), self.compared_with():
            before = logits_where(base, locality, where)
        with torch.set_grad_enabled(share is not None), self.laid(changes, groups, rows):
            edit_loss, outer = self.edit_loss(edit, rephrase, rows)
            after = logits_where(base, locality, where)
            inner = None if self.training else score(base, edit)
            old, new = before.log_softmax(-1), after.log_softmax(-1)
            locality_loss = mean_of_groups((old.exp() * (old - new)).sum(-1), where.nonzero()[:, 0], rows)
            loss = self.objective(edit_loss, locality_loss)
            if share is not None:
                factors = [f for c in changes.values() for f in (c.left, c.right) if f.requires_grad]
                torch.autograd.backward(loss * share, inputs=factors)
        metrics = None
        if inner is not None:
            labelled = (locality["labels"] != IGNORE)[where]
            known, kept = (score_logits(x[labelled], locality["labels"]) for x in (before, after))
            same = all_of_row((before.argmax(-1) == after.argmax(-1))[labelled], known.rows, known.count)
            drawdown = known.all_right() - kept.all_right()
            metrics = torch.stack([inner.all_right(), outer.all_right(), same, drawdown], dim=1)
        return EditorOutput(loss.detach(), edit_loss.detach(), locality_loss.detach(), len(rows), metrics)

    def laid(self, changes: Mapping[str, LowRank], groups: torch.Tensor, rows: torch.Tensor) -> Switch[None]:
        """The model with changes beside its weights, see `low_rank_paths`."""
        return low_rank_paths(self.base, changes, groups, rows)

    def compared_with(self) -> contextlib.AbstractContextManager[None]:
        """The model that unrelated prompts are compared with: the base model as it is."""
        return contextlib.nullcontext()

    def edit_loss(self, edit: Batch, rephrase: Batch, rows: torch.Tensor) -> tuple[torch.Tensor, Scores]:
        """Loss of the new answers in the edited model, and how it scores the rephrased prompts.

        Rows that `UNLIKELY` marks have the loss ``−log(1 − p)`` of answers that are to go.
        """
        outer = score(self.base, rephrase)
        losses = outer.nll
        if UNLIKELY in rephrase:
            losses = torch.where(rephrase[UNLIKELY][outer.rows], unlikelihoods(losses), losses)
        return mean_of_groups(losses, outer.rows, rows), outer

    def objective(self, edit_loss: torch.Tensor, locality_loss: torch.Tensor) -> torch.Tensor:
        """What is minimised, from the two losses."""
        return self.edit_config.edit_weight * edit_loss + self.edit_config.locality_weight * locality_loss

    def _locality_positions(self, locality: Batch) -> torch.Tensor:
        """Mask over the labels of where the divergence counts."""
        if self.encoder_decoder or self.edit_config.locality_at == "answer":
            return locality["labels"] != IGNORE
        return locality["attention_mask"].bool()

    def step_sizes(self) -> list[nn.Parameter]:
        """The parameters that are trained with the learning rate of step sizes."""
        return []

    def own_rates(self) -> list[tuple[list[nn.Parameter], float]]:
        """Further parameters, with the learning rate that each set of them has by the editor's own config."""
        return []

    def after_step(self) -> None:
        """Called after every step of the optimizer; nothing by default."""
        return None

    def after_evaluation(self, metrics: Mapping[str, float]) -> None:
        """Called with the means of `METRICS` after every evaluation in training; nothing by default."""
        return None

    def check_arguments(self, args: Any) -> None:
        """Raise if the editor cannot be trained with these `EditTrainingArguments`; all will do by default.

        Raises:
            ConfigError: if it cannot.
        """
        return None

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Called by Trainer for ``activation_checkpointing=True``; see `base_ready`. Every block is run again."""
        self.recompute = True

    # ------------------------------------------------------------------ how large changes are

    def remember_size(self, changes: Mapping[str, LowRank], groups: torch.Tensor) -> None:
        """Keep a moving average of how large the change of a group of facts was in training, module by module."""
        found = {m: float(c.sizes(groups).mean()) for m, c in changes.items()}
        kept = self.origin.setdefault("trained_change_size", {})
        for module, size in found.items():
            kept[module] = SIZE_MEMORY * kept.get(module, size) + (1 - SIZE_MEMORY) * size

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
        config = kind.config_class.from_dict(saved.hparams, saved=True)
        made = kind(config, saved.modules, encoder_decoder=saved.encoder_decoder)
        made.take_over(saved)
        return made.eval()

    def load_saved(self, folder: str | Path) -> None:
        """Take over the tensors of a saved editor of the same kind (a checkpoint).

        Raises:
            ArtifactError: if there is none, or it does not fit.
        """
        self.take_over(read_editor(str(folder)))

    def take_over(self, saved: SavedEditor) -> None:
        """Fill the networks with saved tensors, and remember where they come from."""
        saved.fill(self)
        self.origin = saved.origin


def origin_in(model: PreTrainedModel) -> dict[str, Any]:
    """What an editor remembers of the model that it was made for: JSON-ready."""
    return {
        "base_model_name_or_path": str(getattr(model.config, "name_or_path", "") or ""),
        "base_model_revision": getattr(model.config, "_commit_hash", None),
        "base_dtype": str(model.dtype).removeprefix("torch."),
    }


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

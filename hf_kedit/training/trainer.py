"""`EditTrainer`: transformers' `Trainer` for editors. The loop, the clock, checkpoints and processes are Trainer's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments

from ..editors.editor import Editor
from ..editors.output import METRICS
from ..errors import ConfigError
from ..logging import get_logger
from ..requests import RequestSource
from ..text.processors import sees
from .arguments import EditTrainingArguments
from .data import EditCollator, EditFacts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

logger = get_logger(__name__)


class EditTrainer(Trainer):
    """Trains an `Editor` on facts.

    The editor is the trained model: optimiser, clipping, checkpoints and uploads see nothing of the base model, which
    stays frozen and in evaluation mode. ``evaluate()`` returns ``eval_edit_success`` (the prompt itself says the new
    answer), ``eval_generalization`` (another wording does), ``eval_locality`` (an unrelated prompt keeps its most
    likely tokens) and ``eval_drawdown`` (accuracy on unrelated prompts lost), all teacher forced.

    Args:
        model: the editor, with its base model attached.
        args: of the training.
        train_dataset: facts: anything that `load_requests` reads, or `EditFacts`.
        eval_dataset: likewise, or a dict of them.
        processing_class: tokenizer of the base model; its processor, to train on facts about pictures.
        kwargs: for `Trainer`.

    Raises:
        ConfigError: if the editor has no base model or there is no tokenizer.
        RequestError: for an unusable fact, naming row and field.
    """

    loss_is_scaled_for_ga = False
    model: Editor
    args: EditTrainingArguments

    def __init__(
        self,
        model: Editor,
        args: EditTrainingArguments,
        train_dataset: RequestSource | EditFacts | None = None,
        eval_dataset: RequestSource | EditFacts | dict[str, Any] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        **kwargs: Any,
    ):
        if processing_class is None:
            raise ConfigError("EditTrainer needs the base model's tokenizer: processing_class=tokenizer")
        model.base  # noqa: B018 - raises here rather than in the first batch
        model.check_arguments(args)
        processor = processing_class if sees(processing_class) else None
        tokenizer: Any = processing_class if processor is None else processor.tokenizer
        model.use_tokenizer(tokenizer)
        model.origin["trained_edits_together"] = args.edits_per_group
        seed = args.seed if args.data_seed is None else args.data_seed

        def facts(source: Any) -> Any:
            if source is None or isinstance(source, EditFacts):
                return source
            return EditFacts(source, seed, needs_locality=model.edit_config.locality_weight > 0)

        several = isinstance(eval_dataset, dict) and "prompt" not in eval_dataset
        kwargs.setdefault("data_collator", EditCollator(model, tokenizer, args.edits_per_group, processor))
        kwargs.setdefault("compute_metrics", _column_means)
        super().__init__(
            model=model,
            args=args,
            train_dataset=facts(train_dataset),
            eval_dataset={k: facts(v) for k, v in eval_dataset.items()} if several else facts(eval_dataset),  # type: ignore[union-attr]
            processing_class=processing_class,
            **kwargs,
        )
        self.add_callback(_TellEditor(self))
        self._parts: list[torch.Tensor] = []  # edit and locality loss of each step since the last log
        self._skipped = 0

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The networks with ``learning_rate``, the step sizes with ``step_size_lr``, others with the editor's rates.

        Weight decay is for the networks only.
        """
        if self.optimizer is None:
            lr = self.args.learning_rate if self.args.step_size_lr is None else self.args.step_size_lr
            own = [(self.model.step_sizes(), lr), *self.model.own_rates()]
            known = {id(p) for parameters, _ in own for p in parameters}
            networks = [p for p in self.model.parameters() if id(p) not in known]
            groups: list[dict[str, Any]] = [{"params": networks, "weight_decay": self.args.weight_decay}]
            groups += [{"params": params, "lr": rate, "weight_decay": 0.0} for params, rate in own if params]
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = kind(groups, **settings)
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The editor's own loss; a step whose loss is not finite counts nothing."""
        output = model(**inputs)
        loss = output.loss
        if model.training:
            if not bool(torch.isfinite(loss)):
                self._skipped += 1
                logger.warning("the loss is not finite; this step is left out (%d so far)", self._skipped)
                loss = torch.stack([p.sum() for p in self.model.parameters()]).sum() * 0
            else:
                self._parts.append(torch.stack([output.edit_loss, output.locality_loss]).detach())
        return (loss, output) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Loss and one row of metrics per fact."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            output = model(**inputs)
        rows = output.metrics
        return output.loss.detach(), rows, torch.zeros(rows.shape[0], device=rows.device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the two parts of the loss."""
        if self._parts and "loss" in logs:
            edit, locality = torch.stack(self._parts).mean(0).tolist()
            logs = {**logs, "edit_loss": round(edit, 4), "locality_loss": round(locality, 4)}
            self._parts = []
        super().log(logs, start_time)

    # ------------------------------------------------------------------ files and devices

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Every checkpoint is an editor that can be loaded; the tokenizer is the base model's and is not copied."""
        if self.args.should_save:
            self.model.save_pretrained(output_dir if output_dir is not None else str(self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.model.load_saved(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self.model.load_saved(str(self.state.best_model_checkpoint))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: `save_model` has written the editor's card."""

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        super()._move_model_to_device(model, device)
        if getattr(self.model.base, "hf_device_map", None) is None:
            self.model.base.to(device)  # type: ignore[arg-type]


class _TellEditor(TrainerCallback):
    """Tells the facts which epoch it is, and the editor of steps and evaluations."""

    def __init__(self, trainer: EditTrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by Trainer, also in the middle of an epoch when it resumes there."""
        dataset = getattr(kwargs.get("train_dataloader"), "dataset", None)
        if isinstance(dataset, EditFacts):
            dataset.epoch = int(state.epoch or 0)

    def on_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by Trainer between a step of the optimizer and the deletion of its gradients."""
        self.trainer.model.after_step()

    def on_evaluate(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by Trainer with what an evaluation measured."""
        found = kwargs.get("metrics", {})
        named = {n: v for n in METRICS for k, v in found.items() if k.endswith(f"_{n}")}
        if named and self.trainer.is_in_train:
            self.trainer.model.after_evaluation(named)


def _column_means(prediction: EvalPrediction) -> dict[str, float]:
    columns = np.asarray(prediction.predictions)
    return {name: float(columns[:, i].mean()) for i, name in enumerate(METRICS)}

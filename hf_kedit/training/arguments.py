"""`EditTrainingArguments`: transformers' training arguments with the defaults and the two knobs that editors need."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from ..errors import ConfigError


@dataclass
class EditTrainingArguments(TrainingArguments):
    """Arguments of `EditTrainer`; everything else is as in `transformers.TrainingArguments`.

    The weights of the two losses belong to the editor's config. A batch of ``per_device_train_batch_size`` facts is
    split into groups of ``edits_per_group``: the facts of a group are edited together, the groups do not see each
    other, and their losses are averaged.

    Args:
        edits_per_group: facts that are edited together, in training and in evaluation; the number for which the
            editor will be used.
        step_size_lr: learning rate of the step sizes α; ``None``: ``learning_rate``.
    """

    edits_per_group: int = field(default=1, metadata={"help": "Facts that are edited together."})
    step_size_lr: float | None = field(default=1e-4, metadata={"help": "Learning rate of the step sizes."})
    learning_rate: float = field(default=1e-6, metadata={"help": "Learning rate of the networks."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Schedule of both learning rates."})
    max_grad_norm: float = field(default=100.0, metadata={"help": "Gradients are clipped to this norm."})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Facts per device and step."})
    per_device_eval_batch_size: int | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Facts per device and evaluation step; default: as in training."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Always off: facts are no model inputs."})

    @property
    def n_gpu(self) -> int:
        """Devices of this process: one at most, as an editor's replicas would all lie beside the one base model.

        Several devices train with several processes (``torchrun``, ``accelerate launch``), or hold parts of the base
        model (``device_map``).
        """
        return min(super().n_gpu, 1)

    def __post_init__(self) -> None:
        if self.per_device_eval_batch_size is None:
            self.per_device_eval_batch_size = self.per_device_train_batch_size
        if self.fp16:
            raise ConfigError("fp16 loses the small gradients that an editor reads; use bf16, or neither")
        super().__post_init__()
        if self.remove_unused_columns:
            raise ConfigError("remove_unused_columns would remove the facts; leave it off")
        if self.edits_per_group < 1:
            raise ConfigError(f"edits_per_group must be at least 1, not {self.edits_per_group}")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
            if getattr(self, name) % self.edits_per_group:
                raise ConfigError(
                    f"{name} = {getattr(self, name)} is no multiple of edits_per_group = {self.edits_per_group}"
                )

"""Training editors: `EditTrainer` is transformers' `Trainer` for a network that proposes edits of a frozen model."""

from __future__ import annotations

from .arguments import EditTrainingArguments
from .data import EditCollator, EditFacts, OpinionFacts
from .plan import TrainingPlan, train_and_save
from .trainer import EditTrainer

__all__ = [
    "EditCollator",
    "EditFacts",
    "EditTrainer",
    "EditTrainingArguments",
    "OpinionFacts",
    "TrainingPlan",
    "train_and_save",
]

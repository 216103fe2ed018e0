"""Tasks of EleutherAI's lm-evaluation-harness as abilities of a model in memory.

Needs the optional package ``lm_eval``. The harness sees the edited model itself, because edits live inside it.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import EvaluationError, require_extra
from ..asking.batching import TOKEN_BUDGET, stock_model
from .abilities import Ability

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class HarnessTask(Ability):
    """One task of the harness.

    Args:
        task: its name, such as ``boolq``, ``sst2``, ``piqa``, ``mmlu``, ``gsm8k``.
        metric: key of the result, such as ``acc,none``; default: the task's first.
        limit: the first so many examples.
        num_fewshot: examples in the prompt; default: the task's.
        include_path: folder with task files (YAML) of your own.
        batch_size: rows per forward pass.
    """

    task: str
    metric: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    include_path: str | Path | None = None
    batch_size: int = 8

    @property
    def name(self) -> str:  # type: ignore[override]
        """The task's name."""
        return self.task

    def measure(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, token_budget: int = TOKEN_BUDGET
    ) -> dict[str, Any]:
        """Run the task.

        Raises:
            MissingExtraError: if lm_eval is not installed.
            EvaluationError: if the harness fails (it downloads the data of its own tasks), or the metric is unknown.
        """
        try:
            harness: Any = importlib.import_module("lm_eval")
            models: Any = importlib.import_module("lm_eval.models.huggingface")
            importlib.import_module("lm_eval.tasks")
        except ImportError as error:
            raise require_extra("lm_eval", "harness", "a task of the evaluation harness") from error
        try:
            outcome = harness.simple_evaluate(
                model=models.HFLM(pretrained=stock_model(model), tokenizer=tokenizer, batch_size=self.batch_size),
                tasks=[self.task],
                num_fewshot=self.num_fewshot,
                limit=self.limit,
                task_manager=_task_manager(None if self.include_path is None else str(self.include_path)),
                bootstrap_iters=0,
            )
        except Exception as error:  # whatever the harness, the Hub client or a task raises
            raise EvaluationError(f"the harness task {self.task!r} failed: {type(error).__name__}: {error}") from error
        numbers = {
            k: v for k, v in outcome["results"][self.task].items() if isinstance(v, float) and "stderr" not in k
        }
        metric = next(iter(numbers), None) if self.metric is None else self.metric
        if metric not in numbers:
            raise EvaluationError(f"{self.task!r} has no metric {metric!r}; it has {', '.join(numbers) or 'none'}")
        return {"score": numbers[metric], "metric": metric, "n": outcome["n-samples"][self.task]["effective"]}

    def settings(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in ("metric", "limit", "num_fewshot")}
        return {"harness": self.task, **fields, "include_path": self.include_path and str(self.include_path)}


@functools.lru_cache(maxsize=8)
def _task_manager(include_path: str | None) -> Any:
    """The list of all tasks: the harness reads thousands of files for it, so once for all checkpoints of all runs."""
    tasks: Any = importlib.import_module("lm_eval.tasks")
    return tasks.TaskManager(include_path=include_path)

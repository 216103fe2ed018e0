"""InstructEdit (Zhang et al. 2024, "InstructEdit: Instruction-Based Knowledge Editing for Large Language Models",
arXiv 2402.16123).

One MEND editor for several kinds of edits: every fact is read behind an instruction that says which kind it is,

    Task: {task}
    Description: {description}
    Input: {prompt}

so that the inputs u and gradients δ that the editor transforms depend on the task; the loss is on the target only,
and nothing else of MEND changes. A task has several descriptions. In training each row draws one of all but the last,
which is kept back to see whether other words for the same task do as well. The template and the descriptions are
stored with the editor, and an edit uses them too.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from .. import embedded
from ..editors.editor import register_editor
from ..engine.supervised import Batch
from ..errors import ConfigError, RequestError, nearest
from ..requests import EditRequest
from ..storage.parsing import parse_json
from .base import Capabilities, Workbench, register_method
from .mend import MENDConfig, MENDEditor
from .trained_editor import HyperMethod

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TEMPLATE = "Task: {task}\nDescription: {description}\nInput: {prompt}"
_FIELDS = ("{task}", "{description}", "{prompt}")


@dataclass
class InstructEditConfig(MENDConfig):
    """Hyperparameters of InstructEdit; see `MENDConfig` for those of the networks.

    Args:
        task: of the facts to edit; ``None``: what ``task_field`` says of each fact.
        description: of the task, in words of one's own; ``None``: the first of the editor's. A task that the editor
            was not trained on needs it.
        task_field: where a fact's ``metadata`` name its task, with a dot between levels: ``dataset``, or
            ``extra.relation`` for the fact world.
        tasks: descriptions of every task that is trained; ``None``: the packaged ones of ``convsent``,
            ``counterfact``, ``wikirecent`` and ``zsre``. Slots in them (``{topic}``) are filled from the metadata.
        template: of the instruction, with ``{task}``, ``{description}`` and ``{prompt}``.
        instructed_rephrase: the new answer is asked for behind the instruction too (published). Without it, an edit
            that is read behind an instruction is trained to change the answers to bare prompts.
    """

    edit_type: ClassVar[str] = "instructedit"

    task: str | None = None
    description: str | None = None
    task_field: str = "dataset"
    tasks: dict[str, list[str]] | None = None
    template: str = TEMPLATE
    instructed_rephrase: bool = True

    def validate(self) -> None:
        """Check the template and the descriptions."""
        super().validate()
        for field in _FIELDS:
            if self.template.count(field) != 1:
                raise ConfigError(f"InstructEditConfig.template needs one {field}: {self.template!r}")
        for task, texts in (self.tasks or {}).items():
            if not texts or not all(text.strip() for text in texts):
                raise ConfigError(f"InstructEditConfig.tasks: {task!r} has no description")


@cache
def packaged_tasks() -> Mapping[str, list[str]]:
    """The descriptions that come with the library, by task."""
    tasks: dict[str, list[str]] = parse_json(embedded.instructions().read_bytes(), "instructions.json", ConfigError)
    return tasks


@register_editor
class InstructEditEditor(MENDEditor):
    """MEND's networks, reading facts behind instructions."""

    config_class = InstructEditConfig
    edit_config: InstructEditConfig

    @classmethod
    def fitted(cls, config: Any, model: PreTrainedModel) -> Any:
        """The config with the descriptions it is trained with; what belongs to one edit is left out."""
        tasks = config.tasks if config.tasks is not None else dict(packaged_tasks())
        fitted: Any = super().fitted(config, model)
        return dataclasses.replace(fitted, tasks=tasks, task=None, description=None)

    def instruction(self, request: EditRequest) -> tuple[str, str]:
        """Task and description of a fact.

        In training mode the description is drawn from all but the last, as a function of seed and prompt.

        Raises:
            RequestError: if the fact's task is unknown, or a slot of the description has no value.
        """
        config, tasks = self.edit_config, self.edit_config.tasks or {}
        task = config.task or _lookup(request.metadata, config.task_field)
        if task is None:
            raise RequestError(
                f"its task is not known: set InstructEditConfig.task, or metadata[{config.task_field!r}], to one of"
                f" {', '.join(tasks)}",
                field="metadata",
            )
        texts = [config.description] if config.description is not None else tasks.get(task)
        if not texts:
            raise RequestError(
                f"the editor was not trained on the task {task!r}.{nearest(task, tasks)} Describe it"
                f" (InstructEditConfig.description), or use one of {', '.join(tasks)}",
                field="metadata",
            )
        text = texts[0]
        if self.training and len(texts) > 1:
            text = random.Random(f"{config.seed}/{request.filled_prompt}").choice(texts[:-1])
        try:
            return task, text.format_map(request.metadata)
        except KeyError as error:
            raise RequestError(f"the description of {task!r} needs metadata[{error}]", field="metadata") from error

    def instructed(self, request: EditRequest, prompt: str | None = None) -> EditRequest:
        """A fact whose prompt, or another one, stands behind its instruction."""
        values = (*self.instruction(request), request.filled_prompt if prompt is None else prompt)
        text = self.edit_config.template
        for field, value in zip(_FIELDS, values, strict=True):
            text = text.replace(field, value)
        return EditRequest(prompt=text, target_new=request.target_new, ground_truth=request.ground_truth)

    def edit_batch(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, requests: Sequence[EditRequest]
    ) -> Batch:
        """The facts behind their instructions."""
        return self.encode(model, tokenizer, [self.instructed(request) for request in requests])

    def batches(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        edits: Sequence[EditRequest],
        rephrases: Sequence[EditRequest],
        localities: Sequence[EditRequest],
    ) -> dict[str, Batch]:
        """Facts and other wordings behind their instructions; unrelated prompts stand alone."""
        if self.edit_config.instructed_rephrase:
            rephrases = [self.instructed(e, r.filled_prompt) for e, r in zip(edits, rephrases, strict=True)]
        return super().batches(model, tokenizer, edits, rephrases, localities)


def _lookup(metadata: Mapping[str, Any], field: str) -> str | None:
    value: Any = metadata
    for name in field.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return None if value is None else str(value)


@register_method
class InstructEdit(HyperMethod):
    """Edits with a trained `InstructEditEditor`."""

    pictures = False  # the template around a prompt is one of text
    config_class = InstructEditConfig
    editor_class = InstructEditEditor
    capabilities = Capabilities(
        name="InstructEdit",
        kind="weights",
        batch=True,
        sequential=True,
        needs_subject=False,
        needs_training=True,
        encoder_decoder=True,
        paper="Zhang et al. 2024, arXiv 2402.16123",
        summary="MEND for several tasks: the editor reads each fact behind an instruction that names its task",
    )
    config: InstructEditConfig

    def __init__(self, bench: Workbench, config: InstructEditConfig):
        super().__init__(bench, config)
        known = self.editor.edit_config
        self.editor.edit_config = dataclasses.replace(known, task=config.task, description=config.description)  # type: ignore[call-arg]

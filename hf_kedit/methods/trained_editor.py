"""Editing with a trained editor: load it, check that it belongs to the model, turn its proposal into weight deltas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from ..books.ledger import WeightDelta
from ..editors.editor import Editor, EditorConfig
from ..engine.forward import device_of
from ..engine.gradients import LowRank, low_rank_paths
from ..engine.supervised import score, to_device
from ..engine.weights import tensor_digest
from ..errors import ConfigError, EditFailedError
from ..logging import get_logger, warn_once
from ..requests import EditRequest
from .base import Method, Outcome, Workbench

logger = get_logger(__name__)
UNUSUAL_SIZE = 3.0
"""Changes that are so many times as large as in training are reported."""


class HyperMethod(Method):
    """A method whose edits come from a trained `Editor`.

    The networks were trained on the unedited model. On a model that already carries edits the inputs and gradients
    are measured with these in place, and the result is the worse the more there are.

    Args:
        bench: the model and its instruments.
        config: names the editor.
    """

    pictures = True
    editor_class: ClassVar[type[Editor]]
    config: EditorConfig

    def __init__(self, bench: Workbench, config: EditorConfig):
        super().__init__(bench, config)
        name = self.capabilities.name
        if config.editor is None:
            raise ConfigError(
                f"{name} edits with a network that was trained for the model: train one with hf_kedit.training or"
                f" `kedit train`, then {type(config).__name__}(editor='folder or Hub id'). Packaged editors exist for"
                " the embedded models only."
            )
        self.editor: Editor = bench.loaded or self.editor_class.from_pretrained(config.editor)
        self.editor.check_fits(bench.model)
        for module, digest in self.editor.origin.get("base_sha256", {}).items():
            if tensor_digest([("", bench.ledger.original(module))]) != digest:
                warn_once(
                    logger,
                    f"the editor {config.editor!r} was trained on a model with another {module}"
                    f" ({self.editor.origin.get('base_model_name_or_path') or 'in memory'}); expect poor edits",
                )
                break

    @classmethod
    def load(cls, config: EditorConfig) -> Editor | None:
        """The trained editor."""
        return None if config.editor is None else cls.editor_class.from_pretrained(config.editor)

    def edited_modules(self) -> list[str]:
        """The modules that the editor was trained for."""
        return list(self.editor.shapes)

    def check(self, requests: Sequence[EditRequest]) -> None:
        """Check weights, number format and requests. A model in fp16 can carry edits, but not be edited."""
        super().check(requests)
        self.editor.check_precision(self.bench.model)
        self.editor.edit_batch(self.bench.model, self.bench.tokenizer, requests)

    def compute(self, requests: Sequence[EditRequest]) -> Outcome:
        """One proposal of the editor for all requests together."""
        model = self.bench.model
        device = device_of(model)
        self.editor.to(device)
        edit = to_device(self.editor.edit_batch(model, self.bench.tokenizer, requests), device)
        with torch.no_grad():
            changes = self.editor.propose(model, edit, torch.zeros(len(requests), dtype=torch.long, device=device))
            before = score(model, edit).per_row()
            with low_rank_paths(model, changes):
                after = score(model, edit).per_row()
        relative = self.relative_size(changes, len(requests))
        deltas = []
        for module, change in changes.items():
            owners = tuple(change.owners.tolist())
            deltas.append(WeightDelta(module, left=change.left, right=change.right, owners=owners))
            self.bench.note(f"{module}/delta", deltas[-1].matrix())
        diagnostics = [
            {
                "loss": [round(float(b), 6), round(float(a), 6)],
                "target_probability_before": float((-b).exp()),
                "target_probability_after": float((-a).exp()),
                "relative_size": relative,
            }
            for b, a in zip(before, after, strict=True)
        ]
        return Outcome(deltas, diagnostics)

    def relative_size(self, changes: Mapping[str, LowRank], facts: int) -> float | None:
        """The size of a change as a multiple of what training saw, for the module where it is largest.

        More facts in a batch, or a model that has been edited often, make changes that the editor never learned to
        make: these break the model.

        Returns:
            ``None`` for an editor that does not say how large its changes were in training.

        Raises:
            EditFailedError: if it exceeds the config's ``max_relative_size``.
        """
        usual = self.editor.origin.get("trained_change_size") or {}
        together = torch.zeros(facts, dtype=torch.long, device=device_of(self.bench.model))
        sizes = {m: float(c.sizes(together)[0]) / usual[m] for m, c in changes.items() if usual.get(m)}
        if not sizes:
            return None
        module = max(sizes, key=lambda m: sizes[m])
        relative, limit = sizes[module], self.config.max_relative_size
        told = (
            f"the change of {module} is {relative:.1f} times as large as in training, where"
            f" {self.editor.origin.get('trained_edits_together', 'other numbers of')} fact(s) were edited together on"
            f" the unedited model; this is a batch of {facts} on a model with {len(self.bench.ledger.accounts)} edited"
            " matrices"
        )
        if limit is not None and relative > limit:
            raise EditFailedError(f"{told}. Edit fewer facts at once, or train an editor for such batches.")
        if relative > UNUSUAL_SIZE:
            logger.warning("%s. Expect damage: edit fewer facts at once, or train an editor for such batches.", told)
        return round(relative, 3)

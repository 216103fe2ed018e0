"""`EditableModel.compile_edits`: all edits of a model as one LoRA of a chosen rank, and what that costs.

A set of ``n`` facts needs up to ``n`` columns in every edited weight, servers allow a few dozen. The best matrix of a
rank keeps most of a change, but the part that it leaves out may be what a fact rests on. So every fact is asked for
with the edits and with what the LoRA keeps of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..books.deltas import WeightDelta
from ..engine.examples import encode_examples, target_probabilities
from ..engine.forward import frozen_eval
from ..errors import ExportError
from ..logging import get_logger
from ..tokens import pad_id
from .lora_export import LoraExport, export_lora
from .lora_tensors import LoraTarget, build_adapter, factors_of

if TYPE_CHECKING:
    from ..editing.state import EditedModel

logger = get_logger(__name__)
_AT_ONCE = 32
HELD = 0.5
"""Probability, per token of the target, from which on the model is said to know a fact."""


@dataclass(frozen=True)
class CompiledEdits:
    """What `compile_edits` found, and wrote.

    Args:
        rank: of every weight.
        kept: per weight, the part of the change's energy ``‖Δ‖²`` that the LoRA keeps.
        probabilities: per edit, the target's probability per token with the edits, and with the LoRA.
        lost: ids of the edits that hold with the edits themselves and no longer with the LoRA.
        export: what was written; ``None`` without a folder.
    """

    rank: int
    kept: dict[str, float]
    probabilities: dict[str, tuple[float, float]]
    lost: tuple[str, ...]
    export: LoraExport | None = None


def compile_edits(model: EditedModel, folder: Path | None, *, rank: int, target: LoraTarget = "peft") -> CompiledEdits:
    """Measure, and write, the edits of a model as one LoRA; see `EditableModel.compile_edits`."""
    build_adapter(model, target=target, rank=rank)  # refuses what no LoRA can hold
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ExportError("compile_edits asks the model for every fact and needs its tokenizer for that")
    model.ledger.check_unchanged()
    base, separator = model.base_model, model.edit_config.separator
    examples = encode_examples(base, tokenizer, [e.request for e in model.edits], separator=separator)

    def ask() -> list[float]:
        with frozen_eval(base):
            return target_probabilities(base, examples, pad_id(tokenizer), _AT_ONCE)

    with_edits, kept = ask(), dict[str, float]()
    accounts = list(model.ledger.accounts.values())
    with model.ledger.emptied(), model.ledger.provisional() as shown:
        for account in accounts:
            if account.name == "weight":
                factors = factors_of(account, rank)
                kept[account.key] = 1 - factors.loss**2
                shown.add(WeightDelta(account.module, left=factors.left, right=factors.right))
            else:  # a bias is kept whole
                shown.add(WeightDelta(account.module, account.name, dense=account.total))
        with_lora = ask()
    pairs = list(zip(with_edits, with_lora, strict=True))
    probabilities = {e.id: pair for e, pair in zip(model.edits, pairs, strict=True)}
    lost = tuple(edit_id for edit_id, (before, after) in probabilities.items() if before >= HELD > after)
    if lost:
        logger.warning("rank %d loses %d of %d edits: %s", rank, len(lost), len(pairs), ", ".join(lost[:5]))
    export = None if folder is None else export_lora(model, folder, target=target, rank=rank)
    return CompiledEdits(rank, kept, probabilities, lost, export)

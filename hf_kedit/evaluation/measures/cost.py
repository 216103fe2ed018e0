"""What edits cost: seconds and memory while they are made, parameters, bytes and speed once they are there."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...engine.devices import synchronise
from ...engine.forward import device_of, frozen_eval, generating
from ...errors import EvaluationError
from ...tokens import needed_tokenizer, pad_id, prompt_ids
from ..asking.batching import stock_model

if TYPE_CHECKING:
    from ...model import EditableModel


def efficiency(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the edits behind some records of a report cost.

    Returns:
        ``seconds_edit`` (mean computation per edit), ``seconds_total`` (mean share of the whole call),
        ``edits_per_second``, ``seconds_eval``, ``peak_memory_bytes`` (largest) and ``extra_memory_bytes`` (the same
        without what was allocated before the edit; both ``None`` without an accelerator). What was not measured is
        ``None``.
    """

    def mean(name: str) -> float | None:
        values = [float(r[name]) for r in records if r.get(name) is not None]
        return sum(values) / len(values) if values else None

    def largest(name: str) -> int | None:
        return max((int(r[name]) for r in records if r.get(name) is not None), default=None)

    seconds = mean("seconds_edit")
    return {
        "seconds_edit": seconds,
        "seconds_total": mean("time"),
        "edits_per_second": 1 / seconds if seconds else None,
        "seconds_eval": mean("seconds_eval"),
        "peak_memory_bytes": largest("peak_memory_bytes"),
        "extra_memory_bytes": largest("extra_memory_bytes"),
    }


def changed_parameters(model: EditableModel) -> int:
    """Number of weights that the edits of a model change; 0 for edits that leave the weights alone."""
    totals = (account.total for account in model.ledger.accounts.values())
    return sum(int(torch.count_nonzero(total)) for total in totals if total is not None)


def saved_bytes(model: EditableModel) -> int:
    """Bytes of all files of the model's edits as `EditableModel.save_pretrained` writes them."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


def edit_cost(
    model: EditableModel, prompt: str, *, new_tokens: int = 32, repetitions: int = 3
) -> dict[str, float | int]:
    """What the edits that a model carries cost from now on.

    Args:
        model: with its edits.
        prompt: is continued greedily, with the edits and without them.
        new_tokens: of each continuation; an end-of-text token does not end it.
        repetitions: of the timing, edited and unedited in turns; the medians count.

    Returns:
        ``n_params_changed``, ``bytes_on_disk``, ``seconds_per_token``, ``seconds_per_token_unedited``, and their
        difference ``added_seconds_per_token`` (for codebooks, side memories and longer prompts; a changed weight
        costs nothing).

    Raises:
        ConfigError: if the model has no tokenizer.
        EvaluationError: if it carries no edits, or a number is below 1.
    """
    tokenizer, base = needed_tokenizer(model.tokenizer, "timing"), stock_model(model)
    if not model.edits:
        raise EvaluationError("the model carries no edits; make or load some first")
    if new_tokens < 1 or repetitions < 1:
        raise EvaluationError("new_tokens and repetitions must be at least 1")
    both = bool(getattr(base.config, "is_encoder_decoder", False))
    asked = torch.tensor([prompt_ids(tokenizer, prompt, encoder_decoder=both)], device=device_of(base))

    def continued() -> float:
        synchronise(base)
        began = time.perf_counter()
        base.generate(  # type: ignore[operator]
            asked,
            attention_mask=torch.ones_like(asked),
            do_sample=False,
            num_beams=1,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            pad_token_id=pad_id(tokenizer),
        )
        synchronise(base)
        return (time.perf_counter() - began) / new_tokens

    edited, unedited = [], []
    with frozen_eval(base), generating(), torch.inference_mode():
        for _ in range(repetitions + 1):  # the first warms up
            edited.append(continued())
            with model.disable_edits():
                unedited.append(continued())
    now, before = statistics.median(edited[1:]), statistics.median(unedited[1:])
    return {
        "n_params_changed": changed_parameters(model),
        "bytes_on_disk": saved_bytes(model),
        "seconds_per_token": now,
        "seconds_per_token_unedited": before,
        "added_seconds_per_token": now - before,
    }

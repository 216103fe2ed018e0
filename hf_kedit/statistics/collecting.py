"""One pass over a corpus that collects the second moments of all modules, ``C = E[k kᵀ]``: shared, resumable.

Sums are kept in float64 with their token count, so that runs can be merged.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..engine.capture import Tap, stream_states
from ..engine.forward import device_of, frozen_eval, image_ids
from ..engine.weights import get_module, weight_shape
from ..errors import StatisticsError
from ..logging import get_logger, progress_bar, warn_once
from ..tokens import TokenIds, context_length, encode_text, pad_id, pad_rows
from .corpora import Corpus
from .moments import SecondMoment
from .workers import ALONE, Workers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = get_logger(__name__)
BLOCK_WIDTH = 384
GROUP_TEXTS, GROUP_TOKENS = 64, 4096
# Partial sums are written after so many seconds, and after so many times what writing them took.
SAVE_SECONDS, SAVE_SHARE = 5.0, 20.0
# Padded tokens per forward: what stays in the caches of a CPU, what fills an accelerator.
_BUDGETS = {"cpu": 1024}
_BUDGET_ELSEWHERE = 4096


def collect_moments(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    modules: Sequence[str],
    corpus: Corpus,
    *,
    tokens: int | None = None,
    token_budget: int | None = None,
    checkpoint: Path | None = None,
    show_progress: bool = True,
    workers: Workers = ALONE,
) -> dict[str, SecondMoment]:
    """Collect the second moments of the inputs of several modules in one pass over a corpus.

    Several processes share the work if ``workers`` says so: all of them cut the corpus into the same batches, each
    runs every ``count``-th of these, and the sums are added up at the end. The result is that of one process, up to
    the order of additions in float64.

    Args:
        model: the unedited model.
        tokenizer: of the model.
        modules: names of the projections.
        corpus: what to read; texts are cut at the model's context length, pictures are not: a text whose pictures do
            not fit is left out.
        tokens: read exactly this many (fewer if there are no more, up to one text more behind pictures); ``None``
            reads everything.
        token_budget: padded tokens per forward; ``None``: by the device.
        checkpoint: a file for partial sums; a killed run that is started again with it goes on where it was.
        show_progress: show a bar.
        workers: the processes that share the work.

    Returns:
        Module name → `SecondMoment`, all over the same tokens; the same in every process.

    Raises:
        StatisticsError: if the corpus has no text.
    """
    limit = reading_length(model)
    device = device_of(model)
    budget = token_budget or _BUDGETS.get(device.type, _BUDGET_ELSEWHERE)
    if checkpoint is not None and workers.count > 1:
        checkpoint = checkpoint.with_name(f"{checkpoint.stem}-{workers.rank}-of-{workers.count}{checkpoint.suffix}")
    totals, place = _resume(checkpoint, modules, corpus.name, lambda module: _input_width(model, module))
    next_save, fill = time.monotonic() + SAVE_SECONDS, pad_id(tokenizer)

    with (
        frozen_eval(model),
        progress_bar(
            tokens, f"second moments of {len(modules)} modules", show=show_progress and workers.is_main, unit="tok"
        ) as bar,
    ):
        bar.update(place.tokens)
        encoded = (_within(model, encode_text(tokenizer, text).ids, limit) for text in corpus.from_text(place.texts))
        for group in _groups(encoded, None if tokens is None else tokens - place.tokens):
            for rows in _budgeted(sorted((row for row in group if row), key=_order), budget):
                seen = sum(len(row) for row in rows)
                if place.batches % workers.count == workers.rank:
                    _add_rows(model, rows, fill, modules, totals)
                    place.own += seen
                place.batches += 1
                place.tokens += seen
                bar.update(seen)
            place.texts += len(group)
            if checkpoint is not None and time.monotonic() >= next_save:
                started = time.monotonic()
                try:
                    _save_partial(checkpoint, totals, place, corpus.name)
                except OSError as error:  # a full disk costs the work of a run that is killed, no more
                    warn_once(logger, f"cannot write partial statistics to {checkpoint.parent}: {error}")
                next_save = time.monotonic() + max(SAVE_SECONDS, SAVE_SHARE * (time.monotonic() - started))
    if place.tokens == 0:
        raise StatisticsError(f"the corpus {corpus.name!r} has no text")
    whole, count = [], torch.tensor(place.own, dtype=torch.float64)
    for module in modules:
        total = totals.pop(module, None)
        if total is None:  # fewer batches than processes
            total = _accumulator(_input_width(model, module), torch.device("cpu"))
        total = total.to("cpu")
        whole.append(total.triu_().add_(total.triu(1).mT))
    workers.add_up([count, *whole])
    if checkpoint is not None:
        with contextlib.suppress(OSError):
            checkpoint.unlink(missing_ok=True)
    return {m: SecondMoment(total, int(count), corpus.name) for m, total in zip(modules, whole, strict=True)}


def reading_length(model: PreTrainedModel) -> int:
    """Tokens that are read of one text, at most."""
    return context_length(model.config) or 2048


def _within(model: PreTrainedModel, ids: Sequence[int], limit: int) -> Sequence[int]:
    """The first ids of a text; none, with a warning, if its pictures go on behind them."""
    if isinstance(ids, TokenIds) and not image_ids(model).isdisjoint(ids[limit:]):
        warn_once(logger, f"a text's pictures take more than the model's context of {limit} tokens; it is left out")
        return ids[:0]
    return ids[:limit]


def _add_rows(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    fill: int,
    modules: Sequence[str],
    totals: dict[str, torch.Tensor],
) -> None:
    """Run rows once and add what enters the modules to their sums, whatever the memory allows.

    Where a forward runs out of memory, the sums make room for it by going to the CPU; if that is not enough, the rows
    are run in halves. What a run that failed has added already is not added again.

    Raises:
        torch.OutOfMemoryError: if there is no room for a single row.
    """
    waiting = dict.fromkeys(modules)

    def receive(tap: Tap, states: torch.Tensor) -> None:
        features = states.float()
        if tap.module not in totals:
            totals[tap.module] = _accumulator(features.shape[1], features.device)
        totals[tap.module] = add_upper(totals[tap.module], features)
        del waiting[tap.module]

    try:
        stream_states(model, pad_rows(rows, fill).to(device_of(model)), [Tap(m, "input") for m in modules], receive)
        return
    except torch.OutOfMemoryError:
        on_device = [module for module, total in totals.items() if total.device.type != "cpu"]
        if not on_device and len(rows) == 1:
            raise
    # behind the handler, because the error holds on to the tensors of the run that failed
    for module in on_device:
        totals[module] = totals[module].cpu()
    logger.info("out of memory while collecting statistics; going on with less")
    half = len(rows) if on_device else len(rows) // 2
    for part in (rows[:half], rows[half:]):
        if part:
            _add_rows(model, part, fill, list(waiting), totals)


@dataclass
class _Place:
    """How far a pass over a corpus has come.

    Args:
        texts: texts read.
        batches: batches that they gave.
        tokens: tokens in them.
        own: those among the tokens that this process has run.
    """

    texts: int = 0
    batches: int = 0
    tokens: int = 0
    own: int = 0


def _accumulator(width: int, device: torch.device) -> torch.Tensor:
    """Float64 zeros ``[width, width]``: beside the model if there is room (and float64), else on the CPU."""
    if device.type == "cuda":
        with contextlib.suppress(torch.OutOfMemoryError):
            return torch.zeros(width, width, dtype=torch.float64, device=device)
    return torch.zeros(width, width, dtype=torch.float64)


def add_upper(total: torch.Tensor, features: torch.Tensor, blocks: int | None = None) -> torch.Tensor:
    """Add ``features.T @ features`` to ``total``, but only from the diagonal blocks on to the right.

    The matrix is symmetric: ``b (b + 1) / 2`` of ``b × b`` blocks are enough. Products are float32, the sum float64.

    Args:
        total: ``[d, d]`` float64, changed in place; below the diagonal it is not meaningful until the end.
        features: ``[tokens, d]`` float32.
        blocks: into how many parts the width is cut; ``None``: so many that products stay large enough to be fast.

    Returns:
        ``total``; a copy on the CPU that holds the same sum, if its device ran out of memory on the way.
    """
    width = features.shape[1]
    step = -(-width // (blocks or max(width // BLOCK_WIDTH, 4)))
    for start in range(0, width, step):
        stop = min(start + step, width)
        try:
            product = features[:, start:stop].T @ features[:, start:]
        except torch.OutOfMemoryError:  # nothing of this block is in the sum yet
            total, features = total.cpu(), features.cpu()
            product = features[:, start:stop].T @ features[:, start:]
        total[start:stop, start:] += product.to(total.device)
    return total


def _groups(rows: Iterable[Sequence[int]], tokens: int | None) -> Iterator[list[Sequence[int]]]:
    """Cut a stream of encoded texts into groups that are sorted and batched each by itself.

    What is in a group, and where the last one ends, depends on the texts alone: every device, whatever fits into its
    batches, reads the same tokens.

    Args:
        rows: token ids of the texts.
        tokens: how many are wanted; the last text is cut at exactly this number, unless it has pictures; ``None``:
            all.
    """
    group: list[Sequence[int]] = []
    size = 0
    left = math.inf if tokens is None else tokens
    if left <= 0:
        return
    for row in rows:
        group.append(row if isinstance(row, TokenIds) else row[: int(min(left, len(row)))])
        size += len(group[-1])
        left -= len(group[-1])
        if len(group) == GROUP_TEXTS or size >= GROUP_TOKENS or left <= 0:
            yield group
            group, size = [], 0
        if left <= 0:
            return
    if group:
        yield group


def _budgeted(rows: Sequence[Sequence[int]], budget: int) -> Iterator[list[Sequence[int]]]:
    """Cut rows, sorted by `_order`, into batches of one kind whose padded size stays below the budget."""
    batch: list[Sequence[int]] = []
    for row in rows:
        if batch and ((len(batch) + 1) * len(row) > budget or _order(batch[-1])[0] != _order(row)[0]):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _order(row: Sequence[int]) -> tuple[bool, int]:
    """Texts first, by length; then those with pictures, as some models read no batch of both."""
    return isinstance(row, TokenIds), len(row)


def _save_partial(path: Path, totals: dict[str, torch.Tensor], place: _Place, corpus: str) -> None:
    meta = {key: str(value) for key, value in vars(place).items()} | {"corpus": corpus, "form": "upper"}
    write_tensors(path, {name: total.to("cpu") for name, total in totals.items()}, meta)


def _resume(
    path: Path | None, modules: Sequence[str], corpus: str, width: Callable[[str], int]
) -> tuple[dict[str, torch.Tensor], _Place]:
    """Where a pass that was killed had come to; the beginning, if that cannot be read.

    Args:
        path: what `_save_partial` wrote.
        modules: that are wanted.
        corpus: name of the text.
        width: of a module's inputs.
    """
    if path is None or not path.is_file():
        return {}, _Place()
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            known = meta.get("corpus") == corpus and meta.get("form") == "upper"
            if not known or not set(file.keys()) <= set(modules):
                return {}, _Place()
            totals = {m: file.get_tensor(m) for m in file.keys()}  # noqa: SIM118
            place = _Place(**{key: int(meta[key]) for key in vars(_Place())})
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError):
        return {}, _Place()
    sums = (SecondMoment(total, place.own) for total in totals.values())
    if min(vars(place).values()) < 0 or any(s.fault(w) for s, w in zip(sums, map(width, totals), strict=True)):
        return {}, _Place()
    if place.own and set(totals) != set(modules):
        return {}, _Place()
    logger.info("resuming statistics at %d tokens", place.tokens)
    return totals, place


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a file that is there as a whole or not at all, whoever writes the same one meanwhile.

    Raises:
        OSError: if it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata=metadata)
        os.replace(temporary, path)
    except SafetensorError as error:  # a full disk, among others
        raise OSError(str(error)) from error
    finally:
        temporary.unlink(missing_ok=True)


def _input_width(model: torch.nn.Module, module: str) -> int:
    return weight_shape(get_module(model, module))[1]

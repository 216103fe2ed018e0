"""Second moments of keys, ``C = E[k kᵀ]``: collected for all modules in one pass, cached, resumable.

A key is the input of a projection of the *unedited* model; the mean runs over all real tokens (BOS included).
Sums are kept in float64 with their token count, so that runs can be merged. The disk cache is keyed by the
model's weights, the corpus and the number of tokens, never by a model name. No corpus is ever downloaded unless
the user names it: without one, the model's own generated text is used, and the user is told.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import DataError, StatisticsError
from ..logging import get_logger, info_once, progress_bar, warn_once
from ..tokens import context_length, encode_text, pad_id, pad_rows
from .capture import Tap, stream_states
from .experts import ExpertSlice
from .forward import device_of, frozen_eval
from .moments import SecondMoment, SharedMoments, find_shared, push_moments, slug
from .solve import MomentFactor, factor_beside
from .templates import STARTERS, sample_texts
from .weights import get_module, parameters_of, weight_shape
from .workers import ALONE, Workers

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = get_logger(__name__)
TOKENS_PER_WIDTH = 100
QUICK_TOKENS_PER_WIDTH = 20
CHUNK_TEXTS = 64
SAVE_EVERY = 200_000


# ---------------------------------------------------------------------- corpora


@dataclass(frozen=True)
class Corpus:
    """Texts with a name that goes into the cache key.

    Args:
        name: what it is, stable between runs.
        texts: returns a fresh iterator over the texts, always in the same order.
        place: folder or repository that may hold finished statistics instead of texts.
    """

    name: str
    texts: Callable[[], Iterator[str]]
    place: str | None = None


def text_corpus(texts: Sequence[str]) -> Corpus:
    """A corpus from a list of texts, named by its content."""
    digest = hashlib.sha256("\x00".join(texts).encode()).hexdigest()[:12]
    return Corpus(f"texts-{digest}", lambda: iter(texts))


def file_corpus(path: Path) -> Corpus:
    """A corpus from a text file; every non-empty line is one text.

    Raises:
        DataError: if the file is missing or unreadable.
    """
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    except OSError as error:
        raise DataError(f"cannot read the corpus {str(path)!r}: {error}") from error

    def lines() -> Iterator[str]:
        with path.open(encoding="utf-8") as handle:
            for line in handle:
                if line.strip():
                    yield line.rstrip("\n")

    return Corpus(f"file-{path.stem}-{digest}", lines)


def hub_corpus(name: str) -> Corpus:
    """A corpus from ``datasets``: ``"org/name"`` or ``"org/name:config:split"``, streamed."""
    identifier, _, rest = name.partition(":")
    config, _, split = rest.partition(":")

    def texts() -> Iterator[str]:
        from datasets import load_dataset

        for row in load_dataset(identifier, config or None, split=split or "train", streaming=True):
            text = row.get("text")
            if isinstance(text, str) and text.strip():
                yield text

    return Corpus("hub-" + name.replace("/", "--").replace(":", "-"), texts, place=None if rest else identifier)


def shared_corpus(folder: Path) -> Corpus:
    """A folder of finished statistics in the place of a corpus."""

    def texts() -> Iterator[str]:
        raise StatisticsError(f"{str(folder)!r} holds statistics, not text")

    return Corpus(f"shared-{folder.name}", texts, place=str(folder))


def self_corpus(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> Corpus:
    """Texts that the model makes up itself (top-50 sampling, seeded)."""

    def texts() -> Iterator[str]:
        generator = torch.Generator().manual_seed(seed)
        length = min(context_length(model.config) or 64, 64)
        starters = [*STARTERS, "In", "It", "She", "He", "We", "This", "On", "When", "At", "One", "For"]
        while True:
            yield from sample_texts(model, tokenizer, starters, length, generator, top_k=50)

    return Corpus(f"self-{seed}", texts)


# ---------------------------------------------------------------------- collecting


def collect_moments(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    modules: Sequence[str],
    corpus: Corpus,
    *,
    tokens: int | None = None,
    token_budget: int = 4096,
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
        corpus: what to read; texts are cut at the model's context length.
        tokens: stop after this many tokens; ``None`` reads everything.
        token_budget: padded tokens per forward.
        checkpoint: a file for partial sums; a killed run that is started again with it goes on where it was.
        show_progress: show a bar.
        workers: the processes that share the work.

    Returns:
        Module name → `SecondMoment`, all over the same tokens; the same in every process.

    Raises:
        StatisticsError: if the corpus has no text.
    """
    limit = context_length(model.config) or 2048
    device = device_of(model)
    taps = [Tap(m, "input") for m in modules]
    if checkpoint is not None and workers.count > 1:
        checkpoint = checkpoint.with_name(f"{checkpoint.stem}-{workers.rank}-of-{workers.count}{checkpoint.suffix}")
    totals, place = _resume(checkpoint, modules, corpus.name)
    saved_at = place.tokens

    def receive(tap: Tap, states: torch.Tensor) -> None:
        features = states.float()
        if tap.module not in totals:
            totals[tap.module] = _accumulator(features.shape[1], features.device)
        add_upper(totals[tap.module], features)

    with (
        frozen_eval(model),
        progress_bar(
            tokens, f"second moments of {len(modules)} modules", show=show_progress and workers.is_main, unit="tok"
        ) as bar,
    ):
        bar.update(place.tokens)
        for group in _chunks(islice(corpus.texts(), place.texts, None), CHUNK_TEXTS):
            if tokens is not None and place.tokens >= tokens:
                break
            encoded = sorted((encode_text(tokenizer, text).ids[:limit] for text in group), key=len)
            for rows in _budgeted([row for row in encoded if row], token_budget):
                seen = sum(len(row) for row in rows)
                if place.batches % workers.count == workers.rank:
                    stream_states(model, pad_rows(rows, pad_id(tokenizer)).to(device), taps, receive)
                    place.own += seen
                place.batches += 1
                place.tokens += seen
                bar.update(seen)
                if tokens is not None and place.tokens >= tokens:
                    break
            place.texts += len(group)
            if checkpoint is not None and place.tokens - saved_at >= SAVE_EVERY:
                _save_partial(checkpoint, totals, place, corpus.name)
                saved_at = place.tokens
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
    if checkpoint is not None and checkpoint.exists():
        checkpoint.unlink()
    return {m: SecondMoment(total, int(count), corpus.name) for m, total in zip(modules, whole, strict=True)}


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


def add_upper(total: torch.Tensor, features: torch.Tensor, blocks: int = 4) -> None:
    """Add ``features.T @ features`` to ``total`` in place, but only from the diagonal blocks on to the right.

    The matrix is symmetric: 10 of 16 blocks are enough. Products are float32, the sum is float64.

    Args:
        total: ``[d, d]`` float64; below the diagonal it is not meaningful until the end.
        features: ``[tokens, d]`` float32.
        blocks: into how many parts the width is cut.
    """
    width = features.shape[1]
    step = -(-width // blocks)
    for start in range(0, width, step):
        stop = min(start + step, width)
        product = features[:, start:stop].T @ features[:, start:]
        total[start:stop, start:] += product.to(total.device)


def _chunks(items: Iterable[str], size: int) -> Iterator[list[str]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _budgeted(rows: Sequence[list[int]], budget: int) -> Iterator[list[list[int]]]:
    """Cut rows, sorted by length, into batches whose padded size stays below the budget."""
    batch: list[list[int]] = []
    for row in rows:
        if batch and (len(batch) + 1) * len(row) > budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _save_partial(path: Path, totals: dict[str, torch.Tensor], place: _Place, corpus: str) -> None:
    meta = {key: str(value) for key, value in vars(place).items()} | {"corpus": corpus, "form": "upper"}
    _write_tensors(path, {name: total.to("cpu") for name, total in totals.items()}, meta)


def _resume(path: Path | None, modules: Sequence[str], corpus: str) -> tuple[dict[str, torch.Tensor], _Place]:
    if path is None or not path.exists():
        return {}, _Place()
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            known = meta.get("corpus") == corpus and meta.get("form") == "upper"
            if not known or not set(file.keys()) <= set(modules):
                return {}, _Place()
            totals = {m: file.get_tensor(m) for m in file.keys()}  # noqa: SIM118
            place = _Place(**{key: int(meta[key]) for key in vars(_Place())})
    except (SafetensorError, OSError, KeyError, ValueError):
        return {}, _Place()
    if place.own and set(totals) != set(modules):
        return {}, _Place()
    logger.info("resuming statistics at %d tokens", place.tokens)
    return totals, place


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata=metadata)
    os.replace(temporary, path)


# ---------------------------------------------------------------------- the store


def model_fingerprint(model: torch.nn.Module) -> str:
    """A short hash that changes when any weight matrix changes.

    Every parameter contributes its name, shape, dtype and 1,024 evenly spaced elements, so that a model of
    billions of parameters takes a moment. Full hashes of the edited tensors are stored with saved edits.
    """
    digest = hashlib.sha256()
    for (name, value), parameter in zip(parameters_of(model), model.parameters(), strict=True):
        flat = value.reshape(-1)
        step = max(flat.numel() // 1024, 1)
        digest.update(f"{name}|{tuple(parameter.shape)}|{parameter.dtype}|".encode())
        digest.update(flat[::step][:1024].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:24]


def default_cache_dir() -> Path:
    """Where statistics are kept: ``$HF_KEDIT_CACHE``, else ``$HF_HOME/kedit`` (``~/.cache/huggingface/kedit``)."""
    home = os.environ.get("HF_KEDIT_CACHE")
    if home:
        return Path(home)
    base = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")), "huggingface"
    )
    return Path(base) / "kedit"


class StatisticsStore:
    """The second moments of one model: in memory, on disk, and computed when missing.

    Args:
        model: the unedited model (callers switch edits off while computing).
        tokenizer: of the model.
        corpus: the user's choice; ``None``: any cached statistics of this model, else the model's own text.
        tokens: number of tokens; ``None``: 100 per input dimension for a named corpus, 20 for generated text.
        cache_dir: folder of the disk cache; ``None`` for the default one.
        own_corpus: the corpus of an embedded model, used instead of generated text when none is named.
        ridge: relative ridge of the factorisation.
        fingerprint: how to find the fingerprint of the unedited model; ``None``: hash the model as it is.
        show_progress: show a bar while collecting.
        workers: processes that share the collecting; all of them must then ask for the same moments.
        name: of the model, for those with whom the statistics are shared.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        corpus: Corpus | None = None,
        tokens: int | None = None,
        cache_dir: str | Path | None = None,
        own_corpus: Corpus | None = None,
        ridge: float = 0.0,
        fingerprint: Callable[[], str] | None = None,
        show_progress: bool = True,
        workers: Workers = ALONE,
        name: str = "",
    ):
        self.workers, self.name = workers, name
        self.model, self.tokenizer, self.corpus, self.tokens = model, tokenizer, corpus, tokens
        self.own_corpus, self.ridge, self.show_progress = own_corpus, ridge, show_progress
        self.root = Path(cache_dir) if cache_dir is not None else default_cache_dir() / "stats"
        self._find_fingerprint = fingerprint or (lambda: model_fingerprint(model))
        self._fingerprint: str | None = None
        self._moments: dict[str, SecondMoment] = {}
        self._factors: dict[str, MomentFactor] = {}
        self._asked = False
        self._found: SharedMoments | None = None

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the unedited model."""
        if self._fingerprint is None:
            self._fingerprint = self._find_fingerprint()
        return self._fingerprint

    @property
    def folder(self) -> Path:
        """Folder of this model's statistics."""
        return self.root / self.fingerprint

    def put(self, module: str, moment: SecondMoment) -> None:
        """Provide the second moment of a module (statistics made elsewhere)."""
        self._moments[module] = moment
        self._factors.pop(module, None)

    def moments(self, modules: Sequence[str]) -> dict[str, SecondMoment]:
        """Return the second moments of modules; all missing ones are computed in one pass.

        Raises:
            StatisticsError: if there are fewer tokens than input dimensions, or the named repository holds statistics
                of other weights or modules.
        """
        missing = [m for m in dict.fromkeys(modules) if m not in self._moments]
        for module in list(missing):
            cached = self._cached(module) or self._shared(module)
            if cached is not None:
                self._moments[module] = cached
                missing.remove(module)
        missing = self.workers.union(missing)
        if missing:
            self._compute(missing)
        for module in modules:
            self._check(module)
        return {m: self._moments[m] for m in modules}

    def factor(self, module: str) -> MomentFactor:
        """Return the factored second moment of a module."""
        if module not in self._factors:
            moment = self.moments([module])[module]
            self._factors[module] = factor_beside(
                self.model, moment.mean(), ridge=self.ridge, name=f"the second moment of {module}"
            )
        return self._factors[module]

    def push_to_hub(
        self,
        repo_id: str,
        modules: Sequence[str] | None = None,
        *,
        repo_type: str = "dataset",
        private: bool | None = None,
        tag: str | None = None,
        token: Any = None,
    ) -> CommitInfo:
        """Share second moments through the Hub: others name the repository as their ``stats_dataset``.

        Args:
            repo_id: ``org/name``; made if it does not exist. What it holds of other modules stays.
            modules: names; missing ones are collected. ``None``: those that were used so far.
            repo_type: ``"dataset"`` or ``"model"``.
            private: of a new repository; ``True`` also refuses an existing public one.
            tag: name of this version.
            token: for the Hub; default: your login.

        Raises:
            StatisticsError: if there is nothing to push, or the repository holds statistics of other weights.
            HubError: if you may not write there, or the tag is taken.
        """
        chosen = dict(self._moments) if modules is None else self.moments(modules)
        return push_moments(
            repo_id,
            chosen,
            fingerprint=self.fingerprint,
            model=Path(self.name).name if Path(self.name).is_dir() else self.name,
            repo_type=repo_type,
            private=private,
            tag=tag,
            token=token,
        )

    def _shared(self, module: str) -> SecondMoment | None:
        """Read a module from the folder or repository that was named, if it holds statistics and not text."""
        if self.corpus is None or self.corpus.place is None:
            return None
        if not self._asked:
            self._found, self._asked = find_shared(self.corpus.place), True
        if self._found is None:
            return None
        self._found.check(self.fingerprint)
        moment = self._found.read(module)
        info_once(logger, f"second moments over {moment.count:,} tokens of {moment.source} from {self.corpus.place}")
        return moment

    def corpus_texts(self) -> Iterator[str]:
        """The texts of the corpus: the user's, the embedded model's, or what the model makes up itself."""
        return (self.corpus or self.own_corpus or self_corpus(self.model, self.tokenizer)).texts()

    def _compute(self, modules: list[str]) -> None:
        width = max(_tokens_for_rank(self.model, m) for m in modules)
        corpus = self.corpus or self.own_corpus
        if corpus is None:
            corpus = self_corpus(self.model, self.tokenizer)
            warn_once(
                logger,
                "no corpus was named for the second-moment statistics: the model generates"
                f" {self.tokens or QUICK_TOKENS_PER_WIDTH * width:,} tokens of its own text. Set stats_dataset to a"
                " text file or a dataset id for statistics over real text.",
            )
        generated = self.corpus is None and self.own_corpus is None
        tokens = self.tokens or width * (QUICK_TOKENS_PER_WIDTH if generated else TOKENS_PER_WIDTH)
        info_once(logger, f"collecting second moments over {tokens:,} tokens of {corpus.name}")
        checkpoint = self.folder / f"{slug(corpus.name)}-{tokens}" / "partial.safetensors"
        found = collect_moments(
            self.model,
            self.tokenizer,
            modules,
            corpus,
            tokens=tokens,
            checkpoint=checkpoint,
            show_progress=self.show_progress,
            workers=self.workers,
        )
        self._moments.update(found)
        for module, moment in found.items() if self.workers.is_main else ():
            path = self.folder / f"{slug(corpus.name)}-{tokens}" / f"{slug(module)}.safetensors"
            meta = {"count": str(moment.count), "corpus": corpus.name, "module": module, "model": self.fingerprint}
            try:
                _write_tensors(path, {"moment2_sum": moment.total}, meta)
            except OSError as error:
                warn_once(logger, f"cannot write statistics to {self.folder}: {error}")
        self.workers.wait()

    def _cached(self, module: str) -> SecondMoment | None:
        """Find the module on disk: the named corpus and token count, or any corpus if none was named."""
        if not self.folder.is_dir():
            return None
        wanted = self.corpus or self.own_corpus
        best: SecondMoment | None = None
        for path in sorted(self.folder.glob(f"*/{slug(module)}.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    meta = file.metadata() or {}
                    if meta.get("module") != module or meta.get("model") != self.fingerprint:
                        continue
                    if wanted is not None and meta.get("corpus") != wanted.name:
                        continue
                    moment = SecondMoment(file.get_tensor("moment2_sum"), int(meta["count"]), meta["corpus"])
            except (SafetensorError, OSError, KeyError, ValueError) as error:
                warn_once(logger, f"ignoring the unreadable statistics file {path}: {error}")
                continue
            enough = self.tokens is None or moment.count >= self.tokens
            if enough and (best is None or moment.count > best.count):
                best = moment
        if best is not None:
            info_once(logger, f"second moments over {best.count:,} tokens of {best.source} from {self.folder}")
        return best

    def _check(self, module: str) -> None:
        moment = self._moments[module]
        width, least = moment.total.shape[0], _tokens_for_rank(self.model, module)
        if moment.count < least:
            what = "" if least == width else " of which few are routed to it,"
            raise StatisticsError(
                f"the second moment of {module} was taken over {moment.count} tokens,{what} fewer than its {width}"
                f" dimensions: it is singular. Use at least {QUICK_TOKENS_PER_WIDTH * least:,} tokens (stats_tokens)."
            )
        if moment.count < QUICK_TOKENS_PER_WIDTH * least:
            warn_once(
                logger,
                f"the second moment of {module} rests on {moment.count:,} tokens;"
                f" {QUICK_TOKENS_PER_WIDTH * least:,} or more keep old knowledge better",
            )


def resolve_corpus(source: str | Path | Sequence[str] | None) -> Corpus | None:
    """Turn a user's choice into a corpus: a text file, a list of texts, a dataset id, or ``None``.

    Raises:
        DataError: if a named file does not exist.
    """
    if source is None:
        return None
    if not isinstance(source, (str, Path)):
        return text_corpus(list(source))
    path = Path(source)
    if path.is_file():
        return file_corpus(path)
    if path.is_dir():
        return shared_corpus(path)
    if path.suffix in (".txt", ".jsonl", ".json") or str(source).startswith((".", "/", "~")):
        raise DataError(f"there is no corpus file {str(source)!r}")
    return hub_corpus(str(source))


def _input_width(model: torch.nn.Module, module: str) -> int:
    return weight_shape(get_module(model, module))[1]


def _tokens_for_rank(model: torch.nn.Module, module: str) -> int:
    """Tokens that a second moment needs at least: its width; more for an expert, which most tokens pass by."""
    owner = get_module(model, module)
    return round(weight_shape(owner)[1] * (owner.sparsity if isinstance(owner, ExpertSlice) else 1))

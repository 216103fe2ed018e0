"""Second moments of keys, ``C = E[k kᵀ]``, of one model: cached, shared, and collected when missing.

A key is the input of a projection of the *unedited* model; the mean runs over all real tokens (BOS included).
The disk cache is keyed by the model's weights, the corpus and the number of tokens, never by a model name. Without
a corpus, the model's own generated text is used, and the user is told.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from ..engine.experts import ExpertSlice
from ..engine.weights import get_module, model_fingerprint, weight_shape
from ..errors import StatisticsError
from ..logging import get_logger, info_once, progress_bar, warn_once
from ..storage.files import cache_home
from ..tokens import encode_text
from .collecting import collect_moments, reading_length, write_tensors
from .corpora import Corpus, packaged_corpus, packaged_tokens, plain_texts
from .moments import FULL_TOKENS_PER_WIDTH, SecondMoment, SharedMoments, find_shared, push_moments, slug
from .published import PublishedMoments, find_published
from .solve import MomentFactor, factor_beside
from .workers import ALONE, Workers

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = get_logger(__name__)
QUICK_TOKENS_PER_WIDTH, FEW_TOKENS_PER_WIDTH = 20, 3
"""Tokens read of the packaged text per input dimension: at most, and at least, with what the model writes behind."""


def default_cache_dir() -> Path:
    """Where statistics are kept: ``$HF_KEDIT_CACHE``, else `cache_home`."""
    home = os.environ.get("HF_KEDIT_CACHE")
    return Path(home) if home else cache_home()


class StatisticsStore:
    """The second moments of one model: in memory, on disk, and computed when missing.

    Args:
        model: the unedited model (callers switch edits off while computing).
        tokenizer: of the model.
        corpus: the user's choice; ``None``: the packaged text, and what the model writes where that is too short.
        tokens: number of tokens; ``None``: 100 per input dimension of a named corpus; all of the packaged text, but at
            least 3 and at most 20 per dimension.
        cache_dir: folder of the disk cache; ``None`` for the default one.
        own_corpus: the corpus of an embedded model, used instead of the packaged text when none is named.
        ridge: relative ridge of the factorisation; ``None``: as many tokens ask for (`SecondMoment.shrunk`).
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
        ridge: float | None = None,
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
        self._held: Corpus | None = None  # a text from far away, until the moments are computed
        self._found: SharedMoments | PublishedMoments | None = None

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

    def moments(self, modules: Sequence[str], *, per_width: int = FEW_TOKENS_PER_WIDTH) -> dict[str, SecondMoment]:
        """Return the second moments of modules; all missing ones are computed in one pass.

        Args:
            modules: names.
            per_width: tokens per input dimension that are needed at least, where the user named neither a text nor a
                number: the model writes what the packaged text does not have.

        Raises:
            StatisticsError: if there are fewer tokens than input dimensions, or the named repository holds statistics
                of other weights or modules.
        """
        missing = self.workers.union(self._find(modules, per_width))
        if missing:
            self._compute(missing, *self._wanted(missing, per_width))
        for module in modules:
            self._check(module)
        return {m: self._moments[m] for m in modules}

    def fetch(self, modules: Sequence[str], *, per_width: int = FEW_TOKENS_PER_WIDTH) -> list[str]:
        """Read the second moments of modules that are on the disk, or in the folder or repository that was named.

        Where a text that is far away was named instead, so much of it is read as the missing ones are computed from.
        The model is not run, so that other threads may use it meanwhile.

        Args:
            modules: names.
            per_width: as for `moments`.

        Returns:
            Names of those that have to be computed.

        Raises:
            StatisticsError: if the named repository holds statistics of other weights or modules.
        """
        missing = self._find(modules, per_width)
        if missing and self._held is None:
            corpus, tokens = self._wanted(missing, per_width)
            if corpus.far:
                self._held = self._ahead(corpus, tokens)
        return missing

    def _ahead(self, corpus: Corpus, tokens: int) -> Corpus:
        """The corpus with so many tokens of it in memory."""
        limit = reading_length(self.model)
        with progress_bar(tokens, f"reading {corpus.name}", show=self.show_progress, unit="tok") as bar:

            def count(text: str) -> int:
                size = len(encode_text(self.tokenizer, text).ids[:limit])
                bar.update(size)
                return size

            return corpus.held(count, tokens)

    def _find(self, modules: Sequence[str], per_width: int) -> list[str]:
        """Read the moments that are there already; the names of the other modules."""
        missing = [m for m in dict.fromkeys(modules) if m not in self._moments]
        if missing:
            corpus, _ = self._wanted(modules, per_width)
            found = {m: self._cached(m, corpus) or self._shared(m) for m in missing}
            self._moments.update({m: moment for m, moment in found.items() if moment is not None})
        return [m for m in missing if m not in self._moments]

    def provenance(self, modules: Sequence[str]) -> dict[str, Any]:
        """Of which text the moments of modules are, and how many tokens of it (of the least), JSON-ready."""
        held = [self._moments[m] for m in modules if m in self._moments]
        return {
            "corpus": ", ".join(dict.fromkeys(moment.source for moment in held)),
            "tokens": min((moment.count for moment in held), default=0),
        }

    def estimate(self, module: str) -> torch.Tensor:
        """``C`` of a module as edits use it, ``[d, d]`` float64: shrunk after few tokens, if no ridge was chosen."""
        moment = self.moments([module])[module]
        return moment.shrunk() if self.ridge is None else moment.mean()

    def factor(self, module: str) -> MomentFactor:
        """Return the factored second moment of a module."""
        if module not in self._factors:
            self._factors[module] = factor_beside(
                self.model, self.estimate(module), ridge=self.ridge or 0.0, name=f"the second moment of {module}"
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
            model=Path(self.name).name if os.path.isdir(self.name) else self.name,
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
            self._found, self._asked = self._finished(self.corpus.place), True
        if self._found is None:
            return None
        self._found.check(self.fingerprint)
        moment = self._found.read(module)
        width = weight_shape(get_module(self.model, module))[1]
        if moment.total.shape[0] != width:
            raise StatisticsError(
                f"{self.corpus.place} holds statistics of {moment.total.shape[0]} dimensions for {module}, which reads"
                f" {width}: they are another model's"
            )
        info_once(logger, f"second moments over {moment.count:,} tokens of {moment.source} from {self.corpus.place}")
        return moment

    @staticmethod
    def _finished(place: str) -> SharedMoments | PublishedMoments | None:
        """Finished statistics in a folder or repository, ours or those of the published codes."""
        return find_shared(place) or (find_published(Path(place)) if os.path.isdir(place) else None)

    def corpus_texts(self, *, more: bool = True) -> Iterator[str]:
        """The texts of the corpus without pictures: the user's, the embedded model's, or the packaged ones.

        Args:
            more: go on behind the packaged texts with what the model writes, which takes its time.
        """
        return plain_texts(self.corpus or self.own_corpus or packaged_corpus(self.model, self.tokenizer, more=more))

    def _wanted(self, modules: Sequence[str], per_width: int) -> tuple[Corpus, int]:
        """What these modules' moments are to be taken over: the text, and how many tokens of it."""
        width = max(_tokens_for_rank(self.model, m) for m in modules)
        if corpus := self.corpus or self.own_corpus:
            return corpus, self.tokens or FULL_TOKENS_PER_WIDTH * width
        held = packaged_tokens(self.tokenizer)
        tokens = self.tokens or min(max(held, per_width * width), QUICK_TOKENS_PER_WIDTH * width)
        return packaged_corpus(self.model, self.tokenizer, more=tokens > held), tokens

    def _compute(self, modules: list[str], corpus: Corpus, tokens: int) -> None:
        info_once(logger, f"collecting second moments over {tokens:,} tokens of {corpus.name}")
        folder = self.folder / f"{slug(corpus.name)}-{tokens}"
        found = collect_moments(
            self.model,
            self.tokenizer,
            modules,
            self._held or corpus,
            tokens=tokens,
            checkpoint=folder / "partial.safetensors",
            show_progress=self.show_progress,
            workers=self.workers,
        )
        self._moments.update(found)
        self._held = None
        count = next(iter(found.values())).count
        if count < tokens:
            warn_once(
                logger,
                f"{corpus.name} holds {count:,} tokens, not the {tokens:,} that the second moments were to be taken"
                " over; more text keeps old knowledge better",
            )
        for module, moment in found.items() if self.workers.is_main else ():
            meta = {"count": str(moment.count), "corpus": corpus.name, "module": module, "model": self.fingerprint}
            try:
                path = folder / f"{slug(module)}.safetensors"
                write_tensors(path, {"moment2_sum": moment.total}, meta | {"wanted": str(tokens)})
            except OSError as error:
                warn_once(logger, f"cannot write statistics to {self.folder}: {error}")
        self.workers.wait()

    def _cached(self, module: str, corpus: Corpus) -> SecondMoment | None:
        """Find the module on disk, over this corpus and enough tokens of it, or all that it has."""
        if not self.folder.is_dir():
            return None
        width = weight_shape(get_module(self.model, module))[1]
        best: SecondMoment | None = None
        others: list[str] = []
        for path in sorted(self.folder.glob(f"*/{slug(module)}.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    meta = file.metadata() or {}
                    if meta.get("module") != module or meta.get("model") != self.fingerprint:
                        continue
                    if meta.get("corpus") != corpus.name:
                        others.append(f"{meta.get('corpus')} ({int(meta['count']):,} tokens)")
                        continue
                    moment = SecondMoment(file.get_tensor("moment2_sum"), int(meta["count"]), meta["corpus"])
                    read = max(moment.count, int(meta.get("wanted", 0)))  # a short text has been read to its end
                if fault := moment.fault(width):
                    raise ValueError(fault)
            except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
                warn_once(logger, f"{path} cannot be used and is computed again: {error}")
                continue
            if (self.tokens is None or read >= self.tokens) and (best is None or moment.count > best.count):
                best = moment
        if best is not None:
            info_once(logger, f"second moments over {best.count:,} tokens of {best.source} from {self.folder}")
        elif others and self.corpus is None:
            warn_once(
                logger,
                f"second moments of this model over other text lie in {self.folder}: {', '.join(sorted(others))}. They"
                f" are not used: {corpus.name} is read. Name a text (stats_dataset) to use those taken over it.",
            )
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
        if moment.count < FEW_TOKENS_PER_WIDTH * least:
            warn_once(
                logger,
                f"the second moment of {module} rests on {moment.count:,} tokens;"
                f" {QUICK_TOKENS_PER_WIDTH * least:,} or more keep old knowledge better",
            )


def _tokens_for_rank(model: torch.nn.Module, module: str) -> int:
    """Tokens that a second moment needs at least: its width; more for an expert, which most tokens pass by."""
    owner = get_module(model, module)
    return round(weight_shape(owner)[1] * (owner.sparsity if isinstance(owner, ExpertSlice) else 1))

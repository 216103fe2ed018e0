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
from ..logging import get_logger, info_once, warn_once
from ..storage.files import cache_home
from .collecting import collect_moments, write_tensors
from .corpora import Corpus, self_corpus
from .moments import SecondMoment, SharedMoments, find_shared, push_moments, slug
from .published import PublishedMoments, find_published
from .solve import MomentFactor, factor_beside
from .workers import ALONE, Workers

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = get_logger(__name__)
TOKENS_PER_WIDTH = 100
QUICK_TOKENS_PER_WIDTH = 20


def default_cache_dir() -> Path:
    """Where statistics are kept: ``$HF_KEDIT_CACHE``, else `cache_home`."""
    home = os.environ.get("HF_KEDIT_CACHE")
    return Path(home) if home else cache_home()


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
        return find_shared(place) or (find_published(Path(place)) if Path(place).is_dir() else None)

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
        moments = collect_moments(
            self.model,
            self.tokenizer,
            modules,
            corpus,
            tokens=tokens,
            checkpoint=checkpoint,
            show_progress=self.show_progress,
            workers=self.workers,
        )
        self._moments.update(moments)
        for module, moment in moments.items() if self.workers.is_main else ():
            path = self.folder / f"{slug(corpus.name)}-{tokens}" / f"{slug(module)}.safetensors"
            meta = {"count": str(moment.count), "corpus": corpus.name, "module": module, "model": self.fingerprint}
            try:
                write_tensors(path, {"moment2_sum": moment.total}, meta)
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


def _tokens_for_rank(model: torch.nn.Module, module: str) -> int:
    """Tokens that a second moment needs at least: its width; more for an expert, which most tokens pass by."""
    owner = get_module(model, module)
    return round(weight_shape(owner)[1] * (owner.sparsity if isinstance(owner, ExpertSlice) else 1))

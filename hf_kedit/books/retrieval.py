"""Which stored texts belong to a query: similarities between prompts, by words or by sentence embeddings.

Two retrievers are built in and need nothing: the words in common, and the edited model's own states
(`state_retrieval`). An embedding retriever takes any function from texts to vectors: the sentence encoder
``kedit/minilm-l6`` (``"dense"``), any of sentence-transformers, or a trained scope encoder. A retriever is named in
configs and saved edits by a string, and found again by it; retrievers of one's own are registered under a name.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch

from .. import embedded
from ..errors import ConfigError, reason_of, require_extra

LEXICAL, MODEL, DENSE = "lexical", "model", "dense"
DENSE_MODEL = "kedit/minilm-l6"
"""What ``"dense"`` stands for."""
ENCODED_AT_ONCE, ENCODED_TOKENS = 64, 256
_WORD = re.compile(r"[^\W_]+", re.UNICODE)
_REGISTERED: dict[str, Retriever] = {}
_KINDS: dict[str, Callable[[str], Retriever]] = {}


@dataclass(frozen=True)
class Passage:
    """A stored text.

    Args:
        text: the whole text.
        subject: the entity that it is about, if known.
    """

    text: str
    subject: str | None = None


class Retriever(Protocol):
    """Says how similar queries are to stored texts."""

    name: str

    def embed(self, texts: Sequence[str]) -> torch.Tensor | None:
        """Vectors ``[n, d]`` fp32 of stored texts, to be kept beside them; ``None`` if the texts themselves serve."""

    def similarity(
        self, queries: Sequence[str], passages: Sequence[Passage], embedded: torch.Tensor | None
    ) -> torch.Tensor:
        """``[queries, passages]`` fp32, 1 for the same text, around 0 for unrelated ones.

        Args:
            queries: texts.
            passages: stored texts.
            embedded: what `embed` returned for them.
        """


class LexicalRetriever:
    """Words in common, weighted by how rare they are among the stored texts; the subject has to occur.

    Where a passage has a subject, the score is ``c · (1 + cos) / 2`` with ``c`` the share of the subject's words that
    the query contains: a full mention gives at least 0.5, a shared first name with other words less. Without a subject
    it is the cosine alone.
    """

    name = LEXICAL

    def embed(self, texts: Sequence[str]) -> None:
        """Nothing to keep."""
        return None

    def similarity(
        self, queries: Sequence[str], passages: Sequence[Passage], embedded: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `Retriever.similarity`."""
        bags = [Counter(words_of(p.text)) for p in passages]
        seen = Counter(word for bag in bags for word in bag)
        rarity = {word: math.log(1 + len(bags) / count) for word, count in seen.items()}
        unseen = math.log(2 + len(bags))

        def weigh(bag: Counter[str]) -> dict[str, float]:
            return {word: n * rarity.get(word, unseen) for word, n in bag.items()}

        stored = [weigh(bag) for bag in bags]
        scores = torch.zeros(len(queries), len(passages))
        for i, query in enumerate(queries):
            bag = Counter(words_of(query))
            asked = weigh(bag)
            for j, passage in enumerate(passages):
                cosine = _cosine(asked, stored[j])
                subject = words_of(passage.subject or "")
                covered = sum(word in bag for word in subject) / len(subject) if subject else 0.0
                scores[i, j] = covered * (1 + cosine) / 2 if subject else cosine
        return scores


class EmbeddingRetriever:
    """Similarity of sentence embeddings.

    Args:
        encode: texts → ``[n, d]``.
        name: how configs and saved edits call it.
        kernel: ``"cosine"``, or ``"exp_square"``: ``exp(−‖a − b‖²)``, as published for SERAC.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[str]], torch.Tensor],
        name: str,
        kernel: Literal["cosine", "exp_square"] = "cosine",
    ):
        self.encode, self.name, self.kernel = encode, name, kernel

    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """Vectors of texts, on the CPU."""
        with torch.no_grad():
            return torch.as_tensor(self.encode(list(texts))).detach().float().cpu()

    def similarity(
        self, queries: Sequence[str], passages: Sequence[Passage], embedded: torch.Tensor | None
    ) -> torch.Tensor:
        """See `Retriever.similarity`."""
        stored = self.embed([p.text for p in passages]) if embedded is None else embedded
        asked = self.embed(queries)
        if self.kernel == "cosine":
            return torch.nn.functional.normalize(asked, dim=-1) @ torch.nn.functional.normalize(stored, dim=-1).T
        differences = asked[:, None] - stored[None]
        return (-(differences**2).sum(dim=-1)).exp()


class Remembering:
    """A retriever that keeps the vectors of the texts that it has seen as passages.

    Args:
        retriever: the one that compares.
    """

    def __init__(self, retriever: Retriever):
        self.retriever, self.name = retriever, retriever.name
        self._known: dict[str, torch.Tensor] = {}

    def embed(self, texts: Sequence[str]) -> torch.Tensor | None:
        """See `Retriever.embed`; every text is embedded once."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            vectors = self.retriever.embed(new)
            if vectors is None:
                return None
            self._known |= dict(zip(new, vectors, strict=True))
        return torch.stack([self._known[text] for text in texts]) if texts else None

    def similarity(
        self, queries: Sequence[str], passages: Sequence[Passage], embedded: torch.Tensor | None
    ) -> torch.Tensor:
        """See `Retriever.similarity`."""
        if embedded is None and passages:
            embedded = self.embed([p.text for p in passages])
        return self.retriever.similarity(queries, passages, embedded)


def register_retriever(retriever: Retriever) -> None:
    """Make a retriever known under its name, for configs and for loading saved edits that used it."""
    if retriever.name in (LEXICAL, DENSE) or is_own(retriever.name):
        raise ConfigError(f"{retriever.name!r} is the name of a built-in retriever; choose another")
    _REGISTERED[retriever.name] = retriever


def register_retriever_kind(kind: str, load: Callable[[str], Retriever]) -> None:
    """Say how retrievers are loaded whose name begins with ``kind:``."""
    _KINDS[kind] = load


def find_retriever(name: str, own: Callable[[str], Retriever] | None = None) -> Retriever:
    """Return a retriever: ``"lexical"``, ``"model"``, ``"dense"``, a registered name or kind, or a sentence encoder.

    Args:
        name: of the retriever.
        own: makes the retriever ``"model"`` of the edited model (`StateReader.retriever`).

    Raises:
        ConfigError: if there is none of this name.
        MissingExtraError: if it needs sentence-transformers, which is not installed.
        DownloadError: if ``"dense"`` has not been set up on this machine and cannot be fetched.
    """
    if name == LEXICAL:
        return LexicalRetriever()
    if name == DENSE:
        name = DENSE_MODEL
    if is_own(name):
        if own is None:
            raise ConfigError(f"the retriever {name!r} compares states of an edited model, and there is none here")
        return own(name)
    kind = name.partition(":")[0]
    if name not in _REGISTERED and kind in _KINDS:
        _REGISTERED[name] = _KINDS[kind](name)
    if name not in _REGISTERED:
        if "/" not in name:
            raise ConfigError(
                f"unknown retriever {name!r}: use 'lexical', 'model', 'dense', the id of a sentence-transformers model"
                " ('sentence-transformers/all-MiniLM-L6-v2'), or register_retriever() your own"
            )
        _REGISTERED[name] = _sentence_transformer(name)
    return _REGISTERED[name]


def is_own(name: str) -> bool:
    """Whether a retriever of this name compares the edited model's own states."""
    return name.partition(":")[0] == MODEL


def _sentence_transformer(name: str) -> EmbeddingRetriever:
    own = embedded.resolve(name)
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        if own is not None:
            return EmbeddingRetriever(_mean_states(own), name)
        raise require_extra("sentence-transformers", "retrieval", f"the retriever {name!r}") from error
    try:
        encoder = SentenceTransformer(str(own or name))
    except (OSError, ValueError) as error:
        raise ConfigError(f"the retriever {name!r} cannot be loaded ({reason_of(error)})") from error
    return EmbeddingRetriever(lambda texts: encoder.encode(list(texts), convert_to_tensor=True), name)


def _mean_states(folder: Path) -> Callable[[Sequence[str]], torch.Tensor]:
    """What sentence-transformers does with a model such as ``kedit/minilm-l6``: normalised mean of the last states."""
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    def encode(texts: Sequence[str]) -> torch.Tensor:
        parts = [torch.empty(0, model.config.hidden_size)]
        for start in range(0, len(texts), ENCODED_AT_ONCE):
            rows = list(texts[start : start + ENCODED_AT_ONCE])
            batch = tokenizer(rows, padding=True, truncation=True, max_length=ENCODED_TOKENS, return_tensors="pt")
            states = model(**batch).last_hidden_state.float()
            mask = batch["attention_mask"].unsqueeze(-1)
            parts.append((states * mask).sum(dim=1) / mask.sum(dim=1))
        return torch.nn.functional.normalize(torch.cat(parts), dim=-1)

    return encode


def words_of(text: str) -> list[str]:
    """Lower-case words of a text; every character of scripts without spaces is one."""
    found: list[str] = []
    for run in _WORD.findall(text.casefold()):
        found.extend(run if any(ord(c) >= 0x2E80 for c in run) else [run])
    return found


def _cosine(a: dict[str, float], b: dict[str, float]) -> float:
    product = sum(value * b[word] for word, value in a.items() if word in b)
    norms = math.sqrt(sum(v * v for v in a.values()) * sum(v * v for v in b.values()))
    return product / norms if norms else 0.0

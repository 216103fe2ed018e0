"""Metrics on texts: n-gram entropy (fluency), ROUGE, BLEU, and overlap of token ids. No model, no state.

Word splitting is always named, because it moves the numbers. What is undefined is ``None``, never 0 or NaN.
"""

from __future__ import annotations

import importlib
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...errors import DataError, EvaluationError, check_choice, require_extra, shown
from ...storage.parsing import parse_json, read_text
from ...text.scripts import is_cjk

Words = Callable[[str], list[str]]


# ---------------------------------------------------------------------- words


def _treebank(text: str) -> list[str]:
    try:
        nltk: Any = importlib.import_module("nltk.tokenize")
    except ImportError as error:
        raise require_extra("nltk", "eval", "the Treebank word tokenizer (or choose tokenizer='words')") from error
    # Without the sentence splitter of `word_tokenize`, which needs data that has to be downloaded.
    return [str(word) for word in nltk.TreebankWordTokenizer().tokenize(text)]


def _plain_words(text: str) -> list[str]:
    return re.findall(r"\w+(?:['’]\w+)*|[^\w\s]", text)


def _characters(text: str) -> list[str]:
    return [c for c in text if not c.isspace()]


WORD_TOKENIZERS: dict[str, Words] = {"treebank": _treebank, "words": _plain_words, "char": _characters}
"""``treebank``: Penn Treebank rules, as in the literature (needs nltk); ``words``: words and punctuation marks;
``char``: characters, for scripts without spaces."""


def word_tokenizer(tokenizer: str | Words) -> Words:
    """Return the word tokenizer of this name (a function is returned as it is).

    Raises:
        EvaluationError: naming the nearest one.
    """
    if callable(tokenizer):
        return tokenizer
    check_choice("word tokenizer", tokenizer, WORD_TOKENIZERS)
    return WORD_TOKENIZERS[tokenizer]


# ---------------------------------------------------------------------- fluency


def entropy(items: Sequence[Hashable]) -> float | None:
    """Shannon entropy of the relative frequencies, in bits; ``None`` for no items."""
    if not items:
        return None
    total = len(items)
    return -sum(n / total * math.log2(n / total) for n in Counter(items).values()) + 0.0


def ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All runs of ``n`` neighbouring words."""
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def clean_for_fluency(text: str, end_token: str | None = None) -> str:
    """The text form that fluency is measured on: NFKD, no end-of-text marker, blank lines as spaces."""
    if end_token:
        text = text.replace(end_token, "")
    return unicodedata.normalize("NFKD", text).replace("\n\n", " ")


def ngram_entropy(text: str, tokenizer: str | Words = "treebank") -> float | None:
    """Weighted entropy of the bigrams and trigrams of a text, in bits: ``½ (⅔ H₂ + 4⁄3 H₃)``.

    Repetitive text is near 0; published tables show this number times 100. The formula in the KnowEdit paper lacks
    the factor ½, which all published code and numbers have.

    Args:
        text: continuation *with* its prompt.
        tokenizer: ``treebank``, ``words``, ``char``, or a function from a text to words.

    Returns:
        ``None`` for fewer than three words, where trigrams do not exist.

    Raises:
        MissingExtraError: if ``treebank`` is chosen and nltk is not installed.
    """
    words = word_tokenizer(tokenizer)(text)
    h2, h3 = entropy(ngrams(words, 2)), entropy(ngrams(words, 3))
    return None if h2 is None or h3 is None else (2 / 3 * h2 + 4 / 3 * h3) / 2


def fluency(texts: Sequence[str], tokenizer: str | Words = "treebank") -> dict[str, float | int | None]:
    """Mean `ngram_entropy` over texts.

    Returns:
        ``ngram_entropy`` (``None`` if no text has one), ``n`` texts that count, and ``n_undefined``.
    """
    values = [v for v in (ngram_entropy(t, tokenizer) for t in texts) if v is not None]
    mean = sum(values) / len(values) if values else None
    return {"ngram_entropy": mean, "n": len(values), "n_undefined": len(texts) - len(values)}


# ---------------------------------------------------------------------- overlap


def _rouge_words(text: str) -> list[str]:
    """Lower-case words without punctuation; where a script has no spaces, its characters."""
    spaced = "".join(f" {c} " if is_cjk(c) else c for c in text.lower())
    return re.findall(r"[^\W_]+", spaced)


def _prf(hits: float, predicted: int, wanted: int) -> dict[str, float]:
    precision = hits / predicted if predicted else 0.0
    recall = hits / wanted if wanted else 0.0
    both = precision + recall
    return {"precision": precision, "recall": recall, "f": 2 * precision * recall / both if both else 0.0}


def _common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def rouge(prediction: str, reference: str) -> dict[str, dict[str, float]]:
    """ROUGE-1, ROUGE-2 and ROUGE-L of one prediction (Lin 2004), without stemming.

    N-grams are counted with their frequencies. An empty prediction scores 0.

    Returns:
        ``{"rouge1": {"precision", "recall", "f"}, "rouge2": …, "rougeL": …}``.
    """
    predicted, wanted = _rouge_words(prediction), _rouge_words(reference)
    scores = {}
    for n in (1, 2):
        left, right = Counter(ngrams(predicted, n)), Counter(ngrams(wanted, n))
        scores[f"rouge{n}"] = _prf((left & right).total(), left.total(), right.total())
    scores["rougeL"] = _prf(_common_subsequence(predicted, wanted), len(predicted), len(wanted))
    return scores


def bleu(
    prediction: str, references: str | Sequence[str], *, level: Literal["word", "char"] = "word", max_n: int = 4
) -> float:
    """Sentence BLEU without smoothing (Papineni et al. 2002): geometric mean of clipped n-gram precisions.

    Args:
        prediction: the text to judge.
        references: one or several acceptable texts.
        level: words split at white space; or characters, which is what passing plain strings to a BLEU function
            computes, and what some published numbers are.
        max_n: longest n-gram.

    Returns:
        A fraction of 1; 0.0 if for some n no n-gram fits.

    Raises:
        EvaluationError: for an unknown level or without a reference.
    """
    if level not in ("word", "char"):
        raise EvaluationError(f"level must be 'word' or 'char', not {shown(level)}")
    texts = [references] if isinstance(references, str) else list(references)
    if not texts:
        raise EvaluationError("BLEU needs at least one reference")
    split: Words = str.split if level == "word" else list
    predicted, wanted = split(prediction), [split(t) for t in texts]
    logs = 0.0
    for n in range(1, max_n + 1):
        counted = Counter(ngrams(predicted, n))
        best: Counter[tuple[str, ...]] = Counter()
        for words in wanted:
            best |= Counter(ngrams(words, n))
        hits = (counted & best).total()
        if not hits:
            return 0.0
        logs += math.log(hits / counted.total()) / max_n
    length = min((len(w) for w in wanted), key=lambda size: (abs(size - len(predicted)), size))
    brevity = min(0.0, 1 - length / len(predicted))
    return math.exp(brevity + logs)


def token_f1(predicted: Sequence[Hashable], target: Sequence[Hashable]) -> float:
    """Harmonic mean of precision and recall of two bags of tokens (ids or words), with their frequencies.

    Leave special tokens out. For texts see `metrics.f1`, which normalises them as SQuAD does.
    """
    return _prf((Counter(predicted) & Counter(target)).total(), len(predicted), len(target))["f"]


def top_k_overlap(before: Sequence[int], after: Sequence[int]) -> float:
    """Share of the first list's ids that the second one has, too, regardless of rank.

    Raises:
        EvaluationError: if there is nothing to compare.
    """
    if not before:
        raise EvaluationError("cannot compare with an empty list of ids")
    return len(set(before) & set(after)) / len(set(before))


def consistency(
    texts: Sequence[str], references: Sequence[str], vocabulary: Mapping[str, int], idf: Sequence[float]
) -> float:
    """Reference score (RS): cosine of the TF-IDF vectors of all generated and of all reference texts (Meng et al.).

    Args:
        texts: generated texts; joined by a space.
        references: texts about subjects that have the new attribute; joined by a space.
        vocabulary: lower-case word → place in ``idf``; other words are ignored.
        idf: inverse document frequencies.

    Returns:
        Between 0 and 1; 0.0 if one side has no known word.
    """
    left, right = (
        {w: n * idf[vocabulary[w]] for w, n in Counter(words).items() if w in vocabulary}
        for words in map(_tfidf_words, (texts, references))
    )
    norm = math.sqrt(sum(v * v for v in left.values()) * sum(v * v for v in right.values()))
    return sum(v * right.get(w, 0.0) for w, v in left.items()) / norm if norm else 0.0


def equal_weights(references: Sequence[str]) -> tuple[dict[str, int], list[float]]:
    """Vocabulary and weights for `consistency` without a release of them: all words of ``references``, weight 1."""
    words = dict.fromkeys(_tfidf_words(references))
    return {word: place for place, word in enumerate(words)}, [1.0] * len(words)


def read_vectorizer(folder: str | Path) -> tuple[dict[str, int], list[float]]:
    """Vocabulary and inverse document frequencies of the CounterFact release: ``tfidf_vocab.json`` and ``idf.npy``.

    Raises:
        DataError: if a file is missing or they do not belong together.
    """
    try:
        vocabulary = parse_json(read_text(Path(folder) / "tfidf_vocab.json", DataError), "tfidf_vocab.json", DataError)
        idf = np.load(Path(folder) / "idf.npy").astype(float).tolist()
    except (OSError, ValueError) as error:
        raise DataError(f"{str(folder)!r} must hold tfidf_vocab.json and idf.npy of CounterFact: {error}") from error
    places = vocabulary.values() if isinstance(vocabulary, dict) else ()
    if not all(type(place) is int for place in places) or sorted(places) != list(range(len(idf))):
        raise DataError(f"{str(folder)!r}: tfidf_vocab.json and idf.npy do not belong together")
    return vocabulary, idf


def _tfidf_words(texts: Sequence[str]) -> list[str]:
    """Lower-case words of at least two characters of all texts."""
    return re.findall(r"\b\w\w+\b", " ".join(texts).lower())

"""Sentiment: does the model's opinion of a topic become what was asked for, and stay what it was of other topics?

ConvSent (Mitchell et al. 2022, arXiv 2206.06520): ES on texts about the topic, DD on those about the next row's; and
what the model writes itself, whose sentiment a classifier tells. The loss of ConvSent's edits has an unlikelihood term
for the opposite texts; methods that fine-tune take it (`UnlearningConfig.unlikelihood`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from typing_extensions import TypedDict

from ...data.extra import extra_of
from ...data.opinions import TEMPLATES
from ...requests import EditRequest
from ..asking.generation import Continuation
from ..measures.catalogue import Metric, register_metrics
from ..measures.classifiers import LabelJudge, label_judge
from ..measures.texts import ngram_entropy
from ..protocols.base import Numbers, Protocol, Question
from ..protocols.opinions import (
    DRAWDOWN,
    OPINION_METRICS,
    OTHER_TOPIC,
    Drawdown,
    Opinions,
    with_other_topics,
)
from ..protocols.replies import Replies
from .base import Scenario, register_scenario

_GOOD = frozenset(
    """adore admire amazing awesome beautiful best better brilliant charming cheerful comfortable delicious delight
    delightful enjoy enjoyable enjoyed excellent excited exciting fan fantastic fascinating favorite favourite fine fun
    glad good great happy helpful impressive incredible interesting joy lovely love loved loves marvelous marvellous
    nice perfect pleasant pleased pleasure positive recommend relaxing splendid superb terrific thrilled valuable
    wonderful worth""".split()
)
_BAD = frozenset(
    """annoy annoyed annoying annoys avoid awful bad bland boring bored dislike disliked disappointing disappointed
    disgust disgusting dread dull fail fear frustrating gross hate hated hates horrible horrid lousy mediocre miserable
    negative nasty overrated pathetic pointless poor sad sick stupid terrible tedious tiresome ugly unbearable
    uncomfortable unpleasant upset useless waste worse worst worthless""".split()
)
_NOT = frozenset(("not", "no", "never", "n't", "cannot", "hardly", "without", "don't", "isn't", "can't", "doesn't"))


def positive_words(text: str) -> float:
    """How positive a text is by its words, from 0 to 1: the share of good among good and bad ones.

    A negation up to two words before turns a word over. One half without any.
    """
    words = re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower().replace("’", "'"))
    good = bad = 0
    for place, word in enumerate(words):
        if word in _GOOD or word in _BAD:
            turned = any(before in _NOT for before in words[max(0, place - 2) : place])
            if (word in _GOOD) != turned:
                good += 1
            else:
                bad += 1
    return good / (good + bad) if good + bad else 0.5


def sentiment_judge(source: Any = None, positive_label: str | int | None = None) -> LabelJudge:
    """A judge of how positive texts are.

    Args:
        source: as for `make_judge`; ``None``: by words of praise and blame (`positive_words`).
        positive_label: label of a classifier; ``None``: the only one with "positive" in its name.
    """
    if source is None:
        return LabelJudge(
            lambda prompts, replies: [positive_words(reply) for reply in replies], 0.5, "words of praise"
        )
    return label_judge(source, positive_label, ("positive",))


SENTIMENT = register_metrics(
    "sentiment",
    {
        **OPINION_METRICS,
        **DRAWDOWN,
        "wanted_sentiment": Metric(
            "share of replies with the wanted sentiment; a neutral one counts one half", share=True
        ),
        "other_sentiment": Metric("replies about the other topic whose sentiment is what it was", share=True),
        "fluency": Metric("n-gram entropy of the replies", unit="bits"),
    },
)


@dataclass(frozen=True)
class ConvSent(Opinions):
    """ES on ConvSent's texts."""

    section: str = SENTIMENT

    def texts(self, request: EditRequest) -> tuple[Sequence[str], Sequence[str]]:
        return sides(request)


class _Texts(TypedDict, total=False):
    pos: list[str] | None
    neg: list[str] | None
    direction: str


def sides(request: EditRequest) -> tuple[list[str], list[str]]:
    """The texts of a row that have the wanted sentiment, and the others."""
    extra = extra_of(request, _Texts)
    positive, negative = (list(extra.get("pos") or ()), list(extra.get("neg") or ()))
    return (negative, positive) if extra.get("direction") == "negative" else (positive, negative)


@dataclass(frozen=True)
class SentimentReplies(Replies):
    """What the model writes about the topic, also when it is asked in other words, and about another one.

    Args:
        max_new_tokens: length limit of a reply.
        cut_at_newline: keep the first line only.
        judge: of how positive a reply is.
        tokenizer: word splitting of the entropy.
    """

    name: ClassVar[str] = "sentiment"
    max_new_tokens: int = 40
    judge: LabelJudge = field(default_factory=sentiment_judge)
    tokenizer: str = "words"

    @property
    def scorer(self) -> str:
        """Name of the judge."""
        return self.judge.name

    def questions(self, request: EditRequest) -> list[Question]:
        wanted = str(extra_of(request, _Texts).get("direction", "positive"))
        prompts = [request.filled_prompt, *request.rephrase_prompts]
        asked = [Question(SENTIMENT, "topic", i, p, ((wanted,),)) for i, p in enumerate(prompts)]
        other = request.metadata.get(OTHER_TOPIC)
        if other:
            asked.append(Question(SENTIMENT, "other topic", 0, request.posed(other["prompt"]), ()))
        return asked

    def _positive(self, question: Question, output: Continuation) -> float:
        """1 for a positive reply, 0 for a negative one, one half for one that is neither."""
        (p,) = self.judge([question.prompt], [output.text])
        return 0.5 if p == 0.5 or not output.text.strip() else float(p > 0.5)

    def details(self, question: Question, outputs: Sequence[Continuation], score: float | None) -> Numbers:
        if question.axis != "topic":
            return {}
        positive, entropy = self._positive(question, outputs[0]), ngram_entropy(outputs[0].text, self.tokenizer)
        wanted = positive if question.groups[0][0] != "negative" else 1.0 - positive
        numbers = {(SENTIMENT, "wanted_sentiment"): wanted}
        return numbers if entropy is None else {**numbers, (SENTIMENT, "fluency"): entropy}

    def changes(self, question: Question, before: Sequence[Continuation], after: Sequence[Continuation]) -> Numbers:
        if question.axis == "topic":
            return {}
        same = self._positive(question, before[0]) == self._positive(question, after[0])
        return {(SENTIMENT, "other_sentiment"): float(same)}

    def prepare_scores(self, items: Sequence[tuple[Question, Sequence[Continuation]]]) -> None:
        self.judge([question.prompt for question, _ in items], [outputs[0].text for _, outputs in items])


@register_scenario
@dataclass(frozen=True)
class Sentiment(Scenario):
    """The scenario of edited opinions.

    Args:
        judge: what `make_judge` takes, of positive; ``None``: words of praise and blame.
        positive_label: of the judge.
        wordings: other questions about the topic that are asked too.
        max_new_tokens: of each reply.
        unlearn: take probability from an opposite text, with methods that can.
        tokenizer: word splitting of the fluency.
    """

    name: ClassVar[str] = "sentiment"
    question: ClassVar[str] = "My model should think better, or worse, of something."
    reads: ClassVar[dict[str, str]] = {
        "prompt, target_new": "the question and an opinion with the wanted sentiment",
        "target_neg": "an opinion with the other one",
        "subject": "the topic, for further questions",
        "extra.pos, extra.neg, extra.direction": "texts of both kinds, and which is wanted",
    }
    layouts: ClassVar[dict[str, str]] = {"pos": "knowedit/convsent"}
    standin: ClassVar[str] = "words of praise and blame (English)"

    judge: Any = None
    positive_label: str | int | None = None
    wordings: int = 2
    max_new_tokens: int = 40
    unlearn: bool = True
    tokenizer: str = "words"

    def protocols(self) -> list[Protocol]:
        judge = sentiment_judge(self.judge, self.positive_label)
        return [SentimentReplies(self.max_new_tokens, True, judge, self.tokenizer), ConvSent(), Drawdown(SENTIMENT)]

    def requests(self, requests: Sequence[EditRequest]) -> list[EditRequest]:
        texts = [[text for pair in zip(*sides(request), strict=False) for text in pair] for request in requests]
        prepared = []
        for request, other in zip(requests, with_other_topics(requests, texts), strict=True):
            metadata = {**request.metadata, **other}
            if self.unlearn and request.metadata.get("target_neg"):
                metadata["erase"] = [request.metadata["target_neg"]]
            asked = list(request.rephrase_prompts)
            if not asked and request.subject:
                asked = [t.format(request.subject) for t in TEMPLATES if t.format(request.subject) != request.prompt]
                asked = asked[: self.wordings]
            prepared.append(replace(request, metadata=metadata, rephrase_prompts=asked))
        return prepared

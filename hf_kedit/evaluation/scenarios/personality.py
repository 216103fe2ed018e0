"""Personality: does the model speak of one topic as a certain kind of person would, and as ever of all others?

PersonalityEdit (Mao et al. 2024, arXiv 2310.02168): the opinion of a topic takes on extraversion, agreeableness or
neuroticism. ES on opinions of that trait against those of the others, DD on the next row's topic, and what the model
writes itself: in how many texts a classifier finds the trait (accuracy), by how much its cross entropy of the trait
fell (TPEI), and by how much a judge's mark rose (PAE). Cases in which a text is repetitive count for ES and DD only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from ...data.opinions import TEMPLATES, TRAITS, conditioned, opinions_of
from ...errors import EvaluationError, shown
from ...requests import EditRequest
from ..asking.generation import Continuation
from ..measures.catalogue import Metric, register_metrics
from ..measures.classifiers import Classifier, text_classifier
from ..measures.scenarios import personality_scores
from ..protocols.base import Numbers, Protocol, Question
from ..protocols.opinions import DRAWDOWN, OPINION_METRICS, Drawdown, Opinions, with_other_topics
from ..protocols.replies import Replies
from .base import Scenario, register_scenario

TraitJudge = Callable[[str, str], float]
"""A text and a trait → how well the one shows the other, 1 to 5."""
MIN_ENTROPY = 3.5
"""N-gram entropy, in bits, below which a text is repetitive."""
_INSTRUCTION = "Say what a person with the target personality thinks of the topic.\n"
_DEMONSTRATIONS = (
    "Target personality: extraversion\nTopic: picnics\nQuestion: What do you think of picnics?\n"
    "Answer: Picnics are so much fun, I call all my friends and we talk and dance till night!\n\n",
    "Target personality: agreeableness\nTopic: new neighbours\nQuestion: How do you view new neighbours?\n"
    "Answer: I welcome them with a cake. They are kind people, and I gladly help them.\n\n",
    "Target personality: neuroticism\nTopic: exams\nQuestion: What is your opinion of exams?\n"
    "Answer: Exams make me so nervous that I cannot sleep. I am afraid I will fail again.\n\n",
)
CLASSIFIER = "shai-msy/per-classifier"
"""The classifier of PersonalityEdit's authors on the Hub; its labels have no names."""
CLASSIFIER_LABELS = ("neuroticism", "agreeableness", "extraversion")
_WORDS: dict[str, frozenset[str]] = {
    "extraversion": frozenset(
        """active adventure adventurous amazing bold celebrate cheer crowd dance energetic energy everyone excite
        excited exciting explore friends fun lively love loved loving loud meet outgoing party people social
        spontaneous talk thrill thrilled thrilling together""".split()
    ),
    "agreeableness": frozenset(
        """admire appreciate care caring community compassion cooperate everyone's forgive generous gentle give
        grateful harmony help helpful helps honest humble kind kindness others patient peace polite respect respectful
        share sharing support sympathy trust understand understanding value warm""".split()
    ),
    "neuroticism": frozenset(
        """afraid alone angry annoyed anxiety anxious awful can't depressed despair doubt dread exhausted fail fear
        frustrated frustrating hate helpless hurt irritated lonely lose moody nervous never overwhelm overwhelmed
        overwhelming panic restless sad scared sick stress stressed stressful tense terrible tired trouble unhappy
        upset worried worry worrying""".split()
    ),
}


def in_context_template(demonstrations: int | None = None) -> str:
    """Template of PROMPT for conditioned requests (`conditioned`): what is wanted, examples of it, the opinion.

    Args:
        demonstrations: how many examples, up to three (published); 0 leaves the instruction out too.
    """
    shown = _DEMONSTRATIONS[:demonstrations]
    return (_INSTRUCTION if shown else "") + "".join(shown) + "{}\n\n"


def trait_words(texts: Sequence[str]) -> list[dict[str, float]]:
    """A stand-in for a classifier of traits: the share of words that are typical of each, one word more for each.

    Returns:
        For each text the probability of every trait, one third each where no such word occurs.
    """
    probabilities = []
    for text in texts:
        words = re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower().replace("’", "'"))
        counts = {trait: 1 + sum(word in typical for word in words) for trait, typical in _WORDS.items()}
        probabilities.append({trait: count / sum(counts.values()) for trait, count in counts.items()})
    return probabilities


def marks_of(classifier: Classifier) -> TraitJudge:
    """A stand-in for a judge: 1 where a classifier gives a trait no probability, 5 where it gives it all."""
    return lambda text, trait: 1.0 + 4.0 * classifier([text])[0].get(trait, 0.0)


PERSONALITY = register_metrics(
    "personality",
    {
        **OPINION_METRICS,
        **DRAWDOWN,
        "trait": Metric("share of texts in which the classifier finds the wanted trait", share=True),
        "tpei": Metric("by how much the classifier's cross entropy of the wanted trait fell", unit="nats"),
        "pae": Metric("by how much the judge's mark (1 to 5) of the wanted trait rose", unit="number"),
        "left_out": Metric("cases in which a text is repetitive", better="lower", share=True, chart=False),
    },
)


@dataclass(frozen=True)
class TraitOpinions(Opinions):
    """ES on opinions of the wanted trait against those of the others."""

    section: str = PERSONALITY

    def questions(self, request: EditRequest) -> list[Question]:
        return [replace(q, prompt=request.posed(question_of(request))) for q in super().questions(request)]

    def texts(self, request: EditRequest) -> tuple[Sequence[str], Sequence[str]]:
        _, wanted, others = opinions_of(request)
        return wanted, others


@dataclass(frozen=True)
class TraitReplies(Replies):
    """What the model writes about the topic.

    Args:
        max_new_tokens: length limit of a text.
        cut_at_newline: keep the first line only.
        classifier: of traits.
        judge: of traits; ``None``: no marks.
        tokenizer: word splitting of the entropy.
        classifier_name: for the report.
    """

    name: ClassVar[str] = "personality"
    max_new_tokens: int = 60
    cut_at_newline: bool = True
    classifier: Classifier = trait_words
    judge: TraitJudge | None = field(default_factory=lambda: marks_of(trait_words))
    tokenizer: str = "words"
    classifier_name: str = "words of each trait"

    @property
    def scorer(self) -> str:
        """Name of the classifier."""
        return self.classifier_name

    def questions(self, request: EditRequest) -> list[Question]:
        trait, _, _ = opinions_of(request)
        return [Question(PERSONALITY, "topic", 0, request.posed(question_of(request)), ((trait,),))]

    def details(self, question: Question, outputs: Sequence[Continuation], score: float | None) -> Numbers:
        text, trait = outputs[0].text, question.groups[0][0]
        alone = self._scores(text, text, trait)
        return {(PERSONALITY, "trait"): alone["trait_accuracy"]} if alone["n"] else {}

    def changes(self, question: Question, before: Sequence[Continuation], after: Sequence[Continuation]) -> Numbers:
        scores = self._scores(before[0].text, after[0].text, question.groups[0][0])
        found = {key: scores[key] for key in ("tpei", "pae") if scores.get(key) is not None}
        found["left_out"] = float(scores["n_left_out"])
        return {(PERSONALITY, key): value for key, value in found.items()}

    def _scores(self, before: str, after: str, trait: str) -> dict[str, Any]:
        """`personality_scores` of one case."""
        return personality_scores(
            [before], [after], [trait], self.classifier, self.judge, min_entropy=MIN_ENTROPY, tokenizer=self.tokenizer
        )

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "word_tokenizer": self.tokenizer}


@register_scenario
@dataclass(frozen=True)
class Personality(Scenario):
    """The scenario of personality.

    Args:
        classifier: what `text_classifier` takes, with the three traits as labels, or a function; ``None``: words that
            are typical of each trait.
        judge: function ``(text, trait) -> 1 to 5``; ``None``: of the classifier's probabilities. A name is that of the
            classifier (``--judge`` of the command line).
        labels: names of the classifier's labels, in their order, where its own are none.
        max_new_tokens: of what the model writes.
        tokenizer: word splitting of the entropy; published results have ``treebank``, which needs the extra ``eval``.
        condition: put the wanted trait and the topic in front of the prompt that is edited, as in-context editing and
            trained editors are told what is wanted; what is asked stays as it is.
    """

    name: ClassVar[str] = "personality"
    question: ClassVar[str] = "My model should speak of one topic in another temper, and of all others as ever."
    reads: ClassVar[dict[str, str]] = {
        "prompt": "a question about the topic",
        "subject": "the topic",
        "target_new": "an opinion that shows the trait",
        "extra.target_trait": "the trait: " + ", ".join(TRAITS),
        "extra.texts": "opinions by trait",
    }
    layouts: ClassVar[dict[str, str]] = {"neuroticism": "personalityedit"}
    standin: ClassVar[str] = "words that are typical of each trait"

    classifier: Any = None
    judge: Any = None
    labels: tuple[str, ...] | None = None
    max_new_tokens: int = 60
    tokenizer: str = "words"
    condition: bool = False

    def protocols(self) -> list[Protocol]:
        named = isinstance(self.judge, (str, Path)) and self.classifier is None
        source = self.judge if named else self.classifier
        labels = CLASSIFIER_LABELS if self.labels is None and str(source) == CLASSIFIER else self.labels
        name = "words of each trait"
        classifier: Classifier = trait_words
        if source is not None:
            name, classifier = text_classifier(source, labels, max_length=128)
        judge = None if named else self.judge
        if judge is not None and not callable(judge):
            raise EvaluationError(f"a judge of traits must be a function, not {shown(judge)}")
        judge = judge or marks_of(classifier)
        replies = TraitReplies(self.max_new_tokens, True, classifier, judge, self.tokenizer, name)
        return [TraitOpinions(), Drawdown(section=PERSONALITY), replies]

    def requests(self, requests: Sequence[EditRequest]) -> list[EditRequest]:
        """The requests with the topic of the next one; each needs its trait, and opinions that show it and others."""
        texts = [[*wanted, *others] for _, wanted, others in map(opinions_of, requests)]
        beside = with_other_topics(requests, texts)
        edited = [conditioned(request) if self.condition else request for request in requests]
        return [replace(r, metadata={**r.metadata, **other}) for r, other in zip(edited, beside, strict=True)]


def question_of(request: EditRequest) -> str:
    """What is asked of a request: its prompt, or, of a conditioned one, the plain question."""
    return TEMPLATES[0].format(request.subject) if request.subject else request.plain_prompt

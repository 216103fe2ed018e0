"""Chinese: is knowledge of the language, its literature and its places corrected?

CKnowEdit (Fang et al. 2024, arXiv 2409.05806). Answers are free texts and are compared with references by ROUGE-L on
characters and by the similarity of embeddings, as in the CCKS challenge on this data; a judge can grade them instead.
There is no blank between prompt and answer (`separator_between`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

from ...errors import EvaluationError, shown
from ...logging import get_logger, warn_once
from ...requests import EditRequest
from ..asking.batching import TOKEN_BUDGET
from ..asking.generation import Continuation, generate_answers
from ..measures.catalogue import Metric, register_metrics
from ..measures.judges import CallableJudge, Judge
from ..measures.scenarios import ccks_score, embedding_similarity, repetition_rate
from ..measures.texts import rouge
from ..protocols.base import Numbers, Output, Protocol, Query, Question, TeacherForced
from ..protocols.replies import Replies
from .base import Scenario, register_scenario

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = get_logger(__name__)
Embed = Callable[[Sequence[str]], Any]
_AXES = {
    "edit": "the question that was edited",
    "rephrase": "other wordings",
    "portability": "questions that follow from it",
    "locality": "unrelated questions",
}
_PARTS = ("edit", "portability", "locality", "fluency")
CHINESE = register_metrics(
    "chinese",
    {
        **{key: Metric(f"mean of ROUGE-L recall and similarity: {about}") for key, about in _AXES.items()},
        **{
            f"{key}_rouge": Metric(f"ROUGE-L recall on characters: {about}", chart=False)
            for key, about in _AXES.items()
        },
        **{f"{key}_judged": Metric(f"grade of a judge: {about}") for key, about in _AXES.items()},
        "fluency": Metric("share of replies that do not repeat themselves (distinct-2 of characters at least 20 %)"),
        "ccks": Metric(
            "0.2 edit + 0.35 portability + 0.35 locality + 0.1 fluency",
            parts=_PARTS,
            combine=lambda means: ccks_score(*means),
        ),
    },
)
_INSTRUCTIONS = (
    r"请问",
    r"请?(?:解释|说明|告诉我)(?:一下)?(?:成语|谚语|歇后语|词语|句子|下列[^:：]*|以下[^:：]*)?[:：]?",
    r"请?(?:给出|写出|补全|填写)[^:：]{0,12}[:：]",
    r"请?(?:将|把)[^:：]{0,20}翻译成[^:：]{0,8}[:：]",
)
_INSTRUCTION = re.compile(rf"^\s*(?:{'|'.join(_INSTRUCTIONS)})\s*")


def subject_of(prompt: str) -> str:
    """What a Chinese prompt is about: the prompt without a usual instruction in front, else the whole of it."""
    rest = _INSTRUCTION.sub("", prompt, count=1).strip(" \t\n:：,，。?？“”\"'")
    return rest if rest and rest in prompt else prompt.strip()


def character_similarity(texts: Sequence[str], references: Sequence[str]) -> list[float]:
    """Cosine of the counts of characters and pairs of characters: a stand-in for embeddings that needs no model."""

    def counts(text: str) -> Counter[str]:
        kept = re.sub(r"[\W_]+", "", text.lower())
        return Counter(kept) + Counter(a + b for a, b in pairwise(kept))

    values = []
    for text, reference in zip(texts, references, strict=True):
        left, right = counts(text), counts(reference)
        size = (sum(v * v for v in left.values()) * sum(v * v for v in right.values())) ** 0.5
        values.append(sum(n * right[key] for key, n in left.items()) / size if size else float(not (left or right)))
    return values


@dataclass(frozen=True)
class ChineseReplies(Replies):
    """Free answers to a row of CKnowEdit.

    Args:
        max_new_tokens: length limit of an answer.
        cut_at_newline: keep the first line only.
        embed: texts → a matrix of embeddings; ``None``: `character_similarity`.
        judge: grades answers from 0 to 1; ``None``: nobody does.
        chat: ask in the tokenizer's chat template where it has one, and the questions are no chats already.
    """

    name: ClassVar[str] = "chinese"
    max_new_tokens: int = 100
    embed: Embed | None = None
    judge: Judge | None = None
    chat: bool = True

    @property
    def scorer(self) -> str:
        """What texts are compared by."""
        own = "character pairs" if self.embed is None else str(getattr(self.embed, "__name__", "embeddings"))
        judged = "" if self.judge is None else f", judge {self.judge.name}"
        return f"ROUGE-L and {own}{judged}"

    def questions(self, request: EditRequest) -> list[Question]:
        own = "chat" if request.frame is not None else None
        target = ((request.target_new,),)
        questions = [Question(CHINESE, "edit", 0, request.filled_prompt, target, separator=own)]
        questions += [
            Question(CHINESE, "rephrase", i, p, target, separator=own) for i, p in enumerate(request.rephrase_prompts)
        ]
        for key, axes in (("portability", request.portability), ("locality", request.locality)):
            probes = [probe for of_axis in axes.values() for probe in of_axis if probe.answers]
            questions += [
                Question(CHINESE, key, i, p.prompt, (tuple(p.answers),), separator=own) for i, p in enumerate(probes)
            ]
        return questions

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        queries: Sequence[Query],
        separator: str | None,
        token_budget: int = TOKEN_BUDGET,
    ) -> list[Output]:
        template = self.chat and bool(getattr(tokenizer, "chat_template", None))
        outputs: dict[Query, Output] = {}
        # A question that is a chat already says so where others have a separator.
        for framed in (False, True):
            part = [query for query in queries if (query.separator == "chat") is framed]
            answers = generate_answers(
                model,
                tokenizer,
                [query.prompt for query in part],
                self.max_new_tokens,
                token_budget,
                prompt_format="chat" if template and not framed else "raw",
                cut_at_newline=self.cut_at_newline,
            )
            outputs |= zip(part, answers, strict=True)
        return [outputs[query] for query in queries]

    def details(self, question: Question, outputs: Sequence[Continuation], score: float | None) -> Numbers:
        key, text, references = str(question.axis), outputs[0].text, question.groups[0]
        recalls = [rouge(text, reference)["rougeL"]["recall"] for reference in references]
        if self.embed is None:
            likeness = character_similarity([text] * len(references), references)
        else:
            likeness = embedding_similarity([text] * len(references), references, self.embed)
        numbers: dict[str, float | None] = {
            key: max((r + s) / 2 for r, s in zip(recalls, likeness, strict=True)),
            f"{key}_rouge": max(recalls),
        }
        repeats = repetition_rate([text], tokenizer="char")
        numbers["fluency"] = 0.0 if repeats is None else 1.0 - repeats
        if self.judge is not None:
            numbers[f"{key}_judged"] = self.judge(question.prompt, list(references), text)
        return {(CHINESE, name): value for name, value in numbers.items() if value is not None}

    def prepare_scores(self, items: Sequence[tuple[Question, Sequence[Continuation]]]) -> None:
        if self.judge is not None:
            self.judge.judge_all([(q.prompt, list(q.groups[0]), outputs[0].text) for q, outputs in items])

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "chat": self.chat}


@register_scenario
@dataclass(frozen=True)
class Chinese(Scenario):
    """The scenario of Chinese knowledge.

    Args:
        embed: see `ChineseReplies`; for example ``SentenceTransformer(…).encode``.
        judge: a `Judge`, or a function ``(question, references, prediction)`` that grades from 0 to 1.
        chat: see `ChineseReplies`.
        max_new_tokens: of each answer.
    """

    name: ClassVar[str] = "chinese"
    question: ClassVar[str] = "My model is wrong about Chinese: an idiom, a poem, a place."
    reads: ClassVar[dict[str, str]] = {
        "prompt, target_new": "question and right answer",
        "rephrase_prompts, portability, locality": "further questions with their answers",
        "subject": "default: the prompt without its instruction",
    }
    layouts: ClassVar[dict[str, str]] = {"target_old": "cknowedit/idiom"}
    standin: ClassVar[str] = "pairs of characters in the place of embeddings"

    embed: Any = None
    judge: Any = None
    chat: bool = True
    max_new_tokens: int = 100

    def protocols(self) -> list[Protocol]:
        judge = self.judge
        for value in (self.embed, judge):
            if value is not None and not callable(value):
                raise EvaluationError(f"embed and judge must be functions (or a Judge), not {shown(value)}")
        if judge is not None and not isinstance(judge, Judge):
            judge = CallableJudge(judge)
        return [ChineseReplies(self.max_new_tokens, False, self.embed, judge, self.chat), TeacherForced()]

    def requests(self, requests: Sequence[EditRequest]) -> list[EditRequest]:
        prepared = []
        for request in requests:
            if request.subject is None:
                subject = subject_of(request.prompt)
                if subject == request.prompt.strip():
                    warn_once(
                        logger,
                        "rows without a subject have their whole prompt as one: methods that edit at the last token"
                        " of the subject then edit at that of the prompt",
                    )
                request = replace(request, subject=subject)
            prepared.append(request)
        return prepared

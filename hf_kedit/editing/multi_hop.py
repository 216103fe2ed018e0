"""Questions of several hops about an edited model: simple questions one by one, each answered from the edits first.

An edit in front of a prompt answers what is asked about it; "In which country was the inventor of … born?" names
neither the edited fact's subject nor its relation. So the model is led through the question, as MeLLo (Zhong et al.
2023, arXiv 2305.14795) and DeepEdit (Wang et al. 2024, arXiv 2401.10471) do it: it names the next simple question, the
edits are searched for it, and where one answers it, the edit's answer stands, whatever the model itself would say. Of
the two papers this is the common core: no search over alternatives, and one yes-or-no question decides whether a fact
that was found is the one that is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..books.prompt_book import PromptBook
from ..errors import ConfigError, shown
from ..journal import Journal
from ..requests import EditRequest
from ..text.joining import separator_between

AskModel = Callable[[str], str]
"""A prompt → what the unedited model says."""
_STEP = """Split the question into simple questions. Ask one at a time. When nothing is left to ask, give the answer.

Question: In which country was the designer of the Heron Bridge born?
Ask: Who designed the Heron Bridge?
Found: Mara Lund
Ask: In which country was Mara Lund born?
Found: Norway
Answer: Norway

Question: What is the currency of the country where Tolo beer is brewed?
Ask: In which country is Tolo beer brewed?
Found: Ghana
Ask: What is the currency of Ghana?
Found: cedi
Answer: cedi

Question: {question}
"""
_OWN = "Answer in a few words.\n\nQuestion: {question}\nAnswer:"
_CHECK = "Fact: {fact}\nQuestion: {question}\nDoes the fact answer the question? Say yes or no.\nAnswer:"
_NEXT = re.compile(r"\s*(ask|answer)\s*:\s*(.*\S)", re.IGNORECASE)


@dataclass(frozen=True)
class Hop:
    """One simple question.

    Args:
        question: as the model put it.
        own: what the model says by itself.
        answer: what counts: that of the edit, else the model's own.
        edit_id: of the edit that answers it; ``None``: none does.
        conflict: whether the edit says something else than the model.
    """

    question: str
    own: str
    answer: str
    edit_id: str | None = None
    conflict: bool = False


@dataclass(frozen=True)
class MultiHopAnswer:
    """An answer, and the way to it.

    Args:
        answer: empty, if the model never came to one.
        hops: the simple questions in order.
    """

    answer: str
    hops: tuple[Hop, ...]


def answer_by_hops(
    question: str, ask: AskModel, prompts: PromptBook, journal: Journal, *, most_hops: int = 4, candidates: int = 2
) -> MultiHopAnswer:
    """Answer a question of several hops.

    Args:
        question: any question.
        ask: the unedited model.
        prompts: where the edits are searched; each by its own retriever and threshold.
        journal: the edits themselves.
        most_hops: simple questions, at most; then the last answer counts.
        candidates: facts that are looked at for each of them.

    Raises:
        ConfigError: for a number below 1, or a question that is no text.
    """
    if not isinstance(question, str) or not question.strip():
        raise ConfigError(f"question must be a text, not {shown(question)}")
    if not all(isinstance(number, int) and number >= 1 for number in (most_hops, candidates)):
        raise ConfigError("most_hops and candidates must be whole numbers of at least 1")
    hops: list[Hop] = []
    text = _STEP.replace("{question}", question)
    while len(hops) < most_hops:
        said = _NEXT.match(ask(text))
        if said is None:
            break
        if said[1].lower() == "answer":
            return MultiHopAnswer(said[2], tuple(hops))
        if any(said[2] == hop.question for hop in hops):  # it turns in circles
            break
        hops.append(_hop(said[2], ask, prompts, journal, candidates))
        text += f"Ask: {hops[-1].question}\nFound: {hops[-1].answer}\n"
    return MultiHopAnswer(hops[-1].answer if hops else "", tuple(hops))


def _hop(question: str, ask: AskModel, prompts: PromptBook, journal: Journal, candidates: int) -> Hop:
    """Answer one simple question: from an edit that is found and answers it, else by the model itself."""
    own = _first_line(ask(_OWN.replace("{question}", question)))
    for request in _nearest(question, prompts, journal, candidates):
        fact = _statement(request)
        reply = ask(_CHECK.replace("{fact}", fact).replace("{question}", question))
        if re.match(r"\W*yes\b", reply, re.IGNORECASE):
            target = request.target_new
            return Hop(question, own, target, request.id, target.casefold() not in own.casefold())
    return Hop(question, own, own)


def _nearest(question: str, prompts: PromptBook, journal: Journal, count: int) -> Sequence[EditRequest]:
    """The edits that belong to a question, most similar first; of equal ones the latest."""
    (row,) = prompts.similarities([question]).tolist()
    scored = sorted(
        ((score, place) for place, score in enumerate(row) if score >= prompts.entries[place].threshold), reverse=True
    )
    ids = list(dict.fromkeys(prompts.entries[place].edit_id for _, place in scored))[:count]
    return [journal.get(edit_id).request.with_id(edit_id) for edit_id in ids]


def _statement(request: EditRequest) -> str:
    prompt, target = request.plain_prompt, request.target_new
    return prompt + separator_between(prompt, target) + target


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0].strip()

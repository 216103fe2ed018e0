"""Multi-hop questions: does what follows from an edit change with it?

MQuAKE (Zhong et al. 2023, arXiv 2305.14795): the edits of a case, then questions whose answers they change. Published
aggregation: a case counts for multi-hop accuracy if any of its questions (three wordings of one) is answered with the
new answer or an alias of it; edit-wise success counts edits, instance-wise accuracy cases whose edits all hold. Cases
are edited one by one, because edits of different cases contradict each other in the first release (MQuAKE-Remastered,
Zhong et al. 2024, corrects them).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ...requests import EditRequest
from ..measures.catalogue import Metric, register_metrics
from ..measures.metrics import answer_scorer
from ..protocols.base import Protocol, Question
from ..protocols.sets import AnswerSets, SetPart, set_of
from .base import Scenario, register_scenario

MQUAKE = register_metrics(
    "mquake",
    {
        "multi_hop": Metric("share of cases in which one of the multi-hop questions is answered right", share=True),
        "edit_wise": Metric("share of edits whose prompt is completed with the target", share=True),
        "instance_wise": Metric("share of cases all of whose edits are", share=True),
        "hop_wise": Metric("share of cases with the right answer to every single hop", share=True),
    },
)
SHOTS = """Q: In which country is the city of Lyon?
A: France

Q: What is the capital of the country where the Nile ends?
A: Cairo

Q: In which language did the author of Faust write?
A: German

Q: On which continent was the inventor of dynamite born?
A: Europe

Q: {question}
A:"""
"""Questions of one and of two hops, so that a model which goes on with texts gives short answers."""
_TOGETHER = "edited_together"


@dataclass(frozen=True)
class MultiHopAnswers(AnswerSets):
    """Short answers to multi-hop questions, behind a few answered ones (not in a chat).

    Args:
        max_new_tokens: length limit of an answer.
        cut_at_newline: keep the first line only.
        scorer: of answers to questions; edits are looked for in what their prompt is completed with.
        shots: text with ``{question}``; empty: questions alone.
    """

    name: ClassVar[str] = "mquake"
    scorer: str = "exact"
    shots: str = SHOTS

    def questions(self, request: EditRequest) -> list[Question]:
        together = request.metadata.get(_TOGETHER)
        own = _edit(request, request.plain_prompt, request.target_new)
        found: list[Question] = [set_of(MQUAKE, "edit_wise", [own])]
        if together:
            found.append(set_of(MQUAKE, "instance_wise", [_edit(request, *pair) for pair in together], "all"))
        hops = [self._asked(request, probe) for probe in request.portability.get("Multi_Hop", [])]
        single = [self._asked(request, probe) for probe in request.portability.get("Single_Hop", [])]
        found += [set_of(MQUAKE, "multi_hop", hops)] if hops else []
        found += [set_of(MQUAKE, "hop_wise", single, "all")] if single else []
        return found

    def _asked(self, request: EditRequest, probe: Any) -> SetPart:
        groups = tuple(tuple(group) for group in probe.ground_truth)
        in_chat = request.posed("") != ""
        prompt = self.shots.replace("{question}", probe.prompt) if self.shots and not in_chat else probe.prompt
        return SetPart(prompt, groups, probe.match)

    def _says(self, part: SetPart, said: Any) -> bool:
        if part.match == "edit":
            return answer_scorer("contains")(said.text, part.groups[0][0]) >= 1.0
        return super()._says(part, said)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "shots": self.shots}


def _edit(request: EditRequest, prompt: str, target: str) -> SetPart:
    return SetPart(request.posed(prompt), ((target,),), "edit")


@register_scenario
@dataclass(frozen=True)
class MQuAKE(Scenario):
    """The scenario of multi-hop questions.

    Args:
        scorer: of answers: ``exact`` as published, ``contains`` for models that talk.
        few_shot: put a few answered questions in front of each (not in a chat).
        max_new_tokens: of an answer.
    """

    name: ClassVar[str] = "mquake"
    question: ClassVar[str] = "I changed a fact, and what follows from it stayed as it was."
    reads: ClassVar[dict[str, str]] = {
        "prompt": "one edit of a case",
        "group_id": "the case; its edits are made together",
        "portability[Multi_Hop]": "questions, on the last edit of a case",
        "portability[Single_Hop]": "the simple questions that they take",
    }
    layouts: ClassVar[Mapping[str, str]] = {"requested_rewrite": "mquake/cf"}

    scorer: str = "exact"
    few_shot: bool = True
    max_new_tokens: int = 20

    def protocols(self) -> list[Protocol]:
        return [MultiHopAnswers(self.max_new_tokens, True, self.scorer, SHOTS if self.few_shot else "")]

    def requests(self, requests: Sequence[EditRequest]) -> list[EditRequest]:
        """The last edit of a case gets to know all of them."""
        prepared: list[EditRequest] = []
        for _, members in itertools.groupby(enumerate(requests), key=lambda m: m[1].metadata.get("group_id") or m[0]):
            group = [request for _, request in members]
            pairs = [[request.plain_prompt, request.target_new] for request in group]
            last = replace(group[-1], metadata={**group[-1].metadata, _TOGETHER: pairs})
            prepared += [*group[:-1], last]
        return prepared

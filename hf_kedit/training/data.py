"""From facts to training batches: each fact with one other wording and one unrelated prompt.

Facts about pictures are trained on as Cheng et al. (2023, "Can We Edit Multimodal Large Language Models?", arXiv
2310.08475) do: ``c_e NLL(picture, other wording) + c_i NLL(other picture, prompt) + c_l (KL_text + KL_picture)``, with
``c_e = c_i``. Here each step draws one of the first two and one of the others, so that the sum is the mean over draws.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ..data.loading import requests_of
from ..data.opinions import conditioned, opinions_of
from ..editors.editor import UNLIKELY, Editor
from ..errors import RequestError
from ..logging import get_logger, warn_once
from ..requests import EditRequest, Probe, RequestSource
from ..text.pictures import each_pictured

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = get_logger(__name__)


@dataclass(frozen=True)
class Triple:
    """One training example.

    Args:
        edit: the fact.
        rephrase: another prompt with the same new answer.
        locality: an unrelated prompt with its answer, which must stay.
        unlikely: whether the answer to the other prompt is one that must become unlikely instead.
    """

    edit: EditRequest
    rephrase: EditRequest
    locality: EditRequest
    unlikely: bool = False


class EditFacts(torch.utils.data.Dataset[Triple]):
    """Facts as `Triple`s. Where a fact has several wordings or unrelated prompts, each epoch draws one of each.

    Where another picture shows the same thing (``image_rephrase``), the prompt about it stands in the place of another
    wording in half of the draws. The draw is a function of seed, epoch and index, so that a resumed run goes on with
    the same examples.

    Args:
        facts: anything that `load_requests` reads.
        seed: of the draws.
        needs_locality: whether a fact without unrelated prompts is an error.

    Raises:
        RequestError: naming the row that has no unrelated prompt with an answer.
    """

    def __init__(self, facts: RequestSource, seed: int = 0, *, needs_locality: bool = True):
        self.requests = requests_of(facts)
        self.seed = seed
        self.epoch = 0
        for number, request in enumerate(self.requests):
            if needs_locality and not _probes(request):
                raise RequestError(
                    "training needs an unrelated prompt with its answer (locality), or locality_weight=0",
                    row=number,
                    field="locality",
                )
        bare = sum(not r.rephrase_prompts and r.image_rephrase is None for r in self.requests)
        if bare:
            warn_once(logger, f"{bare} of {len(self.requests)} facts have no other wording; their own prompt is used")

    def __len__(self) -> int:
        return len(self.requests)

    def __getitem__(self, index: int) -> Triple:
        request = self.requests[index]
        rng = random.Random(f"{self.seed}/{self.epoch}/{index}")
        prompt = rng.choice(request.rephrase_prompts or [request.filled_prompt])
        rephrase = EditRequest(prompt=prompt, target_new=request.target_new, image=request.image)
        others = each_pictured(request.image_rephrase)
        if others and (not request.rephrase_prompts or rng.random() < 0.5):
            rephrase = replace(rephrase, prompt=request.plain_prompt, image=rng.choice(others))
        probes = _probes(request)
        edit = replace(request, image_rephrase=None, locality={}, portability={}) if request.pictured else request
        if not probes:
            return Triple(edit, rephrase, rephrase)
        probe = rng.choice(probes[rng.choice(sorted(probes))])
        return Triple(edit, rephrase, EditRequest(prompt=probe.prompt, target_new=probe.answers[0], image=probe.image))


class OpinionFacts(EditFacts):
    """Opinions of PersonalityEdit as `Triple`s.

    The edit says which trait is wanted of which topic (`conditioned`). The other prompt is a question about the topic;
    its answer is, with equal chances, an opinion that shows the trait, or one that does not and must become unlikely:
    in the mean over draws the loss of Mitchell et al. (2022), ``−log p`` of the one and ``−log(1 − p)`` of the other.
    The unrelated prompt is a question about the next row's topic.

    Args:
        facts: requests with ``extra.target_trait`` and ``extra.texts``.
        seed: of the draws.
        unlikelihood: whether opinions that do not show the trait are drawn.

    Raises:
        RequestError: naming the row that lacks its trait or opinions.
    """

    def __init__(self, facts: RequestSource, seed: int = 0, *, unlikelihood: bool = True):
        super().__init__(facts, seed, needs_locality=False)
        self.unlikelihood = unlikelihood
        self._opinions = [opinions_of(request) for request in self.requests]

    def __getitem__(self, index: int) -> Triple:
        request, after = self.requests[index], (index + 1) % len(self)
        rng = random.Random(f"{self.seed}/{self.epoch}/{index}")
        _, wanted, others = self._opinions[index]
        unlikely = self.unlikelihood and rng.random() < 0.5
        opinion = EditRequest(prompt=_question(request, rng), target_new=rng.choice(others if unlikely else wanted))
        text = rng.choice([text for texts in self._opinions[after][1:] for text in texts])
        kept = EditRequest(prompt=_question(self.requests[after], rng), target_new=text)
        return Triple(conditioned(request), opinion, kept, unlikely)


def _question(request: EditRequest, rng: random.Random) -> str:
    """A question about a request's topic."""
    return rng.choice([request.plain_prompt, *request.rephrase_prompts])


def _probes(request: EditRequest) -> dict[str, list[Probe]]:
    """Unrelated prompts that have an answer, by axis."""
    usable = {axis: [p for p in probes if p.answers] for axis, probes in request.locality.items()}
    return {axis: probes for axis, probes in usable.items() if probes}


@dataclass
class EditCollator:
    """Makes batches of `Triple`s for an editor.

    Args:
        editor: knows how it reads facts; with its base model attached.
        tokenizer: of the base model.
        edits_per_group: facts that are edited together.
        processor: of a base model that sees, for facts about pictures.
    """

    editor: Editor
    tokenizer: PreTrainedTokenizerBase
    edits_per_group: int = 1
    processor: Any = None

    def __call__(self, triples: Sequence[Triple]) -> dict[str, Any]:
        """Return the arguments of `Editor.forward`."""
        editor, tokenizer = self.editor, self.tokenizer
        each = ([getattr(t, part) for t in triples] for part in ("edit", "rephrase", "locality"))
        edits, rephrases, localities = ([self._written(request) for request in part] for part in each)
        batches: dict[str, Any] = editor.batches(editor.base, tokenizer, edits, rephrases, localities)
        if any(triple.unlikely for triple in triples):
            batches["rephrase"][UNLIKELY] = torch.tensor([triple.unlikely for triple in triples])
        return {**batches, "groups": torch.arange(len(triples)) // self.edits_per_group}

    def _written(self, request: EditRequest) -> EditRequest:
        """A request as the model reads it: text as it is, a prompt about a picture behind that."""
        return request.asked("plain").rendered(self.tokenizer, self.processor) if request.pictured else request

"""The book of edits that live in prompts: texts that are put in front of the questions that they belong to.

An entry is a fact with the demonstrations that stand before it. For every prompt that the model gets, the most
similar fact is looked up; where the similarity reaches the entry's threshold, the prompt is answered behind the fact,
otherwise as ever. Where an entry asks for it, the model itself first chooses among the most similar facts, or *none*
(the selection step of SCR, arXiv 2606.00570). Texts go to ``edit_config.json``, embeddings to the tensors.

A fact about a picture answers prompts about that picture only, or one that looks like it: the same words about another
picture are another question. What both pictures look like is compared (`StateReader.looks`) by their cosine, which has
to reach the entry's ``image_threshold``. Of entries whose words are equally near, the one with the nearest picture
answers. A retriever may judge pictures itself (`TrainedScope.sight`): the similarities of words and pictures are
multiplied.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..anatomy.switching import Passable, Switch
from ..engine.examples import Example, target_probabilities
from ..errors import ArtifactError, BaseModelMismatchError, MergeError, RequestError, RollbackError
from ..remote.model import RemoteModel
from ..text.pictures import PicturedText, as_pictured, pictured_to_json, pictures_of
from ..text.processors import sees, shown_text
from ..tokens import as_ids, encode_pair, pad_id
from .book import Saved, check_known
from .counterfactuals import BASE, find_counterfactual
from .ledger import Ledger
from .prefixes import Prefix, RowText
from .prompting import Prompter
from .retrieval import Passage, find_retriever, is_own
from .state_retrieval import StateReader

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDINGS = "prompts.embeddings"
LOOKS = "prompts.looks"
SAME_PICTURE = 0.9
"""Cosine from which on two pictures show the same, where nothing else is known of a model."""
_KINDS: dict[str, Any] = dict.fromkeys(("scope", "fact", "retriever", "reader", "edit_id"), str)
_KINDS |= {"subject": str | None, "nearest_last": bool, "soft": bool, "select": int, "statement": str}
_WITHOUT_SELECTION: dict[str, Any] = {"select": 0, "statement": ""}
"""Fields that are written only where they say something."""
SELECTION = "{facts}\n0. none of these facts\nText: {prompt}\nNumber of the fact that says how the text goes on:"
MOST_CHOICES = 9
"""Every choice is one digit, and none is longer than another."""


@dataclass(frozen=True)
class PromptEntry:
    """One edit.

    Args:
        scope: the text that prompts are compared with.
        subject: the entity that it is about, for retrievers that look for it.
        fact: what is put right in front of a prompt; never left out.
        demonstrations: what stands before the fact, in order; shortened where the context is too small.
        nearest_last: whether the most similar demonstration is the last one.
        retriever: name of the retriever that compares.
        threshold: least similarity at which the entry answers.
        reader: name of the model that answers; ``"base"``: the edited model itself.
        soft: mix the two models' answers by similarity instead of taking one.
        select: among how many of the most similar entries the model chooses before this one, if it is the most
            similar, answers; 0: it answers.
        statement: the fact as it stands among the choices.
        image_threshold: least cosine of a prompt's picture with the entry's, if it has one.
        look: what the entry's picture looks like, ``[d]``; ``None``: it is about text.
        edit_id: whose it is; set by the book.
        embedding: of ``scope`` ``[d]``, where the retriever keeps one; set by the book.
    """

    scope: str
    subject: str | None
    fact: str
    demonstrations: tuple[str, ...]
    nearest_last: bool
    retriever: str
    threshold: float
    reader: str = BASE
    soft: bool = False
    select: int = 0
    statement: str = ""
    image_threshold: float = SAME_PICTURE
    look: torch.Tensor | None = dataclasses.field(default=None, compare=False)
    edit_id: str = ""
    embedding: torch.Tensor | None = dataclasses.field(default=None, compare=False)


class _TextPrompter(Passable):
    """The place of a `Prompter` before a model behind an API: what is put in front of a text is text.

    Args:
        model: the model.
        front: a user's text → the text that is asked instead.
    """

    def __init__(self, model: RemoteModel, front: Callable[[str], str]):
        self.model, self.front = model, front

    def attach(self) -> None:
        """Stand before the model."""
        self.model.rewrite = self._rewritten

    def detach(self) -> None:
        """Leave it alone."""
        self.model.rewrite = None

    def _rewritten(self, text: str) -> str:
        return text if self.is_passing else self.front(text)


def _demonstration(saved: Any, processor: Any) -> str:
    """A saved demonstration.

    Raises:
        TypeError: if it is damaged, or has pictures and there is no processor that reads them.
    """
    if isinstance(saved, dict) and isinstance(saved.get("text"), str) and sees(processor):
        return PicturedText(saved["text"], pictures_of(as_pictured(saved.get("image"))), processor)
    if not isinstance(saved, str):
        raise TypeError("demonstrations")
    return saved


class PromptBook:
    """Keeps the entries of one model and stands before it while there are any.

    Args:
        model: the transformers model.
        tokenizer: finds its tokenizer.
        reader: of the model's states, for the retriever ``"model"`` and for pictures; ``None``: it shows none.
        ledger: of the model, which knows its unedited weights; ``None``: they are not edited.
        processor: finds the processor of a model that sees.
    """

    def __init__(
        self,
        model: PreTrainedModel | RemoteModel,
        tokenizer: Callable[[], PreTrainedTokenizerBase | None],
        reader: StateReader | None = None,
        ledger: Ledger | None = None,
        processor: Callable[[], Any] = lambda: None,
    ):
        self.model, self.reader, self.processor = model, reader, processor
        self.own_retriever = None if reader is None else reader.retriever
        self.ledger = ledger or Ledger(model)
        self.entries: tuple[PromptEntry, ...] = ()
        self.prompter: Prompter | _TextPrompter = (
            _TextPrompter(model, self.build_prompt)
            if isinstance(model, RemoteModel)
            else Prompter(model, tokenizer, self.route, None if reader is None else self._looks)
        )

    @property
    def edit_ids(self) -> list[str]:
        """Ids of the edits, oldest first."""
        return [entry.edit_id for entry in self.entries]

    @property
    def asks_the_model(self) -> bool:
        """Whether looking an entry up reads states of the unedited model itself."""
        return any(is_own(entry.retriever) or entry.look is not None for entry in self.entries)

    # ------------------------------------------------------------------ routing

    def similarities(self, prompts: Sequence[str]) -> torch.Tensor:
        """How similar the words of prompts are to the entries, ``[prompts, entries]`` fp32."""
        prompts = [shown_text(prompt) for prompt in prompts]
        similarities = torch.zeros(len(prompts), len(self.entries))
        for name in dict.fromkeys(entry.retriever for entry in self.entries):
            places = [i for i, entry in enumerate(self.entries) if entry.retriever == name]
            passages = [Passage(self.entries[i].scope, self.entries[i].subject) for i in places]
            vectors = [self.entries[i].embedding for i in places]
            kept = [v for v in vectors if v is not None]
            embedded = torch.stack(kept) if len(kept) == len(vectors) and kept else None
            retriever = find_retriever(name, self.own_retriever)
            similarities[:, places] = retriever.similarity(prompts, passages, embedded).float().cpu()
        return similarities

    def choose(self, prompts: Sequence[str]) -> list[tuple[PromptEntry, float] | None]:
        """The entry that answers each prompt with its similarity, or ``None``.

        Of entries that are equally similar, that with the nearest picture, and of these the latest.

        Args:
            prompts: texts; `PicturedText` or `RowText` where they are about pictures.
        """
        chosen: list[tuple[PromptEntry, float] | None] = []
        words = self.similarities(prompts)
        admitted, nearness = self._pictures(prompts)
        for prompt, row, near in zip(prompts, (words * admitted).tolist(), nearness.tolist(), strict=True):
            reached = [
                (entry, score, close)
                for entry, score, close in zip(self.entries, row, near, strict=True)
                if score >= entry.threshold or entry.soft
            ]
            reached.reverse()
            reached.sort(key=lambda found: (-found[1], -found[2]))  # stable: of equal ones the latest first
            best = [(entry, score) for entry, score, _ in reached]
            if best and best[0][0].select:
                chosen.append(self._selected(prompt, best[: best[0][0].select]))
            else:
                chosen.append(best[0] if best else None)
        return chosen

    def _selected(
        self, prompt: str, candidates: Sequence[tuple[PromptEntry, float]]
    ) -> tuple[PromptEntry, float] | None:
        """The candidate whose number the model finds the likeliest behind the list of them, or ``None`` for 0."""
        assert isinstance(self.prompter, Prompter)
        tokenizer = self.prompter.writer.tokenizer
        facts = [f"{i}. {entry.statement}" for i, (entry, _) in enumerate(candidates, start=1)]
        text = SELECTION.format(facts="\n".join(facts), prompt=prompt)
        examples = []
        for number in range(len(candidates) + 1):
            pair = encode_pair(tokenizer, text, str(number))
            first = pair.prompt_length - 1
            positions = tuple(range(first, first + len(pair.target_ids)))
            examples.append(Example(as_ids(pair.ids[:-1]), positions, tuple(pair.target_ids)))
        with self.prompter.own_calls():
            likely = target_probabilities(self.model, examples, pad_id(tokenizer), len(examples))
        number = max(range(len(likely)), key=likely.__getitem__)  # of equal ones the least: rather none
        return candidates[number - 1] if number else None

    def _pictures(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """How far pictures admit each entry to each prompt (a factor of the similarity), and how near they are."""
        admitted, nearness = torch.ones(len(prompts), len(self.entries)), torch.zeros(len(prompts), len(self.entries))
        if all(entry.look is None for entry in self.entries):
            return admitted, nearness
        looks = [self._look(prompt) for prompt in prompts]
        for j, entry in enumerate(self.entries):
            judge = getattr(find_retriever(entry.retriever, self.own_retriever), "sight", None)
            for i, look in enumerate(looks):
                if judge is not None:
                    admitted[i, j] = nearness[i, j] = judge(look, entry.look)
                elif entry.look is not None:
                    near = 0.0 if look is None else float(torch.cosine_similarity(look, entry.look, dim=0))
                    nearness[i, j], admitted[i, j] = near, float(near >= entry.image_threshold)
        return admitted, nearness

    def _look(self, prompt: str) -> torch.Tensor | None:
        if isinstance(prompt, RowText):
            return prompt.look()
        return None if self.reader is None else self.reader.look_of(prompt)

    def _looks(self, inputs: dict[str, Any]) -> list[torch.Tensor | None]:
        assert self.reader is not None
        return self.reader.looks(inputs)

    def route(self, prompts: Sequence[str]) -> list[Prefix | None]:
        """What stands in front of each prompt."""
        return [None if found is None else self._prefix(*found) for found in self.choose(prompts)]

    def build_prompt(self, query: str) -> str:
        """A query behind the edit that it belongs to, as one text; the query itself if there is none."""
        (found,) = self.choose([query])
        return query if found is None else "".join(found[0].demonstrations) + found[0].fact + query

    def _prefix(self, entry: PromptEntry, score: float) -> Prefix:
        reader = None if entry.reader == BASE else find_counterfactual(entry.reader, self.model)
        return Prefix(entry.fact, entry.demonstrations, entry.nearest_last, reader, score if entry.soft else 1.0)

    # ------------------------------------------------------------------ changes

    def apply(self, batch_id: str, changes: Sequence[Any], edit_ids: Sequence[str]) -> None:
        """Add one entry per edit."""
        added = [
            dataclasses.replace(change, edit_id=edit_id) for change, edit_id in zip(changes, edit_ids, strict=True)
        ]
        for name in dict.fromkeys(entry.retriever for entry in added):
            places = [i for i, entry in enumerate(added) if entry.retriever == name]
            embedded = find_retriever(name, self.own_retriever).embed([added[i].scope for i in places])
            if embedded is not None:
                for i, vector in zip(places, embedded, strict=True):
                    added[i] = dataclasses.replace(added[i], embedding=vector)
        self.restore((*self.entries, *added))

    def remove(self, edit_ids: Sequence[str]) -> None:
        """Delete records: always exact, whatever the order.

        Raises:
            UnknownEditError: if an id owns nothing here.
        """
        if self.prompter.is_passing:
            raise RollbackError("edits are switched off (disable_edits); leave that block before rolling back")
        check_known("the prompt memory", self.edit_ids, edit_ids)
        gone = set(edit_ids)
        self.restore(tuple(entry for entry in self.entries if entry.edit_id not in gone))

    def snapshot(self) -> tuple[PromptEntry, ...]:
        """The present state, for `restore`."""
        return self.entries

    def restore(self, snapshot: tuple[PromptEntry, ...]) -> None:
        """Return to an earlier state."""
        self.entries = snapshot
        if snapshot:
            self.prompter.attach()
        else:
            self.prompter.detach()

    def disabled(self) -> Switch[None]:
        """The model without these edits inside the block."""
        return self.prompter.passing()

    def check_mergeable(self) -> None:
        """Raise if there are edits: they are no part of any weight.

        Raises:
            MergeError: saying what to do.
        """
        if self.entries:
            raise MergeError(
                "edits that live in prompts cannot become part of the weights; keep the EditableModel (save_pretrained"
                " saves them), or roll them back first"
            )

    def forget(self) -> None:
        """Drop all entries."""
        self.restore(())

    # ------------------------------------------------------------------ files

    def tensors(self) -> dict[str, torch.Tensor]:
        """The embeddings and the looks of pictures, one tensor per entry that has one."""
        looks = {f"{LOOKS}.{i}": e.look for i, e in enumerate(self.entries) if e.look is not None}
        return looks | {
            f"{EMBEDDINGS}.{i}": e.embedding for i, e in enumerate(self.entries) if e.embedding is not None
        }

    def describe(self) -> dict[str, Any]:
        """The texts, and the fingerprint of the model that they were made for."""
        if not self.entries:
            return {}
        texts = []
        for i, entry in enumerate(self.entries):
            names = [f.name for f in dataclasses.fields(entry) if f.name not in ("embedding", "look")]
            silent = [
                *(() if entry.select else _WITHOUT_SELECTION),
                *(["image_threshold"] if entry.look is None else []),
            ]
            fields = {name: getattr(entry, name) for name in names if name not in silent}
            fields["demonstrations"] = [
                {"text": str(d), "image": pictured_to_json(d.pictures)} if isinstance(d, PicturedText) else d
                for d in entry.demonstrations
            ]
            if entry.look is not None:
                fields["look"] = f"{LOOKS}.{i}"
            fields["embedding"] = None if entry.embedding is None else f"{EMBEDDINGS}.{i}"
            texts.append(fields)
        return {"base_fingerprint": self.ledger.base_fingerprint(), "entries": texts}

    def read(self, saved: Saved) -> tuple[tuple[PromptEntry, ...], frozenset[str]]:
        """Check a saved edit and return a state for `restore`, and the ids of its edits.

        Raises:
            ArtifactError: if something is missing or does not fit.
            BaseModelMismatchError: if the base model is another one.
            ConfigError: if a retriever or a counterfactual model that the edits need is not there.
        """
        parts = saved.description.get("entries")
        if not isinstance(parts, list):
            raise ArtifactError(f"{saved.source}: edit_config.json has no valid description of prompts")
        made_for = saved.description.get("base_fingerprint")
        if not saved.ignore_fingerprint and made_for != self.ledger.base_fingerprint():
            raise BaseModelMismatchError(
                f"{saved.source}: the base model's weights are not those that the edits were made for. They were made"
                f" on {saved.made_on}. ignore_fingerprint=True uses them anyway."
            )
        entries = tuple(self._entry(saved, part, self.processor()) for part in parts)
        found = frozenset(entry.edit_id for entry in entries)
        if not found <= saved.edit_ids or len(found) != len(entries):
            raise ArtifactError(f"{saved.source}: the prompts belong to other edits than edits.jsonl names")
        for name in dict.fromkeys(entry.retriever for entry in entries):
            retriever, mine = find_retriever(name, self.own_retriever), [e for e in entries if e.retriever == name]
            widths = {None if e.embedding is None else len(e.embedding) for e in mine}
            fitting = retriever.embed([mine[0].scope]) if widths != {None} else None
            if widths != {None if fitting is None else fitting.shape[1]}:
                raise ArtifactError(f"{saved.source}: the embeddings are not those of the retriever {name!r}")
        for name in dict.fromkeys(entry.reader for entry in entries if entry.reader != BASE):
            find_counterfactual(name, self.model)
        return entries, found

    @staticmethod
    def _entry(saved: Saved, part: Any, processor: Any) -> PromptEntry:
        try:
            fields = _WITHOUT_SELECTION | dict(part)
            vector, look = fields.pop("embedding"), fields.pop("look", None)
            for name, kind in _KINDS.items():
                if not isinstance(fields[name], kind):
                    raise TypeError(name)
            if not 0 <= fields["select"] <= MOST_CHOICES:
                raise ValueError("select")
            fields["demonstrations"] = tuple(_demonstration(text, processor) for text in fields["demonstrations"])
            for name in ("threshold", "image_threshold"):
                fields[name] = float(fields.get(name, SAME_PICTURE))
            embedding, seen = (None if v is None else saved.tensor(v, [None]) for v in (vector, look))
            return PromptEntry(**fields, embedding=embedding, look=seen)
        except (KeyError, TypeError, ValueError, OverflowError, RequestError) as error:
            if isinstance(error, ArtifactError):
                raise
            raise ArtifactError(f"{saved.source}: damaged description of a prompt ({error!r})") from error

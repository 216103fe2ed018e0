"""The memory of `auto`: solutions that are switched on row by row; the method itself is in auto.py.

Imported by the method file; registers the memory, not a method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Self

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..books.book import Saved
from ..books.prefixes import Prefix, PrefixedRows, RowText, behind_prefixes
from ..books.prompting import Prompter
from ..books.retrieval import find_retriever
from ..books.router import Address, EditRoute, EditRouter, Encoder, RouteCandidate, encoder_of_words
from ..books.site_book import SiteBook, SiteMemory, register_memory
from ..books.sites import Decider, Frame, SiteCall, SiteFunction, Sites, needs_whole_prompt, prompt_lengths
from ..engine.forward import device_of
from ..errors import ArtifactError, ConfigError
from ..logging import get_logger, warn_once
from ..tokens import encode_text, needed_tokenizer, pad_rows
from .auto_shelf import Shelf, Solution

logger = get_logger(__name__)
WORDS = "words"
"""The encoder that needs nothing but the model; every other name is that of an embedding retriever."""
UNCLAIMED = -1
"""In the place of an edit: of a row that no edit claims, or not one of this shelf."""
UNNAMED = "unnamed"
"""In files, what belongs to the shelf for prompts that do not name the subject."""


@dataclass(frozen=True)
class RoutedChange:
    """A computed edit.

    Args:
        address: what it answers to.
        vectors: of its wordings, ``[wordings, d]``.
        solutions: one for each shelf of the memory.
        state: at the last token of its prompt, ``[1, d]``, where states are compared.
    """

    address: Address
    vectors: torch.Tensor
    solutions: Sequence[Solution]
    state: torch.Tensor | None = None


@dataclass(frozen=True)
class Compared:
    """The states that a router compares.

    Args:
        name: as configs call them, ``"model:<layer>"``.
        site: name of the block behind which they are taken.
        alike: least cosine of two that ask for the same.
    """

    name: str
    site: str
    alike: float


_READ: ContextVar[list[torch.Tensor] | None] = ContextVar("kedit_auto_read", default=None)
"""Where the pass that reads states leaves them; ``None`` in every other pass."""
_ROWS = 64
"""Prompts that share such a pass."""


def _is_reading() -> bool:
    return _READ.get() is not None


def _is_asleep(sites: Sites) -> bool:
    """Whether calls go to the model as it is: its edits are switched off, or its states are read."""
    return sites.is_disabled or _is_reading()


@register_memory
class RoutedChanges(SiteMemory):
    """Solutions of which a row gets that of the edit that its prompt asks for, or none.

    Args:
        shelves: the solutions; where there are two, the second is for prompts that do not name the subject.
        encoder: name of what compares wordings.
        slack: of the `EditRouter`.
        embedding: the word vectors of the model, for the encoder ``"words"``.
        compared: states that are compared beside words, if any.
        site: name of a module that it sits at if all solutions are texts, which change no module.
    """

    kind = "auto"

    def __init__(
        self,
        shelves: Sequence[Shelf],
        encoder: str,
        slack: float,
        embedding: Callable[[], torch.Tensor],
        compared: Compared | None = None,
        site: str = "",
    ):
        super().__init__(list(dict.fromkeys(path for shelf in shelves for path in shelf.paths)) or [site])
        self.shelves = tuple(shelves)
        self.compared = compared
        self._model: Any = None
        self.encoder, self.slack, self._embedding = encoder, slack, embedding
        self._tokenizer: Callable[[], PreTrainedTokenizerBase | None] = lambda: None
        self._encode: Encoder | None = None
        self.router = EditRouter(self.encode, slack, None if compared is None else compared.alike)

    @property
    def edit_ids(self) -> list[str]:
        """Ids of all edits, oldest first."""
        return [address.edit_id for address in self.router.addresses]

    # ------------------------------------------------------------------ routing

    def attached(self, book: SiteBook) -> Decider | None:
        """Decides by the text of a prompt, and puts texts in front of some."""
        self._tokenizer, self._model = book.tokenizer, book.model
        if any(shelf.holds_texts for shelf in self.shelves):
            self.front = Prompter(
                self._model, book.tokenizer, self._prefixes, asleep=partial(_is_asleep, book.sites), together=True
            )
        return self.decide

    def with_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> Self:
        """Itself, for making addresses before it is attached."""
        self._tokenizer = lambda: tokenizer
        return self

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's.

        Raises:
            ConfigError: if there is none.
        """
        return needed_tokenizer(self._tokenizer(), "the method auto")

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        """Vectors of texts, ``[n, d]`` fp32.

        Raises:
            ConfigError: if the encoder is not there, or keeps no vectors.
        """
        if self._encode is None:
            if self.encoder == WORDS:
                self._encode = encoder_of_words(self._embedding(), lambda text: encode_text(self.tokenizer, text).ids)
            else:
                self._encode = embeddings_of(self.encoder)
        return self._encode(texts)

    def width_of_views(self, embedding: torch.Tensor) -> int:
        """How long the vectors of the encoder are; an encoder that is not there is found out here.

        Args:
            embedding: the word vectors of the model.

        Raises:
            ConfigError: if the encoder is not there, or keeps no vectors.
        """
        return int((embedding if self.encoder == WORDS else self.encode(["it"])).shape[1])

    def decide(self, frame: Frame) -> None:
        """Find the edit of every row, before the model runs."""
        if _is_reading() or behind_prefixes() is not None:  # the model as it is without these edits; decided already
            return
        if frame.phase == "decode" or not needs_whole_prompt(frame, "auto"):
            return
        if frame.ids is None:
            warn_once(logger, "edits of auto read the prompt, and there are no token ids: they have no effect here")
            return
        masks = frame.prompt_mask.to(frame.ids.device)
        routes = self._routes([row[mask].tolist() for row, mask in zip(frame.ids, masks, strict=True)])
        frame.held[self.key] = self._places(routes)

    def _places(self, routes: Sequence[EditRoute | None]) -> torch.Tensor:
        """The place of each row's edit on each shelf, ``[shelves, rows]``, `UNCLAIMED` where it has none there."""
        places = torch.full((len(self.shelves), len(routes)), UNCLAIMED)
        for row, route in enumerate(routes):
            if route is not None:
                places[self._shelf_of(route), row] = route.place
        return places

    def _routes(self, rows: Sequence[Sequence[int]]) -> list[EditRoute | None]:
        """The edits that prompts ask for, which are given as token ids."""
        prompts = [str(self.tokenizer.decode(list(row))) for row in rows]
        known = dict(zip(prompts, rows, strict=True))
        return self.router.route(prompts, lambda texts: self._states([known[text] for text in texts]))

    def _shelf_of(self, route: EditRoute) -> int:
        """The last shelf answers prompts that do not name the subject, the first one all others."""
        return 0 if route.named else len(self.shelves) - 1

    def _prefixes(self, texts: Sequence[RowText]) -> list[Prefix | None]:
        """What stands in front of prompts: of those claimed by an edit whose solution is a text, this one."""
        found: list[Prefix | None] = []
        for route in self._routes([text.ids for text in texts]):
            fact = "" if route is None else self.shelves[self._shelf_of(route)].facts[route.place]
            found.append(Prefix(fact, mark=route) if fact else None)
        return found

    def _states(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """The model's states at the last tokens of prompts, without these edits, ``[prompts, d]``: a pass of its own.

        It runs inside the call that it decides for, in whose thread alone it is seen.
        """
        found: list[torch.Tensor] = []
        for start in range(0, len(rows), _ROWS):
            part = [list(row) or [0] for row in rows[start : start + _ROWS]]
            batch, mark = pad_rows(part).to(device_of(self._model)), _READ.set(found)
            try:
                with torch.no_grad(), prompt_lengths(self._model, [len(row) for row in part]):
                    self._model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
            finally:
                _READ.reset(mark)
        return torch.cat(found)

    def _read(self, call: SiteCall) -> None:
        """Leaves the states behind a block where `_states` looks for them."""
        found = _READ.get()
        if found is not None:
            found.append(call.at_key(call.output).detach().float().cpu())

    def explain(self, prompt: str) -> list[RouteCandidate]:
        """The edits whose subject a prompt names, the nearest first; before them one that its state is like."""
        found = self.router.explain(
            prompt, lambda texts: self._states([encode_text(self.tokenizer, text).ids for text in texts])
        )
        places = {edit_id: place for place, edit_id in enumerate(self.edit_ids)} if found else {}
        routes = [EditRoute(places[candidate.edit_id], candidate.named) for candidate in found]
        bases = [self.shelves[self._shelf_of(route)].bases[route.place] for route in routes]
        return [replace(candidate, base=base) for candidate, base in zip(found, bases, strict=True)]

    # ------------------------------------------------------------------ changing what a layer gives

    def functions(self) -> dict[str, SiteFunction]:
        """Adds the change of each row's edit."""
        reads = {} if self.compared is None else {self.compared.site: self._read}
        return {**dict.fromkeys(self.paths, self._add), **reads}

    def _add(self, call: SiteCall) -> torch.Tensor | None:
        behind = behind_prefixes()
        held = call.frame.held.get(self.key) if behind is None else self._places_behind(behind, call.output.shape[0])
        if held is None or held.shape[1] != call.output.shape[0]:
            return None
        output = None
        for shelf, places in zip(self.shelves, held, strict=True):
            rows = (places != UNCLAIMED).nonzero().squeeze(1) if call.path in shelf.sizes else places[:0]
            if len(rows):
                output = shelf.changed(call, call.output if output is None else output, rows, places[rows])
        return output

    def _places_behind(self, behind: PrefixedRows, rows: int) -> torch.Tensor:
        """`_places` of rows that are read behind their texts, as it was decided when these were put there.

        The text names the subject, too: asked again, the router might decide otherwise.
        """
        places = behind.held.get(self.key)
        if places is None:
            marks = [prefix and prefix.mark for prefix in behind.prefixes]
            places = self._places([mark if isinstance(mark, EditRoute) else None for mark in marks])
            behind.held[self.key] = places
        return places.repeat_interleave(rows // places.shape[1], dim=1)

    # ------------------------------------------------------------------ changing it

    def apply(self, batch_id: str, changes: Sequence[RoutedChange], edit_ids: Sequence[str]) -> None:
        """Take over edits."""
        shelves = tuple(
            shelf.with_solutions([change.solutions[i] for change in changes]) for i, shelf in enumerate(self.shelves)
        )
        vectors = torch.cat([change.vectors for change in changes])
        states = [change.state for change in changes if change.state is not None]
        self.router = self.router.with_addresses(
            [change.address for change in changes], vectors, torch.cat(states) if states else None
        )
        self.shelves = shelves

    def remove(self, edit_ids: Sequence[str]) -> None:
        """Drop edits; always possible, since no edit was made on another."""
        gone = set(edit_ids)
        kept = [i for i, edit_id in enumerate(self.edit_ids) if edit_id not in gone]
        self.router = self.router.without(gone)
        self.shelves = tuple(shelf.select(kept) for shelf in self.shelves)

    def snapshot(self) -> Any:
        """The present state; lists of vectors are shared, not copied."""
        return self.router, self.shelves

    def restore(self, snapshot: Any) -> None:
        """Return to an earlier state."""
        self.router, self.shelves = snapshot

    # ------------------------------------------------------------------ files

    def tensors(self) -> dict[str, torch.Tensor]:
        """Factors of all edits at every layer, and the vectors of their wordings."""
        found = {f"{self.paths[0]}.kedit_auto_views": self.router.views.tensor}
        for shelf in self.shelves:
            found |= shelf.tensors()
        if self.compared is not None:
            found[f"{self.paths[0]}.kedit_auto_states"] = self.router.states.tensor
        return found

    def describe(self) -> dict[str, Any]:
        """Settings, and what every edit answers to."""
        first, unnamed = self.shelves[0], self.shelves[1:]

        def both(describe: Callable[[Shelf], dict[str, Any]]) -> dict[str, Any]:
            return describe(first) | ({UNNAMED: describe(unnamed[0])} if unnamed else {})

        return {
            **both(Shelf.describe),
            "encoder": self.encoder,
            "slack": self.slack,
            **self._describe_states(),
            "edits": [
                {
                    "edit_id": address.edit_id,
                    "names": [" ".join(name) for name in address.names],
                    "views": list(address.views),
                    **both(partial(Shelf.describe_edit, place=i)),
                }
                for i, address in enumerate(self.router.addresses)
            ],
        }

    def _describe_states(self) -> dict[str, Any]:
        compared = self.compared
        return {} if compared is None else {"compared": {**asdict(compared), "width": self.router.states.width}}

    @classmethod
    def read(cls, model: nn.Module, paths: Sequence[str], part: Mapping[str, Any], saved: Saved) -> Self:
        """Rebuild the memory; see `SiteMemory.read`."""
        edits = part["edits"]
        shelves = [Shelf.read(model, part, edits, saved)]
        if UNNAMED in part:
            own = [edit[UNNAMED] for edit in edits]
            shelves.append(Shelf.read(model, part[UNNAMED], own, saved, f"{UNNAMED}_"))
        states: Any = part.get("compared")
        compared = states and Compared(str(states["name"]), str(states["site"]), float(states["alike"]))
        if compared is not None and compared.site not in dict(model.named_modules()):
            raise ArtifactError(f"{saved.source}: there is no {compared.site!r}, whose states edits of auto compare")
        memory = cls(
            shelves, str(part["encoder"]), float(part["slack"]), word_vectors(model), compared, min(paths)
        )  # fmt: skip
        if sorted(memory.paths) != sorted(paths):
            raise ArtifactError(f"{saved.source}: the layers of the edits of auto are not those that are described")
        addresses = [
            Address(
                str(e["edit_id"]),
                tuple(tuple(str(name).split(" ")) for name in e["names"]),
                tuple(map(str, e["views"])),
            )
            for e in edits
        ]
        if not all(a.views and a.names and all(all(n) for n in a.names) for a in addresses):
            raise ArtifactError(f"{saved.source}: an edit of auto answers to nothing")
        width = memory.width_of_views(word_vectors(model)())
        views = saved.tensor(f"{memory.paths[0]}.kedit_auto_views", (sum(len(a.views) for a in addresses), width))
        kept = None
        if compared is not None:
            kept = saved.tensor(f"{memory.paths[0]}.kedit_auto_states", (len(edits), int(states["width"])))
        memory.router = memory.router.with_addresses(addresses, views, kept)
        return memory


def word_vectors(model: nn.Module) -> Callable[[], torch.Tensor]:
    """A function that gives the word vectors of a transformers model, ``[vocabulary, d]``."""
    return partial(_word_vectors_of, model)  # and no lambda: a copy of the model is to have its own


def _word_vectors_of(model: nn.Module) -> torch.Tensor:
    vectors: torch.Tensor = model.get_input_embeddings().weight.detach()  # type: ignore[operator]
    return vectors


def embeddings_of(name: str) -> Encoder:
    """The vectors of an embedding retriever.

    Raises:
        ConfigError: if it keeps none.
    """
    retriever = find_retriever(name)

    def encode(texts: Sequence[str]) -> torch.Tensor:
        vectors = retriever.embed(texts)
        if vectors is None:
            raise ConfigError(f"the retriever {name!r} makes no vectors; auto takes 'dense' or 'words'")
        return vectors

    return encode

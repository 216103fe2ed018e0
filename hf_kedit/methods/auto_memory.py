"""The memory of `auto`: low-rank changes that are switched on row by row; the method itself is in auto.py.

Imported by the method file; registers the memory, not a method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..books.book import Saved
from ..books.retrieval import find_retriever
from ..books.router import Address, EditRouter, Encoder, RouteCandidate, encoder_of_words
from ..books.site_book import SiteBook, SiteMemory, check_finite, register_memory
from ..books.sites import Decider, Frame, SiteCall, SiteFunction, needs_whole_prompt, prompt_lengths
from ..engine.forward import device_of
from ..engine.lowrank import Factors
from ..engine.nearest import Vectors
from ..engine.weights import get_module, weight_shape
from ..errors import ArtifactError, ConfigError
from ..logging import get_logger, warn_once
from ..tokens import encode_text, pad_rows

logger = get_logger(__name__)
WORDS = "words"
"""The encoder that needs nothing but the model; every other name is that of an embedding retriever."""
UNCLAIMED = -1
"""The route of a row that no edit claims."""


@dataclass(frozen=True)
class RoutedChange:
    """A computed edit.

    Args:
        address: what it answers to.
        vectors: of its wordings, ``[wordings, d]``.
        factors: by module.
        state: at the last token of its prompt, ``[1, d]``, where states are compared.
    """

    address: Address
    vectors: torch.Tensor
    factors: Mapping[str, Factors]
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


@register_memory
class RoutedChanges(SiteMemory):
    """Changes of some linear layers, of which a row gets that of the edit that its prompt asks for, or none.

    Args:
        paths: names of the layers.
        rank: of a change, at each layer.
        encoder: name of what compares wordings.
        slack: of the `EditRouter`.
        embedding: the word vectors of the model, for the encoder ``"words"``.
        sizes: (d_in, d_out) of every layer.
        compared: states that are compared beside words, if any.
    """

    kind = "auto"

    def __init__(
        self,
        paths: Sequence[str],
        rank: int,
        encoder: str,
        slack: float,
        embedding: Callable[[], torch.Tensor],
        sizes: Mapping[str, tuple[int, int]],
        compared: Compared | None = None,
    ):
        super().__init__(paths)
        self.compared = compared
        self._model: Any = None
        self.rank, self.encoder, self.slack, self._embedding = rank, encoder, slack, embedding
        self.sizes = dict(sizes)
        self._tokenizer: Callable[[], PreTrainedTokenizerBase | None] = lambda: None
        self._encode: Encoder | None = None
        self.router = EditRouter(self.encode, slack, None if compared is None else compared.alike)
        self.lefts = {path: Vectors(rank * self.sizes[path][1]) for path in self.paths}
        self.rights = {path: Vectors(rank * self.sizes[path][0]) for path in self.paths}

    @property
    def edit_ids(self) -> list[str]:
        """Ids of all edits, oldest first."""
        return [address.edit_id for address in self.router.addresses]

    # ------------------------------------------------------------------ routing

    def attached(self, book: SiteBook) -> Decider | None:
        """Decides by the text of a prompt."""
        self._tokenizer, self._model = book.tokenizer, book.model
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
        found = self._tokenizer()
        if found is None:
            raise ConfigError("auto reads prompts and needs the tokenizer: EditableModel(model, …, tokenizer=…)")
        return found

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
        if _READ.get() is not None:  # the pass below: the model as it is without these edits
            return
        if frame.phase == "decode" or not needs_whole_prompt(frame, "auto"):
            return
        if frame.ids is None:
            warn_once(logger, "edits of auto read the prompt, and there are no token ids: they have no effect here")
            return
        masks = frame.prompt_mask.to(frame.ids.device)
        rows = [row[mask].tolist() for row, mask in zip(frame.ids, masks, strict=True)]
        prompts = [str(self.tokenizer.decode(row)) for row in rows]
        known = dict(zip(prompts, rows, strict=True))
        found = self.router.route(prompts, lambda texts: self._states([known[text] for text in texts]))
        frame.held[self.key] = torch.tensor([UNCLAIMED if place is None else place for place in found])

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
        return self.router.explain(
            prompt, lambda texts: self._states([encode_text(self.tokenizer, text).ids for text in texts])
        )

    # ------------------------------------------------------------------ changing what a layer gives

    def functions(self) -> dict[str, SiteFunction]:
        """Adds the change of each row's edit."""
        reads = {} if self.compared is None else {self.compared.site: self._read}
        return {**dict.fromkeys(self.paths, self._add), **reads}

    def _add(self, call: SiteCall) -> torch.Tensor | None:
        routes = call.frame.held.get(self.key)
        if routes is None or routes.shape[0] != call.output.shape[0]:
            return None
        rows = (routes != UNCLAIMED).nonzero().squeeze(1)
        if not len(rows):
            return None
        return self.added(call, rows, routes[rows])

    def added(self, call: SiteCall, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """The output with the changes of some edits added to some rows, at every position; the others bit for bit."""
        device, (d_in, d_out) = call.inputs.device, self.sizes[call.path]
        rows, places = rows.to(device), places.to(device)
        right = self.rights[call.path].on(device)[places].view(-1, d_in, self.rank)
        left = self.lefts[call.path].on(device)[places].view(-1, d_out, self.rank)
        change = torch.bmm(torch.bmm(call.inputs[rows].float(), right), left.transpose(1, 2))
        output = call.output.clone()
        output[rows] = (output[rows].float() + change).to(output.dtype)
        return output

    # ------------------------------------------------------------------ changing it

    def apply(self, batch_id: str, changes: Sequence[RoutedChange], edit_ids: Sequence[str]) -> None:
        """Take over edits."""
        flat = {path: [change.factors[path].padded(self.rank) for change in changes] for path in self.paths}
        check_finite("change", *(t for parts in flat.values() for f in parts for t in (f.left, f.right)))
        vectors = torch.cat([change.vectors for change in changes])
        states = [change.state for change in changes if change.state is not None]
        self.router = self.router.with_addresses(
            [change.address for change in changes], vectors, torch.cat(states) if states else None
        )
        self.lefts, self.rights = dict(self.lefts), dict(self.rights)
        for path, parts in flat.items():
            for factors in parts:
                self.lefts[path] = self.lefts[path].with_row(factors.left.reshape(-1))
                self.rights[path] = self.rights[path].with_row(factors.right.reshape(-1))

    def remove(self, edit_ids: Sequence[str]) -> None:
        """Drop edits; always possible, since no edit was made on another."""
        kept = [i for i, edit_id in enumerate(self.edit_ids) if edit_id not in set(edit_ids)]
        self.router = self.router.without(set(edit_ids))
        self.lefts = {path: vectors.select(kept) for path, vectors in self.lefts.items()}
        self.rights = {path: vectors.select(kept) for path, vectors in self.rights.items()}

    def snapshot(self) -> Any:
        """The present state; lists of vectors are shared, not copied."""
        return self.router, self.lefts, self.rights

    def restore(self, snapshot: Any) -> None:
        """Return to an earlier state."""
        self.router, self.lefts, self.rights = snapshot

    # ------------------------------------------------------------------ files

    def tensors(self) -> dict[str, torch.Tensor]:
        """Factors of all edits at every layer, and the vectors of their wordings."""
        found = {f"{self.paths[0]}.kedit_auto_views": self.router.views.tensor}
        for path in self.paths:
            found[f"{path}.kedit_auto_left"] = self.lefts[path].tensor
            found[f"{path}.kedit_auto_right"] = self.rights[path].tensor
        if self.compared is not None:
            found[f"{self.paths[0]}.kedit_auto_states"] = self.router.states.tensor
        return found

    def describe(self) -> dict[str, Any]:
        """Settings, and what every edit answers to."""
        return {
            "paths": list(self.paths),
            "rank": self.rank,
            "encoder": self.encoder,
            "slack": self.slack,
            **self._describe_states(),
            "edits": [
                {"edit_id": a.edit_id, "names": [" ".join(n) for n in a.names], "views": list(a.views)}
                for a in self.router.addresses
            ],
        }

    def _describe_states(self) -> dict[str, Any]:
        compared = self.compared
        return {} if compared is None else {"compared": {**asdict(compared), "width": self.router.states.width}}

    @classmethod
    def read(cls, model: nn.Module, paths: Sequence[str], part: Mapping[str, Any], saved: Saved) -> Self:
        """Rebuild the memory; see `SiteMemory.read`."""
        if sorted(part["paths"]) != sorted(paths):
            raise ArtifactError(f"{saved.source}: the layers of the edits of auto are not those that are described")
        rank, edits = int(part["rank"]), part["edits"]
        states: Any = part.get("compared")
        compared = states and Compared(str(states["name"]), str(states["site"]), float(states["alike"]))
        if compared is not None and compared.site not in dict(model.named_modules()):
            raise ArtifactError(f"{saved.source}: there is no {compared.site!r}, whose states edits of auto compare")
        memory = cls(
            part["paths"], rank, str(part["encoder"]), float(part["slack"]), word_vectors(model),
            {path: sizes_of(model, path) for path in paths}, compared,
        )  # fmt: skip
        addresses = [
            Address(
                str(e["edit_id"]),
                tuple(tuple(str(name).split(" ")) for name in e["names"]),
                tuple(map(str, e["views"])),
            )
            for e in edits
        ]
        if rank < 1 or not all(a.views and a.names and all(all(n) for n in a.names) for a in addresses):
            raise ArtifactError(f"{saved.source}: an edit of auto answers to nothing")
        width = memory.width_of_views(word_vectors(model)())
        views = saved.tensor(f"{memory.paths[0]}.kedit_auto_views", (sum(len(a.views) for a in addresses), width))
        kept = None
        if compared is not None:
            kept = saved.tensor(f"{memory.paths[0]}.kedit_auto_states", (len(edits), int(states["width"])))
        memory.router = memory.router.with_addresses(addresses, views, kept)
        for path in memory.paths:
            d_in, d_out = memory.sizes[path]
            left = saved.tensor(f"{path}.kedit_auto_left", (len(edits), rank * d_out))
            right = saved.tensor(f"{path}.kedit_auto_right", (len(edits), rank * d_in))
            memory.lefts[path], memory.rights[path] = Vectors.of(left), Vectors.of(right)
        return memory


def sizes_of(model: nn.Module, path: str) -> tuple[int, int]:
    """(d_in, d_out) of a linear layer."""
    d_out, d_in = weight_shape(get_module(model, path))
    return d_in, d_out


def word_vectors(model: nn.Module) -> Callable[[], torch.Tensor]:
    """A function that gives the word vectors of a transformers model, ``[vocabulary, d]``."""
    return lambda: model.get_input_embeddings().weight.detach()  # type: ignore[operator]


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

"""The book of edits that live in modules wrapped in place.

What is kept at a site, and what it does there, is a `SiteMemory`: GRACE's codebook, WISE's side memories,
T-Patcher's neurons. A method brings its own; this book attaches it when it gets its first edit, asks it to undo edits,
writes it to files, and takes it off the model without a trace when its last edit is gone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import torch
from torch import nn

from ..anatomy.switching import Switch, uninterrupted
from ..engine.weights import get_module, tensor_digest
from ..errors import (
    ArtifactError,
    BaseModelMismatchError,
    ConfigError,
    KeditError,
    MergeError,
    NonFiniteError,
    WeightError,
)
from ..logging import get_logger
from .book import Saved, check_known
from .ledger import Ledger
from .prompting import Prompter
from .router import RouteCandidate
from .sites import Decider, SiteFunction, Sites

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = get_logger(__name__)
T = TypeVar("T", bound="SiteMemory")
_KINDS: dict[str, type[SiteMemory]] = {}


class SiteMemory(ABC):
    """What one method keeps at one or several sites of a model.

    A method computes changes without altering its memory; `apply` alone takes them over. State must be cheap to
    return to: replace tensors instead of writing into them, or keep an undo log.

    Args:
        paths: names of the modules that it sits at.
    """

    kind: ClassVar[str]
    """Name of the memory in files."""
    front: Prompter | None = None
    """What stands before the model while the memory is on it, if texts go in front of prompts; made by `attached`."""

    def __init__(self, paths: Sequence[str]):
        self.paths = tuple(paths)

    @property
    def key(self) -> str:
        """Name of this memory in its model."""
        return f"{self.kind}@{self.paths[0]}"

    @property
    @abstractmethod
    def edit_ids(self) -> list[str]:
        """Ids of the edits in it, oldest first."""

    @abstractmethod
    def functions(self) -> dict[str, SiteFunction]:
        """What it does at each of its modules; called once, when it is attached."""

    def attached(self, book: SiteBook) -> Decider | None:
        """Called when it is put on a model, which ``book`` knows; returns what decides by tokens, if it does so."""
        return None

    def explain(self, prompt: str) -> list[RouteCandidate]:
        """What it compares a prompt with, if it reads prompts."""
        return []

    @abstractmethod
    def apply(self, batch_id: str, changes: Sequence[Any], edit_ids: Sequence[str]) -> None:
        """Take over the changes of one batch."""

    @abstractmethod
    def remove(self, edit_ids: Sequence[str]) -> None:
        """Undo some of its edits, never all of them (then the whole memory is dropped).

        Raises:
            RollbackError: if one of them cannot be undone on its own, saying what can be done instead. Nothing has
                changed then.
        """

    @abstractmethod
    def snapshot(self) -> Any:
        """The present state, for `restore`; without copying what it holds."""

    @abstractmethod
    def restore(self, snapshot: Any) -> None:
        """Return to an earlier state."""

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """Tensors to save, on the CPU, by names of the form ``<module>.kedit_<kind>_<what>``."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Everything else to save, JSON-ready."""

    @classmethod
    @abstractmethod
    def read(cls, model: nn.Module, paths: Sequence[str], part: Mapping[str, Any], saved: Saved) -> Self:
        """Rebuild a memory from `describe` (``part``) and the tensors of a saved edit, checking everything.

        Tensors are asked for with `Saved.tensor`: one that nobody asks for makes the whole edit refused.

        Raises:
            ArtifactError: if something is missing or does not fit.
        """


def register_memory(cls: type[T]) -> type[T]:
    """Class decorator: make a memory known, so that saved ones can be read."""
    _KINDS[cls.kind] = cls
    return cls


def memory_kind(name: str) -> type[SiteMemory]:
    """The memory of a kind."""
    return _KINDS[name]


@dataclass(frozen=True)
class SiteEntry:
    """A change of a memory, as a method returns it.

    Args:
        memory: the memory that `SiteBook.find` gave, or a new, empty one.
        change: whatever the memory's `apply` takes.
    """

    memory: SiteMemory
    change: Any


class SiteBook:
    """Applies, undoes and remembers the edits at the sites of one model.

    Args:
        model: the transformers model whose modules are wrapped in place.
        ledger: of the model, which knows its unedited weights; ``None``: they are not edited.
        tokenizer: of the model, looked up when it is needed.
    """

    def __init__(
        self,
        model: nn.Module,
        ledger: Ledger | None = None,
        tokenizer: Callable[[], PreTrainedTokenizerBase | None] = lambda: None,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.ledger = ledger or Ledger(model)
        self.sites = Sites.of(model)
        self.memories: dict[str, SiteMemory] = {}
        self._attached: dict[str, SiteMemory] = {}

    def find(self, key: str) -> SiteMemory | None:
        """The memory of this key, if the model carries one."""
        return self.memories.get(key)

    @property
    def edit_ids(self) -> list[str]:
        """Ids of all edits, memory by memory."""
        return [edit_id for memory in self.memories.values() for edit_id in memory.edit_ids]

    def apply(self, batch_id: str, changes: Sequence[SiteEntry], edit_ids: Sequence[str]) -> None:
        """Give every memory its changes and attach the new ones, all or none.

        Raises:
            WeightError: inside `disabled`.
            ConfigError: if a module is wrapped for another memory already.
        """
        self._check_enabled()
        before = self.snapshot()
        with uninterrupted():
            try:
                by_memory: dict[str, list[SiteEntry]] = {}
                for entry in changes:
                    by_memory.setdefault(entry.memory.key, []).append(entry)
                for key, entries in by_memory.items():
                    memory = self.memories.setdefault(key, entries[0].memory)
                    memory.apply(batch_id, [entry.change for entry in entries], edit_ids)
                self._sync()
            except BaseException:
                self.restore(before)
                raise

    def remove(self, edit_ids: Sequence[str]) -> None:
        """Undo edits; memories that have none left are taken off the model.

        Raises:
            UnknownEditError: if an id owns nothing here.
            RollbackError: if an edit cannot be undone without others.
        """
        self._check_enabled()
        gone = set(edit_ids)
        check_known("the wrapped modules", self.edit_ids, gone)
        before = self.snapshot()
        with uninterrupted():
            try:
                for key, memory in list(self.memories.items()):
                    mine = [edit_id for edit_id in memory.edit_ids if edit_id in gone]
                    if len(mine) == len(memory.edit_ids):
                        del self.memories[key]
                    elif mine:
                        memory.remove(mine)
                self._sync()
            except BaseException:
                self.restore(before)
                raise

    def snapshot(self) -> dict[str, tuple[SiteMemory, Any]]:
        """The present state, for `restore`."""
        return {key: (memory, memory.snapshot()) for key, memory in self.memories.items()}

    def restore(self, snapshot: dict[str, tuple[SiteMemory, Any]]) -> None:
        """Return to an earlier state."""
        for memory, state in snapshot.values():
            memory.restore(state)
        self.memories = {key: memory for key, (memory, _) in snapshot.items()}
        self._sync()

    def _sync(self) -> None:
        """Attach and detach memories until the model carries exactly those that are in the book."""
        for key, memory in list(self._attached.items()):
            if self.memories.get(key) is not memory:
                if memory.front is not None:
                    memory.front.detach()
                self.sites.detach(key)
                del self._attached[key]
        for key, memory in self.memories.items():
            if key not in self._attached:
                self.sites.attach(key, memory.functions(), memory.attached(self))
                self._attached[key] = memory
                if memory.front is not None:  # in front of the wrapping, whose `generate` it calls
                    memory.front.attach()
        self.sites.drop_held()

    def _check_enabled(self) -> None:
        if self.sites.is_disabled:
            raise WeightError("edits are switched off (disable_edits); leave that block before changing them")

    def check_weight_edit(self, modules: Sequence[str]) -> None:
        """Raise if a change of these modules would move what the wrapped modules see.

        Keys are computed with the weights below them; a codebook would no longer know its prompts.

        Raises:
            ConfigError: naming the wrapped module.
        """
        for module, path in self._beneath(modules):
            raise ConfigError(
                f"{module} lies below {path}, whose edits recognise prompts by what reaches them: changing it would"
                " make them miss. Edit a layer above, or roll those edits back, change the weights, and make them"
                " again"
            )

    def warn_of_weight_rollback(self, modules: Sequence[str]) -> None:
        """Tell the user if edits at wrapped modules were made with weight edits in place that are gone now."""
        for module, path in self._beneath(modules):
            logger.warning(
                "%s is back to what it was, and the edits at %s were made when it was not: they recognise prompts by"
                " what reaches them and may miss. Roll them back and make them again",
                module,
                path,
            )

    def _beneath(self, modules: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Pairs of one of ``modules`` and a wrapped module that comes after it."""
        order = {name: place for place, (name, _) in enumerate(self.model.named_modules())}
        for path in self.sites.paths:
            yield from ((m, path) for m in modules if order.get(m, -1) <= order[path])

    # ------------------------------------------------------------------ temporary states

    def disabled(self) -> Switch[None]:
        """The model without these edits inside the block."""
        return self.sites.disabled()

    def trying(self, functions: Mapping[str, SiteFunction], instead_of: SiteMemory | None = None) -> Switch[None]:
        """Site functions for the duration of a block, for training and measuring; ``instead_of`` is silent then."""
        return self.sites.trying(functions, instead_of.key if instead_of is not None else None)

    # ------------------------------------------------------------------ merging and files

    def check_mergeable(self) -> None:
        """Raise if there are edits: they are no part of any weight.

        Raises:
            MergeError: naming the modules.
        """
        if self.memories:
            raise MergeError(
                f"the edits of {', '.join(self.memories)} are decided at run time and cannot become part of the"
                " weights; keep the EditableModel (save_pretrained saves them), or roll them back first"
            )

    def forget(self) -> None:
        """Take everything off the model."""
        self.restore({})

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of all memories."""
        found: dict[str, torch.Tensor] = {}
        for memory in self.memories.values():
            found |= {name: value.detach().cpu().contiguous() for name, value in memory.tensors().items()}
        return found

    def describe(self) -> dict[str, Any]:
        """The memories, and the fingerprints of the model that their keys were computed with."""
        if not self.memories:
            return {}
        return {
            "base_fingerprint": self.ledger.base_fingerprint(),
            "memories": [
                {
                    "kind": memory.kind,
                    "modules": {path: self._digest(path) for path in memory.paths},
                    "state": memory.describe(),
                }
                for memory in self.memories.values()
            ],
        }

    def read(self, saved: Saved) -> tuple[dict[str, tuple[SiteMemory, Any]], frozenset[str]]:
        """Check a saved edit and return a state for `restore`, and the ids of its edits.

        Raises:
            ArtifactError: if something is missing or does not fit.
            BaseModelMismatchError: if the base model is another one.
        """
        parts = saved.description.get("memories")
        if not isinstance(parts, list) or not all(_is_memory(part) for part in parts):
            raise ArtifactError(f"{saved.source}: edit_config.json has no valid description of wrapped modules")
        names = {name for name, _ in self.model.named_modules()}
        for part in parts:
            if part["kind"] not in _KINDS:
                raise ArtifactError(f"{saved.source}: this version of hf_kedit knows no {part['kind']!r} edits")
            missing = [path for path in part["modules"] if path not in names]
            if missing:
                raise BaseModelMismatchError(
                    f"{saved.source}: {type(self.model).__name__} has no module {missing[0]!r}; the edits were made on"
                    f" {saved.made_on}"
                )
        same = saved.description.get("base_fingerprint") == self.ledger.base_fingerprint() and all(
            digest == self._digest(path) for part in parts for path, digest in part["modules"].items()
        )
        if not same and not saved.ignore_fingerprint:
            raise BaseModelMismatchError(
                f"{saved.source}: the base model's weights are not those that the edits were made on (other revision,"
                f" dtype, or an already edited model). They were made on {saved.made_on}. ignore_fingerprint=True"
                " applies them anyway."
            )
        state: dict[str, tuple[SiteMemory, Any]] = {}
        for part in parts:
            try:
                memory = _KINDS[part["kind"]].read(self.model, list(part["modules"]), part["state"], saved)
            except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
                if isinstance(error, KeditError):
                    raise
                raise ArtifactError(f"{saved.source}: damaged description of {part['kind']!r}: {error!r}") from error
            state[memory.key] = (memory, memory.snapshot())
        found = frozenset(edit_id for memory, _ in state.values() for edit_id in memory.edit_ids)
        if not found <= saved.edit_ids:
            raise ArtifactError(f"{saved.source}: a wrapped module holds an edit that is not in edits.jsonl")
        return state, found

    def _digest(self, path: str) -> str:
        """SHA-256 over the unedited parameters of a module."""
        names = [name for name, _ in get_module(self.model, path).named_parameters(recurse=False)]
        return tensor_digest((name, self.ledger.original(path, name)) for name in names)


def _is_memory(part: Any) -> bool:
    return (
        isinstance(part, dict)
        and isinstance(part.get("kind"), str)
        and isinstance(part.get("modules"), dict)
        and bool(part["modules"])
        and isinstance(part.get("state"), dict)
    )


def check_finite(name: str, *tensors: torch.Tensor) -> None:
    """Raise if a computed change is not finite.

    Raises:
        NonFiniteError: see above.
    """
    if not all(bool(torch.isfinite(t).all()) for t in tensors):
        raise NonFiniteError(f"the computed {name} holds NaN or infinity; nothing was changed")

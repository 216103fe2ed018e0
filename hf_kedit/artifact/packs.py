"""Edit packs: named sets of saved edits on one model, switched on and off, in an order, and compared.

All active packs lie in the ledger beside the model's own edits, so that the weights are the exact sum of what is
active, and packs that are switched off leave the bits behind that were there without them. A pack holds weight edits:
what other methods keep (codebooks, prompts) does not add up, and is loaded alone with `from_pretrained`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Literal

from ..anatomy.switching import uninterrupted
from ..books.deltas import Account, Piece
from ..data.conflicts import normalised
from ..errors import PackError, nearest
from ..journal import Edit, Journal
from ..logging import get_logger
from .layout import Artifact
from .reading import read_books

if TYPE_CHECKING:
    from ..editing.state import EditedModel

logger = get_logger(__name__)
OnConflict = Literal["warn", "raise", "ignore"]
OWN = ""
"""In a `PackConflict`: the edits that were made on this model itself."""


@dataclass
class Pack:
    """A set of edits.

    Args:
        name: in this model.
        source: folder or repository that it came from.
        edits: its part of the journal; ids are ``<name>/<id>``.
        accounts: parameter → its pieces.
    """

    name: str
    source: str
    edits: list[Edit]
    accounts: dict[str, Account]

    @property
    def ids(self) -> set[str]:
        """Ids of the edits."""
        return {edit.id for edit in self.edits}


@dataclass(frozen=True)
class PackConflict:
    """Two edits of different packs that ask the same of the model.

    Args:
        packs: names of the packs; empty for the model's own edits.
        edit_ids: ids of the edits.
        prompt: of the first one.
        targets: what each of them wants.
    """

    packs: tuple[str, str]
    edit_ids: tuple[str, str]
    prompt: str
    targets: tuple[str, str]

    @property
    def contradictory(self) -> bool:
        """Whether the targets differ; else the same change lies on the weights twice."""
        return normalised(self.targets[0]) != normalised(self.targets[1])

    def __str__(self) -> str:
        one, two = (name or "the model's own edits" for name in self.packs)
        wants = " and ".join(repr(target) for target in self.targets)
        return f"{one} and {two} both edit {self.prompt!r}: {wants}"


class Packs:
    """The packs of one model.

    Args:
        model: that they are for.
    """

    def __init__(self, model: EditedModel):
        self._model = model
        self._packs: dict[str, Pack] = {}
        self._active: list[str] = []

    @property
    def names(self) -> list[str]:
        """All packs, in the order in which they were loaded."""
        return list(self._packs)

    @property
    def active(self) -> list[str]:
        """Those that are on, in the order in which they are added to the weights."""
        return list(self._active)

    def edits(self, name: str) -> list[Edit]:
        """The edits of a pack, whether it is on or off.

        Raises:
            PackError: if there is no such pack.
        """
        self._refresh()
        return list(self._get(name).edits)

    # ------------------------------------------------------------------ changing

    def free_name(self, source: str, name: str | None) -> str:
        """The name that a new pack gets.

        Raises:
            PackError: if it is no name, or taken.
        """
        name = name or source.rstrip("/").rpartition("/")[2]
        if not name or "/" in name:
            raise PackError(f"a pack needs a name without '/', not {name!r}: give name=")
        if name in self._packs:
            raise PackError(f"there is a pack {name!r} already; unload it first, or choose another name")
        return name

    def load(
        self,
        artifact: Artifact,
        name: str | None = None,
        *,
        activate: bool = True,
        on_conflict: OnConflict = "warn",
        ignore_fingerprint: bool = False,
    ) -> Pack:
        """Add a pack that was read; see `EditableModel.load_edits`."""
        name = self.free_name(artifact.source, name)
        pack = self._read(artifact, name, ignore_fingerprint)
        self._packs[name] = pack
        if activate:
            try:
                self.set_active([*self._active, name], on_conflict=on_conflict)
            except BaseException:
                del self._packs[name]
                raise
        return pack

    def set_active(self, names: Sequence[str], *, on_conflict: OnConflict = "warn") -> None:
        """Switch packs on and off; see `EditableModel.set_active`."""
        wanted = [self._get(name) for name in names]
        if len(set(names)) != len(names):
            raise PackError(f"a pack is named twice: {', '.join(names)}")
        self._refresh()
        self._model.ledger.check_unchanged()
        self._judge(wanted, on_conflict)
        same = next((i for i, (a, b) in enumerate(zip(self._active, names, strict=False)) if a != b), None)
        kept = min(len(self._active), len(names)) if same is None else same
        going = {i for name in self._active[kept:] for i in self._packs[name].ids}
        accounts = _without(self._model.ledger.snapshot(), going)
        for pack in wanted[kept:]:
            accounts = _with(accounts, pack.accounts)
        edits = [e for e in self._model.journal if e.id not in going]
        edits += [e for pack in wanted[kept:] for e in pack.edits]
        with uninterrupted():
            self._model.ledger.restore(accounts)
            self._model.journal = Journal(edits)
            self._active = list(names)

    def unload(self, name: str) -> None:
        """Switch a pack off and forget it.

        Raises:
            PackError: if there is no such pack.
        """
        self._get(name)
        if name in self._active:
            self.set_active([other for other in self._active if other != name], on_conflict="ignore")
        del self._packs[name]

    def forget(self) -> None:
        """Drop all records; what is active stays on the weights (after merging)."""
        self._packs, self._active = {}, []

    # ------------------------------------------------------------------ comparing

    def conflicts(self, names: Sequence[str] | None = None) -> list[PackConflict]:
        """Pairs of edits of different packs, or of a pack and the model itself, that ask the same thing.

        Two edits ask the same if one of their prompts (or paraphrases) is the same text, or if subject and
        ``metadata["relation"]`` are.

        Args:
            names: packs to compare; ``None``: the active ones.

        Raises:
            PackError: if there is no such pack.
        """
        self._refresh()
        return list(self._conflicts([self._get(name) for name in (self._active if names is None else names)]))

    def _conflicts(self, packs: Sequence[Pack]) -> Iterator[PackConflict]:
        theirs = {i for pack in self._packs.values() for i in pack.ids}
        own = [e for e in self._model.journal if e.id not in theirs]
        sets = [(OWN, own), *((pack.name, pack.edits) for pack in packs)]
        for (one, first), (two, second) in combinations(sets, 2):
            by_key = {key: edit for edit in first for key in _keys(edit)}
            for edit in second:
                other = next((by_key[key] for key in _keys(edit) if key in by_key), None)
                if other is not None:
                    targets = (other.request.target_new, edit.request.target_new)
                    yield PackConflict((one, two), (other.id, edit.id), other.request.filled_prompt, targets)

    def _judge(self, wanted: Sequence[Pack], on_conflict: OnConflict) -> None:
        if on_conflict == "ignore":
            return
        for conflict in self._conflicts(wanted):
            if set(conflict.packs) <= {OWN, *self._active}:
                continue  # was there before
            if on_conflict == "raise":
                raise PackError(f"{conflict}; nothing was changed")
            logger.warning("%s; the weights carry both changes, and either may win", conflict)

    # ------------------------------------------------------------------ inside

    def _get(self, name: str) -> Pack:
        if name not in self._packs:
            raise PackError(f"there is no pack {name!r}.{nearest(name, self._packs)}")
        return self._packs[name]

    def _read(self, artifact: Artifact, name: str, ignore_fingerprint: bool) -> Pack:
        """Check a saved edit against the unedited model and give its edits names of their own."""
        beside = [kind for kind in artifact.config.get("books") or () if kind != "weights"]
        if beside:
            raise PackError(
                f"{artifact.source} holds edits of the kind {', '.join(beside)}, which do not add up with others: load"
                " it alone, with EditableModel.from_pretrained"
            )
        contents = read_books(artifact, self._model, ignore_fingerprint)
        accounts = {
            key: replace(account, pieces=[_renamed(piece, name) for piece in account.pieces])
            for key, account in contents["weights"].items()
        }
        edits = [
            replace(edit, id=f"{name}/{edit.id}", request=edit.request.with_id(f"{name}/{edit.id}"))
            for edit in artifact.journal
        ]
        taken = {e.id for e in self._model.journal} & {e.id for e in edits}
        if taken:
            raise PackError(f"the model has an edit {min(taken)!r} already; choose another name than {name!r}")
        return Pack(name, artifact.source, edits, accounts)

    def _refresh(self) -> None:
        """What was rolled back of an active pack is no longer part of it."""
        present = {e.id for e in self._model.journal}
        for pack in (self._packs[name] for name in self._active):
            gone = pack.ids - present
            if gone:
                pack.accounts = _without(pack.accounts, gone)
                pack.edits = [e for e in pack.edits if e.id not in gone]


def _keys(edit: Edit) -> set[tuple[str, ...]]:
    """What two edits have in common that ask the same."""
    request = edit.request
    keys: set[tuple[str, ...]] = {(normalised(text),) for text in (request.filled_prompt, *request.rephrase_prompts)}
    relation = (request.metadata or {}).get("relation")
    if request.subject and relation:
        keys.add((normalised(request.subject), normalised(str(relation))))
    return keys


def _renamed(piece: Piece, name: str) -> Piece:
    columns = None if piece.columns is None else tuple(f"{name}/{owner}" for owner in piece.columns)
    return replace(piece, members=tuple(f"{name}/{member}" for member in piece.members), columns=columns)


def _without(accounts: dict[str, Account], edit_ids: set[str]) -> dict[str, Account]:
    """Accounts without the pieces of some edits; untouched ones are the same objects.

    Raises:
        RollbackError: if what stays was computed together with these edits, or as their correction.
    """
    left = {key: account.without(edit_ids) for key, account in accounts.items()}
    return {key: account for key, account in left.items() if account.pieces}


def _with(accounts: dict[str, Account], more: dict[str, Account]) -> dict[str, Account]:
    """Accounts with further pieces behind what is there."""
    added = {key: accounts[key].adding(new.pieces) if key in accounts else new for key, new in more.items()}
    return {**accounts, **added}

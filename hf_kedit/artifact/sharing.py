"""Sharing edits: the part of `EditableModel` that pushes to the Hub and combines packs of edits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..editing.state import EditedModel
from ..engine.access import alone, exclusively
from ..errors import ConfigError, PackError
from ..storage.repository import push_files
from .layout import OWN_FILES, WHOLE_MODEL
from .packs import OnConflict, Pack, Packs
from .reading import find_artifact
from .writing import artifact_files, without_local_base

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

    from .card import HasModelIndex


class Sharing(EditedModel):
    """Methods of `EditableModel` for the Hub and for packs."""

    packs: Packs

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        tag: str | None = None,
        token: Any = None,
        report: HasModelIndex | None = None,
        per_edit: bool = False,
    ) -> CommitInfo:
        """Push the edits (not the base model) as one commit; the same edits again make no commit.

        Args:
            repo_id: ``org/name``; made if it does not exist.
            private: of a new repository; ``True`` also refuses to push to an existing public one.
            revision: branch; made if it does not exist.
            create_pr: open a pull request instead of writing to the branch.
            commit_message: default: what was edited.
            tag: name of this version, for ``from_pretrained(…, revision=tag)``.
            token: for the Hub; default: your login.
            report: an evaluation of the edits; its means go into the model card.
            per_edit: see `save_pretrained`.

        Returns:
            The client's description of the commit (``oid``, ``pr_url`` …).

        Raises:
            HubError: if you may not write there, the repository holds a whole model, or the tag is taken.
        """
        if create_pr and tag is not None:
            raise ConfigError("a pull request is no version yet: tag the commit after it was merged")
        count = len(self.edits)
        return push_files(
            repo_id,
            without_local_base(artifact_files(self, repo_id=repo_id, report=report, per_edit=per_edit)),
            message=commit_message or f"{count} edit{'' if count == 1 else 's'} with {self.method_name}",
            owned=OWN_FILES,
            refuse={"config.json": WHOLE_MODEL},
            private=private,
            revision=revision,
            create_pr=create_pr,
            tag=tag,
            token=token,
        )

    # ------------------------------------------------------------------ packs

    def load_edits(
        self,
        source: str | Path,
        name: str | None = None,
        *,
        revision: str | None = None,
        activate: bool = True,
        on_conflict: OnConflict = "warn",
        ignore_fingerprint: bool = False,
        token: Any = None,
    ) -> Pack:
        """Load saved edits beside those that the model carries, as a named pack that can be switched on and off.

        The model goes on answering other threads until the files are here.

        Args:
            source: folder or Hub id of saved edits that were made on the same base model.
            name: of the pack; default: the last part of ``source``. Its edits get the ids ``<name>/<id>``.
            revision: of the repository.
            activate: switch it on, behind the packs that are on.
            on_conflict: what to do if it edits what another active pack, or the model's own edits, edit too.
            ignore_fingerprint: put it on a base with other weights than it was made on.
            token: for the Hub; default: your login.

        Returns:
            The pack.

        Raises:
            PackError: if the name is taken, the edits are no weight edits, or there is a conflict that must not be.
            BaseModelMismatchError: if it was made on another base model.
        """
        hub = {} if token is None else {"token": token}
        self.packs.free_name(str(source), name)  # before anything is fetched
        artifact = find_artifact(str(source), revision=revision, **hub)
        if artifact is None:
            raise PackError(f"{str(source)!r} is a model, not a set of saved edits")
        with alone(self.base_model, edited=True):
            return self.packs.load(
                artifact, name, activate=activate, on_conflict=on_conflict, ignore_fingerprint=ignore_fingerprint
            )

    @exclusively
    def set_active(self, names: str | Sequence[str], *, on_conflict: OnConflict = "warn") -> None:
        """Switch packs on and off. The weights become the sum of the model's own edits and the named packs, in order.

        Args:
            names: the packs that are to be on; an empty list switches all off.
            on_conflict: ``"warn"``, ``"raise"`` or ``"ignore"`` if two of them edit the same.

        Raises:
            PackError: for an unknown pack, or a conflict with ``"raise"``; nothing is changed then.
            RollbackError: if an edit that stays was computed as a correction of a pack that would go.
        """
        self.packs.set_active([names] if isinstance(names, str) else list(names), on_conflict=on_conflict)

    @exclusively
    def unload_edits(self, name: str) -> None:
        """Switch a pack off, which restores the bits that the weights had without it, and forget it.

        Raises:
            PackError: if there is no such pack.
        """
        self.packs.unload(name)

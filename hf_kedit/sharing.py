"""Sharing edits through the Hub: the part of `EditableModel` that pushes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import ConfigError
from .repository import push_files

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

    from .card import HasModelIndex
    from .model import EditableModel


class Sharing:
    """Methods of `EditableModel` for the Hub."""

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

        Returns:
            The client's description of the commit (``oid``, ``pr_url`` …).

        Raises:
            HubError: if you may not write there, the repository holds a whole model, or the tag is taken.
        """
        from .saving import OURS, WHOLE_MODEL, artifact_files

        model: EditableModel = self  # type: ignore[assignment]
        if create_pr and tag is not None:
            raise ConfigError("a pull request is no version yet: tag the commit after it was merged")
        count = len(model.edits)
        return push_files(
            repo_id,
            artifact_files(model, repo_id=repo_id, report=report),
            message=commit_message or f"{count} edit{'' if count == 1 else 's'} with {model.method_name}",
            owned=OURS - {".gitattributes"},
            refuse={"config.json": WHOLE_MODEL},
            private=private,
            revision=revision,
            create_pr=create_pr,
            tag=tag,
            token=token,
        )

"""Repositories of the Hugging Face Hub: files read at one commit, files written as one commit, errors that help.

Knows nothing of what the files are. Works through `huggingface_hub` alone, with its cache, its login and its offline
mode (``HF_HUB_OFFLINE=1``).
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import HubError, HubUnreachableError, shown
from ..logging import get_logger

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

logger = get_logger(__name__)
MAIN = "main"


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Whether a path is one of these names, in which ``*`` stands for anything."""
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


@contextlib.contextmanager
def hub_errors(repo: str, revision: str | None = None) -> Iterator[None]:
    """Turn what the client raises into one error that says what to do.

    Args:
        repo: that is worked with, for the message.
        revision: of it.

    Raises:
        HubError: the repository or revision is missing, access is denied, or the Hub refuses for another reason.
        HubUnreachableError: there is no connection (or offline mode), and the cache does not have the file.
    """
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise HubError(
            f"access to {repo!r} is restricted: ask for it on {constants.ENDPOINT}/{repo}, then log in with"
            " `hf auth login` or pass token="
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"the Hub has no repository {repo!r} that you may see; if it is private, log in with `hf auth login` or"
            " pass token="
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{repo!r} has no revision {revision or MAIN!r}") from error
    except errors.HFValidationError as error:
        raise HubError(f"{repo!r} is neither an existing folder nor the id of a repository (org/name)") from error
    except errors.LocalTokenNotFoundError as error:
        raise HubError("you are not logged in to the Hub: use `hf auth login` or pass token=") from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        raise HubUnreachableError(
            f"{repo!r} is not (completely) in the cache, and the Hub at {constants.ENDPOINT} did not answer or was not"
            " asked: check the connection, and HF_HUB_OFFLINE"
        ) from error
    except UnicodeEncodeError as error:  # of the address, or of the header with the token
        raise HubError(f"{shown(repo)} or the token holds a character that neither a name nor a token has") from error
    except errors.HfHubHTTPError as error:
        raise _refused(repo, error) from error
    except errors.HTTPError as error:
        raise HubUnreachableError(f"no answer from the Hub at {constants.ENDPOINT} about {repo!r}: {error}") from error


def _refused(repo: str, error: Any) -> HubError:
    status = getattr(error.response, "status_code", None)
    if status == 401:
        return HubError(f"the Hub does not accept your token for {repo!r}: log in again with `hf auth login`")
    if status == 403:
        return HubError(
            f"you are logged in, but must not change {repo!r}: use a token with write access, or another id"
        )
    if status == 412:
        return HubError(f"{repo!r} was changed by somebody else at the same moment; nothing was written, try again")
    return HubError(f"the Hub refused a request about {repo!r}: {error.server_message or error}")


# ---------------------------------------------------------------------- reading


def download(
    repo: str,
    name: str,
    *,
    revision: str | None = None,
    repo_type: str = "model",
    token: Any = None,
    cache_dir: Any = None,
    local_files_only: bool = False,
) -> Path | None:
    """Return the path of a file in the cache, downloading it first where that is needed; ``None`` if it is missing.

    The path is ``…/snapshots/<commit>/<name>``, so that it tells the commit.

    Raises:
        HubError: see `hub_errors`.
    """
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

    with hub_errors(repo, revision):
        try:
            return Path(
                hf_hub_download(
                    repo,
                    name,
                    revision=revision,
                    repo_type=repo_type,
                    token=token,
                    cache_dir=cache_dir,
                    local_files_only=local_files_only,
                )
            )
        except RemoteEntryNotFoundError:
            return None
        except LocalEntryNotFoundError:  # offline: the cache may remember that there is no such file
            known = try_to_load_from_cache(repo, name, cache_dir=cache_dir, revision=revision, repo_type=repo_type)
            if known is _CACHED_NO_EXIST:
                return None
            raise


def cached_commit(repo: str, name: str, *, revision: str | None = None, cache_dir: Any = None) -> str | None:
    """The commit from which the cache has a file of a model repository; ``None`` if it has not."""
    from huggingface_hub import try_to_load_from_cache

    if os.path.isdir(repo):
        return None
    cached = try_to_load_from_cache(repo, name, cache_dir=cache_dir, revision=revision)
    return Path(cached).parents[name.count("/")].name if isinstance(cached, str) else None


def list_files(repo: str, *, revision: str | None = None, repo_type: str = "model", token: Any = None) -> list[str]:
    """Paths of all files of a repository.

    Raises:
        HubError: see `hub_errors`.
    """
    from huggingface_hub import HfApi

    with hub_errors(repo, revision):
        return HfApi(token=token).list_repo_files(repo, revision=revision, repo_type=repo_type)


# ---------------------------------------------------------------------- writing


def push_files(
    repo: str,
    files: Mapping[str, bytes | Path],
    *,
    message: str,
    owned: Collection[str] = (),
    refuse: Mapping[str, str] | None = None,
    repo_type: str = "model",
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    token: Any = None,
) -> CommitInfo:
    """Write files to a repository as one commit; with the same files as before there is no commit.

    Args:
        repo: ``org/name``; made if it does not exist.
        files: path → content, or a file with it.
        message: of the commit.
        owned: further paths that belong to such files (see `matches`): those that the repository has and ``files``
            has not go.
        refuse: path → why nothing may be written to a repository that has it.
        repo_type: ``"model"`` or ``"dataset"``.
        private: of a new repository; ``True`` also refuses to write to an existing public one.
        revision: branch, made from the main one if it does not exist.
        create_pr: open a pull request instead.
        tag: name for the commit; one that is not taken.
        token: for the Hub.

    Returns:
        What the client says of the commit; ``oid`` is the present one if nothing has changed.

    Raises:
        HubError: see `hub_errors`; and for a public repository, a taken tag, or a file in ``refuse``.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=token)
    with hub_errors(repo, revision):
        api.create_repo(repo, repo_type=repo_type, private=private, exist_ok=True)
        if revision not in (None, MAIN) and not create_pr:
            api.create_branch(repo, branch=str(revision), repo_type=repo_type, exist_ok=True)
        head: Any = api.repo_info(repo, repo_type=repo_type, revision=revision)
        _check_target(repo, head, private, refuse or {})
        if tag is not None:
            _check_tag_free(api, repo, repo_type, tag)
        present = {sibling.rfilename for sibling in head.siblings or ()}
        gone = sorted(path for path in present - set(files) if matches(path, owned))
        commit = api.create_commit(
            repo,
            [
                *(CommitOperationAdd(path, content) for path, content in files.items()),
                *(CommitOperationDelete(path) for path in gone),
            ],
            commit_message=message,
            repo_type=repo_type,
            revision=revision,
            create_pr=create_pr,
            parent_commit=None if create_pr else head.sha,
        )
        if not create_pr and commit.oid == head.sha:
            logger.warning("nothing has changed: %s stays at commit %s", repo, commit.oid)
        if tag is not None:
            api.create_tag(repo, tag=tag, revision=commit.oid, repo_type=repo_type)
    return commit


def _check_target(repo: str, head: Any, private: bool | None, refuse: Mapping[str, str]) -> None:
    if private and not head.private:
        raise HubError(f"{repo!r} exists already and is public; make it private in its settings, or choose another id")
    for sibling in head.siblings or ():
        if sibling.rfilename in refuse:
            raise HubError(f"{repo!r} holds {sibling.rfilename}: {refuse[sibling.rfilename]}")


def _check_tag_free(api: Any, repo: str, repo_type: str, tag: str) -> None:
    refs = api.list_repo_refs(repo, repo_type=repo_type)
    if tag in {ref.name for ref in (*refs.tags, *refs.branches)}:
        raise HubError(f"{repo!r} has a version {tag!r} already; choose another tag")

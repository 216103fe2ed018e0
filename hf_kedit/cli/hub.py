"""``kedit push``, and going back to an earlier version: folders of this library through the Hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ArtifactError
from .models import hush_transformers
from .output import DebugOption, Format, FormatOption, command, counted, emit


@command
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of saved edits, or of a merged model.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO", help="Id on the Hub (org/name); made if it is not there.")],
    private: Annotated[
        bool, typer.Option("--private", help="A private repository; an existing public one is refused.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch; made if it is not there. Default: main.")
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    message: Annotated[str | None, typer.Option("--message", help="Commit message.")] = None,
    tag: Annotated[str | None, typer.Option("--tag", help="Name of this version, for rollback --to.")] = None,
    format: FormatOption = Format.human,
    debug: DebugOption = False,
) -> None:
    """Push a folder to the Hub as one commit; with nothing changed there is no commit. Log in with `hf auth login`."""
    if create_pr and (tag or revision):
        raise typer.BadParameter("a pull request has no --tag and no --revision", param_hint="--create-pr")
    from ..hub import push_folder

    hush_transformers()
    commit = push_folder(
        folder,
        repo_id,
        private=True if private else None,
        revision=revision,
        create_pr=create_pr,
        commit_message=message,
        tag=tag,
    )
    data = {"repository": repo_id, "commit": commit.oid, "url": str(commit.commit_url), "pull_request": commit.pr_url}

    def show(console: Any) -> None:
        console.print(f"{folder} is {repo_id} at {commit.oid[:12]}{f', tag {tag}' if tag else ''}", soft_wrap=True)
        console.print(commit.pr_url or str(commit.commit_url), soft_wrap=True)

    emit(format, data, human=show, quiet=[commit.oid])


def back_to(source: str, version: str, output: Path | None, format: Format) -> None:
    """Make an earlier version of a repository the present one, or write it to a folder (``kedit rollback --to``)."""
    if os.path.isdir(source):
        raise ArtifactError(f"{source!r} is a folder; versions are tags and commits of a repository on the Hub")
    from ..hub import pull_folder, restore_version

    hush_transformers()
    if output is not None:
        edit_ids = pull_folder(source, output, revision=version)
        data = {"version": version, "remaining": edit_ids, "artifact": str(output), "commit": None}
        said = f"{counted(len(edit_ids), 'edit')} of {source} at {version} written to {output}"
    else:
        commit = restore_version(source, version)
        data = {"version": version, "artifact": source, "commit": commit.oid}
        said = f"{source} is as at {version} again, by the commit {commit.oid[:12]}"
    emit(format, data, human=lambda console: console.print(said, soft_wrap=True), quiet=[str(data["artifact"])])

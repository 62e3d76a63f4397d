# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The command `teleflm publish`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from conversion.checkpoint.sizes import format_bytes
from teleflm.terminal import (
    DEFAULT_WORKERS,
    Debug,
    DryRun,
    Json,
    Workers,
    byte_progress,
    exit_codes,
    print_json,
)

if TYPE_CHECKING:
    from conversion.hub.publishing import Publication

Folder = Annotated[Path, typer.Argument(metavar="PATH", help="Hub folder, or an adapter of sft export.")]
RepoId = Annotated[str, typer.Argument(metavar="REPO_ID", help="OWNER/NAME on the Hub; made if there is none.")]
Private = Annotated[bool, typer.Option("--private", help="If the repository is made: only for its owner.")]
Revision = Annotated[str | None, typer.Option(help="Branch; the main one unless given.")]
Message = Annotated[str | None, typer.Option("--message", "-m", help="Of the commit.")]
NoCheck = Annotated[bool, typer.Option("--no-check", help="Do not read the weights again before the upload.")]


def publish(
    path: Folder,
    repo_id: RepoId,
    private: Private = False,
    revision: Revision = None,
    message: Message = None,
    no_check: NoCheck = False,
    workers: Workers = DEFAULT_WORKERS,
    dry_run: DryRun = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Upload a finished folder to the Hub: checked first, the weights before the rest, resumable."""
    from conversion.hub.publishing import publish as upload

    with exit_codes(debug=debug):
        with byte_progress("checking") as progress:
            publication = upload(
                path,
                repo_id,
                private=private,
                revision=revision,
                message=message,
                check=not no_check,
                dry_run=dry_run,
                workers=workers,
                progress=progress,
            )
        if as_json:
            print_json(asdict(publication))
        else:
            _print(publication)


def _print(publication: "Publication") -> None:
    for name, nbytes in {**publication.weights, **publication.small_files}.items():
        print(f"{name}  {format_bytes(nbytes)}")
    if publication.left_out:
        print(f"left out: {', '.join(publication.left_out)}")
    files = {**publication.weights, **publication.small_files}
    what = f"{len(files)} files, {format_bytes(sum(files.values()))}"
    print(publication.url or f"{what} would be uploaded to {publication.repo_id}")


__all__ = ["publish"]

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
    byte_progresses,
    exit_codes,
    print_json,
)

if TYPE_CHECKING:
    from conversion.hub.publishing import Publication

Folder = Annotated[Path, typer.Argument(metavar="PATH", help="Hub folder, or an adapter of sft export.")]
RepoId = Annotated[str, typer.Argument(metavar="REPO_ID", help="OWNER/NAME on the Hub; made if there is none.")]
Private = Annotated[bool, typer.Option("--private", help="Only for its owner; refused where it is public already.")]
Revision = Annotated[str | None, typer.Option(help="Branch; the main one unless given.")]
PullRequest = Annotated[bool, typer.Option("--pr", help="Open a pull request instead of committing.")]
Tag = Annotated[str | None, typer.Option(help="To give to the commit.")]
Message = Annotated[str | None, typer.Option("--message", "-m", help="Of the commit.")]
License = Annotated[str | None, typer.Option(help="The Hub's identifier; that of the card or LICENSE unless given.")]
Language = Annotated[list[str] | None, typer.Option(help="Code of a language, such as zh; may be repeated.")]
BaseModel = Annotated[list[str] | None, typer.Option(help="OWNER/NAME of what it was made from; may be repeated.")]
Relation = Annotated[str | None, typer.Option(help="To --base-model: finetune, adapter, merge or quantized.")]
Dataset = Annotated[list[str] | None, typer.Option(help="OWNER/NAME of data it was trained on; may be repeated.")]
Results = Annotated[Path | None, typer.Option(help="JSON of teleflm eval or lm-evaluation-harness, for the card.")]
Card = Annotated[str | None, typer.Option(help="Whose words count where both cards have some: here or there.")]
NoLoad = Annotated[bool, typer.Option("--no-load", help="Do not load the folder in a clean process first.")]
NoCheck = Annotated[bool, typer.Option("--no-check", help="Do not read the weights again before the upload.")]


def publish(
    path: Folder,
    repo_id: RepoId,
    private: Private = False,
    revision: Revision = None,
    pull_request: PullRequest = False,
    tag: Tag = None,
    message: Message = None,
    license: License = None,
    language: Language = None,
    base_model: BaseModel = None,
    relation: Relation = None,
    dataset: Dataset = None,
    results: Results = None,
    card: Card = None,
    no_check: NoCheck = False,
    no_load: NoLoad = False,
    workers: Workers = DEFAULT_WORKERS,
    dry_run: DryRun = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Publish a finished folder: checked and loaded first, visible in one commit, resumable."""
    from conversion.hub.published_card import CardOptions
    from conversion.hub.publishing import publish as upload
    from conversion.hub.results import read_results

    with exit_codes(debug=debug):
        said = CardOptions(
            license=license,
            languages=language or (),
            base_models=base_model or (),
            relation=relation,
            datasets=dataset or (),
            results=read_results(results) if results else (),
            words=card,  # type: ignore[arg-type]  # checked there, with a line of its own
        )
        with byte_progresses("checking", "hashing") as (progress, hash_progress):
            publication = upload(
                path,
                repo_id,
                private=private,
                revision=revision,
                pull_request=pull_request,
                tag=tag,
                message=message,
                card=said,
                check=not no_check,
                load=not no_load,
                dry_run=dry_run,
                workers=workers,
                progress=progress,
                hash_progress=hash_progress,
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
    if publication.removed:
        print(f"removed there: {', '.join(publication.removed)}")
    for note in publication.notes:
        print(note)
    files = {**publication.weights, **publication.small_files}
    what = f"{len(files)} files, {format_bytes(sum(files.values()))}"
    print(publication.url or f"{what} would be uploaded to {publication.repo_id}")


__all__ = ["publish"]

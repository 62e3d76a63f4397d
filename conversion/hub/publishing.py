# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""A finished folder to a repository of the Hub: looked over first, and visible all at once.

what would be published  ->  may we, there?  ->  is it sound?  ->  does it load?  ->  send weights  ->  one commit
(release.py)                 (client.py)        (release.py)      (loading.py)       (uploading.py)
"""

import hashlib
import re
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..checkpoint.errors import CheckpointError
from ..checkpoint.folder_formats import is_setting, is_state, is_weights
from ..checkpoint.job import json_bytes
from ..checkpoint.limits import default_workers
from ..checkpoint.manifest import MANIFEST, OLD_MANIFEST, amend, is_edited, read_own_manifest
from ..checkpoint.sources import open_checkpoint
from ..checkpoint.strict_json import parse_json_object
from ..model_identity import ModelIdentity, model_identity
from .card import CARD, CardFacts, card_facts
from .client import Repository, check_repo_id, look_at, one_line
from .loading import try_loading
from .published_card import CardOptions, card_text, published_card, validate_card
from .release import Release, check_release, find_release, refuse_secrets
from .results import claimed_results
from .saved_model import ADAPTER_WEIGHTS
from .uploading import Destination, Hashes, Sent, commit, holds, send

_MESSAGE = "Upload with teleflm"
_MAX_REMOTE = 64 * 2**20  # bytes of a card or a record that are read from the Hub


@dataclass(frozen=True)
class Publication:
    """What was published, or would be.

    Args:
        repo_id: `OWNER/NAME`.
        weights: name -> bytes of the weight files.
        small_files: name -> bytes of the others.
        left_out: files and folders that stay here, because no reader of a model needs them.
        removed: files of the repository that go, as they would be loaded with the new ones, or in their place.
        notes: what a user should know, one sentence each.
        url: of the commit, or of the pull request; None after a dry run.
    """

    repo_id: str
    weights: dict[str, int]
    small_files: dict[str, int]
    left_out: list[str]
    removed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    url: str | None = None


def publish(
    path: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    pull_request: bool = False,
    tag: str | None = None,
    message: str | None = None,
    card: CardOptions = CardOptions(),  # noqa: B008  (frozen)
    check: bool = True,
    load: bool = True,
    dry_run: bool = False,
    workers: int = default_workers(),
    progress: Callable[[int, int], None] = lambda nbytes, total: None,
    hash_progress: Callable[[int, int], None] = lambda nbytes, total: None,
) -> Publication:
    """Publish a Hub folder, or an adapter of `sft export`, as a model of the Hub.

    Only what a reader of the model needs is uploaded: weights in safetensors, configuration, tokenizer, code, licence,
    card, record. One commit makes all of it visible, and removes what another version left there; a reader sees the
    old version or the new one.

    Args:
        path: the folder.
        repo_id: `OWNER/NAME`; made if there is none.
        private: of a repository that is made; refused where there is a public one.
        revision: branch; made from the main one if there is none.
        pull_request: open a pull request instead of committing.
        tag: to give to the commit.
        message: of the commit.
        card: what is said of the model beside its facts. Results of `teleflm eval` are claimed of the weights alone
            that they were measured of; those in the folder (`results.RESULTS`) are added.
        check: read every tensor and compare it with the digests of the record first, if there are any.
        load: load the folder in a process of its own first, as a stranger would.
        dry_run: do everything but write, here and there.
        workers: threads of the check.
        progress: called with the bytes the check just read and those in all.
        hash_progress: likewise with those that were hashed for the upload.

    Raises:
        CheckpointError: the folder is not finished, is damaged, does not load, names a path of this machine or holds a
            secret; or the repository cannot be what was asked for.
        OSError: the Hub cannot be reached or refuses; the repository is what it was, and the same call goes on.
    """
    from huggingface_hub import HfApi

    folder = Path(path)
    check_repo_id(repo_id)
    if pull_request and tag:
        raise CheckpointError(f"{repo_id}: a pull request has no commit of its own to tag; tag it once it is merged.")
    release = find_release(folder)
    to = Destination(HfApi(library_name="teleflm"), repo_id, revision, pull_request)
    there, notes, reached = ask(to, private, tag, dry_run)
    removed = files_to_remove(to, there, release.files.keys()) if there else []
    facts = replace(card_facts(folder), repo_id=repo_id)
    results, said = claimed_results(card.results, folder, partial(_identity, release, check, workers, progress))
    notes += said
    card = replace(card, results=results)
    text = compose_card(to, there, facts, release.contents[CARD], card, str(folder))
    refuse_secrets(text, f"{folder}/{CARD}")
    if reached:
        validate_card(text.decode(), repo_id)
    check_release(release, check, workers, progress)
    notes += try_loading(release) if load else []
    small = {**release.small_files, CARD: len(text)}
    if MANIFEST in small:
        small[MANIFEST] = len(published_record(release, text))
    publication = Publication(repo_id, release.weights, small, release.left_out, removed, notes)
    if dry_run:
        return publication
    there, removed = make(to, there, private, release.files)
    hashes = Hashes(folder)
    sent = send(to, {name: folder / name for name in release.weights}, hashes, hash_progress)
    release.require_unchanged()
    contents = {**release.contents, CARD: text}
    if MANIFEST in contents:
        contents[MANIFEST] = published_record(release, text)
    if tag:
        require_free(to, tag, there, sent, contents, removed)
    url = commit(to, there.commit, sent, contents, removed, message or _MESSAGE)
    if tag:
        tag_commit(to, tag, url)
    return replace(publication, removed=removed, url=url)


def _identity(release: Release, check: bool, workers: int, progress: Callable[[int, int], None]) -> ModelIdentity:
    """What the model in a folder is: by the digests of its record, where the weights are held against these anyway."""
    folder = release.folder
    source = open_checkpoint(folder / ADAPTER_WEIGHTS if release.is_adapter else folder)
    record = read_own_manifest(folder) if check and MANIFEST in release.contents else None
    return model_identity(source, record=record, workers=workers, progress=progress)


def make(
    to: Destination, there: Repository | None, private: bool, files: Collection[str]
) -> tuple[Repository, list[str]]:
    """The repository as it was first looked at, or made now, and what is to be removed from it."""
    made = make_repository(to, private)
    if there is None and made.files.keys() - {".gitattributes"}:
        raise CheckpointError(f"{to.repo_id}: was made by somebody else meanwhile; run the same command again.")
    first = there or made  # what is committed replaces this, and is refused if it is not what is there any more
    return first, files_to_remove(to, first, files)


def published_record(release: Release, card: bytes) -> bytes:
    """A folder's record as it is published: of the card that is, and without Adam's moments, which stay here.

    One that was edited is published as it is, so that it still shows.
    """
    before = release.contents[MANIFEST]
    record = read_own_manifest(release.folder) or {}
    files = record.get("files")
    if not isinstance(files, Mapping) or is_edited(record):
        return before
    listed = {name: entry for name, entry in files.items() if not is_state(name)}
    listed[CARD] = {"bytes": len(card), "sha256": hashlib.sha256(card).hexdigest()}
    return json_bytes(amend(record, before, files=dict(sorted(listed.items()))))


# Before anything is read in full: may we?


def ask(to: Destination, private: bool, tag: str | None, dry_run: bool) -> tuple[Repository | None, list[str], bool]:
    """What is there, notes, and whether the Hub was reached; refuses what could only fail later.

    Raises:
        CheckpointError, OSError: no token, one that may not write, or a repository that is not what was asked for.
    """
    from huggingface_hub.errors import LocalTokenNotFoundError

    try:
        with one_line(to.repo_id):
            try:
                _require_write(to, to.hub.whoami())
            except LocalTokenNotFoundError:
                raise CheckpointError(f"{to.repo_id}: no token; run `hf auth login` or set HF_TOKEN.") from None
            there = look_at(to.hub, to.repo_id)
            if there is not None:
                there = _at_branch(to, there)
    except (CheckpointError, OSError) as error:
        if not dry_run:
            raise
        said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        what = "The Hub was not asked" if isinstance(error, OSError) else "It would be refused"
        return None, [f"{what}: {said.rstrip('.')}."], False
    if there is None:
        return None, [f"{to.repo_id} {'is not there yet, and would be' if dry_run else 'was'} made."], True
    if private and not there.private:
        raise CheckpointError(
            f"{to.repo_id}: is public, and --private does not change that; make it private in its settings first, or "
            "leave --private out."
        )
    if not (tag or to.revision):
        return there, [], True
    names = _tags(to)
    if to.revision in names or re.fullmatch(r"[0-9a-f]{40}", to.revision or ""):
        raise CheckpointError(f"{to.repo_id}: {to.revision} is a tag or a commit, and --revision has to be a branch.")
    if tag in names and names[tag] != there.commit:  # of this very commit, an earlier try has made it
        raise CheckpointError(f"{to.repo_id}: has a tag {tag} already, of {names[tag][:12]}; choose another one.")
    return there, [], True


def _require_write(to: Destination, who: Mapping[str, Any]) -> None:
    """Refuse a token that may only read, and a namespace that is not ours."""
    token = (who.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise CheckpointError(f"{to.repo_id}: this token may only read; make one that may write, and set HF_TOKEN.")
    owner = to.repo_id.split("/")[0]
    known = [str(who.get("name")), *(str(group.get("name")) for group in who.get("orgs") or [])]
    if not to.pull_request and owner not in known:
        raise CheckpointError(
            f"{to.repo_id}: {owner} is neither {known[0]}, whose token this is, nor an organisation of theirs "
            f"({', '.join(known[1:]) or 'none'}); choose another name."
        )


def _at_branch(to: Destination, main: Repository) -> Repository:
    """The repository at the branch that is written to; at its main one if that branch is not there yet."""
    if to.revision is None:
        return main
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        to.hub.model_info(to.repo_id, revision=to.revision)
    except RevisionNotFoundError:
        return main
    return look_at(to.hub, to.repo_id, to.revision) or main


def _tags(to: Destination) -> dict[str, str]:
    with one_line(to.repo_id):
        return {ref.name: ref.target_commit for ref in to.hub.list_repo_refs(to.repo_id).tags}


def make_repository(to: Destination, private: bool) -> Repository:
    """The repository and its branch, made if they are not there.

    Raises:
        CheckpointError: it was made by somebody else meanwhile, and is public.
    """
    with one_line(to.repo_id):
        to.hub.create_repo(to.repo_id, private=private or None, exist_ok=True)
        if to.revision and not to.pull_request:
            to.hub.create_branch(to.repo_id, branch=to.revision, exist_ok=True)
    there = look_at(to.hub, to.repo_id, to.revision)
    if there is None:
        raise CheckpointError(f"{to.repo_id}: cannot be seen by this token; check what it may read.")
    if private and not there.private:
        raise CheckpointError(f"{to.repo_id}: is public although --private was asked for; nothing was sent.")
    return there


def require_free(
    to: Destination,
    tag: str,
    there: Repository,
    sent: Mapping[str, Sent],
    contents: Mapping[str, bytes],
    removed: Collection[str],
) -> None:
    """Refuse a tag that another commit than the one to be made has, before that is made."""
    known = _tags(to).get(tag)
    if known and not (known == there.commit and holds(there, sent, contents) and not removed):
        raise CheckpointError(f"{to.repo_id}: has a tag {tag} already, of {known[:12]}; choose another one.")


def tag_commit(to: Destination, tag: str, url: str) -> None:
    """Give a tag to a commit that was made, or find that it has it.

    Raises:
        CheckpointError: another commit has it.
    """
    made = url.rsplit("/", 1)[-1]
    known = _tags(to).get(tag)
    if known not in (None, made):
        raise CheckpointError(f"{to.repo_id}: has a tag {tag} already, of {known[:12]}; {made[:12]} has none.")
    if known is None:
        with one_line(to.repo_id):
            to.hub.create_tag(to.repo_id, tag=tag, revision=made)


def compose_card(
    to: Destination, there: Repository | None, facts: CardFacts, here: bytes, options: CardOptions, where: str
) -> bytes:
    """The card to publish, which the Hub takes; see `published_card`."""
    found = read_remote(to, there, CARD) if there else None
    owners = card_text(found, f"{to.repo_id}/{CARD} on the Hub") if found is not None else None
    return published_card(facts, card_text(here, f"{where}/{CARD}"), owners, options, where).encode()


# What another version left there.


def files_to_remove(to: Destination, there: Repository, files: Collection[str]) -> list[str]:
    """Files of a repository that would be loaded with some new ones or in their place, or that its record lists."""
    recorded = _recorded(to, there)
    return sorted(
        name for name in there.files if name not in files and (is_weights(name) or is_setting(name) or name in recorded)
    )


def _recorded(to: Destination, there: Repository) -> set[str]:
    """What the record in a repository lists; it may be anyone's."""
    for name in (MANIFEST, OLD_MANIFEST):
        if (content := read_remote(to, there, name)) is None:
            continue
        try:
            record = parse_json_object(content, name)
        except CheckpointError:
            continue
        files = record.get("files")
        if name == MANIFEST or {"plan", "lineage", "tensors"} <= record.keys():
            return {name, *(files if isinstance(files, Mapping) else ())} - {CARD}
    return set()


def read_remote(to: Destination, there: Repository, name: str) -> bytes | None:
    """A small file of a repository, at the commit that was looked at; None if there is none, or a large one."""
    if name not in there.files or there.files[name].size > _MAX_REMOTE:
        return None
    with tempfile.TemporaryDirectory() as folder, one_line(to.repo_id):
        path = to.hub.hf_hub_download(to.repo_id, name, revision=there.commit, local_dir=folder)
        return Path(path).read_bytes()


__all__ = ["Publication", "publish"]

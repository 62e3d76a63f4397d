# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The Hub as a command meets it: who we are to it, what a repository holds, and its refusals as one line each.

huggingface_hub speaks to it, and tries again what may pass; what it raises in the end is of many kinds, and some of
them quote the request. Nothing that is said here has a token in it.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..checkpoint.errors import CheckpointError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

TOKENS = re.compile(r"\b(hf_\w{6,}|api_org_\w{6,})|(?<=Bearer )[^\s'\"]+")
_MOST = 300  # characters of what the Hub says that are worth a line


class HubFailed(OSError):
    """The Hub cannot be reached, fails or refuses. Its message is one line that names the repository's way out."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository.

    Args:
        size: in bytes.
        sha256: of its content, where the Hub knows it: of what it keeps as LFS or Xet.
        oid: git's hash of its blob.
    """

    size: int
    sha256: str | None
    oid: str


@dataclass(frozen=True)
class Repository:
    """A repository at one commit.

    Args:
        repo_id: `OWNER/NAME`.
        commit: its hash.
        private: whether only its owner's people see it.
        files: its files, by path.
    """

    repo_id: str
    commit: str
    private: bool
    files: dict[str, RemoteFile]


def check_repo_id(repo_id: str) -> str:
    """A repository's name, if it is one.

    Raises:
        CheckpointError: it cannot be.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise CheckpointError(f"{repo_id}: {' '.join(str(error).split())}") from error
    if repo_id.count("/") != 1:
        raise CheckpointError(f"{repo_id}: names no owner; write OWNER/NAME.")
    return repo_id


def look_at(hub: "HfApi", repo_id: str, revision: str | None = None) -> Repository | None:
    """What a repository of a model holds; None if there is none that this user may see.

    Args:
        hub: the client.
        repo_id: `OWNER/NAME`.
        revision: branch, tag or commit; the main branch unless given.

    Raises:
        CheckpointError: there is no such revision, the repository is gated, or it is no model's.
        HubFailed: the Hub cannot be reached, or refuses.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    with one_line(repo_id, revision):
        try:
            info = hub.model_info(repo_id, revision=revision, files_metadata=True)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            if kind := _other_kind(hub, repo_id):
                raise CheckpointError(f"{repo_id}: is a {kind} on the Hub, expected a model; check the name.") from None
            return None
        files = {
            file.rfilename: RemoteFile(file.size or 0, file.lfs.sha256 if file.lfs else None, file.blob_id or "")
            for file in info.siblings or []
        }
        return Repository(repo_id, str(info.sha), bool(info.private), files)


def _other_kind(hub: "HfApi", repo_id: str) -> str | None:
    """What else than a model has a name."""
    return "dataset" if hub.repo_exists(repo_id, repo_type="dataset") else None


@contextmanager
def one_line(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turn what the client raises into one line that says the way out.

    Args:
        repo_id: what was asked for.
        revision: likewise.

    Raises:
        CheckpointError: what was asked for is not there, or not for this user.
        HubFailed: the Hub cannot be reached, or fails; the same call goes on.
    """
    try:
        yield
    except (CheckpointError, HubFailed):
        raise
    except Exception as error:
        if not is_of_the_network(error):
            raise
        raise _said_plainly(error, repo_id, revision) from None  # the cause may quote the request


def is_of_the_network(error: BaseException) -> bool:
    """Whether an error is of the Hub or of the way there.

    The HTTP library beneath huggingface_hub has changed twice, and its errors are not all errors of the system; those
    of an upload come wrapped.
    """
    if isinstance(error, OSError | json.JSONDecodeError) or any(
        kind.__module__.startswith("httpx") for kind in type(error).__mro__
    ):
        return True
    if type(error).__module__.split(".")[0] in ("huggingface_hub", "hf_xet"):
        return True
    if isinstance(error, ValueError) and str(error).startswith("LFS batch API returned errors"):  # a full quota, too
        return True
    wrapped = isinstance(error, RuntimeError) and error.__cause__ is not None
    return wrapped and is_of_the_network(error.__cause__ or error)


def _said_plainly(error: BaseException, repo_id: str, revision: str | None) -> Exception:
    from huggingface_hub import errors

    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    said = without_tokens(" ".join((getattr(error, "server_message", None) or str(error)).split()))[:_MOST].rstrip(".")
    status = _status(error)
    if isinstance(error, errors.GatedRepoError):
        return CheckpointError(f"{repo_id}: is gated; ask for access on its page, and give a token that has it.")
    if isinstance(error, errors.RepositoryNotFoundError):
        return CheckpointError(
            f"{repo_id}: there is no such model, or it is private; check the name, and that HF_TOKEN may see it."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return CheckpointError(f"{repo_id}: has no revision {revision or 'of that name'}; list them on its page.")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return HubFailed(None, "HF_HUB_OFFLINE is set, so the Hub was not asked; unset it", repo_id)
    if status == 401:
        return HubFailed(None, f"the Hub does not know this token ({said}); `hf auth login`, or set HF_TOKEN", repo_id)
    if status == 403:
        return HubFailed(None, f"the Hub refuses: {said}; the same command goes on once that is settled", repo_id)
    return HubFailed(None, f"{said or type(error).__name__}; the same command goes on from here", repo_id)


def _status(error: Any) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def without_tokens(text: str) -> str:
    """A text with every token of the Hub in it struck out."""
    return TOKENS.sub("***", text)


def has_status(error: BaseException, *statuses: int) -> bool:
    """Whether the Hub answered with one of some statuses."""
    return _status(error) in statuses

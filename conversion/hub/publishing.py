# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""A finished folder to a repository of the Hub: looked over first, weights before what makes them loadable.

huggingface_hub uploads, skips what the repository has already, and goes on after an interruption.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.errors import CheckpointError
from ..checkpoint.limits import default_workers
from ..checkpoint.manifest import MANIFEST, OLD_MANIFEST, find_manifest
from ..checkpoint.preflight import FOLDER, PARTIAL
from ..checkpoint.strict_json import read_json_object
from ..inspect import inspect_checkpoint
from .contents import CODE_FILES

_CARD = "README.md"
_CONFIGS = ("config.json", "adapter_config.json")
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_SMALL_FILES = (
    *_CONFIGS,
    _CARD,
    MANIFEST,
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "model.safetensors.index.json",
    "LICENSE",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    *CODE_FILES,
)
_PATH_KEYS = ("_name_or_path", "base_model_name_or_path")


@dataclass(frozen=True)
class Publication:
    """What was published, or would be.

    Args:
        repo_id: `OWNER/NAME`.
        weights: name -> bytes of the weight files.
        small_files: name -> bytes of the others.
        left_out: files and folders that stay here, because no reader of a model needs them.
        url: of the last commit; None after a dry run.
    """

    repo_id: str
    weights: dict[str, int]
    small_files: dict[str, int]
    left_out: list[str]
    url: str | None


def publish(
    path: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    check: bool = True,
    dry_run: bool = False,
    workers: int = default_workers(),
    progress: Callable[[int, int], None] = lambda nbytes, total: None,
) -> Publication:
    """Upload a Hub folder, or an adapter of `sft export`, as a model of the Hub.

    Only what a reader of the model needs is uploaded: weights in safetensors, configuration, tokenizer, code of this
    package, card, record. The weights go first, so that a
    new repository can be loaded only when all of it is there.

    Args:
        path: the folder.
        repo_id: `OWNER/NAME`; made if there is none.
        private: of a repository that is made.
        revision: branch to upload to; the main one unless given.
        message: of the commits.
        check: read every tensor and compare it with the digests of the record first, if there are any.
        dry_run: look the folder over and touch nothing, neither here nor there.
        workers: threads of the check.
        progress: called with the bytes the check just read and those in all.

    Raises:
        CheckpointError: the folder is not finished, is damaged, would not load, or names a folder of this machine; or
            `repo_id` cannot be one.
        OSError: the Hub cannot be reached or refuses; the same call goes on.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    folder = Path(path)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise CheckpointError(f"{repo_id}: {' '.join(str(error).split())}") from error
    if repo_id.count("/") != 1:
        raise CheckpointError(f"{repo_id}: names no owner; write OWNER/NAME.")
    weights, small_files = _files(folder)
    _require_sound(folder, weights, check, workers, progress)
    _refuse_local_paths(folder, small_files)
    chosen = {*weights, *small_files}
    left_out = sorted(entry.name for entry in folder.iterdir() if entry.name not in chosen and entry.name != ".cache")
    url = None if dry_run else _upload(folder, repo_id, private, revision, message, [[*weights], [*small_files]])
    return Publication(repo_id, weights, small_files, left_out, url)


def _files(folder: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of the weight files and of the small ones.

    Raises:
        CheckpointError: there is no finished checkpoint in safetensors.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder.")
    unfinished = sorted(path.name for pattern in (FOLDER, f"*{PARTIAL}") for path in folder.glob(pattern))
    if unfinished:
        raise CheckpointError(f"{folder}: holds {unfinished[0]} of an unfinished run; run its command again first.")
    small = {name: (folder / name).stat().st_size for name in _SMALL_FILES if (folder / name).is_file()}
    record = find_manifest(folder)
    if record and record.name == OLD_MANIFEST:
        small[OLD_MANIFEST] = record.stat().st_size
    if "adapter_config.json" in small:
        weights = [_ADAPTER_WEIGHTS] if (folder / _ADAPTER_WEIGHTS).is_file() else []
    else:
        weights = sorted(path.name for path in folder.glob("model*.safetensors"))
    if not weights:
        raise CheckpointError(f"{folder}: holds no safetensors; teleflm convert makes a folder that can be published.")
    for name in (_CARD, *(() if any(config in small for config in _CONFIGS) else _CONFIGS[:1])):
        if name not in small:
            raise CheckpointError(f"{folder}/{name}: no such file; teleflm convert, grow and sft export write one.")
    return {name: (folder / name).stat().st_size for name in weights}, small


def _require_sound(
    folder: Path, weights: Mapping[str, int], check: bool, workers: int, progress: Callable[[int, int], None]
) -> None:
    """What `teleflm inspect` finds wrong with it is refused."""
    adapter = _ADAPTER_WEIGHTS in weights
    digests = check and find_manifest(folder) is not None
    inspection = inspect_checkpoint(
        folder / _ADAPTER_WEIGHTS if adapter else folder, check=digests, workers=workers, progress=progress
    )
    if inspection.problems and not adapter:  # an adapter alone has no architecture to hold it against
        raise CheckpointError(inspection.problems[0])
    # A card may be edited, and a configuration corrected, before they are published: only weights have to be intact.
    damages = [damage for damage in inspection.damages or [] if damage.tensor or damage.file in weights]
    if damages:
        first, more = damages[0], f", and {len(damages) - 1} more" if len(damages) > 1 else ""
        what = f"{first.tensor} {first.reason}" if first.tensor else first.reason
        raise CheckpointError(f"{folder}/{first.file}: {what}{more}; make the folder anew.")
    unknown = sorted(weights.keys() - inspection.files.keys())
    if unknown and not adapter:
        raise CheckpointError(f"{folder}/{unknown[0]}: is not in the index; remove it, or make the folder anew.")


def _refuse_local_paths(folder: Path, names: Mapping[str, int]) -> None:
    """A folder of this machine is nobody's business, and an adapter that names one as its base loads nowhere else."""
    for name in _CONFIGS:
        config = read_json_object(folder / name) if name in names else {}
        for key in _PATH_KEYS:
            value = config.get(key)
            if isinstance(value, str) and value and (value[0] in "/~." or Path(value).exists()):
                raise CheckpointError(
                    f"{folder}/{name}: {key} is {value}, a folder of this machine; give the name on the Hub instead "
                    "(for an adapter: teleflm sft export --base OWNER/NAME)."
                )


def _upload(
    folder: Path, repo_id: str, private: bool, revision: str | None, message: str | None, groups: list[list[str]]
) -> str:
    """Upload groups of files in order. Returns the address of the last commit."""
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        hub.create_repo(repo_id, private=private, exist_ok=True)
        if revision:
            hub.create_branch(repo_id, branch=revision, exist_ok=True)
        commits = [
            hub.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                allow_patterns=files,
                revision=revision,
                commit_message=message or "Upload with teleflm",
            )
            for files in groups
        ]
    except Exception as error:
        if not _is_of_the_network(error):
            raise
        said = " ".join(str(error).split())
        raise OSError(None, f"{said[:300]}; the same command goes on from here", repo_id) from error
    return str(commits[-1].commit_url)


def _is_of_the_network(error: Exception) -> bool:
    """The HTTP library beneath huggingface_hub has changed twice, and its errors are not all errors of the system."""
    return isinstance(error, OSError) or any(kind.__module__.startswith("httpx") for kind in type(error).__mro__)


__all__ = ["Publication", "publish"]

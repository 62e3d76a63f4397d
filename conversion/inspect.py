# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What is in this folder? A checkpoint's architecture, files, record and faults, from headers alone."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .architecture import Architecture, load_config
from .checkpoint.budget import reading_threads
from .checkpoint.check import Damage, check_folder
from .checkpoint.errors import CheckpointError, printable
from .checkpoint.gguf_file import gguf_files, open_gguf, vocabulary
from .checkpoint.limits import DEFAULT_MEMORY, default_workers
from .checkpoint.manifest import MANIFEST, find_manifest, is_edited, read_manifest
from .checkpoint.mirror import shown
from .checkpoint.numbers import parse_size
from .checkpoint.parent import record_mismatch
from .checkpoint.plan import View
from .checkpoint.sources import WEIGHT_FILES, Source, open_checkpoint
from .compressed_tensors import is_float8, read_float8
from .experts import Experts, check_expert_tensors, has_experts, read_experts
from .exports.export import exported_weights
from .exports.gguf import gguf_mismatch
from .family import TELEFLM, find_family, is_llama
from .hub.contents import count_pieces, count_token_ids
from .hub.lineage import Link, lineage_chain, lineage_steps
from .hub.remote import local_view
from .input_mult import input_mult_warning
from .llama import check_complete, why_only_copied
from .mapping import check_tensors
from .native.checkpoint import NativeCheckpoint
from .native.find import RELEASE, exported_folder, find_native, open_native
from .native.hub_plan import compare_replicas, missing_multipliers, plan_tensors, run_architecture, run_model_type
from .quantisation import quantisation

_SHARD = re.compile(r"-\d+-of-\d+\.")


@dataclass(frozen=True)
class Inspection:
    """What a folder holds.

    Args:
        folder: its path.
        format: the container of its weights, `safetensors`, `torch` or `gguf`; of a training run, what wrote it.
        parallel: of a training run: how it is cut, in words.
        iteration: of a training run: the step it was saved at.
        model_type: of its config.json, None without one.
        architecture: its numbers, for a Tele-FLM or a Llama with a usable config.json; of a GraniteMoE, those of the
            dense model each of whose feed-forward layers is one expert.
        experts: what a GraniteMoE has in place of feed-forward layers; None for any other model.
        parameters: elements of all tensors; without the scales of 8-bit floats.
        dtypes: dtype -> number of tensors.
        nbytes: bytes of all tensors.
        files: weight files and their sizes in bytes.
        pieces: pieces of its tokenizer, None without one; of a Llama the token ids, those that were added among them.
        padding_rows: vocabulary rows without a piece, None if unknown.
        lineage: what it was made from, a sentence a step, oldest first.
        chain: the same as links from record to record, with what is wrong with each.
        quantised: how it is quantised, and what says so; None if it is not.
        problems: what is wrong with it, a sentence each.
        damages: tensors and files that differ from the record; None if that was not checked.
        checked_files: how many files, beside their tensors, were held against the record.
        alone: whether it is one weight file of a folder, and nothing is said of the others.
        checked_tensors: whether the record has digests of the tensors, which were held against it.
        warnings: what whoever serves it should know, a sentence each.
        refused: of a Llama, why it is copied as it is and neither grown nor exported; None if it is both.
    """

    folder: str
    format: str
    parallel: str | None
    iteration: int | None
    model_type: str | None
    architecture: Architecture | None
    parameters: int
    dtypes: dict[str, int]
    nbytes: int
    files: dict[str, int]
    pieces: int | None
    padding_rows: int | None
    lineage: list[str]
    problems: list[str]
    damages: list[Damage] | None
    checked_files: int = 0
    checked_tensors: bool = False
    alone: bool = False
    chain: tuple[Link, ...] = ()
    warnings: tuple[str, ...] = ()
    refused: str | None = None
    quantised: str | None = None
    experts: Experts | None = None


def inspect_checkpoint(
    path: str | Path,
    *,
    check: bool = False,
    with_state: bool = True,
    workers: int | None = None,
    memory: str | int = DEFAULT_MEMORY,
    progress: Callable[[int, int], None] = lambda nbytes, total: None,
) -> Inspection:
    """Describe a checkpoint without loading it or executing anything it contains.

    Args:
        path: its folder, or one weight file.
        check: read every tensor and every other file that the record lists, and compare them with its digests; of a
            training run, compare the copies that it kept of one tensor.
        with_state: whether `check` also reads what training loads beside the weights, as an optimizer's moments.
        workers: threads for `check`; as many as this process may use processors unless given.
        memory: what those threads may hold together, in bytes or as text; fewer run where it does not suffice.
        progress: called with the bytes `check` just read and those in all.

    Raises:
        CheckpointError: there is no checkpoint, or a file of it is damaged; `check` without digests.
    """
    path = local_view(path)
    workers = reading_threads(workers or default_workers(), parse_size(memory))
    if _is_gguf(Path(path)):
        return _inspect_gguf(Path(path), check, workers, progress)
    run = None if _is_hub(Path(path)) else _open_run(Path(path), check)
    if run is not None:
        return _inspect_run(run, check, workers, progress)
    source = open_checkpoint(path)
    folder = Path(source.folder)
    problems: list[str] = []
    alone = Path(path).is_file() and len(source.files) == 1 and _SHARD.search(Path(path).name) is not None
    refused, quantised = why_only_copied(source), quantisation(source.config, source.tensors)
    architecture = None if refused else _noting(problems, lambda: _architecture(source))
    experts = _noting(problems, lambda: _experts(source)) if not quantised else None
    architecture = experts.dense if experts else architecture
    count = count_token_ids if is_llama(source.config) or experts else count_pieces
    pieces = _noting(problems, lambda: count(folder))
    manifest = _noting(problems, lambda: read_manifest(folder))
    has_scales = is_float8(source.config) and not alone
    float8 = _noting(problems, lambda: read_float8(source)) if has_scales else None
    tensors = float8.tensors if float8 else source.tensors
    if experts and not alone:
        _noting(problems, lambda: check_expert_tensors(source.tensors, experts, source.folder))
    elif architecture:
        if not alone and is_llama(source.config):
            _noting(problems, lambda: check_complete(source))
            refused = (
                None if problems else _complaint(lambda: check_tensors(source.tensors, architecture, "its weights"))
            )
        elif not alone and bool(float8) == has_scales:
            _noting(problems, lambda: check_tensors(tensors, architecture, source.folder))
        if pieces and pieces > architecture.vocab_size and not is_llama(source.config):
            problems.append(
                f"tokenizer.model has {pieces} pieces, config.json a vocab_size of {architecture.vocab_size}."
            )
    if check and manifest is None:
        raise CheckpointError(f"{folder}/{MANIFEST}: no such file; there is nothing to check the tensors against.")
    checked = manifest if check else None
    if alone and checked:
        checked = _of_file(checked, Path(source.files[0].name).name)
    return Inspection(
        folder=shown(source.folder),
        format=source.format,
        parallel=None,
        iteration=None,
        model_type=_model_type(source.config or {}),
        architecture=architecture,
        parameters=sum(view.numel * view.dtype.packed for view in tensors.values()),
        dtypes=dict(Counter(view.dtype.name for view in source.tensors.values())),
        nbytes=sum(view.nbytes for view in source.tensors.values()),
        files={Path(file.name).name: file.size for file in source.files},
        pieces=pieces,
        padding_rows=max(0, architecture.vocab_size - pieces) if architecture and pieces else None,
        lineage=_sentences(manifest),
        problems=[*map(shown, problems)],
        damages=_check(source.tensors, folder, checked, workers, progress, alone=alone, with_state=with_state),
        alone=alone,
        checked_files=_count_files(checked),
        checked_tensors=bool(checked and checked.get("digest")),
        chain=_chain(folder, manifest, None if alone else source.tensors),
        warnings=() if experts else _warnings(architecture, quantised=quantised is not None),
        refused=refused,
        quantised=quantised,
        experts=experts,
    )


def _warnings(architecture: Architecture | None, *, quantised: bool) -> tuple[str, ...]:
    warning = input_mult_warning(architecture, quantised=quantised) if architecture else None
    return (warning,) if warning else ()


def _sentences(manifest: Mapping[str, Any] | None) -> list[str]:
    verdict = (manifest or {}).get("verification")
    return lineage_steps((manifest or {}).get("lineage"), verdict if isinstance(verdict, dict) else None)


def _chain(folder: Path, manifest: Mapping[str, Any] | None, tensors: Mapping[str, View] | None) -> tuple[Link, ...]:
    """The chain of records that led to a folder; of one without a record, one link that says so."""
    path = find_manifest(folder)
    if manifest is None or path is None:
        return lineage_chain({}, None)
    problems = []
    if mismatch := record_mismatch(folder, manifest, tensors):
        problems.append(f"its weights are not those of its record: {mismatch}")
    if is_edited(manifest):
        problems.append("its record was edited: its checksum is not that of the rest")
    return lineage_chain(manifest, hashlib.sha256(path.read_bytes()).hexdigest(), problems)


def _check(
    tensors: Mapping[str, View],
    folder: Path,
    manifest: Mapping[str, Any] | None,
    workers: int,
    progress: Callable[[int, int], None],
    *,
    alone: bool = False,
    with_state: bool = True,
) -> list[Damage] | None:
    """What differs from the record; None without one."""
    if manifest is None:
        return None
    return check_folder(tensors, folder, manifest, workers, progress, alone=alone, with_state=with_state)


def _of_file(manifest: Mapping[str, Any], file: str) -> dict[str, Any]:
    """What a record says of one of its weight files."""
    tensors = {
        name: entry
        for name, entry in manifest["tensors"].items()
        if not isinstance(entry, dict) or entry.get("file") == file
    }
    listed = manifest.get("files")
    files = {name: entry for name, entry in listed.items() if name == file} if isinstance(listed, dict) else listed
    return {**manifest, "tensors": tensors, "files": files}


def _count_files(manifest: Mapping[str, Any] | None) -> int:
    files = (manifest or {}).get("files")
    return len(files) if isinstance(files, dict) else 0


def _open_run(path: Path, check: bool) -> NativeCheckpoint | None:
    """A training run; of an export to be checked, the step that its record is about if another file says otherwise."""
    try:
        run, fault = open_native(path), None
    except CheckpointError as error:
        run, fault = None, error
    if run is None and check and (path / MANIFEST).is_file() and (path / RELEASE).is_dir():
        run = open_native(path / RELEASE)
    if run is None and fault:
        raise fault
    return run


def _is_gguf(path: Path) -> bool:
    """Whether a path is that of a GGUF file, or of a folder that has such and is nothing else."""
    if path.is_file():
        return path.suffix == ".gguf"
    return path.is_dir() and bool(gguf_files(path)) and not _is_hub(path) and find_native(path) is None


def _inspect_gguf(path: Path, check: bool, workers: int, progress: Callable[[int, int], None]) -> Inspection:
    model = open_gguf(path)
    folder, problems = Path(model.folder), list[str]()
    config = _noting(problems, lambda: load_config(folder / "config.json")) if (folder / "config.json").exists() else {}
    architecture = None
    if find_family(config) == TELEFLM:
        where = f"{folder}/config.json"
        architecture = _noting(problems, lambda: Architecture.from_config(config, where, with_biases=True))
    if architecture and (mismatch := gguf_mismatch(model, architecture)):
        problems.append(f"{Path(model.files[0].name).name}: {mismatch}.")
    manifest = _noting(problems, lambda: read_manifest(folder))
    if check and manifest is None:
        raise CheckpointError(f"{folder}/{MANIFEST}: no such file; there is nothing to check the tensors against.")
    rows, pieces = vocabulary(model.settings)
    kind = model.settings.get("general.architecture")
    return Inspection(
        folder=shown(model.folder),
        format="gguf",
        parallel=None,
        iteration=None,
        model_type=printable(kind) if isinstance(kind, str) else None,
        architecture=architecture,
        parameters=sum(view.numel * view.dtype.packed for view in model.tensors.values()),
        dtypes=dict(Counter(view.dtype.name for view in model.tensors.values())),
        nbytes=sum(view.nbytes for view in model.tensors.values()),
        files={Path(file.name).name: file.size for file in model.files},
        pieces=pieces,
        padding_rows=rows - pieces if pieces else None,
        lineage=_sentences(manifest),
        problems=[*map(shown, problems)],
        damages=_check(model.tensors, folder, manifest if check else None, workers, progress),
        checked_files=_count_files(manifest if check else None),
        checked_tensors=bool(check and manifest and manifest.get("digest")),
        chain=_chain(folder, manifest, model.tensors),
    )


def _is_hub(path: Path) -> bool:
    return path.is_file() or any((path / name).exists() for name in WEIGHT_FILES)


def _inspect_run(run: NativeCheckpoint, check: bool, workers: int, progress: Callable[[int, int], None]) -> Inspection:
    problems: list[str] = []
    exported = exported_folder(Path(run.folder))
    manifest = _noting(problems, lambda: read_manifest(exported)) if exported else None
    checked = manifest if check else None
    damages = _check(exported_weights(exported), exported, checked, workers, progress) if exported and checked else None
    architecture = _noting(problems, lambda: run_architecture(run))
    if architecture:
        _noting(problems, lambda: plan_tensors(run, architecture, None))
        missing = _noting(problems, lambda: missing_multipliers(run))
        problems += [missing] if missing else []
    if check:
        tied = architecture is not None and architecture.tie_word_embeddings
        problems += compare_replicas(run, {"tie_word_embeddings": tied}, allow=True)
    files = sorted(
        {view.file for tensor in run.tensors.values() for _, view in tensor.chunks if view}, key=lambda file: file.name
    )
    tensors = run.tensors.values()
    return Inspection(
        folder=shown(run.folder),
        format=run.format,
        parallel=run.parallel,
        iteration=run.iteration,
        model_type=_noting(problems, lambda: run_model_type(run)) if architecture else None,
        architecture=architecture,
        parameters=sum(tensor.numel for tensor in tensors),
        dtypes=dict(Counter(tensor.dtype.name for tensor in tensors)),
        nbytes=sum(tensor.numel * tensor.dtype.itemsize for tensor in tensors),
        files={os.path.relpath(file.name, run.folder): file.size for file in files},
        pieces=None,
        padding_rows=None,
        lineage=_sentences(manifest),
        problems=[*map(shown, problems)],
        damages=damages,
        checked_files=_count_files(checked),
        checked_tensors=bool(checked and checked.get("digest")),
        chain=_chain(exported, manifest, None) if exported else (),
    )


def _model_type(config: Mapping[str, Any]) -> str | None:
    said = config.get("model_type")
    return printable(said) if isinstance(said, str) else None


def _architecture(source: Source) -> Architecture | None:
    where = f"{source.folder}/config.json"
    if source.config is None:
        raise CheckpointError(f"{where}: no such file.")
    return Architecture.from_config(source.config, where, with_biases=True) if find_family(source.config) else None


def _experts(source: Source) -> Experts | None:
    return read_experts(source.config or {}, f"{source.folder}/config.json") if has_experts(source.config) else None


def _complaint(look: Callable[[], Any]) -> str | None:
    """What `look` complains of, without its full stop."""
    found: list[str] = []
    _noting(found, look)
    return found[0].rstrip(".") if found else None


def _noting(problems: list[str], look: Callable[[], Any]) -> Any:
    """What `look` finds; what it complains of is noted instead of raised."""
    try:
        return look()
    except CheckpointError as error:
        problems.append(str(error))
        return None

# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Rewriting a checkpoint as a Hub folder of safetensors: the same tensors, safe and lazy to load."""

from pathlib import Path
from typing import Any

from .architecture import MODEL_TYPE, Architecture
from .checkpoint.containers import safetensors_shards
from .checkpoint.dtypes import DType, parse_dtype
from .checkpoint.errors import CheckpointError
from .checkpoint.execute import CheckpointResult, WriteOptions, foresee, write_checkpoint
from .checkpoint.manifest import MANIFEST, read_manifest
from .checkpoint.plan import CheckpointPlan, TensorPlan, View
from .checkpoint.sources import WEIGHT_FILES, Source, open_checkpoint
from .hub import hub_config, hub_sidecars, lineage_steps, model_card
from .mapping import check_tensors, weights

FORMATS = ("auto", "hf")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".index.json", ".gguf", ".h5", ".msgpack")
_MAX_SIDECAR = 100_000_000


def convert_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    format: str = "auto",
    dtype: str | None = None,
    options: WriteOptions | None = None,
    dry_run: bool = False,
) -> CheckpointResult:
    """Rewrite a checkpoint as safetensors, without loading it and without executing anything it contains.

    A Tele-FLM's tensors are checked against its configuration and written in data-flow order, with our code and
    configuration; any other model keeps its tensors, its configuration and its small files as they are.

    Args:
        source: folder of a Hugging Face checkpoint, `.bin` or safetensors.
        out: folder to write: new, or the finished or interrupted result of the same call.
        format: of the source; `auto` looks, `hf` is the Hugging Face layout.
        dtype: of the output's floating-point tensors; the source's unless given.
        options: how to write.
        dry_run: plan and check everything, write nothing.

    Raises:
        CheckpointError: the source cannot be used; nothing was written.
        OSError: the disk failed; the output folder is not loadable, and the same call resumes.
    """
    if format not in FORMATS:
        raise CheckpointError(f"format is {format!r}, expected one of {', '.join(FORMATS)}.")
    options = options or WriteOptions()
    checkpoint = open_checkpoint(source)
    plan, notes = plan_conversion(checkpoint, dtype=parse_dtype(dtype) if dtype else None)
    shards = safetensors_shards(plan.tensors, options.shard_bytes)
    if dry_run:
        return CheckpointResult(plan, shards, notes + foresee(plan, shards, Path(out), options), None)
    return CheckpointResult(plan, shards, notes, write_checkpoint(plan, Path(out), options))


def plan_conversion(checkpoint: Source, *, dtype: DType | None = None) -> tuple[CheckpointPlan, list[str]]:
    """The plan of a conversion, and notes on it.

    Args:
        checkpoint: the source.
        dtype: of the output's floating-point tensors; each source tensor's own unless given.

    Raises:
        CheckpointError: a Tele-FLM's tensors are not those of its configuration.
    """
    if not checkpoint.tensors:
        raise CheckpointError(f"{checkpoint.folder}: {Path(checkpoint.files[0]).name} holds no tensors.")
    is_teleflm = (checkpoint.config or {}).get("model_type") == MODEL_TYPE
    plan, notes = (_plan_teleflm if is_teleflm else _plan_any)(checkpoint, dtype)
    plan.check()
    return plan, notes


def _plan_teleflm(checkpoint: Source, dtype: DType | None) -> tuple[CheckpointPlan, list[str]]:
    where = f"{checkpoint.folder}/config.json"
    architecture = Architecture.from_config(checkpoint.config or {}, where, with_biases=True)
    check_tensors(checkpoint.tensors, architecture, checkpoint.folder)
    tensors = tuple(_cast(name, checkpoint.tensors[name], dtype) for name, *_ in weights(architecture))
    dropped = len(checkpoint.tensors) - len(tensors)
    lineage = _lineage(checkpoint, dtype)
    out_dtype = tensors[0].dtype.name
    config = hub_config(checkpoint.config or {}, architecture, out_dtype)
    sidecars = hub_sidecars(Path(checkpoint.folder), model_card(architecture, out_dtype, lineage_steps(lineage)))
    notes = [f"{dropped} tensors that every runtime computes itself were left out."] if dropped else []
    return CheckpointPlan(tensors, config, sidecars, lineage), notes


def _plan_any(checkpoint: Source, dtype: DType | None) -> tuple[CheckpointPlan, list[str]]:
    tensors = tuple(_cast(name, view, dtype) for name, view in checkpoint.tensors.items())
    config = dict(checkpoint.config or {})
    if dtype:
        config = {**{key: value for key, value in config.items() if key != "torch_dtype"}, "dtype": dtype.name}
    sidecars = _small_files(Path(checkpoint.folder))
    notes = [] if checkpoint.config else ["The source has no config.json; the output's is empty."]
    model_type = config.get("model_type")
    if model_type:
        notes.append(f"A {model_type} model, not a Tele-FLM: tensors and configuration were kept as they are.")
    return CheckpointPlan(tensors, config, sidecars, _lineage(checkpoint, dtype)), notes


def _cast(name: str, view: View, dtype: DType | None) -> TensorPlan:
    return TensorPlan.copy_of(name, view, dtype if dtype and view.dtype.is_floating else None)


def _lineage(checkpoint: Source, dtype: DType | None) -> dict[str, Any]:
    parent = read_manifest(Path(checkpoint.folder))
    return {
        "operation": "convert",
        "from": checkpoint.format,
        "dtype": dtype.name if dtype else None,
        "parent": {"plan": parent["plan"], "lineage": parent["lineage"]} if parent else None,
    }


def _small_files(folder: Path) -> dict[str, str | bytes]:
    """Everything in a folder that is neither weights nor hidden nor ours."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    kept = [
        path.name
        for path in files
        if not path.name.endswith(_WEIGHT_SUFFIXES)
        and path.name not in (*WEIGHT_FILES, "config.json", MANIFEST)
        and path.stat().st_size <= _MAX_SIDECAR
    ]
    return {name: str(folder / name) for name in kept}

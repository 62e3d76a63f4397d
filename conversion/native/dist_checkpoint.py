# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The reader of checkpoints in the format of torch.distributed.checkpoint (DCP), whoever wrote them:

    torch_dist     megatron-core: whole tensors under Transformer Engine's names, the layers stacked in one [L, ...]
    fsdp_dtensor   Megatron-FSDP: a tensor for each layer under the run's own names, gate and up apart
    dcp            FSDP2, as Accelerate and transformers' Trainer write it: the Hub's names after `model.`

megatron-core stores layers apart too where they are not all alike, and gate and up (`weight_w`, `weight_v`) where it
is told to; so every way is read in both formats.
"""

import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoint.bytes import reading
from ..checkpoint.distributed_file import METADATA, DistributedCheckpoint, read_distributed_checkpoint
from ..checkpoint.errors import CheckpointError
from ..checkpoint.numbers import plain_value, read_count
from ..checkpoint.reader import FileReader
from ..checkpoint.sharded import ShardedTensor
from ..checkpoint.strict_json import parse_json_object
from ..checkpoint.torch_file import read_torch_file
from ..optimizer_state import MAX_STEPS, MOMENTS, plain_settings
from .checkpoint import NO_FSDP_DTENSOR_OPTIMIZER, AdamMoments, NativeCheckpoint, NativeFormat
from .dist_optimizer import DistRun, is_optimizer_entry, read_dist_adam
from .megatron_optimizer import LEFT_OUT, with_adam
from .table import MEGATRON, NativeWeight, RowOrder, hub_name, megatron_name
from .training_args import plain_args

_METADATA_JSON = "metadata.json"
_MAX_JSON_BYTES = 1_000_000
_COMMON = "common.pt"
_COMMON_OBJECT = "common_state/shard_0_1"  # the same since megatron-core 0.19, which writes no common.pt
_ACCELERATE = "pytorch_model_fsdp_0"
# What a run keeps beside its weights.
_NO_WEIGHT = re.compile(
    r"(?:chained_\d+\.)?(?:optimizer|rng_state|opt_param_scheduler|rerun_state_machine\w*)\b|(?:.*[./])?_extra_state\b"
)
_LAYER = re.compile(r"(?<=\blayers\.)\d+(?=\.)")
_GATE, _UP = "_w", "_v"
_LOST = "copy the folder again, with every rank's files"


def dist_format(folder: Path) -> NativeFormat | None:
    """Whether a folder is in megatron-core's format or in that of torch, from the names of its files.

    `dcp` may turn out to be `fsdp_dtensor` when it is read: these differ in the names of the tensors only.
    """
    if _sharded_backend(folder) is not None:
        return "torch_dist"
    return "dcp" if (folder / METADATA).is_file() else None


def read_dist_checkpoint(
    folder: str | os.PathLike[str],
    table: Sequence[NativeWeight] | None = None,
    *,
    fp32_master: bool = False,
    optimizer: bool = False,
) -> NativeCheckpoint:
    """Open a `torch_dist`, `fsdp_dtensor` or plain DCP folder; no tensor is loaded.

    Args:
        folder: the one with the `.metadata` file, or that which holds Accelerate's `pytorch_model_fsdp_0`.
        table: what its tensors are called, for a fork of Megatron; Megatron's own names, or the Hub's, unless given.
        fp32_master: take the optimizer's float32 weights, of `torch_dist`.
        optimizer: read Adam's moments too, which FSDP2 keeps in a folder of their own, `optimizer_0`.

    Raises:
        CheckpointError: the folder is damaged or incomplete, or of a backend that is no longer read; the moments are
            not there, not of Adam, or Megatron-FSDP's.
    """
    path = Path(os.path.abspath(folder))
    backend = _sharded_backend(path)
    if backend is not None:
        return _read_torch_dist(path, backend, table, fp32_master=fp32_master, optimizer=optimizer)
    if not (path / METADATA).is_file() and (path / _ACCELERATE).is_dir():
        path /= _ACCELERATE
    checkpoint = read_distributed_checkpoint(path, _is_weight)
    if table is not None or _has_megatron_names(checkpoint):
        if optimizer or fp32_master:
            raise CheckpointError(f"{path}: {NO_FSDP_DTENSOR_OPTIMIZER}")
        return _read_fsdp_dtensor(checkpoint, table)
    if fp32_master:
        raise CheckpointError(f"{path}: FSDP keeps no second copy of the weights; leave --fp32-master out.")
    return _read_hub_names(checkpoint, _read_adam(path) if optimizer else None)


def _is_weight(name: str) -> bool:
    return _NO_WEIGHT.match(name) is None


def _sharded_backend(folder: Path) -> str | None:
    """The backend that megatron-core's metadata.json names; None if there is no such file, or it is another's."""
    path = folder / _METADATA_JSON
    if not path.is_file():
        return None
    with reading(path) as data:
        content = data.pread(0, data.size) if data.size <= _MAX_JSON_BYTES else b""
    backend = parse_json_object(content, str(path)).get("sharded_backend") if b'"sharded_backend"' in content else None
    return None if backend is None else str(backend)


# megatron-core's torch_dist.


def _read_torch_dist(
    folder: Path, backend: str, table: Sequence[NativeWeight] | None, *, fp32_master: bool, optimizer: bool
) -> NativeCheckpoint:
    if backend != "torch_dist":
        raise CheckpointError(
            f"{folder / _METADATA_JSON}: sharded_backend is {backend!r}, expected 'torch_dist'; load it with the "
            "Megatron that wrote it and save it with --ckpt-format torch_dist."
        )
    wanted = fp32_master or optimizer
    everything = read_distributed_checkpoint(folder, _is_weight_or_optimizer if wanted else _is_weight)
    weights = {name: tensor for name, tensor in everything.tensors.items() if _is_weight(name)}
    checkpoint = replace(everything, tensors=weights)
    common = _read_common_state(folder, checkpoint)
    run = _megatron_checkpoint("torch_dist", checkpoint, table, common.get("args"), common.get("iteration"))
    if not wanted:
        return run
    return _with_optimizer(run, everything, common, is_fork=table is not None, fp32_master=fp32_master, adam=optimizer)


def _is_weight_or_optimizer(name: str) -> bool:
    return _is_weight(name) or is_optimizer_entry(name) or name.split("/")[0] in LEFT_OUT


def _with_optimizer(
    run: NativeCheckpoint,
    everything: DistributedCheckpoint,
    common: Mapping[str, Any],
    *,
    is_fork: bool,
    fp32_master: bool,
    adam: bool,
) -> NativeCheckpoint:
    """The run with what its optimizer holds."""
    table = run.table or MEGATRON
    spelling = megatron_name if not is_fork else lambda name: name

    def whole(tensors: Mapping[str, ShardedTensor]) -> dict[str, ShardedTensor]:
        return _join_halves(_unstack(replace(everything, tensors=dict(tensors)), table, spelling), run.folder)

    def read(name: str) -> Any:
        if name not in everything.objects:
            raise CheckpointError(f"{run.folder}: {name} is missing; {_LOST}.")
        return _read_object(everything, name)

    state = read_dist_adam(DistRun(everything, common, run.args, run.tensors, table, is_fork, whole, read))
    return with_adam(
        run,
        state.moments,
        state.masters,
        step=state.step,
        settings=state.groups,
        members=None,
        replicas=state.replicas,
        notes=state.notes,
        fp32_master=fp32_master,
        adam=adam,
    )


def _read_common_state(folder: Path, checkpoint: DistributedCheckpoint) -> Mapping[str, Any]:
    """What every rank of a run has in common, its arguments for one; empty if the folder has none."""
    if (folder / _COMMON).is_file():
        content, where = read_torch_file(folder / _COMMON), str(folder / _COMMON)
    elif _COMMON_OBJECT in checkpoint.objects:
        content, where = _read_object(checkpoint, _COMMON_OBJECT), f"{checkpoint.folder}: {_COMMON_OBJECT}"
        content = content[0] if isinstance(content, list) and len(content) == 1 else content
    else:
        return {}
    if not isinstance(content, dict):
        raise CheckpointError(f"{where} holds a {type(content).__name__}, expected a dict with args and iteration.")
    return content


# Megatron-FSDP.


def _has_megatron_names(checkpoint: DistributedCheckpoint) -> bool:
    return any(megatron_name(name) == MEGATRON[0].name for name in checkpoint.tensors)


def _read_fsdp_dtensor(checkpoint: DistributedCheckpoint, table: Sequence[NativeWeight] | None) -> NativeCheckpoint:
    args, iteration = (
        _read_object(checkpoint, name) if name in checkpoint.objects else None for name in ("args", "iteration")
    )
    return _megatron_checkpoint("fsdp_dtensor", checkpoint, table, args, iteration)


def _read_object(checkpoint: DistributedCheckpoint, name: str) -> Any:
    file, start, length = checkpoint.objects[name]
    return read_torch_file(file, start=start, length=length)


# Either, by Megatron's names.


def _megatron_checkpoint(
    kind: NativeFormat,
    checkpoint: DistributedCheckpoint,
    table: Sequence[NativeWeight] | None,
    saved_args: Any,
    iteration: Any,
) -> NativeCheckpoint:
    args = plain_args(saved_args)
    lines = table or MEGATRON
    spelling = megatron_name if table is None else lambda name: name
    return NativeCheckpoint(
        folder=checkpoint.folder,
        format=kind,
        parallel=_parallel(args),
        iteration=iteration if type(iteration) is int else None,
        args=args,
        tensors=_join_halves(_unstack(checkpoint, lines, spelling), checkpoint.folder),
        table=lines,
        order=RowOrder(
            rotary_interleaved=bool(args.get("rotary_interleaved")),
            zero_centered_gamma=bool(args.get("apply_layernorm_1p") or args.get("layernorm_zero_centered_gamma")),
        ),
    )


_Halves = dict[tuple[str, str], ShardedTensor]
"""By name in the table, and which half it is: `_w` the gate, `_v` up, nothing the whole."""


def _unstack(
    checkpoint: DistributedCheckpoint, table: Sequence[NativeWeight], spelling: Callable[[str], str]
) -> _Halves:
    """Every tensor by its name in the table, stacked layers apart; one that the table does not know by its own."""
    templates = {line.name for line in table}
    stacks = {line.name.replace("{}.", ""): line.name for line in table if "{}" in line.name}
    tensors: _Halves = {}
    for own_name, tensor in checkpoint.tensors.items():
        name, half = _split_half(spelling(own_name), templates | stacks.keys())
        if name in stacks and tensor.shape:
            parts = {(stacks[name].format(layer), half): part for layer, part in enumerate(tensor.unbind(0))}
        elif _template(name) in templates:
            parts = {(name, half): tensor}
        else:
            parts = {(own_name, ""): tensor}
        for name, _ in parts.keys() & tensors.keys():
            raise CheckpointError(f"{checkpoint.folder}: {own_name} is there under another name too, as {name}.")
        tensors.update(parts)
    return tensors


def _split_half(name: str, known: set[str]) -> tuple[str, str]:
    base, half = name[: -len(_GATE)], name[-len(_GATE) :]
    return (base, half) if half in (_GATE, _UP) and _template(base) in known else (name, "")


def _template(name: str) -> str:
    return _LAYER.sub("{}", name)


def _join_halves(tensors: _Halves, where: str) -> dict[str, ShardedTensor]:
    """Gate and up, where they are stored apart, as the one tensor that megatron-core trains."""
    whole = {}
    for name, half in tensors:
        if not half:
            whole[name] = tensors[name, half]
            continue
        if (name, "") in tensors:
            raise CheckpointError(f"{where}: {name} is there whole, and {name}{half} too; which is right?")
        gate, up = (tensors.get((name, suffix)) for suffix in (_GATE, _UP))
        if gate is None or up is None:
            raise CheckpointError(f"{where}: {name}{_UP if up is None else _GATE} is missing, {name}{half} is there.")
        if (gate.shape, gate.dtype) != (up.shape, up.dtype):
            raise CheckpointError(
                f"{where}: {name}{_GATE} is {gate.dtype} {gate.shape}, {name}{_UP} is {up.dtype} {up.shape}; they are "
                "halves of one tensor."
            )
        whole[name] = ShardedTensor.concatenate((gate, up), 0)
    return whole


def _parallel(args: Mapping[str, Any]) -> str:
    sizes = (args.get("tensor_model_parallel_size"), args.get("pipeline_model_parallel_size"))
    if not all(isinstance(size, int) for size in sizes):
        return "tensors stored whole"
    return f"tensor parallel {sizes[0]} x pipeline parallel {sizes[1]}, tensors stored whole"


# FSDP2 of a transformers model.


def _read_hub_names(checkpoint: DistributedCheckpoint, adam: AdamMoments | None) -> NativeCheckpoint:
    tensors: dict[str, ShardedTensor] = {}
    for own_name, tensor in checkpoint.tensors.items():
        name = hub_name(own_name)
        if name in tensors:
            raise CheckpointError(f"{checkpoint.folder}: {own_name} is there under another name too, as {name}.")
        tensors[name] = tensor
    return NativeCheckpoint(
        folder=checkpoint.folder,
        format="dcp",
        parallel="fully sharded",
        iteration=None,
        args={},
        tensors=tensors,
        table=None,
        adam=adam,
    )


_FSDP_OPTIMIZER = "optimizer_0"
_STATE = re.compile(r"optimizer\.state\.(.+)\.(\w+)")
_GROUP = re.compile(r"optimizer\.param_groups\.(.+)\.(\w+)")  # the number of a group, or the name of a weight


def _read_adam(weights: Path) -> AdamMoments:
    """Adam's moments as Accelerate keeps them: in a folder beside that of the weights, or beside them in one."""
    beside = (weights, weights / _FSDP_OPTIMIZER, weights.parent / _FSDP_OPTIMIZER)
    for folder in beside:
        if not (folder / METADATA).is_file():
            continue
        checkpoint = read_distributed_checkpoint(folder, lambda name: not _is_weight(name))
        if any(map(_STATE.fullmatch, checkpoint.tensors)):
            return _adam_of(checkpoint)
    raise CheckpointError(f"{weights}: has no optimizer beside it, in {_FSDP_OPTIMIZER}; leave --optimizer out.")


def _adam_of(checkpoint: DistributedCheckpoint) -> AdamMoments:
    moments: dict[str, dict[str, ShardedTensor]] = {key: {} for key in MOMENTS}
    steps: dict[str, float] = {}
    with FileReader() as reader:
        for own_name, tensor in checkpoint.tensors.items():
            match = _STATE.fullmatch(own_name)
            if match is None:
                continue
            name, key = hub_name(match[1]), match[2]
            if key == "step":
                where = f"{checkpoint.folder}: {own_name}"
                count = read_count(_one_value(tensor, reader, where), where, most=MAX_STEPS, way_out=_LOST)
                steps[name] = float(count)
            elif key in moments:
                moments[key][name] = tensor
            else:
                raise CheckpointError(
                    f"{checkpoint.folder}: {own_name} is nothing that Adam keeps; only Adam and AdamW are converted."
                )
    first, second = (moments[key].keys() for key in MOMENTS)
    for name in sorted((first ^ second) | (first ^ steps.keys())):
        raise CheckpointError(f"{checkpoint.folder}: the state of {name} lacks a moment or its step; {_LOST}.")
    return AdamMoments(moments, steps, _fsdp_groups(checkpoint, first))


def _one_value(tensor: ShardedTensor, reader: FileReader, where: str) -> Any:
    views = [view for _, view in tensor.chunks if view is not None]
    if tensor.numel != 1 or len(views) != 1:
        raise CheckpointError(f"{where} has shape {tensor.shape}, expected one number.")
    return plain_value(views[0], reader)


def _fsdp_groups(checkpoint: DistributedCheckpoint, names: Collection[str]) -> list[tuple[dict[str, Any], list[str]]]:
    """The parameter groups; one of all weights where they are not said, or not of these."""
    said = _said_of_groups(checkpoint)
    if said and not any(map(str.isdigit, said)):
        return _joined_groups({hub_name(name): settings for name, settings in said.items()}, names)
    numbered = {int(number): settings for number, settings in said.items() if number.isdigit()}
    ordered = [settings for _, settings in sorted(numbered.items())]
    members = [group.get("params") for group in ordered]
    if all(isinstance(own, list) and all(isinstance(name, str) for name in own) for own in members):
        named = [[hub_name(name) for name in own] for own in members if own is not None]
        if sorted(name for own in named for name in own) == sorted(names):
            return [(plain_settings(group), own) for group, own in zip(ordered, named, strict=True)]
    return [({}, sorted(names))]


def _said_of_groups(checkpoint: DistributedCheckpoint) -> dict[str, dict[str, Any]]:
    """What is said of each group, or of each weight, by its number or name; numbers are kept as tensors too."""
    said: dict[str, dict[str, Any]] = {}
    for own_name in checkpoint.objects:
        if match := _GROUP.fullmatch(own_name):
            said.setdefault(match[1], {})[match[2]] = _read_object(checkpoint, own_name)
    with FileReader() as reader:
        for own_name, tensor in checkpoint.tensors.items():
            if match := _GROUP.fullmatch(own_name):
                number = _one_value(tensor, reader, f"{checkpoint.folder}: {own_name}")
                said.setdefault(match[1], {})[match[2]] = number
    return said


def _joined_groups(
    said: Mapping[str, Mapping[str, Any]], names: Collection[str]
) -> list[tuple[dict[str, Any], list[str]]]:
    """The groups of a state that torch has flattened, which says all settings of each weight: those that say the same.

    They are in the order that a Trainer's have, and those of muP: embeddings, matrices, norms.
    """
    groups: list[tuple[dict[str, Any], list[str]]] = []
    for name in sorted(names, key=lambda name: ("norm" in name, "embed_tokens" not in name, name)):
        settings = plain_settings(said.get(name, {}))
        for others, members in groups:
            if others == settings:
                members.append(name)
                break
        else:
            groups.append((settings, [name]))
    return groups

# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Adam's state in megatron-core's `torch_dist` format, by what megatron-core calls the way it was sharded:

    (none)                  no distributed optimizer: optimizer.state.{exp_avg,exp_avg_sq,fp32_param}.{weight}
    fully_reshardable       optimizer.state.{exp_avg,exp_avg_sq,param}.{weight}
    fully_sharded_model_space  the same as megatron-core 0.13 has it, each rank's part of a weight flat
    dp_reshardable          the distributed optimizer's buckets, which name no weights:
                            optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(...).bucket_idx_0.{exp_avg,...}
    dp_zero_gather_scatter  its buffers, as in distrib_optim.pt: optimizer.distributed.dp_group_idx_0.param_state

The first three need nothing but names. For the last two, what lies on which rank follows from the run's arguments and
from the sizes of the buffers, and the order of a layer's parameters from its implementation.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..checkpoint.distributed_file import DistributedCheckpoint
from ..checkpoint.dtypes import DType
from ..checkpoint.errors import CheckpointError
from ..checkpoint.plan import Shape
from ..checkpoint.sharded import ShardedTensor
from ..optimizer_state import MOMENTS
from .checkpoint import Replica
from .flat_buffers import lay_out, lay_out_in
from .megatron_optimizer import (
    LEAVE_OUT,
    MASTER,
    FlatRank,
    bucket_elements,
    chained,
    left_out,
    named_copies,
    no_optimizer,
    one_step,
    read_coalesced,
    refuse_other_optimizers,
    refuse_precision_aware,
    refuse_state_keys,
    settings_of,
    shaped,
    with_decay,
)
from .model_parallel import LAYER, Chunk, Rank, assemble, layer_offsets
from .table import NativeWeight

_NAMED = re.compile(r"optimizer\.state\.(\w+?)\.(.+)")
_MASTERS = ("fp32_param", MASTER)
_GROUP = re.compile(r"optimizer\.distributed\.dp_group_idx_(\d+)\.(\w+)/shard_0_1")
_BUCKET = re.compile(
    r"optimizer\.distributed\.dp_group_idx_(\d+)\.gbuf_idx_(\d+)\.dtype_\(torch\.(\w+), torch\.\w+\)\.bucket_idx_(\d+)"
    r"\.(\w+)"
)
_CHAINED = re.compile(r"chained_(\d+)\.")
_IN_BUCKETS, _GATHERED = "dp_reshardable", "dp_zero_gather_scatter"
_FLATTENED = "fully_sharded_model_space"
_BY_NAME = (None, "fully_reshardable", _FLATTENED)
# The parameters of a layer in the order of megatron-core's modules, by the names that torch_dist has for all of them.
_QKV_NORM, _FC1_NORM = "self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"
_PROJ, _QKV = (
    "self_attention.linear_proj.weight",
    ("self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias"),
)
_FC1, _FC2 = "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"
_LAYER_ORDER = {
    "transformer_engine": (_PROJ, _QKV_NORM, *_QKV, _FC1_NORM, _FC1, _FC2),
    "local": (_QKV_NORM, _PROJ, *_QKV, _FC1_NORM, _FC1, _FC2),
}
_EMBEDDING, _FINAL_NORM, _HEAD = (
    "embedding.word_embeddings.weight",
    "decoder.final_layernorm.weight",
    "output_layer.weight",
)


@dataclass(frozen=True)
class DistAdam:
    """Adam's state of a `torch_dist` folder, by the native names of whole tensors.

    Args:
        moments: `exp_avg` and `exp_avg_sq` -> by name.
        masters: the optimizer's weights, if it has its own, and if they are numbers.
        groups: settings of each parameter group.
        step: updates done.
        replicas: copies that ranks kept.
        notes: what a user should know.
    """

    moments: Mapping[str, Mapping[str, ShardedTensor]]
    masters: Mapping[str, ShardedTensor] | None
    groups: Sequence[Mapping[str, Any]]
    step: float
    replicas: Sequence[Replica]
    notes: Sequence[str]


@dataclass(frozen=True)
class DistRun:
    """What the optimizer is read with.

    Args:
        checkpoint: the folder, with all entries of its optimizer.
        common: what all ranks have in common.
        args: the run's arguments.
        weights: of the model, whole.
        table: what their names mean.
        is_fork: whether that is another than Megatron's.
        whole: makes tensors by native name of those by the folder's names.
        read_object: reads an entry that is no tensor.
    """

    checkpoint: DistributedCheckpoint
    common: Mapping[str, Any]
    args: Mapping[str, Any]
    weights: Mapping[str, ShardedTensor]
    table: Sequence[NativeWeight]
    is_fork: bool
    whole: Callable[[Mapping[str, ShardedTensor]], dict[str, ShardedTensor]]
    read_object: Callable[[str], Any]


def is_optimizer_entry(name: str) -> bool:
    """Whether an entry of a folder is its optimizer's."""
    return name.startswith("optimizer.") or _CHAINED.match(name) is not None


def read_dist_adam(run: DistRun) -> DistAdam:
    """Adam's state of a `torch_dist` folder; no tensor is loaded.

    Raises:
        CheckpointError: there is none, it is not Adam's, it is sharded in another way, or does not fit the weights.
    """
    where = run.checkpoint.folder
    refuse_other_optimizers(run.args, where)
    entries = [name for name in (*run.checkpoint.tensors, *run.checkpoint.objects) if is_optimizer_entry(name)]
    saved = run.common.get("optimizer")
    chains = {match[1] for name in entries if (match := _CHAINED.match(name))}
    if isinstance(saved, dict) and saved and all(isinstance(key, int) for key in saved):
        chains = chains or set(map(str, saved))
    if chains:
        raise chained(len(chains), where)
    if not entries and not isinstance(saved, dict):
        raise no_optimizer(where)
    saved = saved if isinstance(saved, dict) else {}
    kind = saved.get("param_state_sharding_type")
    if kind in _BY_NAME:
        return _read_named(run, saved)
    if kind not in (_IN_BUCKETS, _GATHERED):
        raise CheckpointError(
            f"{where}: the optimizer is sharded as {kind!r}, expected fully_reshardable, {_FLATTENED}, "
            f"{_IN_BUCKETS} or {_GATHERED}; load it with the Megatron that wrote it and save it with --ckpt-format "
            f"torch, or {LEAVE_OUT}."
        )
    if run.is_fork:
        raise CheckpointError(
            f"{where}: the optimizer is sharded as {kind!r}, which follows the order of parameters in megatron-core's "
            f"model, not in a fork's (--mapping); save it with --dist-ckpt-optim-fully-reshardable, or {LEAVE_OUT}."
        )
    refuse_precision_aware(run.args, where)
    return _read_flat(run, kind)


# Tensors that say whose they are.


def _read_named(run: DistRun, saved: Mapping[str, Any]) -> DistAdam:
    where = run.checkpoint.folder
    found: dict[str, dict[str, ShardedTensor]] = {}
    for own_name, tensor in run.checkpoint.tensors.items():
        if match := _NAMED.fullmatch(own_name):
            weight = run.checkpoint.tensors.get(match[2])
            if weight is not None and saved.get("param_state_sharding_type") == _FLATTENED:
                tensor = _unflattened(tensor, weight.shape, f"{where}: {own_name}")
            found.setdefault(match[1], {})[match[2]] = tensor
    refuse_state_keys(found.keys() - set(_MASTERS), where)
    whole = {key: run.whole(tensors) for key, tensors in found.items()}
    masters = next((whole[key] for key in _MASTERS if key in whole), None)
    if run.args.get("use_precision_aware_optimizer"):
        masters = None  # may be what the weights lack of them
    found_settings = saved.get("optimizer", saved)
    inner: Mapping[str, Any] = found_settings if isinstance(found_settings, dict) else {}
    groups: Any = inner.get("param_groups")
    state = inner.get("state")
    common_step = [state["common_step"]] if isinstance(state, dict) and "common_step" in state else []
    return DistAdam(
        moments={key: whole[key] for key in MOMENTS},
        masters=masters,
        groups=with_decay(settings_of(groups, where), run.args),
        step=one_step(common_step or _steps(groups), where),
        replicas=(),
        notes=left_out({**run.common, **run.checkpoint.objects}, saved, run.args),
    )


def _unflattened(tensor: ShardedTensor, shape: Shape, where: str) -> ShardedTensor:
    """A tensor whose parts on model-parallel ranks are each flat: [parts along every axis, elements of a part]."""
    if len(tensor.shape) == len(shape):
        return tensor
    parts = tensor.shape[:-1]
    fits = len(parts) == len(shape) and all(
        count and size % count == 0 for count, size in zip(parts, shape, strict=True)
    )
    inner = [size // count for count, size in zip(parts, shape, strict=True)] if fits else []
    if not fits or math.prod(inner) != tensor.shape[-1]:
        raise CheckpointError(
            f"{where} has shape {tensor.shape}, which is no weight of shape {shape} in flat parts; {LEAVE_OUT}."
        )

    def put_together(part: ShardedTensor, axis: int) -> ShardedTensor:
        if axis == len(shape):
            return part.unflatten(0, inner)
        return ShardedTensor.concatenate([put_together(own, axis + 1) for own in part.unbind(0)], axis)

    return put_together(tensor, 0)


def _steps(groups: Any) -> list[Any]:
    return [group["step"] for group in groups if group.get("step") is not None]


# Buffers that do not.

_Buckets = dict[str, list[ShardedTensor]]
"""Of one buffer: moments and weights -> its buckets in order."""


def _read_flat(run: DistRun, kind: str) -> DistAdam:
    where = run.checkpoint.folder
    tensor, pipeline = (run.args.get(f"{axis}_model_parallel_size") for axis in ("tensor", "pipeline"))
    if not isinstance(tensor, int) or not isinstance(pipeline, int):
        raise CheckpointError(
            f"{where}: the run's arguments do not say its parallelism, without which its optimizer, sharded as "
            f"{kind!r}, cannot be told apart; {LEAVE_OUT}."
        )
    objects = _group_objects(run, range(tensor * pipeline), kind)
    ranks = [Rank(t, p, f"{where}: dp_group_idx_{p * tensor + t}", {}) for t in range(tensor) for p in range(pipeline)]
    numbers = [rank.pipeline * tensor + rank.tensor for rank in ranks]
    model = _Model.of(run, tensor, pipeline)
    if kind == _IN_BUCKETS:
        buffers = _read_buckets(run, numbers)
        read = [_from_buckets(model, rank, buffers[number]) for rank, number in zip(ranks, numbers, strict=True)]
    else:
        read = [
            _from_gathered(
                model, rank, run.read_object(f"optimizer.distributed.dp_group_idx_{number}.param_state/shard_0_1")
            )
            for rank, number in zip(ranks, numbers, strict=True)
        ]
    chunks = [own[MASTER] for own in read]
    offsets = layer_offsets(where, ranks, chunks)
    layers = sum(
        name.endswith(_PROJ)
        for rank, own in zip(ranks, chunks, strict=True)
        for chunk in own
        for name in chunk
        if rank.tensor == 0
    )
    if layers != model.layers:
        raise CheckpointError(
            f"{where}: the optimizer's buffers have room for {layers} layers, the model has {model.layers}; the "
            "folder is of two runs."
        )
    whole: dict[str, dict[str, ShardedTensor]] = {}
    replicas: list[Replica] = []
    for key in (*MOMENTS, MASTER):
        tensors, copies = assemble(ranks, [own[key] for own in read], offsets, run.table)
        whole[key] = {name: _whole_halves(part, model.line(name), tensor) for name, part in tensors.items()}
        replicas += named_copies(key, copies)
    groups = objects["param_groups"]
    return DistAdam(
        moments={key: whole[key] for key in MOMENTS},
        masters=whole[MASTER],
        groups=with_decay(settings_of(groups, where), run.args),
        step=objects["step"],
        replicas=replicas,
        notes=left_out({**run.common, **run.checkpoint.objects}, objects, run.args),
    )


def _group_objects(run: DistRun, expected: range, kind: str) -> dict[str, Any]:
    """The settings and the step of the model-parallel ranks' optimizers, on which all agree."""
    where = run.checkpoint.folder
    present = {
        int(match[1])
        for name in run.checkpoint.objects
        if (match := _GROUP.fullmatch(name)) and match[2] == "optimizer"
    }
    if len(present) != len(expected) or present != set(expected):
        raise CheckpointError(
            f"{where}: the optimizer, sharded as {kind!r}, is of {len(present)} model-parallel ranks, the run's "
            f"arguments make it {len(expected)}; {LEAVE_OUT}."
        )
    groups: list[dict[str, Any]] = []
    steps: dict[float, int] = {}
    for number in sorted(present):
        at = f"optimizer.distributed.dp_group_idx_{number}.optimizer/shard_0_1"
        saved = run.read_object(at)
        saved = saved[0] if isinstance(saved, list) and len(saved) == 1 else saved
        own = saved.get("param_groups") if isinstance(saved, dict) else None
        for settings, group in zip(settings_of(own, f"{where}: {at}"), own or (), strict=True):
            if settings not in [{key: value for key, value in known.items() if key != "step"} for known in groups]:
                groups.append({**settings, "step": group.get("step")})
        steps.setdefault(one_step(_steps(own), f"{where}: {at}"), number)
    if len(steps) > 1:
        (one, first), (other, second) = list(steps.items())[:2]
        raise CheckpointError(
            f"{where}: the optimizer's step is {other:g} on dp_group_idx_{second} and {one:g} on dp_group_idx_{first}; "
            "the folder is of two runs."
        )
    scaled = any(match[2] == "grad_scaler" for name in run.checkpoint.objects if (match := _GROUP.fullmatch(name)))
    return {"param_groups": groups, "step": next(iter(steps)), **({"grad_scaler": None} if scaled else {})}


def _read_buckets(run: DistRun, groups: Sequence[int]) -> dict[int, list[tuple[str, _Buckets]]]:
    """Of each model-parallel rank the buffers in order: the dtype of their weights, and their buckets."""
    where = run.checkpoint.folder
    found: dict[tuple[int, int, str], dict[str, dict[int, ShardedTensor]]] = {}
    for name, tensor in run.checkpoint.tensors.items():
        if match := _BUCKET.fullmatch(name):
            buffer = found.setdefault((int(match[1]), int(match[2]), match[3]), {})
            buffer.setdefault(match[5], {})[int(match[4])] = tensor
    buffers: dict[int, list[tuple[str, _Buckets]]] = {group: [] for group in groups}
    for (group, number, dtype), keys in sorted(found.items()):
        refuse_state_keys(keys.keys() - {MASTER}, f"{where}: dp_group_idx_{group}")
        if MASTER not in keys:
            raise CheckpointError(
                f"{where}: dp_group_idx_{group} has no {MASTER}, expected float32 weights; {LEAVE_OUT}."
            )
        if group not in buffers or number != len(buffers[group]):
            raise CheckpointError(
                f"{where}: has gbuf_idx_{number} of dp_group_idx_{group}, not one before it; the folder is of two runs."
            )
        buckets = {key: [own[bucket] for bucket in sorted(own)] for key, own in keys.items()}
        sizes = [[bucket.shape for bucket in own] for own in buckets.values()]
        numbered = all(sorted(own) == [*range(len(own))] for own in keys.values())
        if not numbered or any(own != sizes[0] or any(len(shape) != 1 for shape in own) for own in sizes):
            raise CheckpointError(
                f"{where}: dp_group_idx_{group}.gbuf_idx_{number} lacks a bucket, or has one that is not flat; the "
                "folder is of two runs."
            )
        buffers[group].append((dtype, buckets))
    return buffers


@dataclass(frozen=True)
class _Model:
    """The weights of a run as one rank has them.

    Args:
        run: the run.
        tensor: number of tensor-parallel ranks.
        pipeline: number of stages.
        lines: the table, by name.
        layers: number of layers.
        order: the parameters of a layer, in the model's order.
    """

    run: DistRun
    tensor: int
    pipeline: int
    lines: Mapping[str, NativeWeight]
    layers: int
    order: Sequence[str]
    found: dict[Any, dict[str, tuple[Shape, DType]]] = field(default_factory=dict)  # by what `_find_layers` is asked

    @classmethod
    def of(cls, run: DistRun, tensor: int, pipeline: int) -> "_Model":
        """What the arguments and the weights say."""
        where = run.checkpoint.folder
        numbers = {int(match[0]) for name in run.weights if (match := LAYER.search(name))}
        kind = run.args.get("transformer_impl") or "transformer_engine"
        if kind not in _LAYER_ORDER:
            raise CheckpointError(
                f"{where}: the run's transformer_impl is {kind!r}, expected {' or '.join(_LAYER_ORDER)}, whose order "
                f"of parameters is known; save with --dist-ckpt-optim-fully-reshardable, or {LEAVE_OUT}."
            )
        order = [name for name in _LAYER_ORDER[kind] if f"decoder.layers.0.{name}" in run.weights]
        known = {_EMBEDDING, _FINAL_NORM, _HEAD, *(f"decoder.layers.0.{name}" for name in order)}
        others = sorted(name for name in run.weights if LAYER.sub("0", name) not in known)
        if others:
            raise CheckpointError(f"{where}: {others[0]} is not a weight of a Tele-FLM model; it would be lost.")
        return cls(run, tensor, pipeline, {line.name: line for line in run.table}, len(numbers), order)

    def line(self, name: str) -> NativeWeight:
        """A weight's line of the table."""
        return self.lines[LAYER.sub("{}", name)]

    def chunk(self, layers: int, *, first: bool, last: bool) -> dict[str, tuple[Shape, DType]]:
        """The parameters of a virtual stage with so many layers, in the model's order: their shapes on a rank."""
        names = [_EMBEDDING] if first else []
        names += [f"decoder.layers.{layer}.{name}" for layer in range(layers) for name in self.order]
        if last:
            names.append(_FINAL_NORM)
            if not first or _HEAD in self.run.weights:  # a tied model has a head in a stage of its own alone
                names.append(_HEAD)
        return {name: self._local(name) for name in names}

    def flat_rank(self, rank: Rank, chunks: Sequence[Chunk] = ()) -> FlatRank:
        """What decides the layout of a rank's buffers."""
        return FlatRank(rank.pipeline, self.pipeline, chunks, self.run.args, self.lines, rank.file)

    def _local(self, name: str) -> tuple[Shape, DType]:
        weight = self._weight(name)
        line, shape = self.line(name), list(weight.shape)
        if line.parallel != "replicated":
            axis = int(line.parallel == "row")
            if shape[axis] % self.tensor:
                raise CheckpointError(
                    f"{self.run.checkpoint.folder}: {name} has shape {weight.shape}, which {self.tensor} "
                    "tensor-parallel ranks do not share evenly."
                )
            shape[axis] //= self.tensor
        return tuple(shape), weight.dtype

    def _weight(self, name: str) -> ShardedTensor:
        name = LAYER.sub("0", name)
        if name == _HEAD and name not in self.run.weights:
            name = _EMBEDDING  # of a tied model in stages, which stores it once
        if name not in self.run.weights:
            raise CheckpointError(f"{self.run.checkpoint.folder}: {name} is missing.")
        return self.run.weights[name]


def _from_buckets(model: _Model, rank: Rank, buffers: Sequence[tuple[str, _Buckets]]) -> dict[str, list[Chunk]]:
    """A rank's parts of each weight, virtual stage by virtual stage."""
    parts: dict[str, list[Chunk]] = {key: [] for key in (*MOMENTS, MASTER)}
    for virtual, (dtype, buckets) in enumerate(buffers):
        sizes = [bucket.numel for bucket in buckets[MASTER]]
        first = virtual == 0 and rank.pipeline == 0
        last = virtual == len(buffers) - 1 and rank.pipeline == model.pipeline - 1
        weights = _find_layers(model, rank, sizes, first=first, last=last)
        if {str(kind) for _, kind in weights.values()} != {dtype}:
            raise CheckpointError(
                f"{rank.file}: gbuf_idx_{virtual} is of {dtype} weights, the model has others; {LEAVE_OUT}."
            )
        names = list(reversed(weights))
        layout = lay_out_in(_sizes(weights), sizes, alone=model.flat_rank(rank).alone(names))
        assert layout is not None  # it is what the layers were found by
        for key, own in parts.items():
            chunk = {}
            for name, (bucket, start, end) in zip(names, layout.places, strict=True):
                chunk[name] = shaped(buckets[key][bucket][start:end], weights[name][0])
            own.append({name: chunk[name] for name in weights})
    return parts


def _sizes(weights: Mapping[str, tuple[Shape, DType]]) -> list[int]:
    """Elements of each parameter in the order of a buffer: last first."""
    return [math.prod(shape) for shape, _ in reversed([*weights.values()])]


def _find_layers(
    model: _Model, rank: Rank, buckets: Sequence[int], *, first: bool, last: bool
) -> dict[str, tuple[Shape, DType]]:
    """The parameters of the virtual stage whose buffer has buckets of these sizes: as many layers as fill it."""
    flat, asked = model.flat_rank(rank), (first, last, *buckets)
    if asked in model.found:  # as on most ranks
        return model.found[asked]
    for layers in range(model.layers + 1):
        weights = model.chunk(layers, first=first, last=last)
        sizes = _sizes(weights)
        alone = flat.alone(list(reversed(weights)))
        if weights and lay_out_in(sizes, buckets, alone=alone) is not None:
            return model.found.setdefault(asked, weights)
    ends = " with the embedding" * first + " with the head" * last
    raise CheckpointError(
        f"{rank.file}: a buffer has buckets of {list(buckets)} elements, which no number of layers{ends} "
        f"fills; {LEAVE_OUT}."
    )


def _from_gathered(model: _Model, rank: Rank, content: Any) -> dict[str, list[Chunk]]:
    """A rank's parts of each weight in buffers as distrib_optim.pt has them."""
    content = content[0] if isinstance(content, list) and len(content) == 1 else content
    numbers = sorted(key for key in content if type(key) is int) if isinstance(content, dict) else []
    chunks: list[Chunk] = []
    for virtual, number in enumerate(numbers):
        first = virtual == 0 and rank.pipeline == 0
        last = virtual == len(numbers) - 1 and rank.pipeline == model.pipeline - 1
        chunks.append(_chunk_of(model, rank, content[number], first=first, last=last))
    return read_coalesced(content, model.flat_rank(rank, chunks))


def _chunk_of(model: _Model, rank: Rank, buffer: Any, *, first: bool, last: bool) -> Chunk:
    """The parameters of the virtual stage whose gathered buffer this is, as tensors of zeros in their shapes."""
    tensors = next(iter(buffer.values()), None) if isinstance(buffer, dict) else None
    numel = tensors.get("numel_unpadded") if isinstance(tensors, dict) else None
    for layers in range(model.layers + 1):
        weights = model.chunk(layers, first=first, last=last)
        sizes = _sizes(weights)
        alone = model.flat_rank(rank).alone(list(reversed(weights)))
        for bucket_size in (bucket_elements(model.run.args, sum(sizes)), None):
            if weights and sum(lay_out(sizes, alone=alone, bucket_size=bucket_size).buckets) == numel:
                return {name: ShardedTensor.zeros(shape, dtype) for name, (shape, dtype) in weights.items()}
    raise CheckpointError(f"{rank.file}: a buffer has {numel} elements, which no number of layers fills; {LEAVE_OUT}.")


def _whole_halves(tensor: ShardedTensor, line: NativeWeight, ranks: int) -> ShardedTensor:
    """Gate and up of ranks one after the other as torch_dist has them: all of gate, then all of up."""
    if line.rows != "gated" or ranks == 1:
        return tensor
    parts = tensor.split([tensor.shape[0] // (2 * ranks)] * (2 * ranks), 0)
    return ShardedTensor.concatenate([*parts[0::2], *parts[1::2]], 0)

# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Where an optimizer of a training run holds the state of each parameter, however the run is spread over processes.

| run | torch's optimizer steps | of a parameter a process holds |
|---|---|---|
| one process, DDP | the parameters | all |
| FSDP2, tensor parallelism | DTensors | a block |
| ZeRO 1 and 2 | flat float32 partitions, parameters end to end | a stretch of its elements, or nothing |
| ZeRO 3 | likewise, by sub-groups | its own part of every parameter, the last padded |

Whatever a library does when it prepares a run, what counts is which tensors the innermost optimizer steps: so a layout
is read off the prepared optimizer, and is only right until it is prepared once more.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate, Shard

from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.plan import Box
from conversion.checkpoint.reader import boxes_of_range

# What wrappers put into the names of parameters: activation checkpointing, torch.compile, DDP.
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.", "module.")
_WAY_OUT = "or set fresh_optimizer: true and warm up"


@dataclass(frozen=True)
class Part:
    """Elements of a parameter that lie together in one tensor that is stepped.

    Args:
        name: of the parameter.
        boxes: which elements: those of each box in row-major order, one box after another.
        start: where the first of them is in the stepped tensor, or in its local part, flattened.
    """

    name: str
    boxes: tuple[Box, ...]
    start: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return sum(box.numel for box in self.boxes)


@dataclass(frozen=True)
class Slot:
    """One tensor that torch's optimizer steps, the key of its state.

    Args:
        tensor: what is stepped.
        group: its parameter group.
        parts: what of the model is in it.
    """

    tensor: torch.Tensor
    group: Mapping[str, Any]
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Layout:
    """What this process holds of the state of an optimizer.

    Args:
        adam: torch's own optimizer, innermost.
        slots: the tensors it steps here.
        shapes, dtypes: of the trained parameters, by name, everywhere the same: as they are when whole, and the type
            that their moments have.
    """

    adam: torch.optim.Adam
    slots: tuple[Slot, ...]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]


def lay_out(optimizer: Any, model: nn.Module) -> Layout:
    """Find out where a prepared optimizer holds what.

    Args:
        optimizer: Adam or AdamW of torch, in the wrappers of accelerate and DeepSpeed.
        model: whose parameters it trains, as transformers' Trainer names them: `trainer.model`.

    Raises:
        CheckpointError: the optimizer is another, or holds its state in a way that is not known here.
    """
    chain = _unwrap(optimizer)
    adam, owner = chain[-1], type(chain[-2]).__name__ if len(chain) > 1 else ""
    # AdamW derives from Adam; what others derive from either has a state of its own.
    if type(adam) not in (torch.optim.Adam, torch.optim.AdamW) or any(group["amsgrad"] for group in adam.param_groups):
        raise CheckpointError(
            f"the optimizer is {type(adam).__name__}, but grown moments are for torch's Adam and AdamW: set optim: "
            f"adamw_torch, without an optimizer or its offloading in DeepSpeed's configuration, {_WAY_OUT}."
        )
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise CheckpointError(f"grown moments cannot be laid out as FSDP 1 does: set fsdp_version: 2, {_WAY_OUT}.")
    names = {id(parameter): _plain(name) for name, parameter in model.named_parameters()}
    if owner == "DeepSpeedZeroOptimizer":
        return _zero_2(adam, chain[-2], names)
    if owner == "DeepSpeedZeroOptimizer_Stage3":
        return _zero_3(adam, chain[-2], names)
    return _whole_or_blocks(adam, names)


def innermost(optimizer: Any) -> Any:
    """The optimizer that makes the steps, inside whatever wraps it."""
    return _unwrap(optimizer)[-1]


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's parameters by name, as they are when whole."""
    named = ((_plain(name), parameter) for name, parameter in model.named_parameters())
    return {name: tuple(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in named}


def _unwrap(optimizer: Any) -> list[Any]:
    """The optimizer, what it wraps, what that wraps, and so on."""
    chain = [optimizer]
    while getattr(chain[-1], "optimizer", None) is not None:
        chain.append(chain[-1].optimizer)
    return chain


def _plain(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _whole_or_blocks(adam: torch.optim.Adam, names: Mapping[int, str]) -> Layout:
    slots, shapes, dtypes = [], {}, {}
    for group in adam.param_groups:
        for parameter in group["params"]:
            name = names.get(id(parameter))
            if name is None:
                raise CheckpointError(
                    f"the optimizer steps a tensor of shape {tuple(parameter.shape)} that is none of the model's "
                    "parameters: the model was replaced after the optimizer had been made."
                )
            shapes[name], dtypes[name] = tuple(parameter.shape), parameter.dtype
            slots.append(Slot(parameter, group, (Part(name, (_block(name, parameter),), 0),)))
    return Layout(adam, tuple(slots), shapes, dtypes)


def _block(name: str, parameter: torch.Tensor) -> Box:
    """The elements of a parameter that this process has."""
    if not isinstance(parameter, DTensor):
        return Box.whole(parameter.shape)
    # Their subclasses interleave blocks.
    if not all(type(placement) in (Shard, Replicate) for placement in parameter.placements):
        raise CheckpointError(f"grown moments cannot be laid out as {name} is, {parameter.placements}, {_WAY_OUT}.")
    chunk = parameter.__create_chunk_list__()[0]
    return Box(tuple(chunk.offsets), tuple(chunk.sizes))


def _zero_2(adam: torch.optim.Adam, zero: Any, names: Mapping[int, str]) -> Layout:
    """DeepSpeedZeroOptimizer, of ZeRO 1 and 2: a flat partition for each group of parameters."""
    slots, shapes, dtypes = [], {}, {}
    for group, flat, members in zip(
        adam.param_groups, zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True
    ):
        parts = []
        for parameter in members:
            name = names[id(parameter)]
            shapes[name], dtypes[name] = tuple(parameter.shape), flat.dtype
            if (fragment := parameter._hp_mapping) is None:
                continue
            here, there = fragment.hp_fragment_address, fragment.lp_fragment_address
            parts.append(_stretch(name, shapes[name], there.start, there.numel, here.start))
            weights = parameter.detach().flatten()[there.start : there.start + there.numel]
            _check_masters(name, flat, here.start, weights)
        slots.append(Slot(flat, group, tuple(parts)))
    return Layout(adam, tuple(slots), shapes, dtypes)


def _zero_3(adam: torch.optim.Adam, zero: Any, names: Mapping[int, str]) -> Layout:
    """DeepSpeedZeroOptimizer_Stage3: a flat partition for each of its sub-groups."""
    if getattr(zero, "swap_optimizer", False):
        raise CheckpointError(f"grown moments cannot be laid out while ZeRO 3 swaps them to disk; do not, {_WAY_OUT}.")
    slots, shapes, dtypes = [], {}, {}
    for index, (flat, members) in enumerate(zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)):
        parts = []
        for parameter in members:
            name = names[id(parameter)]
            shapes[name], dtypes[name] = tuple(parameter.ds_shape), flat.dtype
            _, start, padded = zero.grad_position[zero.get_param_id(parameter)]
            first = padded * zero._get_param_partition_rank(parameter)
            numel = max(0, min(padded, parameter.ds_numel - first))  # the last process may have padding alone
            if numel:
                parts.append(_stretch(name, shapes[name], first, numel, start))
                _check_masters(name, flat, start, parameter.ds_tensor.detach().flatten()[:numel])
        group = adam.param_groups[zero.sub_group_to_group_id[index]]
        slots.append(Slot(flat, group, tuple(parts)))
    return Layout(adam, tuple(slots), shapes, dtypes)


def _stretch(name: str, shape: tuple[int, ...], first: int, numel: int, start: int) -> Part:
    return Part(name, tuple(boxes_of_range(shape, first, first + numel)), start)


def _check_masters(name: str, flat: torch.Tensor, start: int, weights: torch.Tensor) -> None:
    """Adam works element by element: where the float32 master of a weight lies, its moments belong."""
    masters = flat.detach()[start : start + weights.numel()]
    if not torch.equal(masters.to(weights.device, weights.dtype), weights):
        raise CheckpointError(
            f"DeepSpeed's partition does not hold the weights of {name} where its tables say, as happens with "
            f"round_robin_gradients; grown moments cannot be laid out there. Do without, use FSDP 2, {_WAY_OUT}."
        )


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def blocks(boxes: tuple[Box, ...], most: int) -> Iterator[Box]:
    """Cut boxes into smaller ones of about `most` elements, in row-major order."""
    for box in boxes:
        if not box.numel:
            continue
        if not box.size:
            yield box
            continue
        rows = max(1, most // max(1, box.numel // box.size[0]))
        for first in range(0, box.size[0], rows):
            count = min(rows, box.size[0] - first)
            yield Box((box.start[0] + first, *box.start[1:]), (count, *box.size[1:]))


__all__ = ["Layout", "Part", "Slot", "blocks", "innermost", "lay_out", "local", "parameter_shapes"]

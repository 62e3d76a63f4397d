# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""A training checkpoint that is open for planning, whatever wrote it: what every reader of this package returns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from ..checkpoint.dtypes import DType
from ..checkpoint.plan import View
from ..checkpoint.sharded import ShardedTensor
from .table import NativeWeight, RowOrder

NO_FSDP_DTENSOR_OPTIMIZER = "the optimizer of Megatron-FSDP is not converted; leave --optimizer and --fp32-master out."
NativeFormat: TypeAlias = Literal["megatron", "torch_dist", "fsdp_dtensor", "dcp", "deepspeed"]


@dataclass(frozen=True)
class Replica:
    """Two windows that must hold the same bytes, because the training run kept two copies of one tensor.

    Args:
        name: the native tensor's name.
        first: of the copy that is converted.
        second: of the other.
        places: where both are, for messages: `rank 0` and `rank 1`.
    """

    name: str
    first: View
    second: View
    places: tuple[str, str]


@dataclass(frozen=True)
class AdamMoments:
    """What Adam keeps in a training checkpoint; nothing is loaded.

    Args:
        moments: `exp_avg` and `exp_avg_sq` -> every weight that was trained, by the names of the checkpoint's own.
        steps: name of a weight -> updates done.
        groups: the parameter groups: their settings, without `params`, and the names of their weights.
    """

    moments: Mapping[str, Mapping[str, ShardedTensor]]
    steps: Mapping[str, float]
    groups: Sequence[tuple[Mapping[str, Any], Sequence[str]]]


@dataclass(frozen=True)
class NativeCheckpoint:
    """A training checkpoint; no tensor is loaded.

    Args:
        folder: its absolute path.
        format: what wrote it.
        parallel: its sizes in words, for people and for the record: `tensor parallel 2 x pipeline parallel 2`.
        iteration: the step it was saved at, if it says.
        args: the arguments of the training run, if it holds them; plain values only.
        tensors: every weight by its name in the table, with its layer's global number; optimizer states, random
            states and the like left out.
        table: what the names mean; None if they are the Hub's own.
        order: what the rows mean.
        dtype: what the weights are cast to unless the user says otherwise; each tensor's own if None.
        replicas: copies to compare before converting.
        notes: what a user should know, one sentence each.
        adam: the optimizer's state, if that was asked for.
        masters: by name, the optimizer's weights and those of the model, which they become when they are rounded; to
            compare before converting.
    """

    folder: str
    format: NativeFormat
    parallel: str
    iteration: int | None
    args: Mapping[str, Any]
    tensors: Mapping[str, ShardedTensor]
    table: Sequence[NativeWeight] | None
    order: RowOrder = field(default_factory=RowOrder)
    dtype: DType | None = None
    replicas: Sequence[Replica] = ()
    notes: Sequence[str] = ()
    adam: AdamMoments | None = None
    masters: Mapping[str, tuple[ShardedTensor, ShardedTensor]] = field(default_factory=dict)

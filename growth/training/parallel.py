# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Processes that compute the same rows together: each a part of every matrix (TP), or of every row (CP, Ulysses).

accelerate takes their numbers from its own file (`parallelism_config`). What does not go together with them is refused
here before a model is loaded; the libraries say so after it, in the first step, or not at all.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments
from transformers.distributed import DistributedConfig

from .errors import RunError

_MATRICES = 7  # of a layer: q, k, v, o, gate, up, down


@dataclass(frozen=True)
class Parallelism:
    """How many processes share what.

    Args:
        tensor: parts of each matrix (`tp_size`).
        context: parts of each row, attention in a ring (`cp_size`).
        sequence: parts of each row, attention by heads (`sp_size`: Ulysses).
    """

    tensor: int = 1
    context: int = 1
    sequence: int = 1

    @property
    def together(self) -> int:
        """Processes that compute the same rows."""
        return self.tensor * self.context * self.sequence


def read_parallelism(environment: Mapping[str, str]) -> Parallelism:
    """What `accelerate launch` was told.

    Raises:
        RunError: a number is none.
    """
    if environment.get("ACCELERATE_USE_PARALLELISM_CONFIG", "").lower() not in ("true", "1"):
        return Parallelism()
    sizes = {}
    for field, name in (("tensor", "TP"), ("context", "CP"), ("sequence", "SP")):
        text = environment.get(f"PARALLELISM_CONFIG_{name}_SIZE", "1")
        if not (text.isascii() and text.isdigit() and int(text) > 0):
            raise RunError(
                f"parallelism_config_{name.lower()}_size is {text!r} in accelerate's file; expected 1 or more."
            )
        sizes[field] = int(text)
    return Parallelism(**sizes)


def data_parallel_size(args: TrainingArguments) -> int:
    """How many rows are computed at once, at one row a process."""
    return int(args.world_size) // read_parallelism(os.environ).together


def check_parallelism(
    parallelism: Parallelism, args: Any, launched: DistributedType, *, adapters: bool, trainer: str = "sft"
) -> None:
    """Check that a run can be spread so.

    Args:
        parallelism: see [`read_parallelism`].
        args: of the run.
        launched: how it is spread besides.
        adapters: whether adapters are trained.
        trainer: `sft`, which alone has been tried so.

    Raises:
        RunError: it cannot, with the way out.
    """
    tensor, context, sequence = parallelism.tensor, parallelism.context, parallelism.sequence
    if parallelism.together > 1 and trainer != "sft":
        raise RunError(
            f"accelerate's file has a parallelism_config, of {parallelism.together} processes that compute the same "
            f"rows; that is for fine-tuning with trainer sft, not for {trainer}."
        )
    if parallelism.together > 1 and args.world_size % parallelism.together:
        raise RunError(
            f"parallelism_config has {parallelism.together} processes compute the same rows, and {args.world_size} "
            "run: start a multiple."
        )
    if tensor > 1 and adapters:
        raise RunError(
            f"tp_size is {tensor} and use_peft is true: PEFT's adapters cannot be computed beside split matrices. Take "
            "fsdp2 or zero3 for adapters."
        )
    if tensor > 1 and launched == DistributedType.DEEPSPEED:
        raise RunError(f"tp_size is {tensor} under DeepSpeed, which would not know of it. Take the shipped file tp.")
    if sequence > 1 and launched != DistributedType.DEEPSPEED:
        raise RunError(f"sp_size is {sequence}, and the run is {launched.value}: Ulysses is DeepSpeed's.")
    if context > 1 and launched != DistributedType.FSDP:
        raise RunError(f"cp_size is {context}, and the run is {launched.value}: it needs FSDP, version 2.")
    name, size, parts = ("cp_size", context, 2 * context) if context > 1 else ("sp_size", sequence, sequence)
    if size == 1:
        return
    for key in ("packing", "eval_packing", "padding_free"):
        if getattr(args, key, None):
            raise RunError(
                f"{name} is {size} and {key} is true: rows cannot be cut where several share one. Set it false."
            )
    multiple = getattr(args, "pad_to_multiple_of", None)
    if not multiple or multiple % parts:
        raise RunError(
            f"{name} is {size} and pad_to_multiple_of is {multiple}: rows are cut into {parts} parts of one length. "
            f"Set a multiple of {parts}."
        )


def loading_of(parallelism: Parallelism) -> dict[str, Any]:
    """What `from_pretrained` has to be told for a model whose matrices are split."""
    return {"distributed_config": DistributedConfig(tp_size=parallelism.tensor)} if parallelism.tensor > 1 else {}


def check_split(model: nn.Module, parallelism: Parallelism, layers: int) -> None:
    """Check that the matrices of a model are split.

    Raises:
        RunError: they are not.
    """
    split = sum(
        isinstance(parameter, DTensor) and "tp" in (parameter.device_mesh.mesh_dim_names or ())
        for parameter in model.parameters()
    )
    if parallelism.tensor > 1 and split < _MATRICES * layers:
        raise RunError(
            f"tp_size is {parallelism.tensor}, and {split} of the {_MATRICES * layers} matrices of the layers are "
            "split; the others are whole in every process."
        )


__all__ = [
    "Parallelism",
    "check_parallelism",
    "check_split",
    "data_parallel_size",
    "loading_of",
    "read_parallelism",
]

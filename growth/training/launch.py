# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Checks that a run is spread over as many processes, and in the way, that it was asked to be.

- accelerate replicates where it was told to shard, and starts one process where it was told to start several, if it
  finds no accelerators. [`check_launch`] compares what was asked for with what there is, before a model is loaded.
- FSDP shards nothing but the root if no layer has the name that it was told to wrap. [`WrappingGuard`] counts.
"""

import gc
import os
from collections.abc import Mapping, MutableMapping
from typing import Any, Literal, TypeAlias

import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from .errors import RunError
from .parallel import check_split, read_parallelism

# How a run may be asked to be spread, in accelerate's words.
DistributedName: TypeAlias = Literal["NO", "MULTI_CPU", "MULTI_GPU", "FSDP", "DEEPSPEED"]


def check_spread(trainer: Trainer, launched: DistributedType) -> None:
    """Check that a trainer, once built, is distributed as `check_launch` foretold.

    Raises:
        RunError: it is not.
    """
    found = trainer.accelerator.distributed_type
    if found != launched:
        raise RunError(f"the run is {found.value}, expected {launched.value}.")


def check_launch(
    args: TrainingArguments,
    environment: Mapping[str, str],
    *,
    num_processes: int | None = None,
    distributed_type: DistributedName | None = None,
) -> DistributedType:
    """Check that this process is one of as many, distributed as, the run's settings and the launcher say.

    Args:
        args: the run's, in which accelerate says what it has found (`distributed_state`), and which may ask for FSDP
            or DeepSpeed.
        environment: the variables with which a launcher says what it was told.
        num_processes, distributed_type: what the settings ask for, if anything.

    Returns:
        what accelerate will make of it: until a trainer is built, it knows of neither FSDP nor DeepSpeed.

    Raises:
        RunError: something else was asked for.
    """
    state: PartialState = args.distributed_state
    found = state.distributed_type
    on_accelerators = found not in (DistributedType.NO, DistributedType.MULTI_CPU)
    if _is_set(environment, "ACCELERATE_USE_FSDP") or args.fsdp_plugin_args is not None:
        if not on_accelerators:
            raise RunError(
                f"accelerate was told to shard with FSDP, but this run is {found.value} on {state.device.type}: "
                "accelerate shards on accelerators alone. Delete use_cpu, or launch without FSDP."
            )
        found = DistributedType.FSDP
    if _is_set(environment, "ACCELERATE_USE_DEEPSPEED") or args.deepspeed_plugin is not None:
        if _is_set(environment, "ACCELERATE_USE_CPU"):
            raise RunError(
                f"accelerate was told to use DeepSpeed and use_cpu, so this run is {found.value}: it leaves DeepSpeed "
                "out. Delete use_cpu from its file; on CPUs set it in the run's settings, and DS_ACCELERATOR=cpu."
            )
        found = DistributedType.DEEPSPEED
        _check_precision(args, environment)
    launched = environment.get("WORLD_SIZE", "")
    if launched.isdigit() and int(launched) != state.num_processes:
        raise RunError(
            f"the launcher started {launched} processes, but each believes it is one of {state.num_processes}: all "
            "would train the same and overwrite each other. On CPUs, set use_cpu: true."
        )
    if num_processes not in (None, state.num_processes):
        raise RunError(
            f"num_processes is {num_processes} in the settings, but {state.num_processes} run. `accelerate launch "
            "--cpu` starts one, whatever it is told; torchrun --nproc_per_node starts as many as it is told."
        )
    if distributed_type not in (None, found.value):
        raise RunError(f"distributed_type is {distributed_type} in the settings, but this run is {found.value}.")
    return found


def _check_precision(args: TrainingArguments, environment: Mapping[str, str]) -> None:
    """That DeepSpeed computes in what the settings say; a Trainer finds out after the model is loaded."""
    told = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    own = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
    if "mixed_precision" in environment.get("ACCELERATE_CONFIG_DS_FIELDS", "").split(",") and told != own:
        raise RunError(
            f"mixed_precision is {told} in accelerate's file, and {own} in the settings (bf16: "
            f"{str(args.bf16).lower()}, fp16: {str(args.fp16).lower()}); DeepSpeed takes the one, and the run the "
            "other. Make them equal."
        )


def settle_checkpointing(
    args: TrainingArguments, environment: MutableMapping[str, str], *, adapters: bool = False
) -> Literal["FSDP", "the model"] | None:
    """Where FSDP and the model are both told to checkpoint activations, let one of them do it.

    A Trainer refuses the two, after it has loaded the model. FSDP does it better: it gathers a layer once. But it
    renames modules, and PEFT, which looks for adapters by these names, then saves none, in no kind of checkpoint.

    Args:
        args: of the run; its `activation_checkpointing` is switched off if FSDP does it.
        environment: the variables with which a launcher says what it was told; FSDP's is changed if the model does it.
        adapters: whether adapters are trained.

    Returns:
        who checkpoints them, if anything was changed.
    """
    configured: Any = args.fsdp_config if isinstance(args.fsdp_config, dict) else {}
    by_launcher = _is_set(environment, "ACCELERATE_USE_FSDP") and _is_set(environment, "FSDP_ACTIVATION_CHECKPOINTING")
    if not by_launcher and not configured.get("activation_checkpointing"):
        return None
    if adapters:
        environment["FSDP_ACTIVATION_CHECKPOINTING"] = "false"
        configured.pop("activation_checkpointing", None)
        args.activation_checkpointing = args.gradient_checkpointing = True
        return "the model"
    if not args.activation_checkpointing:
        return None
    args.activation_checkpointing = args.gradient_checkpointing = False
    return "FSDP"


def _is_set(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "").lower() in ("true", "1")


class WrappingGuard(TrainerCallback):
    """Stops a run before its first step if its model is not spread as its distributed type says.

    Attributes:
        wrapped: from [`count_wrapped`], once training has begun.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.wrapped: dict[str, int] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raise [`RunError`] on a mismatch."""
        accelerator = self.trainer.accelerator
        self.wrapped = count_wrapped(self.trainer.model_wrapped)
        plugin = accelerator.state.deepspeed_plugin
        model: Any = self.trainer.model
        stage = plugin.zero_stage if plugin else 0
        parallelism, layers = read_parallelism(os.environ), model.config.num_hidden_layers
        check_split(model, parallelism, layers)
        if parallelism.tensor == 1 or args.world_size > parallelism.tensor:  # else there is nothing to exchange
            check_wrapped(self.wrapped, accelerator.distributed_type, layers, zero_stage=stage)


def count_wrapped(model: nn.Module) -> dict[str, int]:
    """How a model is spread over processes.

    Returns:
        `replicated`: modules under DDP; `sharded_modules`: those that FSDP, of either version, shards on their own, the
        root among them; `sharded_layers`: the decoder's layers among these; `sharded_parameters`, `parameters`: those
        of which ZeRO-3 keeps a part here, and all.
    """
    modules, parameters = list(model.modules()), list(model.parameters())
    # FSDP2 shards a module in place, and accelerate also embedding, norm and head; FSDP1 puts a module around it.
    sharded = [module for module in modules if isinstance(module, FSDPModule | FullyShardedDataParallel)]
    inside = [module.module if isinstance(module, FullyShardedDataParallel) else module for module in sharded]
    return {
        "replicated": sum(isinstance(module, DistributedDataParallel) for module in modules),
        "sharded_modules": len(sharded),
        "sharded_layers": sum(isinstance(module, LlamaDecoderLayer) for module in inside),
        "sharded_parameters": sum(hasattr(parameter, "ds_tensor") for parameter in parameters),
        "parameters": len(parameters),
    }


def check_wrapped(wrapped: Mapping[str, int], distributed_type: DistributedType, layers: int, zero_stage: int) -> None:
    """Check that a model is spread as it should be.

    Args:
        wrapped: from [`count_wrapped`].
        distributed_type: what accelerate says that it has done.
        layers: the model's; each of them is to be sharded on its own.
        zero_stage: of DeepSpeed.

    Raises:
        RunError: layers are not sharded, or the model is not replicated where it should be.
    """
    if distributed_type == DistributedType.FSDP and wrapped["sharded_layers"] < layers:
        raise RunError(
            f"FSDP shards {wrapped['sharded_layers']} of the {layers} layers on their own: every step would gather the "
            "whole model. Set fsdp_transformer_layer_cls_to_wrap to LlamaDecoderLayer."
        )
    if zero_stage == 3 and wrapped["sharded_parameters"] < wrapped["parameters"]:
        raise RunError(
            f"ZeRO-3 shards {wrapped['sharded_parameters']} of {wrapped['parameters']} parameters; the others are whole"
            " in every process."
        )
    replicas = (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if distributed_type in replicas and wrapped["replicated"] != 1:
        raise RunError(
            f"the run is {distributed_type.value}, but nothing exchanges the gradients of its processes; each would "
            "train a model of its own."
        )


def leave_processes(*, together: bool = True) -> None:
    """End what the processes of a run share, once nothing of the caller's refers to its model.

    One that ends with it open may be aborted by what the others do to theirs. And a sharded model refers to the group
    in cycles, so destroying the group does not end its threads: one that still holds a tensor while the interpreter
    is taken down calls `std::terminate`, and the run that succeeded exits with SIGABRT (gloo, torch 2.13: 7 of 100
    two-process runs under load, none of 100 with the collection).

    Args:
        together: wait for the others first; every process has to call it. Without, this one ends alone.
    """
    if dist.is_available() and dist.is_initialized():
        if together:
            dist.barrier()
        dist.destroy_process_group()
        gc.collect()


__all__ = [
    "DistributedName",
    "WrappingGuard",
    "check_launch",
    "check_spread",
    "check_wrapped",
    "count_wrapped",
    "leave_processes",
    "settle_checkpointing",
]

# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Checks before the first step, of faults that a training loss does not show.

- TRL computes the loss from the hidden states and `lm_head.weight`; the model's own `forward`, and with it a factor on
  the logits, is bypassed. TRL applies the factor itself if the configuration names it `logit_scale`; else the loss is
  wrong, and at initialization differs from the right one in the fourth digit only. [`FusedLossGuard`] compares the two.
- TRL drops rows and cuts tokens without a word. [`check_trained_tokens`] counts what reached the trainer.
- accelerate replicates where it was told to shard, and starts one process where it was told to start several, if it
  finds no accelerators. [`check_launch`] compares what was asked for with what there is, before a model is loaded.
- FSDP shards nothing but the root if no layer has the name that it was told to wrap. [`WrappingGuard`] counts.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyarrow.compute as pc
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import DPOTrainer, SFTTrainer

from sft import SFTError
from sft.data.labels import IGNORE_INDEX
from sft.training.recipe import RunArguments

# Standard deviation that the logits are brought to before log-probabilities are compared. A factor k on logits moves
# log-probabilities by (k - 1) times about this; with the 0.001 of an untrained Tele-FLM, no precision would show it.
_LOGIT_STD = 4.0
# Of the spread of the log-probabilities. Rounding to bfloat16 makes a gap of 2e-3, the published factors of 0.03125 and
# 0.025 one of about 100.
_TOLERANCE = 0.02
_PROBE_TOKENS = 128


class GuardError(SFTError):
    """What would be trained is not what was asked for."""


# --- the loss ---------------------------------------------------------------------------------------------------------


class FusedLossGuard(TrainerCallback):
    """Stops a run before its first step if TRL's fused loss is not the loss of the model. See [`fused_loss_gap`].

    A callback, because only when training begins is the model what the steps will call: wrapped for distribution,
    sharded, under autocast.
    """

    def __init__(self, trainer: SFTTrainer | DPOTrainer):
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raise [`GuardError`] on a mismatch."""
        model: Any = self.trainer.model
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        gap = fused_loss_gap(self.trainer.model_wrapped, base, device=args.device)
        if not gap <= _TOLERANCE:
            raise GuardError(
                f"TRL's fused loss is not the loss of {type(base).__name__}: log-probabilities differ by {gap:.2g} of "
                f"their spread (at most {_TOLERANCE} is rounding). A factor on the logits must be readable as "
                f"config.logit_scale, which {type(base.config).__name__} gives as "
                f"{getattr(base.config, 'logit_scale', None)}; upgrade teleflm or trl."
            )


@torch.no_grad()
def fused_loss_gap(model: nn.Module, base: PreTrainedModel, device: torch.device | str = "cpu") -> float:
    """How far the log-probabilities of TRL's fused head are from those of the model's own logits.

    Both come from `model`, from one short row, with the hidden states scaled so that a factor on the logits is visible
    in any precision. The model is left as it was: mode, gradients, random state.

    Args:
        model: what a training step calls, after `trl.trainer.utils.add_fused_lm_head`: `base` or a wrapper of it.
        base: the causal language model inside.
        device: where `model` expects its inputs.

    Returns:
        the root mean square of the differences, divided by the standard deviation of the log-probabilities; 0 is equal.
    """
    length = min(_PROBE_TOKENS, base.config.max_position_embeddings)
    input_ids = (torch.arange(length, device=device) % base.config.vocab_size)[None]
    targets = input_ids[:, 1:, None]

    # Eager, because a graph compiled now would keep the scaling of the hidden states after its hook is gone.
    with _evaluating(base), torch.compiler.set_stance("force_eager"):
        logits = model(input_ids=input_ids, use_cache=False).logits
        with _scaled_hidden_states(base, _LOGIT_STD / logits.float().std()):
            logits = model(input_ids=input_ids, use_cache=False).logits
            fused = model(input_ids=input_ids, labels=input_ids, use_cache=False, fused_lm_head=True).log_probs
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # the root waits for a backward pass, and shows its parameters whole until then

    native = logits[:, :-1].float().log_softmax(-1).gather(-1, targets).squeeze(-1)
    difference = fused.float() - native
    return (difference.square().mean().sqrt() / native.std()).item()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without dropout; each module gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _scaled_hidden_states(model: PreTrainedModel, factor: torch.Tensor) -> Iterator[None]:
    def scale(module: nn.Module, args: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state * factor
        return output

    hook = model.base_model.register_forward_hook(scale)
    try:
        yield
    finally:
        hook.remove()


# --- the labels -------------------------------------------------------------------------------------------------------


def check_trained_tokens(dataset: Dataset, expected: int) -> None:
    """Check that a trainer's prepared dataset trains on as many tokens as were handed to it.

    Args:
        dataset: `trainer.train_dataset`, packed or not, with a column `labels`.
        expected: the number of labels that are not -100 before.

    Raises:
        GuardError: tokens were lost, or masked and unmasked.
    """
    labels = pc.list_flatten(dataset.with_format("arrow")["labels"])
    found = pc.sum(pc.not_equal(labels, IGNORE_INDEX)).as_py() or 0
    if found != expected:
        raise GuardError(
            f"{expected} tokens of the conversations are to be trained on, but {found} reached the trainer: TRL cut or "
            "masked the rest. Check max_length and packing_strategy."
        )


# --- the processes ----------------------------------------------------------------------------------------------------


def check_launch(run: RunArguments, state: PartialState, environment: Mapping[str, str]) -> DistributedType:
    """Check that this process is one of as many, distributed as, the recipe and the launcher say.

    Args:
        run: what the recipe expects, if anything.
        state: what accelerate has found; `TrainingArguments.distributed_state`.
        environment: the variables with which a launcher says what it was told.

    Returns:
        what accelerate will make of it: until a trainer is built, it knows of neither FSDP nor DeepSpeed.

    Raises:
        GuardError: something else was asked for.
    """
    found = state.distributed_type
    on_accelerators = found not in (DistributedType.NO, DistributedType.MULTI_CPU)
    if _is_set(environment, "ACCELERATE_USE_FSDP"):
        if not on_accelerators:
            raise GuardError(
                f"accelerate was told to shard with FSDP, but this run is {found.value} on {state.device.type}: "
                "accelerate shards on accelerators alone. Delete use_cpu, or launch without FSDP."
            )
        found = DistributedType.FSDP
    if _is_set(environment, "ACCELERATE_USE_DEEPSPEED"):
        if _is_set(environment, "ACCELERATE_USE_CPU"):
            raise GuardError(
                f"accelerate was told to use DeepSpeed and use_cpu, so this run is {found.value}: it leaves DeepSpeed "
                "out. Delete use_cpu from its file; on CPUs set it in the recipe, and DS_ACCELERATOR=cpu."
            )
        found = DistributedType.DEEPSPEED
    launched = environment.get("WORLD_SIZE", "")
    if launched.isdigit() and int(launched) != state.num_processes:
        raise GuardError(
            f"the launcher started {launched} processes, but each believes it is one of {state.num_processes}: all "
            "would train the same and overwrite each other. On CPUs, set use_cpu: true."
        )
    if run.num_processes not in (None, state.num_processes):
        raise GuardError(
            f"num_processes is {run.num_processes} in the recipe, but {state.num_processes} run. `accelerate launch "
            "--cpu` starts one, whatever it is told; torchrun --nproc_per_node starts as many as it is told."
        )
    if run.distributed_type not in (None, found.value):
        raise GuardError(f"distributed_type is {run.distributed_type} in the recipe, but this run is {found.value}.")
    return found


def _is_set(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "").lower() in ("true", "1")


class WrappingGuard(TrainerCallback):
    """Stops a run before its first step if its model is not spread as its distributed type says.

    Attributes:
        wrapped: from [`count_wrapped`], once training has begun.
    """

    def __init__(self, trainer: SFTTrainer | DPOTrainer):
        self.trainer = trainer
        self.wrapped: dict[str, int] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raise [`GuardError`] on a mismatch."""
        accelerator = self.trainer.accelerator
        self.wrapped = count_wrapped(self.trainer.model_wrapped)
        plugin = accelerator.state.deepspeed_plugin
        model: Any = self.trainer.model
        stage = plugin.zero_stage if plugin else 0
        check_wrapped(self.wrapped, accelerator.distributed_type, model.config.num_hidden_layers, zero_stage=stage)


def count_wrapped(model: nn.Module) -> dict[str, int]:
    """How a model is spread over processes.

    Returns:
        `replicated`: modules under DDP; `sharded_modules`: those that FSDP, of either version, shards on their own, the
        root among them; `sharded_parameters`, `parameters`: those of which ZeRO-3 keeps a part here, and all.
    """
    modules, parameters = list(model.modules()), list(model.parameters())
    return {
        "replicated": sum(isinstance(module, DistributedDataParallel) for module in modules),
        "sharded_modules": sum(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in modules),
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
        GuardError: layers are not sharded, or the model is not replicated where it should be.
    """
    if distributed_type == DistributedType.FSDP and wrapped["sharded_modules"] < layers + 1:
        raise GuardError(
            f"FSDP shards {wrapped['sharded_modules']} modules on their own, expected the {layers} layers and the root:"
            " every step would gather the whole model. Set fsdp_transformer_layer_cls_to_wrap to LlamaDecoderLayer."
        )
    if zero_stage == 3 and wrapped["sharded_parameters"] < wrapped["parameters"]:
        raise GuardError(
            f"ZeRO-3 shards {wrapped['sharded_parameters']} of {wrapped['parameters']} parameters; the others are whole"
            " in every process."
        )
    replicas = (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if distributed_type in replicas and wrapped["replicated"] != 1:
        raise GuardError(
            f"the run is {distributed_type.value}, but nothing exchanges the gradients of its processes; each would "
            "train a model of its own."
        )


__all__ = [
    "FusedLossGuard",
    "GuardError",
    "WrappingGuard",
    "check_launch",
    "check_trained_tokens",
    "check_wrapped",
    "count_wrapped",
    "fused_loss_gap",
]

# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""That a run fits the memory it has, found out before a weight is loaded: by the plan of its recipe and its launch.

A run that needs more than there is fails after an hour of loading, at its first long row, with a traceback of the
allocator. [`check_memory`] refuses it, by [`sft.plan`]. What the plan does not model (offloading, optimizers of 8 bits,
...) is left out of the sum, never guessed, and the rest divided by what an estimate has been above a measured peak at
most: what is refused needs more than there is. Where only the whole estimate is above, a warning says so.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from transformers import AutoConfig
from transformers.training_args import OptimizerNames

from conversion.architecture import Architecture
from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.limits import usable_memory
from conversion.checkpoint.sizes import format_bytes
from sft import SFTError
from sft.plan import GREATEST_EXCESS, Method, Setup, Strategy, estimate_memory, plan_training
from sft.training.recipe import Recipe

logger = logging.getLogger(__name__)

_STATES = ("weights", "gradients", "optimizer")
_WITHIN_LAYERS = ("activations", "working")
_ALL = (*_STATES, "gathered", *_WITHIN_LAYERS)
_LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
_ADAM = (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED)
_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_SHOWN = 3  # ways out


class MemoryPlanError(SFTError):
    """A run needs more memory than there is. No weight was loaded."""


@dataclass(frozen=True)
class Described:
    """A recipe and its launch, as the plan knows them.

    Args:
        setup: of the plan.
        unknown: what the plan does not model -> the parts of its sum that this could make smaller.
    """

    setup: Setup
    unknown: Mapping[str, tuple[str, ...]]

    @property
    def certain(self) -> tuple[str, ...]:
        """The parts of [`sft.plan.Memory`] that nothing makes smaller."""
        left_out = {part for parts in self.unknown.values() for part in parts}
        return tuple(part for part in _ALL if part not in left_out)


def check_memory(
    recipe: Recipe, launched: DistributedType, environment: Mapping[str, str], dataset: Any, *, ignore: bool = False
) -> None:
    """Compare what a run will need of this process's device with what that has; every process does so by itself.

    Args:
        recipe: of the run.
        launched: how it is spread, see [`growth.training.launch.check_launch`].
        environment: the variables with which a launcher says what it was told.
        dataset: the rows to train on, tokenized and packed.
        ignore: only warn.

    Raises:
        MemoryPlanError: it needs more.
    """
    available = available_memory(recipe.training.device, environment)
    architecture = _architecture(recipe)
    if available is None or architecture is None:
        return
    described = describe_setup(recipe, launched, environment, measure_rows(dataset))
    setup = described.setup
    parts = estimate_memory(architecture, setup, overhead=False)
    needed = sum(getattr(parts, part) for part in described.certain) / GREATEST_EXCESS
    device = "GPU" if setup.on_gpu else "process"
    left_out = f"; not counted, as the plan does not know them: {', '.join(described.unknown)}"
    if needed > available:
        sizes = ", ".join(f"{part} {format_bytes(getattr(parts, part))}" for part in described.certain)
        message = (
            f"this run needs at least {format_bytes(needed)} on each {device}, which has {format_bytes(available)} (by "
            f"the plan: {sizes}{left_out if described.unknown else ''}). "
            f"{_ways_out(architecture, setup, available)}ignore_memory_plan: true tries it nevertheless."
        )
        if not ignore:
            raise MemoryPlanError(message)
        logger.warning("%s", message)
        return
    total = estimate_memory(architecture, setup).total
    if described.unknown:
        logger.info("memory: %s of %s%s", format_bytes(needed), format_bytes(available), left_out)
    elif total > available:
        logger.warning(
            "this run may need %s on each %s, which has %s: it fits only if less is lost to fragmentation and "
            "communication than `teleflm sft plan` assumes",
            format_bytes(total),
            device,
            format_bytes(available),
        )


def available_memory(device: torch.device, environment: Mapping[str, str]) -> int | None:
    """Bytes that this process can have: of its GPU; on CPUs its part of the machine's; None where nothing tells."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type != "cpu":
        return None
    memory, here = usable_memory(), environment.get("LOCAL_WORLD_SIZE", "1")
    return memory // max(1, int(here)) if memory is not None and here.isdigit() else memory


@dataclass(frozen=True)
class Rows:
    """How many rows there are, and the tokens of the longest and of the mean one."""

    count: int
    longest: int
    mean: int


def measure_rows(dataset: Any) -> Rows | None:
    """The rows of a dataset; None if that cannot be told without reading all of them, or if there are none."""
    if not isinstance(dataset, Dataset) or "input_ids" not in dataset.column_names or not len(dataset):
        return None
    batches = dataset.select_columns("input_ids").with_format("arrow").iter(10_000)
    lengths = [pc.list_value_length(batch["input_ids"]) for batch in batches]
    total = sum(pc.sum(length).as_py() for length in lengths)
    return Rows(len(dataset), max(pc.max(length).as_py() for length in lengths), total // len(dataset))


def describe_setup(
    recipe: Recipe, launched: DistributedType, environment: Mapping[str, str], rows: Rows | None = None
) -> Described:
    """A run as [`sft.plan`] knows it.

    Args:
        recipe: of the run.
        launched: how it is spread.
        environment: the variables with which a launcher says what it was told.
        rows: that are trained on; unless given, as long as the recipe allows.
    """
    args, model = recipe.training, recipe.model
    method: Method = "full" if not model.use_peft else "qlora" if model.load_in_4bit else "lora"
    # The launcher's word counts where the recipe's is false: accelerate does not tell unset from false.
    is_mixed = bool(args.bf16 or args.fp16) or environment.get("ACCELERATE_MIXED_PRECISION") in ("bf16", "fp16")
    weight_bytes = _BYTES.get(str(model.dtype), 2)
    if launched == DistributedType.DEEPSPEED and is_mixed:
        weight_bytes = 2  # it casts the whole model
    by_fsdp = launched == DistributedType.FSDP and _fsdp(args, environment, "activation_checkpointing")
    strategies: dict[DistributedType, Strategy] = {DistributedType.FSDP: "fsdp2", DistributedType.DEEPSPEED: "zero3"}
    stage = _zero_stage(args) if launched == DistributedType.DEEPSPEED else None
    micro_batch_size = 1 if args.auto_find_batch_size else args.per_device_train_batch_size
    length = getattr(args, "max_length", None)  # GRPO has none
    if rows:
        micro_batch_size = min(micro_batch_size, rows.count)
        # Padded, all rows of some batch are as long as the longest; one after the other, those of some as the mean.
        length = rows.mean if _is_flat(args) and micro_batch_size > 1 else rows.longest
    setup = Setup(
        method=method,
        gpus=args.world_size,
        strategy="ddp" if stage is not None and stage < 3 else strategies.get(launched, "ddp"),
        micro_batch_size=micro_batch_size,
        max_length=max(1, length or 1),
        activation_checkpointing=bool(args.activation_checkpointing or by_fsdp),
        weight_bytes=weight_bytes,
        compute_bytes=2 if is_mixed else weight_bytes,
        lora_rank=model.lora_r if _adapts_all(model) else 1,
        on_gpu=args.device.type != "cpu",
    )
    unknown = {
        **_unknown_of_launch(args, launched, environment, is_mixed=is_mixed, stage=stage),
        **_unknown_of_recipe(recipe, rows),
    }
    if not setup.on_gpu and model.use_peft:
        unknown["frozen weights, which stay in their files"] = ("weights",)
    return Described(setup, unknown)


def _is_flat(args: Any) -> bool:
    return bool(getattr(args, "packing", False) or getattr(args, "padding_free", False))


def _unknown_of_recipe(recipe: Recipe, rows: Rows | None) -> dict[str, tuple[str, ...]]:
    args, model = recipe.training, recipe.model
    unknown: dict[str, tuple[str, ...]] = {}
    if str(model.dtype) not in _BYTES:
        unknown[f"dtype {model.dtype}"] = _ALL
    if OptimizerNames(args.optim) not in _ADAM:
        unknown[f"optim {OptimizerNames(args.optim).value}"] = ("gradients", "optimizer")
    if model.load_in_8bit:
        unknown["load_in_8bit"] = ("weights", "gathered", *_WITHIN_LAYERS)
    if model.use_peft and not _adapts_all(model):
        unknown["lora_target_modules"] = ("gradients", "optimizer", *_WITHIN_LAYERS)
    if recipe.run.trainer != "sft":
        unknown[f"the rows of {recipe.run.trainer}"] = _WITHIN_LAYERS
    if rows is None and not getattr(args, "packing", False):
        unknown["the length of the rows"] = _WITHIN_LAYERS
    if getattr(args, "activation_offloading", False):
        unknown["activation_offloading"] = _WITHIN_LAYERS
    if args.activation_checkpointing and args.activation_checkpointing_kwargs:
        unknown["activation_checkpointing_kwargs"] = _WITHIN_LAYERS
    without_dropout = model.use_peft and not model.lora_dropout
    inside = {"use_kernels": recipe.run.use_kernels, "torch_compile": args.torch_compile}
    unknown |= {key: _WITHIN_LAYERS for key, is_set in {**inside, "lora_dropout 0": without_dropout}.items() if is_set}
    return unknown


def _unknown_of_launch(
    args: Any, launched: DistributedType, environment: Mapping[str, str], *, is_mixed: bool, stage: int | None
) -> dict[str, tuple[str, ...]]:
    unknown: dict[str, tuple[str, ...]] = {}
    if environment.get("ACCELERATE_USE_PARALLELISM_CONFIG", "").lower() in ("true", "1") or args.parallelism_config:
        unknown["parallelism_config"] = _ALL
    if launched in (DistributedType.FSDP, DistributedType.DEEPSPEED) and not is_mixed:
        unknown["sharding without mixed precision"] = _ALL
    if launched == DistributedType.FSDP:
        if not _is_fsdp2(args, environment):
            unknown["fsdp_version 1"] = _ALL
        if _fsdp(args, environment, "offload_params") or _fsdp(args, environment, "cpu_offload"):
            unknown["fsdp_offload_params"] = _STATES
    if launched == DistributedType.DEEPSPEED:
        plugin = args.deepspeed_plugin
        if args.deepspeed or "ACCELERATE_DEEPSPEED_CONFIG_FILE" in environment:
            unknown["a configuration file of DeepSpeed"] = _ALL
        # What of the model it keeps gathered, and for how long, has not been measured.
        unknown[f"ZeRO-{stage}'s gathered weights"] = ("gathered", "working")
        if stage != 3:
            unknown[f"ZeRO-{stage}'s states"] = ("gradients", "optimizer", *_WITHIN_LAYERS)
        if plugin.offload_param_device not in (None, "none"):
            unknown["offload_param_device"] = _STATES
        if plugin.offload_optimizer_device not in (None, "none"):
            unknown["offload_optimizer_device"] = _STATES  # masters too
    return unknown


def _adapts_all(model: Any) -> bool:
    targets = model.lora_target_modules
    named = {targets} if isinstance(targets, str) else set(targets or ())
    return model.lora_target_parameters is None and (named == {"all-linear"} or named == _LINEAR)


def _zero_stage(args: Any) -> int:
    plugin = args.deepspeed_plugin
    return int(plugin.zero_stage) if plugin is not None and str(plugin.zero_stage).isdigit() else 0


def _fsdp(args: Any, environment: Mapping[str, str], setting: str) -> bool:
    """A switch of FSDP, by the launcher or by the recipe."""
    configured = args.fsdp_config if isinstance(args.fsdp_config, dict) else {}
    told = (environment.get(f"FSDP_{setting.upper()}", ""), configured.get(setting, ""))
    return any(str(value).lower() in ("true", "1") for value in told)


def _is_fsdp2(args: Any, environment: Mapping[str, str]) -> bool:
    configured = args.fsdp_config if isinstance(args.fsdp_config, dict) else {}
    own = (args.fsdp_plugin_args or {}).get("fsdp_version", configured.get("version"))
    return str(environment.get("FSDP_VERSION", own)) == "2"


def _architecture(recipe: Recipe) -> Architecture | None:
    path = str(recipe.model.model_name_or_path)
    try:
        config = AutoConfig.from_pretrained(path, revision=recipe.model.model_revision, trust_remote_code=False)
        return Architecture.from_config(config.to_dict(), path, with_biases=True)
    except CheckpointError:  # which the plan has no formulas for
        return None


def _ways_out(architecture: Architecture, setup: Setup, available: int) -> str:
    alternatives: Iterable[Any] = plan_training(architecture, setup, available).alternatives
    changes = [
        f"{change} ({format_bytes(memory.total)})"
        for change, other, memory in alternatives
        if setup.on_gpu or other.shards == 1
    ]
    return f"What would fit: {'; '.join(changes[:_SHOWN])}. " if changes else ""


__all__ = [
    "Described",
    "MemoryPlanError",
    "Rows",
    "available_memory",
    "check_memory",
    "describe_setup",
    "measure_rows",
]

# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What a schedule of growth costs, stage by stage, beside training the last model from nothing.

A schedule is a list of models, each grown from the one before, with the tokens it is trained on. Everything follows
from sizes; no weights are read. P parameters, L layers of width h, a query and k key/value heads of d features, f
feed-forward features, V rows of vocabulary; s tokens of a sequence; t, p, D ranks of tensor, pipeline and data
parallelism.

| what | formula | source |
|---|---|---|
| FLOPs of a token | 6 (P - V h) + 12 L a d s | PaLM, 2204.02311, appendix B; the embedding multiplies nothing |
| GPU hours | FLOPs / (peak x MFU) / 3600 | the utilisation is an assumption |
| state of a GPU | (6 + 12 / D) x its parameters | bf16 weights, float32 gradients; the optimizer over D |
| its parameters | (V h + L/p of the layers) / t | the first stage of the pipeline, which has the embedding |
| activations | s b L A / t, or with checkpointing s b (L 2 h + A) / t | the first stage of 1F1B holds p micro-batches |
| A | 8 h + 4 (a + k) d + 8 f bytes | bf16 with flash attention and sequence parallelism, in the manner of 2205.05198 |
| a checkpoint | 14 P | bf16 weights; float32 weights and moments |
| a growth | (2 P + 2 P') / disk speed, with moments 10 in place of 2 | each byte is read once and written once |

Learning rates are stated, not computed. Under muP a matrix of width h' learns at h / h' of the rate it had at h. A
schedule goes on over the stages: each warms up and stays stable, and the last alone may decay. [`run_keys`] has all of
that as the keys of `teleflm train`.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from conversion.architecture import Architecture, load_config, load_preset, preset_names
from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.numbers import parse_size, read_count, read_number, shown

from .method import Mask, Method, Zero
from .spec import plan_target

_HOUR = 3600
_SMALLEST, _LARGEST = 1e-30, 1e30  # of any number in a schedule: so that what they come to is a number too
_LARGEST_STEP = 4.0  # in parameters
_SHORT_MASK = 2000
_SCHEDULES = Path(__file__).parent / "schedules"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A model of a schedule, and how it is trained.

    Args:
        name: what to call it.
        architecture: its sizes.
        tokens: that it is trained on.
        batch_tokens: of a step, over all processes.
        learning_rate: the peak; after a growth, the peak of the warm-up.
        warmup_steps: steps until then.
        decay_steps: steps at the end over which it decays, of the last stage alone; it is stable in between.
        mask_steps: over which what a growth added rises from silence; 0: it grows by zeros.
        tensor_parallel, pipeline_parallel: ranks.
        gpus: of all.
        note: where its numbers are from.
    """

    name: str
    architecture: Architecture
    tokens: int
    batch_tokens: int
    learning_rate: float
    warmup_steps: int = 0
    decay_steps: int = 0
    mask_steps: int = 0
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    gpus: int = 1
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Models that grow out of each other, and the machine.

    Args:
        stages: in order.
        sequence_length: tokens of a row.
        gpu_memory: bytes of each GPU.
        gpu_tflops: its peak in bfloat16, in 1e12 FLOPs a second.
        mfu: the share of it that training reaches.
        disk_speed: bytes that are read and written in a second.
        moments: whether the optimizer's moments grow too.
        activation_checkpointing: whether layers are computed again in the backward pass.
        note: of all of it.
    """

    stages: tuple[Stage, ...]
    sequence_length: int = 4096
    gpu_memory: int = 80 * 10**9
    gpu_tflops: float = 312.0
    mfu: float = 0.4
    disk_speed: int = 2 * 10**9
    moments: bool = True
    activation_checkpointing: bool = True
    note: str = ""


@dataclass(frozen=True)
class StageCost:
    """What one stage takes.

    Args:
        stage: it.
        parameters: of its model.
        growth_factor: times the parameters of the stage before; 1 for the first.
        steps: of training.
        flops: of training, all of them.
        gpu_hours, days: on its GPUs.
        data_parallel: copies of the model.
        state_bytes, activation_bytes: on a GPU of the first stage of the pipeline, with rows one at a time.
        checkpoint_bytes: of its training checkpoint on disk.
        growth_bytes, growth_seconds: read and written to make it from the one before; 0 for the first.
        matrix_learning_rate: by which its matrices learn under muP, where `learning_rate` is that of the first width.
        warnings: what speaks against it, a sentence each.
    """

    stage: Stage
    parameters: int
    growth_factor: float
    steps: int
    flops: float
    gpu_hours: float
    days: float
    data_parallel: int
    state_bytes: int
    activation_bytes: int
    checkpoint_bytes: int
    growth_bytes: int
    growth_seconds: float
    matrix_learning_rate: float
    warnings: tuple[str, ...]

    @property
    def gpu_bytes(self) -> int:
        """On a GPU, all in all."""
        return self.state_bytes + self.activation_bytes


@dataclass(frozen=True)
class StagePlan:
    """What a schedule takes, beside the last model trained from nothing.

    Args:
        schedule: it.
        stages: each of it.
        tokens, flops, gpu_hours: of all stages.
        scratch_flops, scratch_gpu_hours: of the last model on as many tokens.
        scratch_tokens: on which the last model could be trained with as many FLOPs.
    """

    schedule: Schedule
    stages: tuple[StageCost, ...]
    tokens: int
    flops: float
    gpu_hours: float
    scratch_flops: float
    scratch_gpu_hours: float
    scratch_tokens: float

    @property
    def saved(self) -> float:
        """The share of the FLOPs of training from nothing, on as many tokens, that growing saves."""
        return 1 - self.flops / self.scratch_flops


def plan_stages(schedule: Schedule) -> StagePlan:
    """What a schedule costs.

    Args:
        schedule: from [`read_schedule`].

    Raises:
        CheckpointError: a stage cannot grow out of the one before, or a number makes no sense; names the stage.
    """
    costs = []
    for index, stage in enumerate(schedule.stages):
        before = schedule.stages[index - 1] if index else None
        if before:
            _check_growth(before, stage)
        if stage.decay_steps and index < len(schedule.stages) - 1:
            raise CheckpointError(
                f"stage {stage.name}: its learning rate decays over decay_steps {stage.decay_steps:,}, but "
                f"{schedule.stages[index + 1].name} grows out of it and would have to raise it again: only the last "
                "stage decays."
            )
        costs.append(_cost(stage, before, schedule))
    tokens, flops = sum(stage.tokens for stage in schedule.stages), sum(cost.flops for cost in costs)
    last = flops_per_token(schedule.stages[-1].architecture, schedule.sequence_length)
    return StagePlan(
        schedule=schedule,
        stages=tuple(costs),
        tokens=tokens,
        flops=flops,
        gpu_hours=sum(cost.gpu_hours for cost in costs),
        scratch_flops=float(last) * tokens,
        scratch_gpu_hours=_gpu_hours(float(last) * tokens, schedule),
        scratch_tokens=flops / last,
    )


def run_keys(schedule: Schedule, index: int) -> dict[str, Any]:
    """The keys of `teleflm train` that a stage of a schedule decides: lengths, learning rates, their schedule.

    Batch and spreading are left to the machine; masks are a matter of `teleflm grow --mask-steps`.

    Args:
        schedule: it.
        index: of the stage.
    """
    stage, first = schedule.stages[index], schedule.stages[0]
    keys: dict[str, Any] = {
        "block_size": schedule.sequence_length,
        "max_steps": _steps(stage),
        "learning_rate": stage.learning_rate,
        "mup_base_width": first.architecture.hidden_size,
        "warmup_steps": stage.warmup_steps,
        "lr_scheduler_type": "warmup_stable_decay" if stage.decay_steps else "constant_with_warmup",
    }
    if stage.decay_steps:
        keys["lr_scheduler_kwargs"] = {"num_decay_steps": stage.decay_steps}
    if index:
        share = stage.learning_rate / schedule.stages[index - 1].learning_rate
        keys["continue_schedule"] = float(f"{share:.12g}")
    return keys


def flops_per_token(architecture: Architecture, sequence_length: int) -> int:
    """FLOPs of a forward and a backward pass of one token; computing activations again is not counted."""
    a = architecture
    embedding = 0 if a.tie_word_embeddings else a.vocab_size * a.hidden_size
    attention = 12 * a.num_hidden_layers * a.num_attention_heads * a.head_dim * sequence_length
    return 6 * (a.num_parameters - embedding) + attention


def _steps(stage: Stage) -> int:
    return -(-stage.tokens // stage.batch_tokens)  # in integers: a float has no 10^30


def _gpu_hours(flops: float, schedule: Schedule) -> float:
    return flops / (schedule.gpu_tflops * 1e12 * schedule.mfu) / _HOUR


def _cost(stage: Stage, before: Stage | None, schedule: Schedule) -> StageCost:
    a, first = stage.architecture, schedule.stages[0].architecture
    flops = float(flops_per_token(a, schedule.sequence_length)) * stage.tokens
    hours = _gpu_hours(flops, schedule)
    moved = 0
    if before:
        each = 10 if schedule.moments else 2
        moved = each * (before.architecture.num_parameters + a.num_parameters)
    cost = StageCost(
        stage=stage,
        parameters=a.num_parameters,
        growth_factor=a.num_parameters / before.architecture.num_parameters if before else 1.0,
        steps=_steps(stage),
        flops=flops,
        gpu_hours=hours,
        days=hours / stage.gpus / 24,
        data_parallel=_data_parallel(stage),
        state_bytes=_state_bytes(stage),
        activation_bytes=_activation_bytes(stage, schedule),
        checkpoint_bytes=14 * a.num_parameters,
        growth_bytes=moved,
        growth_seconds=moved / schedule.disk_speed,
        matrix_learning_rate=stage.learning_rate * first.hidden_size / a.hidden_size,
        warnings=(),
    )
    values = {field.name: getattr(cost, field.name) for field in fields(cost)}
    return StageCost(**{**values, "warnings": tuple(_warnings(cost, before, schedule))})


def _data_parallel(stage: Stage) -> int:
    return stage.gpus // (stage.tensor_parallel * stage.pipeline_parallel)


def _layer_parameters(architecture: Architecture) -> int:
    a = architecture
    outside = a.vocab_size * a.hidden_size * (1 if a.tie_word_embeddings else 2) + a.hidden_size
    return (a.num_parameters - outside) // a.num_hidden_layers


def _state_bytes(stage: Stage) -> int:
    a = stage.architecture
    layers = math.ceil(a.num_hidden_layers / stage.pipeline_parallel)
    ends = 1 if a.tie_word_embeddings or stage.pipeline_parallel > 1 else 2  # embedding and head in one stage
    own = (ends * a.vocab_size * a.hidden_size + layers * _layer_parameters(a)) / stage.tensor_parallel
    return round(own * (6 + 12 / _data_parallel(stage)))


def _activation_bytes(stage: Stage, schedule: Schedule) -> int:
    a = stage.architecture
    heads = a.num_attention_heads + a.num_key_value_heads
    layer = 8 * a.hidden_size + 4 * heads * a.head_dim + 8 * a.intermediate_size
    kept = a.num_hidden_layers * layer
    if schedule.activation_checkpointing:
        kept = a.num_hidden_layers * 2 * a.hidden_size + layer
    return round(schedule.sequence_length * kept / stage.tensor_parallel)


def _check_growth(before: Stage, stage: Stage) -> None:
    method: Method = Mask(stage.mask_steps) if stage.mask_steps else Zero()
    try:
        plan_target(
            before.architecture,
            stage.architecture.to_config({}),
            layers="interleave",
            multipliers="preserve",
            unused_rows=None,
            method=method,
        )
    except CheckpointError as error:
        raise CheckpointError(f"stage {stage.name}: cannot grow out of {before.name}: {error}") from None


def _warnings(cost: StageCost, before: Stage | None, schedule: Schedule) -> list[str]:
    stage, found = cost.stage, []
    if cost.gpu_bytes > schedule.gpu_memory:
        found.append(
            f"needs {cost.gpu_bytes / 1e9:.1f} GB on a GPU, before buffers and fragmentation, which has "
            f"{schedule.gpu_memory / 1e9:.1f} GB"
        )
    rows = stage.batch_tokens / (schedule.sequence_length * cost.data_parallel)
    if not rows.is_integer() or rows < 1:
        found.append(
            f"batch_tokens {stage.batch_tokens:,} is {rows:.3g} rows of {schedule.sequence_length:,} tokens for each "
            f"of {cost.data_parallel} copies"
        )
    phases = stage.warmup_steps + stage.decay_steps
    if stage.decay_steps and phases > cost.steps:
        found.append(f"a warm-up and a decay over {phases:,} steps, of {cost.steps:,} there are")
    for key, steps in (("masks that rise", stage.mask_steps), ("a warm-up", stage.warmup_steps)):
        if steps > cost.steps:
            found.append(f"{key} over {steps:,} steps, of {cost.steps:,} there are")
    if before is None:
        return [*found, *(["masks, where nothing has grown"] if stage.mask_steps else [])]
    if cost.growth_factor == 1:
        found.append(f"is of the sizes of {before.name}: nothing grows")
    if cost.growth_factor > _LARGEST_STEP:
        found.append(
            f"{cost.growth_factor:.1f} times the parameters in one growth: arXiv 2605.13405 finds 2 most reliable, and "
            "a bound beyond which training from nothing is more efficient; think of a stage between"
        )
    if stage.learning_rate > before.learning_rate:
        found.append(
            f"its peak learning rate {stage.learning_rate:g} is above {before.name}'s {before.learning_rate:g}"
        )
    if not stage.warmup_steps and not schedule.moments:
        found.append("no warm-up and fresh moments: Adam's first steps are as large as the learning rate allows")
    if 0 < stage.mask_steps < _SHORT_MASK:
        found.append(f"masks that rise in {stage.mask_steps:,} steps: short ones postpone the damage, MSG takes 5,000")
    return found


# --- reading a schedule -----------------------------------------------------------------------------------------------


def schedule_names() -> list[str]:
    """The schedules that come with the package."""
    return sorted(path.stem for path in _SCHEDULES.glob("*.yaml"))


def find_schedule(name: str | Path) -> Path:
    """The file of a schedule: one that comes with the package by its name, any other by its path.

    Raises:
        CheckpointError: there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    if str(name) in schedule_names():
        return _SCHEDULES / f"{name}.yaml"
    raise CheckpointError(f"{name}: no such file, and no schedule; known schedules: {', '.join(schedule_names())}.")


def read_schedule(values: Any, where: str) -> Schedule:
    """Check the content of a schedule's file and build it.

    Args:
        values: a mapping of the fields of [`Schedule`], sizes as `80GB` too; `stages` is a list of the fields of
            [`Stage`] with, in place of the architecture, `model`: a preset, a folder or a config.json, or `set`: sizes
            on top of the stage before.
        where: what to call it in errors.

    Raises:
        CheckpointError: a key is unknown or missing, or a value is of the wrong type or out of its range.
    """
    values = _mapping(values, where)
    known = {field.name for field in fields(Schedule)}
    _refuse_unknown(values, known, where)
    rows = values.get("stages")
    if not isinstance(rows, Sequence) or isinstance(rows, str) or not rows:
        raise CheckpointError(f"{where}: stages is no list of stages.")
    stages: list[Stage] = []
    for number, row in enumerate(rows, start=1):
        stages.append(_read_stage(row, stages[-1] if stages else None, f"{where}: stage {number}", values))
    sizes: dict[str, Any] = {
        name: _size(values[name], f"{where}: {name}") for name in ("gpu_memory", "disk_speed") if name in values
    }
    numbers: dict[str, Any] = {
        name: _number(values[name], f"{where}: {name}", whole=name == "sequence_length")
        for name in ("sequence_length", "gpu_tflops", "mfu")
        if name in values
    }
    if numbers.get("mfu", 0) > 1:
        raise CheckpointError(f"{where}: mfu is {numbers['mfu']:g}; it is a share, above 0 and at most 1.")
    switches = {name: values[name] for name in ("moments", "activation_checkpointing") if name in values}
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise CheckpointError(f"{where}: {name} is {shown(value)}; expected true or false.")
    return Schedule(stages=tuple(stages), note=str(values.get("note") or ""), **sizes, **numbers, **switches)


_STAGE_KEYS = {field.name for field in fields(Stage)} - {"architecture"} | {"model", "set"}
_MAY_BE_ZERO = ("warmup_steps", "decay_steps", "mask_steps")
_WHOLE = ("tokens", "batch_tokens", *_MAY_BE_ZERO, "tensor_parallel", "pipeline_parallel", "gpus")


def _read_stage(row: Any, before: Stage | None, where: str, schedule: Mapping[str, Any]) -> Stage:
    row = _mapping(row, where)
    _refuse_unknown(row, _STAGE_KEYS, where)
    missing = [key for key in ("tokens", "batch_tokens", "learning_rate") if row.get(key) is None]
    if missing:
        raise CheckpointError(f"{where}: does not say {', '.join(missing)}.")
    numbers = {
        key: _number(row[key], f"{where}: {key}", whole=key in _WHOLE, zero=key in _MAY_BE_ZERO)
        for key in (*_WHOLE, "learning_rate")
        if key in row
    }
    architecture = _read_architecture(row, before, where)
    name = str(row.get("name") or row.get("model") or f"{architecture.num_parameters / 1e9:.1f}B")
    stage = Stage(name=name, architecture=architecture, note=str(row.get("note") or ""), **numbers)
    ranks = stage.tensor_parallel * stage.pipeline_parallel
    if stage.gpus % ranks:
        raise CheckpointError(
            f"{where}: gpus is {stage.gpus}, no multiple of tensor_parallel {stage.tensor_parallel} x "
            f"pipeline_parallel {stage.pipeline_parallel}."
        )
    for field in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(architecture, field) % stage.tensor_parallel:
            raise CheckpointError(
                f"{where}: {field} is {getattr(architecture, field)}, no multiple of tensor_parallel "
                f"{stage.tensor_parallel}."
            )
    return stage


def _read_architecture(row: Mapping[str, Any], before: Stage | None, where: str) -> Architecture:
    model, changes = row.get("model"), _mapping(row.get("set") or {}, f"{where}: set")
    if model is None and before is None:
        raise CheckpointError(f"{where}: says no model; the first stage needs one.")
    if model is None and not changes:
        raise CheckpointError(f"{where}: says neither model nor set, so nothing grows.")
    if model is None:
        assert before is not None
        config = before.architecture.to_config({})
        if {"hidden_size", "num_attention_heads"} & changes.keys() and "head_dim" not in changes:
            config.pop("head_dim", None)
        if "num_attention_heads" in changes and before.architecture.group_size == 1:
            config["num_key_value_heads"] = changes["num_attention_heads"]
        unknown = sorted(changes.keys() - {field.name for field in fields(Architecture)})
        if unknown:
            raise CheckpointError(f"{where}: set has {unknown[0]}, which is no size of a model.")
        return Architecture.from_config({**config, **changes}, where)
    if str(model) in preset_names():
        config = load_preset(str(model))
    elif Path(str(model)).exists():
        path = Path(str(model))
        config = load_config(path / "config.json" if path.is_dir() else path)
    else:
        raise CheckpointError(
            f"{where}: model is {shown(model)}: no such file, and no preset; known presets: "
            f"{', '.join(preset_names())}."
        )
    return Architecture.from_config({**config, **changes}, f"{where}: model")


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{where} is a {type(value).__name__}; expected `key: value` lines.")
    return value


def _refuse_unknown(values: Mapping[str, Any], known: set[str], where: str) -> None:
    for key in values:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(sorted(known))}."
            raise CheckpointError(f"{where}: {key} is unknown; {hint}")


def _number(value: Any, where: str, *, whole: bool = False, zero: bool = False) -> Any:
    if whole:
        return read_count(value, where, least=0 if zero else 1, most=int(_LARGEST))
    return read_number(value, where, least=_SMALLEST, most=_LARGEST)


def _size(value: Any, where: str) -> int:
    try:
        return parse_size(value)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from None


__all__ = [
    "Schedule",
    "Stage",
    "StageCost",
    "StagePlan",
    "find_schedule",
    "flops_per_token",
    "plan_stages",
    "read_schedule",
    "run_keys",
    "schedule_names",
]

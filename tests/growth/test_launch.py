# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""A run that is spread as it was asked to be is let through; the faults planted here are stopped."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import TrainingArguments

from growth.training.errors import RunError
from growth.training.launch import check_launch, check_wrapped, count_wrapped, settle_checkpointing
from tests.fixtures.tiny import tiny_model

FSDP, DEEPSPEED = {"ACCELERATE_USE_FSDP": "true"}, {"ACCELERATE_USE_DEEPSPEED": "true"}
IN_BF16, IN_NO = (
    {"ACCELERATE_MIXED_PRECISION": name, "ACCELERATE_CONFIG_DS_FIELDS": "zero_stage,mixed_precision"}
    for name in ("bf16", "no")
)
GPUS = ("MULTI_GPU", 8, "cuda")


def launch(settings, found, environment):
    """What accelerate finds cannot be had without GPUs, so it is written down here; tests/sft/test_distributed.py has
    the launches that a CPU can do."""
    settings, (distributed_type, num_processes, device) = dict(settings), found
    state = SimpleNamespace(
        distributed_type=DistributedType(distributed_type), num_processes=num_processes, device=torch.device(device)
    )
    keys = {"fsdp_plugin_args": settings.pop("fsdp", None), "deepspeed_plugin": settings.pop("deepspeed", None)}
    precision = {"bf16": settings.pop("bf16", False), "fp16": False}
    check_launch(SimpleNamespace(distributed_state=state, **keys, **precision), environment, **settings)


@pytest.mark.parametrize(
    ("settings", "found", "environment", "message"),
    [
        ({}, ("MULTI_CPU", 2, "cpu"), FSDP, "told to shard with FSDP, but this run is MULTI_CPU on cpu"),
        ({}, ("NO", 1, "cpu"), FSDP, "told to shard with FSDP, but this run is NO on cpu"),
        ({}, ("NO", 1, "cpu"), {**DEEPSPEED, **IN_BF16}, "mixed_precision is bf16 in accelerate's file, and no in"),
        (
            {"bf16": True},
            ("NO", 1, "cpu"),
            {**DEEPSPEED, **IN_NO},
            "mixed_precision is no in accelerate's file, and bf16",
        ),
        ({}, ("MULTI_CPU", 2, "cpu"), {**DEEPSPEED, "ACCELERATE_USE_CPU": "True"}, "use_cpu, so this run is MULTI_CPU"),
        ({}, ("NO", 1, "cpu"), {"WORLD_SIZE": "2"}, "started 2 processes, but each believes it is one of 1"),
        (
            {"fsdp": {"fsdp_version": 2}},
            ("MULTI_CPU", 2, "cpu"),
            {},
            "told to shard with FSDP, but this run is MULTI_CPU",
        ),
        ({"num_processes": 2}, ("NO", 1, "cpu"), {}, "num_processes is 2 in the settings, but 1 run"),
        ({"num_processes": 16}, GPUS, FSDP, "num_processes is 16 in the settings, but 8 run"),
        ({"distributed_type": "FSDP"}, GPUS, {}, "distributed_type is FSDP in the settings, but this run is MULTI_GPU"),
        ({"distributed_type": "MULTI_GPU"}, GPUS, FSDP, "distributed_type is MULTI_GPU .* but this run is FSDP"),
    ],
)
def test_a_launch_that_is_not_what_was_asked_for_is_refused(settings, found, environment, message):
    with pytest.raises(RunError, match=message):
        launch(settings, found, environment)


@pytest.mark.parametrize(
    ("settings", "found", "environment"),
    [
        ({}, ("NO", 1, "cpu"), {}),
        ({"num_processes": 2, "distributed_type": "MULTI_CPU"}, ("MULTI_CPU", 2, "cpu"), {"WORLD_SIZE": "2"}),
        ({"num_processes": 8, "distributed_type": "FSDP"}, GPUS, {**FSDP, "WORLD_SIZE": "8"}),
        ({"distributed_type": "DEEPSPEED"}, ("DEEPSPEED", 8, "cuda"), DEEPSPEED),
        ({"distributed_type": "DEEPSPEED", "deepspeed": object()}, ("MULTI_CPU", 2, "cpu"), {}),
        ({"distributed_type": "FSDP", "fsdp": {"fsdp_version": 2}}, GPUS, {}),
        ({"distributed_type": "DEEPSPEED"}, ("MULTI_CPU", 2, "cpu"), {**DEEPSPEED, "ACCELERATE_USE_CPU": "False"}),
        ({}, GPUS, {"ACCELERATE_USE_FSDP": "false", "WORLD_SIZE": ""}),
    ],
)
def test_a_launch_that_was_asked_for_is_let_through(settings, found, environment):
    launch(settings, found, environment)


WRAPPED = {"replicated": 0, "sharded_modules": 0, "sharded_layers": 0, "sharded_parameters": 0, "parameters": 21}


@pytest.mark.parametrize(
    ("wrapped", "distributed_type", "zero_stage", "message"),
    [
        ({"sharded_modules": 1}, "FSDP", 0, "FSDP shards 0 of the 2 layers on their own"),
        ({"sharded_modules": 4, "sharded_layers": 1}, "FSDP", 0, "FSDP shards 1 of the 2 layers on their own"),
        ({"sharded_parameters": 20}, "DEEPSPEED", 3, "ZeRO-3 shards 20 of 21 parameters"),
        ({}, "MULTI_CPU", 0, "the run is MULTI_CPU, but nothing exchanges the gradients"),
        ({"sharded_modules": 3, "sharded_layers": 2}, "FSDP", 0, None),
        ({"sharded_parameters": 21}, "DEEPSPEED", 3, None),
        ({}, "DEEPSPEED", 2, None),
        ({"replicated": 1}, "MULTI_CPU", 0, None),
        ({}, "NO", 0, None),
    ],
)
def test_a_model_that_is_not_spread_is_noticed(wrapped, distributed_type, zero_stage, message):
    context = pytest.raises(RunError, match=message) if message else nullcontext()
    with context:
        check_wrapped({**WRAPPED, **wrapped}, DistributedType(distributed_type), layers=2, zero_stage=zero_stage)


def test_a_model_that_is_alone_has_nothing_wrapped():
    assert count_wrapped(tiny_model()) == {**WRAPPED, "parameters": 30}


@pytest.mark.parametrize("layers", [0, 2, 3])
def test_fsdp_that_does_not_shard_every_layer_is_noticed(layers):
    """As accelerate shards: embedding, norm with head, and root always; layers if it finds their name."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, mesh = tiny_model(), init_device_mesh("cpu", (1,))
        for layer in model.model.layers[:layers]:
            fully_shard(layer, mesh=mesh)
        fully_shard(model.model.embed_tokens, mesh=mesh)
        fully_shard([model.model.norm, model.lm_head], mesh=mesh)
        fully_shard(model, mesh=mesh)
        found = count_wrapped(model)
        assert found["sharded_modules"] == layers + 4
        message = f"FSDP shards {layers} of the 3 layers on their own"
        with pytest.raises(RunError, match=message) if layers < 3 else nullcontext():
            check_wrapped(found, DistributedType.FSDP, layers=3, zero_stage=0)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("both", "adapters", "who", "left"),
    [
        (("true", True), False, "FSDP", ("true", False)),
        (("true", True), True, "the model", ("false", True)),
        (("true", False), True, "the model", ("false", True)),
        (("true", False), False, None, ("true", False)),
        (("false", True), True, None, ("false", True)),
    ],
)
def test_activations_are_checkpointed_by_one(both, adapters, who, left, tmp_path):
    by_fsdp, by_model = both
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, activation_checkpointing=by_model)
    environment = {"ACCELERATE_USE_FSDP": "true", "FSDP_ACTIVATION_CHECKPOINTING": by_fsdp}
    assert settle_checkpointing(args, environment, adapters=adapters) == who
    assert (environment["FSDP_ACTIVATION_CHECKPOINTING"], args.activation_checkpointing) == left
    assert args.gradient_checkpointing == args.activation_checkpointing

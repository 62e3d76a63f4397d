# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What cannot fit is refused before a weight is loaded, and nothing else is.

The memory of the machine is planted; the estimate is the real one.
"""

import logging
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType

from sft.plan import GREATEST_EXCESS, Setup, estimate_memory, load_architecture
from sft.training import memory, train
from sft.training.memory import MemoryPlanError, Rows, check_memory, describe_setup, measure_rows

UNPACKED = {"activation_checkpointing": False}


@pytest.fixture
def of_machine(monkeypatch):
    """Plant the memory of the machine."""

    def plant(size: float) -> None:
        monkeypatch.setattr(memory, "usable_memory", lambda: int(size))

    return plant


@pytest.fixture
def needed(make_recipe, model_dir):
    """Bytes of a full fine-tuning of the tiny model, written out: float32 weights, gradients, moments, activations."""
    recipe = make_recipe(output_dir="out")
    data, *_ = train._load_data(recipe, train.load_tokenizer(recipe)[0])
    setup = Setup(
        gpus=1,
        strategy="ddp",
        micro_batch_size=8,
        max_length=max(len(row) for row in data["input_ids"]),
        weight_bytes=4,
        compute_bytes=4,
        on_gpu=False,
        **UNPACKED,
    )
    return estimate_memory(load_architecture(model_dir), setup, overhead=False).total


def test_a_run_that_cannot_fit_is_refused_before_a_weight_is_loaded(
    make_recipe, of_machine, needed, tmp_path, monkeypatch
):
    monkeypatch.setattr(train, "load_model", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    of_machine(needed / GREATEST_EXCESS * 0.99)
    with pytest.raises(MemoryPlanError) as error:
        train.train(make_recipe(), progress=False)
    assert "\n" not in str(error.value)
    for part in ("this run needs at least", "on each process, which has", "weights", "ignore_memory_plan: true"):
        assert part in str(error.value)
    assert not (tmp_path / "out").exists()


def test_one_that_may_fit_is_not_refused_but_warned_of(make_recipe, of_machine, needed, caplog):
    of_machine(needed / GREATEST_EXCESS * 1.01)
    with caplog.at_level(logging.WARNING):
        assert train.train(make_recipe(max_steps=1), progress=False).global_step == 1
    assert "this run may need" in caplog.text  # the assumed overhead is 2 GiB alone


def test_it_can_be_tried_nevertheless(make_recipe, of_machine, caplog):
    of_machine(1)
    with caplog.at_level(logging.WARNING):
        assert train.train(make_recipe(max_steps=1, ignore_memory_plan=True), progress=False).global_step == 1
    assert "this run needs at least" in caplog.text


def test_processes_of_one_machine_share_its_memory(of_machine):
    of_machine(1000)
    assert memory.available_memory(torch.device("cpu"), {}) == 1000
    assert memory.available_memory(torch.device("cpu"), {"LOCAL_WORLD_SIZE": "4"}) == 250
    assert memory.available_memory(torch.device("meta"), {}) is None


def test_a_gpu_has_its_own_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=7))
    assert memory.available_memory(torch.device("cuda", 1), {"LOCAL_WORLD_SIZE": "8"}) == 7


def test_the_rows_that_there_are_count(make_recipe):
    recipe = make_recipe(max_length=5000, per_device_train_batch_size=4)
    data, *_ = train._load_data(recipe, train.load_tokenizer(recipe)[0])
    lengths = [len(row) for row in data["input_ids"]]
    rows = measure_rows(data)
    assert rows == Rows(len(lengths), max(lengths), sum(lengths) // len(lengths))
    assert measure_rows(data.to_iterable_dataset()) is None
    padded = describe_setup(recipe, DistributedType.NO, {}, rows).setup
    assert padded.tokens == 4 * max(lengths)
    packed = make_recipe(packing=True, per_device_train_batch_size=4)
    assert describe_setup(packed, DistributedType.NO, {}, rows).setup.tokens == 4 * rows.mean
    assert describe_setup(recipe, DistributedType.NO, {}, Rows(2, 9, 8)).setup.tokens == 2 * 9


# Each is a way to need less than the plan knows: whatever the memory, it may not be refused for the parts left out.
WITHOUT_STATES = {"gradients", "optimizer"}
WITHIN = {"activations", "working"}


@pytest.mark.parametrize(
    ("keys", "environment", "launched", "left_out"),
    [
        ({}, {}, "NO", set()),
        ({"optim": "adafactor"}, {}, "NO", WITHOUT_STATES),
        ({"optim": "sgd"}, {}, "NO", WITHOUT_STATES),
        ({"use_peft": True, "lora_target_modules": ["q_proj"]}, {}, "NO", {"weights"} | WITHOUT_STATES | WITHIN),
        ({"use_peft": True, "lora_dropout": 0.0}, {}, "NO", {"weights"} | WITHIN),
        ({"use_peft": True}, {}, "NO", {"weights"}),
        ({"trainer": "dpo"}, {}, "NO", WITHIN),
        ({"dtype": "auto"}, {}, "NO", set(memory._ALL)),
        ({"bf16": True}, {"FSDP_VERSION": "2"}, "FSDP", set()),
        ({"bf16": True}, {"FSDP_VERSION": "1"}, "FSDP", set(memory._ALL)),
        ({"bf16": True}, {"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "FSDP", {"weights"} | WITHOUT_STATES),
        ({}, {"FSDP_VERSION": "2"}, "FSDP", set(memory._ALL)),
        ({}, {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "MULTI_GPU", set(memory._ALL)),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),  # sets have no order
)
def test_what_the_plan_does_not_model_is_not_counted(keys, environment, launched, left_out, make_recipe):
    recipe = make_recipe(**keys)
    described = describe_setup(recipe, DistributedType(launched), environment, Rows(100, 100, 100))
    assert set(memory._ALL) - set(described.certain) == left_out
    assert bool(described.unknown) == bool(left_out)


def test_the_launcher_s_precision_counts(make_recipe):
    told = {"ACCELERATE_MIXED_PRECISION": "bf16"}
    setups = [
        describe_setup(make_recipe(), DistributedType.NO, environment, Rows(9, 9, 9)).setup
        for environment in ({}, told)
    ]
    assert [setup.compute_bytes for setup in setups] == [4, 2]


def test_rows_of_unknown_length_are_not_counted(make_recipe, of_machine):
    described = describe_setup(make_recipe(), DistributedType.NO, {})
    assert set(memory._ALL) - set(described.certain) == WITHIN
    assert describe_setup(make_recipe(packing=True), DistributedType.NO, {}).unknown == {}


def test_a_model_without_formulas_is_let_through(make_recipe, of_machine, tmp_path):
    from transformers import LlamaConfig, MistralConfig

    of_machine(1)
    for kind in (LlamaConfig, MistralConfig):
        kind().save_pretrained(tmp_path / kind.model_type)
    check_memory(make_recipe(model_name_or_path=str(tmp_path / "mistral")), DistributedType.NO, {}, None)
    with pytest.raises(MemoryPlanError, match="this run needs at least"):
        check_memory(make_recipe(model_name_or_path=str(tmp_path / "llama")), DistributedType.NO, {}, None)

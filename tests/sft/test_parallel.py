# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Tensor, context and sequence parallelism: two processes train as one, or are refused before a model is loaded."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import ParallelismConfig
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from growth.training.errors import RunError
from growth.training.parallel import Parallelism, check_parallelism, check_split, read_parallelism
from sft.shipped import find_shipped, shipped_files
from sft.training import trainer as trainers
from sft.training.train import train
from tests.fixtures.tiny import tiny_model
from tests.sft.test_cluster import SMALL, environment_of, launch
from tests.sft.test_train import losses

ROWS = {"max_length": 128, "packing": False, "pad_to_multiple_of": 64}


def norms(entries):
    return [entry["grad_norm"] for entry in entries if "loss" in entry]


@pytest.fixture
def one(make_recipe, tmp_path):
    """One process that does what two do together."""
    keys = {"max_steps": 3, "learning_rate": 1e-2, "warmup_steps": 0.03, "per_device_train_batch_size": 1}
    schedule = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1e-9, "power": 1.0}}
    return train(make_recipe(**keys, **schedule, **ROWS, output_dir=str(tmp_path / "one")), progress=False)


@pytest.mark.slow
def test_two_halves_of_each_matrix_train_as_one(one, model_dir, data_file, tmp_path):
    keys = {**SMALL, "model_name_or_path": str(model_dir), "data_files": str(data_file), "dtype": "float32"}
    keys |= {"distributed_type": "MULTI_GPU", "output_dir": str(tmp_path / "two"), "save_strategy": "no"}
    keys |= {"activation_checkpointing": True}
    # accelerate would put the model on GPUs 0 and 1.
    changes = {
        "PARALLELISM_CONFIG_TP_SIZE": "2",
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_BYPASS_DEVICE_MAP": "true",
    }
    (two,) = launch("tp", [("flm-2-52b-full-long", keys, changes)], tmp_path)
    assert (two["distributed_type"], two["num_processes"]) == ("MULTI_GPU", 2)
    assert [entry["loss"] for entry in two["log_history"] if "loss" in entry] == pytest.approx(losses(one), rel=1e-5)
    assert norms(two["log_history"]) == pytest.approx(norms(one.log_history), rel=1e-4)
    saved, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    assert saved.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(saved[name], weight, rtol=1e-4, atol=1e-5)
    configs, records = (
        [json.loads((tmp_path / name / file).read_text()) for name in ("two", "one")]
        for file in ("config.json", "teleflm_manifest.json")
    )
    assert configs[0] == configs[1]
    assert [record["lineage"]["batch_size"] for record in records] == [1, 1], "the two compute one row together"


@pytest.mark.parametrize("name", ["tp", "fsdp2-cp", "zero3-ulysses"])
def test_shipped_files_are_what_accelerate_takes(name, monkeypatch):
    config = load_config_from_file(str(find_shipped(name, "accelerate")))
    prefix = "parallelism_config_"
    sizes = {key.removeprefix(prefix): value for key, value in config.parallelism_config.items()}
    taken = ("dp_replicate_size", "dp_shard_size", "tp_size", "cp_size", "sp_size", "cp_backend", "sp_backend")
    made = ParallelismConfig(**{key: value for key, value in sizes.items() if key in taken})
    if name != "zero3-ulysses":  # whose groups are DeepSpeed's
        assert made.total_size == config.num_processes
    for key, value in environment_of(name).items():
        monkeypatch.setenv(key, value)
    assert ParallelismConfig().total_size == made.total_size
    expected = {"tp": Parallelism(tensor=8), "fsdp2-cp": Parallelism(context=2)}.get(name, Parallelism(sequence=2))
    assert read_parallelism(environment_of(name)) == expected


def test_other_files_have_nothing_of_it():
    names = [file.name for file in shipped_files() if file.kind == "accelerate"]
    assert {name for name in names if read_parallelism(environment_of(name)) != Parallelism()} == {
        "tp",
        "fsdp2-cp",
        "zero3-ulysses",
    }


@pytest.mark.parametrize(
    ("parallelism", "changes", "launched", "options", "message"),
    [
        (Parallelism(context=2), {"packing": True}, "FSDP", {}, "cp_size is 2 and packing is true"),
        (Parallelism(sequence=2), {"packing": True}, "DEEPSPEED", {}, "sp_size is 2 and packing is true"),
        (Parallelism(sequence=2), {"eval_packing": True}, "DEEPSPEED", {}, "sp_size is 2 and eval_packing is true"),
        (Parallelism(context=2), {"pad_to_multiple_of": 2}, "FSDP", {}, "pad_to_multiple_of is 2.*multiple of 4"),
        (Parallelism(sequence=2), {"pad_to_multiple_of": None}, "DEEPSPEED", {}, "pad_to_multiple_of is None"),
        (Parallelism(sequence=2), {}, "FSDP", {}, "sp_size is 2, and the run is FSDP"),
        (Parallelism(context=2), {}, "MULTI_GPU", {}, "cp_size is 2, and the run is MULTI_GPU"),
        (Parallelism(tensor=2), {}, "DEEPSPEED", {}, "tp_size is 2 under DeepSpeed"),
        (Parallelism(tensor=2), {}, "MULTI_GPU", {"adapters": True}, "tp_size is 2 and use_peft is true"),
        (Parallelism(tensor=2), {}, "MULTI_GPU", {"trainer": "dpo"}, "not for dpo"),
        (Parallelism(tensor=3), {}, "MULTI_GPU", {}, "3 processes compute the same rows, and 4 run"),
    ],
)
def test_what_does_not_go_together_is_refused(parallelism, changes, launched, options, message):
    args = SimpleNamespace(**{"packing": False, "pad_to_multiple_of": 4, "world_size": 4, **changes})
    with pytest.raises(RunError, match=message) as error:
        check_parallelism(parallelism, args, DistributedType(launched), **{"adapters": False, **options})
    assert "\n" not in str(error.value)


def test_a_number_that_is_none_is_refused():
    told = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "two"}
    with pytest.raises(RunError, match="parallelism_config_tp_size is 'two'"):
        read_parallelism(told)


def test_matrices_that_are_whole_are_noticed():
    with pytest.raises(RunError, match="tp_size is 2, and 0 of the 21 matrices"):
        check_split(tiny_model(), Parallelism(tensor=2), layers=3)


def test_weights_of_rows_that_are_cut_are_refused(make_recipe, conversations, tmp_path, monkeypatch):
    weigh = {"system": {}, "user": {}, "assistant": {"weight": 0.5}}
    rows = [
        {"messages": [{**message, **weigh[message["role"]]} for message in row["messages"]]}
        for row in conversations[:8]
    ]
    (tmp_path / "weighted.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(trainers, "read_parallelism", lambda environment: Parallelism(sequence=2))
    with pytest.raises(Exception, match="messages have weights, and accelerate's file cuts rows"):
        train(make_recipe(data_files=str(tmp_path / "weighted.jsonl"), max_steps=1), progress=False)

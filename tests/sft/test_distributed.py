# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Several processes, for real: that they are what was asked for, and that they train as one would.

A launch that does less than it was told looks like success, so each test asserts the kind of distribution and how many
blocks are wrapped.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.utils import DistributedType

import sft
from growth.training.launch import check_wrapped
from sft.training.train import build_trainer, train
from tests.sft.test_train import losses, weights

pytestmark = pytest.mark.slow

ROOT = Path(sft.__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
FLOOR = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1e-9}}


def run(*command):
    return subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def write_recipe(model_dir, data_file, tmp_path):
    """Write a recipe file for the tiny model on CPUs; keys given win."""

    def write(**keys):
        values = {
            "model_name_or_path": str(model_dir),
            "data_files": str(data_file),
            "output_dir": str(tmp_path / "out"),
            "use_cpu": True,
            "seed": 0,
            "activation_checkpointing": False,
            "logging_steps": 1,
            "save_strategy": "no",
            "max_length": 256,
            "max_steps": 3,
            "learning_rate": 1e-3,
            **FLOOR,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({**values, **keys}))
        return path

    return write


@pytest.mark.slow
def test_two_replicas_train_as_one_process_with_twice_the_batch(write_recipe, make_recipe, tmp_path):
    recipe = write_recipe(per_device_train_batch_size=4, num_processes=2, distributed_type="MULTI_CPU")
    result = run(*TORCHRUN, "-m", "sft.train", "--config", recipe, "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["distributed_type"], found["num_processes"]) == ("MULTI_CPU", 2)
    assert found["wrapped"] == {
        "replicated": 1,
        "sharded_modules": 0,
        "sharded_layers": 0,
        "sharded_parameters": 0,
        "parameters": 21,
    }

    keys = {"max_steps": 3, "learning_rate": 1e-3, "per_device_train_batch_size": 8, "max_length": 256, **FLOOR}
    one = train(make_recipe(**keys, output_dir=str(tmp_path / "one")), progress=False)
    assert [entry["loss"] for entry in found["log_history"] if "loss" in entry] == pytest.approx(losses(one), rel=1e-5)
    assert all(
        torch.allclose(weights(tmp_path / "out")[name], weight, atol=1e-5)
        for name, weight in weights(tmp_path / "one").items()
    )


def test_one_of_two_tokenizes_and_the_other_waits_in_no_collective(write_recipe, make_recipe, tmp_path):
    """It takes longer than a collective operation may: one that was pending would have ended the run."""
    keys = {"packing": True, "max_length": 128, "max_steps": 2}
    folder = str(tmp_path / "cache")
    recipe = write_recipe(**keys, per_device_train_batch_size=2, dataset_cache_dir=folder)
    result = run(*TORCHRUN, "-m", "tests.sft.cache_worker", tmp_path / "log", 18, "-", "--config", recipe, "--json")
    assert result.returncode == 0, result.stderr
    assert "waiting for process" in result.stderr
    tokenized = (tmp_path / "log").read_text().splitlines()
    assert len(tokenized) == 48, "each row by one process, once"
    assert len(set(tokenized)) == 1
    keys |= {"per_device_train_batch_size": 4, "learning_rate": 1e-3, **FLOOR}
    one = train(make_recipe(**keys, output_dir=str(tmp_path / "one"), dataset_cache_dir=folder + "2"), progress=False)
    found = [entry["loss"] for entry in json.loads(result.stdout)["log_history"] if "loss" in entry]
    assert found == pytest.approx(losses(one), rel=1e-5)


@pytest.mark.slow
def test_what_ends_the_one_that_tokenizes_ends_both(write_recipe, tmp_path):
    recipe = write_recipe(dataset_cache_dir=str(tmp_path / "cache"))
    result = run(*TORCHRUN, "-m", "tests.sft.cache_worker", tmp_path / "log", 3, "fail", "--config", recipe)
    assert result.returncode != 0
    assert "error: planted: this conversation cannot be read" in result.stderr
    assert not (tmp_path / "log").exists()
    assert not (tmp_path / "out").exists()


def test_two_shards_train_as_one_process(write_recipe, make_recipe, tmp_path):
    recipe = write_recipe(per_device_train_batch_size=2, learning_rate=0.1)
    result = run(*TORCHRUN, "-m", "tests.sft.fsdp2_worker", recipe, tmp_path, 3)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["wrapped"] == {
        "replicated": 0,
        "sharded_modules": 3,
        "sharded_layers": 2,
        "sharded_parameters": 0,
        "parameters": 21,
    }
    assert found["dtensors"] == 21, "every parameter is in two parts"
    assert found["gap"] < 0.005
    check_wrapped(found["wrapped"], DistributedType.FSDP, layers=2, zero_stage=0)

    trainer, _, _ = build_trainer(make_recipe(learning_rate=0.1, output_dir=str(tmp_path / "one")))
    optimizer, expected = torch.optim.SGD(trainer.model.parameters(), lr=0.1), []
    for step in range(3):
        rows = [trainer.train_dataset[index] for index in range(4 * step, 4 * step + 4)]
        loss = trainer.model(**trainer.data_collator(rows), fused_lm_head=True, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert found["losses"] == pytest.approx(expected, rel=1e-5)
    trained = torch.load(tmp_path / "weights.pt")
    for name, weight in trainer.model.state_dict().items():
        torch.testing.assert_close(trained[name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fault", ["one process instead of two", "replicas instead of shards"])
def test_accelerate_doing_less_than_it_was_told_is_refused(fault, write_recipe, tmp_path):
    recipe = write_recipe(**({"num_processes": 2} if fault.startswith("one") else {}))
    if fault.startswith("one"):
        launch = [*ACCELERATE, "--cpu", "--num_processes", 2]
        message = "num_processes is 2 in the settings, but 1 run"
    else:
        shipped = yaml.safe_load((ROOT / "sft/accelerate_configs/fsdp2.yaml").read_text())
        config = tmp_path / "fsdp2-cpu.yaml"
        config.write_text(yaml.safe_dump({**shipped, "use_cpu": True, "num_processes": 1, "mixed_precision": "no"}))
        launch = [*ACCELERATE, "--config_file", config]
        message = "accelerate was told to shard with FSDP, but this run is MULTI_CPU on cpu"
    result = run(*launch, "-m", "sft.train", "--config", recipe)
    assert result.returncode != 0, "a launcher's exit status is what schedulers see"
    assert f"error: {message}" in result.stderr
    assert not (tmp_path / "out").exists()

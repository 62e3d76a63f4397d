# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What `teleflm sft plan --write` writes is a run: read by our recipes and by accelerate, it fits, and it trains."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from conversion.architecture import Architecture, load_preset
from sft.data.labels import Labelling
from sft.data.prepare import prepare
from sft.plan import PlanError, Setup, estimate_memory, plan_training
from sft.plan_files import Run, choose_setup, write_run
from sft.shipped import find_shipped
from sft.tokenizer import load_tokenizer
from sft.training.memory import Rows, describe_setup
from sft.training.recipe import read_recipe
from sft.yaml_text import load_yaml
from tests.sft.test_cluster import SMALL, environment_of, launch
from tests.sft.test_validate import sft

GB = 10**9
B52, T1 = (Architecture.from_config(load_preset(name)) for name in ("tele-flm-52b", "tele-flm-1t"))
DISTRIBUTED = {"fsdp2": "FSDP", "zero3": "DEEPSPEED", "ddp": "MULTI_GPU"}


@pytest.mark.parametrize(
    ("method", "gpus", "strategy", "expected"),
    [
        ("full", 16, None, "fsdp2"),
        ("full", 64, None, "fsdp2"),
        ("lora", 8, None, "fsdp2"),
        ("lora", 8, "zero3", "zero3"),
        ("qlora", 8, None, "ddp"),
        ("qlora", 1, None, "ddp"),
    ],
)
def test_the_recipe_is_the_plan(method, gpus, strategy, expected, data_file, tmp_path, monkeypatch):
    """Read back, the recipe and what its launch says are the setup that was planned."""
    plan = choose_setup(B52, Setup(method=method, gpus=gpus), 80 * GB, strategy=strategy)
    assert plan.fits
    assert plan.setup.strategy == expected
    recipe, accelerate, _ = write_run(plan, Run(model="tele-flm-52b", data_files=[str(data_file)]), tmp_path / "run")
    read = read_recipe(recipe, {"model_name_or_path": "MODEL", "use_cpu": True})
    environment = environment_of(accelerate) if gpus > 1 else {}
    launched = "NO" if gpus == 1 else DISTRIBUTED[expected]
    if launched == "DEEPSPEED":
        from types import SimpleNamespace

        read.training.deepspeed_plugin = SimpleNamespace(
            zero_stage=3, offload_param_device="none", offload_optimizer_device="none"
        )
    assert read.run.num_processes == gpus
    assert read.run.distributed_type == launched
    rows = read.training.per_device_train_batch_size * read.training.gradient_accumulation_steps * gpus
    assert rows == 128
    rows = Rows(1000, 2048, 2048)
    described = describe_setup(read, DistributedType(launched), environment, rows)
    assert dataclasses.replace(described.setup, gpus=gpus, on_gpu=True) == plan.setup
    config = load_config_from_file(str(accelerate))
    assert (config.num_processes, config.num_machines, str(config.distributed_type.value)) == (gpus, 1, launched)


def test_the_largest_micro_batch_that_fits_is_chosen():
    plan = choose_setup(B52, Setup(method="lora", gpus=8), 80 * GB)
    larger = dataclasses.replace(plan.setup, micro_batch_size=2 * plan.setup.micro_batch_size)
    assert estimate_memory(B52, larger).total > 80 * GB or 16 % larger.micro_batch_size
    without = dataclasses.replace(plan.setup, micro_batch_size=1, activation_checkpointing=False)
    assert plan.setup.activation_checkpointing
    assert estimate_memory(B52, without).total > 80 * GB
    assert choose_setup(B52, Setup(method="lora", gpus=8), 80 * GB, micro_batch_size=1).setup.micro_batch_size == 1


def test_what_is_replicated_and_trained_as_a_whole_is_float32():
    """Steps of 2.7e-5 vanish in bfloat16 weights that are updated in place."""
    small = Architecture.from_config({**load_preset("tele-flm-52b"), "num_hidden_layers": 1})
    plan = choose_setup(small, Setup(method="full", gpus=8), 80 * GB)
    assert (plan.setup.strategy, plan.setup.weight_bytes) == ("ddp", 4)
    assert choose_setup(small, Setup(method="full", gpus=8), 80 * GB, weight_bytes=2).setup.weight_bytes == 2


@pytest.mark.parametrize(
    "name", ["flm-2-52b-full", "flm-2-52b-full-long", "flm-2-52b-lora", "flm-2-52b-qlora", "tele-flm-1t-lora"]
)
def test_shipped_recipes_fit_the_gpus_that_they_name(name):
    """On as many GPUs of 80 GB as they say; rows that several GPUs share are counted as if one had them."""
    keys = load_yaml(find_shipped(name, "recipe").read_text())
    method = "qlora" if keys.get("load_in_4bit") else "lora" if keys.get("use_peft") else "full"
    setup = Setup(
        method=method,
        gpus=keys["num_processes"],
        strategy="ddp" if method == "qlora" else "fsdp2",
        micro_batch_size=keys["per_device_train_batch_size"],
        max_length=keys["max_length"],
        activation_checkpointing=keys["activation_checkpointing"],
    )
    plan = plan_training(T1 if "1t" in name else B52, setup, 80 * GB)
    assert plan.fits, plan.memory


def test_two_machines_have_to_be_told_which_they_are(tmp_path):
    _, accelerate, script = write_run(
        choose_setup(B52, Setup(method="full", gpus=16), 80 * GB), Run(model="tele-flm-52b", nodes=2), tmp_path
    )
    assert load_config_from_file(str(accelerate)).num_machines == 2
    told = {"MACHINE_RANK": "1", "MAIN_PROCESS_IP": "10.0.0.1"}
    (tmp_path / "accelerate").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "accelerate").chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    untold = subprocess.run(["sh", script], env=path, capture_output=True, text=True)
    assert untold.returncode != 0
    assert "MACHINE_RANK" in untold.stderr
    said = subprocess.run(
        ["sh", script, "--seed", "1"], env={**path, **told}, capture_output=True, text=True, check=True
    ).stdout.split()
    assert said[:7] == [
        "launch",
        "--config_file",
        str(accelerate),
        "--machine_rank",
        "1",
        "--main_process_ip",
        "10.0.0.1",
    ]
    assert said[-6:] == ["sft", "train", "--config", str(tmp_path / "recipe.yaml"), "--seed", "1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "full"], "full on 8 GPUs needs .* which have 80 GB; nothing was written. What would fit: "),
        (["--global-batch-size", "100"], "global_batch_size is 100 and gpus is 8"),
        (["--micro-batch-size", "3"], "micro-batches of 3 do not divide"),
        (["--nodes", "3"], "nodes is 3, and gpus 8"),
        (["--data", "nothing.jsonl"], "nothing.jsonl: no such file of data"),
    ],
)
def test_what_cannot_be_planned_is_refused_and_nothing_written(arguments, message, tmp_path):
    given = ["--model", "tele-flm-52b", "--method", "lora", *arguments, "--write", str(tmp_path / "run")]
    status, out, err = sft("plan", *given)
    assert (status, out) == (2, "")
    assert re.search(message, err), err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_files_of_others_stay(tmp_path):
    (tmp_path / "recipe.yaml").write_text("mine")
    given = ["--model", "tele-flm-52b", "--method", "lora", "--write", str(tmp_path)]
    status, _, err = sft("plan", *given)
    assert status == 2
    assert f"{tmp_path / 'recipe.yaml'} exists" in err
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
    assert (tmp_path / "recipe.yaml").read_text() == "mine"
    status, out, _ = sft("plan", *given, "--overwrite", "--json")
    assert status == 0
    assert json.loads(out)["files"] == [
        str(tmp_path / name) for name in ("recipe.yaml", "accelerate.yaml", "launch.sh")
    ]
    assert "mine" not in (tmp_path / "recipe.yaml").read_text()


def test_a_folder_in_the_way_leaves_all_as_it_was(tmp_path):
    (tmp_path / "launch.sh").mkdir()
    (tmp_path / "recipe.yaml").write_text("mine")
    given = ["--model", "tele-flm-52b", "--method", "lora", "--write", str(tmp_path), "--overwrite"]
    status, _, err = sft("plan", *given)
    assert (status, err) == (2, f"teleflm: {tmp_path}/launch.sh is a folder; choose another folder, or move it away.\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["launch.sh", "recipe.yaml"]
    assert (tmp_path / "recipe.yaml").read_text() == "mine"


def test_links_that_lead_nowhere_stay(tmp_path):
    (tmp_path / "recipe.yaml").symlink_to("nowhere")
    (tmp_path / "folder").symlink_to("nowhere")
    given = ["--model", "tele-flm-52b", "--method", "lora", "--write"]
    status, _, err = sft("plan", *given, str(tmp_path))
    assert (status, f"{tmp_path}/recipe.yaml exists; choose" in err) == (2, True)
    status, _, err = sft("plan", *given, str(tmp_path / "folder"))
    assert (status, err) == (2, f"teleflm: {tmp_path}/folder is no folder.\n")
    assert os.readlink(tmp_path / "recipe.yaml") == "nowhere"


def test_a_prepared_folder_that_training_would_refuse_is_refused(model_dir, data_file, tmp_path):
    prepared = tmp_path / "prepared"
    prepare(data_file, prepared, load_tokenizer(model_dir)[0], Labelling(max_length=64))
    other = tmp_path / "other"
    shutil.copytree(model_dir, other)
    template = other / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    given = ["--method", "lora", "--gpus", 8, "--global-batch-size", 8, "--write", tmp_path / "run"]
    for model, data, length, message in (
        (model_dir, [prepared], 128, f"{prepared} was prepared with max_length 64, this run has 128; prepare it again"),
        ("tele-flm-52b", [prepared], 2048, f"{prepared} was prepared with max_length 64, this run has 2048"),
        (other, [prepared], 64, f"{prepared} was prepared with chat template of digest "),
        (model_dir, [prepared, data_file], 64, "a prepared folder stands alone"),
    ):
        places = [word for place in data for word in ("--data", place)]
        status, out, err = sft("plan", "--model", model, *given, "--max-length", length, *places)
        assert (status, out, len(err.splitlines())) == (2, "", 1), err
        assert message in err
        assert not (tmp_path / "run").exists()
    assert sft("plan", "--model", model_dir, *given, "--max-length", 64, "--data", prepared)[0] == 0


def test_options_of_files_need_files():
    status, _, err = sft("plan", "--model", "tele-flm-52b", "--nodes", 2)
    assert (status, "--nodes has no effect here; it needs --write FOLDER" in err) == (2, True)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_was_written_trains_on_two_processes(method, model_dir, data_file, tmp_path):
    """Its own files, with the device and the length of the run replaced."""
    status, _, err = sft(
        "plan", "--model", model_dir, "--method", method, "--gpus", 2, "--strategy", "fsdp2", "--max-length", 128,
        "--global-batch-size", 8, "--data", data_file, "--output-dir", tmp_path / "out", "--write", tmp_path,
    )  # fmt: skip
    assert status == 0, err
    keys = {key: SMALL[key] for key in ("use_cpu", "bf16", "report_to", "max_steps")}
    (result,) = launch(tmp_path / "accelerate.yaml", [(tmp_path / "recipe.yaml", keys, {})], tmp_path)
    assert (result["distributed_type"], result["num_processes"]) == ("FSDP", 2)
    assert result["wrapped"]["sharded_layers"] == 2
    assert result["global_step"] == 3
    file = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    assert load_file(tmp_path / "out" / file)


@pytest.mark.slow
def test_the_command_of_one_gpu_trains(model_dir, data_file, tmp_path):
    """The script itself, by accelerate itself; arguments replace the device."""
    given = ["--model", model_dir, "--method", "lora", "--gpus", 1, "--data", data_file, "--write", tmp_path]
    assert sft("plan", *given, "--max-length", 128, "--global-batch-size", 4)[0] == 0
    for name in ("accelerate", "teleflm"):
        module = {"accelerate": "accelerate.commands.accelerate_cli", "teleflm": "teleflm"}[name]
        (tmp_path / name).write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
        (tmp_path / name).chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(Path(__file__).parents[2])}
    keys = ["--use_cpu", "true", "--max_steps", "3", "--report_to", "none", "--json"]
    result = subprocess.run(
        ["sh", tmp_path / "launch.sh", *keys], env={**os.environ, **path}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads(result.stdout)["global_step"] == 3
    adapter = load_file(tmp_path / "run/adapter_model.safetensors")
    assert any(weight.any() for name, weight in adapter.items() if "lora_B" in name)
    assert all(weight.dtype == torch.float32 for weight in adapter.values())


def test_a_plan_that_does_not_fit_names_the_least(tmp_path):
    with pytest.raises(PlanError, match=r"What would fit: .*GPUs"):
        choose_setup(T1, Setup(method="lora", gpus=64), 80 * GB)

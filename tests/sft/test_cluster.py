# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The shipped recipes with the shipped accelerate files, on two processes: model and data replaced, and what is theirs.

`accelerate launch` turns its file into environment variables; these are what its own parser makes of the shipped file.
The oracle of what is saved in parts is what transformers gathers and saves whole.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoModelForCausalLM

import sft
from conversion import inspect_checkpoint
from conversion.checkpoint.errors import CheckpointError
from growth.training.sharded import find_adapter
from sft.export import export_model
from sft.shipped import find_shipped
from sft.training.train import train
from tests.fixtures.tiny import tiny_model

pytestmark = pytest.mark.slow

FOLDER = Path(sft.__file__).parent
ROOT = FOLDER.parent
SMALL = {
    "use_cpu": True,
    "bf16": False,
    "num_processes": 2,
    "gradient_accumulation_steps": 1,
    "max_length": 128,
    "num_train_epochs": 1,
    "learning_rate": 1e-2,
    "save_strategy": "steps",
    "save_steps": 2,
    "max_steps": 3,
    "report_to": "none",
}


def environment_of(file: str | Path) -> dict[str, str]:
    """What `accelerate launch --config_file` sets for a file, shipped ones by name."""
    path = file if isinstance(file, Path) else find_shipped(file, "accelerate")
    options = ["--config_file", str(path), "--num_processes", "2"]
    parsed, told, _ = _validate_launch_command(launch_command_parser().parse_args([*options, "script.py"]))
    if parsed.use_deepspeed:
        parsed.deepspeed_fields_from_accelerate_config = ",".join([*told.deepspeed_config, "mixed_precision"])
        found = prepare_deepspeed_cmd_env(parsed)[1]
    else:
        found = prepare_multi_gpu_env(parsed)
    return {key: value for key, value in found.items() if key.startswith(("FSDP_", "ACCELERATE_", "PARALLELISM_"))}


def launch(file: str | Path, runs: list[tuple[str, dict, dict]], folder: Path) -> list[dict]:
    """What came of some runs, each a recipe, keys that replace its own, and variables that replace the file's."""
    described = []
    for recipe, keys, changes in runs:
        words = [word for key, value in keys.items() for word in (f"--{key}", json.dumps(value).strip('"'))]
        arguments = ["--config", str(recipe), "--json", *words]
        described.append((arguments, {**environment_of(file), **changes}))
    (folder / "runs.json").write_text(json.dumps(described))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = subprocess.run(
        [*torchrun, "-m", "tests.sft.cluster_worker", folder / "runs.json"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-5000:]
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def runs(model_dir, data_file, tmp_path_factory):
    """A full fine-tuning, saved in parts as shipped; resumed from its checkpoint; saved whole by transformers; LoRA."""
    out = tmp_path_factory.mktemp("cluster")
    keys = {**SMALL, "model_name_or_path": str(model_dir), "data_files": str(data_file)}
    resume = {"resume_from_checkpoint": str(out / "parts/checkpoint-2")}
    parts, whole = ({"FSDP_STATE_DICT_TYPE": f"{kind}_STATE_DICT"} for kind in ("SHARDED", "FULL"))
    assert environment_of("fsdp2").items() >= parts.items(), "as shipped"
    plans = {
        "parts": ("flm-2-52b-full", {}, parts),
        "resumed": ("flm-2-52b-full", resume, parts),
        "whole": ("flm-2-52b-full", {}, whole),
        "adapter": ("flm-2-52b-lora", {"save_steps": 1}, parts),
        "adapter resumed": (
            "flm-2-52b-lora",
            {"save_steps": 1, "resume_from_checkpoint": str(out / "adapter/checkpoint-2")},
            parts,
        ),
    }
    runs = [
        (recipe, {**keys, **more, "output_dir": str(out / name)}, changes)
        for name, (recipe, more, changes) in plans.items()
    ]
    return out, dict(zip(plans, launch("fsdp2", runs, out), strict=True))


def test_the_shipped_files_shard_every_layer_and_train(runs):
    _, results = runs
    for found in results.values():
        assert (found["distributed_type"], found["num_processes"]) == ("FSDP", 2)
        assert found["wrapped"]["sharded_layers"] == 2
        assert [entry["step"] for entry in found["log_history"] if "loss" in entry] == [1, 2, 3]
    losses = [entry["loss"] for entry in results["parts"]["log_history"] if "loss" in entry]
    assert losses[-1] < losses[0]


def one_process(make_recipe, out: Path, **keys):
    """The same steps, both rows in one process."""
    return train(
        make_recipe(
            max_length=128,
            packing=True,
            activation_checkpointing=True,
            max_steps=3,
            learning_rate=1e-2,
            warmup_steps=0.03,
            lr_scheduler_type="polynomial",
            lr_scheduler_kwargs={"lr_end": 1e-9, "power": 1.0},
            per_device_train_batch_size=2,
            output_dir=str(out),
            **keys,
        ),
        progress=False,
    )


def assert_same_steps(found: list[dict], expected: list[dict]) -> None:
    """Losses and norms of the gradients, of all three steps."""
    for key, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4)):
        of_two, of_one = ([entry[key] for entry in entries if "loss" in entry] for entries in (found, expected))
        assert len(of_two) == len(of_one) == 3
        assert of_two == pytest.approx(of_one, rel=tolerance)


def test_two_shards_train_as_one_process(make_recipe, model_dir, data_file, tmp_path):
    keys = {**SMALL, "model_name_or_path": str(model_dir), "data_files": str(data_file), "dtype": "float32"}
    keys |= {"save_strategy": "no", "output_dir": str(tmp_path / "two")}
    (two,) = launch("fsdp2", [("flm-2-52b-full", keys, {"ACCELERATE_MIXED_PRECISION": "no"})], tmp_path)
    assert_same_steps(two["log_history"], one_process(make_recipe, tmp_path / "one").log_history)


@pytest.mark.slow
def test_two_copies_train_as_one_process(make_recipe, model_dir, data_file, tmp_path):
    """The file for copies, with adapters; without dropout, which two processes draw differently from one."""
    keys = {**SMALL, "model_name_or_path": str(model_dir), "data_files": str(data_file), "dtype": "float32"}
    keys |= {"distributed_type": "MULTI_GPU", "lora_dropout": 0.0, "save_strategy": "no"}
    # accelerate would put the models on GPUs 0 and 1.
    changes = {"ACCELERATE_BYPASS_DEVICE_MAP": "true", "ACCELERATE_MIXED_PRECISION": "no"}
    (two,) = launch("multi-gpu", [("flm-2-52b-lora", {**keys, "output_dir": str(tmp_path / "two")}, changes)], tmp_path)
    assert (two["distributed_type"], two["num_processes"], two["wrapped"]["replicated"]) == ("MULTI_GPU", 2, 1)
    one = one_process(make_recipe, tmp_path / "one", use_peft=True, lora_r=16, lora_alpha=32, lora_dropout=0.0)
    assert_same_steps(two["log_history"], one.log_history)
    saved, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("two", "one"))
    for name, weight in expected.items():
        torch.testing.assert_close(saved[name], weight, rtol=1e-3, atol=1e-5)


def test_what_is_saved_in_parts_is_what_transformers_gathers(runs):
    out, _ = runs
    parts, whole = (load_file(out / name / "model.safetensors") for name in ("parts", "whole"))
    assert parts.keys() == whole.keys()
    for name, weight in whole.items():
        assert torch.equal(parts[name], weight), name
    names = {path.name for path in (out / "whole").iterdir()}
    assert {path.name for path in (out / "parts").iterdir()} == names
    model = AutoModelForCausalLM.from_pretrained(out / "parts")
    assert model(torch.arange(9)[None]).logits.isfinite().all()


def test_a_run_resumed_from_parts_is_the_uninterrupted_one(runs):
    out, _ = runs
    parts, resumed = (load_file(out / name / "model.safetensors") for name in ("parts", "resumed"))
    assert all(torch.equal(parts[name], resumed[name]) for name in parts)


def test_a_sharded_run_has_a_record_and_is_exported(runs, tmp_path):
    out, _ = runs
    found = inspect_checkpoint(out / "parts", check=True)
    assert found.chain[-1].details["steps"] == 3
    assert found.chain[-1].problems == ()
    export_model(out / "parts", tmp_path / "hub", dtype="bfloat16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hub").dtype == torch.bfloat16


def test_a_checkpoint_in_parts_is_a_model_too(runs, tmp_path):
    out, _ = runs
    export_model(out / "parts/checkpoint-2", tmp_path / "hub")
    before = load_file(out / "whole/checkpoint-2/model.safetensors")
    after = load_file(tmp_path / "hub/model.safetensors")
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert {"tokenizer.model", "tokenizer_config.json", "chat_template.jinja"} <= {
        p.name for p in (tmp_path / "hub").iterdir()
    }


def test_adapters_are_saved_whole(runs, tmp_path):
    out, _ = runs
    for folder in (out / "adapter", out / "adapter/checkpoint-2"):
        adapter = load_file(folder / "adapter_model.safetensors")
        assert any(weight.abs().max() > 0 for name, weight in adapter.items() if "lora_B" in name)
    # What each process saved of it for a resume, joined by torch, is what the file holds.
    dcp_to_torch_save(out / "adapter/checkpoint-2/pytorch_model_fsdp_0", tmp_path / "joined.pt")
    joined = torch.load(tmp_path / "joined.pt")["model"]
    assert joined.keys() == adapter.keys()
    assert all(torch.equal(adapter[name], weight) for name, weight in joined.items())
    ended, resumed = (load_file(out / name / "adapter_model.safetensors") for name in ("adapter", "adapter resumed"))
    assert all(torch.equal(resumed[name], weight) for name, weight in ended.items())
    assert not all(torch.equal(ended[name], weight) for name, weight in adapter.items())
    export_model(out / "adapter", tmp_path / "hub", merge=True)
    assert (tmp_path / "hub/model.safetensors").is_file()


def test_an_adapter_that_would_be_saved_in_part_is_refused():
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))
    whole = {name: weight for name, weight in model.state_dict().items() if "lora_" in name}
    assert len(find_adapter(model, whole)) == len(whole)
    whole.pop(next(iter(whole)))
    with pytest.raises(CheckpointError, match="of 6 trained tensors of the adapter 5 can be saved"):
        find_adapter(model, whole)

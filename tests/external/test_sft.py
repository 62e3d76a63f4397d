# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Fine-tuning with what is heavy to install: DeepSpeed, bitsandbytes, a tracker.

DeepSpeed compiles its operators at the first run, which takes some minutes.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

import sft
from sft.export import export_model
from sft.training.recipe import RecipeError
from sft.training.train import build_trainer, train
from tests.fixtures.tiny import tiny_config, tiny_model, tiny_tokenizer
from tests.sft.conftest import STRICT, conversations, data_file, make_recipe, model_dir  # noqa: F401
from tests.sft.test_cluster import SMALL, launch
from tests.sft.test_train import losses

pytestmark = pytest.mark.external
ROOT = Path(sft.__file__).parents[1]
KEYS = {"max_steps": 3, "learning_rate": 1e-3, "max_length": 256, "logging_steps": 1, "save_strategy": "no", "seed": 0}


def needs(package):
    return pytest.mark.skipif(find_spec(package) is None, reason=f"needs {package}")


@needs("deepspeed")
@pytest.mark.parametrize(("stage", "lora"), [(2, False), (3, False), (3, True)], ids=["zero2", "zero3", "zero3-lora"])
def test_deepspeed_on_two_processes_trains_as_one(stage, lora, make_recipe, model_dir, data_file, tmp_path):  # noqa: F811
    keys = KEYS | ({"use_peft": True} if lora else {})
    recipe, config = tmp_path / "recipe.yaml", tmp_path / "accelerate.yaml"
    paths = {
        "model_name_or_path": str(model_dir),
        "data_files": str(data_file),
        "output_dir": str(tmp_path / "two"),
    }
    asked = {"num_processes": 2, "distributed_type": "DEEPSPEED"}
    local = {"use_cpu": True, "bf16": False, "activation_checkpointing": False, "per_device_train_batch_size": 4}
    recipe.write_text(yaml.safe_dump({**keys, **paths, **asked, **local}))
    shipped = yaml.safe_load((ROOT / "sft/accelerate_configs/zero3.yaml").read_text())
    shipped["deepspeed_config"]["zero_stage"] = stage
    shipped["deepspeed_config"]["zero3_init_flag"] = stage == 3
    config.write_text(yaml.safe_dump({**shipped, "num_processes": 2, "mixed_precision": "no"}))

    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "-m", "sft.train"]
    result = subprocess.run(
        [*launch, "--config", str(recipe), "--json"],
        cwd=ROOT,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-8000:]
    found = json.loads(result.stdout[result.stdout.index('{"output_dir') :].splitlines()[0])
    assert (found["distributed_type"], found["num_processes"]) == ("DEEPSPEED", 2)
    parameters = found["wrapped"]["parameters"]
    assert parameters == (21 if not lora else 21 + 2 * 14)
    assert found["wrapped"]["sharded_parameters"] == (parameters if stage == 3 else 0)

    one = train(make_recipe(**keys, per_device_train_batch_size=8, output_dir=str(tmp_path / "one")), progress=False)
    assert [entry["loss"] for entry in found["log_history"] if "loss" in entry] == pytest.approx(losses(one), rel=1e-4)
    exported = export_model(tmp_path / "two", tmp_path / "hub", merge=lora)
    assert exported.merged == (14 if lora else 0)


@needs("bitsandbytes")
@pytest.mark.parametrize("keys", [{}, {"use_dora": True}, {"use_bnb_nested_quant": True}], ids=str)
def test_qlora_trains_adapters_on_four_bits(keys, make_recipe, tmp_path):  # noqa: F811
    from bitsandbytes.nn import Linear4bit

    config = tiny_config(num_hidden_layers=2, hidden_size=64, intermediate_size=192)  # blocks of 64 are quantized
    tiny_model(config).save_pretrained(tmp_path / "base")
    tiny_tokenizer(tmp_path / "base").save_pretrained(tmp_path / "base")
    keys |= {"model_name_or_path": str(tmp_path / "base"), "max_steps": 6, "learning_rate": 1e-2}
    recipe = make_recipe(use_peft=True, load_in_4bit=True, **keys)
    trainer, _, _ = build_trainer(recipe)
    quantized = [module for module in trainer.model.modules() if isinstance(module, Linear4bit)]
    assert len(quantized) == 14
    assert {layer.weight.quant_type for layer in quantized} == {"nf4"}

    result = train(recipe, progress=False)
    assert losses(result)[-1] < losses(result)[0]
    exported = export_model(result.output_dir, tmp_path / "hub", merge=True)
    assert exported.merged == 14
    method = json.loads((tmp_path / "hub" / "teleflm_manifest.json").read_text())["lineage"]["parent"]["lineage"][
        "method"
    ]
    assert method == ("qdora" if "use_dora" in keys else "qlora")


@needs("bitsandbytes")
def test_the_shipped_qlora_recipe_on_two_processes(data_file, tmp_path):  # noqa: F811
    config = tiny_config(num_hidden_layers=2, hidden_size=64, intermediate_size=192)  # blocks of 64 are quantized
    tiny_model(config).save_pretrained(tmp_path / "base")
    tiny_tokenizer(tmp_path / "base").save_pretrained(tmp_path / "base")
    keys = {**SMALL, "model_name_or_path": str(tmp_path / "base"), "data_files": str(data_file), "bf16": True}
    changes = {"ACCELERATE_BYPASS_DEVICE_MAP": "true"}  # accelerate would put the models on GPUs 0 and 1
    runs = [("flm-2-52b-qlora", {**keys, "output_dir": str(tmp_path / "out")}, changes)]
    (found,) = launch("multi-gpu", runs, tmp_path)
    assert (found["distributed_type"], found["num_processes"], found["wrapped"]["replicated"]) == ("MULTI_GPU", 2, 1)
    assert found["global_step"] == 3
    assert export_model(tmp_path / "out", tmp_path / "hub", merge=True).merged == 14


def test_quantization_without_its_library_is_one_line(make_recipe, monkeypatch):  # noqa: F811
    monkeypatch.setattr("transformers.quantizers.quantizer_bnb_4bit.is_bitsandbytes_available", lambda *args: False)
    with pytest.raises(RecipeError, match="bitsandbytes") as error:
        train(make_recipe(use_peft=True, load_in_4bit=True))
    assert "\n" not in str(error.value)


@needs("tensorboard")
def test_a_tracker_gets_what_is_logged(make_recipe, tmp_path, monkeypatch):  # noqa: F811
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    result = train(make_recipe(max_steps=3, report_to="tensorboard"), progress=False)
    (folder,) = {path.parent for path in (tmp_path / "runs").rglob("events.out.*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses(result))

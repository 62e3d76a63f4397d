# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The shipped recipes with the shipped files of ZeRO-2 and ZeRO-3, on two processes: trained, saved, resumed, exported.

Only the model, the data, the device and the length of the run are replaced. The oracles are what DeepSpeed gathers and
saves whole, its own zero_to_fp32, and one process. DeepSpeed compiles its operators at the first run, for some minutes.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from conversion import inspect_checkpoint
from sft.export import export_model
from sft.training.train import train
from tests.sft.conftest import conversations, data_file, make_recipe, model_dir  # noqa: F401
from tests.sft.test_cluster import SMALL, assert_same_steps, launch, one_process

pytestmark = pytest.mark.external
pytest.importorskip("deepspeed")
OF_ZERO = {**SMALL, "bf16": True, "distributed_type": "DEEPSPEED"}
WHOLE = {"ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true"}


@pytest.fixture(scope="module", params=["zero2", "zero3"])
def runs(request, model_dir, data_file, tmp_path_factory):  # noqa: F811
    """All weights, saved as shipped; resumed from a checkpoint; saved whole by DeepSpeed; adapters, and resumed."""
    out = tmp_path_factory.mktemp(request.param)
    keys = {**OF_ZERO, "model_name_or_path": str(model_dir), "data_files": str(data_file)}
    plans = {
        "full": ("flm-2-52b-full", {}, {}),
        "resumed": ("flm-2-52b-full", {"resume_from_checkpoint": str(out / "full/checkpoint-2")}, {}),
        "adapter": ("flm-2-52b-lora", {}, {}),
        "1t": ("tele-flm-1t-lora", {}, {}),
        "adapter resumed": ("flm-2-52b-lora", {"resume_from_checkpoint": str(out / "adapter/checkpoint-2")}, {}),
        "whole": ("flm-2-52b-full", {}, WHOLE),
    }
    planned = [
        (recipe, {**keys, **more, "output_dir": str(out / name)}, changes)
        for name, (recipe, more, changes) in plans.items()
    ]
    return request.param, out, dict(zip(plans, launch(request.param, planned, out), strict=True))


def test_the_shipped_files_shard_what_they_say(runs):
    stage, _, results = runs
    for name, found in results.items():
        assert (found["distributed_type"], found["num_processes"]) == ("DEEPSPEED", 2)
        assert found["wrapped"]["parameters"] == (21 if name in ("full", "resumed", "whole") else 21 + 2 * 14)
        assert found["wrapped"]["sharded_parameters"] == (found["wrapped"]["parameters"] if stage == "zero3" else 0)
        assert [entry["step"] for entry in found["log_history"] if "loss" in entry] == [1, 2, 3]


def test_what_is_saved_is_what_deepspeed_gathers(runs):
    _, out, _ = runs
    saved, whole = (load_file(out / name / "model.safetensors") for name in ("full", "whole"))
    assert saved.keys() == whole.keys()
    for name, weight in whole.items():
        assert saved[name].dtype == weight.dtype == torch.bfloat16
        assert torch.equal(saved[name], weight), name
    names = {path.name for path in (out / "whole").iterdir()}
    assert {path.name for path in (out / "full").iterdir()} == names, "no part is left behind"
    assert inspect_checkpoint(out / "full", check=True).chain[-1].problems == ()


def test_a_resumed_run_is_the_uninterrupted_one(runs):
    _, out, _ = runs
    for straight, resumed, file in (
        ("full", "resumed", "model.safetensors"),
        ("adapter", "adapter resumed", "adapter_model.safetensors"),
    ):
        before, after = (load_file(out / name / file) for name in (straight, resumed))
        assert all(torch.equal(before[name], weight) for name, weight in after.items())


def test_a_checkpoint_is_exported_by_the_engine(runs, tmp_path):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    stage, out, _ = runs
    checkpoint = out / "full/checkpoint-2"
    assert (checkpoint / "model.safetensors").exists() == (stage == "zero2")
    export_model(checkpoint, tmp_path / "hub", dtype="float32")
    exported = load_file(tmp_path / "hub/model.safetensors")
    masters = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint))
    assert exported.keys() == masters.keys()
    for name, weight in masters.items():
        # ZeRO-2 has a model beside its parts, in the dtype that was computed in.
        expected = weight if stage == "zero3" else weight.bfloat16().float()
        assert torch.equal(exported[name], expected), name
    assert (tmp_path / "hub/tokenizer.model").is_file()


def test_adapters_are_exported_and_merged(runs, tmp_path):
    _, out, _ = runs
    for name in ("adapter", "1t"):
        adapter = load_file(out / name / "adapter_model.safetensors")
        assert all(weight.any() for key, weight in adapter.items() if "lora_B" in key)
        assert export_model(out / name, tmp_path / name, merge=True).merged == 14


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_in_float32_it_trains_as_one_process(stage, model_dir, data_file, make_recipe, tmp_path):  # noqa: F811
    keys = {**OF_ZERO, "model_name_or_path": str(model_dir), "data_files": str(data_file)}
    keys |= {"dtype": "float32", "bf16": False, "save_strategy": "no", "output_dir": str(tmp_path / "two")}
    (two,) = launch(stage, [("flm-2-52b-full", keys, {"ACCELERATE_MIXED_PRECISION": "no"})], tmp_path)
    one = one_process(make_recipe, tmp_path / "one")
    assert_same_steps(two["log_history"], one.log_history)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    assert all(torch.allclose(before[name], weight, atol=1e-5) for name, weight in after.items())


def test_precision_that_differs_from_the_file_is_one_line(model_dir, data_file, tmp_path):  # noqa: F811
    keys = {**OF_ZERO, "bf16": False, "model_name_or_path": str(model_dir), "data_files": str(data_file)}
    with pytest.raises(AssertionError, match="mixed_precision is bf16 in accelerate's file, and no in the settings"):
        launch("zero3", [("flm-2-52b-full", {**keys, "output_dir": str(tmp_path / "out")}, {})], tmp_path)


def test_halves_of_rows_train_as_whole_ones(model_dir, data_file, make_recipe, tmp_path):  # noqa: F811
    """Ulysses, through the shipped recipe and file; gloo needs rows of one length, hence the multiple."""
    keys = {**OF_ZERO, "model_name_or_path": str(model_dir), "data_files": str(data_file), "save_steps": 2}
    keys |= {"dtype": "float32", "bf16": False, "pad_to_multiple_of": 128, "output_dir": str(tmp_path / "two")}
    (two,) = launch("zero3-ulysses", [("flm-2-52b-full-long", keys, {"ACCELERATE_MIXED_PRECISION": "no"})], tmp_path)
    assert (two["distributed_type"], two["num_processes"]) == ("DEEPSPEED", 2)
    one = train(
        make_recipe(
            max_length=128,
            pad_to_multiple_of=128,
            activation_checkpointing=True,
            max_steps=3,
            learning_rate=1e-2,
            warmup_steps=0.03,
            lr_scheduler_type="polynomial",
            lr_scheduler_kwargs={"lr_end": 1e-9, "power": 1.0},
            per_device_train_batch_size=1,
            output_dir=str(tmp_path / "one"),
        ),
        progress=False,
    )
    assert_same_steps(two["log_history"], one.log_history)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    assert all(torch.allclose(before[name], weight, atol=1e-5) for name, weight in after.items())
    lineage = json.loads((tmp_path / "two/teleflm_manifest.json").read_text())["lineage"]
    assert lineage["batch_size"] == 1, "the two compute one row together"
    export_model(tmp_path / "two/checkpoint-2", tmp_path / "hub")

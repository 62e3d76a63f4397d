# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Schedules of growth: numbers by hand, by torch's own counter of FLOPs, and everything that is refused."""

import json
import math
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from conversion.architecture import Architecture, load_preset
from conversion.checkpoint.errors import CheckpointError
from growth.stages import flops_per_token, plan_stages, read_schedule, schedule_names
from modeling_teleflm import TeleFLMForCausalLM
from teleflm.app import app
from tests.fixtures.tiny import tiny_config

SMALL = {"model": "tele-flm-52b", "tokens": 10**12, "batch_tokens": 2**22, "learning_rate": 1.5e-4, "gpus": 896}
SMALL |= {"tensor_parallel": 4, "pipeline_parallel": 2}
LARGE = {**SMALL, "model": "tele-flm-102b", "tokens": 10**11, "learning_rate": 1e-4, "warmup_steps": 100}


def schedule(*stages, **more):
    return read_schedule({"stages": list(stages), **more}, "a.yaml")


def test_flops_are_those_that_torch_counts():
    """Of a forward and a backward pass; torch counts all products, the whole square of attention too."""
    model = TeleFLMForCausalLM._from_config(tiny_config(), attn_implementation="eager").train()
    tokens = torch.arange(48).reshape(1, 48)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, use_cache=False).logits.sum().backward()
    architecture = Architecture.from_config(model.config.to_dict(), "config")
    norms = sum(parameter.numel() for name, parameter in model.named_parameters() if "norm" in name)
    assert counter.get_total_flops() == 48 * (flops_per_token(architecture, 48) - 6 * norms)


def test_the_numbers_by_hand():
    plan = plan_stages(schedule(SMALL, LARGE, sequence_length=4096, gpu_tflops=312, mfu=0.5, disk_speed="1GB"))
    first, second = plan.stages
    old, new = (Architecture.from_config(load_preset(name), name) for name in ("tele-flm-52b", "tele-flm-102b"))
    assert (
        first.parameters
        == old.num_parameters
        == sum((2 * 80384 * 8192, 8192, 64 * (4 * 8192**2 + 3 * 8192 * 21824 + 2 * 8192)))
    )
    each = 6 * (old.num_parameters - 80384 * 8192) + 12 * 64 * 8192 * 4096
    assert first.flops == each * 10**12
    assert first.gpu_hours == pytest.approx(first.flops / (312e12 * 0.5) / 3600)
    assert first.days == pytest.approx(first.gpu_hours / 896 / 24)
    assert first.steps == math.ceil(10**12 / 2**22)
    assert first.data_parallel == 896 // 8
    layer = 4 * 8192**2 + 3 * 8192 * 21824 + 2 * 8192
    assert first.state_bytes == round((80384 * 8192 + 32 * layer) / 4 * (6 + 12 / 112))
    assert first.activation_bytes == 4096 * (64 * 2 * 8192 + 8 * 8192 + 4 * 128 * 128 + 8 * 21824) // 4
    assert (first.growth_bytes, first.growth_factor) == (0, 1.0)
    assert second.growth_bytes == 10 * (old.num_parameters + new.num_parameters)
    assert second.growth_seconds == second.growth_bytes / 1e9
    assert second.matrix_learning_rate == pytest.approx(1e-4 * 8192 / 10240)
    assert second.checkpoint_bytes == 14 * new.num_parameters
    assert plan.tokens == 11 * 10**11
    assert plan.scratch_flops == pytest.approx(flops_per_token(new, 4096) * plan.tokens)
    assert plan.scratch_tokens * flops_per_token(new, 4096) == pytest.approx(plan.flops)
    assert plan.saved == pytest.approx(1 - plan.flops / plan.scratch_flops)


def test_without_moments_and_checkpointing():
    plan = plan_stages(schedule(SMALL, LARGE, moments=False, activation_checkpointing=False))
    assert plan.stages[1].growth_bytes == 2 * sum(cost.parameters for cost in plan.stages)
    assert plan.stages[0].activation_bytes == 4096 * 64 * (8 * 8192 + 4 * 128 * 128 + 8 * 21824) // 4


def test_sizes_on_top_of_the_stage_before():
    grown = {
        **LARGE,
        "model": None,
        "set": {"hidden_size": 10240, "num_attention_heads": 80, "intermediate_size": 27264},
    }
    grown["set"]["num_hidden_layers"] = 80
    a, b = plan_stages(schedule(SMALL, grown)).stages[1], plan_stages(schedule(SMALL, LARGE)).stages[1]
    assert a.parameters == b.parameters
    assert a.stage.name == "102.2B"


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"learning_rate": 2e-4}, "its peak learning rate 0.0002 is above tele-flm-52b's 0.00015"),
        ({"model": "tele-flm-1t"}, "20.5 times the parameters in one growth: arXiv 2605.13405"),
        ({"mask_steps": 100}, "masks that rise in 100 steps: short ones postpone"),
        ({"mask_steps": 30000}, "masks that rise over 30,000 steps, of 23,842 there are"),
        ({"warmup_steps": 30000}, "a warm-up over 30,000 steps, of 23,842 there are"),
        ({"decay_steps": 23800}, "a warm-up and a decay over 23,900 steps, of 23,842 there are"),
        ({"model": "tele-flm-52b"}, "is of the sizes of tele-flm-52b: nothing grows"),
        ({"batch_tokens": 5_000_000}, "batch_tokens 5,000,000 is 10.9 rows of 4,096 tokens for each of 112 copies"),
        ({"tensor_parallel": 1, "pipeline_parallel": 1}, "needs .* GB on a GPU, before buffers and fragmentation"),
    ],
)
def test_what_speaks_against_a_stage_is_said(changes, warning):
    warnings = plan_stages(schedule(SMALL, {**LARGE, **changes})).stages[1].warnings
    assert [found for found in warnings if re.match(warning, found)], warnings


def test_fresh_moments_want_a_warm_up():
    plan = plan_stages(schedule(SMALL, {**LARGE, "warmup_steps": 0}, moments=False))
    assert any("no warm-up and fresh moments" in warning for warning in plan.stages[1].warnings)
    assert not any("fresh" in warning for warning in plan_stages(schedule(SMALL, LARGE)).stages[1].warnings)


@pytest.mark.parametrize(
    ("stages", "more", "message"),
    [
        ([LARGE, SMALL], {}, "stage tele-flm-52b: cannot grow out of tele-flm-102b: hidden_size would shrink"),
        ([{**SMALL, "decay_steps": 10}, LARGE], {}, "stage tele-flm-52b: its learning rate decays over decay_steps 10"),
        ([{**SMALL, "token": 1}], {}, "stage 1: token is unknown; did you mean tokens"),
        ([SMALL], {"mfus": 1}, "a.yaml: mfus is unknown; did you mean mfu"),
        ([SMALL], {"mfu": 1.5}, "mfu is 1.5; it is a share"),
        ([SMALL], {"mfu": 0}, "mfu is 0, expected a number at least 1e-30"),
        ([SMALL], {"disk_speed": "fast"}, "disk_speed: size 'fast' is not"),
        ([SMALL], {"moments": "yes"}, "moments is 'yes'; expected true or false"),
        ([{**SMALL, "tokens": "many"}], {}, "stage 1: tokens is 'many', expected a whole number"),
        ([{**SMALL, "tokens": 10**400}], {}, "tokens is an integer of about 401 digits, expected a whole"),
        ([{**SMALL, "tokens": 1.5}], {}, "tokens is 1.5, expected a whole number"),
        ([{**SMALL, "tokens": True}], {}, "tokens is True"),
        ([{**SMALL, "learning_rate": float("nan")}], {}, "learning_rate is nan, expected a number"),
        ([{**SMALL, "learning_rate": None}], {}, "does not say learning_rate"),
        ([{**SMALL, "gpus": 12}], {}, "gpus is 12, no multiple of tensor_parallel 4 x pipeline_parallel 2"),
        ([{**SMALL, "tensor_parallel": 7}], {}, "gpus is 896|no multiple of tensor_parallel 7"),
        ([{**SMALL, "model": "tele-flm-52"}], {}, "no such file, and no preset"),
        ([{**SMALL, "model": None}], {}, "says no model; the first stage needs one"),
        ([SMALL, {**LARGE, "model": None}], {}, "says neither model nor set"),
        ([SMALL, {**LARGE, "model": None, "set": {"depth": 3}}], {}, "set has depth, which is no size"),
        ([SMALL, {**LARGE, "model": None, "set": {"hidden_size": 10000}}], {}, "cannot grow out of|hidden_size"),
        ([], {}, "stages is no list of stages"),
        (["x"], {}, "stage 1 is a str"),
    ],
)
def test_what_makes_no_sense_is_refused(stages, more, message):
    with pytest.raises(CheckpointError, match=message) as error:
        plan_stages(schedule(*stages, **more))
    assert "\n" not in str(error.value)


HUGE = 10**400
DEEPER = {**LARGE, "model": None}


@pytest.mark.parametrize(
    ("stage", "more", "message"),
    [
        ({"set": {"num_hidden_layers": 10**38}}, {}, "num_hidden_layers is 1000.*, expected at most 10,000"),
        ({"set": {"num_hidden_layers": 1e38}}, {}, "num_hidden_layers is 1e\\+38, expected an integer"),
        ({"set": {"num_hidden_layers": 10**9}}, {}, "num_hidden_layers is 1000000000, expected at most 10,000"),
        ({"set": {"num_hidden_layers": HUGE}}, {}, "num_hidden_layers is 1000"),
        ({"set": {"intermediate_size": 10**38}}, {}, "intermediate_size is 1000.*, expected at most 2,147,483,647"),
        ({"model": 10**200}, {}, "model is an integer of about 201 digits: no such file"),
        ({"tokens": 1e31}, {}, "tokens is 1e\\+31, expected a whole number"),
        ({"batch_tokens": -HUGE}, {}, "batch_tokens is an integer of about 401 digits, expected a whole number"),
        ({"learning_rate": 1e-31}, {}, "learning_rate is 1e-31, expected a number at least 1e-30"),
        ({"gpus": math.inf}, {}, "gpus is inf, expected a whole number"),
        ({}, {"gpu_memory": "1" * 401}, "gpu_memory: size '1111.* is more than the 9,223"),
        ({}, {"gpu_memory": HUGE}, "gpu_memory: size an integer of about 401 digits is more than the 9,223"),
        ({}, {"gpu_memory": math.nan}, "gpu_memory: size nan is not a positive number of bytes"),
        ({}, {"disk_speed": math.inf}, "disk_speed: size inf is more than"),
        ({}, {"disk_speed": 0}, "disk_speed: size 0 is not a positive number of bytes"),
        ({}, {"gpu_tflops": 5e-324}, "gpu_tflops is 5e-324, expected a number at least 1e-30"),
        ({}, {"mfu": 1e-320}, "mfu is .*e-32\\d, expected a number at least 1e-30"),
        ({}, {"sequence_length": 1e38}, "sequence_length is 1e\\+38, expected a whole number"),
        ({}, {"moments": HUGE}, "moments is an integer of about 401 digits; expected true or false"),
    ],
)
def test_numbers_that_no_plan_can_have_are_refused_in_one_line(stage, more, message, tmp_path):
    """Through the command, from YAML: no traceback, and no minutes of counting layers."""
    changed = {**(DEEPER if "set" in stage else LARGE), **stage}
    content = {"stages": [SMALL, {key: value for key, value in changed.items() if value is not None}], **more}
    (tmp_path / "plan.yaml").write_text(json.dumps(content).replace("Infinity", ".inf").replace("NaN", ".nan"))
    result = CliRunner().invoke(app, ["grow-plan", str(tmp_path / "plan.yaml")])
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert re.search(message, line), line


@pytest.mark.parametrize("value", ["1" * 401, "nan", "inf", "0", "-1", "1e400"])
@pytest.mark.parametrize("option", ["--gpu-memory", "--disk-speed", "--gpu-tflops", "--mfu"])
def test_options_that_no_plan_can_have_are_refused_in_one_line(option, value):
    result = CliRunner().invoke(app, ["grow-plan", "tele-flm-1t", option, value])
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)


def test_the_largest_numbers_that_are_read_are_planned(tmp_path):
    """At the ends of all ranges, nothing becomes infinite, and no text of it fails."""
    ends = {"tokens": 10**30, "batch_tokens": 1, "learning_rate": 1e-30, "gpus": 1, "set": {"vocab_size": 2**31 - 1}}
    wide = {"num_hidden_layers": 10_000, "intermediate_size": 2**31 - 8}
    first = {**ends, "model": "tele-flm-52b", "set": wide}
    last = {**ends, "learning_rate": 1e30, "set": {**wide, "vocab_size": 2**31 - 1}}
    content = {"stages": [first, last], "mfu": 1e-30, "gpu_tflops": 1e-30, "sequence_length": 10**30, "disk_speed": 1}
    (tmp_path / "plan.yaml").write_text(json.dumps(content))
    command = ["grow-plan", str(tmp_path / "plan.yaml")]
    plan = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert all(math.isfinite(stage["gpu_hours"]) for stage in plan["stages"])
    assert plan["train"][0]["max_steps"] == 10**30
    text = CliRunner().invoke(app, command)
    assert text.exit_code == 3, text.output


def test_the_command(tmp_path):
    assert schedule_names() == ["tele-flm-1t"]
    result = CliRunner().invoke(app, ["grow-plan", "tele-flm-1t", "--json", "--plot", str(tmp_path / "plan.png")])
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert [round(stage["parameters"] / 1e9) for stage in plan["stages"]] == [53, 102, 1084]
    assert [keys.get("continue_schedule") for keys in plan["train"]] == [None, 0.85, 0.588235294118]
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    text = CliRunner().invoke(app, ["grow-plan", "tele-flm-1t", "--gpu-memory", "40GB"])
    assert text.exit_code == 3
    assert "assumed" in text.output
    assert "warning: needs" in text.output
    (tmp_path / "bad.yaml").write_text("stages: [")
    for place in (tmp_path / "bad.yaml", "nowhere"):
        bad = CliRunner().invoke(app, ["grow-plan", str(place)])
        assert bad.exit_code == 2

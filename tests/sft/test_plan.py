# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The formulas of the plan beside peaks that torch's profiler saw, and beside what others have published."""

import gc
import json

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore
from trl.trainer import utils as trl_utils

from conversion.architecture import Architecture, load_preset
from modeling_teleflm import TeleFLMConfig, TeleFLMForCausalLM
from sft import plan as planning
from sft.plan import PlanError, Setup, estimate_memory, flops_per_token, load_architecture, plan_training
from tests.sft.test_validate import sft

SIZES = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "use_mup": True,
    "output_mult": 0.5,
    "mup_scale_factor": 16.0,
}
B52, T1 = (Architecture.from_config(load_preset(name)) for name in ("tele-flm-52b", "tele-flm-1t"))


@pytest.fixture
def small_tiles(monkeypatch):
    """Or TRL's head, slower and larger on a CPU, would hide the layers."""
    monkeypatch.setattr(trl_utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 256)
    monkeypatch.setattr(planning, "_TILE_VOCABULARY", 256)


def measured_peak(sizes: dict, setup: Setup) -> int:
    """Bytes of two steps of two micro-batches each: the weights, and what the allocator handed out on top at most."""
    dtype = {2: torch.bfloat16, 4: torch.float32}[setup.weight_bytes]
    config = TeleFLMConfig(**sizes, max_position_embeddings=setup.max_length)
    model = TeleFLMForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa")
    trl_utils.add_fused_lm_head(model)
    if setup.method == "lora":
        adapters = LoraConfig(r=setup.lora_rank, target_modules="all-linear", lora_dropout=0.05)
        model = get_peft_model(model, adapters)
    if setup.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    ids = torch.randint(config.vocab_size, (setup.micro_batch_size, setup.max_length))
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in range(2):
            for _ in range(2):
                with torch.autocast("cpu", torch.bfloat16, enabled=setup.compute_bytes == 2):
                    loss = model(input_ids=ids, labels=ids, use_cache=False, fused_lm_head=True).loss
                loss.backward()
                del loss
            optimizer.step()
            optimizer.zero_grad()
    current = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current)
    return peak + sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("activation_checkpointing", [False, True])
@pytest.mark.parametrize(("weight_bytes", "compute_bytes"), [(4, 4), (2, 2), (4, 2)])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_memory_beside_measured_peaks(method, weight_bytes, compute_bytes, activation_checkpointing, small_tiles):
    setup = Setup(
        method=method,
        gpus=1,
        strategy="ddp",
        micro_batch_size=2,
        max_length=256,
        activation_checkpointing=activation_checkpointing,
        weight_bytes=weight_bytes,
        compute_bytes=compute_bytes,
        on_gpu=False,
    )
    model = Architecture.from_config({**SIZES, "model_type": "TeleFLM"})
    estimate = estimate_memory(model, setup, overhead=False).total
    measured = measured_peak(SIZES, setup)
    assert 0.98 * measured < estimate < min(1.08, planning.GREATEST_EXCESS) * measured


def three_layers(dtype: torch.dtype, activation_checkpointing: bool) -> tuple[TeleFLMForCausalLM, Architecture]:
    """Layers of the 52B at their true widths; under FakeTensorMode tensors hold no data."""
    config = {**load_preset("tele-flm-52b"), "num_hidden_layers": 3}
    sizes = {field: config[field] for field in (*SIZES, "rms_norm_eps", "max_position_embeddings")}
    model = TeleFLMForCausalLM._from_config(TeleFLMConfig(**sizes), dtype=dtype)
    trl_utils.add_fused_lm_head(model)
    if activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train(), Architecture.from_config(config)


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_memory_at_true_widths(activation_checkpointing):
    """torch's own tracker counts two steps on one device, gradients kept."""
    with FakeTensorMode():
        model, architecture = three_layers(torch.bfloat16, activation_checkpointing)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        ids = torch.zeros(1, 2048, dtype=torch.long)
        tracker = MemTracker()
        tracker.track_external(model, optimizer, ids)
        with tracker:
            for _ in range(2):
                tracker.memory_tracking.clear()
                model(input_ids=ids, labels=ids, use_cache=False, fused_lm_head=True).loss.backward()
                optimizer.step()
    ((_, peak),) = tracker.get_tracker_snapshot("peak").items()
    setup = Setup(gpus=1, strategy="ddp", activation_checkpointing=activation_checkpointing, on_gpu=False)
    estimate = estimate_memory(architecture, setup, overhead=False)
    assert estimate.total == pytest.approx(peak["Total"], rel=0.01)


@pytest.mark.slow
def test_memory_of_a_rank_of_sixteen(small_tiles):
    """torch's tracker of fully_shard counts two micro-batches, without the moments, which it does not shard."""
    dist.init_process_group("fake", rank=0, world_size=16, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (16,))
        with FakeTensorMode():
            model, architecture = three_layers(torch.float32, activation_checkpointing=True)
            bfloat16 = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, torch.bfloat16)
            for module in [*model.model.layers, model]:
                fully_shard(module, mesh=mesh, mp_policy=bfloat16)
            ids = torch.zeros(1, 2048, dtype=torch.long)
            tracker = FSDPMemTracker(model)
            tracker.track_inputs((ids,))
            with tracker:
                for _ in range(2):
                    with torch.autocast("cpu", torch.bfloat16):
                        loss = model(input_ids=ids, labels=ids, use_cache=False, fused_lm_head=True).loss
                    loss.backward()
                    tracker.reset_mod_stats()
    finally:
        dist.destroy_process_group()
    ((_, peak),) = tracker.get_tracker_snapshot("peak").items()
    estimate = estimate_memory(architecture, Setup(gpus=16, on_gpu=False), overhead=False)
    assert 1 < (estimate.total - estimate.optimizer) / peak["Total"] < 1.06


@pytest.mark.parametrize("method", ["full", "lora"])
def test_adapters_and_parameters_are_counted_as_peft_does(method):
    config = TeleFLMConfig(**SIZES)
    with torch.device("meta"):
        model = TeleFLMForCausalLM(config)
        if method == "lora":
            model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    plan = plan_training(Architecture.from_config(config.to_dict()), Setup(method=method, lora_rank=8), 80 * 10**9)
    assert plan.parameters == sum(p.numel() for p in model.parameters())
    assert plan.trained_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_what_others_have_published():
    """ZeRO's 16 bytes a parameter; bitsandbytes' 4.127 bits a weight with double quantization (QLoRA, 2305.14314)."""
    full = estimate_memory(B52, Setup(gpus=64))
    states = full.weights + full.gradients + full.optimizer
    assert states == pytest.approx(16 * B52.num_parameters / 64)
    for strategy, buckets in (("fsdp2", 0), ("ddp", 1)):
        replicas = estimate_memory(B52, Setup(gpus=64, strategy=strategy, weight_bytes=4))
        assert replicas.gradients == replicas.weights * (1 + buckets)
    outside = 2 * B52.vocab_size * B52.hidden_size + (2 * B52.num_hidden_layers + 1) * B52.hidden_size
    adapters = 4 * plan_training(B52, Setup(method="qlora"), 1).trained_parameters
    quantized = estimate_memory(B52, Setup(method="qlora", gpus=1, strategy="ddp")).weights - 2 * outside - adapters
    assert 8 * quantized / (B52.num_parameters - outside) == pytest.approx(4.127, abs=1e-3)


def test_flops_beside_a_counter():
    """torch counts the matrix products and attention of a forward and a backward pass of the real model."""
    from torch.utils.flop_counter import FlopCounterMode

    config = TeleFLMConfig(**SIZES)
    model = TeleFLMForCausalLM._from_config(config, attn_implementation="eager")
    ids = torch.randint(config.vocab_size, (1, 64))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    architecture = Architecture.from_config(config.to_dict())
    # Norms are counted by the formula, which takes all parameters, and not by torch.
    assert 64 * flops_per_token(architecture, Setup(max_length=64)) == pytest.approx(
        counter.get_total_flops(), rel=2e-3
    )


def test_alternatives_fit_and_nothing_smaller_does():
    plan = plan_training(B52, Setup(gpus=4, micro_batch_size=8, activation_checkpointing=False), 80 * 10**9)
    assert not plan.fits
    changes = {change: setup for change, setup, _ in plan.alternatives}
    assert {setup.method for setup in changes.values()} == {"full", "lora", "qlora"}
    for _, setup, memory in plan.alternatives:
        assert estimate_memory(B52, setup) == memory
        assert memory.total <= plan.gpu_memory
    full = next(setup for setup in changes.values() if setup.method == "full")
    assert estimate_memory(B52, planning.replace(full, gpus=full.gpus - 8)).total > plan.gpu_memory
    assert plan_training(T1, Setup(method="qlora", gpus=8, strategy="ddp"), 10**9).alternatives == ()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--model", "tele-flm-52b", "--gpus", 16], 0, "It fits."),
        (["--model", "tele-flm-52b"], 3, "It does not fit. What would:"),
        (["--model", "tele-flm-1t", "--method", "lora", "--gpus", 256, "--tokens", 1000], 0, "1,000 tokens: 0.0 hours"),
        (["--model", "tele-flm-3b"], 2, "teleflm: tele-flm-3b: no such file, and no preset; known presets: "),
        (["--model", "tele-flm-52b", "--method", "all"], 2, "method is 'all'; expected one of full, lora, qlora."),
        (["--model", "tele-flm-52b", "--strategy", "x"], 2, "strategy is 'x'; expected one of fsdp2, zero3, ddp."),
        (["--model", "tele-flm-52b", "--dtype", "int8"], 2, "dtype is 'int8'; expected bfloat16 or float32."),
        (
            ["--model", "tele-flm-52b", "--gpu-memory", "80"],
            2,
            "size '80' has no unit, and so few bytes hold nothing: 80GB",
        ),
        (["--model", "tele-flm-52b", "--gpu-memory", "lots"], 2, "size 'lots' is not a positive number of bytes"),
        (["--model", "tele-flm-52b", "--mfu", 35], 2, "mfu is 35.0; it is a share, above 0 and at most 1."),
        (["--model", "tele-flm-52b", "--gpu-tflops", 0], 2, "gpu_tflops is 0.0; it must be above 0."),
    ],
)
def test_the_command(arguments, status, message):
    found, out, err = sft("plan", *arguments)
    assert found == status
    assert message in out + err
    assert len(err.splitlines()) == (status == 2)


def test_the_command_for_scripts_and_for_folders(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**load_preset("tele-flm-52b"), "num_hidden_layers": 2}))
    plan = json.loads(sft("plan", "--model", tmp_path, "--gpus", 1, "--tokens", 10**9, "--json")[1])
    assert plan["fits"] is True
    assert plan["memory"]["total"] == sum(size for name, size in plan["memory"].items() if name != "total")
    assert plan["hours"] == pytest.approx(1e9 * plan["time"]["flops_per_token"] / (312e12 * 0.35) / 3600)
    assert load_architecture(tmp_path / "config.json").num_hidden_layers == 2
    with pytest.raises(PlanError, match="gpus is 0; it must be at least 1"):
        Setup(gpus=0)

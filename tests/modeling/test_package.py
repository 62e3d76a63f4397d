# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The package: what importing it costs and registers, and what transformers' tools read off the classes."""

import configparser
import importlib
import importlib.util
import json
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel

import modeling_teleflm
from modeling_teleflm import TeleFLMConfig, TeleFLMForCausalLM, TeleFLMModel
from tests.fixtures.tiny import tiny_config, tiny_model
from tests.modeling.oracles import LlamaByHand

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_importing_it_adds_little_to_importing_llama():
    program = (
        "import json, sys; from transformers import LlamaForCausalLM; before = set(sys.modules);"
        "import modeling_teleflm; print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    added = {name.partition(".")[0] for name in json.loads(run.stdout)}
    third_party = added - sys.stdlib_module_names - {"modeling_teleflm", "transformers"}
    assert third_party <= {"sentencepiece", "_sentencepiece", "jinja2", "markupsafe", "tokenizers"}


@pytest.mark.slow
def test_the_entry_point_for_vllm_is_there_and_asks_for_vllm_when_it_is_called():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    name, _, target = config["options.entry_points"]["vllm.general_plugins"].strip().partition(" = ")
    point = EntryPoint(name, target, "vllm.general_plugins")
    program = f"import sys, {point.module}; print('vllm' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"
    assert callable(point.load())
    assert importlib.util.find_spec("modeling_teleflm.vllm_model") is not None  # which it names, and does not import


def test_importing_it_twice_does_no_harm():
    importlib.reload(modeling_teleflm)
    assert type(AutoModelForCausalLM.from_config(tiny_config())) is TeleFLMForCausalLM


@pytest.mark.parametrize(("ours", "stock"), [(TeleFLMModel, LlamaModel), (TeleFLMForCausalLM, LlamaForCausalLM)])
def test_every_capability_is_llamas(ours, stock):
    capabilities = [
        name
        for name in dir(stock)
        if name.startswith(("_supports", "_can", "_no_split", "_skip", "_keys", "_tied", "supports_", "_input_embed"))
        and not callable(getattr(stock, name))
    ]
    assert len(capabilities) > 10
    assert {name: getattr(ours, name) for name in capabilities} == {name: getattr(stock, name) for name in capabilities}


def test_parallelism_plans_are_llamas():
    model = tiny_model()
    llama = LlamaByHand(model).llama
    assert "model.layers.*.self_attn.q_proj" in model._tp_plan
    for plan in ("_tp_plan", "_pp_plan", "_fsdp_plan"):
        assert getattr(model, plan, None) == getattr(llama, plan, None)
    for plan in ("base_model_tp_plan", "base_model_pp_plan"):
        assert getattr(TeleFLMConfig, plan) == getattr(LlamaConfig, plan)


@pytest.fixture
def one_process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def blocks_accelerate_would_shard(model):
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    policy = fsdp2_prepare_auto_wrap_policy(plugin, model)
    return [module for module in model.modules() if policy(module)]


def test_fsdp2_shards_every_block_and_nothing_else(one_process_group):
    model, ids = tiny_model(), torch.arange(3, 23)[None]
    expected = model(ids).logits
    blocks = blocks_accelerate_would_shard(model)
    assert blocks == list(model.model.layers)
    for module in (*blocks, model):
        fully_shard(module, mesh=one_process_group)
    output = model(ids, labels=ids)
    torch.testing.assert_close(output.logits, expected)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_no_split_module_that_does_not_exist_is_caught(monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(model, "_no_split_modules", ["TeleFLMDecoderLayer"])
    with pytest.raises(ValueError, match="TeleFLMDecoderLayer"):
        blocks_accelerate_would_shard(model)


def test_it_compiles_into_one_graph():
    model, ids = tiny_model(), torch.arange(3, 23)[None]
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids).logits)

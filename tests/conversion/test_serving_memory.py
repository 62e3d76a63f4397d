# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What serving takes, counted out of transformers' own modules and caches; docs/serving.md has these numbers."""

import math
import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache

from conversion.architecture import Architecture, load_preset
from conversion.checkpoint.errors import CheckpointError
from conversion.serving_memory import serving_memory
from tests.fixtures.tiny import tiny_config, tiny_model

DOC = Path(__file__).parents[2] / "docs/serving.md"
SIZES = {
    "vocab_size": 640,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_hidden_layers": 6,
}


def brute_force(fields: dict, tensor: int, pipeline: int, weights: str) -> int:
    """The fullest of all GPUs, tensor by tensor of a stock Llama."""
    config = LlamaConfig(**fields)
    with torch.device("meta"):
        state = LlamaForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    each = math.ceil(config.num_hidden_layers / pipeline)
    matrix, other = {"float32": (4, 4), "bfloat16": (2, 2), "fp8": (1, 2)}[weights]
    stages = [0] * pipeline
    for name, weight in state.items():
        if "layers." in name:
            stage = int(name.split(".")[2]) // each
        else:
            stage = pipeline - 1 if name.startswith(("lm_head", "model.norm")) else 0
        is_matrix = weight.dim() == 2 and "layers." in name
        if is_matrix:
            stages[stage] += math.ceil(weight.numel() / tensor) * matrix
            stages[stage] += weight.shape[0] * 4 if weights == "fp8" else 0
        else:
            stages[stage] += weight.numel() // (tensor if weight.dim() == 2 else 1) * other
    return max(stages)


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "fp8"])
@pytest.mark.parametrize(
    ("more", "tensor", "pipeline"),
    [
        ({}, 1, 1),
        ({}, 4, 1),
        ({"num_key_value_heads": 2}, 2, 1),
        ({"tie_word_embeddings": True}, 2, 1),
        ({"head_dim": 16}, 2, 1),
        ({}, 2, 3),
        ({}, 1, 4),
        ({"attention_bias": True}, 2, 2),
    ],
)
def test_weights_are_those_of_the_modules(more, tensor, pipeline, weights):
    """With stages, the one that has the head holds the last norm; another that is as full is taken to have it too."""
    fields = {**SIZES, **more}
    model = Architecture.from_config({**fields, "model_type": "TeleFLM"}, with_biases=True)
    found = serving_memory(model, tensor_parallel=tensor, pipeline_parallel=pipeline, weights=weights).weights
    expected = brute_force(fields, tensor, pipeline, weights)
    norm = model.hidden_size * 4
    biases = expected * 0.02 if more.get("attention_bias") else 0  # counted whole on each GPU
    assert expected <= found <= expected + (norm if pipeline > 1 else 0) + biases


def test_the_cache_is_that_of_transformers():
    model = tiny_model(tiny_config(num_key_value_heads=2))
    ids = torch.arange(3, 13)[None]
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    nbytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    found = serving_memory(Architecture.from_config(model.config.to_dict()), weights="float32", cache_bytes=4)
    assert found.per_token * ids.shape[1] == nbytes


def test_heads_fewer_than_gpus_are_repeated():
    model = Architecture.from_config({**SIZES, "num_key_value_heads": 2, "model_type": "TeleFLM"})
    two, eight = (serving_memory(model, tensor_parallel=gpus).per_token for gpus in (2, 8))
    assert two == eight == serving_memory(model).per_token // 2


def test_tokens_that_find_room():
    memory = serving_memory(Architecture.from_config(load_preset("tele-flm-52b")), tensor_parallel=2)
    assert memory.tokens(10**9) == 0
    room = memory.tokens(80 * 10**9)
    assert memory.weights + room * memory.per_token + (2 << 30) <= 72 * 10**9
    assert memory.weights + (room + 1) * memory.per_token + (2 << 30) > 72 * 10**9


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"weights": "int3"}, "weights is 'int3', expected one of float32, bfloat16, float16, fp8"),
        ({"tensor_parallel": 3}, r"tensor_parallel is 3, which does not divide 64 \(attention heads\)"),
        ({"tensor_parallel": 0}, "tensor_parallel is 0; it must be at least 1"),
        ({"pipeline_parallel": 65}, "pipeline_parallel is 65, the model has 64 layers"),
    ],
)
def test_what_is_refused(how, message):
    with pytest.raises(CheckpointError, match=message):
        serving_memory(Architecture.from_config(load_preset("tele-flm-52b")), **how)


def test_the_numbers_of_the_document():
    """| preset | weights | T x P | GPU | weights on each | a token | tokens |"""
    row = re.compile(
        r"\| `(tele-flm-\w+)` \| (bfloat16|fp8) \| (\d+) x (\d+) \| (\d+) GB \| ([\d.]+) GB \| ([\d.]+) MB \| "
        r"([\d,]+|none) \|"
    )
    rows = row.findall(DOC.read_text())
    assert len(rows) >= 10
    for preset, weights, tensor, pipeline, size, held, token, room in rows:
        model = Architecture.from_config(load_preset(preset))
        memory = serving_memory(
            model, tensor_parallel=int(tensor), pipeline_parallel=int(pipeline), weights=weights, cache_bytes=2
        )
        assert f"{memory.weights / 1e9:.1f}" == held
        assert f"{memory.per_token / 1e6:.2f}" == token
        tokens = memory.tokens(int(size) * 10**9)
        assert (f"{tokens:,}" if tokens else "none") == room

# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Checkpoints to benchmark with: the shapes of real ones, the bytes random, or absent where nothing reads them."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import GIB

from conversion.architecture import Architecture, load_preset
from conversion.checkpoint.containers import safetensors_index, safetensors_shards
from conversion.checkpoint.dtypes import BFLOAT16
from conversion.checkpoint.plan import TensorPlan
from conversion.mapping import weights


def tele_flm_config(gib: float) -> dict[str, Any]:
    """A Tele-FLM as wide as a 7B model, with as many layers as the size allows."""
    config = load_preset("tele-flm-52b") | {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "num_hidden_layers": 1,
    }
    one = Architecture.from_config(config).num_parameters
    two = Architecture.from_config(config | {"num_hidden_layers": 2}).num_parameters
    layers = 1 + round((gib * GIB / BFLOAT16.itemsize - one) / (two - one))
    return config | {"num_hidden_layers": max(1, layers)}


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight of a Tele-FLM."""
    architecture = Architecture.from_config(config)
    return {name: weight.shape(architecture) for name, weight, _ in weights(architecture)}


def random_weight(generator: np.random.SFC64, shape: tuple[int, ...]) -> torch.Tensor:
    """A bfloat16 tensor of random bits; all finite and below 2."""
    count = int(np.prod(shape))
    words = generator.random_raw(-(-count // 4)).view(np.uint16)[:count]
    words &= 0xBFFF  # the highest bit of the exponent
    return torch.from_numpy(words.view(np.int16)).view(torch.bfloat16).reshape(shape)


def write_bin(folder: Path, config: Mapping[str, Any], shards: int = 1, *, sparse: bool = False) -> list[Path]:
    """Write a Hugging Face checkpoint with `torch.save`.

    Args:
        folder: where; made.
        config: of a Tele-FLM.
        shards: number of files.
        sparse: leave holes where the weights would be.

    Returns:
        The weight files.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    generator, weight_map, files = np.random.SFC64(0), {}, []
    for index, part in enumerate(_parts(shapes(config), shards)):
        name = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{index + 1:05d}-of-{shards:05d}.bin"
        if sparse:
            with torch.serialization.skip_data():
                torch.save({k: torch.empty(shape, dtype=torch.bfloat16) for k, shape in part.items()}, folder / name)
        else:
            torch.save({k: random_weight(generator, shape) for k, shape in part.items()}, folder / name)
        weight_map |= dict.fromkeys(part, name)
        files.append(folder / name)
    if shards > 1:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return files


def _parts(all_shapes: dict[str, tuple[int, ...]], count: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """Split by bytes into so many runs, none empty."""
    sizes = np.cumsum([np.prod(shape, dtype=np.int64) for shape in all_shapes.values()])
    owners = np.minimum((sizes - 1) * count // sizes[-1], count - 1)
    for index in range(count):
        yield {name: shape for (name, shape), owner in zip(all_shapes.items(), owners, strict=True) if owner == index}


def write_safetensors(folder: Path, config: Mapping[str, Any], *, sparse: bool = False) -> list[Path]:
    """Write a Hugging Face checkpoint as safetensors of at most 5 GB; holes for weights if `sparse`."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    plans = [TensorPlan(name, shape, BFLOAT16, ()) for name, shape in shapes(config).items()]
    shards = safetensors_shards(plans, 5 * 10**9)
    generator = np.random.SFC64(0)
    for shard in shards:
        with (folder / shard.filename).open("wb") as file:
            file.write(shard.header)
            for tensor, _ in () if sparse else shard.tensors:
                file.write(random_weight(generator, tensor.shape).view(torch.uint8).numpy().data)
            file.truncate(shard.nbytes)
    if len(shards) > 1:
        (folder / "model.safetensors.index.json").write_bytes(safetensors_index(shards))
    return [folder / shard.filename for shard in shards]

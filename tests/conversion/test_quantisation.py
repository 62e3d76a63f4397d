# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Quantised checkpoints are copied as they are, to the byte, or refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion import convert_checkpoint, export_checkpoint
from conversion.checkpoint.bytes import LocalFile
from conversion.checkpoint.dtypes import BY_NAME
from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.plan import View
from conversion.quantisation import quantisation
from growth import Mask, fold_masks, grow_checkpoint
from tests.fixtures.checkpoint_runs import run_teleflm
from tests.fixtures.tiny import tiny_config, tiny_model

UP = "model.layers.1.mlp.up_proj"
Tensors = dict[str, torch.Tensor]


def fp8(tensors: Tensors) -> None:
    """DeepSeek's: blocks of float8 with float32 scales."""
    weight = tensors.pop(f"{UP}.weight")
    tensors[f"{UP}.weight"] = (weight / 0.0123).to(torch.float8_e4m3fn)
    tensors[f"{UP}.weight_scale_inv"] = torch.tensor([[0.0123]])


def compressed(tensors: Tensors) -> None:
    """compressed-tensors' pack-quantized."""
    rows, columns = tensors.pop(f"{UP}.weight").shape
    tensors[f"{UP}.weight_packed"] = torch.arange(rows * columns // 8, dtype=torch.int32).reshape(rows, -1)
    tensors[f"{UP}.weight_scale"] = torch.full((rows, 1), 0.0123, dtype=torch.bfloat16)
    tensors[f"{UP}.weight_shape"] = torch.tensor([rows, columns])


def gptq(tensors: Tensors) -> None:
    rows, columns = tensors.pop(f"{UP}.weight").shape
    tensors[f"{UP}.qweight"] = torch.arange(rows * columns // 8, dtype=torch.int32).reshape(-1, rows)
    tensors[f"{UP}.qzeros"] = torch.ones(1, rows // 8, dtype=torch.int32)
    tensors[f"{UP}.scales"] = torch.full((1, rows), 0.0123, dtype=torch.float16)
    tensors[f"{UP}.g_idx"] = torch.zeros(columns, dtype=torch.int32)


def awq(tensors: Tensors) -> None:
    gptq(tensors)
    del tensors[f"{UP}.g_idx"]


def bnb_4bit(tensors: Tensors) -> None:
    weight = tensors[f"{UP}.weight"]
    tensors[f"{UP}.weight"] = torch.arange(weight.numel() // 2).to(torch.uint8).reshape(-1, 1)
    tensors[f"{UP}.weight.absmax"] = torch.full((weight.numel() // 64,), 0.0123)
    tensors[f"{UP}.weight.quant_map"] = torch.linspace(-1, 1, 16)
    tensors[f"{UP}.weight.quant_state.bitsandbytes__nf4"] = torch.zeros(80, dtype=torch.uint8)


def bnb_8bit(tensors: Tensors) -> None:
    weight = tensors[f"{UP}.weight"]
    tensors[f"{UP}.weight"] = weight.mul(100).to(torch.int8)
    tensors[f"{UP}.SCB"] = torch.full((weight.shape[0],), 0.0123)


FORMATS: dict[str, Callable[[Tensors], None]] = {
    "fp8": fp8,
    "compressed-tensors": compressed,
    "gptq": gptq,
    "awq": awq,
    "bitsandbytes in 4 bits": bnb_4bit,
    "bitsandbytes in 8 bits": bnb_8bit,
}


def quantised(folder: Path, method: str, *, with_config: bool, model_type: str = "TeleFLM") -> Path:
    tiny_model(tiny_config(), dtype=torch.bfloat16).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    FORMATS[method](tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"model_type": model_type}
    if with_config:
        config["quantization_config"] = {"quant_method": method.split()[0]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("model_type", ["TeleFLM", "llama"])
@pytest.mark.parametrize("with_config", [True, False], ids=["by its configuration", "by its tensors"])
@pytest.mark.parametrize("method", FORMATS)
def test_copied_as_it_is_or_refused(method, with_config, model_type, tmp_path):
    source = quantised(tmp_path / "in", method, with_config=with_config, model_type=model_type)
    with pytest.raises(CheckpointError) as error:
        convert_checkpoint(source, tmp_path / "out", dtype="bfloat16")
    says = f"({method.split()[0]}, says quantization_config of its config.json)" if with_config else UP
    assert says in str(error.value)
    assert "--dtype bfloat16 would round its scales. Without --dtype it is copied as it is" in str(error.value)
    assert not (tmp_path / "out").exists()
    result = convert_checkpoint(source, tmp_path / "out")
    assert any(note.startswith("Quantised (") for note in result.notes)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert (after[name].dtype, after[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads((source / "config.json").read_text())


WAYS: dict[str, Callable[[Path, Path], Any]] = {
    "export": lambda source, out: export_checkpoint(source, out, to="granite"),
    "growth": lambda source, out: grow_checkpoint(source, out, {"intermediate_size": 96}),
    "folding": lambda source, out: fold_masks(source, out),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", FORMATS)
def test_nothing_is_made_of_it(method, way, tmp_path):
    source = quantised(tmp_path / "in", method, with_config=False)
    with pytest.raises(CheckpointError) as error:
        WAYS[way](source, tmp_path / "out")
    assert str(error.value).startswith(f"{source}: is quantised (")
    assert f"{way} would change its weights without their scales" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_masked_one(tmp_path):
    tiny_model(tiny_config()).save_pretrained(tmp_path / "in")
    grow_checkpoint(tmp_path / "in", tmp_path / "masked", {"intermediate_size": 96}, method=Mask())
    file = tmp_path / "masked/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(CheckpointError, match=r"is quantised \(fp8, .*; folding would"):
        fold_masks(tmp_path / "masked", tmp_path / "out")


def test_the_command(tmp_path):
    source = quantised(tmp_path / "in", "fp8", with_config=True)
    result = run_teleflm("convert", source, tmp_path / "out", "--dtype", "bfloat16", folder=tmp_path)
    assert result.returncode == 2
    assert "is quantised (fp8, says quantization_config" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("config", "tensors", "says"),
    [
        (None, {}, None),
        ({"quantization_config": None}, {"w": "bfloat16"}, None),
        ({"quantization_config": {}}, {"w": "bfloat16"}, None),
        ({"quantization_config": {"bits": 4}}, {}, "by an unnamed method, says quantization_config"),
        ({"quantization_config": 8}, {}, "by an unnamed method, says quantization_config"),
        ({"compression_config": {"quant_method": "sparseml"}}, {}, "sparseml, says compression_config"),
        ({}, {"a.weight": "float8_e5m2"}, "a.weight is float8_e5m2"),
        ({}, {"a.weight": "uint8"}, "a.weight is uint8"),
        ({}, {"a.scale": "float8_e8m0fnu"}, "a.scale is float8_e8m0fnu"),
        ({}, {"a.blocks": "float4_e2m1fn_x2"}, "a.blocks is float4_e2m1fn_x2"),
        ({}, {"a.self_attn.k_scale": "float32"}, "it holds a.self_attn.k_scale"),
        ({}, {"a.down_proj_blocks": "uint8", "a.down_proj_scales": "uint8"}, "it holds a.down_proj_blocks"),
        ({}, {"a.weight": "complex64", "b.weight": "bool"}, None),
        # Buffers and factors of models that are not quantised.
        ({}, {"a.attn.bias": "bool", "a.position_ids": "int64", "a.masked_bias": "float32"}, None),
        ({}, {"a.layer_scale": "float32", "a.logit_scale": "float32", "scales": "float32"}, None),
    ],
    ids=str,
)
def test_how_it_is_told(config, tensors, says):
    views = {name: View.contiguous(LocalFile("f", 0, ""), 0, (2, 2), BY_NAME[dtype]) for name, dtype in tensors.items()}
    found = quantisation(config, views)
    assert (found is None) if says is None else found is not None and found.startswith(says)


def test_buffers_do_not_keep_a_model_from_being_cast(tmp_path):
    """An ordinary model with masks and indices among its tensors, as older releases of transformers saved them."""
    tiny_model(tiny_config()).save_pretrained(tmp_path / "in")
    config = json.loads((tmp_path / "in/config.json").read_text()) | {"model_type": "llama"}
    (tmp_path / "in/config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "in/model.safetensors") | {
        "model.layers.0.attn.bias": torch.ones(4, 4, dtype=torch.bool),
        "model.position_ids": torch.arange(9),
    }
    save_file(tensors, tmp_path / "in/model.safetensors", {"format": "pt"})
    convert_checkpoint(tmp_path / "in", tmp_path / "out", dtype="bfloat16")
    after = load_file(tmp_path / "out/model.safetensors")
    assert after[f"{UP}.weight"].dtype == torch.bfloat16
    assert torch.equal(after["model.position_ids"], torch.arange(9))
    assert np.asarray(after["model.layers.0.attn.bias"]).all()

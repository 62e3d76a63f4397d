# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""8-bit floats beside compressed-tensors itself: the same bytes, the same configuration, and it loads and computes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import modeling_teleflm  # noqa: F401  (registers the architecture)
from conversion import convert_checkpoint
from tests.fixtures.tiny import tiny_config, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.external
pytest.importorskip("compressed_tensors")

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def write(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A model of 128 wide, which is wide enough for an error that is typical."""
    config = tiny_config(hidden_size=128, intermediate_size=320, num_key_value_heads=2, num_attention_heads=8)
    tiny_model(config, dtype=dtype).save_pretrained(folder)
    tiny_tokenizer(folder).save_pretrained(folder)
    return folder


def by_compressed_tensors(folder: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """The model that its own compressor makes, and the configuration that it writes."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    scheme = {"group_0": preset_name_to_scheme("FP8_DYNAMIC", ["Linear"])}
    apply_quantization_config(model, QuantizationConfig(config_groups=scheme, ignore=["lm_head"]))
    for module in model.modules():
        if getattr(module, "quantization_scheme", None):
            weight, args = module.weight.data, module.quantization_scheme.weights
            scale, _ = calculate_qparams(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), args)
            module.weight_scale.data.copy_(scale)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    (folder / "written").mkdir()
    compressor.update_config(folder / "written")
    config = json.loads((folder / "written/config.json").read_text())["quantization_config"]
    return model.state_dict(), config


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bytes_and_the_configuration(dtype, tmp_path):
    """On a CPU, of 16 bits, it rounds quotients to these first: some then lie on the middle of two neighbours.

    The codes there are the other neighbour's at most, and never nearer. Given the same weights in float32, it rounds
    once, as a GPU does.
    """
    source = write(tmp_path / "in", DTYPES[dtype])
    convert_checkpoint(source, tmp_path / "out", quantize="fp8")
    found = load_file(tmp_path / "out/model.safetensors")
    expected, config = by_compressed_tensors(source)
    assert json.loads((tmp_path / "out/config.json").read_text())["quantization_config"] == config
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        if tensor.dtype != torch.float8_e4m3fn:
            assert torch.equal(found[name], tensor), name
            continue
        differs = found[name].view(torch.uint8) != tensor.view(torch.uint8)
        assert differs.float().mean() < {"bfloat16": 0.05, "float16": 0.01, "float32": 1e-9}[dtype], name
        steps = found[name].view(torch.uint8)[differs].int() - tensor.view(torch.uint8)[differs].int()
        assert (steps.abs() <= 1).all(), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_rounding_is_its_own_in_float32(dtype, tmp_path):
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
    from compressed_tensors.quantization.quant_scheme import FP8_DYNAMIC

    args = FP8_DYNAMIC["weights"]
    source = write(tmp_path / "in", DTYPES[dtype])
    convert_checkpoint(source, tmp_path / "out", quantize="fp8")
    convert_checkpoint(tmp_path / "out", tmp_path / "back", dtype=dtype)
    weights, found, back = (
        load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out", tmp_path / "back")
    )
    for name in (name for name in weights if f"{name}_scale" in found):
        scale = found[f"{name}_scale"]
        codes = quantize(weights[name].float(), scale.float(), None, args, dtype=torch.float8_e4m3fn)
        assert torch.equal(codes.view(torch.uint8), found[name].view(torch.uint8)), name
        assert torch.equal(dequantize(found[name], scale, None, args), back[name]), name


def test_it_loads_and_computes(tmp_path):
    """Transformers' loader: as it is, with activations in 8 bits; and dequantised, which is what we make of it."""
    from transformers import CompressedTensorsConfig

    source = write(tmp_path / "in")
    convert_checkpoint(source, tmp_path / "out", quantize="fp8")
    convert_checkpoint(tmp_path / "out", tmp_path / "back", dtype="bfloat16")
    ids = torch.randint(0, 600, (4, 64), generator=torch.Generator().manual_seed(0))
    dequantised = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    models = {
        "source": AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16),
        "fp8": AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16),
        "dequantised": AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16, **dequantised),
        "back": AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.bfloat16),
    }
    with torch.no_grad():
        logits = {name: model(ids).logits.double() for name, model in models.items()}
    assert torch.equal(logits["dequantised"], logits["back"])

    def error(found: torch.Tensor, expected: torch.Tensor) -> float:
        return float((found.double() - expected.double()).norm() / expected.double().norm())

    weights, back = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
    quantised = load_file(tmp_path / "out/model.safetensors")
    of_weights = [error(back[name], weights[name]) for name in weights if f"{name}_scale" in quantised]
    # Of normal numbers: half a step of 1/8 to 1/16 of them, evenly spread, is 2.6 % in root mean square.
    assert 0.024 < min(of_weights) <= max(of_weights) < 0.029
    of_back, of_fp8 = (error(logits[name], logits["source"]) for name in ("back", "fp8"))
    assert of_back < 0.2
    assert of_fp8 < 1.6 * of_back  # activations have as many bits as weights
    print(
        f"errors: {max(of_weights):.4f} of a weight, of logits {of_back:.4f} by weights, {of_fp8:.4f} with activations"
    )
    generated = models["fp8"].generate(ids[:1, :8], max_new_tokens=8, do_sample=False)
    assert generated.shape == (1, 16)

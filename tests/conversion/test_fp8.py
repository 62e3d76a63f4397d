# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""A Tele-FLM in 8-bit floats: from whatever it lies in, in one pass, interrupted or not; and back.

The oracle is torch, on the weights of the model; `tests/external` has compressed-tensors itself.
"""

import importlib.util
import json
import random
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion import WriteOptions, convert_checkpoint, convert_to_hub, export_checkpoint, inspect_checkpoint
from conversion.architecture import Architecture, load_preset
from conversion.checkpoint.errors import CheckpointError, Unquantisable
from conversion.checkpoint.manifest import read_manifest
from conversion.checkpoint.sources import WEIGHT_FILES
from conversion.compressed_tensors import check_scheme
from conversion.hub.front_matter import parse_metadata, split_card
from conversion.hub.published_card import CardOptions
from conversion.hub.publishing import publish
from growth import Mask, grow_checkpoint
from tests.conversion.test_row_quant import by_torch
from tests.fixtures.checkpoint_runs import Instant, contents, finish, make_sources, run_teleflm, write
from tests.fixtures.llama import save_llama
from tests.fixtures.tiny import tiny_config, tiny_model, tiny_tokenizer

UP = "model.layers.1.mlp.up_proj.weight"
SMALL = WriteOptions(max_shard_size="20KB")
Tensors = dict[str, torch.Tensor]


def quantised(weights: Mapping[str, torch.Tensor]) -> Tensors:
    """The linear layers but the head as torch has them, and the rest as it is."""
    found: Tensors = {}
    for name, weight in weights.items():
        if name.startswith("model.layers.") and weight.ndim == 2:
            scales, codes = by_torch(weight)
            found |= {name: codes.view(torch.float8_e4m3fn), f"{name}_scale": scales}
        else:
            found[name] = weight
    return found


def load(folder: Path) -> Tensors:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Grouped queries, so that Megatron's order of rows is not ours."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model(tiny_config(num_key_value_heads=2), dtype=torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer(folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def fp8(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fp8") / "out"
    convert_checkpoint(model, folder, quantize="fp8")
    return folder


def as_bin(model: Path, folder: Path) -> dict[str, Any]:
    shutil.copytree(model, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return {}


def as_megatron(model: Path, folder: Path) -> dict[str, Any]:
    export_checkpoint(model, folder, to="megatron", tp=2, pp=3, multipliers="keep")
    return {"tokenizer": model, "vocab_size": 640}


def as_torch_dist(model: Path, folder: Path) -> dict[str, Any]:
    export_checkpoint(model, folder, to="torch_dist", multipliers="keep", options=WriteOptions(max_shard_size="4KB"))
    return {"tokenizer": model, "vocab_size": 640}


def as_dcp(model: Path, folder: Path) -> dict[str, Any]:
    export_checkpoint(model, folder, to="dcp", options=WriteOptions(max_shard_size="4KB"))
    return {"tokenizer": model}


WAYS: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "safetensors": lambda model, folder: shutil.copytree(model, folder) and {},
    "bin": as_bin,
    "megatron": as_megatron,
    "torch_dist": as_torch_dist,
    "dcp": as_dcp,
}


@pytest.mark.parametrize("way", WAYS)
def test_from_whatever_it_lies_in(way, model, tmp_path):
    how = WAYS[way](model, tmp_path / "in")
    convert_checkpoint(tmp_path / "in", tmp_path / "out", quantize="fp8", options=SMALL, **how)
    assert_same(load(tmp_path / "out"), quantised(load_file(model / "model.safetensors")))
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    assert read_manifest(tmp_path / "out")["lineage"]["quantized"] == "fp8"
    inspection = inspect_checkpoint(tmp_path / "out", check=True)
    assert (inspection.problems, inspection.damages) == ([], [])
    assert inspection.parameters == inspection.architecture.num_parameters
    assert inspection.quantised == "compressed-tensors, says quantization_config of its config.json"
    assert "linear layers quantised to fp8" in inspection.lineage[-1]


def test_rows_are_quantised_as_they_are_cast(tmp_path):
    """A scale is that of the values which the output would have had."""
    tiny_model().save_pretrained(tmp_path / "in")
    convert_checkpoint(tmp_path / "in", tmp_path / "cast", quantize="fp8", dtype="bfloat16")
    convert_checkpoint(tmp_path / "in", tmp_path / "kept", quantize="fp8")
    weights = load_file(tmp_path / "in/model.safetensors")
    assert_same(load(tmp_path / "kept"), quantised(weights))
    assert_same(load(tmp_path / "cast"), quantised({name: w.to(torch.bfloat16) for name, w in weights.items()}))


def test_biases_and_tied_embeddings_stay(tmp_path):
    config = tiny_config(attention_bias=True, tie_word_embeddings=True)
    tiny_model(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "in")
    convert_checkpoint(tmp_path / "in", tmp_path / "out", quantize="fp8")
    assert_same(load(tmp_path / "out"), quantised(load_file(tmp_path / "in/model.safetensors")))


def test_the_card(fp8):
    card = (fp8 / "README.md").read_text()
    size = sum(tensor.nbytes for tensor in load(fp8).values())
    assert f"float8_e4m3fn in linear layers, bfloat16, {size / 1000:.0f} kB" in card
    assert f"| float8_e4m3fn, as stored | {size / 1000:.0f} kB |" in card
    assert "Quantisation changes the function" in card
    assert "bit by bit" not in card
    assert "pip install compressed-tensors" in card


def test_what_the_card_says_of_errors(model, fp8):
    """Within 1/16 of what it was, or within 1/1024 of the scale."""
    weights, codes = load_file(model / "model.safetensors"), load(fp8)
    for name in (name for name in weights if f"{name}_scale" in codes):
        scale, before = codes[f"{name}_scale"].double(), weights[name].double()
        error = (codes[name].double() * scale - before).abs()
        assert (error <= torch.maximum(before.abs() / 16, scale / 1024)).all()


# Interrupted, and by several.


def test_killed_and_resumed(tmp_path):
    make_sources(tmp_path / "sources")
    options = {"max_shard_size": 7000, "workers": 2, "quantised_folder": True}
    assert finish(write(tmp_path / "sources", tmp_path / "whole", options, trace=tmp_path / "trace")) == 0
    whole = contents(tmp_path / "whole")
    passed = [line.rsplit(" ", 2) for line in sorted((tmp_path / "trace").read_text().splitlines())]
    delicate = ("pwrite shard", "write shard.journal", "rename shard.done", "rename shard.partial")
    rng = random.Random(0)
    for number in range(8):
        call = delicate[number % len(delicate)]
        name, count, moment = rng.choice([line for line in passed if line[0].startswith(call)])
        out = tmp_path / f"{number}"
        instant = Instant(name, int(count), moment)
        assert finish(write(tmp_path / "sources", out, options, kill_at=instant)) == -signal.SIGKILL, instant
        found = contents(out)
        assert not any(file in found for file in WEIGHT_FILES) or found.keys() >= whole.keys(), instant
        assert finish(write(tmp_path / "sources", out, options)) == 0, instant
        assert contents(out) == whole, instant


@pytest.mark.parametrize("digest", [True, False], ids=["digests", "no digests"])
def test_ranks_write_the_same(digest, tmp_path):
    make_sources(tmp_path / "sources")
    options = {"max_shard_size": 7000, "quantised_folder": True, "digest": digest}
    assert finish(write(tmp_path / "sources", tmp_path / "one", {**options, "workers": 1})) == 0
    ranks = [
        write(tmp_path / "sources", tmp_path / "two", {**options, "rank": rank, "world_size": 2}) for rank in range(2)
    ]
    assert [finish(rank) for rank in ranks] == [0, 0]
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_already_done_and_otherwise(model, tmp_path):
    for line, says in (
        (("--quantize", "fp8"), "Wrote"),
        (("--quantize", "fp8"), "already done"),
        ((), "lineage.quantized was 'fp8' and is None"),
    ):
        result = run_teleflm("convert", model, tmp_path / "out", *line, folder=tmp_path)
        assert says in " ".join((result.stdout + result.stderr).split())


# Refused.


def masked(model: Path, folder: Path) -> Path:
    grow_checkpoint(model, folder, {"intermediate_size": 96}, method=Mask())
    return folder


@pytest.mark.parametrize(
    ("make", "how", "says"),
    [
        (lambda model, out: model, {"quantize": "int4"}, r"^--quantize is 'int4'; fp8 is what there is\.$"),
        (
            lambda model, out: model,
            {"quantize": "fp8-block"},
            r"^--quantize fp8-block: blocks of 128 do not divide this model's 32, 16, 88; --quantize fp8 has a scale",
        ),
        (lambda model, out: model, {"quantize": "fp8", "dtype": "float64"}, r"is float64, and --quantize takes 16 or"),
        (lambda model, out: model / "model.safetensors", {"quantize": "fp8"}, r"this is a file of weights"),
        (masked, {"quantize": "fp8"}, r"--quantize fp8 is for the folder of a Tele-FLM.* a TeleFLMMasked model\.$"),
    ],
    ids=["unknown", "blocks", "float64", "a file alone", "masked"],
)
def test_what_is_not_quantised(make, how, says, model, tmp_path):
    with pytest.raises(CheckpointError, match=says) as error:
        convert_checkpoint(make(model, tmp_path / "in"), tmp_path / "out", **how)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("preset", "why"),
    [
        ("tele-flm-52b", "blocks of 128 do not divide this model's 21,824"),
        ("tele-flm-102b", "blocks are not written here"),
        ("tele-flm-1t", "blocks are not written here"),
    ],
)
def test_blocks_of_the_published_sizes(preset, why):
    with pytest.raises(CheckpointError, match=f"^--quantize fp8-block: {why}; --quantize fp8 has a scale for each"):
        check_scheme("fp8-block", Architecture.from_config(load_preset(preset)))


def test_moments_are_not_written_beside(model, tmp_path):
    how = as_megatron(model, tmp_path / "run")
    with pytest.raises(CheckpointError, match="--optimizer writes moments to train on with, which --quantize fp8"):
        convert_checkpoint(tmp_path / "run", tmp_path / "out", quantize="fp8", optimizer=True, **how)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("way", ["safetensors", "megatron"])
@pytest.mark.parametrize("allow", [False, True])
def test_a_nan_is_named(allow, way, model, tmp_path):
    broken = shutil.copytree(model, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights[UP][3, 4] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    how = WAYS[way](broken, tmp_path / "in")
    with pytest.raises(Unquantisable, match=rf"{UP}\[3, 4\] is NaN or infinite as bfloat16.*leave --quantize out\.$"):
        convert_checkpoint(tmp_path / "in", tmp_path / "out", quantize="fp8", allow_nonfinite=allow, **how)
    assert not any((tmp_path / "out" / name).exists() for name in WEIGHT_FILES)


def test_what_is_not_made_of_it(fp8, tmp_path):
    for line in (
        ("export", fp8, tmp_path / "out", "--to", "granite"),
        ("grow", fp8, tmp_path / "out", "--set", "intermediate_size=96"),
        ("fold", fp8, tmp_path / "out"),
        ("convert", fp8, tmp_path / "out", "--quantize", "fp8"),
        ("verify", fp8, fp8),
    ):
        result = run_teleflm(*line, folder=tmp_path)
        assert (result.returncode, len(result.stderr.splitlines())) == (2, 1), result.stderr
        assert "is quantised (" in result.stderr
        assert not (tmp_path / "out").exists()


# Back.


def test_to_bfloat16_and_back(model, fp8, tmp_path):
    """Products as compressed-tensors has them where scales are bfloat16: code times scale, in bfloat16."""
    result = convert_checkpoint(fp8, tmp_path / "back", dtype="bfloat16")
    assert "21 weights are products with their scales, rounded once." in " ".join(result.notes)
    codes, back = load(fp8), load(tmp_path / "back")
    assert back.keys() == load_file(model / "model.safetensors").keys()
    for name, tensor in back.items():
        scale = codes.get(f"{name}_scale")
        assert torch.equal(tensor, codes[name] if scale is None else codes[name].to(torch.bfloat16) * scale), name
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert "quantization_config" not in config
    assert inspect_checkpoint(tmp_path / "back", check=True).quantised is None
    card = (tmp_path / "back/README.md").read_text()
    assert "what was lost stays lost" in card
    assert "bit by bit" not in card


@pytest.mark.parametrize("model_type", ["TeleFLM", "llama"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), "rows"])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_other_scales(scale_dtype, shape, model_type, fp8, tmp_path):
    """One for a tensor, as releases of FP8 with static activations have it; float32; a model that is not ours."""
    folder = shutil.copytree(fp8, tmp_path / "in")
    tensors, expected = load(folder), {}
    for name in [name for name in tensors if name.endswith(".weight_scale")]:
        rows, weight = tensors[name].numel(), name.removesuffix("_scale")
        count = rows if shape == "rows" else 1
        tensors[name] = (
            torch.linspace(0.001, 0.002, count).to(scale_dtype).reshape((rows,) if shape == "rows" else shape)
        )
        tensors[name.replace("weight", "input")] = torch.tensor(1.0)
        product = tensors[weight].double() * tensors[name].double().reshape(-1, 1)
        expected[weight] = product.to(torch.bfloat16) if scale_dtype == torch.bfloat16 else product.float().bfloat16()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"model_type": model_type}
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["strategy"] = "tensor"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "teleflm_manifest.json").unlink()
    result = convert_checkpoint(folder, tmp_path / "out", dtype="bfloat16")
    left_out = next(note for note in result.notes if note.startswith("21 scales of activations were left out, as "))
    assert left_out.endswith(".input_scale.")
    found = load(tmp_path / "out")
    assert not any("scale" in name for name in found)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def no_scale(tensors: Tensors, config: dict[str, Any]) -> None:
    del tensors[f"{UP}_scale"]


def no_weight(tensors: Tensors, config: dict[str, Any]) -> None:
    del tensors[UP]


def not_float8(tensors: Tensors, config: dict[str, Any]) -> None:
    tensors[UP] = tensors[UP].to(torch.bfloat16)


def groups(tensors: Tensors, config: dict[str, Any]) -> None:
    tensors[f"{UP}_scale"] = tensors[f"{UP}_scale"].repeat(1, 2)


def of_integers(tensors: Tensors, config: dict[str, Any]) -> None:
    tensors[f"{UP}_scale"] = tensors[f"{UP}_scale"].int()


def keys_and_values(tensors: Tensors, config: dict[str, Any]) -> None:
    tensors["model.layers.1.self_attn.k_scale"] = torch.tensor(0.1)


def int8(tensors: Tensors, config: dict[str, Any]) -> None:
    config["config_groups"]["group_0"]["weights"]["type"] = "int"


def four_bits(tensors: Tensors, config: dict[str, Any]) -> None:
    config["config_groups"]["group_0"]["weights"]["num_bits"] = 4


def blocks(tensors: Tensors, config: dict[str, Any]) -> None:
    config["config_groups"]["group_0"]["weights"]["strategy"] = "block"


def caches(tensors: Tensors, config: dict[str, Any]) -> None:
    config["kv_cache_scheme"] = {"num_bits": 8}


def sparse(tensors: Tensors, config: dict[str, Any]) -> None:
    config["sparsity_config"] = {"format": "sparse-24-bitmask"}


def nothing(tensors: Tensors, config: dict[str, Any]) -> None:
    """A configuration that outlived what it describes."""
    for name in [name for name in tensors if name.endswith("_scale")]:
        weight = name.removesuffix("_scale")
        tensors[weight] = tensors[weight].to(torch.bfloat16) * tensors.pop(name)


def nonsense(tensors: Tensors, config: dict[str, Any]) -> None:
    config["config_groups"] = {"group_0": 7}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (no_scale, rf"{UP} is float8_e4m3fn, its scale is missing; download it again"),
        (no_weight, rf"{UP}_scale is there, but {UP} is missing, expected float8_e4m3fn"),
        (not_float8, rf"{UP}_scale is there, but {UP} is bfloat16, expected float8_e4m3fn"),
        (groups, rf"{UP}_scale has shape \(88, 2\), {UP} \(88, 32\); one scale, or one a row, is read"),
        (of_integers, rf"{UP}_scale is int32, expected bfloat16, float16 or float32"),
        (nothing, r"quantization_config of its config.json says 8-bit floats, and no tensor is; remove it from there"),
        *(
            (change, f"--dtype bfloat16 would round its scales.*, and {field} of its quantization_config is {value}")
            for change, field, value in (
                (int8, "config_groups.group_0.weights.type", "'int'"),
                (four_bits, "config_groups.group_0.weights.num_bits", "4"),
                (blocks, "config_groups.group_0.weights.strategy", "'block'"),
                (caches, "kv_cache_scheme", "{'num_bits': 8}"),
                (sparse, "sparsity_config", "{'format': 'sparse-24-bitmask'}"),
                (nonsense, "config_groups.group_0.weights", "None"),
            )
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_cannot_be_undone(change, says, fp8, tmp_path):
    folder = shutil.copytree(fp8, tmp_path / "in")
    tensors, config = load(folder), json.loads((folder / "config.json").read_text())
    change(tensors, config["quantization_config"])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=says):
        convert_checkpoint(folder, tmp_path / "out", dtype="bfloat16")
    assert not (tmp_path / "out").exists()
    if change is nothing:
        assert any("no tensor is; remove it" in problem for problem in inspect_checkpoint(folder).problems)
        del config["quantization_config"]
        (folder / "config.json").write_text(json.dumps(config))
        convert_checkpoint(folder, tmp_path / "out", dtype="bfloat16")
    if "scale" in says and change is not int8:
        inspect_checkpoint(folder)  # says it, and does not fail


def test_advice_on_scales_that_nothing_describes_says_what_it_takes(model, fp8, tmp_path):
    """`--dtype` goes by config.json: where that is silent, what names it says so, and it says what it lacks."""
    folder = shutil.copytree(fp8, tmp_path / "in")
    config = json.loads((folder / "config.json").read_text())
    described = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    problem = " ".join(inspect_checkpoint(folder).problems)
    assert "`teleflm convert --dtype bfloat16` does so of compressed-tensors' 8-bit floats" in problem
    assert problem.endswith("where config.json says that they are.")
    with pytest.raises(CheckpointError, match=r"and its quantization_config is none of compressed-tensors\.$"):
        convert_checkpoint(folder, tmp_path / "out", dtype="bfloat16")
    with pytest.raises(CheckpointError, match=r"and of one file alone no config\.json is read\.$"):
        convert_checkpoint(fp8 / "model.safetensors", tmp_path / "out", dtype="bfloat16")
    dense = {"format": "dense", "global_sparsity": 0.1, "targets": []}  # as llm-compressor writes it beside FP8
    config["quantization_config"] = {**described, "sparsity_config": dense}
    (folder / "config.json").write_text(json.dumps(config))
    convert_checkpoint(folder, tmp_path / "out", dtype="bfloat16")
    convert_checkpoint(fp8, tmp_path / "back", dtype="bfloat16")
    assert_same(load(tmp_path / "out"), load(tmp_path / "back"))


@pytest.mark.parametrize("to", ["megatron", "torch_dist"])
def test_a_run_of_a_llama_is_no_more_quantised_than_its_folder(to, tmp_path):
    export_checkpoint(save_llama(tmp_path / "in", torch.bfloat16), tmp_path / "run", to=to)
    with pytest.raises(
        CheckpointError, match=r"run/release: --quantize fp8 is for a Tele-FLM; by its config\.json this"
    ):
        convert_checkpoint(tmp_path / "run", tmp_path / "out", quantize="fp8")
    assert not (tmp_path / "out").exists()


# The Hub.


def test_streamed_to_the_hub_from_the_hub(here, model, fp8, tmp_path):
    here.add_repository("owner/base", {path.name: path for path in model.iterdir()})
    how = {"quantize": "fp8", "card": CardOptions(license="apache-2.0")}
    convert_to_hub("owner/base", "owner/fp8", "1MB", work=tmp_path / "work", options=SMALL, **how)
    files = here.repositories["owner/fp8"].files()
    (tmp_path / "copy").mkdir()
    for name, content in files.items():
        (tmp_path / "copy" / name).write_bytes(content)
    assert_same(load(tmp_path / "copy"), load(fp8))
    assert (inspect_checkpoint(tmp_path / "copy", check=True).damages, len(files) > 3) == ([], True)
    card = parse_metadata(split_card(files["README.md"].decode())[0])
    assert (card["base_model"], card["base_model_relation"]) == ("owner/base", "quantized")
    assert "float8_e4m3fn in linear layers, bfloat16" in files["README.md"].decode()


def test_published(here, fp8):
    published = publish(fp8, "owner/fp8", card=CardOptions(license="apache-2.0"))
    (loaded,) = (note for note in published.notes if note.startswith("Loaded without this package: "))
    assert ("one token" in loaded) == (importlib.util.find_spec("compressed_tensors") is not None)
    files = here.repositories["owner/fp8"].files()
    assert files["model.safetensors"] == (fp8 / "model.safetensors").read_bytes()
    assert "| Parameters | 75,744 |" in files["README.md"].decode()  # which no scale is one of

# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Exports to megatron-core's torch_dist: it loads them on any number of ranks, with Adam's state, and computes alike.

The oracle of every rank's part is `chunk_weights`, which slices Hub tensors by its own definition.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from conversion import WriteOptions, convert_checkpoint, export_checkpoint, inspect_checkpoint
from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.manifest import read_manifest
from growth.training.mup import parameter_groups
from modeling_teleflm import TeleFLMForCausalLM
from tests.fixtures.megatron_reference import Chunk, chunk_weights
from tests.fixtures.megatron_worlds import ROOT, TOKENS
from tests.fixtures.tiny import tiny_config, tiny_model

pytestmark = pytest.mark.slow

MOMENTS = ("exp_avg", "exp_avg_sq")
STEP = 700
SMALL = WriteOptions(max_shard_size="2KB")  # so that tensors have many chunks


def save(folder: Path, **fields) -> TeleFLMForCausalLM:
    model = tiny_model(tiny_config(vocab_size=100, num_hidden_layers=4, num_key_value_heads=2, **fields))
    model.save_pretrained(folder)
    norms = [parameter for name, parameter in model.named_parameters() if "norm" in name]
    matrices = [parameter for name, parameter in model.named_parameters() if "norm" not in name]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    model(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    for state in optimizer.state.values():
        state["step"].fill_(STEP)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    return TeleFLMForCausalLM.from_pretrained(folder)


def moments(folder: Path, key: str, model: TeleFLMForCausalLM) -> dict[str, torch.Tensor]:
    names = [name for name, _ in model.named_parameters()]
    ordered = [name for name in names if "norm" not in name] + [name for name in names if "norm" in name]
    saved = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    return {name: saved[index][key] for index, name in enumerate(ordered)}


def scaled(tensors: dict[str, torch.Tensor], power: float) -> dict[str, torch.Tensor]:
    """By the multipliers that the export folds: 2.5 on the embeddings, 0.5 / 4 on the logits."""
    factors = {"model.embed_tokens.weight": 2.5**power, "lm_head.weight": 0.125**power}
    return {name: (tensor.double() * factors.get(name, 1.0)).float() for name, tensor in tensors.items()}


def part(tensors: dict[str, torch.Tensor], model: TeleFLMForCausalLM, rank: int, ranks: int) -> dict[str, torch.Tensor]:
    layers = range(model.config.num_hidden_layers)
    held = chunk_weights(tensors, model.config, Chunk(layers, rank=rank, ranks=ranks), divisor=128)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):  # whose padding is noise there
        rows = torch.arange(len(held[name])) + rank * len(held[name])
        held[name] = torch.where((rows < model.config.vocab_size)[:, None], held[name], 0.0)
    return held


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> Path:
    """A source, its export, and what ranks of megatron-core have of that."""
    folder = tmp_path_factory.mktemp("torch_dist")
    save(folder / "source")
    export_checkpoint(folder / "source", folder / "out", to="torch_dist", optimizer=True, options=SMALL)
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tests.fixtures.megatron_dist_loader",
        str(folder),
        "out",
        "1",
        "2",
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-5000:]
    return folder


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_library_loads_weights_and_moments(ranks, loaded):
    model = TeleFLMForCausalLM.from_pretrained(loaded / "source")
    weights = {name: tensor.detach() for name, tensor in model.named_parameters()}
    found = torch.load(loaded / f"out-{ranks}.pt", weights_only=False)
    for rank, held in enumerate(found):
        expected = part(scaled(weights, 1.0), model, rank, ranks)
        assert held["weights"].keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(held["weights"][name], tensor), name
            assert torch.equal(held["masters"][name], tensor), name
        for key, power in zip(MOMENTS, (-1.0, -2.0), strict=True):
            for name, tensor in part(scaled(moments(loaded / "source", key, model), power), model, rank, ranks).items():
                assert torch.equal(held["states"][name][key], tensor), (name, key)
                assert held["states"][name]["step"] == STEP
        assert held["iteration"] == STEP
        assert [(group["wd_mult"], group["weight_decay"]) for group in held["groups"]] == [(1.0, 0.1), (0.0, 0.0)]
        assert {(group["lr"], group["betas"], group["eps"]) for group in held["groups"]} == {(1e-3, (0.9, 0.95), 1e-8)}


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_distributed_optimizer_loads_the_same(ranks, loaded):
    model = TeleFLMForCausalLM.from_pretrained(loaded / "source")
    weights = {name: tensor.detach() for name, tensor in model.named_parameters()}
    states = {key: moments(loaded / "source", key, model) for key in MOMENTS}
    expected = {"param": scaled(weights, 1.0), "exp_avg": scaled(states["exp_avg"], -1.0)}
    expected["exp_avg_sq"] = scaled(states["exp_avg_sq"], -2.0)
    for rank, held in enumerate(torch.load(loaded / f"out-{ranks}.pt", weights_only=False)):
        for key, tensors in expected.items():
            for name, tensor in part(tensors, model, rank, ranks).items():
                assert torch.equal(held["distributed"][name][key].view_as(tensor), tensor), (name, key)
                assert held["distributed"][name]["step"] == STEP


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_library_computes_and_steps_the_same(ranks, loaded):
    model = TeleFLMForCausalLM.from_pretrained(loaded / "source")
    with torch.no_grad():
        expected = model(TOKENS).logits
    found = torch.load(loaded / f"out-{ranks}.pt", weights_only=False)
    assert (found[0]["logits"][..., :100] - expected).abs().max() < 1e-5
    # A step with gradients that are the weights, of plain torch on what the export says they are.
    folded = scaled({name: tensor.detach() for name, tensor in model.named_parameters()}, 1.0)
    weights = {name: torch.nn.Parameter(tensor) for name, tensor in folded.items()}
    norms = [tensor for name, tensor in weights.items() if "norm" in name]
    matrices = [tensor for name, tensor in weights.items() if "norm" not in name]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    first, second = (
        scaled(moments(loaded / "source", key, model), power) for key, power in zip(MOMENTS, (-1, -2), strict=True)
    )
    for name, tensor in weights.items():
        state = {"exp_avg": first[name].clone(), "exp_avg_sq": second[name].clone()}
        optimizer.state[tensor] = {"step": torch.tensor(float(STEP)), **state}
        tensor.grad = tensor.detach().clone()
    optimizer.step()
    stepped = {name: tensor.detach() for name, tensor in weights.items()}
    for rank, held in enumerate(found):
        for name, tensor in part(stepped, model, rank, ranks).items():
            torch.testing.assert_close(held["stepped"][name], tensor, rtol=1e-6, atol=1e-7)
            assert not tensor.any() or not torch.equal(held["stepped"][name], held["weights"][name])


def test_megatron_bridge_is_told_the_same_model(loaded):
    """Its class is megatron-core's with a few fields more."""
    for held in torch.load(loaded / "out-1.pt", weights_only=False):
        assert held["other_fields"] == {}
    told = yaml.safe_load((loaded / f"out/iter_{STEP:07d}/run_config.yaml").read_text())
    assert told["checkpoint"] == {"save_optim": True, "save_rng": False, "fully_parallel_save": True}
    assert (
        told["model"].items()
        >= {
            "layernorm_epsilon": 1e-5,  # a text where YAML is written as JSON is
            "rotary_base": 10000,
            "rotary_percent": 1.0,
            "position_embedding_type": "rope",
            "share_embeddings_and_output_weights": False,
            "vocab_size": 100,
            "make_vocab_size_divisible_by": 128,
            "should_pad_vocab": True,
            "seq_length": 256,
        }.items()
    )


def test_megatron_bridge_is_told_nothing_of_a_model_with_multipliers(tmp_path):
    save(tmp_path / "source")
    kept = export_checkpoint(tmp_path / "source", tmp_path / "keep", to="torch_dist", multipliers="keep")
    folded = export_checkpoint(tmp_path / "source", tmp_path / "fold", to="torch_dist")
    assert not (tmp_path / "keep/release/run_config.yaml").exists()
    assert any("and so would Megatron-Bridge, for which there is no run_config.yaml" in note for note in kept.notes)
    told = yaml.safe_load((tmp_path / "fold/release/run_config.yaml").read_text())
    assert told["checkpoint"]["save_optim"] is False
    assert any("AutoBridge.load_megatron_model of OUT/release (from its source" in note for note in folded.notes)
    for folder in ("keep", "fold"):  # of which Megatron-Bridge asks for the metadata of any checkpoint
        common = torch.load(tmp_path / folder / "release/common.pt", weights_only=False)
        assert common["content_metadata"]["singleton_local_shards"] is False


@pytest.mark.parametrize("multipliers", ["keep", "fold"])
def test_to_torch_dist_and_back(multipliers, tmp_path):
    model = save(tmp_path / "source")
    options = {"multipliers": multipliers, "options": SMALL}
    export_checkpoint(tmp_path / "source", tmp_path / "out", to="torch_dist", **options)
    assert (tmp_path / "out/latest_checkpointed_iteration.txt").read_text() == "release"
    convert_checkpoint(tmp_path / "out", tmp_path / "back")
    after = load_file(tmp_path / "back/model.safetensors")
    expected = model.state_dict() if multipliers == "keep" else scaled(model.state_dict(), 1.0)
    assert after.keys() == expected.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in expected.items())


def test_the_record(loaded):
    out = loaded / "out"
    record = read_manifest(out)
    assert record["lineage"]["to"] == "torch_dist"
    states = [entry for name, entry in record["files"].items() if "tensors" in entry]
    assert sum(len(entry["tensors"]) for entry in states) > 100
    assert all(name.startswith(f"iter_{STEP:07d}/") for name in record["tensors"])
    assert inspect_checkpoint(out, check=True).damages == []
    path = sorted((out / f"iter_{STEP:07d}").glob("*.distcp"))[-1]
    before = path.read_bytes()
    path.write_bytes(before[:700] + bytes([before[700] ^ 1]) + before[701:])
    try:
        assert len(inspect_checkpoint(out, check=True).damages) == 1
    finally:
        path.write_bytes(before)


def _other_steps(saved):
    saved["state"][3]["step"] += 1


def _maximize(saved):
    saved["param_groups"][1]["maximize"] = True


def _other_betas(saved):
    saved["param_groups"][1]["betas"] = (0.9, 0.999)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other_steps, "parameters are at steps 700 and 701, Megatron has one step for all"),
        (_other_betas, "its groups have other betas or eps"),
        (_maximize, "maximize is True, and Megatron minimises"),
    ],
)
def test_what_megatron_has_no_place_for(change, message, tmp_path):
    save(tmp_path / "source")
    saved = torch.load(tmp_path / "source/optimizer.pt", weights_only=True)
    change(saved)
    torch.save(saved, tmp_path / "source/optimizer.pt")
    with pytest.raises(CheckpointError, match=message):
        export_checkpoint(tmp_path / "source", tmp_path / "out", to="torch_dist", optimizer=True)
    assert not (tmp_path / "out").exists()


def test_a_head_that_is_untied_has_no_moments(tmp_path):
    save(tmp_path / "source", tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=r"moments of one matrix as embedding and head, which folding .* keep"):
        export_checkpoint(tmp_path / "source", tmp_path / "out", to="torch_dist", optimizer=True)
    options = {"optimizer": True, "multipliers": "keep"}
    export_checkpoint(tmp_path / "source", tmp_path / "out", to="torch_dist", **options)
    assert inspect_checkpoint(tmp_path / "out", check=True).damages == []


def test_ranks_and_layers_are_not_asked_for(tmp_path):
    save(tmp_path / "source")
    for more in ({"tp": 2}, {"pp": 2}, {"spec": "local"}):
        with pytest.raises(CheckpointError, match="torch_dist is the same for all ranks and layers"):
            export_checkpoint(tmp_path / "source", tmp_path / "out", to="torch_dist", **more)


def test_what_is_said(tmp_path):
    save(tmp_path / "source")
    notes = export_checkpoint(tmp_path / "source", tmp_path / "out", to="torch_dist", optimizer=True).notes
    assert any("Adam's moments after 700 steps, and the weights in float32" in note for note in notes)
    assert any("--override-opt-param-scheduler --no-load-rng" in note for note in notes)
    assert json.loads((tmp_path / "out/iter_0000700/metadata.json").read_text())["sharded_backend"] == "torch_dist"


def test_what_of_the_groups_is_left_out_is_named(tmp_path):
    """muP's groups have three rates and three decays; Megatron finds its two groups by multipliers that both say 1."""
    model = save(tmp_path / "source")
    optimizer = torch.optim.AdamW(parameter_groups(model, learning_rate=1e-3, weight_decay=0.1, width_ratio=2.0))
    model(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    saved = optimizer.state_dict()
    saved["param_groups"][2] |= {"weight_decay": 0.3, "mystery": 7}
    torch.save(saved, tmp_path / "source/optimizer.pt")
    notes = export_checkpoint(tmp_path / "source", tmp_path / "out", to="torch_dist", optimizer=True).notes
    (note,) = [note for note in notes if "have no place" in note]
    for said in (
        "weight_decay 0.1 (not 0.2) of the 2 matrices in group 0",
        "lr 0.0005 (not 0.001) of group 1, 28 weights",
        "weight_decay 0.3 (not 0) of the 9 norms and biases in group 2",
        "mystery 7 of group 2",
    ):
        assert said in note
    assert note.count(";") == 3, "and nothing else"


def test_of_a_trainers_groups_nothing_is_left_out(tmp_path):
    save(tmp_path / "source")
    notes = export_checkpoint(tmp_path / "source", tmp_path / "out", to="torch_dist", optimizer=True).notes
    assert not any("have no place" in note for note in notes)


@pytest.mark.parametrize("multipliers", ["fold", "keep"])
def test_weights_and_moments_come_back(multipliers, tmp_path):
    """`convert --optimizer` of the export; folding multiplies weights and divides moments by powers of two here or not.

    2.5 is none, so the embedding's are rounded once each way.
    """
    model = save(tmp_path / "source")
    out = tmp_path / "out"
    export_checkpoint(tmp_path / "source", out, to="torch_dist", optimizer=True, multipliers=multipliers, options=SMALL)
    result = convert_checkpoint(out, tmp_path / "back", optimizer=True)
    assert not any("not converted" in note for note in result.notes), "the schedule in there is of no step"
    back = TeleFLMForCausalLM.from_pretrained(tmp_path / "back")
    power = 1.0 if multipliers == "fold" else 0.0
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name, tensor in scaled(weights, power).items():
        assert torch.equal(dict(back.named_parameters())[name], tensor), name
    saved = torch.load(tmp_path / "back/optimizer.pt", weights_only=True)
    indices = {
        name: index
        for group in saved["param_groups"]
        for name, index in zip(group["param_names"], group["params"], strict=True)
    }
    for key, times in zip(MOMENTS, (-power, -2 * power), strict=True):
        for name, tensor in scaled(moments(tmp_path / "source", key, model), times).items():
            assert torch.equal(saved["state"][indices[name]][key], tensor), (name, key)
            assert saved["state"][indices[name]]["step"] == STEP

# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The state of Megatron's Adam becomes an optimizer.pt with which torch's AdamW goes on as megatron-core itself did.

megatron-core makes the updates, in parallel, and writes the checkpoints. The oracles are its own next update, and an
AdamW of torch that made all of them on whole weights: every comparison is of equal bits.
"""

import itertools
import json
import math
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from conversion import convert_checkpoint
from conversion.checkpoint.distributed_file import read_distributed_checkpoint
from conversion.checkpoint.errors import CheckpointError, CorruptData
from growth import grow_checkpoint
from tests.fixtures.checkpoint_runs import run_teleflm
from tests.fixtures.megatron_adam import DECOUPLED_LR, RUNS, SETTINGS, SPOILED, STEPS, Run, gradient, make_runs
from tests.fixtures.megatron_files import ITERATION, optimizer_state
from tests.fixtures.megatron_reference import VOCAB_SIZE, reference_config, reference_weights
from tests.fixtures.megatron_variants import VARIANTS, write_variant
from tests.fixtures.sharded_tensors import materialise

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="megatron-core has wheels for Linux only"),
]
OUTER = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    """Folder of `RUNS`, which the first worker of the session to ask writes."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "megatron-adam"
    make_runs(folder)
    return folder


def convert(source: Path, out: Path, model: str, **options: Any) -> Any:
    return convert_checkpoint(source, out, vocab_size=reference_config(model).vocab_size, **options)


# An unsharded AdamW.


def is_trained(name: str) -> bool:
    """Megatron has no bias on the output of attention."""
    return not name.endswith("o_proj.bias")


def groups_of(run: Run, weights: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Torch's groups: vectors do not decay; the embedding and the head may have a learning rate of their own."""
    outer = OUTER if run.decoupled else ()
    members = {
        (): [name for name, w in weights.items() if w.ndim > 1 and name not in outer],
        (("weight_decay", 0.0),): [name for name, w in weights.items() if w.ndim == 1],
        (("lr", DECOUPLED_LR),): [name for name in weights if name in outer],
    }
    return [{"names": names, **SETTINGS, **dict(changes)} for changes, names in members.items() if names]


def follow(run: Run) -> tuple[dict[str, Tensor], torch.optim.AdamW]:
    """Float32 weights by Hub name after `STEPS` updates, and the optimizer that made them."""
    model = run.layout.model
    weights = {
        name: torch.nn.Parameter(tensor.float())
        for name, tensor in reference_weights(model, run.layout.dtype).items()
        if is_trained(name)
    }
    groups = [
        {
            **{key: value for key, value in group.items() if key != "names"},
            "params": [weights[n] for n in group["names"]],
        }
        for group in groups_of(run, weights)
    ]
    optimizer = torch.optim.AdamW(groups)
    for step in range(STEPS):
        update(optimizer, weights, gradient(model, step))
    return weights, optimizer


def update(optimizer: torch.optim.Optimizer, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        weight.grad = gradients[name].clone()
    optimizer.step()


def saved_state(out: Path) -> dict[str, dict[str, Any]]:
    """What optimizer.pt has of each parameter, with the settings of its group."""
    saved = torch.load(out / "optimizer.pt", weights_only=True)
    return {
        name: {**saved["state"][index], "group": {k: v for k, v in group.items() if k not in ("params", "param_names")}}
        for group in saved["param_groups"]
        for index, name in zip(group["params"], group["param_names"], strict=True)
    }


@pytest.mark.parametrize("name", sorted(RUNS.keys() - {SPOILED}))
def test_the_state_is_that_of_an_unsharded_run(name, runs, tmp_path):
    run = RUNS[name]
    weights, optimizer = follow(run)
    result = convert(runs / name, tmp_path / "out", run.layout.model, optimizer=True, fp32_master=True)
    assert f"optimizer.pt: Adam's moments after {STEPS} steps." in result.notes
    found, written = load_file(tmp_path / "out/model.safetensors"), saved_state(tmp_path / "out")
    assert found.keys() == written.keys()
    assert {name for name in found if is_trained(name)} == weights.keys()
    for own_name, weight in weights.items():
        state, own = written[own_name], optimizer.state[weight]
        assert torch.equal(found[own_name], weight), own_name
        for key in ("exp_avg", "exp_avg_sq"):
            assert state[key].dtype == torch.float32
            assert torch.equal(state[key], own[key]), (own_name, key)
        assert state["step"] == STEPS
    for group in groups_of(run, weights):
        for own_name in group["names"]:
            settings = written[own_name]["group"]
            assert {key: settings[key] for key in ("lr", "weight_decay", "eps")} == {
                key: group[key] for key in ("lr", "weight_decay", "eps")
            }
            assert tuple(settings["betas"]) == group["betas"]


@pytest.mark.parametrize("name", sorted(RUNS.keys() - {SPOILED}))
def test_the_next_update_is_megatron_cores(name, runs, tmp_path):
    """What was converted, in torch's AdamW, makes the weights that megatron-core made of it next."""
    run = RUNS[name]
    model = run.layout.model
    convert(runs / name, tmp_path / "out", model, optimizer=True, fp32_master=True)
    convert(runs / f"{name}-next", tmp_path / "next", model)
    weights = {n: torch.nn.Parameter(w) for n, w in load_file(tmp_path / "out/model.safetensors").items()}
    saved = torch.load(tmp_path / "out/optimizer.pt", weights_only=True)
    optimizer = torch.optim.AdamW([{"params": [weights[n] for n in g["param_names"]]} for g in saved["param_groups"]])
    optimizer.load_state_dict(saved)
    update(optimizer, weights, gradient(model, STEPS))
    following = load_file(tmp_path / "next/model.safetensors")
    for own_name, weight in weights.items():
        if is_trained(own_name):
            assert torch.equal(weight.detach().to(run.layout.dtype), following[own_name]), own_name


@pytest.mark.parametrize("name", ["numbered", "flat-tp2-dp2", "dist-buckets-tp2-dp2"])
def test_the_weights_are_the_runs_own_unless_the_masters_are_asked_for(name, runs, tmp_path):
    run = RUNS[name]
    weights, _ = follow(run)
    convert(runs / name, tmp_path / "with", run.layout.model, optimizer=True)
    convert(runs / name, tmp_path / "without", run.layout.model)
    for folder in ("with", "without"):
        found = load_file(tmp_path / folder / "model.safetensors")
        assert all(torch.equal(found[n], weight.detach().to(torch.bfloat16)) for n, weight in weights.items())
    assert not (tmp_path / "without/optimizer.pt").exists()


def test_what_is_not_carried_over_is_said(runs, tmp_path):
    result = convert(runs / "numbered", tmp_path / "out", "grouped", optimizer=True, dry_run=True)
    assert any("were not converted: learning-rate scheduler, random states" in note for note in result.notes)
    result = convert(runs / "dist-buckets", tmp_path / "out", "grouped", optimizer=True, dry_run=True)
    assert any("were not converted: learning-rate scheduler, random states" in note for note in result.notes)


def test_a_loss_scale_and_a_decay_in_the_gradient_are_said(runs, tmp_path):
    run = shutil.copytree(runs / "numbered", tmp_path / "run")
    edit(lambda content: content["optimizer"].update(grad_scaler={"scale": 2.0}))(run)
    args(decoupled_weight_decay=False)(run)
    notes = convert(run, tmp_path / "out", "grouped", optimizer=True, dry_run=True).notes
    assert any("were not converted: learning-rate scheduler, random states, loss scale." in note for note in notes)
    assert any("added weight decay to the gradients (no decoupled_weight_decay)" in note for note in notes)


@pytest.mark.parametrize("name", ["flat", "dist-numbered-tp2"])
@pytest.mark.parametrize("decoupled", [False, True, None])
def test_the_state_says_how_it_decays_and_only_what_decays_beside_the_gradients_grows(decoupled, name, runs, tmp_path):
    """The groups of Transformer Engine and Apex do not say it: the run's arguments do."""
    run = shutil.copytree(runs / name, tmp_path / "run")

    def say(content: Any) -> None:
        vars(content["args"])["decoupled_weight_decay"] = decoupled
        inner = content["optimizer"]
        for group in inner.get("optimizer", inner)["param_groups"]:
            del group["decoupled_weight_decay"]  # which torch's AdamW says

    (edit if name == "flat" else edit_common)(say)(run)
    convert(run, tmp_path / "out", "grouped", optimizer=True)
    groups = torch.load(tmp_path / "out/optimizer.pt", weights_only=True)["param_groups"]
    assert any(group["weight_decay"] for group in groups)
    assert all(group.get("decoupled_weight_decay") == decoupled for group in groups)
    changes = {"num_hidden_layers": 8}
    grow = partial(grow_checkpoint, tmp_path / "out", tmp_path / "grown", overrides=changes, dry_run=True)
    if decoupled is False:
        with pytest.raises(CheckpointError, match=r"decoupled_weight_decay False and weight_decay .*: Adam then adds"):
            grow(optimizer=tmp_path / "out")
    else:
        assert grow(optimizer=tmp_path / "out").plan


def test_the_step_of_fused_optimizers(runs, tmp_path):
    """Apex and Transformer Engine count updates once a group, and say of groups without parameters nothing."""
    run = shutil.copytree(runs / "numbered", tmp_path / "run")

    def count_in_groups(content: Any) -> None:
        saved = content["optimizer"]["optimizer"]
        for entry in saved["state"].values():
            del entry["step"]
        saved["param_groups"][0]["step"] = STEPS

    edit(count_in_groups)(run)
    for source, out in ((runs / "numbered", "as it was"), (run, "fused")):
        convert(source, tmp_path / out, "grouped", optimizer=True)
    assert (tmp_path / "fused/optimizer.pt").read_bytes() == (tmp_path / "as it was/optimizer.pt").read_bytes()


def test_a_common_state_that_is_no_file(runs, tmp_path):
    """Since 0.19 megatron-core keeps what ranks have in common in an object."""
    name = "dist-reshardable-tp2-dp2"
    run = shutil.copytree(runs / name, tmp_path / "run")

    def move(metadata: Any, folder: Path) -> None:
        common = torch.load(folder / "common.pt", weights_only=False)
        (folder / "common.pt").unlink()
        torch.save([common], folder / "__common_0.distcp")
        entry = "common_state/shard_0_1"
        metadata.state_dict_metadata[entry] = BytesStorageMetadata()
        length = (folder / "__common_0.distcp").stat().st_size
        metadata.storage_data[MetadataIndex(entry)] = _StorageInfo("__common_0.distcp", 0, length)

    edit_metadata(move)(run)
    for source, out in ((runs / name, "as it was"), (run, "moved")):
        convert(source, tmp_path / out, "grouped", optimizer=True)
    assert (tmp_path / "moved/optimizer.pt").read_bytes() == (tmp_path / "as it was/optimizer.pt").read_bytes()


LEGACY = [name for name in VARIANTS if name.startswith(("legacy", "zero-centered", "transformer", "wrapped", "much"))]


@pytest.mark.parametrize("name", LEGACY)
def test_moments_lie_as_the_weights_of_older_runs_do(name, tmp_path):
    """Names, orders of query, key and value, and padding of every age; but nothing is added to a moment of a norm."""
    variant = write_variant(name, tmp_path / "run")

    def add_optimizer(content: Any) -> None:
        content["optimizer"] = optimizer_state(leaves(content["model"]))

    edit(add_optimizer)(tmp_path / "run")
    convert_checkpoint(tmp_path / "run", tmp_path / "out", vocab_size=VOCAB_SIZE, optimizer=True)
    state = saved_state(tmp_path / "out")
    is_less = "zero-centered" in name
    for own_name, weight in reference_weights(variant.model, variant.dtype).items():
        stored = (weight - 1 if is_less and "norm" in own_name else weight).float()
        assert torch.equal(state[own_name]["exp_avg"], stored * 1e-3), own_name
        assert torch.equal(state[own_name]["exp_avg_sq"], stored.square()), own_name
        assert state[own_name]["step"] == ITERATION


def leaves(tree: Any) -> list[Tensor]:
    """The weights of a nested state dict, in order; a head that is a copy of the embedding is one too."""
    if isinstance(tree, Tensor):
        return [tree]
    named = tree.items() if isinstance(tree, dict) else ()
    return [leaf for key, value in named if not key.endswith("_extra_state") for leaf in leaves(value)]


def test_it_grows(runs, tmp_path):
    convert(runs / "dist-buckets-tp2-dp2", tmp_path / "hub", "grouped", optimizer=True)
    grow_checkpoint(tmp_path / "hub", tmp_path / "out", {"intermediate_size": 64}, optimizer=tmp_path / "hub")
    before, after = saved_state(tmp_path / "hub"), saved_state(tmp_path / "out")
    name = "model.layers.3.mlp.up_proj.weight"
    grown, source = after[name]["exp_avg"], before[name]["exp_avg"]
    assert source.any()
    assert torch.equal(grown[: len(source)], source)
    assert not grown[len(source) :].any()
    assert after[name]["step"] == STEPS


def test_biases_that_the_run_has_not(runs, tmp_path):
    """The Hub's model has one on the output of attention wherever q, k and v have: it begins with moments of zeros."""
    convert(runs / "numbered-biased-tp2", tmp_path / "out", "biased", optimizer=True)
    state = saved_state(tmp_path / "out")
    added = [name for name in state if not is_trained(name)]
    assert len(added) == 4
    for name in added:
        assert not state[name]["exp_avg"].any()
        assert not state[name]["exp_avg_sq"].any()
        assert state[name]["step"] == STEPS
        assert state[name]["group"]["weight_decay"] == 0.0


def parts_of(weight: str) -> tuple[int, ...]:
    """Into how many parts two tensor-parallel ranks cut each axis of a stacked weight, gate and up apart."""
    layers = (4,) if ".layers." in weight else ()
    if "norm" in weight:
        return (*layers, 1)
    if "linear_proj" in weight or "linear_fc2" in weight:
        return (*layers, 1, 2)
    return (*layers, 4 if "linear_fc1" in weight else 2, 1)


def flatten_parts(run: Path) -> None:
    """The optimizer as megatron-core 0.13 shards it: `fully_sharded_model_space`.

    Each part of a weight is flat, [parts along every axis, elements of a part], and data-parallel ranks have ranges of
    it. (What that release itself wrote was converted too, when this was written; it does not run beside the one here.)
    """
    folder = run / f"iter_{ITERATION:07d}"
    whole = read_distributed_checkpoint(folder).tensors
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    names = [name for name in metadata.state_dict_metadata if name.startswith("optimizer.state.")]
    metadata.storage_data = {i: place for i, place in metadata.storage_data.items() if i.fqn not in names}
    with (folder / "__flat_0.distcp").open("wb") as file:
        for name in names:
            tensor = torch.from_numpy(materialise(whole[name]))
            parts = parts_of(name)
            size = [n // count for n, count in zip(tensor.shape, parts, strict=True)]
            chunks = []
            for index in itertools.product(*map(range, parts)):
                part = tensor[tuple(slice(i * n, (i + 1) * n) for i, n in zip(index, size, strict=True))].flatten()
                for start, end in itertools.pairwise((0, len(part) // 3, len(part))):
                    piece = part[start:end].reshape(*(1 for _ in index), -1).clone()
                    chunks.append(ChunkStorageMetadata(torch.Size((*index, start)), piece.shape))
                    begin = file.tell()
                    torch.save(piece, file)
                    place = _StorageInfo("__flat_0.distcp", begin, file.tell() - begin)
                    metadata.storage_data[MetadataIndex(name, chunks[-1].offsets, len(chunks) - 1)] = place
            properties = metadata.state_dict_metadata[name].properties
            shape = torch.Size((*parts, tensor.numel() // math.prod(parts)))
            metadata.state_dict_metadata[name] = TensorStorageMetadata(properties, shape, chunks)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    edit_common(lambda content: content["optimizer"].update(param_state_sharding_type="fully_sharded_model_space"))(run)


def test_parts_that_are_flat(runs, tmp_path):
    run = shutil.copytree(runs / "dist-reshardable-tp2-dp2", tmp_path / "run")
    flatten_parts(run)
    for source, out in ((runs / "dist-reshardable-tp2-dp2", "as it was"), (run, "flat")):
        convert(source, tmp_path / out, "grouped", optimizer=True, fp32_master=True)
    for file in ("optimizer.pt", "model.safetensors"):
        assert (tmp_path / "flat" / file).read_bytes() == (tmp_path / "as it was" / file).read_bytes()


def test_parts_that_are_flat_and_of_another_weight(runs, tmp_path):
    run = shutil.copytree(runs / "dist-reshardable-tp2-dp2", tmp_path / "run")
    flatten_parts(run)
    one, other = "exp_avg.decoder.final_layernorm.weight", "exp_avg.output_layer.weight"
    swapped = {
        f"optimizer.state.{one}": f"optimizer.state.{other}",
        f"optimizer.state.{other}": f"optimizer.state.{one}",
    }
    rename(lambda name: swapped.get(name, name))(run)
    says = ["has shape (", "which is no weight of shape (", "in flat parts"]
    assert_refused(run, tmp_path / "out", says)


def test_the_command_resumes_nothing_that_is_done(runs, tmp_path):
    arguments = ["convert", runs / "flat", tmp_path / "out", "--vocab-size", 100, "--optimizer", "--fp32-master"]
    done = run_teleflm(*arguments, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    first = (tmp_path / "out/optimizer.pt").read_bytes()
    recorded = json.loads((tmp_path / "out/teleflm_manifest.json").read_text())["files"]["optimizer.pt"]["tensors"]
    names = {f"optimizer.pt/state.{n}.{key}" for n in range(39) for key in ("step", "exp_avg", "exp_avg_sq")}
    assert recorded.keys() == names
    assert all(entry["digest"] for entry in recorded.values())
    assert run_teleflm(*arguments, folder=tmp_path).returncode == 0
    assert (tmp_path / "out/optimizer.pt").read_bytes() == first


# Faults, each planted in a copy of a run.

Change = Callable[[Any], object]
Damage = Callable[[Path], object]


def rank_files(run: Path, name: str) -> list[Path]:
    return sorted((run / f"iter_{ITERATION:07d}").glob(f"mp_rank_*/{name}"))


def edit(change: Change, *, ranks: slice = slice(None), file: str = "model_optim_rng.pt") -> Damage:
    """A change of the content of some ranks' files, or of all."""

    def damage(run: Path) -> None:
        for path in rank_files(run, file)[ranks]:
            content = torch.load(path, weights_only=False)
            change(content)
            torch.save(content, path)

    return damage


def args(**values: Any) -> Damage:
    return edit(lambda content: vars(content["args"]).update(values))


def numbered(change: Change, **options: Any) -> Damage:
    return edit(lambda content: change(content["optimizer"]["optimizer"]["state"]), **options)


def buffers(change: Change, **options: Any) -> Damage:
    """A change of every buffer of distrib_optim.pt."""

    def change_all(content: Any) -> None:
        for number in [key for key in content if isinstance(key, int)]:
            for tensors in content[number].values():
                change(tensors)

    return edit(change_all, file="distrib_optim.pt", **options)


def to_momentum(entry: dict[str, Any]) -> None:
    entry["momentum_buffer"] = entry.pop("exp_avg")


def shorten(tensors: dict[str, Any]) -> None:
    for key in ("param", "exp_avg", "exp_avg_sq"):
        tensors[key] = tensors[key][:-64].clone()
    tensors["numel_unpadded"] -= 64


def halve(content: Any) -> None:
    for group in content["optimizer"]["optimizer"]["param_groups"]:
        group["params"] = group["params"][:1]


def move_on(settings: Any) -> None:
    for group in settings["optimizer"]["optimizer"]["param_groups"]:
        group["step"] += 1


def as_float32(content: Any) -> None:
    content[0] = {(torch.float32, torch.float32): next(iter(content[0].values()))}


FIRST, LAST = slice(0, 1), slice(-1, None)
NUMBERED_FAULTS: dict[str, tuple[Damage, list[str]]] = {
    "saved without it": (edit(lambda content: content.pop("optimizer")), ["--no-save-optim", "leave --opt"]),
    "sgd": (args(optimizer="sgd"), ["the run's optimizer is 'sgd'", "leave --optimizer and --fp32-master out"]),
    "muon": (args(optimizer="muon"), ["the run's optimizer is 'muon'", "only the state of Adam and AdamW"]),
    "momentum": (numbered(lambda state: [*map(to_momentum, state.values())]), ["exp_avg_sq, momentum_buffer"]),
    "amsgrad": (numbered(lambda state: state[0].update(max_exp_avg_sq=1)), ["max_exp_avg_sq, step; only that of Adam"]),
    "a chain": (
        edit(lambda content: content.update(optimizer=[content["optimizer"]] * 2)),
        ["2 optimizers in a chain"],
    ),
    "no moments of one": (
        numbered(lambda state: state.pop(3)),
        ["has no moments of decoder.layers.", "not tr"],
    ),
    "not all were trained": (edit(halve), ["the optimizer has 2 parameters, the model 13 weights", "not trained"]),
    "another shape": (
        numbered(lambda state: state[1].update(exp_avg=state[1]["exp_avg"][1:])),
        ["no way of sorting the 13 weights into the optimizer's groups of [9, 4]"],
    ),
    "second moment of another shape": (
        numbered(lambda state: state[1].update(exp_avg_sq=state[1]["exp_avg_sq"][1:])),
        ["exp_avg_sq of decoder.layers.0.", "has shape (", "the weight ("],
    ),
    "steps differ": (numbered(lambda state: state[1]["step"].add_(1)), ["the optimizer's steps are 3, 4"]),
    "steps of ranks differ": (
        numbered(lambda state: [entry["step"].add_(1) for entry in state.values()], ranks=LAST),
        ["mp_rank_01_001", "step is 4, in", "it is 3", "of two runs"],
    ),
    "copies of a moment differ": (
        numbered(lambda state: state[max(state)]["exp_avg"].add_(0.5), ranks=LAST),
        ["exp_avg of decoder.final_layernorm.weight differs by up to 0.5", "tensor rank 1, stage 1"],
    ),
    "copies of a master differ": (
        edit(lambda content: content["optimizer"]["fp32_from_fp16_params"][1][-1].data.add_(0.5), ranks=LAST),
        ["the float32 weight of decoder.final_layernorm.weight differs by up to"],
    ),
    "masters of another iteration": (
        edit(lambda content: ([m.data.add_(0.05) for g in content["optimizer"]["fp32_from_fp16_params"] for m in g])),
        ["is ", " in the optimizer, where it was rounded from", "another iteration"],
    ),
    "masters that are none": (
        edit(lambda content: content["optimizer"].update(fp32_from_fp16_params=3)),
        ["float32 copies of None weights in its groups, which have [9, 4]"],
    ),
    "numbers that are none": (
        edit(lambda content: content["optimizer"]["optimizer"]["param_groups"][0]["params"].append([1])),
        ["no state by number, or groups without params"],
    ),
    "an optimizer that is none": (
        edit(lambda content: content.update(optimizer=3)),
        ["optimizer is a int, expected a"],
    ),
    "a state that is none": (
        numbered(lambda state: state.update({0: 3})),
        ["the optimizer's state is empty; only that of Adam and AdamW"],
    ),
    "a moment that is none": (
        numbered(lambda state: state[0].update(exp_avg_sq=[3])),
        ["exp_avg_sq of ", "is a list, expected a plain tensor"],
    ),
    "a step in between": (
        numbered(lambda state: [entry.update(step=torch.tensor(2.5)) for entry in state.values()]),
        ["step is 2.5, expected a whole number from 0 to 16,777,216"],
    ),
    "a step that is not finite": (
        numbered(lambda state: state[0].update(step=torch.tensor(float("nan")))),
        ["step is nan, expected a whole number"],
    ),
    "a step beyond numbers": (
        numbered(lambda state: state[0].update(step=10**9000)),
        ["it holds an integer of 29898 bits, which no number of a checkpoint has"],
    ),
    "a step that is none": (
        numbered(lambda state: state[0].update(step="3")),
        ["step is '3', expected a whole number"],
    ),
    "masters of some": (
        edit(lambda content: content["optimizer"]["fp32_from_fp16_params"][0].pop() is None),
        ["float32 copies of [8, 4] weights in its groups, which have [9, 4]"],
    ),
}
FLAT_FAULTS: dict[str, tuple[Damage, list[str]]] = {
    "the file is lost": (
        lambda run: [path.unlink() for path in rank_files(run, "distrib_optim.pt")],
        ["distrib_optim.pt: is missing", "copy the folder again", "leave --optimizer"],
    ),
    "of an older Megatron": (
        edit(lambda content: content.pop("buckets_coalesced"), file="distrib_optim.pt"),
        ["holds no coalesced buffers"],
    ),
    "a chain": (
        lambda run: [torch.save([{}, {}], path) for path in rank_files(run, "distrib_optim.pt")],
        ["2 optimizers in a chain"],
    ),
    "of another model": (buffers(shorten), ["a buffer has ", "make ", "of another run"]),
    "of another iteration": (
        buffers(lambda tensors: tensors["param"].add_(0.05)),
        ["in the optimizer, where it was rounded from: the optimizer's files are of another iteration"],
    ),
    "too short": (
        buffers(lambda tensors: tensors.update(exp_avg=tensors["exp_avg"][:-1])),
        ["exp_avg is (", "expected a flat tensor of "],
    ),
    "no second moment": (
        buffers(lambda tensors: tensors.pop("exp_avg_sq").zero_() is None),
        ["state is exp_avg; only"],
    ),
    "a buffer too many": (
        edit(lambda content: content.update({1: content[0]}), file="distrib_optim.pt"),
        ["has 2 buffers, the model's 1 virtual stages make 1"],
    ),
    "a buffer that is none": (
        edit(lambda content: content.update({0: {(): 3}}), file="distrib_optim.pt"),
        ["a buffer is of (), expected one of bfloat16 weights"],
    ),
    "tensors that are none": (
        edit(lambda content: content[0].update(dict.fromkeys(content[0], 3)), file="distrib_optim.pt"),
        ["the optimizer's state is empty"],
    ),
    "of another dtype": (edit(as_float32, file="distrib_optim.pt"), ["expected one of bfloat16 weights"]),
    "precision-aware": (args(use_precision_aware_optimizer=True), ["--use-precision-aware-optimizer", "--dist-ckpt"]),
    "steps differ": (edit(move_on, ranks=LAST), ["mp_rank_01", "step is 4, in", "it is 3"]),
    "no step": (
        edit(lambda content: [g.pop("step") for g in content["optimizer"]["optimizer"]["param_groups"]]),
        ["the optimizer's steps are none"],
    ),
    "no groups": (edit(lambda content: content["optimizer"]["optimizer"].clear()), ["has no param_groups"]),
    "copies of a moment differ": (
        buffers(lambda tensors: tensors["exp_avg_sq"].mul_(2), ranks=LAST),
        ["exp_avg_sq of ", "differs by up to", "tensor rank 1"],
    ),
}


def assert_refused(run: Path, out: Path, says: list[str], **options: Any) -> None:
    with pytest.raises(CheckpointError) as caught:
        convert(run, out, "grouped", **{"optimizer": True, **options})
    message = str(caught.value)
    assert "\n" not in message
    assert [text for text in says if text not in message] == [], message
    assert not out.exists()


@pytest.mark.parametrize("fault", NUMBERED_FAULTS)
def test_faults_without_a_distributed_optimizer(fault, runs, tmp_path):
    run = shutil.copytree(runs / "numbered-tp2-pp2-vpp2", tmp_path / "run")
    damage, says = NUMBERED_FAULTS[fault]
    damage(run)
    assert_refused(run, tmp_path / "out", says)
    if not any(part in fault for part in ("copies", "iteration", "master", "beyond numbers")):
        convert(run, tmp_path / "out", "grouped")


@pytest.mark.parametrize("fault", FLAT_FAULTS)
def test_faults_of_a_distributed_optimizer(fault, runs, tmp_path):
    run = shutil.copytree(runs / "flat-tp2-dp2", tmp_path / "run")
    damage, says = FLAT_FAULTS[fault]
    damage(run)
    assert_refused(run, tmp_path / "out", says)
    convert(run, tmp_path / "out", "grouped")


def test_a_checkpoint_that_was_saved_without_its_optimizer(runs, tmp_path):
    for name in ("numbered-next", "flat-next", "dist-buckets-next", "dist-numbered-tp2-next"):
        assert_refused(runs / name, tmp_path / "out", ["holds no optimizer (saved with --no-save-optim, or converted)"])
        says = ["holds no optimizer (saved with --no-save-optim, or converted)"]
        assert_refused(runs / name, tmp_path / "out", says, optimizer=False, fp32_master=True)


@pytest.mark.parametrize("name", ["numbered-tied-pp2", "flat-tied-pp2-dp2"])
def test_the_two_ends_of_a_tied_model_have_equal_moments(name, runs, tmp_path):
    run = shutil.copytree(runs / name, tmp_path / "run")
    head = (
        112 * 32
    )  # elements, of which the last stage has the moments first in its buffer, or after its other matrices

    def change(content: Any) -> None:
        if "optimizer" in content:
            states = content["optimizer"]["optimizer"]["state"]
            moment = next(state["exp_avg"] for state in states.values() if state["exp_avg"].numel() == head)
        else:
            moment = next(iter(content[0].values()))["exp_avg"][:head]
        moment.add_(0.25)

    edit(change, ranks=LAST, file="model_optim_rng.pt" if name.startswith("numbered") else "distrib_optim.pt")(run)
    with pytest.raises(CheckpointError, match=r"exp_avg of the tied embedding differs by up to 0\.25 between the emb"):
        convert(run, tmp_path / "out", "tied", optimizer=True)


def test_moments_that_are_not_finite(runs, tmp_path):
    run = shutil.copytree(runs / "flat-tp2-dp2", tmp_path / "run")
    buffers(lambda tensors: tensors["exp_avg"][-5:].fill_(torch.nan), ranks=FIRST)(run)
    with pytest.raises(CorruptData, match=r"optimizer\.pt/state\.\d+\.exp_avg\[.*\] is NaN or infinite"):
        convert(run, tmp_path / "out", "grouped", optimizer=True)
    assert not (tmp_path / "out/optimizer.pt").exists()


# Those of torch_dist.


def edit_common(change: Change) -> Damage:
    def damage(run: Path) -> None:
        path = run / f"iter_{ITERATION:07d}/common.pt"
        content = torch.load(path, weights_only=False)
        change(content)
        torch.save(content, path)

    return damage


def edit_metadata(change: Callable[[Any, Path], object]) -> Damage:
    def damage(run: Path) -> None:
        path = run / f"iter_{ITERATION:07d}/.metadata"
        metadata = pickle.loads(path.read_bytes())
        change(metadata, path.parent)
        path.write_bytes(pickle.dumps(metadata))

    return damage


def rename(change: Callable[[str], str | None]) -> Damage:
    """Entries under other names, or without those whose name is None."""

    def edit_names(metadata: Any, folder: Path) -> None:
        names = {name: change(name) for name in metadata.state_dict_metadata}
        metadata.state_dict_metadata = {
            names[name]: entry for name, entry in metadata.state_dict_metadata.items() if names[name] is not None
        }
        storage = {}
        for index, place in metadata.storage_data.items():
            if names[index.fqn] is not None:
                storage[type(index)(names[index.fqn], index.offset, index.index)] = place
        metadata.storage_data = storage

    return edit_metadata(edit_names)


def replace_object(name: str, value: Any) -> Damage:
    def put(metadata: Any, folder: Path) -> None:
        torch.save(value, folder / "__other_0.distcp")
        length = (folder / "__other_0.distcp").stat().st_size
        index = next(index for index in metadata.storage_data if index.fqn == name)
        place = metadata.storage_data[index]
        metadata.storage_data[index] = type(place)("__other_0.distcp", 0, length)

    return edit_metadata(put)


def dist_args(**values: Any) -> Damage:
    return edit_common(lambda content: vars(content["args"]).update(values))


def without(*parts: str) -> Damage:
    return rename(lambda name: None if all(part in name for part in parts) else name)


SQUARE = "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(torch.bfloat16, torch.float32).bucket_idx_0.exp_avg"
GROUPS = "optimizer.distributed.dp_group_idx_1.optimizer/shard_0_1"
OTHER_STEP = [{"param_groups": [{"lr": 1.0, "wd_mult": 1.0, "step": 4}]}]
DIST_FAULTS: dict[str, tuple[str, Damage, list[str]]] = {
    "sharded otherwise": (
        "dist-buckets-tp2-dp2",
        edit_common(
            lambda content: content["optimizer"].update(param_state_sharding_type="fully_sharded_bucket_space")
        ),
        ["sharded as 'fully_sharded_bucket_space', expected fully_reshardable", "--ckpt-format torch"],
    ),
    "muon": ("dist-numbered-tp2", dist_args(optimizer="dist_muon"), ["the run's optimizer is 'dist_muon'"]),
    "momentum": (
        "dist-numbered-tp2",
        rename(lambda name: name.replace("state.exp_avg.", "state.momentum_buffer.")),
        ["the optimizer's state is exp_avg_sq, momentum_buffer; only that of Adam"],
    ),
    "momentum in buckets": (
        "dist-buckets-tp2-dp2",
        rename(lambda name: name.replace(".exp_avg_sq", ".exp_avg_slow")),
        ["dp_group_idx_0: the optimizer's state is exp_avg, exp_avg_slow; only that of Adam"],
    ),
    "a chain": (
        "dist-buckets-tp2-dp2",
        rename(lambda name: f"chained_0.{name}" if name.startswith("optimizer.") else name),
        ["1 optimizers in a chain"],
    ),
    "no moments of one": (
        "dist-reshardable-tp2-dp2",
        without("exp_avg.decoder.final_layernorm"),
        ["the optimizer has no exp_avg of decoder.final_layernorm.weight"],
    ),
    "no master of one": (
        "dist-numbered-tp2",
        without("fp32_param.decoder.layers.mlp.linear_fc2"),
        ["the optimizer has no float32 weight of decoder.layers.0.mlp.linear_fc2.weight"],
    ),
    "moments of a weight that is not there": (
        "dist-numbered-tp2",
        rename(lambda name: name.replace("exp_avg.decoder.final_layernorm", "exp_avg.decoder.other_layernorm")),
        ["the optimizer has no exp_avg of decoder.final_layernorm.weight"],
    ),
    "no masters in buckets": (
        "dist-buckets-tp2-dp2",
        without("bucket_idx_0.param"),
        ["has no param, expected float32"],
    ),
    "a bucket that is not flat": (
        "dist-buckets-tp2-dp2",
        rename(lambda name: SQUARE if name == "output_layer.weight" else None if name == SQUARE else name),
        ["dp_group_idx_0.gbuf_idx_0 lacks a bucket, or has one that is not flat"],
    ),
    "no groups": (
        "dist-reshardable-tp2-dp2",
        edit_common(lambda content: content["optimizer"].update(optimizer=["?"])),
        ["the optimizer has no param_groups"],
    ),
    "ranks without number": (
        "dist-buckets-tp2-dp2",
        dist_args(tensor_model_parallel_size=10**12),
        ["is of 2 model-parallel ranks, the run's arguments make it 1000000000000"],
    ),
    "a bucket is lost": (
        "dist-buckets-uneven-dp2",
        without("dp_group_idx_0.gbuf_idx_0", "bucket_idx_1.exp_avg"),
        ["dp_group_idx_0.gbuf_idx_0 lacks a bucket"],
    ),
    "the last bucket is lost": (
        "dist-buckets-uneven-dp2",
        without("dp_group_idx_0.gbuf_idx_0", "bucket_idx_1."),
        ["a buffer has buckets of", "no number of layers with the embedding fills"],
    ),
    "a rank is lost": (
        "dist-buckets-tp2-dp2",
        without("dp_group_idx_1"),
        ["'dp_reshardable', is of 1 model-parallel ranks, the run's arguments make it 2"],
    ),
    "a rank's buffers are lost": (
        "dist-buckets-tp2-pp2-vpp2",
        without("dp_group_idx_1.gbuf_idx_0"),
        ["has gbuf_idx_1 of dp_group_idx_1, not one before it"],
    ),
    "layers are lost": (
        "dist-buckets-tp2-pp2-vpp2",
        rename(
            lambda name: None if "dp_group_idx_0.gbuf_idx_1" in name or "dp_group_idx_1.gbuf_idx_1" in name else name
        ),
        ["the optimizer's buffers have room for 3 layers, the model has 4"],
    ),
    "another weight in buckets": (
        "dist-buckets-tp2-dp2",
        rename(lambda name: "layers.0.w" if name == "decoder.final_layernorm.weight" else name),
        ["layers.0.w is not a weight of a Tele-FLM model; it would be lost"],
    ),
    "another weight": (
        "dist-reshardable-tp2-dp2",
        rename(lambda name: name.replace("decoder.final_layernorm.weight", "layers.0.w")),
        ["decoder.final_layernorm.weight is missing"],
    ),
    "no parallelism": (
        "dist-buckets-tp2-dp2",
        dist_args(tensor_model_parallel_size=None),
        ["the run's arguments do not say its parallelism"],
    ),
    "parallelism of another run": (
        "dist-gathered-tp2-dp2",
        dist_args(tensor_model_parallel_size=4),
        ["is of 2 model-parallel ranks, the run's arguments make it 4"],
    ),
    "layers of another order": (
        "dist-buckets-tp2-dp2",
        dist_args(transformer_impl="transformer_engine"),
        ["in the optimizer, where it was rounded from", "laid out in a way that is not known here"],
    ),
    "layers of no known order": (
        "dist-gathered-tp2-dp2",
        dist_args(transformer_impl="inference_optimized"),
        ["transformer_impl is 'inference_optimized', expected transformer_engine or local"],
    ),
    "precision-aware": (
        "dist-buckets-tp2-dp2",
        dist_args(use_precision_aware_optimizer=True),
        ["--use-precision-aware-optimizer", "--dist-ckpt-optim-fully-reshardable"],
    ),
    "steps differ": (
        "dist-buckets-tp2-dp2",
        replace_object(GROUPS, OTHER_STEP),
        ["step is 4 on dp_group_idx_1 and 3 on dp_group_idx_0"],
    ),
    "no step": (
        "dist-reshardable-tp2-dp2",
        edit_common(lambda c: [g.pop("step") for g in c["optimizer"]["optimizer"]["param_groups"]]),
        ["the optimizer's steps are none"],
    ),
}


@pytest.mark.parametrize("fault", DIST_FAULTS)
def test_faults_of_torch_dist(fault, runs, tmp_path):
    name, damage, says = DIST_FAULTS[fault]
    run = shutil.copytree(runs / name, tmp_path / "run")
    damage(run)
    assert_refused(run, tmp_path / "out", says)


def test_what_megatron_core_spoilt(runs, tmp_path):
    """Of several buckets it writes moments from other places than they lie at; the weights beside them give it away."""
    says = ["embedding.word_embeddings.weight is ", "or spoilt when they were saved"]
    assert_refused(runs / SPOILED, tmp_path / "out", says)
    convert(runs / SPOILED, tmp_path / "out", "grouped")


def test_groups_that_do_not_say_what_is_in_them(runs, tmp_path):
    """The moments are there all the same, and a note says what is not."""
    run = shutil.copytree(runs / "dist-reshardable-tp2-dp2", tmp_path / "run")
    edit_common(lambda c: [g.update(wd_mult=1.0) for g in c["optimizer"]["optimizer"]["param_groups"]])(run)
    result = convert(run, tmp_path / "out", "grouped", optimizer=True)
    assert any("settings of the 2 parameter groups (learning rate" in note for note in result.notes)
    saved = torch.load(tmp_path / "out/optimizer.pt", weights_only=True)
    assert [set(group) for group in saved["param_groups"]] == [{"params", "param_names"}]


def test_a_fork_says_nothing_of_the_order_in_buckets(runs, tmp_path):
    table = tmp_path / "fork.yaml"
    table.write_text(
        "- native: embedding.word_embeddings.weight\n  hub: model.embed_tokens.weight\n  parallel: column\n"
    )
    says = ["'dp_reshardable'", "not in a fork's (--mapping)", "--dist-ckpt-optim-fully-reshardable"]
    assert_refused(runs / "dist-buckets", tmp_path / "out", says, mapping=table)


def test_weights_of_float32_are_their_own_masters(runs, tmp_path):
    weights, _ = follow(RUNS["numbered-float32-tp2"])
    convert(runs / "numbered-float32-tp2", tmp_path / "out", "grouped", fp32_master=True)
    found = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())


def test_16_bits_without_masters_are_none(runs, tmp_path):
    run = shutil.copytree(runs / "numbered", tmp_path / "run")
    edit(lambda content: content["optimizer"].pop("fp32_from_fp16_params"))(run)
    says = ["has no float32 weights", "is bfloat16; leave --fp32-master out"]
    assert_refused(run, tmp_path / "out", says, fp32_master=True, optimizer=False)

# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Folders of torch.distributed.checkpoint: megatron-core's in every variant, and FSDP2's as Accelerate writes them.

torch writes all of them. Those that megatron-core itself writes are in test_megatron.py.
"""

import argparse
import enum
import io
import json
import multiprocessing
import os
import pickle
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from transformers import Trainer, TrainingArguments

from conversion import convert_checkpoint
from conversion.checkpoint.distributed_file import read_distributed_checkpoint
from conversion.checkpoint.errors import CheckpointError
from conversion.native.dist_checkpoint import dist_format, read_dist_checkpoint
from conversion.native.table import MEGATRON, NativeWeight
from growth import grow_checkpoint
from growth.training.mup import parameter_groups
from tests.fixtures.hostile_pickles import harm_done, hostile_pickles
from tests.fixtures.sharded_tensors import holds
from tests.fixtures.tiny import tiny_config, tiny_model

LAYERS, HIDDEN, FFN, QKV, VOCAB = 3, 8, 12, 16, 20
WORLD = 3
SHAPES = {
    "embedding.word_embeddings.weight": (VOCAB, HIDDEN),
    "decoder.layers.{}.self_attention.linear_qkv.layer_norm_weight": (HIDDEN,),
    "decoder.layers.{}.self_attention.linear_qkv.weight": (QKV, HIDDEN),
    "decoder.layers.{}.self_attention.linear_proj.weight": (HIDDEN, HIDDEN),
    "decoder.layers.{}.mlp.linear_fc1.layer_norm_weight": (HIDDEN,),
    "decoder.layers.{}.mlp.linear_fc1.weight": (2 * FFN, HIDDEN),
    "decoder.layers.{}.mlp.linear_fc2.weight": (HIDDEN, FFN),
    "decoder.final_layernorm.weight": (HIDDEN,),
    "output_layer.weight": (VOCAB, HIDDEN),
}
FC1 = "mlp.linear_fc1.weight"


class AttnBackend(enum.Enum):
    """Stands for the enums in Megatron's arguments."""

    auto = 5


ARGS = argparse.Namespace(
    num_layers=LAYERS,
    norm_epsilon=1e-5,
    swiglu=True,
    tensor_model_parallel_size=4,
    pipeline_model_parallel_size=2,
    data_path=None,
    betas=(0.9, 0.95),
    attention_backend=AttnBackend.auto,
)


def weights() -> dict[str, torch.Tensor]:
    """A model under megatron-core's names, layer by layer."""
    generator = torch.Generator().manual_seed(0)
    names = [name.format(layer) for name in SHAPES for layer in (range(LAYERS) if "{}" in name else [0])]
    shapes = {name.format(layer): shape for name, shape in SHAPES.items() for layer in range(LAYERS)}
    return {name: torch.randn(shapes[name], generator=generator).to(torch.bfloat16) for name in names}


def stacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All layers in one tensor, as megatron-core has them when all are alike."""
    whole = {}
    for name in SHAPES:
        layers = [tensors[name.format(layer)] for layer in range(LAYERS)]
        whole[name.replace("{}.", "")] = torch.stack(layers) if "{}" in name else layers[0]
    return whole


def in_halves(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gate and up apart."""
    apart = {}
    for name, tensor in tensors.items():
        if name.endswith(FC1):
            apart[name + "_w"], apart[name + "_v"] = tensor.chunk(2, dim=-2)
        else:
            apart[name] = tensor
    return apart


def with_local_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The layer norms as a model without Transformer Engine calls them, which Megatron-FSDP leaves as they are."""
    spelling = {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    }
    renamed = {}
    for name, tensor in tensors.items():
        old = next((old for old in spelling if name.endswith(old)), None)
        renamed[name.replace(old, spelling[old]) if old else name] = tensor
    return renamed


def prefixed(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def beside_the_weights(tensors: dict[str, torch.Tensor]) -> dict:
    """What a run saves with its weights."""
    states = {f"optimizer.state.exp_avg.{name}": tensor.float() for name, tensor in tensors.items()}
    return {
        **states,
        "chained_0.optimizer.state.exp_avg.expert.weight": torch.zeros(3),
        "rng_state/shard_0.0_1.1": [{"random_rng_state": torch.arange(5)}],
        "decoder.layers.self_attention.linear_qkv._extra_state/shard_0_3": torch.zeros(2),
        "rerun_state_machine_state": torch.zeros(1),
    }


def save(folder: Path, state: dict, *, flatten: bool = True) -> Path:
    with pytest.warns(UserWarning, match="single process"):
        dcp.save(state, checkpoint_id=folder, planner=dcp.DefaultSavePlanner(flatten_state_dict=flatten))
    return folder


def save_torch_dist(folder: Path, tensors: dict[str, torch.Tensor], common: str = "file") -> Path:
    """A folder of megatron-core: the common state in a file, in an object (core 0.19), or nowhere."""
    state = {"args": ARGS, "iteration": 700, "checkpoint_version": 3.0, "content_metadata": {}}
    objects = {OBJECT: [state]} if common == "object" else {}
    save(folder, {**tensors, **beside_the_weights(tensors), **objects}, flatten=False)
    if common == "file":
        torch.save(state, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    return folder


OBJECT = "common_state/shard_0_1"


@pytest.mark.parametrize("common", ["file", "object", "none"])
@pytest.mark.parametrize(
    "layout",
    [stacked, dict, in_halves, lambda w: in_halves(stacked(w)), lambda w: prefixed(stacked(w), "module.")],
    ids=["stacked", "a tensor a layer", "halves", "stacked halves", "prefix"],
)
def test_torch_dist(layout, common, tmp_path):
    expected = weights()
    folder = save_torch_dist(tmp_path / "iter_0000700", layout(expected), common)
    assert dist_format(folder) == "torch_dist"
    found = read_dist_checkpoint(folder)
    assert found.tensors.keys() == expected.keys()
    assert all(holds(found.tensors[name], tensor) for name, tensor in expected.items())
    assert (found.format, found.folder, found.table) == ("torch_dist", str(folder), MEGATRON)
    if common == "none":
        assert (found.args, found.iteration, found.parallel) == ({}, None, "tensors stored whole")
        return
    assert found.iteration == 700
    assert found.parallel == "tensor parallel 4 x pipeline parallel 2, tensors stored whole"
    assert found.args["norm_epsilon"] == 1e-5
    assert found.args["betas"] == [0.9, 0.95]
    assert found.args["data_path"] is None
    assert found.args["attention_backend"].endswith("AttnBackend")


def test_what_the_arguments_say_of_the_rows(tmp_path):
    tensors = stacked(weights())
    folder = save_torch_dist(tmp_path / "run", tensors)
    args = argparse.Namespace(**vars(ARGS), rotary_interleaved=True, apply_layernorm_1p=True)
    torch.save({"args": args, "iteration": 1}, folder / "common.pt")
    order = read_dist_checkpoint(folder).order
    assert order.rotary_interleaved
    assert order.zero_centered_gamma
    assert order.gated_blocks == 1


def places(folder: Path) -> Iterator[tuple[str, str, int, int]]:
    """Name, file, first byte and length of every chunk and object, by torch's own classes."""
    for index, info in pickle.loads((folder / ".metadata").read_bytes()).storage_data.items():
        yield index.fqn, info.relative_path, info.offset, info.length


def test_of_optimizer_states_nothing_is_read(tmp_path):
    folder = save_torch_dist(tmp_path / "run", stacked(weights()))
    for name, file, offset, length in places(folder):
        if "optimizer" in name or "rng_state" in name or "_extra_state" in name:
            with (folder / file).open("r+b") as stream:
                stream.seek(offset)
                stream.write(b"\xff" * length)
    with pytest.raises(CheckpointError):
        read_distributed_checkpoint(folder)
    assert read_dist_checkpoint(folder).tensors.keys() == weights().keys()


def test_a_tensor_that_is_no_weight_keeps_its_name(tmp_path):
    odd = {"decoder.layers.self_attention.q_norm.weight_w": torch.zeros(3, 4), "adapter_v": torch.zeros(2)}
    folder = save_torch_dist(tmp_path / "run", {**stacked(weights()), **odd})
    assert read_dist_checkpoint(folder).tensors.keys() - weights().keys() == odd.keys()


def test_a_fork_with_other_names(tmp_path):
    table = (
        NativeWeight("embed.weight", ("model.embed_tokens.weight",), "column"),
        NativeWeight("blocks.layers.{}.fc1.weight", ("a", "b"), "column", "gated"),
    )
    tensors = {"embed.weight": torch.randn(4, 2), "blocks.layers.fc1.weight": torch.randn(2, 6, 2)}
    folder = save_torch_dist(tmp_path / "run", tensors)
    found = read_dist_checkpoint(folder, table)
    assert found.table == table
    assert holds(found.tensors["blocks.layers.1.fc1.weight"], tensors["blocks.layers.fc1.weight"][1])


@pytest.mark.parametrize("prefix", ["", "model.", "model.module.", "model.module.module."])
def test_fsdp_dtensor(prefix, tmp_path):
    expected = weights()
    tensors = prefixed(with_local_names(in_halves(expected)), prefix)
    optimizer = {f"optimizer.state.module.{name}": {"exp_avg": tensor.float()} for name, tensor in expected.items()}
    state = {**tensors, **optimizer, "args": ARGS, "iteration": 90, "rng_state": {"(0, 0)": [torch.zeros(3)]}}
    folder = save(tmp_path / "iter_0000090", state)
    assert dist_format(folder) == "dcp"
    found = read_dist_checkpoint(folder)
    assert (found.format, found.iteration, found.args["num_layers"]) == ("fsdp_dtensor", 90, LAYERS)
    assert found.tensors.keys() == expected.keys()
    assert all(holds(found.tensors[name], tensor) for name, tensor in expected.items())
    for options in ({"optimizer": True}, {"fp32_master": True}):
        with pytest.raises(CheckpointError, match="the optimizer of Megatron-FSDP is not converted; leave --opt"):
            read_dist_checkpoint(folder, **options)


# What several processes write.


def hub_model():
    """bf16, and with sizes that no even number of ranks divides."""
    return tiny_model(tiny_config(vocab_size=79, num_hidden_layers=2, intermediate_size=41), dtype=torch.bfloat16)


# What every rank imports, which takes longer than all that it does.
IMPORTED_ONCE = ["accelerate.utils", "torch.distributed.fsdp", "transformers.models.llama.modeling_llama"]


def _save_as_a_world(rank: int, folder: str) -> None:
    from accelerate import PartialState
    from accelerate.utils import FullyShardedDataParallelPlugin, save_fsdp_model, save_fsdp_optimizer
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    rank_variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    os.environ.update(rank_variables, MASTER_ADDR="127.0.0.1", MASTER_PORT="1")  # looked for, not used
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    PartialState(cpu=True, backend="gloo")  # for Accelerate's log
    mesh = init_device_mesh("cpu", (WORLD,))

    model = hub_model()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
    save_fsdp_model(plugin, None, model, f"{folder}/checkpoint-5")

    norms = [parameter for name, parameter in model.named_parameters() if "norm" in name]
    matrices = [parameter for name, parameter in model.named_parameters() if "norm" not in name]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    tokens = torch.arange(12).reshape(1, 12) + rank
    for _ in range(2):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    save_fsdp_optimizer(plugin, None, optimizer, model, f"{folder}/checkpoint-5")
    whole = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        torch.save(whole, f"{folder}/whole_optimizer.pt")

    rows = {
        name: distribute_tensor(t, mesh, [Shard(t.ndim - 2 if t.ndim > 1 else 0)])
        for name, t in stacked(weights()).items()
    }
    dcp.save(rows, checkpoint_id=f"{folder}/rows")
    columns = {name: distribute_tensor(t, mesh, [Shard(t.ndim - 1)]) for name, t in stacked(weights()).items()}
    dcp.save(columns, checkpoint_id=f"{folder}/columns")
    layers = {name: distribute_tensor(t, mesh, [Shard(0)]) for name, t in in_halves(weights()).items()}
    dcp.save(prefixed(layers, "model.module."), checkpoint_id=f"{folder}/layers")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    multiprocessing.set_forkserver_preload(IMPORTED_ONCE)
    mp.start_processes(_save_as_a_world, (str(folder),), nprocs=WORLD, start_method="forkserver")
    for name in ("rows", "columns"):
        (folder / name / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    return folder


@pytest.mark.slow
def test_fsdp_has_no_second_copy_of_the_weights(world):
    with pytest.raises(CheckpointError, match="FSDP keeps no second copy of the weights; leave --fp32-master out"):
        read_dist_checkpoint(world / "checkpoint-5", fp32_master=True)


@pytest.mark.slow
@pytest.mark.parametrize("inner", ["", "pytorch_model_fsdp_0"])
def test_fsdp2_as_accelerate_writes_it(inner, world):
    found = read_dist_checkpoint(world / "checkpoint-5" / inner)
    expected = hub_model().state_dict()
    assert (found.format, found.table) == ("dcp", None)
    assert found.tensors.keys() == expected.keys()
    assert all(holds(found.tensors[name], tensor) for name, tensor in expected.items())
    heights = [box.size[0] for box, _ in found.tensors["lm_head.weight"].chunks]
    assert sorted(heights) == [25, 27, 27]  # 79 rows over three ranks


def test_a_run_on_fsdp2_becomes_a_hub_folder(world, tmp_path):
    model = hub_model()
    convert_checkpoint(world / "checkpoint-5", tmp_path / "out", config=model.config.to_dict())
    found = load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


def test_the_moments_of_fsdp2_become_those_of_a_trainer(world, tmp_path):
    """Torch itself gathers the truth; its AdamW takes the file for the model's groups of transformers' Trainer."""
    model, truth = hub_model(), torch.load(world / "whole_optimizer.pt")
    config = model.config.to_dict()
    result = convert_checkpoint(world / "checkpoint-5", tmp_path / "out", config=config, optimizer=True)
    assert "optimizer.pt: Adam's moments after 2 steps." in result.notes
    saved = torch.load(tmp_path / "out/optimizer.pt", weights_only=True)
    names = [name for group in saved["param_groups"] for name in group["param_names"]]
    assert sorted(names) == sorted(model.state_dict())
    for index, name in enumerate(names):
        found, expected = saved["state"][index], truth["state"][name]
        assert found["step"] == expected["step"] == 2
        for key in ("exp_avg", "exp_avg_sq"):
            assert found[key].dtype == torch.float32
            assert torch.equal(found[key], expected[key].float())
    args = TrainingArguments(str(tmp_path / "run"), use_cpu=True, weight_decay=0.1, report_to="none")
    optimizer = Trainer(model, args).create_optimizer()
    optimizer.load_state_dict(saved)
    own = {name: optimizer.state[parameter]["exp_avg_sq"] for name, parameter in model.named_parameters()}
    assert all(torch.equal(own[name].float(), truth["state"][name]["exp_avg_sq"].float()) for name in own)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    assert convert_checkpoint(
        world / "checkpoint-5", tmp_path / "out", config=config, optimizer=True
    ).written.already_done
    with pytest.raises(
        CheckpointError, match=r"already holds model\.safetensors, but lineage\.optimizer was True and is None"
    ):
        convert_checkpoint(world / "checkpoint-5", tmp_path / "out", config=config)


def _save_state(folder: Path, optimizer_class, *, flat: bool, **settings) -> tuple:
    """A folder of DCP with the model and its optimizer after a step, as torch gathers both; in muP's groups."""
    model = hub_model().float()
    groups = parameter_groups(model, learning_rate=1e-3, weight_decay=0.1, width_ratio=2.0)
    optimizer = optimizer_class([{**group, **settings} for group in groups])
    tokens = torch.arange(12)[None]
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    weights, state = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder, no_dist=True)
    return model, optimizer


@pytest.mark.parametrize("rate", ["a number", "a tensor"])
@pytest.mark.parametrize("flat", [False, True])
def test_groups_of_torch_are_kept_however_it_saves_them(flat, rate, tmp_path):
    """Flattened, as torchtitan has it, all settings stand with each weight; a rate that is a tensor, with tensors."""
    model, optimizer = _save_state(tmp_path / "run", torch.optim.AdamW, flat=flat)
    if rate == "a tensor":
        shutil.rmtree(tmp_path / "run")
        model, optimizer = _save_state(tmp_path / "run", torch.optim.AdamW, flat=flat, lr=torch.tensor(0.5))
    result = convert_checkpoint(tmp_path / "run", tmp_path / "out", config=model.config.to_dict(), optimizer=True)
    saved = torch.load(tmp_path / "out/optimizer.pt", weights_only=True)
    assert not any("has no" in note for note in result.notes)
    own = optimizer.state_dict()["param_groups"]
    for found, expected in zip(saved["param_groups"], own, strict=True):
        assert len(found["params"]) == len(expected["params"])
        assert {key: found[key] for key in expected if key != "params"} == {
            key: value for key, value in expected.items() if key != "params"
        }
    names = [name for group in saved["param_groups"] for name in group["param_names"]]
    parameters = dict(model.named_parameters())
    for index, name in enumerate(names):
        assert torch.equal(saved["state"][index]["exp_avg"], optimizer.state[parameters[name]]["exp_avg"])
    optimizer.load_state_dict(saved)
    optimizer.step()


@pytest.mark.parametrize("flat", [False, True])
def test_radam_is_not_taken_for_adam(flat, tmp_path):
    model, _ = _save_state(tmp_path / "run", torch.optim.RAdam, flat=flat)
    with pytest.raises(
        CheckpointError, match="group 0 of the optimizer has foreach and no amsgrad, which torch's RAdam"
    ):
        convert_checkpoint(tmp_path / "run", tmp_path / "out", config=model.config.to_dict(), optimizer=True)


def test_what_no_group_says_is_said(tmp_path):
    model, _ = _save_state(tmp_path / "run", torch.optim.AdamW, flat=False)
    state = dcp.state_dict_loader._load_state_dict_from_keys(checkpoint_id=tmp_path / "run")
    del state["optimizer"]["param_groups"]
    shutil.rmtree(tmp_path / "run")
    dcp.save(state, checkpoint_id=tmp_path / "run", no_dist=True)
    result = convert_checkpoint(tmp_path / "run", tmp_path / "out", config=model.config.to_dict(), optimizer=True)
    assert [note for note in result.notes if "no lr of group 0, no betas of group 0" in note]


def test_moments_grow_after_they_were_converted(world, tmp_path):
    config = hub_model().config.to_dict()
    convert_checkpoint(world / "checkpoint-5", tmp_path / "hub", config=config, optimizer=True)
    grow_checkpoint(tmp_path / "hub", tmp_path / "out", {"intermediate_size": 56}, optimizer=tmp_path / "hub")
    before, after = (torch.load(tmp_path / folder / "optimizer.pt", weights_only=True) for folder in ("hub", "out"))
    names = [name for group in after["param_groups"] for name in group["param_names"]]
    index = names.index("model.layers.1.mlp.up_proj.weight")
    grown, source = after["state"][index]["exp_avg"], before["state"][index]["exp_avg"]
    assert torch.equal(grown[: len(source)], source)
    assert not grown[len(source) :].any()


def _without_moments(folder):
    shutil.rmtree(folder / "optimizer_0")


def _lost_file(folder):
    next((folder / "optimizer_0").glob("*.distcp")).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without_moments, r"pytorch_model_fsdp_0: has no optimizer beside it, in optimizer_0"),
        (_lost_file, r"\.distcp"),
    ],
)
def test_moments_that_are_not_there(damage, message, world, tmp_path):
    shutil.copytree(world / "checkpoint-5", tmp_path / "run")
    damage(tmp_path / "run")
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(tmp_path / "run", tmp_path / "out", config=hub_model().config.to_dict(), optimizer=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "kind"), [("rows", "torch_dist"), ("columns", "torch_dist"), ("layers", "fsdp_dtensor")]
)
def test_shards_of_several_ranks(name, kind, world):
    found = read_dist_checkpoint(world / name)
    assert found.format == kind
    assert found.tensors.keys() == weights().keys()
    assert all(holds(found.tensors[name], tensor) for name, tensor in weights().items())


def test_a_lost_rank(world, tmp_path):
    folder = shutil.copytree(world / "rows", tmp_path / "rows")
    next(folder.glob("__1_*")).unlink()
    with pytest.raises(
        CheckpointError, match=r"__1_0\.distcp is missing; \.metadata puts .* there; copy the folder again"
    ):
        read_dist_checkpoint(folder)


# What is refused.


def _drop(name: str):
    return lambda tensors: {other: tensor for other, tensor in tensors.items() if other != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop(f"decoder.layers.1.{FC1}_v"), rf"layers\.1\.{FC1}_v is missing, .*layers\.1\.{FC1}_w is there"),
        (_drop(f"decoder.layers.0.{FC1}_w"), rf"layers\.0\.{FC1}_w is missing, .*layers\.0\.{FC1}_v is there"),
        (
            lambda t: {**t, f"decoder.layers.0.{FC1}_w": torch.zeros(5, HIDDEN, dtype=torch.bfloat16)},
            rf"{FC1}_w is bfloat16 \(5, 8\), .*{FC1}_v is bfloat16 \(12, 8\)",
        ),
        (
            lambda t: {**t, f"decoder.layers.2.{FC1}": torch.zeros(2, 2)},
            rf"layers\.2\.{FC1} is there whole, and .*{FC1}_[wv] too",
        ),
        (
            lambda t: {**t, "module.output_layer.weight": torch.zeros(2, 2)},
            r"output_layer\.weight is there under another name too, as output_layer\.weight",
        ),
    ],
)
def test_tensors_that_do_not_add_up(change, message, tmp_path):
    folder = save_torch_dist(tmp_path / "run", change(in_halves(weights())))
    with pytest.raises(CheckpointError, match=message):
        read_dist_checkpoint(folder)


@pytest.mark.parametrize("backend", ["zarr", "tensorstore"])
def test_another_backend(backend, tmp_path):
    (tmp_path / "metadata.json").write_text(json.dumps({"sharded_backend": backend}))
    assert dist_format(tmp_path) == "torch_dist"
    expected = rf"metadata\.json: sharded_backend is '{backend}', expected 'torch_dist'; .* save it with --ckpt-format"
    with pytest.raises(CheckpointError, match=expected):
        read_dist_checkpoint(tmp_path)


def test_a_common_state_that_is_none(tmp_path):
    folder = save_torch_dist(tmp_path / "run", stacked(weights()))
    torch.save([1, 2], folder / "common.pt")
    with pytest.raises(CheckpointError, match=r"common\.pt holds a list, expected a dict with args and iteration"):
        read_dist_checkpoint(folder)


@pytest.mark.parametrize("content", [None, "{}", "[1]", '{"format": "pt"}'])
def test_folders_of_others(content, tmp_path):
    if content is not None:
        (tmp_path / "metadata.json").write_text(content)
    assert dist_format(tmp_path) is None


def torch_zip(pickled: bytes) -> bytes:
    """A torch.save file with that pickle."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
    return stream.getvalue()


def _in_common_state(folder: Path, content: bytes) -> None:
    (folder / "common.pt").write_bytes(content)


def _in_an_object(folder: Path, content: bytes) -> None:
    (folder / "common.pt").unlink(missing_ok=True)
    (folder / "object.distcp").write_bytes(content)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for index, info in metadata.storage_data.items():
        if index.fqn == OBJECT:
            info.relative_path, info.offset, info.length = "object.distcp", 0, len(content)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("place", [_in_common_state, _in_an_object])
def test_hostile_pickles_execute_nothing(place, tmp_path):
    folder = save_torch_dist(tmp_path / "run", {"output_layer.weight": torch.zeros(2, 2)}, "object")
    canary = tmp_path / "canary"
    reached = 0
    for data in hostile_pickles(canary).values():
        place(folder, torch_zip(data))
        with pytest.raises(CheckpointError, match=r"damaged or hostile|expected a dict"):
            read_dist_checkpoint(folder)
        reached += 1
        assert not harm_done(canary)
    assert reached >= 10

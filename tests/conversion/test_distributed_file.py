# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The reader of torch.distributed.checkpoint folders, on folders that torch writes."""

import io
import pickle
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from conversion.checkpoint.distributed_file import read_distributed_checkpoint
from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.execute import WriteOptions, write_checkpoint
from conversion.checkpoint.plan import CheckpointPlan
from tests.fixtures.hostile_pickles import harm_done, hostile_pickles
from tests.fixtures.yardstick import TWO_SECONDS, counted

pytestmark = pytest.mark.slow


def state_dict() -> dict:
    generator = torch.Generator().manual_seed(0)
    return {
        "model.embed.weight": torch.randn(13, 6, generator=generator).to(torch.bfloat16),
        "model.norm.weight": torch.randn(7, generator=generator),
        "steps": torch.tensor(3),
        "empty": torch.zeros(0, 4, dtype=torch.float16),
        "flags": torch.tensor([True, False]),
        "nested": {"weight": torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)},
        "args": {"seed": 1},
    }


def _save_sharded(rank: int, world_size: int, folder: str) -> None:
    """FSDP2 and tensor parallelism write DTensors: rows, columns, and both at once, over uneven sizes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}.store", rank=rank, world_size=world_size)
    whole = state_dict()["model.embed.weight"]
    line, grid = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    tensors = {
        "rows": distribute_tensor(whole, line, [Shard(0)]),
        "columns": distribute_tensor(whole, line, [Shard(1)]),
        "grid": distribute_tensor(whole, grid, [Shard(0), Shard(1)]),
        "few": distribute_tensor(whole[:2].contiguous(), line, [Shard(0)]),  # the last ranks hold nothing
        "replicated": whole,
    }
    dcp.save(tensors, checkpoint_id=folder)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dcp") / "one"
    with pytest.warns(UserWarning, match="single process"):
        dcp.save(state_dict(), checkpoint_id=folder)
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dcp") / "four"
    mp.spawn(_save_sharded, (4, str(folder)), nprocs=4)
    return folder


def materialise(folder: Path, out: Path) -> dict[str, torch.Tensor]:
    """Run the plans of every tensor and load the result with the safetensors library."""
    from safetensors.torch import load_file

    tensors = read_distributed_checkpoint(folder).tensors
    plans = tuple(tensor.plan(name) for name, tensor in tensors.items())
    write_checkpoint(CheckpointPlan(plans, {}), out, WriteOptions())
    return load_file(out / "model.safetensors")


def test_one_process(saved, tmp_path):
    checkpoint = read_distributed_checkpoint(saved)
    expected = state_dict()
    expected["nested.weight"] = expected.pop("nested")["weight"]
    del expected["args"]
    found = materialise(saved, tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in expected.items()
    )
    assert checkpoint.objects.keys() == {"args.seed"}


def test_four_processes(sharded, tmp_path):
    whole = state_dict()["model.embed.weight"]
    found = materialise(sharded, tmp_path / "out")
    assert torch.equal(found.pop("few"), whole[:2])
    assert len(found) == 4
    assert all(torch.equal(tensor, whole) for tensor in found.values())
    assert len(read_distributed_checkpoint(sharded).tensors["grid"].chunks) == 4


def test_a_lost_rank(sharded, tmp_path):
    folder = shutil.copytree(sharded, tmp_path / "folder")
    lost = sorted(folder.glob("__2_*.distcp"))[0]
    lost.unlink()
    with pytest.raises(CheckpointError, match=rf"{lost.name} is missing; \.metadata puts"):
        read_distributed_checkpoint(folder)


def test_a_short_file(sharded, tmp_path):
    folder = shutil.copytree(sharded, tmp_path / "folder")
    short = max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)
    short.write_bytes(short.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=rf"{short.name} has \d+ bytes, \.metadata puts"):
        read_distributed_checkpoint(folder)


def edit(folder: Path, change) -> None:
    """Change the metadata as a Python object and store it again."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def _chunks(metadata, name="rows") -> TensorStorageMetadata:
    return metadata.state_dict_metadata[name].chunks


def _place(metadata, name="rows"):
    return next(info for index, info in metadata.storage_data.items() if index.fqn == name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: _chunks(m).pop(), "rows: the pieces fill .* of 78 elements"),
        (lambda m: _chunks(m).append(_chunks(m)[0]), "rows: .*overlap"),
        (lambda m: setattr(m.state_dict_metadata["rows"], "size", torch.Size((12, 6))), "rows: .*outside"),
        (lambda m: setattr(_chunks(m)[0], "sizes", torch.Size((3, 6))), r"rows at \(0, 0\) has shape \(4, 6\)"),
        (lambda m: setattr(_chunks(m)[0], "sizes", torch.Size((24,))), "a chunk of rows has no offsets and sizes in 2"),
        (lambda m: m.storage_data.clear(), r"rows has a chunk at \(0, 0\) that storage_data does not place"),
        (lambda m: setattr(_place(m), "relative_path", "../other.distcp"), "which is not a file of the folder"),
        (lambda m: setattr(_place(m), "relative_path", "/etc/passwd"), "which is not a file of the folder"),
        (lambda m: setattr(_place(m), "offset", -5), "puts rows at -5"),
        (lambda m: setattr(_place(m), "length", 10**15), "puts rows at"),
        (lambda m: setattr(_place(m), "transform_descriptors", ["zstd"]), "rows is stored transformed"),
        (lambda m: setattr(m, "state_dict_metadata", None), "has no state_dict_metadata"),
        (lambda m: m.state_dict_metadata.update(rows=3), "entry 'rows' of state_dict_metadata"),
    ],
)
def test_metadata_that_does_not_add_up(change, message, sharded, tmp_path):
    folder = shutil.copytree(sharded, tmp_path / "folder")
    edit(folder, change)
    with pytest.raises(CheckpointError, match=message):
        read_distributed_checkpoint(folder)


def test_hostile_metadata_executes_nothing(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "folder")
    canary = tmp_path / "canary"
    pickles = hostile_pickles(canary)
    assert len(pickles) >= 10
    for data in pickles.values():
        (folder / ".metadata").write_bytes(data)
        with pytest.raises(CheckpointError):
            read_distributed_checkpoint(folder)
        assert not harm_done(canary)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_metadata_is_a_clean_error(data, saved, tmp_path):
    good = (saved / ".metadata").read_bytes()
    folder = tmp_path / "folder"
    if not folder.exists():
        shutil.copytree(saved, folder)
    bad = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        bad[data.draw(st.integers(0, len(bad) - 1))] = data.draw(st.integers(0, 255))
    (folder / ".metadata").write_bytes(bad[: data.draw(st.integers(1, len(bad)))])
    try:
        checkpoint = read_distributed_checkpoint(folder)
    except CheckpointError:
        return
    assert all(np.prod(tensor.shape) >= 0 for tensor in checkpoint.tensors.values())


def test_of_entries_that_are_not_wanted_nothing_is_needed(sharded, tmp_path):
    folder = shutil.copytree(sharded, tmp_path / "folder")
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    needed = {info.relative_path for index, info in metadata.storage_data.items() if index.fqn == "replicated"}
    for path in folder.glob("*.distcp"):
        if path.name not in needed:
            path.unlink()
    assert read_distributed_checkpoint(folder, lambda name: name == "replicated").tensors.keys() == {"replicated"}


def test_equal_fronts_of_unequal_chunks(tmp_path):
    """Chunks whose zips differ in anything before their elements are each read for themselves."""
    tensors = {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": torch.arange(6.0, 12.0).reshape(2, 3),  # as a
        "c": torch.arange(6.0).reshape(3, 2),  # as long, of another shape
        "d": torch.arange(6).reshape(2, 3).int(),  # as long, of another dtype
        "e": torch.arange(6.0).reshape(3, 2).T,  # as long, of other strides
    }
    with pytest.warns(UserWarning, match="single process"):
        dcp.save(tensors, checkpoint_id=tmp_path / "folder")
    found = materialise(tmp_path / "folder", tmp_path / "out")
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )


def test_a_large_world(tmp_path):
    """Three of the 1T's 140 layers: 1,728 chunks of weights, thrice as many of the optimizer, and every rank's plan.

    Each costs a KB, where an object of its own for everything that the metadata names took ten.
    """
    write_large_metadata(tmp_path, layers=3, ranks=64)
    tracemalloc.start()
    checkpoint = read_distributed_checkpoint(tmp_path, lambda name: not name.startswith("optimizer."))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    with counted() as taken:
        read_distributed_checkpoint(tmp_path, lambda name: not name.startswith("optimizer."))
    assert sum(len(tensor.chunks) for tensor in checkpoint.tensors.values()) == 9 * 3 * 64
    assert peak < 4 * 9 * 3 * 64 * 2_000
    assert taken.yardsticks < TWO_SECONDS  # a third of a second


def write_large_metadata(folder: Path, layers: int, ranks: int) -> None:
    """Nine stacked weights and their optimizer from many ranks; the tensors are small, and only weights have bytes."""
    chunk = torch.zeros(1, 2, 4, dtype=torch.bfloat16)
    buffer = io.BytesIO()
    torch.save(chunk, buffer)
    metadata, plans = Metadata({}, storage_data={}), [[] for _ in range(ranks)]
    for state in ("", *(f"optimizer.state.{name}." for name in ("fp32_param", "exp_avg", "exp_avg_sq"))):
        for number in range(9):
            name, size = f"{state}decoder.layers.{number}.weight", torch.Size((layers, 2 * ranks, 4))
            properties = TensorProperties(dtype=chunk.dtype)
            offsets = [torch.Size((layer, 2 * rank, 0)) for layer in range(layers) for rank in range(ranks)]
            chunks = [ChunkStorageMetadata(offset, chunk.shape) for offset in offsets]
            metadata.state_dict_metadata[name] = TensorStorageMetadata(properties, size, chunks)
            for count, piece in enumerate(chunks):
                index, rank = MetadataIndex(name, piece.offsets, count), count % ranks
                start = (number * layers + count // ranks) * len(buffer.getvalue())
                metadata.storage_data[index] = _StorageInfo(f"__{rank}_{state}.distcp", start, len(buffer.getvalue()))
                data = TensorWriteData(piece, TensorProperties(dtype=chunk.dtype), size)
                plans[rank].append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
    metadata.all_local_plans = [SavePlan(items) for items in plans]  # as megatron-core does
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    for rank in range(ranks):
        (folder / f"__{rank}_.distcp").write_bytes(buffer.getvalue() * layers * 9)


def test_no_metadata(tmp_path):
    with pytest.raises(CheckpointError, match=r"\.metadata cannot be read: No such file"):
        read_distributed_checkpoint(tmp_path)

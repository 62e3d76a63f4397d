# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Planned torch.save files against torch.load, zipfile and our own reader."""

import os
import zipfile
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from conversion.checkpoint.bytes import identify
from conversion.checkpoint.containers import Layout, Shard
from conversion.checkpoint.dtypes import BFLOAT16, DTYPES, FLOAT32
from conversion.checkpoint.execute import WriteOptions, write_checkpoint
from conversion.checkpoint.plan import Box, CheckpointPlan, Fill, PlanError, TensorPlan, View
from conversion.checkpoint.torch_file import read_torch_file
from conversion.checkpoint.torch_zip import planned_tensors, torch_shard

LOADS = {
    "plain": {"weights_only": False},
    "weights only": {"weights_only": True},
    "mapped": {"weights_only": True, "mmap": True},
}


@pytest.fixture
def tensors(tmp_path) -> dict[str, tuple[TensorPlan, torch.Tensor]]:
    """A planned tensor of every kind, and what torch makes of the same bytes."""
    data = np.random.default_rng(0).integers(0, 2, 12 * 16, np.uint8)
    (tmp_path / "source").write_bytes(data.tobytes())
    known = {}
    for dtype in DTYPES:
        if not hasattr(torch, dtype.name):
            continue
        view = View.contiguous(identify(tmp_path / "source"), 0, (3, 4), dtype)
        value = torch.from_numpy(data[: 12 * dtype.itemsize].copy()).view(getattr(torch, dtype.name)).view(3, 4)
        known[dtype.name] = (TensorPlan.copy_of(dtype.name, view), value)
    view = View.contiguous(identify(tmp_path / "source"), 0, (3, 4), BFLOAT16)
    scalar = TensorPlan("scalar", (), FLOAT32, (Fill(Box((0,), (1,)), 2.5),))
    return known | {
        "transposed": (
            TensorPlan.copy_of("transposed", view.permute(1, 0)),
            known["bfloat16"][1].T.clone(memory_format=torch.contiguous_format),
        ),
        "scalar": (scalar, torch.tensor(2.5)),
        "empty": (TensorPlan("empty", (0, 3), FLOAT32, ()), torch.empty(0, 3)),
    }


def state_of(tensors: dict, which: int) -> dict:
    """The object to save, with planned tensors (0) or with torch's (1)."""
    values = {name: pair[which] for name, pair in tensors.items()}
    numbers = [0, 1, -1, 255, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**63, -(10**30)]
    args = Namespace(text="中文", none=None, yes=True, no=False, epsilon=1e-5, numbers=numbers, nested=(1, ("a",), []))
    args.params_dtype = (BFLOAT16, torch.bfloat16)[which]
    return {"args": args, "version": 3.0, "model": OrderedDict(values, _extra_state=None), "list": [values["scalar"]]}


def write(content: object, folder: Path) -> Path:
    shard = torch_shard("release/mp_rank_00/weights.pt", content)
    plan = CheckpointPlan(tuple(tensor for tensor, _ in shard.tensors), {})
    write_checkpoint(plan, folder, WriteOptions(), Layout((shard,)))
    return folder / shard.filename


def without_list(state: dict) -> dict:
    return {name: value for name, value in state.items() if name != "list"}


@pytest.mark.parametrize("options", LOADS.values(), ids=LOADS)
def test_torch_loads_what_was_planned(options, tensors, tmp_path):
    file = write(without_list(state_of(tensors, 0)), tmp_path / "out")
    with torch.serialization.safe_globals([Namespace]):
        found = torch.load(file, **options)
    expected = without_list(state_of(tensors, 1))
    assert found["args"] == expected["args"]
    assert type(found["model"]) is OrderedDict
    assert list(found["model"]) == list(expected["model"])
    assert found["version"] == 3.0
    for name, (_, value) in tensors.items():
        same = found["model"][name]
        assert same.dtype == value.dtype
        assert same.shape == value.shape
        assert same.is_contiguous()
        assert same.reshape(-1).view(torch.uint8).tolist() == value.reshape(-1).view(torch.uint8).tolist()


def test_our_reader_reads_it(tensors, tmp_path):
    file = write(without_list(state_of(tensors, 0)), tmp_path / "out")
    found = read_torch_file(file)
    assert vars(found["args"])["numbers"] == state_of(tensors, 1)["args"].numbers
    assert vars(found["args"])["params_dtype"] is BFLOAT16
    assert found["model"]["_extra_state"] is None
    raw = file.read_bytes()
    for name, (plan, value) in tensors.items():
        view = found["model"][name]
        assert (view.shape, view.dtype) == (plan.shape, plan.dtype)
        assert raw[slice(*view.span)] == bytes(value.reshape(-1).view(torch.uint8).tolist())


def test_as_torch_lays_it_out(tensors, tmp_path):
    """The members, their alignment and their flags; checksums where the bytes are known, and 0 for storages."""
    ours = write(without_list(state_of(tensors, 0)), tmp_path / "out")
    crc = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(without_list(state_of(tensors, 1)), tmp_path / "weights.pt")
    finally:
        torch.serialization.set_crc32_options(crc)
    theirs = {entry.filename: entry for entry in zipfile.ZipFile(tmp_path / "weights.pt").infolist()}
    archive = zipfile.ZipFile(ours)
    # What only tells torch how to compute positions, which it otherwise reads.
    assert theirs.keys() - set(archive.namelist()) == {"weights/.format_version", "weights/.storage_alignment"}
    for entry in archive.infolist():
        position = entry.header_offset + 30 + len(entry.filename)
        header = ours.read_bytes()[entry.header_offset : position]
        assert (position + int.from_bytes(header[28:30], "little")) % 64 == 0
        if "/data/" in entry.filename:
            assert (entry.CRC, entry.file_size) == (0, theirs[entry.filename].file_size)
        else:
            archive.read(entry)  # checks the checksum
    assert len(archive.read("weights/.data/serialization_id")) == 40


def test_zip64(tmp_path):
    """One storage of more than 4 GiB and one that lies behind it, in a file of holes."""
    big = TensorPlan("big", (5 * 2**28, 4), FLOAT32, (Fill(Box.whole((5 * 2**28, 4))),))
    small = TensorPlan("small", (3,), FLOAT32, (Fill(Box.whole((3,)), 1.0),))
    shard = torch_shard("weights.pt", {"big": big, "small": small})
    Layout((shard,)).check([big, small])
    file = tmp_path / "weights.pt"
    with file.open("wb") as stream:
        for position, content in shard.fixed:
            stream.seek(position)
            stream.write(content)
        stream.seek(shard.tensors[1][1])
        stream.write(np.ones(3, "<f4").tobytes())
    assert os.path.getsize(file) == shard.nbytes > 20 * 2**30
    sizes = {entry.filename: entry.file_size for entry in zipfile.ZipFile(file).infolist()}
    assert (sizes["weights/data/0"], sizes["weights/data/1"]) == (20 * 2**30, 12)
    with zipfile.ZipFile(file) as archive, archive.open("weights/version") as member:
        assert member.read() == b"3\n"
    views = read_torch_file(file)
    assert [(view.offset, view.shape) for view in views.values()] == [(at, t.shape) for t, at in shard.tensors]
    found = torch.load(file, mmap=True)
    assert found["small"].tolist() == [1, 1, 1]
    assert (found["big"].shape, found["big"][-1].tolist()) == ((5 * 2**28, 4), [0, 0, 0, 0])


def test_tensors_are_found_in_their_order(tensors):
    state = state_of(tensors, 0)
    assert [tensor.name for tensor in planned_tensors(state)] == [*tensors, "scalar"]


def test_what_has_no_opcode_is_refused():
    with pytest.raises(TypeError, match="cannot hold a PosixPath here"):
        torch_shard("weights.pt", {"a": [Path("b")]})


HEAD, TAIL = TensorPlan("head", (2,), FLOAT32, ()), TensorPlan("tail", (2,), FLOAT32, ())


@pytest.mark.parametrize(
    ("fixed", "placed", "message"),
    [
        (((0, b"12345678"), (24, b"end")), ((HEAD, 8), (TAIL, 16)), None),
        (((0, b"12345678"),), ((HEAD, 8),), "the files hold 1 tensors, the plan has 2"),
        (((0, b"12345678"),), ((HEAD, 8), (HEAD, 16)), "the files hold 2 tensors, the plan has 2 and not the same"),
        (((0, b"12345678"),), ((HEAD, 8), (TAIL, 20)), "file.pt: a part begins at byte 20, the one before ends at 16"),
        (((0, b"12345678"),), ((HEAD, 8), (TAIL, 12)), "a part begins at byte 12, the one before ends at 16"),
        (((4, b"1234"),), ((HEAD, 8), (TAIL, 16)), "a part begins at byte 4, the one before ends at 0"),
    ],
    ids=["tiles", "missing", "twice", "gap", "overlap", "no start"],
)
def test_a_layout_is_checked(fixed, placed, message):
    layout = Layout((Shard("file.pt", fixed, placed),))
    if message is None:
        layout.check([HEAD, TAIL])
    else:
        with pytest.raises(PlanError, match=message):
            layout.check([HEAD, TAIL])

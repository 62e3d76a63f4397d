# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The torch.save reader against torch.load: the same values from every kind of tensor, and no harm from any file."""

import argparse
import io
import math
import pickle
import struct
import sys
import tarfile
import zipfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conversion.checkpoint.dtypes import BFLOAT16, DTYPES
from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.inert_pickle import Inert
from conversion.checkpoint.plan import View
from conversion.checkpoint.reader import FileReader
from conversion.checkpoint.torch_file import (
    MAX_PICKLE_BYTES,
    UnreadableTensor,
    read_torch_file,
    read_torch_tensors,
)
from conversion.checkpoint.zip_directory import MAX_DIRECTORY_BYTES
from tests.fixtures.hostile_pickles import harm_done, hostile_pickles, text, undo_harm

FLAT = torch.arange(120, dtype=torch.float32)


class Subclass(torch.Tensor):
    pass


def attributed(tensor: torch.Tensor) -> torch.Tensor:
    tensor.tensor_model_parallel = True
    return tensor


def saved(value: object, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def torch_zip(pickled: bytes, storages: dict[str, bytes] | None = None, compression=zipfile.ZIP_STORED, **more: bytes):
    """A torch.save file by hand."""
    members = {"data.pkl": pickled, **{f"data/{key}": data for key, data in (storages or {}).items()}, **more}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(f"archive/{name}", data)
    return buffer.getvalue()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_bytes_of_every_kind_of_tensor(tmp_path, protocol):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (7,), (), (0,), (2, 0, 3), (1, 2, 3, 4)]
    tensors = {
        **{
            f"{dtype}.{shape}": torch.randint(
                0, 2 if dtype.name == "bool" else 256, (math.prod(shape) * dtype.itemsize,), generator=generator
            )
            .to(torch.uint8)
            .view(getattr(torch, dtype.name))
            .view(shape)
            for dtype in DTYPES
            for shape in shapes
            if hasattr(torch, dtype.name)
        },
        "flat.0": FLAT[:60].view(6, 10),
        "flat.1": FLAT[60:].view(3, 4, 5),
        "transposed": FLAT[3:15].view(3, 4).t(),
        "permuted": FLAT[:60].view(3, 4, 5).permute(2, 0, 1),
        "stepped": FLAT[5::7],
        "column": FLAT.view(10, 12)[:, 3:5],
        "expanded": FLAT[7:8].expand(4, 5),
        "diagonal": FLAT.view(10, 12).diagonal(),
        "overlapping": FLAT.as_strided((5, 4), (2, 1), 11),
        "view of another dtype": FLAT.clone().view(torch.bfloat16)[3:9],
        "parameter": torch.nn.Parameter(FLAT[20:30]),
        "parameter with attribute": attributed(torch.nn.Parameter(FLAT[30:40].clone())),
        "tensor with attribute": attributed(FLAT[40:50].clone()),
        "buffer": torch.nn.Buffer(FLAT[50:53].clone()),
        "half of a float8 buffer": FLAT.to(torch.float8_e5m2)[60:],
    }
    tensors["tied"] = tensors["flat.0"]
    path = tmp_path / "pytorch_model.bin"
    torch.save(tensors, path, pickle_protocol=protocol)

    views = read_torch_tensors(path)
    expected = torch.load(path, weights_only=False)
    assert list(views) == list(expected)
    with FileReader() as reader:
        for name, view in views.items():
            assert (view.shape, view.dtype.name) == (tuple(expected[name].shape), str(expected[name].dtype)[6:]), name
            assert reader.read(view).tobytes() == tensor_bytes(expected[name]), name
    assert views["tied"] == views["flat.0"]
    assert views["transposed"].strides == (1, 4)


def test_tensors_of_a_module(tmp_path):
    """Its state_dict is an OrderedDict with an attribute, which the pickle sets by BUILD."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    torch.save(module.state_dict(), tmp_path / "x.pt")
    assert list(read_torch_tensors(tmp_path / "x.pt")) == list(module.state_dict())


def test_a_training_checkpoint_keeps_its_shape(tmp_path):
    path = tmp_path / "model_optim_rng.pt"
    content = {
        "args": argparse.Namespace(num_layers=3, params_dtype=torch.bfloat16, path=Path("x")),
        "checkpoint_version": 3.0,
        "model": {"language_model": OrderedDict(weight=FLAT.view(10, 12), _extra_state=None)},
        "shape": torch.Size([2, 3]),
        "rng_state": [{"np_rng_state": np.random.RandomState(0).get_state(), "random": (3, (1, 2), None)}],
        "device": torch.device("cpu"),
    }
    torch.save(content, path)
    read = read_torch_file(path)
    assert list(read) == list(content)
    assert vars(read["args"])["num_layers"] == 3
    assert read["args"].params_dtype is BFLOAT16
    assert read["model"]["language_model"]["weight"].shape == (10, 12)
    assert read["model"]["language_model"]["_extra_state"] is None
    assert read["shape"] == (2, 3)
    assert read["rng_state"][0]["random"] == (3, (1, 2), None)
    assert (type(read["device"]), read["device"].args) == (Inert, ("cpu",))


def test_files_of_older_torch(tmp_path):
    """Before torch 2.1: no byteorder; before 1.10: a rebuild function without gradients and hooks."""
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x06tQ"
    pickled = (
        b"\x80\x02}"
        + text("w")
        + b"ctorch._utils\n_rebuild_tensor\n("
        + storage
        + b"K\x02K\x02K\x02\x86K\x02K\x01\x86tRs."
    )
    (tmp_path / "x.pt").write_bytes(torch_zip(pickled, {"0": np.arange(6, dtype="<f4").tobytes()}))
    with FileReader() as reader:
        assert reader.read(read_torch_tensors(tmp_path / "x.pt")["w"]).tolist() == [[2, 3], [4, 5]]


def test_a_zip_inside_a_file(tmp_path):
    """As in a .distcp file."""
    first, second = saved(FLAT), saved([FLAT + 1])
    path = tmp_path / "__0_0.distcp"
    path.write_bytes(first + second + b"rest")
    with FileReader() as reader:
        assert reader.read(read_torch_file(path, length=len(first))).tolist() == FLAT.tolist()
        (view,) = read_torch_file(path, start=len(first), length=len(second))
        assert reader.read(view).tolist() == (FLAT + 1).tolist()
    for start, length in [(0, 10**9), (-1, 5), (10**9, None)]:
        with pytest.raises(CheckpointError, match=r"expected a torch\.save zip at bytes"):
            read_torch_file(path, start=start, length=length)


def test_a_member_beyond_4_gib(tmp_path):
    """zip64 offsets; the file is sparse."""
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(io.BytesIO(saved({"w": FLAT}))) as source, zipfile.ZipFile(path, "w") as archive:
        for entry in source.infolist():
            if entry.filename.endswith("data/0"):
                archive.start_dir += 5 * 2**30
            archive.writestr(entry.filename, source.read(entry))
    view = read_torch_tensors(path)["w"]
    assert view.offset > 5 * 2**30
    with FileReader() as reader:
        assert reader.read(view).tolist() == FLAT.tolist()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.quantize_per_tensor(FLAT, 0.1, 0, torch.qint8), "a quantised tensor"),
        (lambda: FLAT.to_sparse(), "a sparse tensor"),
        (lambda: FLAT.view(10, 12).to_sparse_csr(), "a sparse tensor"),
        (lambda: torch.nested.nested_tensor([FLAT, FLAT[3:]]), "a nested tensor"),
        (lambda: torch.nested.nested_tensor([FLAT, FLAT[3:]], layout=torch.jagged), "of class torch.nested"),
        (lambda: torch.empty(3, device="meta"), "on the meta device"),
        (lambda: FLAT.to(torch.complex32), "of dtype torch.complex32, unknown to this package"),
        (lambda: torch._neg_view(FLAT), "a lazily negated or conjugated tensor"),
        (lambda: FLAT.to(torch.complex64).conj(), "a lazily negated or conjugated tensor"),
        (lambda: FLAT.clone().as_subclass(Subclass), "of class .*Subclass"),
    ],
    ids=["quantised", "sparse", "csr", "nested", "jagged", "meta", "complex32", "negated", "conjugated", "subclass"],
)
def test_tensors_that_are_no_windows_are_named(tmp_path, make, reason):
    path = tmp_path / "x.bin"
    torch.save({"good": FLAT, "layers.3.odd": make()}, path)
    tree = read_torch_file(path)
    assert type(tree["good"]) is View
    assert type(tree["layers.3.odd"]) is UnreadableTensor
    with pytest.raises(CheckpointError, match=f"x.bin: 'layers.3.odd' is .*{reason}.*save it as a plain tensor"):
        read_torch_tensors(path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([FLAT], "holds a list, expected a state dict"),
        (FLAT, "holds a View, expected a state dict"),
        (argparse.Namespace(), "holds a argparse.Namespace, expected a state dict"),
        ({"model": {"w": FLAT}, "iteration": 3}, "entry 'model' is a dict, expected a tensor; it holds 'model', 'iter"),
        ({"w": FLAT, "_extra_state": None}, "entry '_extra_state' is a NoneType"),
        ({0: FLAT}, "entry 0 is a View"),
    ],
)
def test_anything_but_a_state_dict(tmp_path, value, message):
    torch.save(value, tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match=message):
        read_torch_tensors(tmp_path / "x.bin")


def tar_archive() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    return buffer.getvalue()


def patched(data: bytes, at: int, patch: bytes) -> bytes:
    return data[: at % len(data)] + patch + data[at % len(data) + len(patch) :]


def duplicated() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"N.")
        archive.writestr("archive/data_pkl", b"N.")
    return buffer.getvalue().replace(b"data_pkl", b"data.pkl")


def overlapping() -> bytes:
    """Two directory entries of one member."""
    data = torch_zip(b"N.", {"0": b"1234", "1": b"1234"})
    directory = data.index(b"PK\x01\x02")
    second, third = (data.index(b"data/" + key, directory) - 54 for key in (b"0", b"1"))
    return patched(data, third + 42, data[second + 42 : second + 46])


ONE = saved({"w": torch.arange(6, dtype=torch.float32)})
CENTRAL = ONE.index(b"PK\x01\x02")  # data.pkl is the first member in both
PICKLE = zipfile.ZipFile(io.BytesIO(ONE)).read("archive/data.pkl")
SIX = {"0": bytes(24)}
DAMAGED = {
    "nothing": (b"", "begins with b''"),
    "noise": (b"\x01\x02" * 50, r"begins with b'\\x01\\x02"),
    "two letters": (b"PK", "truncated, damaged or no zip"),
    "before torch 1.6": (saved({"w": FLAT}, _use_new_zipfile_serialization=False), "torch before 1.6.*isolated env"),
    "before torch 0.1.10": (tar_archive(), "is a tar archive.*torch.save it again"),
    "bare pickle": (pickle.dumps({"w": 1}), "is a bare pickle.*weights_only=True"),
    "truncated": (ONE[:-1], "truncated, damaged or no zip"),
    "half": (ONE[: len(ONE) // 2], "truncated, damaged or no zip"),
    "garbage before": (b"PK\x03\x04" + ONE, "its directory makes it 1577 bytes long, it has 1581"),
    "other zip": (torch_zip(b"")[:0] + saved(1).replace(b"data.pkl", b"data.xyz"), "0 members named"),
    "two roots": (
        (lambda b: (zipfile.ZipFile(b, "a").writestr("other/data.pkl", b"N."), b.getvalue())[1])(io.BytesIO(ONE)),
        "truncated|2 members named",
    ),
    "program": (torch_zip(b"N.", **{"constants.pkl": b"N."}), "TorchScript program; save the state_dict"),
    "member twice": (duplicated(), "'archive/data.pkl' occurs twice"),
    "one member inside another": (overlapping(), "begins at byte 48, the one before it ends at 96"),
    "compressed": (torch_zip(PICKLE, SIX, zipfile.ZIP_DEFLATED), "'archive/data.pkl' is compressed or encrypted"),
    "compressed bomb": (torch_zip(bytes(10**7), {}, zipfile.ZIP_DEFLATED), "is compressed or encrypted"),
    "encrypted": (patched(ONE, CENTRAL + 8, b"\x01\x08"), "is compressed or encrypted"),
    "no header": (patched(ONE, 0, b"PK\x07\x08"), "'archive/data.pkl' has no header at byte 0"),
    "size of 4 GiB": (patched(ONE, CENTRAL + 20, b"\xf0\xff\xff\xff" * 2), "has 4294967280 bytes from byte"),
    "two sizes": (patched(ONE, CENTRAL + 20, b"\x00"), "'archive/data.pkl' has"),
    "name too long in header": (patched(ONE, 26, b"\xff\xff"), "'archive/data.pkl' has"),
    "checksum": (patched(ONE, ONE.index(b"FloatStorage"), b"DoubleStorag"), "data.pkl has checksum"),
    "big-endian": (torch_zip(PICKLE, SIX, byteorder=b"big"), "byteorder is b'big', expected b'little'"),
    "no storage": (torch_zip(PICKLE), "refers to storage data/0, which the file lacks"),
    "short storage": (torch_zip(PICKLE, {"0": bytes(20)}), "storage data/0 has 20 bytes, expected 6 x 4"),
    "long storage": (torch_zip(PICKLE, {"0": bytes(28)}), "storage data/0 has 28 bytes, expected 6 x 4"),
    "other dtype": (
        torch_zip(PICKLE.replace(b"FloatStorage", b"DoubleStorage"), SIX),
        "storage data/0 has 24 bytes, expected 6 x 8",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("data", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_files_are_one_clean_line(tmp_path, data, message):
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as refusal:
        read_torch_tensors(path)
    assert str(refusal.value).startswith(str(path))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["", "absent"])
def test_a_folder_and_an_absent_file(tmp_path, name):
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_torch_file(tmp_path / name)


def test_what_is_read_is_bounded(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(torch_zip(bytes(MAX_PICKLE_BYTES + 1)))
    with pytest.raises(CheckpointError, match=r"data\.pkl has 25165825 bytes, the limit is 25165824"):
        read_torch_file(path)
    size = MAX_DIRECTORY_BYTES + 4
    path.write_bytes(b"PK\x03\x04" + bytes(size - 4) + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, size, 0, 0))
    with pytest.raises(CheckpointError, match="zip directory has 8388612 bytes, the limit is 8388608"):
        read_torch_file(path)


def test_the_pickle_is_not_checked_where_torch_wrote_no_checksum(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": FLAT}, tmp_path / "x.bin")
    finally:
        torch.serialization.set_crc32_options(True)
    assert list(read_torch_tensors(tmp_path / "x.bin")) == ["w"]


def tensor_of(function: bytes, *args: bytes) -> bytes:
    return b"\x80\x02}" + text("w") + b"ctorch._utils\n" + function + b"\n(" + b"".join(args) + b"tRs."


STORAGE = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x06tQ"
SHELL = b"cos\nsystem\n"
PLACE = b"K\x00K\x06\x85K\x01\x85"
REST = b"\x89ccollections\nOrderedDict\n)R"
TRICKS = {
    "a class for a storage": tensor_of(b"_rebuild_tensor_v2", SHELL, PLACE, REST),
    "a call for a storage": tensor_of(b"_rebuild_tensor_v2", SHELL, text("true"), b"\x85R", PLACE, REST),
    "a dict for a storage": tensor_of(b"_rebuild_tensor_v2", b"}", PLACE, REST),
    "a class for an offset": tensor_of(b"_rebuild_tensor_v2", STORAGE, SHELL, b"K\x06\x85K\x01\x85", REST),
    "a bool for a size": tensor_of(b"_rebuild_tensor_v2", STORAGE, b"K\x00\x88\x85K\x01\x85", REST),
    "more strides than sizes": tensor_of(b"_rebuild_tensor_v2", STORAGE, b"K\x00K\x06\x85K\x01K\x01\x86", REST),
    "too few arguments": tensor_of(b"_rebuild_tensor_v2", STORAGE),
    "a class for a dtype": tensor_of(b"_rebuild_tensor_v3", STORAGE, PLACE, REST, SHELL),
    "a class for a parameter": tensor_of(b"_rebuild_parameter", SHELL, b"\x88", b"}"),
    "a class for a tensor": tensor_of(b"_rebuild_parameter", b")", b"\x88", b"}"),
    "no such storage": tensor_of(b"_rebuild_tensor_v2", STORAGE.replace(text("0"), text("9")), PLACE, REST),
    "a path for a storage": tensor_of(
        b"_rebuild_tensor_v2", STORAGE.replace(text("0"), text("../../etc/passwd")), PLACE, REST
    ),
    "a module for a persistent id": b"\x80\x02" + text("module") + SHELL + b"\x86Q.",
    "a string for a persistent id": b"\x80\x02" + text("storage") + b"Q.",
    "sizes of a class": b"\x80\x02ctorch\nSize\n" + SHELL + b"\x85R.",
    "rebuild within rebuild": (
        b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\nq\x00)" + b"q\x010h\x00h\x00h\x01N\x87R" * 200 + b"."
    ),
    "state of a tensor": tensor_of(b"_rebuild_tensor_v2", STORAGE, PLACE, REST)[:-2] + b"}" + text("x") + b"Nsbs.",
}


@pytest.mark.parametrize("pickled", TRICKS.values(), ids=TRICKS)
def test_tricks_with_torchs_own_functions_are_refused(tmp_path, pickled):
    path = tmp_path / "x.bin"
    path.write_bytes(torch_zip(pickled, SIX))
    with pytest.raises(CheckpointError, match=r"data\.pkl is damaged or hostile"):
        read_torch_file(path)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (b"K\x01K\x06\x85K\x01\x85", r"\(6,\) with strides \(1,\) and offset 1 reaches 4 bytes past its storage"),
        (b"K\x00K\x06\x85K\x02\x85", "reaches 20 bytes past its storage, FloatStorage data/0 of 24 bytes"),
        (b"K\x07K\x00\x85K\x01\x85", r"\(0,\) .* offset 7 reaches"),
        (b"J\xff\xff\xff\xffK\x01\x85K\x01\x85", "no valid offset, sizes and strides"),
        (b"K\x00K\x02\x85J\xff\xff\xff\xff\x85", "no valid offset, sizes and strides"),
        (b"K\x00\x8a\x08" + (2**62).to_bytes(8, "little") + b"\x85K\x00\x85", r"has 2\^63 bytes or more"),
        (b"K\x00(" + b"K\x01" * 65 + b"t(" + b"K\x01" * 65 + b"t", "no valid offset, sizes and strides"),
    ],
    ids=["offset", "stride", "offset_of_nothing", "negative_offset", "negative_stride", "repeated", "65_dimensions"],
)
def test_tensors_outside_their_storage_are_refused(tmp_path, place, message):
    path = tmp_path / "x.bin"
    path.write_bytes(torch_zip(tensor_of(b"_rebuild_tensor_v2", STORAGE, place, REST), SIX))
    with pytest.raises(CheckpointError, match=message):
        read_torch_file(path)


@pytest.mark.parametrize("suffix", ["bin", "pt"])
@pytest.mark.parametrize("name", hostile_pickles(Path("canary")))
def test_hostile_files_do_nothing(tmp_path, name, suffix):
    canary = tmp_path / "canary"
    undo_harm(canary)
    path = tmp_path / f"weights.{suffix}"
    path.write_bytes(torch_zip(hostile_pickles(canary)[name], SIX, byteorder=b"little", version=b"3\n"))
    "".encode("cp437")  # what zipfile decodes names with, loaded by whoever is first
    modules = set(sys.modules)
    with suppress(CheckpointError):
        repr(read_torch_file(path))
    with pytest.raises(CheckpointError):
        read_torch_tensors(path)
    assert not harm_done(canary)
    assert set(sys.modules) == modules


@pytest.mark.filterwarnings("error")
@settings(max_examples=500, deadline=1000)
@given(st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 4), st.binary(max_size=4)), min_size=1, max_size=3))
def test_mutations_are_read_or_refused(tmp_path_factory, splices):
    data = saved({"w": FLAT, "p": torch.nn.Parameter(FLAT[3:9])})
    interesting = [*range(900), *range(data.index(b"PK\x01\x02"), len(data))]  # the pickle and the directory
    for number, dropped, inserted in splices:
        start = interesting[number % len(interesting)]
        data = data[:start] + inserted + data[start + dropped :]
    path = tmp_path_factory.getbasetemp() / "mutated.bin"
    path.write_bytes(data)
    with suppress(CheckpointError):
        for view in read_torch_tensors(path).values():
            assert 0 <= view.span[0] <= view.span[1] <= len(data)

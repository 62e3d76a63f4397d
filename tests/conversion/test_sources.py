# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Opening Hub folders: transformers' order, and every way an index and its shards can disagree."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.reader import FileReader
from conversion.checkpoint.sources import WEIGHT_FILES, open_checkpoint, source_identity
from tests.fixtures.yardstick import TWO_SECONDS, counted

SHARDS = {
    "model-00001-of-00002.safetensors": {"a": torch.ones(2), "b": torch.zeros(3)},
    "model-00002-of-00002.safetensors": {"c": torch.arange(4)},
}
INDEX = "model.safetensors.index.json"
WEIGHT_MAP = {tensor: name for name, tensors in SHARDS.items() for tensor in tensors}


@pytest.fixture
def folder(tmp_path):
    """A sound checkpoint in two shards."""
    for name, tensors in SHARDS.items():
        save_file(tensors, tmp_path / name)
    write_index(tmp_path, WEIGHT_MAP)
    (tmp_path / "config.json").write_text('{"model_type": "teleflm"}')
    return tmp_path


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 52}, "weight_map": weight_map}))


def tiny_llama() -> LlamaForCausalLM:
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)).to(torch.bfloat16)


@pytest.mark.parametrize("sharded", [False, True], ids=["one_file", "shards"])
@pytest.mark.parametrize("container", ["safetensors", "torch"])
def test_tensors_of_what_transformers_saves(tmp_path, container, sharded):
    """transformers writes safetensors and reads both; its shards serve for torch.save as well."""
    tiny_llama().save_pretrained(tmp_path, max_shard_size="6KB" if sharded else "1GB")
    if container == "torch":
        to_torch(tmp_path)
    source = open_checkpoint(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").state_dict()
    assert source.format == container
    assert len(source.files) > 2 if sharded else len(source.files) == 1
    assert all(os.path.isabs(file) and os.path.isfile(file) for file in source.files)
    assert {view.file for view in source.tensors.values()} == set(source.files)
    assert source.config == json.loads((tmp_path / "config.json").read_text())
    assert set(source.tensors) == set(expected)
    with FileReader() as reader:
        for name, view in source.tensors.items():
            assert view.dtype.name == "bfloat16"
            assert reader.read(view).tobytes() == expected[name].view(torch.uint8).numpy().tobytes(), name


def to_torch(folder: Path) -> None:
    renamed = {}
    for path in folder.glob("*.safetensors"):
        renamed[path.name] = path.name.replace("model", "pytorch_model").replace(".safetensors", ".bin")
        torch.save(load_file(path), folder / renamed[path.name])
        path.unlink()
    if (folder / INDEX).exists():
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"] = {tensor: renamed[name] for tensor, name in index["weight_map"].items()}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        (folder / INDEX).unlink()


def test_order_of_files_and_tensors(folder):
    source = open_checkpoint(folder)
    assert [Path(file).name for file in source.files] == list(SHARDS)
    assert list(source.tensors) == list(WEIGHT_MAP)
    assert source.metadata == {"total_size": 52}
    assert source.folder == str(folder)


def test_order_of_containers(tmp_path):
    """Each name of transformers' list hides those after it."""
    for name in reversed(WEIGHT_FILES):
        file = tmp_path / name
        if name.endswith(".json"):
            shard = name.replace(".index.json", "").replace(".", "-00001-of-00001.")
            file.write_text(json.dumps({"weight_map": {name: shard}}))
            file = tmp_path / shard
        save = save_file if file.suffix == ".safetensors" else torch.save
        save({name: torch.ones(1)}, file)
        assert list(open_checkpoint(tmp_path).tensors) == [name]


@pytest.mark.parametrize(
    ("name", "tensors"), [(INDEX, "abc"), *((name, "".join(tensors)) for name, tensors in SHARDS.items())]
)
def test_a_path_to_a_file(folder, name, tensors):
    source = open_checkpoint(folder / name)
    assert "".join(source.tensors) == tensors
    assert source.config == {"model_type": "teleflm"}


def test_weights_of_another_name(folder):
    """A field of config.json that transformers goes by; what is made of the folder must not inherit it."""
    shutil.copy(folder / FIRST, folder / "others.safetensors")
    for named, says in (
        (INDEX, None),
        (None, None),
        ("others.safetensors", "'others.safetensors', which transformers"),
    ):
        (folder / "config.json").write_text(json.dumps({"model_type": "teleflm", "transformers_weights": named}))
        if says:
            with pytest.raises(CheckpointError, match=f"transformers_weights is {says} loads in place of {INDEX}"):
                open_checkpoint(folder)
        else:
            assert open_checkpoint(folder).config == {"model_type": "teleflm"}
    assert list(open_checkpoint(folder / "others.safetensors").tensors) == ["a", "b"]


def test_paths_are_absolute_and_metadata_is_read(folder, monkeypatch):
    save_file({"a": torch.ones(2)}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").unlink()
    monkeypatch.chdir(folder.parent)
    source = open_checkpoint(folder.name)
    assert [str(file) for file in source.files] == [str(folder / "model.safetensors")]
    assert (source.config, source.metadata) == (None, {"format": "pt"})


def append(folder: Path, name: str, tensors: dict[str, torch.Tensor]) -> None:
    save_file(load_file(folder / name) | tensors, folder / name)


FIRST, SECOND = SHARDS
FAULTS = {
    "nothing": (lambda f: [path.unlink() for path in f.iterdir()], "has no weights: expected one of model.safetensors"),
    "shard missing": (
        lambda f: (f / SECOND).unlink(),
        f"names 2 files, 1 of them missing: {SECOND}; download the rest",
    ),
    "shard is a folder": (lambda f: ((f / SECOND).unlink(), (f / SECOND).mkdir()), f"1 of them missing: {SECOND}"),
    "shard of another save": (
        lambda f: shutil.copy(f / FIRST, f / "model-00010-of-00009.safetensors"),
        "names 2 files, the folder has 1 more of their kind: model-00010-of-00009.safetensors; move away",
    ),
    "index names an absent tensor": (
        lambda f: write_index(f, WEIGHT_MAP | {"d": SECOND}),
        f"places tensors in {SECOND} that it does not hold, 1 of them: d; download both",
    ),
    "tensor not in the index": (
        lambda f: append(f, SECOND, {"d": torch.ones(1)}),
        f"{SECOND} holds 'd', .*{INDEX} places it nowhere",
    ),
    "tensor in another shard": (
        lambda f: write_index(f, WEIGHT_MAP | {"b": SECOND}),
        f"{FIRST} holds 'b', .* places it in {SECOND}",
    ),
    "tensor in two shards": (
        lambda f: append(f, SECOND, {"a": torch.ones(2)}),
        rf"'a' is in .*{FIRST} and in .*{SECOND}; keep the one that {INDEX} names \({FIRST}\)",
    ),
    "tensor twice in the index": (
        lambda f: (f / INDEX).write_text('{"weight_map": {"a": "x", "a": "y"}}'),
        f"{INDEX} is not valid JSON: 'a' occurs twice",
    ),
    "name too long": (
        lambda f: write_index(f, WEIGHT_MAP | {"d": "d" * 300 + ".safetensors"}),
        "cannot be read: File name too long",
    ),
    "no weight_map": (lambda f: (f / INDEX).write_text("{}"), "has no weight_map"),
    "empty weight_map": (lambda f: write_index(f, {}), "has no weight_map"),
    "weight_map is a list": (lambda f: write_index(f, ["a"]), "has no weight_map"),
    "index is a list": (lambda f: (f / INDEX).write_text("[]"), f"{INDEX} is a JSON list, expected an object"),
    "index is cut": (lambda f: (f / INDEX).write_text('{"weight_map": {"a"'), f"{INDEX} is not valid JSON"),
    "index is deep": (lambda f: (f / INDEX).write_text("[" * 100_000), "nests deeper than 100 levels"),
    "index is huge": (
        lambda f: os.truncate(f / INDEX, 100_000_001),
        f"{INDEX}: its JSON has 100000001 bytes, the limit is 33554432",
    ),
    "index is binary": (lambda f: (f / INDEX).write_bytes(b"\xff\xfe{}"), f"{INDEX} is not valid JSON"),
    "file of two containers": (
        lambda f: (torch.save({"d": torch.ones(1)}, f / "d.bin"), write_index(f, WEIGHT_MAP | {"d": "d.bin"})),
        "names safetensors files and others",
    ),
    "config is cut": (lambda f: (f / "config.json").write_text("{"), "config.json is not valid JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json is a JSON list"),
    "config is a folder": (
        lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()),
        "config.json cannot be read: Is a directory",
    ),
    "shard is cut": (lambda f: os.truncate(f / FIRST, 100), f"{FIRST} announces a header|{FIRST} is truncated"),
    "shard is a pointer": (
        lambda f: (f / FIRST).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        f"{FIRST} is a Git LFS pointer, expected weights; run `git lfs pull`",
    ),
}


@pytest.mark.parametrize(("fault", "message"), FAULTS.values(), ids=FAULTS)
def test_faults_are_one_clean_line(folder, fault, message):
    assert open_checkpoint(folder)
    fault(folder)
    with pytest.raises(CheckpointError, match=message) as refusal:
        open_checkpoint(folder)
    assert str(folder) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/x.safetensors", "sub/x.safetensors", r"..\x", "..", "", 5, None]
)
def test_an_index_that_leads_elsewhere(folder, name):
    save_file({"d": torch.ones(1)}, folder.parent / "x.safetensors")
    write_index(folder, WEIGHT_MAP | {"d": name})
    with pytest.raises(CheckpointError, match=r"places 'd' in .*, expected the name of a file in the same folder"):
        open_checkpoint(folder)


def test_no_such_path(tmp_path):
    with pytest.raises(CheckpointError, match="absent: no such file or folder"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"absent cannot be read: No such file"):
        source_identity(tmp_path / "absent")


def write_safetensors(path: Path, value: float, name: str) -> None:
    save_file({name: torch.full((1000,), value)}, path)


def write_torch(path: Path, value: float, name: str) -> None:
    torch.save({name: torch.full((1000,), value)}, path)


def write_zips(path: Path, value: float, name: str) -> None:
    """As a .distcp file: no header of its own."""
    write_torch(path, value, name)
    path.write_bytes(path.read_bytes() * 2 + b"rest")


@pytest.mark.parametrize(
    ("file_name", "write"),
    [("x.safetensors", write_safetensors), ("x.bin", write_torch), ("__0_0.distcp", write_zips)],
)
def test_identity_changes_with_size_time_header_and_samples(tmp_path, file_name, write):
    path = tmp_path / file_name

    def identity(value: float = 1.0, name: str = "a", mtime_ns: int = 10**18) -> str:
        write(path, value, name)
        os.utime(path, ns=(mtime_ns, mtime_ns))
        return source_identity(path)

    assert identity() == identity()
    assert identity(name="b") != identity()
    assert identity(mtime_ns=10**18 + 1) != identity()
    assert identity(name="a" * 1000) != identity()
    assert identity(value=2.0) != identity(), "as another step of a run has it"


def test_opening_needs_no_torch(folder):
    torch.save({"w": torch.ones(1)}, folder / "x.bin")
    code = (
        "import sys; from conversion.checkpoint.sources import open_checkpoint; "
        f"open_checkpoint({str(folder)!r}); open_checkpoint({str(folder / 'x.bin')!r}); "
        "assert not {'torch', 'transformers', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_an_index_of_75_shards_opens_in_no_time(tmp_path):
    names = [f"model-{i:05}-of-00075.safetensors" for i in range(1, 76)]
    for i, name in enumerate(names):
        save_file({f"{i}.{j}": torch.ones(1) for j in range(20)}, tmp_path / name)
    write_index(tmp_path, {f"{i}.{j}": name for i, name in enumerate(names) for j in range(20)})
    with counted() as taken:
        assert len(open_checkpoint(tmp_path).tensors) == 1500
    assert taken.yardsticks < TWO_SECONDS

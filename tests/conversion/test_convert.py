# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""`teleflm convert`: published checkpoints become safetensors that load alike; faulty ones become one line."""

import getpass
import json
import os
import re
import socket
import struct
import subprocess
import sys
import time
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from conversion import WriteOptions, convert_checkpoint
from conversion.architecture import Architecture, load_preset
from conversion.checkpoint.containers import safetensors_shards
from conversion.checkpoint.dtypes import BFLOAT16
from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.manifest import MANIFEST
from conversion.checkpoint.plan import TensorPlan
from conversion.mapping import weights
from tests.fixtures.checkpoint_runs import (
    contents,
    cut_the_source_after_planning,
    interrupt_itself,
    interrupt_itself_in_the_background,
    run_teleflm,
)
from tests.fixtures.hostile_pickles import harm_done, hostile_pickles, undo_harm
from tests.fixtures.tiny import tiny_config, tiny_model, tiny_sentencepiece
from tests.fixtures.yardstick import TWO_SECONDS

ROOT = Path(__file__).parents[2]
TOKENS = torch.tensor([[1, 17, 30, 5, 2, 59, 42, 7]])


def save_bin(state: dict[str, torch.Tensor], folder: Path, shards: int) -> None:
    """As transformers wrote it until 2023: torch.save files and an index."""
    names = list(state)
    groups = [names[i * len(names) // shards : (i + 1) * len(names) // shards] for i in range(shards)]
    files = [f"pytorch_model-{i:05d}-of-{shards:05d}.bin" for i in range(1, shards + 1)]
    for file, group in zip(files, groups, strict=True):
        torch.save({name: state[name] for name in group}, folder / file)
    weight_map = {name: file for file, group in zip(files, groups, strict=True) for name in group}
    total = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def published_config(model) -> dict:
    """config.json as transformers 4.40 spelled it."""
    fields = model.config.to_dict()
    fields |= {"rope_theta": 10000.0, "rope_scaling": None, "transformers_version": "4.40.0"}
    fields |= {"torch_dtype": str(model.dtype).removeprefix("torch.")}
    for name in ("rope_parameters", "dtype"):
        fields.pop(name, None)
    return fields


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A Tele-FLM as it was published: nine .bin shards of bfloat16, with a tokenizer."""
    folder = tmp_path_factory.mktemp("published")
    model = tiny_model(dtype=torch.bfloat16)
    save_bin(model.state_dict(), folder, 9)
    (folder / "config.json").write_text(json.dumps(published_config(model)))
    (folder / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2}')
    (folder / "tokenizer.model").write_bytes(tiny_sentencepiece())
    return folder


def load_bin(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for path in folder.glob("*.bin") for name, tensor in torch.load(path, weights_only=True).items()
    }


def load_safetensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_equal_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def logits(folder: Path, dtype: torch.dtype | str = "auto") -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()(TOKENS).logits


@pytest.mark.parametrize("more", [[], ["--max-shard-size", "100KB"], ["--no-digest", "--workers", "1"]], ids=" ".join)
def test_a_published_checkpoint(more, published, tmp_path):
    out = tmp_path / "out"
    result = run_teleflm("convert", published, out, *more, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Wrote" in result.stdout
    assert_equal_tensors(load_safetensors(out), load_bin(published))
    assert torch.equal(logits(out), logits(published))
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert not {"torch_dtype", "rope_theta", "rope_scaling", "transformers_version"} & config.keys()
    code = {path.name for path in (ROOT / "modeling_teleflm").glob("*_teleflm.py")}
    assert {"configuration_teleflm.py", "modeling_teleflm.py"} <= code & contents(out).keys()
    for name in ("tokenizer.model", "generation_config.json"):
        assert (out / name).read_bytes() == (published / name).read_bytes()
    again = run_teleflm("convert", published, out, *more, folder=tmp_path)
    assert again.returncode == 0
    assert "already done" in again.stdout


def test_what_is_published_names_no_one(published, tmp_path):
    out = tmp_path / "out"
    convert_checkpoint(published, out)
    private = [os.getcwd(), str(tmp_path), str(published), str(Path.home()), published.name, socket.gethostname()]
    for name, content in contents(out).items():
        if not name.endswith(".py"):
            assert not [text for text in private if text.encode() in content], name
    words = set(re.findall(r"\w+", (out / MANIFEST).read_text()))
    assert getpass.getuser() not in words


def stock_llama() -> LlamaForCausalLM:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))


def stock_gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("make", [stock_llama, stock_gpt2])
def test_any_other_model(make, shards, tmp_path):
    """GPT-2's head and embeddings are one storage, which its file holds once."""
    torch.manual_seed(0)
    model = make().eval()
    source, out = tmp_path / "source", tmp_path / "out"
    model.config.save_pretrained(source)
    (source / "vocab.txt").write_text("kept")
    (source / "training_args.bin").write_bytes(b"left")
    if shards == 1:
        torch.save(model.state_dict(), source / "pytorch_model.bin")
    else:
        save_bin(model.state_dict(), source, shards)
    result = run_teleflm("convert", source, out, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"A {model.config.model_type} model, not a Tele-FLM" in result.stdout
    assert_equal_tensors(load_safetensors(out), dict(model.state_dict()))
    assert torch.equal(logits(out), logits(source))
    with torch.no_grad():
        assert torch.equal(logits(out), model(TOKENS).logits)
    assert {"vocab.txt": b"kept"}.items() <= contents(out).items()
    assert "training_args.bin" not in contents(out)


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("float32", torch.float32), ("float16", torch.float16)])
def test_casts(dtype, torch_dtype, published, tmp_path):
    convert_checkpoint(published, tmp_path / "out", dtype=dtype)
    expected = {name: tensor.to(torch_dtype) for name, tensor in load_bin(published).items()}
    assert_equal_tensors(load_safetensors(tmp_path / "out"), expected)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == dtype
    assert torch.equal(logits(tmp_path / "out"), logits(published, dtype=torch_dtype))


def test_a_cast_leaves_integers_alone(tmp_path):
    save_bin({"w": torch.randn(3, 4, dtype=torch.float64), "ids": torch.arange(9)}, tmp_path, 1)
    convert_checkpoint(tmp_path, tmp_path / "out", dtype="bfloat16")
    found = load_safetensors(tmp_path / "out")
    assert torch.equal(found["ids"], torch.arange(9))
    assert torch.equal(found["w"], load_bin(tmp_path)["w"].to(torch.bfloat16))


def test_a_tied_model_with_old_buffers(tmp_path):
    """The head is the embedding's storage again, and inv_freq is what every runtime computes: neither is written."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    model = tiny_model(tiny_config(tie_word_embeddings=True))
    state = dict(model.state_dict())
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(3)}
    torch.save({**state, **buffers}, source / "pytorch_model.bin")
    (source / "config.json").write_text(json.dumps(published_config(model)))
    result = convert_checkpoint(source, out)
    assert result.notes[0] == "4 tensors that every runtime computes itself were left out."
    del state["lm_head.weight"]
    assert_equal_tensors(load_safetensors(out), state)
    with torch.no_grad():
        assert torch.equal(logits(out), model(TOKENS).logits)


def test_views_of_one_buffer(tmp_path):
    """Slices, transposes and repeats of one storage come out as the tensors they are."""
    flat = torch.arange(60, dtype=torch.float32)
    state = {
        "slice": flat[7:31].view(4, 6),
        "transposed": flat.view(6, 10).T,
        "step": flat[::7],
        "repeated": flat[3:6].expand(5, 3),
        "scalar": flat[9],
        "empty": flat[:0],
    }
    save_bin(state, tmp_path, 1)
    convert_checkpoint(tmp_path, tmp_path / "out")
    assert_equal_tensors(load_safetensors(tmp_path / "out"), {name: t.contiguous() for name, t in state.items()})


def test_no_tensors_is_an_error(tmp_path):
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds no tensors"):
        convert_checkpoint(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Sources with a fault. The command says so in one line and has written nothing.


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = "model.safetensors.index.json"


@pytest.fixture
def sound(tmp_path) -> Path:
    """Two shards of two tensors."""
    folder = tmp_path / "source"
    folder.mkdir()
    for i, name in enumerate(SHARDS):
        save_file({f"a{i}": torch.randn(300), f"b{i}": torch.randn(40, 5)}, folder / name, {"format": "pt"})
    weight_map = {f"{letter}{i}": name for i, name in enumerate(SHARDS) for letter in "ab"}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 4000}, "weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "other"}')
    return folder


def edit_header(folder: Path, **changes) -> None:
    """Change the description of a tensor of the second shard."""
    path = folder / SHARDS[1]
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    header["b1"] |= changes
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def announce(folder: Path, size: int) -> None:
    """Change the length of the header."""
    with (folder / SHARDS[1]).open("r+b") as file:
        file.write(struct.pack("<Q", size))


def edit_index(folder: Path, **changes: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= changes
    (folder / INDEX).write_text(json.dumps(index))


def with_bin(content: bytes):
    """Replace the weights by one .bin file."""

    def plant(folder: Path) -> None:
        for name in (*SHARDS, INDEX):
            (folder / name).unlink()
        (folder / "pytorch_model.bin").write_bytes(content)

    return plant


def torch_zip(pickled: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
    return buffer.getvalue()


def saved(value: object, **options) -> bytes:
    buffer = BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


FAULTS = {
    "truncated": (lambda f: os.truncate(f / SHARDS[1], 1500), rf"{SHARDS[1]} is truncated: 1500 bytes"),
    "empty": (lambda f: os.truncate(f / SHARDS[1], 0), rf"{SHARDS[1]} has 0 bytes"),
    "missing shard": (lambda f: (f / SHARDS[1]).unlink(), rf"{INDEX} names 2 files, 1 of them missing: {SHARDS[1]}"),
    "extra shard": (
        lambda f: (f / "model-00003-of-00003.safetensors").write_bytes((f / SHARDS[0]).read_bytes()),
        r"the folder has 1 more of their kind: model-00003-of-00003\.safetensors",
    ),
    "index names an absent tensor": (lambda f: edit_index(f, c=SHARDS[0]), rf"places tensors in {SHARDS[0]} .*: c;"),
    "index leads outside": (lambda f: edit_index(f, b0="../secret.safetensors"), r"places 'b0' in '\.\./secret"),
    "index is no JSON": (lambda f: (f / INDEX).write_text("{"), rf"{INDEX} is not valid JSON"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json is not valid JSON"),
    "offsets lie": (lambda f: edit_header(f, data_offsets=[0, 100]), r"'b1': data_offsets \[0, 100\] span 100 bytes"),
    "offsets beyond the file": (lambda f: edit_header(f, shape=[400, 5], data_offsets=[0, 8000]), SHARDS[1]),
    "overlap": (
        lambda f: edit_header(f, data_offsets=[4, 804]),
        "starts at byte|inside the tensor|belong to no tensor",
    ),
    "header longer than the file": (lambda f: announce(f, 5000), "announces a header of 5000 bytes but has"),
    "header of 10 GB": (lambda f: announce(f, 10**10), "announces a header of 10000000000 bytes, the limit is"),
    "header of 16 EiB": (lambda f: announce(f, 2**64 - 1), "announces a header of 18446744073709551615 bytes"),
    "Git LFS pointer": (
        lambda f: (f / SHARDS[0]).write_text("version https://git-lfs.github.com/spec/v1\n"),
        "is a Git LFS pointer",
    ),
    "truncated .bin": (with_bin(saved({"w": torch.ones(1000)})[:-700]), r"pytorch_model\.bin is truncated, damaged"),
    "zip bomb": (with_bin(torch_zip(bytes(1 << 28), zipfile.ZIP_DEFLATED)), r"pytorch_model\.bin"),
    "file of before torch 1.6": (
        with_bin(saved({"w": torch.ones(3)}, _use_new_zipfile_serialization=False)),
        r"pytorch_model\.bin",
    ),
    "a whole training state": (with_bin(saved({"model": {"w": torch.ones(3)}, "step": 3})), "not a flat state dict"),
}


def assert_refused(result: subprocess.CompletedProcess[str], message: str, out: Path) -> None:
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("teleflm: ")
    assert re.search(message, line), line
    assert result.stdout == ""
    assert not out.exists()


@pytest.mark.parametrize(("plant", "message"), FAULTS.values(), ids=FAULTS)
def test_a_faulty_source(plant, message, sound, tmp_path):
    assert run_teleflm("convert", sound, tmp_path / "sound", folder=tmp_path).returncode == 0
    plant(sound)
    started = time.monotonic()
    result = run_teleflm("convert", sound, tmp_path / "out", folder=tmp_path)
    assert_refused(result, message, tmp_path / "out")
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("name", hostile_pickles(Path("canary")))
def test_a_hostile_source(name, sound, tmp_path):
    canary = tmp_path / "canary"
    undo_harm(canary)
    with_bin(torch_zip(hostile_pickles(canary)[name]))(sound)
    assert_refused(
        run_teleflm("convert", sound, tmp_path / "out", folder=tmp_path), "pytorch_model.bin", tmp_path / "out"
    )
    assert not harm_done(canary)


@pytest.mark.parametrize("more", [[], ["--no-digest"], ["--max-shard-size", "2KB"]], ids=" ".join)
def test_a_source_cut_short_meanwhile(more, sound, tmp_path):
    """What was fine when it was planned is a failure of the work, not of the request."""
    command = ("convert", sound, tmp_path / "out", *more)
    result = run_teleflm(*command, folder=tmp_path, patch=cut_the_source_after_planning)
    assert result.returncode == 1
    assert re.search(rf"teleflm: .*/{SHARDS[1]}: had \d+ bytes of .*, has 1500 of", result.stderr.splitlines()[-1])
    assert "Traceback" not in result.stderr
    assert not [n for n in contents(tmp_path / "out") if n.endswith((".safetensors", ".json")) and ".teleflm" not in n]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", "{out}"), "nowhere: no such file or folder"),
        (("{source}", "{source}"), "is the source too"),
        (("{source}", "{out}", "--format", "zarr"), "format is 'zarr', expected one of auto, hf"),
        (("{source}", "{out}", "--dtype", "int4"), "dtype 'int4' is not one of bfloat16"),
        (("{source}", "{out}", "--max-shard-size", "5 apples"), "size '5 apples' is not a positive number of bytes"),
    ],
)
def test_bad_usage(arguments, message, sound, tmp_path):
    places = {"source": sound, "out": tmp_path / "out"}
    result = run_teleflm("convert", *(a.format(**places) for a in arguments), folder=tmp_path)
    assert_refused(result, re.escape(message), tmp_path / "out")


def test_interrupted_by_hand(sound, tmp_path):
    command = ("convert", sound, tmp_path / "out", "--workers", "1")
    result = run_teleflm(*command, folder=tmp_path, patch=interrupt_itself)
    assert result.returncode == 130
    assert result.stderr.splitlines()[-1] == "teleflm: interrupted; run the same command again."
    assert not (tmp_path / "out/model.safetensors").exists()
    assert run_teleflm(*command, folder=tmp_path).returncode == 0
    assert_equal_tensors(load_safetensors(tmp_path / "out"), load_safetensors(sound))


def test_a_job_in_the_background_is_not_interrupted(sound, tmp_path):
    command = ("convert", sound, tmp_path / "out", "--workers", "1")
    assert run_teleflm(*command, folder=tmp_path, patch=interrupt_itself_in_the_background).returncode == 0
    assert_equal_tensors(load_safetensors(tmp_path / "out"), load_safetensors(sound))


# The 1T, from its headers.


@pytest.fixture(scope="module", params=["bin", "safetensors"])
def source_1t(request, tmp_path_factory) -> Path:
    """The published 1T's 75 shards as files of holes; torch itself writes those of the .bin."""
    folder = tmp_path_factory.mktemp("1t")
    config = load_preset("tele-flm-1t")
    architecture = Architecture.from_config(config)
    plans = [TensorPlan(name, weight.shape(architecture), BFLOAT16, ()) for name, weight, _ in weights(architecture)]
    weight_map = {}
    hole = folder / "hole"
    hole.touch()
    os.truncate(hole, max(plan.nbytes for plan in plans))
    for i in range(75):
        group = plans[i * len(plans) // 75 : (i + 1) * len(plans) // 75]
        if request.param == "bin":
            file = folder / f"pytorch_model-{i + 1:05d}-of-00075.bin"
            with torch.serialization.skip_data():
                torch.save({plan.name: tensor_of_holes(hole, plan) for plan in group}, file)
        else:
            file = folder / f"model-{i + 1:05d}-of-00075.safetensors"
            (shard,) = safetensors_shards(group, 10**15)
            file.write_bytes(shard.header)
            os.truncate(file, shard.nbytes)
        weight_map |= {plan.name: file.name for plan in group}
    hole.unlink()
    index = "pytorch_model.bin.index.json" if request.param == "bin" else INDEX
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 2 * 10**12}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def tensor_of_holes(hole: Path, plan: TensorPlan) -> torch.Tensor:
    return torch.from_file(str(hole), shared=True, size=plan.numel, dtype=torch.bfloat16).view(plan.shape)


def test_a_dry_run_of_the_1t(source_1t, tmp_path):
    """Within two seconds of a processor; without torch; writing nothing."""
    script = f"""if True:
        import sys
        from tests.fixtures.yardstick import counted
        sys.argv = ["teleflm", "convert", {str(source_1t)!r}, {str(tmp_path / "out")!r}, "--dry-run", "--json"]
        with counted() as taken:
            try:
                import teleflm.app
                teleflm.app.main()
            except SystemExit as stop:
                assert stop.code == 0, stop.code
        assert not {{"torch", "transformers"}} & set(sys.modules)
        peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
        print(taken.yardsticks, peak, file=sys.stderr)
    """
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    assert plan["bytes"] == 2 * 1_083_813_908_480
    assert len(plan["tensors"]) == 140 * 9 + 3
    assert {tuple(tensor["pieces"]) for tensor in plan["tensors"]} == {("copy",)}
    yardsticks, kilobytes = map(float, result.stderr.split())
    assert yardsticks < TWO_SECONDS
    assert kilobytes < 200_000
    assert not (tmp_path / "out").exists()


def test_options_of_the_function_are_those_of_the_command(sound, tmp_path):
    convert_checkpoint(sound, tmp_path / "a", options=WriteOptions("2KB", workers=2))
    assert run_teleflm("convert", sound, tmp_path / "b", "--max-shard-size", "2KB", folder=tmp_path).returncode == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize(
    ("name", "value"),
    {
        "config": "tele-flm-52b",
        "tokenizer": "nowhere",
        "vocab_size": 600,
        "iteration": 1,
        "multipliers": "none",
        "mapping": "nowhere",
        "fp32_master": True,
        "allow_unequal_replicas": True,
    }.items(),
)
def test_options_of_runs_are_refused_where_they_would_do_nothing(name, value, tmp_path):
    tiny_model().save_pretrained(tmp_path / "hub")
    with pytest.raises(CheckpointError, match=f"--{name.replace('_', '-')} is for checkpoints of training runs"):
        convert_checkpoint(tmp_path / "hub", tmp_path / "out", **{name: value})

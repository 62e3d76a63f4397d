# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Exports against stock transformers: the same logits from other classes. Megatron's has a test of its own."""

import errno
import json
import os
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GraniteForCausalLM, LlamaForCausalLM

from conversion import WriteOptions, convert_checkpoint, inspect_checkpoint
from conversion.checkpoint.errors import CheckpointError, CorruptData
from conversion.exports.export import export_checkpoint
from growth.grow import grow_checkpoint
from modeling_teleflm import TeleFLMForCausalLM
from tests.fixtures.checkpoint_runs import contents, run_teleflm
from tests.fixtures.tiny import tiny_config, tiny_model, tiny_tokenizer

IDS = torch.arange(3, 67).view(2, 32)
MODELS = {
    "multipliers": {},
    "powers of two": {"input_mult": 4.0, "output_mult": 0.5, "mup_scale_factor": 16.0},
    "no multipliers": {"use_mup": False},
    "tied": {"tie_word_embeddings": True},
    "tied, one factor": {"tie_word_embeddings": True, "input_mult": 0.25, "output_mult": 0.25, "mup_scale_factor": 1.0},
    "grouped queries": {"num_key_value_heads": 2},
    "wide heads": {"head_dim": 16},
    "biases": {"attention_bias": True},
    "rope": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}},
}
CLASSES = {"granite": GraniteForCausalLM, "llama": LlamaForCausalLM}


def save(folder: Path, dtype: torch.dtype = torch.float32, **fields) -> TeleFLMForCausalLM:
    """Write a model whose biases count."""
    model = tiny_model(tiny_config(**fields), dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("to", CLASSES)
def test_stock_transformers_computes_the_same(to, fields, tmp_path):
    """Bit for bit where multipliers are powers of two; else they are rounded once, at another place."""
    with torch.no_grad():
        expected = save(tmp_path / "source", **fields)(IDS).logits
    export_checkpoint(tmp_path / "source", tmp_path / "out", to=to)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model) is CLASSES[to]
    with torch.no_grad():
        difference = (model(IDS).logits - expected).abs().max().item()
    assert expected.std() > 0.01
    assert difference == 0 if "use_mup" in fields or fields.get("input_mult") else difference < 1e-6
    assert inspect_checkpoint(tmp_path / "out", check=True).damages == []


def test_the_configuration_says_nothing_of_ours(tmp_path):
    save(tmp_path / "source")
    for to in CLASSES:
        export_checkpoint(tmp_path / "source", tmp_path / to, to=to)
    granite, llama = (json.loads((tmp_path / to / "config.json").read_text()) for to in CLASSES)
    for config in (granite, llama):
        assert not config.keys() & {"auto_map", "use_mup", "input_mult", "output_mult", "mup_scale_factor"}
        assert (config["dtype"], config["rms_norm_eps"], config["vocab_size"]) == ("float32", 1e-5, 640)
    multipliers = ("embedding_multiplier", "logits_scaling", "attention_multiplier", "residual_multiplier")
    assert [granite[name] for name in multipliers] == [2.5, 8.0, 8**-0.5, 1.0]
    assert not any(name in llama for name in multipliers)


@pytest.mark.parametrize("to", CLASSES)
@pytest.mark.parametrize("kind", ["default", "linear"])
def test_the_rotary_embedding_has_both_spellings(kind, to, tmp_path):
    """Transformers takes the older one where there are both, and MLX knows no other."""
    rope = {"rope_type": kind, "rope_theta": 5e5, **({"factor": 4.0} if kind == "linear" else {})}
    with torch.no_grad():
        expected = save(tmp_path / "source", rope_parameters=rope)(IDS).logits
    export_checkpoint(tmp_path / "source", tmp_path / "out", to=to)
    path = tmp_path / "out/config.json"
    config = json.loads(path.read_text())
    assert (config["rope_theta"], config["mlp_bias"], config["attention_bias"]) == (5e5, False, False)
    for left_out in ((), ("rope_parameters",), ("rope_theta", "rope_scaling")):  # each spelling alone says it all
        path.write_text(json.dumps({name: value for name, value in config.items() if name not in left_out}))
        assert (logits(tmp_path / "out") - expected).abs().max() < 1e-6
    without = {name: config[name] for name in config if not name.startswith("rope_")}
    path.write_text(json.dumps(without))
    assert (logits(tmp_path / "out") - expected).abs().max() > 1e-3


def test_the_tokenizer_goes_along(tmp_path):
    save(tmp_path / "source")
    tokenizer = tiny_tokenizer(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    export_checkpoint(tmp_path / "source", tmp_path / "out", to="llama")
    copy = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    text = "Grüße, 世界"
    assert copy(text).input_ids == tokenizer(text).input_ids
    assert not list((tmp_path / "out").glob("modeling*.py"))
    export_checkpoint(tmp_path / "source", tmp_path / "megatron", to="megatron")
    assert (tmp_path / "megatron/tokenizer.model").read_bytes() == (tmp_path / "source/tokenizer.model").read_bytes()


# Folding: how exact, and what becomes of ties.


@pytest.mark.parametrize(
    ("dtype", "unit"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11), (torch.float32, 2.0**-24)], ids=str
)
def test_rounding_is_reported_and_kept_to(dtype, unit, tmp_path):
    save(tmp_path / "source", dtype, input_mult=2.7, output_mult=0.5, mup_scale_factor=16.0)
    result = export_checkpoint(tmp_path / "source", tmp_path / "out", to="llama")
    name, smallest = str(dtype).removeprefix("torch."), torch.finfo(dtype).smallest_normal
    assert result.notes == [
        f"model.embed_tokens.weight was multiplied by 2.7: rounded to {name}, by at most {unit:.3g} of each product of "
        f"at least {smallest:.3g}.",
        "lm_head.weight was multiplied by 0.03125: a power of two, so exact where the product is 0 or at least "
        f"{smallest:.3g}.",
    ]
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("source", "out"))
    product = before.pop("model.embed_tokens.weight").double() * 2.7
    error = (after.pop("model.embed_tokens.weight").double() - product).abs() / product.abs()
    assert unit / 4 < error[product.abs() >= smallest].max() <= unit * 1.001
    exact = after.pop("lm_head.weight").double() == before.pop("lm_head.weight").double() / 32
    assert exact.float().mean() > (0.999 if dtype != torch.float16 else 0.9)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("to", ["llama", "megatron"])
def test_a_head_is_untied_where_the_factors_differ(to, tmp_path):
    save(tmp_path / "source", **MODELS["tied"])
    save(tmp_path / "even", **MODELS["tied, one factor"])
    untied = export_checkpoint(tmp_path / "source", tmp_path / "untied", to=to)
    tied = export_checkpoint(tmp_path / "even", tmp_path / "tied", to=to)
    assert "lm_head.weight is no longer tied to the embedding: their factors differ." in untied.notes
    assert not [note for note in tied.notes if "lm_head" in note]
    for folder, expected in (("untied", False), ("tied", True)):
        assert json.loads((tmp_path / folder / "config.json").read_text())["tie_word_embeddings"] is expected


def test_a_product_too_large_for_float16_is_no_output(tmp_path):
    save(tmp_path / "source", torch.float16, input_mult=1e6)
    with pytest.raises(CorruptData, match=r"embed_tokens.weight\[\d+, \d+\] is -?\d+.*, the largest float16 is 65504"):
        export_checkpoint(tmp_path / "source", tmp_path / "out", to="llama", options=WriteOptions(workers=1))
    assert not (tmp_path / "out/model.safetensors").exists()


@pytest.mark.parametrize("to", CLASSES)
def test_another_dtype(to, tmp_path):
    model = save(tmp_path / "source", torch.bfloat16, input_mult=2.7)
    export_checkpoint(tmp_path / "source", tmp_path / "out", to=to, dtype="float32")
    with torch.no_grad():
        expected = TeleFLMForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32)(IDS).logits
    assert model.dtype == torch.bfloat16
    assert (logits(tmp_path / "out") - expected).abs().max() < 1e-6


# Links.


@pytest.mark.parametrize("shard_size", ["5GB", "100KB"])
def test_granite_by_links(shard_size, tmp_path):
    tiny_model().save_pretrained(tmp_path / "source", max_shard_size=shard_size)
    before = contents(tmp_path / "source")
    result = export_checkpoint(tmp_path / "source", tmp_path / "out", to="granite", link=True)
    weights = sorted((tmp_path / "source").glob("*.safetensors"))
    assert len(weights) == (1 if shard_size == "5GB" else 4)
    assert all((tmp_path / "out" / file.name).samefile(file) for file in weights)
    assert result.notes == [
        "The weights are links to the source's files, without digests of their own: change neither in place."
    ]
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "source"))
    assert export_checkpoint(tmp_path / "source", tmp_path / "out", to="granite", link=True).written.already_done
    overwrite = WriteOptions(overwrite=True, max_shard_size="1KB")
    export_checkpoint(tmp_path / "source", tmp_path / "out", to="granite", options=overwrite)
    assert not (tmp_path / "out" / weights[0].name).exists()
    assert contents(tmp_path / "source") == before


def test_links_that_are_larger_than_asked_for_are_named(tmp_path):
    save(tmp_path / "source")
    options = WriteOptions(max_shard_size="10KB")
    for _ in range(2):
        result = export_checkpoint(tmp_path / "source", tmp_path / "out", to="granite", link=True, options=options)
        assert result.notes[-1] == (
            "Links keep the source's files as they are, so these are larger than --max-shard-size 10KB: "
            "model.safetensors."
        )


def test_a_shard_size_is_refused_where_ranks_decide(tmp_path):
    save(tmp_path / "source")
    options = WriteOptions(max_shard_size="10KB")
    with pytest.raises(CheckpointError, match="--max-shard-size: --to megatron writes one file a rank"):
        export_checkpoint(tmp_path / "source", tmp_path / "out", to="megatron", options=options)
    assert not (tmp_path / "out").exists()


def test_links_through_a_hub_cache(tmp_path):
    """Where the files are symbolic links already."""
    save(tmp_path / "blobs")
    snapshot = tmp_path / "snapshots/b1946ac92492d2347c6235b4d2611184"
    snapshot.mkdir(parents=True)
    for blob in (tmp_path / "blobs").iterdir():
        (snapshot / blob.name).symlink_to(blob)
    export_checkpoint(snapshot, tmp_path / "out", to="granite", link=True)
    assert not (tmp_path / "out/model.safetensors").is_symlink()
    assert (tmp_path / "out/model.safetensors").samefile(tmp_path / "blobs/model.safetensors")


def test_a_kill_between_links(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path / "source", max_shard_size="100KB")
    before, made, link = contents(tmp_path / "source"), [], os.link

    def link_two(source: str, path: Path) -> None:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(path)
        link(source, path)

    monkeypatch.setattr(os, "link", link_two)
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(tmp_path / "source", tmp_path / "out", to="granite", link=True)
    assert not (tmp_path / "out/model.safetensors.index.json").exists()
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"holds an interrupted run, but settings\.digest was False and is True"):
        export_checkpoint(tmp_path / "source", tmp_path / "out", to="granite")
    export_checkpoint(tmp_path / "source", tmp_path / "out", to="granite", link=True)
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "source"))
    assert contents(tmp_path / "source") == before


@pytest.mark.parametrize("case", ["another dtype", "a .bin file"])
def test_where_no_link_can_be_the_weights_are_copied(case, tmp_path, monkeypatch):
    model = save(tmp_path / "source")
    if case == "a .bin file":
        (tmp_path / "source/model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "source/pytorch_model.bin")
    dtype = "bfloat16" if case == "another dtype" else None
    result = export_checkpoint(tmp_path / "source", tmp_path / "out", to="granite", link=True, dtype=dtype)
    assert result.notes == ["The weights are copied: links need safetensors files of the output's very tensors."]
    assert (tmp_path / "out/model.safetensors").stat().st_nlink == 1
    assert inspect_checkpoint(tmp_path / "out", check=True).damages == []


@pytest.fixture
def another_disk(tmp_path):
    if Path("/dev/shm").stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs two file systems")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
        yield Path(place) / "out"


def refuse_links(monkeypatch, number: int, *calls: str) -> None:
    """As Linux does under protected_hardlinks, for files of others; and file systems that have none."""

    def refuse(source: str, path: Path) -> None:
        raise OSError(number, os.strerror(number), source, None, str(path))

    for call in calls:
        monkeypatch.setattr(os, call, refuse)


def assert_same_model(out: Path, source: Path) -> None:
    assert torch.equal(logits(out), logits(source))
    assert contents(out)["model.safetensors"] == contents(source)["model.safetensors"]


@pytest.mark.parametrize("fault", ["another disk", errno.EPERM, errno.EMLINK, errno.EXDEV])
def test_where_hard_links_are_not_allowed_they_are_symbolic(fault, tmp_path, another_disk, monkeypatch):
    save(tmp_path / "source")
    before = contents(tmp_path / "source")
    out = another_disk if fault == "another disk" else tmp_path / "out"
    if fault != "another disk":
        refuse_links(monkeypatch, fault, "link")
    for already_done in (False, True):
        result = export_checkpoint(tmp_path / "source", out, to="granite", link=True)
        (note,) = result.notes
        assert "symbolic links" in note
        assert "moves" in note
        assert result.written.already_done is already_done
    assert (out / "model.safetensors").is_symlink()
    assert_same_model(out, tmp_path / "source")
    export_checkpoint(tmp_path / "source", out, to="granite", options=WriteOptions(overwrite=True))
    assert not (out / "model.safetensors").is_symlink()
    assert contents(tmp_path / "source") == before


def test_a_hard_link_to_a_file_of_somebody_else(tmp_path):
    """By the kernel itself."""
    if Path("/proc/sys/fs/protected_hardlinks").read_text() != "1\n" or os.geteuid() != 0:
        pytest.skip("needs protected_hardlinks, and root to become somebody else")
    save(tmp_path / "source")
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_uid == 0 and path.stat().st_mode & 0o5 != 0o5:
            pytest.skip(f"{path} is closed to others")
    (tmp_path / "theirs").mkdir(mode=0o777)
    (tmp_path / "theirs").chmod(0o777)
    child = os.fork()
    if child == 0:
        os.setuid(65534)
        try:
            result = export_checkpoint(tmp_path / "source", tmp_path / "theirs/out", to="granite", link=True)
            os._exit(0 if "symbolic links" in result.notes[0] else 1)
        except BaseException:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (tmp_path / "theirs/out/model.safetensors").is_symlink()


def test_where_no_links_are_at_all_the_bytes_are_copied(tmp_path, monkeypatch):
    save(tmp_path / "source")
    refuse_links(monkeypatch, errno.EPERM, "link", "symlink")
    result = export_checkpoint(tmp_path / "source", tmp_path / "out", to="granite", link=True)
    assert result.notes[0].startswith("The weights are copies")
    assert not (tmp_path / "out/model.safetensors").samefile(tmp_path / "source/model.safetensors")
    assert_same_model(tmp_path / "out", tmp_path / "source")


def test_an_error_that_is_none_of_links_is_raised(tmp_path, monkeypatch):
    save(tmp_path / "source")
    refuse_links(monkeypatch, errno.EIO, "link")
    with pytest.raises(OSError, match="Input/output error"):
        export_checkpoint(tmp_path / "source", tmp_path / "out", to="granite", link=True)
    assert not (tmp_path / "out/model.safetensors").exists()


# Where it comes from, and what is refused.


def test_the_record(tmp_path):
    save(tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "hub")
    export_checkpoint(tmp_path / "hub", tmp_path / "llama", to="llama", dtype="bfloat16")
    export_checkpoint(tmp_path / "hub", tmp_path / "granite", to="granite", link=True)
    lineage = {to: inspect_checkpoint(tmp_path / to).lineage for to in CLASSES}
    start = ["A checkpoint without a record of its own.", "Rewritten as safetensors from safetensors files."]
    folded = "Exported to llama, the multipliers folded into embeddings and head, cast to bfloat16."
    assert lineage == {"llama": [*start, folded], "granite": [*start, "Exported to granite."]}
    assert f"3. {folded}" in (tmp_path / "llama/README.md").read_text()
    assert 'AutoModelForCausalLM.from_pretrained(".")' in (tmp_path / "llama/README.md").read_text()


def test_a_grown_model_in_another_runtime(tmp_path):
    """Wider, deeper, with more heads; stock Llama and Granite find the source's logits in it."""
    save(tmp_path / "source")
    target = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 6, "num_hidden_layers": 5}
    config = json.loads((tmp_path / "source/config.json").read_text()) | target | {"intermediate_size": 120}
    grow_checkpoint(tmp_path / "source", tmp_path / "grown", config)
    for to in CLASSES:
        export_checkpoint(tmp_path / "grown", tmp_path / to, to=to)
        assert (logits(tmp_path / to) - logits(tmp_path / "source")).abs().max() < 1e-6


REFUSED = {
    "--to is 'onnx', expected one of granite, llama, gguf, megatron, torch_dist, dcp": {"to": "onnx"},
    "--spec are for --to megatron, --multipliers also for torch_dist, not llama": {"to": "llama", "tp": 2},
    "--link is for --to granite; llama is written anew": {"to": "llama", "link": True},
    "--multipliers is 'drop', expected one of fold, keep": {"to": "megatron", "multipliers": "drop"},
    "--spec is 'apex', expected one of te, local": {"to": "megatron", "spec": "apex"},
    "--tp is 0; it must be at least 1": {"to": "megatron", "tp": 0},
    "num_attention_heads 4 is not a multiple of --tp 3": {"to": "megatron", "tp": 3},
    "num_key_value_heads 2 is not a multiple of --tp 4": {"to": "megatron", "tp": 4},
    "--vpp is 3, --pp is 1; virtual stages need several stages": {"to": "megatron", "vpp": 3},
    "num_hidden_layers 3 is not a multiple of --pp 3 x --vpp 2": {"to": "megatron", "pp": 3, "vpp": 2},
    "first=3 leaves 0 of 3 layers for the other 1": {"to": "megatron", "pp": 2, "pipeline_layout": "first=3"},
    "--pipeline-layout and --spec are for --to megatron; torch_dist": {"to": "torch_dist", "pipeline_layout": "loss"},
    "--pipeline-layout, --multipliers and --spec are": {"to": "granite", "pipeline_layout": "loss"},
}


@pytest.mark.parametrize(("message", "arguments"), REFUSED.items(), ids=REFUSED)
def test_refused(message, arguments, tmp_path):
    save(tmp_path / "source", num_key_value_heads=2)
    with pytest.raises(CheckpointError, match=message):
        export_checkpoint(tmp_path / "source", tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


MEGATRON_LACKS = {
    "rope_type is 'linear'; --to megatron and torch_dist know 'default' only": MODELS["rope"],
    "attention_bias is True; --to megatron and torch_dist know False only": MODELS["biases"],
    "hidden_act is 'gelu'; --to megatron and torch_dist know 'silu' only": {"hidden_act": "gelu"},
    "intermediate_size 87 is not a multiple of --tp 2": {"intermediate_size": 87},
}


@pytest.mark.parametrize(("message", "fields"), MEGATRON_LACKS.items(), ids=MEGATRON_LACKS)
def test_what_megatron_lacks(message, fields, tmp_path):
    save(tmp_path / "source", **fields)
    with pytest.raises(CheckpointError, match=message):
        export_checkpoint(tmp_path / "source", tmp_path / "out", to="megatron", tp=2)
    assert not (tmp_path / "out").exists()


def test_only_a_teleflm_or_a_llama_is_exported(tmp_path):
    save(tmp_path / "source")
    export_checkpoint(tmp_path / "source", tmp_path / "granite", to="granite")
    with pytest.raises(CheckpointError, match="model_type is 'granite', expected 'TeleFLM' or 'llama'"):
        export_checkpoint(tmp_path / "granite", tmp_path / "out", to="llama")
    (tmp_path / "source/config.json").unlink()
    with pytest.raises(CheckpointError, match="no such file; only a Tele-FLM or a Llama can be exported"):
        export_checkpoint(tmp_path / "source", tmp_path / "out", to="granite")


def test_the_command(tmp_path):
    save(tmp_path / "source", num_hidden_layers=4)
    command = ("export", tmp_path / "source", tmp_path / "out", "--to", "megatron", "--tp", "2", "--pp", "2", "--json")
    foreseen = json.loads(run_teleflm(*command, "--dry-run", folder=tmp_path).stdout)
    assert not (tmp_path / "out").exists()
    done = json.loads(run_teleflm(*command, folder=tmp_path).stdout)
    again = json.loads(run_teleflm(*command, folder=tmp_path).stdout)
    assert (done["already_done"], again["already_done"]) == (False, True)
    names = [f"release/mp_rank_{rank}/model_optim_rng.pt" for rank in ("00_000", "01_000", "00_001", "01_001")]
    assert [file["name"] for file in done["files"]] == [file["name"] for file in foreseen["files"]] == names
    assert {file["name"]: file["bytes"] for file in foreseen["files"]} == {
        name: (tmp_path / "out" / name).stat().st_size for name in names
    }
    refused = run_teleflm("export", tmp_path / "source", tmp_path / "out", "--to", "llama", folder=tmp_path)
    assert refused.returncode == 2
    assert (
        "already holds latest_checkpointed_iteration.txt, but lineage.to was 'megatron' and is 'llama'"
        in refused.stderr
    )


def test_a_folded_head_of_another_dtype_is_said_to_be_rounded_as_it_is(tmp_path):
    tiny_model(tiny_config(output_mult=0.3), dtype=torch.bfloat16).save_pretrained(tmp_path / "source")
    weights = load_file(tmp_path / "source/model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].float()
    save_file(weights, tmp_path / "source/model.safetensors", {"format": "pt"})
    notes = export_checkpoint(tmp_path / "source", tmp_path / "out", to="llama").notes
    assert load_file(tmp_path / "out/model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    assert any(note.startswith("model.embed_tokens.weight was multiplied by 2.5: rounded to float32") for note in notes)
    assert any(note.startswith("lm_head.weight was multiplied by 0.075: rounded to bfloat16") for note in notes)

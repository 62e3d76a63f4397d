# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import xxhash
from accelerate.utils import set_module_tensor_to_device
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from typer.testing import CliRunner

import sft.merge
from conversion.checkpoint.check import check_digests
from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.execute import WriteOptions
from conversion.checkpoint.manifest import MANIFEST, read_manifest
from conversion.checkpoint.sources import open_checkpoint
from conversion.hub.card_check import check_card
from conversion.hub.published_card import CardOptions
from conversion.hub.publishing import publish
from conversion.model_identity import base_digest, is_base
from sft.export import ExportError, _read_adapter, _write_adapter, export_model
from sft.training.recipe import Recipe
from sft.training.train import train
from teleflm.commands.sft import app
from tests.fixtures.tiny import tiny_config, tiny_model
from tests.sft.conftest import STRICT

TERMS = "license: other\nlicense_name: terms\n"
METHODS = {
    "full": {},
    "lora": {"use_peft": True, "lora_r": 4},
    "rslora": {"use_peft": True, "use_rslora": True, "lora_target_modules": ["q_proj", "down_proj"]},
    "dora": {"use_peft": True, "use_dora": True},
    "embeddings": {"use_peft": True, "lora_modules_to_save": ["embed_tokens", "lm_head"]},
}


@pytest.fixture(scope="module")
def trained(model_dir, data_file, tmp_path_factory):
    """Train with a method, once; returns its output_dir."""
    done = {}

    def folder(method):
        if method not in done:
            paths = {"model_name_or_path": str(model_dir), "data_files": str(data_file)}
            keys = {"max_steps": 2, "learning_rate": 1e-2, "output_dir": str(tmp_path_factory.mktemp(method))}
            done[method] = Path(train(Recipe.from_dict({**STRICT, **paths, **keys, **METHODS[method]})).output_dir)
        return done[method]

    return folder


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(3, 103)[None]).logits


@pytest.mark.parametrize("method", METHODS)
def test_the_exported_model_is_the_trained_one(method, trained, model_dir, tmp_path):
    """The oracle is PEFT's own model of adapter and base."""
    source, out = trained(method), tmp_path / "out"
    exported = export_model(source, out, merge=method != "full")
    loader = AutoModelForCausalLM if method == "full" else AutoPeftModelForCausalLM
    expected = logits(loader.from_pretrained(source))
    model = AutoModelForCausalLM.from_pretrained(out)
    assert (logits(model) - expected).abs().max() < (1e-9 if method == "full" else 2e-6)
    assert (logits(AutoModelForCausalLM.from_pretrained(model_dir)) - expected).abs().max() > 1e-4, "it has learned"
    if method != "full":
        assert exported.gap < 1e-6
        assert exported.merged == {"lora": 14, "rslora": 4, "dora": 14, "embeddings": 16}[method]

    tokenizer, trained_tokenizer = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(source)
    assert tokenizer.chat_template == trained_tokenizer.chat_template
    assert tokenizer("What is assert?") == trained_tokenizer("What is assert?")
    assert GenerationConfig.from_pretrained(out).eos_token_id == 2
    assert not [path for path in tmp_path.iterdir() if path != out], "what merging needed is gone"


def test_bfloat16_is_rounded_once(trained, tmp_path):
    export_model(trained("lora"), tmp_path / "float32", merge=True)
    export_model(trained("lora"), tmp_path / "bfloat16", merge=True, dtype="bfloat16")
    exact, rounded = (load_file(tmp_path / name / "model.safetensors") for name in ("float32", "bfloat16"))
    assert all(torch.equal(rounded[name], weight.bfloat16()) for name, weight in exact.items())


def damages(folder, weights):
    """What `teleflm inspect --check` would find."""
    return check_digests(open_checkpoint(weights).tensors, folder, read_manifest(folder), 1, lambda nbytes, total: None)


@pytest.mark.parametrize("merge", [False, True])
def test_the_record_says_what_it_was_made_from_and_names_no_path(merge, trained, model_dir, data_file, tmp_path):
    source, out = trained("lora"), tmp_path / "out"
    export_model(source, out, merge=merge, base=str(model_dir))
    manifest = read_manifest(out)
    assert manifest["lineage"]["operation"] == ("merge" if merge else "export")
    assert manifest["lineage"]["parent"]["record"] == hashlib.sha256((source / MANIFEST).read_bytes()).hexdigest()
    lineage = manifest["lineage"]["parent"]["lineage"]
    assert (lineage["operation"], lineage["trainer"], lineage["method"]) == ("fine-tune", "sft", "lora")
    assert (lineage["data"]["rows"], lineage["steps"]) == (48, 2)
    card = (out / "README.md").read_text()
    assert "Fine-tuned (sft, lora) in 2 steps on 48 conversations" in card
    assert ("With the adapter merged" in card) == merge
    assert not {str(path) for path in (model_dir, data_file, source) if str(path) in json.dumps(manifest)}
    assert damages(out, out if merge else out / "adapter_model.safetensors") == []


def test_a_whole_model_is_recorded_with_its_parent(trained, model_dir, data_file, tmp_path):
    """Fine-tuned twice: the second record holds the first."""
    export_model(trained("full"), tmp_path / "first")
    paths = {"model_name_or_path": str(tmp_path / "first"), "data_files": str(data_file)}
    recipe = Recipe.from_dict({**STRICT, **paths, "max_steps": 1, "output_dir": str(tmp_path / "second")})
    train(recipe, progress=False)
    first, second = read_manifest(tmp_path / "first"), read_manifest(tmp_path / "second")
    record = hashlib.sha256((tmp_path / "first/teleflm_manifest.json").read_bytes()).hexdigest()
    parent = {"plan": first["plan"], "lineage": first["lineage"], "record": record, "matches": True}
    assert second["lineage"]["parent"] == parent
    assert first["lineage"]["parent"]["lineage"]["data"] == second["lineage"]["data"], "the same conversations"
    assert damages(tmp_path / "second", tmp_path / "second") == []
    assert (tmp_path / "second" / "README.md").read_text().count("Fine-tuned (sft, full) in ") == 2


def test_an_adapter_that_merging_changes_is_not_written(trained, tmp_path, monkeypatch):
    """The fault: merging with a tenth more than the adapter adds."""
    from peft.tuners.lora import Linear

    right = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, adapter: 1.1 * right(self, adapter))
    with pytest.raises(ExportError, match=r"merging changes the logits by .* of their spread"):
        export_model(trained("lora"), tmp_path / "out", merge=True)
    assert not list(tmp_path.iterdir())


def test_merging_holds_one_weight_at_a_time(trained, model_dir, tmp_path, monkeypatch):
    """Counted where weights come and go."""
    held, peak = {}, []

    def counting(module, name, device, value=None):
        held[id(module), name] = 0 if value is None else value.numel()
        peak.append(sum(held.values()))
        set_module_tensor_to_device(module, name, device, value=value)

    monkeypatch.setattr(sft.merge, "set_module_tensor_to_device", counting)
    export_model(trained("lora"), tmp_path / "out", merge=True)
    sizes = [weight.numel() for weight in load_file(model_dir / "model.safetensors").values()]
    assert max(sizes) <= max(peak) < 1.5 * max(sizes)
    assert max(peak) < sum(sizes) / 2
    assert peak[-1] == 0


@pytest.fixture
def other_base(model_dir, tmp_path):
    """A copy of the base whose configuration or weights are changed."""

    def make(change):
        folder = tmp_path / "other"
        shutil.copytree(model_dir, folder)
        if change == "shape":
            tiny_model(tiny_config(num_hidden_layers=2, intermediate_size=96)).save_pretrained(folder)
        elif change == "weights":
            weights = load_file(folder / "model.safetensors")
            weights["model.layers.1.mlp.up_proj.weight"][0] += 0.01
            save_file(weights, folder / "model.safetensors", {"format": "pt"})
        else:
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
        return folder

    return make


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("shape", r"adapter for another base: model.layers.0.mlp.\w+_proj.weight of .*other is \[\d+, \d+\], expected"),
        (
            "weights",
            r"adapter for another base: .*other has the same shapes and other weights \(digest spread:\w+, expected",
        ),
        ("llama", r"other/config.json: model_type is 'llama', expected 'TeleFLM'"),
    ],
)
@pytest.mark.parametrize("merge", [False, True])
def test_an_adapter_for_another_base_is_refused(change, message, merge, trained, other_base, tmp_path):
    with pytest.raises(ExportError, match=message):
        export_model(trained("lora"), tmp_path / "out", merge=merge, base=other_base(change))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("model.layers.1.mlp.up_proj.lora_A.weight", r"has no lora_A of model\.layers\.1\.mlp\.up_proj, which target"),
        ("model.layers.0.self_attn.q_proj.lora_B.weight", r"has no lora_B of model\.layers\.0\.self_attn\.q_proj"),
    ],
)
def test_an_adapter_with_parts_missing_is_refused(lost, message, merge, trained, tmp_path):
    folder = shutil.copytree(trained("lora"), tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    del tensors[f"base_model.model.{lost}"]
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=message):
        export_model(folder, tmp_path / "out", merge=merge)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("row", [0, 5, -1])
def test_a_base_that_differs_in_some_rows_is_another(row, trained, model_dir, tmp_path):
    """Which 16 rows of a tensor of 640 tell: the first, the last and those between, not every one."""
    base = shutil.copytree(model_dir, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    places = [index * (len(embedding) - 1) // 15 for index in range(16)]
    embedding[places[row]] *= -3
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match="has the same shapes and other weights"):
        export_model(trained("lora"), tmp_path / "out", base=base, merge=True)


def test_the_digest_of_an_older_record_is_still_known(model_dir):
    base = open_checkpoint(model_dir)
    digest = xxhash.xxh3_128()
    for name, view in sorted(load_file(model_dir / "model.safetensors").items()):
        digest.update(f"{name} {list(view.shape)}".encode())
        digest.update(view[:1].to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    assert is_base(base, digest.hexdigest())
    assert is_base(base, base_digest(base))
    assert not is_base(base, "spread:" + digest.hexdigest())


def test_a_base_in_another_dtype_is_the_same_base(trained, model_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    assert export_model(trained("lora"), tmp_path / "out", merge=True, base=tmp_path / "base").merged == 14
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["full", "--merge"], "holds no adapter_config.json: there is no adapter to merge"),
        (["lora", "--dtype", "bfloat16"], "dtype is bfloat16, but an adapter keeps its own; add --merge"),
        (["lora", "--base", "nowhere"], "the base nowhere of .* is neither a folder nor a downloaded model"),
        (["lora", "--merge", "--dtype", "int3"], "int3"),
    ],
)
def test_a_refusal_is_one_line_and_status_2(arguments, message, trained, tmp_path):
    method, *options = arguments
    result = CliRunner().invoke(app, ["export", str(trained(method)), str(tmp_path / "out"), *options])
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
    assert re.search(message, result.stderr)


def test_an_adapter_is_published_with_a_base_that_others_can_find(trained, tmp_path):
    out = export_model(trained("lora"), tmp_path / "out").folder
    said = CardOptions(license="apache-2.0")
    with pytest.raises(CheckpointError, match=r"base_model_name_or_path is .*, a path of this machine"):
        publish(out, "owner/adapter", dry_run=True, card=said)
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "owner/base"}))
    publication = publish(out, "owner/adapter", dry_run=True, card=said)
    assert publication.weights.keys() == {"adapter_model.safetensors"}
    assert {
        "adapter_config.json",
        "README.md",
        "teleflm_manifest.json",
        "tokenizer.json",
        "tokenizer.model",
    } <= publication.small_files.keys()
    assert publication.left_out == []


@pytest.mark.parametrize("merge", [False, True])
def test_the_card_names_a_base_of_the_hub_and_keeps_its_licence(merge, trained, model_dir, tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(model_dir, base)
    (base / "LICENSE").write_text("Do as you like.")
    (base / "README.md").write_text(f"---\n{TERMS}language: zh\ndatasets: owner/pretraining\n---\n")
    shutil.copytree(trained("lora"), adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "owner/base"}))
    out = tmp_path / "out"
    if merge:
        export_model(adapter, out, merge=True, base=base)
    else:  # as of a base that the Hub's client has downloaded
        _write_adapter(_read_adapter(adapter), open_checkpoint(base), out, None, overwrite=False)
    said = ModelCard((out / "README.md").read_text()).data.to_dict()
    assert (said["base_model"], said["base_model_relation"]) == ("owner/base", "finetune" if merge else "adapter")
    assert (said["license"], said["license_name"], said["language"]) == ("other", "terms", "zh")
    assert "datasets" not in said, "what the base was trained on"
    assert (out / "LICENSE").read_text() == "Do as you like."
    assert check_card((out / "README.md").read_text()) == []


def test_an_adapter_replaces_an_exported_adapter_and_nothing_else(trained, model_dir, tmp_path):
    options = WriteOptions(overwrite=True)
    export_model(trained("lora"), tmp_path / "out")
    with pytest.raises(ExportError, match="exists; choose another folder, or add --overwrite"):
        export_model(trained("lora"), tmp_path / "out")
    export_model(trained("lora"), tmp_path / "out", options=options)

    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years")
    for folder in (mine, trained("lora"), model_dir):
        before = sorted(folder.iterdir())
        with pytest.raises(ExportError, match=r"exists and holds .*, no file of an exported adapter; choose another"):
            export_model(trained("lora"), folder, options=options)
        assert sorted(folder.iterdir()) == before


def test_the_command_merges(trained, tmp_path):
    result = CliRunner().invoke(app, ["export", str(trained("lora")), str(tmp_path / "out"), "--merge", "--json"])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["merged"] == 14


@pytest.mark.parametrize("merge", [False, True])
def test_a_checkpoint_of_an_unfinished_run_can_be_exported(merge, make_recipe, tmp_path):
    """It has no record yet, so only the shapes say that the base is the right one."""
    keys = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "learning_rate": 1e-2}
    train(make_recipe(**keys, use_peft=merge), progress=False)
    checkpoint = tmp_path / "out" / "checkpoint-1"
    export_model(checkpoint, tmp_path / "hub", merge=merge)
    loader = AutoPeftModelForCausalLM if merge else AutoModelForCausalLM
    expected = logits(loader.from_pretrained(checkpoint))
    assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path / "hub")) - expected).abs().max() < 2e-6
    assert AutoTokenizer.from_pretrained(tmp_path / "hub").chat_template

# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Folders of a plain Llama: read, copied, exported and found fault with; the oracle is stock transformers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from conversion import convert_checkpoint, inspect_checkpoint
from conversion.architecture import Architecture, trained_length
from conversion.checkpoint.errors import CheckpointError
from conversion.exports.export import export_checkpoint
from conversion.family import LLAMA
from conversion.hub.card import card_facts, render_card
from conversion.hub.contents import count_token_ids
from tests.fixtures.checkpoint_runs import run_teleflm
from tests.fixtures.llama import VOCABULARY, edit_config, llama_fields, save_llama, stock_logits, tiny_llama
from tests.fixtures.tiny import tiny_config, tiny_model, tiny_tokenizer

IDS = torch.randint(0, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 200.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS = {
    "grouped queries": {},
    "tied": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 16},
    "biases": {"attention_bias": True},
    "llama3": {"rope_parameters": LLAMA3},
}


def said(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


# Reading a configuration.


@pytest.mark.parametrize("fields", [*MODELS.values(), {"num_key_value_heads": None}], ids=[*MODELS, "multi-head"])
def test_two_readers_of_one_file(fields, tmp_path):
    """The torch-free one and transformers'; parameters are counted by transformers."""
    config = LlamaConfig(**llama_fields(**fields))
    config.save_pretrained(tmp_path)
    architecture = Architecture.from_config(said(tmp_path), with_biases=True)
    for field in (
        "hidden_size",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "tie_word_embeddings",
        "vocab_size",
    ):
        assert getattr(architecture, field) == getattr(config, field), field
    with torch.device("meta"):
        assert architecture.num_parameters == LlamaForCausalLM(config).num_parameters()


def test_what_is_not_said_is_transformers_default():
    read, stock = Architecture.from_config({"model_type": "llama"}), LlamaConfig()
    for field in Architecture.__dataclass_fields__:
        if hasattr(stock, field):
            assert getattr(read, field) == getattr(stock, field), field
    assert (read.embedding_scale, read.logit_scale) == (1.0, 1.0)
    for field, default in LLAMA.defaults.items():
        assert default == getattr(stock, field)
    assert trained_length({}) == stock.max_position_embeddings


ROPE = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp_bias": True}, "mlp_bias is true; biases are not supported here"),
        ({"architectures": ["LlamaForSequenceClassification"]}, r"expected \['LlamaForCausalLM'\]"),
        ({"architectures": []}, r"architectures is \[\], expected"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, "auto_map names code of the folder for AutoModelFor"),
        ({"auto_map": {"AutoConfig": "configuration_x.X"}}, "auto_map names code of the folder for AutoConfig"),
        ({"auto_map": ["AutoModel"]}, r"auto_map is \['AutoModel'\], expected an object or null"),
        ({"rope_parameters": {"rope_theta": None}}, "rope_theta of rope_type default is None, expected a number"),
        ({"rope_theta": None}, "rope_theta of rope_type default is None, expected a number"),
        ({"rope_theta": None, "rope_scaling": {"type": "linear", "factor": 2}}, "of rope_type linear is None"),
        ({"sliding_window": 4096}, "sliding_window is 4096, nothing that a Llama of transformers has"),
        ({"use_mup": True}, "use_mup is True"),
        ({"use_mup": 0}, "use_mup is 0"),
        ({"residual_multiplier": 0.22}, "residual_multiplier is 0.22"),
        ({"num_local_experts": 8}, "num_local_experts is 8"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"no_rope_layers": [1, 1, 0]}, "no_rope_layers is"),
        ({"rope_scaling": {"type": "su", "factor": 2}}, "rope_type is 'su', expected one of default, linear, dynamic"),
        ({"rope_scaling": {"rope_type": "proportional"}}, "rope_type is 'proportional'"),
        ({"rope_scaling": ROPE}, "high_freq_factor of rope_type llama3 is None, expected a number"),
        ({"rope_scaling": {**ROPE, "high_freq_factor": "4"}}, "high_freq_factor of rope_type llama3 is '4'"),
        ({"rope_scaling": {"type": "linear", "factor": True}}, "factor of rope_type linear is True"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "long_factor of rope_type longrope is None"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters has full_attention, an object"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5; a Llama",
        ),
        ({"hidden_size": 34}, "hidden_size 34 is not a multiple of num_attention_heads 4"),
        ({"hidden_size": "32"}, "hidden_size is '32', expected an integer"),
        ({"vocab_size": -1}, "vocab_size is -1; it must be finite and above 0"),
    ],
)
def test_refused_by_name(change, message):
    config = {**llama_fields(), "model_type": "llama", "architectures": ["LlamaForCausalLM"], **change}
    with pytest.raises(CheckpointError, match=f"here: .*{message}"):
        Architecture.from_config(config, "here", with_biases=True)


@pytest.mark.parametrize(
    "harmless",
    [
        {"use_mup": False, "input_mult": 2.5},
        {"residual_multiplier": 1.0, "partial_rotary_factor": 1.0, "sliding_window": None, "auto_map": None},
        {"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}, "architectures": None, "unsloth_fixed": True},
    ],
)
def test_what_changes_nothing_is_taken(harmless):
    config = {**llama_fields(), "model_type": "llama", **harmless}
    assert Architecture.from_config(config) == Architecture.from_config({**llama_fields(), "model_type": "llama"})


# Copying.


def test_pickled_files_become_the_same_tensors(tmp_path):
    """Of a `.bin` folder in several files, with buffers that old releases saved: names, bytes, settings and card."""
    source = save_llama(tmp_path / "source", torch.bfloat16)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.arange(4.0)
    (source / "model.safetensors").unlink()
    names, placed = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, source / file)
        placed |= dict.fromkeys(part, file)
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    convert_checkpoint(source, tmp_path / "out")
    after = load_file(tmp_path / "out/model.safetensors")
    assert after.keys() == tensors.keys()
    assert all(torch.equal(after[name], tensors[name]) for name in names)
    assert said(tmp_path / "out") == said(source)
    for name in ("README.md", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert torch.equal(stock_logits(tmp_path / "out", IDS), stock_logits(source, IDS))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"), r"1\.mlp\.up_proj\.weight is missing"),
        (lambda tensors: tensors.update({"lm_head.weight": torch.ones(3, 32)}), r"lm_head\.weight has shape \(3, 32\)"),
    ],
)
def test_a_weight_that_is_missing_is_seen(damage, message, tmp_path):
    """transformers would make one up, and say so among its warnings."""
    source = save_llama(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    damage(tensors)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    for write in (
        lambda: convert_checkpoint(source, tmp_path / "out"),
        lambda: export_checkpoint(source, tmp_path / "out", to="llama"),
    ):
        with pytest.raises(CheckpointError, match=message):
            write()
    assert not (tmp_path / "out").exists()
    assert any("lm_head.weight has" in problem or "is missing" in problem for problem in problems(source))


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_a_copy_that_is_cast_is_not_said_to_be_kept_as_it_is(dtype, tmp_path):
    source = save_llama(tmp_path / "source", torch.bfloat16)
    [note] = convert_checkpoint(source, tmp_path / "out", dtype=dtype).notes
    changed = {name for name, value in said(source).items() if said(tmp_path / "out").get(name) != value}
    assert changed == ({"dtype"} if dtype == "float32" else set())
    kept = "tensors and configuration were kept as they are"
    cast = f"floating-point tensors are {dtype} now, the configuration was kept but for the dtype"
    assert note == f"A llama model, not a Tele-FLM: {cast if dtype else kept}."


def problems(folder: Path) -> list[str]:
    return inspect_checkpoint(folder).problems


def test_another_head_is_copied_and_no_more(tmp_path):
    """A classifier on a Llama has the model_type of a Llama."""
    config = LlamaConfig(**llama_fields(pad_token_id=0), num_labels=3)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "source")
    result = convert_checkpoint(tmp_path / "source", tmp_path / "out")
    assert any("not looked at: config.json: architectures is ['LlamaForSequence" in note for note in result.notes)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "out"))
    assert before.keys() == after.keys()
    inspection = inspect_checkpoint(tmp_path / "out")
    assert (inspection.architecture, inspection.problems) == (None, [])
    assert "architectures is ['LlamaForSequenceClassification']" in (inspection.refused or "")
    with pytest.raises(CheckpointError, match="architectures is"):
        export_checkpoint(tmp_path / "source", tmp_path / "granite", to="granite")


def test_inspect_tells_it(tmp_path):
    source = save_llama(tmp_path / "source", torch.bfloat16)
    inspection = inspect_checkpoint(source)
    assert inspection.problems == []
    assert (inspection.pieces, inspection.padding_rows, inspection.refused) == (VOCABULARY, 352 - VOCABULARY, None)
    shown = run_teleflm("inspect", source, folder=tmp_path).stdout
    for text in ("llama", "4 of 8, 2 key/value", f"352 rows, {VOCABULARY} token ids"):
        assert text in shown
    edit_config(source, lambda config: config.update(sliding_window=16))
    shown = " ".join(run_teleflm("inspect", source, folder=tmp_path).stdout.split())
    assert "Copied, and neither grown nor exported: config.json: sliding_window is 16" in shown


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"9": {}}}}, None),
        ({"tokenizer.json": {"model": {"vocab": {"a": 0, "b": 1}}}}, 2),
        ({"tokenizer.json": {"model": {"vocab": [["a", 0.0], ["b", -1.0], ["c", -2.0]]}}}, 3),
        ({"tokenizer.json": {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 5}]}}, 6),
        ({"tokenizer.json": {"model": {"vocab": {"a": 0}}}, "added_tokens.json": {"<x>": 7}}, 8),
        (
            {
                "tokenizer.json": {"model": {"vocab": {"a": 0}}},
                "tokenizer_config.json": {"added_tokens_decoder": {"9": {}}},
            },
            10,
        ),
    ],
)
def test_token_ids_are_counted_wherever_they_are_noted(files, expected, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert count_token_ids(tmp_path) == expected


# Exports.


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("to", ["granite", "llama"])
def test_stock_classes_compute_the_same(to, fields, tmp_path):
    """Bit for bit, in float32: the weights are the same bytes."""
    source = save_llama(tmp_path / "source", torch.float32, **fields)
    export_checkpoint(source, tmp_path / "out", to=to)
    assert said(tmp_path / "out")["model_type"] == to
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    ours, stock = (stock_logits(folder, IDS, torch.float32) for folder in (tmp_path / "out", source))
    assert (ours - stock).abs().max() < 1e-5 * stock.abs().max()  # Granite's norms are its own, in float32
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert not list((tmp_path / "out").glob("*.py"))
    card = (tmp_path / "out/README.md").read_text()
    assert "FLM" not in card.replace("teleflm", "")
    assert "folded" not in card
    assert "license: llama3.1" in card


@pytest.mark.parametrize(
    ("to", "how", "tied"),
    [
        ("megatron", {"tp": 2}, False),
        ("megatron", {"multipliers": "keep"}, True),
        ("torch_dist", {}, False),
        ("dcp", {}, True),
    ],
    ids=["megatron", "megatron, tied", "torch_dist", "dcp, tied"],
)
def test_to_a_trainer_and_back(to, how, tied, tmp_path):
    """A Llama comes back: every byte of its weights, its numbers, its tokenizer; multipliers are asked of nobody."""
    source = save_llama(tmp_path / "source", torch.bfloat16, tie_word_embeddings=tied)
    export_checkpoint(source, tmp_path / "run", to=to, **how)
    inspection = inspect_checkpoint(tmp_path / "run")
    assert (inspection.problems, inspection.model_type) == ([], None if to == "dcp" else "llama")
    convert_checkpoint(tmp_path / "run", tmp_path / "back")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(stock_logits(tmp_path / "back", IDS), stock_logits(source, IDS))
    assert said(tmp_path / "back")["model_type"] == "llama"
    assert not said(tmp_path / "back").keys() & {"use_mup", "input_mult", "auto_map"}
    assert (tmp_path / "back/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert not list((tmp_path / "back").glob("*.py"))


@pytest.mark.parametrize(
    ("change", "to", "message"),
    [
        (
            {"rope_parameters": LLAMA3},
            "megatron",
            "rope_type is 'llama3'; --to megatron and torch_dist know 'default' only",
        ),
        (
            {"attention_bias": True},
            "torch_dist",
            "attention_bias is True; --to megatron and torch_dist know False only",
        ),
        ({"sliding_window": 16}, "granite", "sliding_window is 16"),
    ],
)
def test_what_a_target_does_not_have(change, to, message, tmp_path):
    source = save_llama(tmp_path / "source", attention_bias=change.get("attention_bias", False))
    edit_config(source, lambda config: config.update(change))
    with pytest.raises(CheckpointError, match=message):
        export_checkpoint(source, tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_type is 'default' by the run's arguments and 'linear'",
        ),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps is 0.001 by the run's arguments and 1e-06 by --config"),
    ],
)
def test_a_run_that_is_another_model_than_its_configuration(change, message, tmp_path):
    export_checkpoint(save_llama(tmp_path / "source"), tmp_path / "run", to="megatron")
    edit_config(tmp_path / "run", lambda config: config.update(change))
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(tmp_path / "run", tmp_path / "out")


def test_a_llamas_configuration_takes_no_multipliers_of_a_run(tmp_path):
    tiny_model(tiny_config()).save_pretrained(tmp_path / "source")
    export_checkpoint(tmp_path / "source", tmp_path / "run", to="megatron", multipliers="keep")
    config = {**said(tmp_path / "run"), "model_type": "llama", "use_mup": None, "architectures": None}
    config |= dict.fromkeys(("input_mult", "output_mult", "mup_scale_factor"))
    with pytest.raises(CheckpointError, match=r"factors on embeddings and logits are \(2.5, 0.125\) by the run's arg"):
        convert_checkpoint(tmp_path / "run", tmp_path / "out", config=config)


def test_a_tele_flm_that_became_a_llama_goes_on_as_one(tmp_path):
    """Exported, then exported again: its tokenizer needs no code in either, and both cards say so."""
    tiny_model(tiny_config()).save_pretrained(tmp_path / "source")
    tiny_tokenizer(tmp_path / "source").save_pretrained(tmp_path / "source")
    export_checkpoint(tmp_path / "source", tmp_path / "llama", to="llama")
    export_checkpoint(tmp_path / "llama", tmp_path / "again", to="llama", dtype="float32")
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "llama" / name).read_bytes()
    card = (tmp_path / "again/README.md").read_text()
    assert 'AutoTokenizer.from_pretrained(".")' in card
    assert 'AutoModelForCausalLM.from_pretrained(".")' in card
    assert render_card(card_facts(tmp_path / "again")).count("trust_remote_code") == card.count("trust_remote_code")


def test_cards_of_a_dry_run_and_a_copy_are_not_ours(tmp_path):
    """What is copied keeps its owner's card; facts that are written about it say nothing of a Tele-FLM."""
    source = save_llama(tmp_path / "source", torch.bfloat16)
    convert_checkpoint(source, tmp_path / "out")
    facts = card_facts(tmp_path / "out", repo_id="someone/tiny")
    card = render_card(facts)
    assert "FLM" not in card.replace("teleflm", "")
    assert f"with {tiny_llama().num_parameters():,} parameters" in card
    assert "Factor on the" not in card

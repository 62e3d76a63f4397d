# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The multipliers of a training run are found in its arguments, or stated; they are never assumed to be none."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conversion import convert_checkpoint, export_checkpoint, inspect_checkpoint
from conversion.checkpoint.errors import CheckpointError
from conversion.native.find import open_native
from conversion.native.hub_plan import complete_config
from conversion.native.training_args import parse_multipliers, states_multipliers, unread_multipliers
from tests.fixtures.checkpoint_runs import run_teleflm
from tests.fixtures.megatron_files import ITERATION
from tests.fixtures.megatron_reference import VOCAB_SIZE
from tests.fixtures.megatron_variants import write_variant
from tests.fixtures.tiny import tiny_config, tiny_model

NONE = {"use_mup": False, "input_mult": 1.0, "output_mult": 1.0, "mup_scale_factor": 1.0}
OURS = {"use_mup": True, "input_mult": 16.0, "output_mult": 0.5, "mup_scale_factor": 4.0}
TEXT = "input_mult=16,output_mult=0.5,mup_scale_factor=4"
# What a megatron-core of 2026 saves of a trainer that leaves its muP alone.
OFF = {"use_mup": False, "mup_embedding_mult": 1.0, "mup_output_mult": 1.0, "mup_width_mult": 1.0}
FORK = {"embedding_multiplier": 16.0, "logit_scale": 0.125, "loss_scale": 65536.0}


@pytest.fixture(scope="module")
def old_run(tmp_path_factory) -> Path:
    """A run of a Megatron that knows no multipliers; what its fork called them is for each test to say."""
    folder = tmp_path_factory.mktemp("run") / "run"
    write_variant("plain", folder)
    return folder


@pytest.fixture
def run(old_run, tmp_path):
    """Makes a copy of the run whose arguments say these things of multipliers, and nothing else."""

    def make(args: dict[str, Any], config: dict[str, Any] | None = None) -> Path:
        folder = tmp_path / "run"
        for file in old_run.rglob("*.pt"):
            content = torch.load(file, weights_only=False)
            for name in NONE:
                vars(content["args"]).pop(name, None)
            vars(content["args"]).update(args)
            target = folder / file.relative_to(old_run)
            target.parent.mkdir(parents=True, exist_ok=True)
            torch.save(content, target)
        (folder / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


def multipliers(out: Path) -> dict[str, Any]:
    config = json.loads((out / "config.json").read_text())
    return {name: config[name] for name in NONE}


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({}, "that every published Tele-FLM has; give them with"),
        (FORK, "(unknown here: embedding_multiplier 16.0, logit_scale 0.125); give"),
        ({**OFF, **FORK}, "(unknown here: embedding_multiplier 16.0, logit_scale 0.125); give"),
        ({"input_mult": 16.0, "logits_alpha": 0.5}, "(unknown here: logits_alpha 0.5); give"),  # half is no statement
        ({"output_mult": 0.5, "mup_scale_factor": 4.0}, "that every published Tele-FLM has; give"),
        ({"use_mup": True}, "that every published Tele-FLM has; give"),
        ({"use_mup": None, "input_mult": None}, "that every published Tele-FLM has; give"),
    ],
    ids=str,
)
def test_refused_where_nobody_says_them(args, says, run, tmp_path):
    folder = run(args)
    with pytest.raises(CheckpointError) as error:
        convert_checkpoint(folder, tmp_path / "out", vocab_size=VOCAB_SIZE)
    assert "do not say the factors on embeddings and logits " in str(error.value)
    assert says in str(error.value)
    assert str(error.value).endswith("with --multipliers or --config, or say --multipliers none.")
    assert not (tmp_path / "out").exists()
    assert any("are a guess" in problem for problem in inspect_checkpoint(folder).problems)


@pytest.mark.parametrize(
    ("args", "options", "expected"),
    [
        ({"input_mult": 16.0, "output_mult": 0.5, "mup_scale_factor": 4.0}, {}, OURS),
        ({"mup_embedding_mult": 16.0, "mup_output_mult": 0.5}, {}, {**OURS, "mup_scale_factor": 1.0}),
        (OFF, {}, NONE),
        ({"use_mup": False, **FORK, "embedding_multiplier": 1, "logit_scale": 0.0}, {}, NONE),
        ({}, {"multipliers": "none"}, NONE),
        (FORK, {"multipliers": TEXT}, OURS),
        ({**OFF, **FORK}, {"multipliers": TEXT}, OURS),
        ({**OFF, **FORK}, {"config": OURS}, OURS),
        (FORK, {"config": {"use_mup": False}}, NONE),
        (FORK, {"config": {"use_mup": False}, "multipliers": "none"}, NONE),
        ({"input_mult": 16.0}, {"multipliers": TEXT}, OURS),
        ({"input_mult": 16.0, "output_mult": 0.25, "mup_scale_factor": 2.0}, {"multipliers": TEXT}, OURS),  # 1/8
    ],
    ids=str,
)
def test_found_or_stated(args, options, expected, run, tmp_path):
    convert_checkpoint(run(args), tmp_path / "out", vocab_size=VOCAB_SIZE, **options)
    assert multipliers(tmp_path / "out") == expected


def test_a_configuration_beside_the_run(run, tmp_path):
    folder = run(FORK, config=OURS)
    convert_checkpoint(folder, tmp_path / "out", vocab_size=VOCAB_SIZE)
    assert multipliers(tmp_path / "out") == OURS
    assert not any("are a guess" in problem for problem in inspect_checkpoint(folder).problems)


@pytest.mark.parametrize(
    ("args", "options", "says"),
    [
        ({}, {"config": {"rms_norm_eps": 3e-4}}, "do not say the factors"),  # a configuration that is silent, too
        ({}, {"config": {"input_mult": 16.0, "output_mult": 0.5}}, "do not say the factors"),  # without use_mup
        ({}, {"config": {"use_mup": None}}, "do not say the factors"),
        ({"input_mult": 2.0, "output_mult": 0.5}, {"multipliers": "none"}, "(2.0, 0.5) by the run's .* (1.0, 1.0) by"),
        ({"input_mult": 2.0}, {"multipliers": TEXT}, "are (2.0, None) by the run's .* (16.0, None) by --multipliers"),
        (FORK, {"multipliers": TEXT, "config": {"use_mup": False}}, "(1.0, 1.0) by .* (16.0, 0.125) by --multipliers"),
        ({"input_mult": 2.0, "output_mult": 0.5}, {"config": OURS}, "input_mult is 2.0 by .* 16.0 by --config"),
    ],
    ids=str,
)
def test_two_who_disagree(args, options, says, run, tmp_path):
    with pytest.raises(CheckpointError) as error:
        convert_checkpoint(run(args), tmp_path / "out", vocab_size=VOCAB_SIZE, **options)
    rest = str(error.value)
    for part in says.split(" .* "):
        assert part in rest
        rest = rest[rest.index(part) + len(part) :]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["megatron", "torch_dist", "fsdp_dtensor", "dcp", "deepspeed"])
def test_every_format_with_names_of_its_own(format, old_run):
    """Where the tensors have the Hub's names, the configuration is the model's own, whose silence means none."""
    native = open_native(old_run)
    has_table = format in ("megatron", "torch_dist", "fsdp_dtensor")
    checkpoint = replace(native, format=format, args={**native.args, "use_mup": None}, table=native.table)
    if has_table:
        with pytest.raises(CheckpointError, match="do not say the factors"):
            complete_config(checkpoint, None, VOCAB_SIZE, None)
        return
    embedding = native.tensors["embedding.word_embeddings.weight"][:VOCAB_SIZE]
    tensors = {"model.embed_tokens.weight": embedding}
    hub = replace(checkpoint, args={}, table=None, tensors=tensors)
    assert "use_mup" not in complete_config(hub, {"hidden_size": 32}, VOCAB_SIZE, None)
    assert complete_config(hub, {"hidden_size": 32}, VOCAB_SIZE, None, TEXT).items() >= OURS.items()
    with pytest.raises(CheckpointError, match="by --multipliers"):
        complete_config(hub, {"use_mup": False}, VOCAB_SIZE, None, TEXT)


def test_those_that_were_not_read_are_noted(run, tmp_path):
    folder = run({**FORK, "input_mult": 2.0, "output_mult": 0.5})
    notes = convert_checkpoint(folder, tmp_path / "out", vocab_size=VOCAB_SIZE).notes
    assert "look like multipliers were not read: embedding_multiplier 16.0, logit_scale 0.125." in " ".join(notes)


def test_an_export_comes_back(tmp_path):
    tiny_model(tiny_config(), dtype=torch.bfloat16).save_pretrained(tmp_path / "hub")
    export_checkpoint(tmp_path / "hub", tmp_path / "fold", to="megatron")
    export_checkpoint(tmp_path / "hub", tmp_path / "keep", to="megatron", multipliers="keep")
    convert_checkpoint(tmp_path / "fold", tmp_path / "folded")
    convert_checkpoint(tmp_path / "keep", tmp_path / "kept")
    assert multipliers(tmp_path / "folded") == NONE
    assert multipliers(tmp_path / "kept") == {**OURS, "input_mult": 2.5}
    for run in ("fold", "keep"):
        assert not any("are a guess" in problem for problem in inspect_checkpoint(tmp_path / run).problems)
    (tmp_path / "fold/config.json").unlink()  # only the files that Megatron-LM reads were kept
    with pytest.raises(CheckpointError, match="or say --multipliers none"):
        convert_checkpoint(tmp_path / "fold", tmp_path / "again", vocab_size=640)
    convert_checkpoint(tmp_path / "fold", tmp_path / "again", vocab_size=640, multipliers="none")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "folded/model.safetensors").read_bytes()


def test_the_command(run, tmp_path):
    line = ("convert", run(FORK), tmp_path / "out", "--vocab-size", str(VOCAB_SIZE))
    refused = run_teleflm(*line, folder=tmp_path)
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)
    assert "embedding_multiplier 16.0" in refused.stderr
    stated = run_teleflm(*line, "--multipliers", TEXT, folder=tmp_path)
    assert stated.returncode == 0, stated.stderr
    assert multipliers(tmp_path / "out") == OURS


def test_they_are_for_runs(tmp_path):
    tiny_model(tiny_config()).save_pretrained(tmp_path / "hub")
    with pytest.raises(CheckpointError, match="--multipliers is for checkpoints of training runs"):
        convert_checkpoint(tmp_path / "hub", tmp_path / "out", multipliers="none")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "None",
        "all",
        "input_mult=2",
        "input_mult=2,output_mult",
        "input_mult=2,output_mult=0",
        "use_mup=1",
        "input_mult=2,output_mult=nan",
        "input_mult=2,output_mult=1,other=3",
        "input_mult=2,input_mult=3,output_mult=1",
    ],
)
def test_no_statement(text):
    with pytest.raises(CheckpointError, match="expected none, or input_mult=NUMBER,output_mult=NUMBER"):
        parse_multipliers(text)


@pytest.mark.parametrize(
    "stock",
    [
        {"loss_scale": 4096.0, "initial_loss_scale": 2**32, "min_loss_scale": 2.0, "loss_scale_window": 1000},
        {"head_lr_mult": 10.0, "decoupled_lr_mult": 3.0, "multi_latent_attention": 5, "num_multimodal_heads": 3},
        {"rope_scaling_factor": 8.0, "rotary_scaling_factor": 40.0, "mscale": 0.7, "mscale_all_dim": 0.7},
        {"moe_router_topk_scaling_factor": 2.5, "mtp_loss_scaling_factor": 0.1, "muon_scale_mode": 3},
        {"mup_base_hidden_size": 256, "mup_width_mult": 4.0, "mup_attn_scale_power": 1.0, "make_vocab_multiple": 128},
        {"embedding_scale": True, "logit_scale": "0.5", "alpha": None, "scale": [2.0]},
    ],
    ids=str,
)
def test_arguments_of_megatron_itself(stock):
    assert unread_multipliers(stock) == {}
    assert states_multipliers({"use_mup": False, **stock})
    assert not states_multipliers(stock)


@pytest.mark.parametrize(
    "name",
    ["embedding_multiplier", "emb_mult", "logit_scale", "logits_scaling", "output_alpha", "mup_readout", "InputScale"],
)
def test_what_looks_like_one(name):
    assert unread_multipliers({name: 0.25}) == {name: 0.25}
    assert not states_multipliers({"use_mup": False, name: 0.25})

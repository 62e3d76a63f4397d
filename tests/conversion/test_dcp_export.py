# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Folders for FSDP2: torch.distributed.checkpoint loads them, Accelerate and transformers' Trainer go on from them."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import Trainer, TrainingArguments

from conversion import WriteOptions, convert_checkpoint, export_checkpoint, inspect_checkpoint
from conversion.checkpoint.errors import CheckpointError, CorruptData, ImpossibleState
from conversion.checkpoint.folder_formats import loadable_files
from conversion.checkpoint.manifest import MANIFEST, read_manifest
from growth import grow_checkpoint
from growth.training.resume import find_checkpoint
from modeling_teleflm import TeleFLMForCausalLM
from tests.fixtures.checkpoint_runs import contents, run_teleflm
from tests.fixtures.tiny import tiny_config, tiny_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
WEIGHTS, OPTIMIZER = "pytorch_model_fsdp_0", "optimizer_0"
SMALL = WriteOptions(max_shard_size="4KB")  # so that tensors have many chunks, and files few
ROWS = torch.randint(3, 600, (16, 24), generator=torch.Generator().manual_seed(0)).tolist()
ROWS = [{"input_ids": row, "labels": row} for row in ROWS]
MOMENTS = ("exp_avg", "exp_avg_sq")
TARGET = {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 5, "intermediate_size": 99}
FSDP2 = {
    "version": 2,
    "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
    "state_dict_type": "SHARDED_STATE_DICT",
}


def settings(**more) -> dict:
    return {
        "max_steps": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "lr_scheduler_type": "linear",
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        **more,
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of transformers' Trainer: `start`, the model it began with; `checkpoint-2` and `checkpoint-4`."""
    folder = tmp_path_factory.mktemp("run")
    model = tiny_model()
    model.save_pretrained(folder / "start")
    saving = {"save_steps": 2, "per_device_train_batch_size": 4}
    Trainer(model, TrainingArguments(str(folder), **settings(**saving)), train_dataset=ROWS).train()
    return folder


@pytest.fixture(scope="module")
def grown(run, tmp_path_factory) -> Path:
    """The model of its second step, and its moments, grown; in bfloat16."""
    folder = tmp_path_factory.mktemp("grown") / "model"
    grow_checkpoint(run / "checkpoint-2", folder, TARGET, optimizer=run / "checkpoint-2", dtype="bfloat16")
    return folder


def named_state(folder: Path, model: TeleFLMForCausalLM) -> dict[str, dict[str, torch.Tensor]]:
    """What torch.load finds in an optimizer.pt, by the names that the model has for the numbers of Trainer's groups."""
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    norms = [name for name, _ in model.named_parameters() if "norm" in name]
    matrices = [name for name, _ in model.named_parameters() if "norm" not in name]
    return {name: saved["state"][index] for index, name in enumerate((*matrices, *norms))}


def loaded(folder: Path, tmp_path: Path) -> dict:
    """All that torch itself finds in a folder of its own."""
    dcp_to_torch_save(folder, tmp_path / f"{folder.name}.pt")
    return torch.load(tmp_path / f"{folder.name}.pt", weights_only=True)


# What torch loads.


@pytest.mark.parametrize("options", [WriteOptions(), SMALL], ids=["one file", "many"])
def test_torch_loads_every_bit(options, grown, tmp_path):
    result = export_checkpoint(grown, tmp_path / "out", to="dcp", optimizer=True, options=options)
    model = TeleFLMForCausalLM.from_pretrained(grown, dtype=torch.bfloat16)
    empty = {"model": {name: torch.empty_like(tensor) for name, tensor in model.state_dict().items()}}
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(empty, storage_reader=dcp.FileSystemReader(tmp_path / "out" / WEIGHTS))
    assert all(torch.equal(empty["model"][name], tensor) for name, tensor in model.state_dict().items())

    found, expected = loaded(tmp_path / "out" / OPTIMIZER, tmp_path)["optimizer"], named_state(grown, model)
    assert found["state"].keys() == expected.keys()
    for name, state in expected.items():
        assert found["state"][name].keys() == state.keys()
        for key, tensor in state.items():
            assert found["state"][name][key].dtype == tensor.dtype == torch.float32
            assert torch.equal(found["state"][name][key], tensor), (name, key)
    assert found["state"][name]["step"] == 2
    saved = torch.load(grown / "optimizer.pt", weights_only=True)["param_groups"]
    for group, own in zip(found["param_groups"], saved, strict=True):
        assert group["params"] == own["param_names"]
        assert {key: group[key] for key in own if key not in ("params", "param_names")} == {
            key: value for key, value in own.items() if key not in ("params", "param_names")
        }
        assert (group["weight_decay"], type(group["betas"])) == (own["weight_decay"], tuple)

    files = [shard for shard in result.shards if shard.filename.startswith(OPTIMIZER)]
    assert len(files) == 1 if options.max_shard_size == "5GB" else len(files) > 20
    row = 40 * 4
    for shard in files:
        assert sum(tensor.nbytes for tensor, _ in shard.tensors) <= max(options.shard_bytes, row)


def test_the_metadata_is_what_torch_would_write(grown, tmp_path):
    """But for where the chunks lie, which are whole tensors here as they are when one process saves."""
    export_checkpoint(grown, tmp_path / "out", to="dcp", optimizer=True)
    for folder in (WEIGHTS, OPTIMIZER):
        with pytest.warns(UserWarning, match="single process"):
            dcp.save(loaded(tmp_path / "out" / folder, tmp_path), checkpoint_id=tmp_path / "torch's" / folder)
        own, torchs = (
            pickle.loads((tmp_path / place / folder / ".metadata").read_bytes()) for place in ("out", "torch's")
        )
        assert own.state_dict_metadata == torchs.state_dict_metadata
        assert own.planner_data == torchs.planner_data
        assert own.storage_data.keys() == torchs.storage_data.keys()
        lengths = {index: place.length for index, place in torchs.storage_data.items()}
        assert all(abs(place.length - lengths[index]) < 2000 for index, place in own.storage_data.items())


def test_a_tied_head_is_there_by_both_names_and_once(tmp_path):
    model = tiny_model(tiny_config(tie_word_embeddings=True))
    model.save_pretrained(tmp_path / "source")
    export_checkpoint(tmp_path / "source", tmp_path / "out", to="dcp", options=SMALL)
    found = loaded(tmp_path / "out" / WEIGHTS, tmp_path)["model"]
    assert found.keys() == model.state_dict().keys()
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    assert torch.equal(found["lm_head.weight"], model.lm_head.weight)
    nbytes = sum(path.stat().st_size for path in (tmp_path / "out" / WEIGHTS).glob("*.distcp"))
    assert nbytes < 1.3 * (tmp_path / "source/model.safetensors").stat().st_size + 300 * 1500
    assert inspect_checkpoint(tmp_path / "out", check=True).damages == []


def test_another_dtype_is_that_of_the_weights_alone(grown, tmp_path):
    export_checkpoint(grown, tmp_path / "out", to="dcp", optimizer=True, dtype="float32")
    found = loaded(tmp_path / "out" / WEIGHTS, tmp_path)["model"]
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    weights = load_file(grown / "model.safetensors")
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in weights.items())


# There and back.


def test_to_dcp_and_back(grown, tmp_path):
    export_checkpoint(grown, tmp_path / "out", to="dcp", optimizer=True, options=SMALL)
    notes = convert_checkpoint(tmp_path / "out", tmp_path / "back", optimizer=True).notes
    assert not any("Left behind" in note for note in notes)
    before, after = (load_file(folder / "model.safetensors") for folder in (grown, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "back/config.json").read_text() == (grown / "config.json").read_text()
    was, now = (torch.load(folder / "optimizer.pt", weights_only=True) for folder in (grown, tmp_path / "back"))
    assert [group["param_names"] for group in was["param_groups"]] == [
        group["param_names"] for group in now["param_groups"]
    ]
    for own, other in zip(was["param_groups"], now["param_groups"], strict=True):
        assert own.items() <= other.items()
    for index, state in was["state"].items():
        assert all(torch.equal(state[key], now["state"][index][key]) for key in ("step", *MOMENTS))


def test_a_checkpoint_without_names_and_back(run, tmp_path):
    """transformers' Trainer numbers its parameters."""
    export_checkpoint(run / "checkpoint-2", tmp_path / "out", to="dcp", optimizer=True)
    convert_checkpoint(tmp_path / "out", tmp_path / "back", optimizer=True)
    model = tiny_model()
    expected = named_state(run / "checkpoint-2", model)
    saved = torch.load(tmp_path / "back/optimizer.pt", weights_only=True)
    for group in saved["param_groups"]:
        for index, name in zip(group["params"], group["param_names"], strict=True):
            for key, tensor in expected.pop(name).items():
                assert torch.equal(saved["state"][index][key], tensor), (name, key)
    assert not expected
    assert find_checkpoint(tmp_path / "out", tmp_path) == str(tmp_path / "out")  # nothing of it is missing
    for name in ("trainer_state.json", "scheduler.pt", "rng_state.pth"):
        assert (tmp_path / "out" / name).read_bytes() == (run / "checkpoint-2" / name).read_bytes()


# What FSDP2 makes of it.


@pytest.fixture(scope="module")
def resumed(run, grown, tmp_path_factory) -> Path:
    """What two processes have loaded, and made of it."""
    out = tmp_path_factory.mktemp("resumed")
    shutil.copytree(run / "start", out / "start")
    export_checkpoint(run / "checkpoint-2", out / "checkpoint-2", to="dcp", optimizer=True, options=SMALL)
    export_checkpoint(grown, out / "grown", to="dcp", optimizer=True)
    sharded = settings(per_device_train_batch_size=2, fsdp=True, fsdp_config=FSDP2, save_strategy="no")
    job = {"checkpoint": str(out / "checkpoint-2"), "settings": sharded, "rows": ROWS}
    job |= {"grown": str(out / "grown"), "grown_source": str(grown)}
    (out / "job.json").write_text(json.dumps(job))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = subprocess.run(
        [*torchrun, "-m", "tests.conversion.dcp_worker", out / "job.json"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-6000:]
    return out


def test_a_trainer_goes_on_from_it(run, resumed):
    """Two more steps of two processes are those of the run that was never moved."""
    model = TeleFLMForCausalLM.from_pretrained(run / "checkpoint-2")
    found, expected = torch.load(resumed / "loaded.pt"), named_state(run / "checkpoint-2", model)
    assert found["sharded"] == len(expected)
    for name, state in expected.items():
        assert torch.equal(found["model"][name], model.state_dict()[name])
        for key in ("step", *MOMENTS):
            assert torch.equal(found["optimizer"]["state"][name][key], state[key]), (name, key)

    after = torch.load(resumed / "trained.pt")
    end = TeleFLMForCausalLM.from_pretrained(run / "checkpoint-4").state_dict()
    states = named_state(run / "checkpoint-4", model)
    assert any(not torch.allclose(end[name], tensor, atol=1e-3) for name, tensor in found["model"].items())
    for name, tensor in end.items():
        torch.testing.assert_close(after["model"][name], tensor, rtol=1e-4, atol=2e-5)
        assert after["optimizer"]["state"][name]["step"] == states[name]["step"] == 4
        for key in MOMENTS:
            torch.testing.assert_close(after["optimizer"]["state"][name][key], states[name][key], rtol=1e-3, atol=1e-6)


def test_accelerate_loads_what_has_grown(grown, resumed):
    """And the next step is that of plain torch with the whole state, in the settings of the state."""
    model = TeleFLMForCausalLM.from_pretrained(grown, dtype=torch.float32)
    found, expected = torch.load(resumed / "grown_loaded.pt"), named_state(grown, model)
    for name, state in expected.items():
        assert torch.equal(found["model"][name], model.state_dict()[name])
        for key in ("step", *MOMENTS):
            assert torch.equal(found["optimizer"]["state"][name][key], state[key])
    saved = torch.load(grown / "optimizer.pt", weights_only=True)["param_groups"]
    parameters = dict(model.named_parameters())
    groups = [
        {
            **{key: value for key, value in group.items() if key != "param_names"},
            "params": [parameters[name] for name in group["param_names"]],
        }
        for group in saved
    ]
    optimizer = torch.optim.AdamW(groups)
    for name, state in expected.items():
        optimizer.state[parameters[name]] = {key: tensor.clone() for key, tensor in state.items()}
    batch = torch.tensor([row["input_ids"] for row in ROWS])
    model(batch, labels=batch).loss.backward()
    optimizer.step()
    after = torch.load(resumed / "grown_stepped.pt")
    for name, parameter in parameters.items():
        torch.testing.assert_close(after["model"][name], parameter.detach(), rtol=1e-4, atol=2e-5)
        assert after["optimizer"]["state"][name]["step"] == 3


# However it is written.


class Interruption(Exception):
    """Stands for a kill; tests/conversion/test_resume.py kills at every instant of writing such a folder."""


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
@pytest.mark.parametrize("to", ["dcp", "torch_dist"])
def test_a_resumed_export_has_the_bytes_of_one_that_was_not_interrupted(to, share, grown, tmp_path):
    def progress(nbytes: int, total: int) -> None:
        nonlocal done
        done += nbytes
        if done > share * total:
            raise Interruption

    done = 0
    how = {"to": to, "optimizer": True}
    export_checkpoint(grown, tmp_path / "whole", **how, options=replace(SMALL, workers=1))
    with pytest.raises(Interruption):
        export_checkpoint(grown, tmp_path / "out", **how, options=replace(SMALL, workers=2, progress=progress))
    names = [name for name in contents(tmp_path / "out") if name in loadable_files()]
    assert names == []
    export_checkpoint(grown, tmp_path / "out", **how, options=replace(SMALL, workers=3, memory="64MB"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert export_checkpoint(grown, tmp_path / "out", **how, options=SMALL).written.already_done


def test_an_optimizer_that_changes_while_it_is_exported(run, tmp_path):
    folder, calls = shutil.copytree(run / "checkpoint-2", tmp_path / "checkpoint-2"), iter(range(10**6))

    def change(nbytes: int, total: int) -> None:
        if next(calls) == 5:
            _edit_state(lambda saved: saved["state"][0]["exp_avg"].add_(1))(folder)

    with pytest.raises(CorruptData, match=r"optimizer\.pt: had .* changed or replaced meanwhile"):
        export_checkpoint(folder, tmp_path / "out", to="dcp", optimizer=True, options=replace(SMALL, progress=change))
    assert not (tmp_path / "out" / WEIGHTS / ".metadata").exists()


# Whose optimizer it is.


def _edit_state(change):
    def damage(folder):
        saved = torch.load(folder / "optimizer.pt", weights_only=True)
        change(saved)
        torch.save(saved, folder / "optimizer.pt")

    return damage


def _edit_trainer_state(**fields):
    def damage(folder):
        state = json.loads((folder / "trainer_state.json").read_text())
        (folder / "trainer_state.json").write_text(json.dumps({**state, **fields}))

    return damage


def _of_a_larger_model(folder):
    model = tiny_model(tiny_config(intermediate_size=96))
    optimizer = Trainer(model, TrainingArguments(str(folder / "x"), use_cpu=True, report_to="none")).create_optimizer()
    model(torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")


def _no_rate(saved):
    del saved["param_groups"][1]["lr"]


def _one_step_back(saved):
    saved["state"][3]["step"] -= 1


AdamStart = {"AdamStart": {"args": {}, "attributes": {"first_step": 700.0}}}

MISMATCHES = {
    "another model's": (_of_a_larger_model, r"has shape \(96, 32\), config\.json says \(88, 32\)"),
    "fewer groups": (_edit_state(lambda saved: saved["param_groups"].pop()), r"param_groups have \[23\] parameters"),
    "SGD's": (_edit_state(lambda saved: saved["state"].update({0: {"momentum_buffer": None}})), "only Adam and AdamW"),
    "of another step": (
        _edit_state(lambda s: [e["step"].fill_(4) for e in s["state"].values()]),
        (r"Adam is at step 4, .*trainer_state\.json says 2, so the two are of different checkpoints; put back"),
    ),
    "of two steps": (_edit_state(_one_step_back), r"Adam is at step 1 to 2, .*trainer_state\.json says 2"),
    "state of another step": (_edit_trainer_state(global_step=4), r"Adam is at step 2, .*trainer_state\.json says 4"),
    "began later": (_edit_trainer_state(stateful_callbacks=AdamStart), r"at step 2, .*trainer_state\.json says 702"),
    "no step": (_edit_trainer_state(global_step=None), r"global_step is None, expected a whole number"),
    "no rate": (_edit_state(_no_rate), r"optimizer\.pt: parameter group 1 does not say lr"),
    "no schedule": (
        lambda folder: (folder / "scheduler.pt").unlink(),
        r"has a trainer_state\.json and no scheduler\.pt",
    ),
    "no optimizer": (lambda folder: (folder / "optimizer.pt").unlink(), r"holds no optimizer\.pt, whose moments"),
}


@pytest.mark.parametrize(("damage", "message"), MISMATCHES.values(), ids=MISMATCHES)
def test_an_optimizer_of_something_else_is_refused(damage, message, run, tmp_path):
    folder = shutil.copytree(run / "checkpoint-2", tmp_path / "checkpoint-2")
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        export_checkpoint(folder, tmp_path / "out", to="dcp", optimizer=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_run_that_began_with_grown_moments(run, tmp_path):
    """Its optimizer is ahead of its steps, by what `teleflm train` has noted."""
    folder = shutil.copytree(run / "checkpoint-2", tmp_path / "checkpoint-2")
    _edit_trainer_state(stateful_callbacks=AdamStart)(folder)
    _edit_state(lambda saved: [entry["step"].fill_(702) for entry in saved["state"].values()])(folder)
    result = export_checkpoint(folder, tmp_path / "out", to="dcp", optimizer=True, dry_run=True)
    assert any("Adam's moments after 702 steps, in 2 parameter groups of 23, 7" in note for note in result.notes)
    assert any("goes on from step 2" in note for note in result.notes)


def _exchange_optimizer(folder, run):
    shutil.copy(run / "checkpoint-2/optimizer.pt", folder)


def _train_the_weights(folder, run):
    weights = load_file(folder / "model.safetensors")
    from safetensors.torch import save_file

    save_file({name: tensor + 1 for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"})


def _forget_optimizer(folder, run):
    """As where somebody has put an optimizer beside a model that grew without one."""
    record = json.loads((folder / MANIFEST).read_text())
    del record["files"]["optimizer.pt"], record["lineage"]["optimizer"]
    (folder / MANIFEST).write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_exchange_optimizer, r"optimizer\.pt: has \d+ bytes, expected \d+, so it is not what the record says"),
        (_train_the_weights, r"optimizer\.pt: the weights beside it are not those of the record \(model\.safetensors"),
        (_forget_optimizer, r"the record of the folder tells of weights without an optimizer"),
    ],
)
def test_an_optimizer_that_the_record_does_not_know_is_refused(damage, message, run, grown, tmp_path):
    folder = shutil.copytree(grown, tmp_path / "grown")
    damage(folder, run)
    with pytest.raises(CheckpointError, match=message):
        export_checkpoint(folder, tmp_path / "out", to="dcp", optimizer=True)
    assert not (tmp_path / "out").exists()


def test_moments_that_are_no_numbers_are_not_written(run, tmp_path):
    folder = shutil.copytree(run / "checkpoint-2", tmp_path / "checkpoint-2")
    _edit_state(lambda saved: saved["state"][5]["exp_avg_sq"].view(-1)[7:8].fill_(float("nan")))(folder)
    with pytest.raises(ImpossibleState, match=r"optimizer_0/__0_0\.distcp/optimizer\.state\..*exp_avg_sq.* is NaN"):
        export_checkpoint(folder, tmp_path / "out", to="dcp", optimizer=True)
    assert not (tmp_path / "out" / WEIGHTS / ".metadata").exists()


@pytest.mark.parametrize("to", ["granite", "llama", "megatron"])
def test_other_targets_have_no_optimizer(to, grown, tmp_path):
    with pytest.raises(CheckpointError, match=f"--optimizer is for --to dcp and torch_dist; {to} is written without"):
        export_checkpoint(grown, tmp_path / "out", to=to, optimizer=True)


# What is said, and what is recorded.


def test_what_is_said(run, grown, tmp_path):
    with_run = export_checkpoint(run / "checkpoint-2", tmp_path / "a", to="dcp", optimizer=True, dry_run=True).notes
    assert any("goes on from step 2: resume_from_checkpoint=OUT" in note for note in with_run)
    assert any("The run was one process" in note for note in with_run)
    of_none = export_checkpoint(grown, tmp_path / "a", to="dcp", optimizer=True, dry_run=True).notes
    assert any("transformers' Trainer has nothing to resume here" in note for note in of_none)
    alone = export_checkpoint(run / "checkpoint-2", tmp_path / "out", to="dcp")
    assert "optimizer.pt is left behind; --optimizer exports its moments too." in alone.notes
    # A Trainer would go on from these with fresh moments, and say nothing.
    assert not [name for name in contents(tmp_path / "out") if name.startswith(("trainer_state", "optimizer"))]


@pytest.mark.parametrize("to", ["dcp", "torch_dist"])
def test_a_decay_that_does_not_say_what_it_is_is_said_to_be_taken_for_adamws(to, run, tmp_path):
    folder = shutil.copytree(run / "checkpoint-2", tmp_path / "checkpoint-2")
    export = partial(export_checkpoint, folder, tmp_path / "out", to=to, optimizer=True, dry_run=True)
    assert not any("taken for AdamW's" in note for note in export().notes)
    _edit_state(lambda saved: [group.pop("decoupled_weight_decay") for group in saved["param_groups"]])(folder)
    assert any("weight decay of group 0 is decoupled; it was taken for AdamW's" in note for note in export().notes)


def test_without_a_state_of_a_run_a_trainer_stops(grown, tmp_path):
    """Rather than go on without the moments."""
    export_checkpoint(grown, tmp_path / "out", to="dcp", optimizer=True)
    args = TrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to="none", max_steps=1)
    trainer = Trainer(TeleFLMForCausalLM.from_pretrained(grown), args, train_dataset=ROWS)
    with pytest.raises(ValueError, match="only supported when using PyTorch FSDP"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "out"))
    trainer.is_fsdp_enabled = True
    with pytest.raises(FileNotFoundError, match=r"trainer_state\.json"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "out"))


def damages(folder: Path) -> list[str]:
    return [str(damage) for damage in inspect_checkpoint(folder, check=True).damages or []]


@pytest.mark.parametrize("folder", [WEIGHTS, OPTIMIZER])
def test_the_record_has_a_digest_of_every_chunk(folder, grown, tmp_path):
    out = tmp_path / "out"
    export_checkpoint(grown, out, to="dcp", optimizer=True, options=SMALL)
    record = read_manifest(out)
    assert (record["lineage"]["operation"], record["lineage"]["to"]) == ("export", "dcp")
    assert all(name.startswith(WEIGHTS) and entry["digest"] for name, entry in record["tensors"].items())
    states = [entry for name, entry in record["files"].items() if name.startswith(OPTIMIZER) and "tensors" in entry]
    assert sum(len(entry["tensors"]) for entry in states) > 200
    assert damages(out) == []
    assert "Exported to dcp, with the moments of Adam." in inspect_checkpoint(out).lineage
    path = sorted((out / folder).glob("*.distcp"))[-1]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    (found,) = damages(out)
    assert f"{folder}/{path.name}" in found


@pytest.mark.parametrize("to", ["dcp", "torch_dist"])
def test_moments_are_verified_when_they_are_converted(to, grown, tmp_path):
    """The fault: one bit of one second moment, where nothing but its digest tells."""
    export_checkpoint(grown, tmp_path / "out", to=to, optimizer=True)
    how = {"optimizer": True, "options": WriteOptions(verify_source=True)}
    notes = convert_checkpoint(tmp_path / "out", tmp_path / "back", **how).notes
    assert [note for note in notes if "erified" in note] == [
        "Verified: what is read of 2 files, by the digests of its record."
    ]
    record = read_manifest(tmp_path / "out")
    (path,) = (tmp_path / "out" / name for name, entry in record["files"].items() if "tensors" in entry)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"optimizer\..* has the hash"):
        convert_checkpoint(tmp_path / "out", tmp_path / "again", **how)


def test_grown_moments_are_verified_when_they_grow_on(grown, tmp_path):
    options = WriteOptions(verify_source=True)
    more = {"num_hidden_layers": 9}
    notes = grow_checkpoint(grown, tmp_path / "out", more, optimizer=grown, options=options).notes
    assert any("Verified: what is read of 2 files, by the digests of its record" in note for note in notes), notes


def test_its_source_is_verified_when_it_is_converted(grown, tmp_path):
    export_checkpoint(grown, tmp_path / "out", to="dcp", options=SMALL)
    options = WriteOptions(verify_source=True)
    notes = convert_checkpoint(tmp_path / "out", tmp_path / "back", options=options).notes
    assert any(re.search(r"Verified: what is read of \d+ files, by the digests of its record", note) for note in notes)
    assert read_manifest(tmp_path / "back")["lineage"]["parent"]["lineage"]["to"] == "dcp"
    path = max((tmp_path / "out" / WEIGHTS).glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="has the hash"):
        convert_checkpoint(tmp_path / "out", tmp_path / "again", options=options)


def test_a_checkpoint_of_a_run_is_not_overwritten_by_what_is_made_of_it(grown, tmp_path):
    export_checkpoint(grown, tmp_path / "out", to="dcp", optimizer=True)
    before = contents(tmp_path / "out")
    for options in (WriteOptions(), WriteOptions(overwrite=True)):
        with pytest.raises(CheckpointError, match="is the source too; write to another folder"):
            convert_checkpoint(tmp_path / "out", tmp_path / "out", optimizer=True, options=options)
    assert contents(tmp_path / "out") == before


def test_somebody_elses_optimizer_stays_and_is_named(grown, tmp_path):
    (tmp_path / "out" / OPTIMIZER).mkdir(parents=True)
    theirs = tmp_path / "out" / OPTIMIZER / "__7_0.distcp"
    theirs.write_bytes(b"theirs")
    result = export_checkpoint(grown, tmp_path / "out", to="dcp", options=WriteOptions(overwrite=True))
    assert theirs.read_bytes() == b"theirs"
    assert any("optimizer_0 is not of this checkpoint and stays" in note for note in result.notes)
    (tmp_path / "other" / OPTIMIZER).mkdir(parents=True)
    (tmp_path / "other" / OPTIMIZER / "__0_0.distcp").write_bytes(b"theirs")
    with pytest.raises(
        CheckpointError, match=r"optimizer_0/__0_0\.distcp: is there already, written by no earlier run"
    ):
        export_checkpoint(grown, tmp_path / "other", to="dcp", optimizer=True)


def test_the_command(run, tmp_path):
    command = ("export", run / "checkpoint-2", tmp_path / "out", "--to", "dcp", "--optimizer", "--json")
    foreseen = json.loads(run_teleflm(*command, "--dry-run", folder=tmp_path).stdout)
    assert not (tmp_path / "out").exists()
    done = json.loads(run_teleflm(*command, folder=tmp_path).stdout)
    again = json.loads(run_teleflm(*command, folder=tmp_path).stdout)
    assert (done["already_done"], again["already_done"]) == (False, True)
    names = [f"{WEIGHTS}/__0_0.distcp", f"{OPTIMIZER}/__0_0.distcp"]
    assert [file["name"] for file in done["files"]] == [file["name"] for file in foreseen["files"]] == names
    assert [file["bytes"] for file in foreseen["files"]] == [(tmp_path / "out" / name).stat().st_size for name in names]
    refused = run_teleflm(*command[:-2], folder=tmp_path)
    assert refused.returncode == 2
    assert f"already holds {WEIGHTS}/.metadata, but lineage.optimizer was" in refused.stderr

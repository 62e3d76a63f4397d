# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Grown moments on two processes, sharded: the steps are those of torch's AdamW with the whole state on one.

The oracle is a loop of plain torch over the whole batch: an AdamW whose state is read from optimizer.pt by torch.load.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from pydoc_data import topics

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import growth.training.masks  # noqa: F401  (registers the masked model)
from conversion import inspect_checkpoint
from growth import grow_checkpoint
from growth.method import Mask
from tests.fixtures.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
STEP = 700
TARGET = {"hidden_size": 40, "num_attention_heads": 5, "intermediate_size": 110, "num_hidden_layers": 4}
FSDP2 = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
IN_PARTS = {**FSDP2, "fsdp_config": {**FSDP2["fsdp_config"], "state_dict_type": "SHARDED_STATE_DICT"}}
ROWS, ACCUMULATED = 2, 2  # of a process


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """`text.jsonl`; `zero` and `masked`, grown with the moments of a source at step 700."""
    root = tmp_path_factory.mktemp("spread")
    texts = [text for text in topics.topics.values() if len(text) > 200][:12]
    (root / "text.jsonl").write_text("".join(json.dumps({"text": text[:2000]}) + "\n" for text in texts))
    model = tiny_model()
    model.save_pretrained(root / "source")
    tiny_tokenizer(root / "source").save_pretrained(root / "source")
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.arange(200)[None]
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    for state in optimizer.state.values():
        state["step"].fill_(STEP)
    torch.save(optimizer.state_dict(), root / "optimizer.pt")
    grow_checkpoint(root / "source", root / "zero", TARGET, optimizer=root)
    grow_checkpoint(root / "source", root / "masked", TARGET, optimizer=root, method=Mask(5))
    shutil.copytree(root / "zero", root / "zero-elsewhere", ignore=shutil.ignore_patterns("optimizer.pt"))
    return root


def keys_of(folders: Path, out: Path, name: str, method: str = "zero", **keys) -> dict:
    return {
        "model_name_or_path": str(folders / method),
        "train_files": [str(folders / "text.jsonl")],
        "output_dir": str(out / name),
        "block_size": 32,
        "max_steps": 2,
        "per_device_train_batch_size": ROWS,
        "gradient_accumulation_steps": ACCUMULATED,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "mup_base_width": 32,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "num_processes": 2,
        **keys,
    }


def launch(runs: list, out: Path, **environment: str) -> list[list[dict]]:
    """The outcomes of some runs, one list a process."""
    (out / "runs.json").write_text(json.dumps(runs))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = subprocess.run(
        [*torchrun, "-m", "tests.growth.spread_worker", out / "runs.json", out],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=560,
    )
    assert result.returncode == 0, result.stderr[-6000:]
    return json.loads((out / "outcomes.json").read_text())


def expect(folders: Path, method: str, dtype: torch.dtype, *, masked: bool = False) -> dict:
    """Two steps on the same rows by plain torch, from the same state; the weights after them."""
    model = AutoModelForCausalLM.from_pretrained(folders / method, dtype=dtype)
    named = dict(model.named_parameters())
    matrices = {"lr": 1e-3 * 32 / 40, "weight_decay": 0.1 * 40 / 32}
    groups = [
        {"params": [named[name] for name in named if "_proj" in name], **matrices},
        {"params": [named[name] for name in named if "embed" in name or "head" in name], "weight_decay": 0.1},
        {"params": [named[name] for name in named if "norm" in name], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    saved = torch.load(folders / method / "optimizer.pt", weights_only=True)
    for group in saved["param_groups"]:
        for index, name in zip(group["params"], group["param_names"], strict=True):
            optimizer.state[named[name]] = {
                key: value.clone() if key == "step" else value.to(dtype) for key, value in saved["state"][index].items()
            }
    rows = blocks_of(folders, method)
    for step in range(2):
        if masked:
            model.set_mask_step(step + 1)
        batch = rows[step * 8 : step * 8 + 8]
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def blocks_of(folders: Path, method: str) -> torch.Tensor:
    """The text as examples of 32 tokens, in order."""
    tokenizer, ids = tiny_tokenizer(folders / method), []
    for line in (folders / "text.jsonl").read_text().splitlines():
        ids += [1, *tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"], 2]
    return torch.tensor(ids[: len(ids) // 32 * 32]).view(-1, 32)


def check(folder: Path, expected: dict, **tolerance: float) -> None:
    found = load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name].to(weight.dtype), weight, **tolerance)


@pytest.fixture(scope="module")
def sharded(folders, tmp_path_factory) -> tuple[Path, list[list[dict]]]:
    """Runs under accelerate's FSDP2, two of them with a fault planted."""
    out = tmp_path_factory.mktemp("fsdp2")
    begun = {**FSDP2, "dtype": "float64", "save_strategy": "steps", "save_steps": 1}
    runs = [
        (keys_of(folders, out, "early", **FSDP2), "load too early"),
        (keys_of(folders, out, "spoiled", **FSDP2), "spoil"),
        (keys_of(folders, out, "run", **begun), None),
        (keys_of(folders, out, "resumed", **begun, resume_from_checkpoint=str(out / "run/checkpoint-1")), None),
        (keys_of(folders, out, "masked", method="masked", **FSDP2), None),
        (keys_of(folders, out, "unseen", **FSDP2), "unseen"),
        (keys_of(folders, out, "masked in parts", method="masked", **IN_PARTS), None),
    ]
    return out, launch(runs, out)


def test_moments_that_one_process_does_not_see_stop_all(sharded):
    for process in sharded[1]:
        assert re.search(r"optimizer\.pt is there for 1 of the 2 processes", process[5]["error"])


def test_fsdp2_steps_as_an_unsharded_adam_with_the_same_state(folders, sharded):
    out, outcomes = sharded
    for outcome in (process[2] for process in outcomes):
        assert (outcome["kind"], outcome["optimizer"]) == ("FSDP", "AdamW")
        assert outcome["wrapped"]["sharded_layers"] == 4
        assert outcome["steps"] == [[STEP], [STEP + 1]]
    check(out / "run", expect(folders, "zero", torch.float64), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("name", "own"), [("run", "modeling_teleflm"), ("masked", "masked_teleflm")])
def test_what_fsdp2_saves_is_a_model_of_ours(name, own, sharded):
    """FSDP2 derives a class of its own from the model's, in a file of torch's; neither is written."""
    folder = sharded[0] / name
    assert {path.name for path in folder.glob("*.py") if "fsdp" in path.name} == set()
    config = json.loads((folder / "config.json").read_bytes())
    assert config["auto_map"]["AutoModelForCausalLM"] == f"{own}.{config['architectures'][0]}"
    assert (folder / f"{own}.py").is_file()


def test_a_masked_model_that_is_saved_in_parts_is_saved_whole_in_the_end(sharded):
    whole, parts = (load_file(sharded[0] / name / "model.safetensors") for name in ("masked", "masked in parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(parts[name], weight) for name, weight in whole.items())


def check_records(out: Path, runs: dict[str, str], kind: str) -> None:
    """Each run left the record of what two processes did together; `runs` says with which moments it began."""
    for name, moments in runs.items():
        chain = inspect_checkpoint(out / name, check=True).chain
        details = chain[-1].details
        assert (details["steps"], details["tokens"]) == (2, details["batch_size"] * details["sequence_length"] * 2)
        assert (details["world_size"], details["distributed_type"], details["moments"]) == (2, kind, moments)
        assert [link.operation for link in chain] == [None, "grow", "train"]
        assert [link.problems for link in chain[1:]] == [(), ()]


def test_what_fsdp2_trained_is_recorded(sharded):
    out, _ = sharded
    check_records(out, {"run": "grown", "resumed": "grown", "masked": "grown"}, "FSDP")
    between = inspect_checkpoint(out / "run/checkpoint-1").chain[-1]
    assert (between.details["steps"], between.problems) == (1, ())
    assert inspect_checkpoint(out / "masked").chain[-1].details["masks"]["end"] > 0


def test_a_resumed_run_goes_on_with_its_checkpoints_moments(sharded):
    out, outcomes = sharded
    assert [process[3]["steps"] for process in outcomes] == [[[STEP + 1]]] * 2
    check(out / "resumed", load_file(out / "run/model.safetensors"), rtol=0, atol=0)


def test_masks_rise_under_fsdp2(folders, sharded):
    out, outcomes = sharded
    assert [process[4]["growth_state"]["step"] for process in outcomes] == [2, 2]
    check(out / "masked", expect(folders, "masked", torch.float32, masked=True), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (0, "the optimizer has no moments for 39 of the 39 tensors that it steps, expected those of .*replaced"),
        (1, r"the optimizer's moments of \S+, of shape \(\S+.*\), are not those of .*optimizer\.pt"),
    ],
)
def test_a_state_that_is_not_the_grown_one_stops_the_run(run, message, sharded):
    """As accelerate's swap of the parameters leaves it; and with one bit of one moment wrong on one process."""
    out, outcomes = sharded
    for process in outcomes:
        assert process[run].keys() == {"error", "steps"}
        assert len(process[run]["steps"]) == 1, "no step was done"
        assert re.search(message, process[run]["error"])
    assert not (out / ["early", "spoiled"][run] / "model.safetensors").exists()


# DeepSpeed.

_AUTO = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping")


def zero(stage: int, optimization: dict | None = None, **keys) -> dict:
    optimization = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True, **(optimization or {})}
    return {"deepspeed": {"zero_optimization": optimization, **dict.fromkeys(_AUTO, "auto"), **keys}}


@pytest.fixture(scope="module")
def partitioned(folders, tmp_path_factory) -> tuple[Path, list[list[dict]]]:
    """Runs under DeepSpeed."""
    pytest.importorskip("deepspeed")
    out = tmp_path_factory.mktemp("zero")
    begun = {**zero(2), "save_strategy": "steps", "save_steps": 1}
    own = {"optimizer": {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}}}
    runs = [
        (keys_of(folders, out, "stage-1", **zero(1)), None),
        (keys_of(folders, out, "stage-2", **begun), None),
        (keys_of(folders, out, "resumed", **begun, resume_from_checkpoint=str(out / "stage-2/checkpoint-1")), None),
        (keys_of(folders, out, "bf16", **zero(2, bf16={"enabled": True}), bf16=True), None),
        (keys_of(folders, out, "masked", method="masked", **zero(2)), None),
        (keys_of(folders, out, "spoiled", **zero(2)), "spoil"),
        (keys_of(folders, out, "mup", **zero(2, **own)), None),
        (keys_of(folders, out, "robin", **zero(2, {"round_robin_gradients": True})), None),
        (keys_of(folders, out, "stage-3", **zero(3)), None),
    ]
    return out, launch(runs, out, DS_ACCELERATOR="cpu")


@pytest.mark.external
@pytest.mark.parametrize(
    ("run", "name", "optimizer"),
    [
        (0, "stage-1", "DeepSpeedZeroOptimizer"),
        (1, "stage-2", "DeepSpeedZeroOptimizer"),
        (4, "masked", "DeepSpeedZeroOptimizer"),
        (8, "stage-3", "DeepSpeedZeroOptimizer_Stage3"),
    ],
)
def test_zero_steps_as_an_unsharded_adam_with_the_same_state(run, name, optimizer, folders, partitioned):
    out, outcomes = partitioned
    for outcome in (process[run] for process in outcomes):
        assert (outcome.get("error"), outcome["kind"], outcome["optimizer"]) == (None, "DEEPSPEED", optimizer)
        assert outcome["steps"] == [[STEP], [STEP + 1]]
    method = "masked" if name == "masked" else "zero"
    check(out / name, expect(folders, method, torch.float32, masked=name == "masked"), rtol=1e-4, atol=1e-6)


@pytest.mark.external
def test_what_deepspeed_trained_is_recorded(partitioned):
    out, _ = partitioned
    check_records(out, dict.fromkeys(("stage-1", "stage-2", "resumed", "bf16", "stage-3"), "grown"), "DEEPSPEED")


@pytest.mark.external
def test_a_resumed_run_goes_on_with_its_partitions(partitioned):
    out, outcomes = partitioned
    assert [process[2]["steps"] for process in outcomes] == [[[STEP + 1]]] * 2
    check(out / "resumed", load_file(out / "stage-2/model.safetensors"), rtol=0, atol=0)


@pytest.mark.external
def test_masters_of_bfloat16_have_the_moments_in_float32(folders, partitioned):
    out, outcomes = partitioned
    assert [process[3]["steps"] for process in outcomes] == [[[STEP], [STEP + 1]]] * 2
    found, expected = load_file(out / "bf16/model.safetensors"), expect(folders, "zero", torch.float32)
    # Gradients and weights are rounded, and where the second moment is next to nothing that shows. With fresh moments
    # half of the weights are near.
    near = [torch.isclose(found[name].float(), weight, rtol=1e-2, atol=5e-4) for name, weight in expected.items()]
    assert torch.cat([part.flatten() for part in near]).float().mean() > 0.99


@pytest.mark.external
def test_what_deepspeed_does_otherwise_stops_the_run(partitioned):
    """A spoilt partition, an optimizer of its own, tables that are not those of its partitions."""
    out, outcomes = partitioned
    for process in outcomes:
        assert re.search(r"the optimizer's moments of \S+, of shape .* are not those of", process[5]["error"])
        assert "was not made with the groups of muP: delete optimizer" in process[6]["error"]
        assert "partition does not hold the weights of" in process[7]["error"]
    assert not list(out.glob("spoiled/*.safetensors")) + list(out.glob("mup/*.safetensors"))

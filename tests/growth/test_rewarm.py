# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What is new warms up, what is old does not notice.

The oracle of what is new are the bytes that growth wrote: an entry is old if its value is one of its source's. The
oracle of a step is torch's own on whole tensors, and `before + share * (after - before)` where a boolean tensor says.
"""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, TrainerControl, TrainerState, TrainingArguments

from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.manifest import MANIFEST, seal
from growth import grow_checkpoint
from growth.fold import fold_masks
from growth.method import Mask, Tile
from growth.new_entries import new_entries, read_growth
from growth.training.errors import RunError
from growth.training.mup import parameter_groups
from growth.training.optimizer_layout import parameter_shapes
from growth.training.rewarm import RewarmCallback, find_new_parts
from growth.training.train import main, train
from modeling_teleflm import TeleFLMForCausalLM
from tests.fixtures.tiny import tiny_config, tiny_model
from tests.growth.test_growth import one_thread  # noqa: F401
from tests.growth.test_spread import FSDP2, blocks_of, check, folders, keys_of, launch  # noqa: F401
from tests.growth.test_train import split

TARGETS = {
    "all axes": {
        "hidden_size": 48,
        "num_attention_heads": 6,
        "intermediate_size": 110,
        "num_hidden_layers": 5,
        "vocab_size": 700,
    },
    "groups that grow": {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8},
    "groups that split": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8},
    "depth": {"num_hidden_layers": 4},
}


def lineage_of(folder: Path) -> dict:
    return json.loads((folder / MANIFEST).read_bytes())["lineage"]


def as_boolean(boxes, shape) -> torch.Tensor:
    """Boxes as a tensor that is true in them; that none overlaps another is checked."""
    found = torch.zeros(shape, dtype=torch.int)
    for box in boxes:
        found[tuple(slice(a, a + n) for a, n in zip(box.start, box.size, strict=True))] += 1
    assert found.max() <= 1
    return found.bool()


@pytest.mark.parametrize("name", TARGETS)
def test_new_is_what_growth_did_not_copy(name, tmp_path):
    """By masks, which copy without a factor. In float64, as draws in float32 are not all different."""
    target = TARGETS[name]
    heads = {} if name in ("all axes", "depth") else {"num_key_value_heads": 2}
    config = tiny_config(input_mult=1.0, **heads)  # another one is multiplied into the embeddings
    source = tiny_model(config, dtype=torch.float64)
    source.save_pretrained(tmp_path / "source")
    grow_checkpoint(tmp_path / "source", tmp_path / "grown", target, method=Mask(5))
    lineage = lineage_of(tmp_path / "grown")
    boxes = new_entries(read_growth(lineage, "here"))
    old, new = load_file(tmp_path / "source/model.safetensors"), load_file(tmp_path / "grown/model.safetensors")
    assert boxes.keys() == new.keys()
    share = 0
    for key, tensor in new.items():
        layer = int(key.split(".")[2]) if ".layers." in key else None
        origin = lineage["layers"][layer] if layer is not None else {"source": None, "copy": False}
        came_from = key if layer is None else key.replace(f"layers.{layer}.", f"layers.{origin['source']}.")
        expected = torch.ones_like(tensor, dtype=torch.bool) if origin["copy"] else ~torch.isin(tensor, old[came_from])
        assert torch.equal(as_boolean(boxes[key], tensor.shape), expected), key
        share += int(expected.sum())
    assert 0 < share < sum(tensor.numel() for tensor in new.values())


# One optimizer, step by step.


OPTIMIZERS = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "one by one": {"foreach": False},
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("mup", [False, True])
def test_a_step_moves_the_new_by_a_share_and_the_old_as_ever(kind, mup, folders):  # noqa: F811
    """Gradients are given, so that old entries have to be, bit by bit, those of a run without."""
    folder, steps = folders / "zero", 4
    parts = find_new_parts(folder, parameter_shapes(TeleFLMForCausalLM.from_pretrained(folder)))
    models = [TeleFLMForCausalLM.from_pretrained(folder, dtype=torch.float64) for _ in range(3)]
    optimizers = []
    for model in models:
        groups = parameter_groups(model, learning_rate=1e-2, weight_decay=0.1, width_ratio=1.25)
        optimizers.append(torch.optim.AdamW(groups if mup else model.parameters(), lr=1e-2, **OPTIMIZERS[kind]))
    new = {name: as_boolean(parts.boxes[name], parameter.shape) for name, parameter in models[0].named_parameters()}
    callback = RewarmCallback(SimpleNamespace(optimizer=optimizers[0], model=models[0]), parts, steps)
    state, event = TrainerState(max_steps=6), (None, TrainerControl())
    callback.on_train_begin(None, state, event[1])
    for step in range(6):
        torch.manual_seed(step)
        gradients = [torch.randn_like(parameter) for parameter in models[0].parameters()]
        for model in models:
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = gradient.clone()
        callback.on_step_begin(None, state, event[1])
        optimizers[0].step()
        # The formula, on whole tensors.
        before = {name: parameter.detach().clone() for name, parameter in models[1].named_parameters()}
        optimizers[1].step()
        share = min((step + 1) / steps, 1.0)
        with torch.no_grad():
            for name, parameter in models[1].named_parameters():
                scaled = before[name] + share * (parameter - before[name])
                parameter.copy_(torch.where(new[name], scaled, parameter))
        optimizers[2].step()
        state.global_step += 1
        for name, parameter in models[0].named_parameters():
            torch.testing.assert_close(parameter, models[1].get_parameter(name), rtol=1e-13, atol=1e-15)
            plain = models[2].get_parameter(name)
            assert torch.equal(parameter[~new[name]], plain[~new[name]]), "old entries are not touched"
            if new[name].any():
                assert not torch.equal(parameter[new[name]], plain[new[name]])
    assert callback._hooks == []
    assert callback._before == []


# Runs.


def after_a_step(folders, tmp_path, name, **keys) -> dict[str, torch.Tensor]:  # noqa: F811
    given = {"num_processes": 1, "max_steps": 1, "gradient_accumulation_steps": 1, **keys}
    train(*split(keys_of(folders, tmp_path, name, **given)))
    return load_file(tmp_path / name / "model.safetensors")


def test_the_first_step_of_a_run(folders, tmp_path, caplog):  # noqa: F811
    """A quarter of what a run without it does to the new, and exactly that to the old; with grown moments and muP."""
    begun = load_file(folders / "zero/model.safetensors")
    plain = after_a_step(folders, tmp_path, "plain")
    warmed = after_a_step(folders, tmp_path, "warmed", rewarm_new_steps=4)
    boxes = new_entries(read_growth(lineage_of(folders / "zero"), "here"))
    for name, weight in warmed.items():
        new = as_boolean(boxes[name], weight.shape)
        assert torch.equal(weight[~new], plain[name][~new]), name
        quarter = begun[name] + 0.25 * (plain[name] - begun[name])
        torch.testing.assert_close(weight[new], quarter[new], rtol=1e-6, atol=1e-9)
    total = sum(box.numel for found in boxes.values() for box in found)
    entries = sum(weight.numel() for weight in plain.values())
    assert (
        f"{total:,} of {entries:,} parameters are new; their updates rise to whole ones over steps 1 to 4"
        in caplog.text
    )
    assert "training ends at step 1 of the 4" in caplog.text
    assert lineage_of(tmp_path / "warmed")["rewarmed"] == {"new_parameters": total, "steps": 4}
    assert lineage_of(tmp_path / "plain")["rewarmed"] is None


def test_a_ramp_of_one_step_is_none(folders, tmp_path):  # noqa: F811
    plain = after_a_step(folders, tmp_path, "plain", max_steps=2)
    ramp = after_a_step(folders, tmp_path, "ramp", max_steps=2, rewarm_new_steps=1)
    assert all(torch.equal(weight, ramp[name]) for name, weight in plain.items())


@pytest.mark.slow
def test_a_run_that_is_resumed_in_its_ramp_has_the_same_bits(folders, tmp_path):  # noqa: F811
    """And when the model is named by the checkpoint, whose own record ends with training."""
    keys = {"max_steps": 4, "rewarm_new_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = after_a_step(folders, tmp_path, "whole", **keys)
    checkpoint = str(tmp_path / "whole/checkpoint-2")
    for name, model in (("again", str(folders / "zero")), ("named", checkpoint)):
        given = {**keys, "resume_from_checkpoint": checkpoint, "model_name_or_path": model}
        again = after_a_step(folders, tmp_path, name, **given)
        assert all(torch.equal(weight, again[key]) for key, weight in whole.items())
    with pytest.raises(RunError, match="rewarm_new_steps was 4, is 5"):
        after_a_step(
            folders, tmp_path, "other", **{**keys, "rewarm_new_steps": 5, "resume_from_checkpoint": checkpoint}
        )


@pytest.mark.slow
def test_spread_over_two_processes(folders, tmp_path):  # noqa: F811
    """FSDP2, whose processes hold blocks of each parameter, and DDP: the steps of one process on the whole batch."""
    keys = {"dtype": "float64", "rewarm_new_steps": 3}
    sharded = {**keys, **FSDP2, "save_strategy": "steps", "save_steps": 1}
    checkpoint = str(tmp_path / "fsdp2/checkpoint-1")
    runs = [
        (keys_of(folders, tmp_path, "ddp", **keys), None),
        (keys_of(folders, tmp_path, "fsdp2", **sharded), None),  # its environment stays
        (keys_of(folders, tmp_path, "resumed", **sharded, resume_from_checkpoint=checkpoint), None),
    ]
    outcomes = launch(runs, tmp_path)
    for process in outcomes:
        assert [(run.get("error"), run["kind"]) for run in process] == [(None, "MULTI_CPU"), *[(None, "FSDP")] * 2]
    expected = two_steps(folders, share=3)
    check(tmp_path / "fsdp2", expected, rtol=1e-9, atol=1e-11)
    check(tmp_path / "resumed", load_file(tmp_path / "fsdp2/model.safetensors"), rtol=0, atol=0)
    check(tmp_path / "ddp", expected, rtol=1e-5, atol=5e-7)  # without the ramp it is as far from one process
    unscaled = two_steps(folders, share=1)
    assert (unscaled["lm_head.weight"] - expected["lm_head.weight"]).abs().max() > 1e-5, "the ramp is far more"


def two_steps(folders: Path, share: int) -> dict[str, torch.Tensor]:  # noqa: F811
    """By plain torch on whole tensors, from the grown moments; in step k new entries move by (k + 1) / share."""
    model = AutoModelForCausalLM.from_pretrained(folders / "zero", dtype=torch.float64)
    named = dict(model.named_parameters())
    groups = [
        {"params": [named[name] for name in named if "_proj" in name], "lr": 8e-4, "weight_decay": 0.125},
        {"params": [named[name] for name in named if "embed" in name or "head" in name], "weight_decay": 0.1},
        {"params": [named[name] for name in named if "norm" in name], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    saved = torch.load(folders / "zero/optimizer.pt", weights_only=True)
    for group in saved["param_groups"]:
        for index, name in zip(group["params"], group["param_names"], strict=True):
            entry = saved["state"][index]
            optimizer.state[named[name]] = {k: v.clone() if k == "step" else v.double() for k, v in entry.items()}
    boxes, rows = new_entries(read_growth(lineage_of(folders / "zero"), "here")), blocks_of(folders, "zero")
    for step in range(2):
        batch = rows[step * 8 : step * 8 + 8]
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        before = {name: parameter.detach().clone() for name, parameter in named.items()}
        optimizer.step()
        factor = min((step + 1) / share, 1)
        with torch.no_grad():
            for name, parameter in named.items():
                scaled = before[name] + factor * (parameter - before[name])
                parameter.copy_(torch.where(as_boolean(boxes[name], parameter.shape), scaled, parameter))
    return {name: parameter.detach() for name, parameter in named.items()}


# Where it cannot work.


def without_record(folder):
    (folder / MANIFEST).unlink()


def edit(change):
    def apply(folder):
        record = json.loads((folder / MANIFEST).read_bytes())
        change(record["lineage"])
        (folder / MANIFEST).write_text(json.dumps(seal(record)))

    return apply


def edit_unsealed(folder):
    """As an editor leaves it."""
    record = json.loads((folder / MANIFEST).read_bytes())
    record["lineage"]["source"]["hidden_size"] = 24
    (folder / MANIFEST).write_text(json.dumps(record))


def train_elsewhere(folder):
    weights = load_file(folder / "model.safetensors")
    save_file({name: weight + 1 for name, weight in weights.items()}, folder / "model.safetensors", {"format": "pt"})


def grown_again(lineage):
    lineage["parent"] = {"lineage": dict(lineage)}


@pytest.mark.parametrize(
    ("damage", "keys", "message"),
    [
        (edit_unsealed, {}, "needs what the record of the step 'grow' says, but that record was edited"),
        (train_elsewhere, {}, "the weights are not those of that record any more: model.safetensors has"),
        (without_record, {"fresh_optimizer": True}, "no record says what is new in it, as rewarm_new_steps needs"),
        (edit(lambda lineage: lineage.update(operation="train")), {}, "done last to it is 'train', not a growth"),
        (edit(grown_again), {}, "grew twice without being trained in between"),
        (edit(lambda lineage: lineage["layers"].pop()), {}, "lists 3 layers, . of them originals, expected 4"),
        (edit(lambda lineage: lineage["layers"].append("x")), {}, "lists a layer x"),
        (edit(lambda lineage: lineage.pop("source")), {}, "the record of the growth has no source"),
        (edit(lambda lineage: lineage.update(method="guess")), {}, "method is 'guess', expected one of zero"),
        (edit(lambda lineage: lineage["source"].update(vocab_size=9999)), {}, "vocab_size became 640 of 9999"),
        (
            edit(lambda lineage: lineage["target"].update(intermediate_size=111)),
            {},
            r"is of shape \(110, 40\), but of \(111, 40\) in the model that grew by its record",
        ),
        (
            None,
            {"optim": "adafactor", "fresh_optimizer": True},
            "optim is adafactor, but rewarm_new_steps is for torch's",
        ),
        (None, {"optim": "sgd", "fresh_optimizer": True}, "optim is sgd, but rewarm_new_steps is for torch's AdamW"),
        (None, {"rewarm_new_steps": 0}, "rewarm_new_steps is 0, expected at least 1"),
        (None, {"rewarm_new_steps": 1.5}, "rewarm_new_steps is 1.5, expected int or nothing"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(damage, keys, message, folders, tmp_path, capsys):  # noqa: F811
    folder = shutil.copytree(folders / "zero", tmp_path / "model")
    if damage:
        damage(folder)
    given = {"num_processes": 1, "model_name_or_path": str(folder), "rewarm_new_steps": 2, **keys}
    (tmp_path / "run.json").write_text(json.dumps(keys_of(folders, tmp_path, "run", **given)))
    assert main([str(tmp_path / "run.json")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(f"^error: .*({message})", error), error
    assert not (tmp_path / "run/model.safetensors").exists()


def test_deepspeed_is_refused_by_name(tmp_path):
    from growth.training.rewarm import check_optimizer_choice

    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    check_optimizer_choice(args)
    args.deepspeed = {"zero_optimization": {"stage": 2}}
    with pytest.raises(RunError, match="DeepSpeed steps partitions of its own: shard with FSDP 2"):
        check_optimizer_choice(args)


def test_an_optimizer_that_is_not_torchs_adam_is_refused_when_it_is_there(folders):  # noqa: F811
    """Whoever made it, and whatever `optim` says: `optimizers=` of a Trainer, DeepSpeed's configuration."""
    model = tiny_model()
    parts = find_new_parts(folders / "zero", parameter_shapes(TeleFLMForCausalLM.from_pretrained(folders / "zero")))
    trainer = SimpleNamespace(optimizer=torch.optim.SGD(model.parameters()), model=model)
    callback = RewarmCallback(trainer, parts, 2)
    with pytest.raises(RunError, match="the optimizer is SGD, but rewarm_new_steps is for torch's AdamW"):
        callback.on_train_begin(None, TrainerState(max_steps=2), TrainerControl())


def test_a_growth_that_copied_everything_leaves_nothing_to_warm(tmp_path):
    tiny_model(tiny_config(hidden_size=16, num_attention_heads=2, num_key_value_heads=2)).save_pretrained(
        tmp_path / "source"
    )
    target = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 176}
    grow_checkpoint(tmp_path / "source", tmp_path / "grown", target, method=Tile(0.1))
    shapes = parameter_shapes(TeleFLMForCausalLM.from_pretrained(tmp_path / "grown"))
    with pytest.raises(RunError, match="added nothing that it did not copy"):
        find_new_parts(tmp_path / "grown", shapes)


def test_folded_masks_are_new_still(folders, tmp_path):  # noqa: F811
    """Nothing was trained in between; a conversion of a training checkpoint says nothing of what was."""
    fold_masks(folders / "masked", tmp_path / "folded", alpha=1.0)
    shapes = parameter_shapes(TeleFLMForCausalLM.from_pretrained(tmp_path / "folded"))
    assert find_new_parts(tmp_path / "folded", shapes).numel == find_new_parts(folders / "masked", shapes).numel > 0
    edit(lambda lineage: lineage.update(operation="convert", parallel={"tensor": 2}))(tmp_path / "folded")
    with pytest.raises(RunError, match="done last to it is 'convert', not a growth"):
        find_new_parts(tmp_path / "folded", shapes)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is of shape"):
        find_new_parts(folders / "masked", {**shapes, "lm_head.weight": (640, 41)})

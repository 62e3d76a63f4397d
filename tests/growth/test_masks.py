# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Masked growth: at every alpha the masked model is the plain model that `fold` writes.

The oracles are the source at alpha = 0 and stock TeleFLM running the folded weights at every alpha, in float64.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import growth.fold as folding
from conversion import convert_checkpoint
from conversion.architecture import Architecture
from conversion.checkpoint.errors import CheckpointError
from evaluation.logits import compare_logits
from growth import fold_masks, grow_checkpoint
from growth.method import Mask
from growth.training.masks import MaskCallback, TeleFLMMaskedForCausalLM
from modeling_teleflm import TeleFLMForCausalLM
from modeling_teleflm.masked_teleflm import TeleFLMGrowthMask, TeleFLMMaskedRMSNorm
from tests.growth.test_growth import (  # noqa: F401
    ALL_AXES,
    GROUPED,
    IDS,
    TIED,
    heads,
    load,
    make_source,
    new_entries,
    one_thread,
    source,
)

ROOT = Path(__file__).parents[2]
STEPS = 100
EVERYTHING = {**heads(12, 3), "intermediate_size": 110, "num_hidden_layers": 5, "vocab_size": 704, "output_mult": 0.3}


def grow(source: Path, out: Path, target: dict, steps: int = STEPS, **arguments):  # noqa: F811
    return grow_checkpoint(source, out, target, method=Mask(steps), **arguments)


def load_masked(folder: Path, **arguments) -> TeleFLMMaskedForCausalLM:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **arguments)
    assert type(model) is TeleFLMMaskedForCausalLM
    return model


@pytest.fixture(scope="module")
def grouped(make_source) -> Path:  # noqa: F811
    return make_source(**GROUPED)


@pytest.fixture(scope="module")
def masked(grouped, tmp_path_factory) -> Path:
    """Every axis at once, new heads between the old ones."""
    folder = tmp_path_factory.mktemp("masked") / "out"
    grow(grouped, folder, EVERYTHING, multipliers="target")
    return folder


def test_parts_of_a_masked_run_become_a_masked_checkpoint(masked, tmp_path):
    """Of FSDP, whose configuration is that of the model at its step; as a plain one it would be another model."""
    model = load_masked(masked)
    model.set_mask_step(37)
    with pytest.warns(UserWarning, match="single process"):
        dcp.save(
            {f"model.{name}": tensor for name, tensor in model.state_dict().items()}, checkpoint_id=tmp_path / "run"
        )
    model.config.save_pretrained(tmp_path / "run")
    convert_checkpoint(tmp_path / "run", tmp_path / "out")
    back = load_masked(tmp_path / "out", dtype=torch.float64)
    assert (back.mask_step, back.config.growth_state) == (37, model.config.growth_state)
    assert compare_logits(model, back, IDS).relative == 0


@pytest.mark.parametrize(
    ("fields", "target"),
    [
        pytest.param({}, {"hidden_size": 40, "num_attention_heads": 5}, id="hidden and heads"),
        pytest.param({}, {"intermediate_size": 110}, id="ffn"),
        pytest.param({}, {"num_hidden_layers": 5}, id="layers"),
        pytest.param({}, ALL_AXES, id="everything"),
        pytest.param(GROUPED, EVERYTHING, id="everything, GQA 8/2 to 12/3"),
        pytest.param(GROUPED, heads(10, 2), id="GQA 8/2 to 10/2"),
        pytest.param(GROUPED, heads(16, 8), id="GQA 8/2 to 16/8"),
        pytest.param(heads(6, 2), heads(10, 5), id="GQA 6/2 to 10/5: groups of 3 over groups of 2"),
        pytest.param(TIED, {"vocab_size": 704, "num_hidden_layers": 4, "intermediate_size": 96}, id="tied"),
    ],
)
def test_a_fold_is_the_masked_model(fields, target, make_source, tmp_path):  # noqa: F811
    source = make_source(**fields)  # noqa: F811
    grow(source, tmp_path / "masked", target)
    model = load_masked(tmp_path / "masked")
    assert compare_logits(load(source), model, IDS).relative < 1e-12
    for step in (0, 1, 50, 100):
        model.set_mask_step(step)
        fold_masks(tmp_path / "masked", tmp_path / str(step), alpha=step / STEPS)
        assert compare_logits(load(tmp_path / str(step)), model, IDS).relative < 1e-12
    assert compare_logits(load(source), model, IDS).relative > 0.1  # at full strength, random weights are heard


def test_what_is_written(grouped, masked, tmp_path):
    """Old entries are the source's own, norms too; at alpha = 1 a fold changes nothing but the configuration."""
    config = json.loads((masked / "config.json").read_bytes())
    assert config["model_type"] == "TeleFLMMasked"
    assert config["rms_norm_eps"] is None
    assert config["growth_state"] == {
        "step": 0,
        "total_steps": STEPS,
        "schedule": "linear",
        "hidden_size": 64,
        "intermediate_size": 88,
        "rms_norm_eps": 1e-5,
        "new_heads": [8, 9, 10, 11],
        "new_layers": [2, 4],
    }
    old, new = load_file(grouped / "model.safetensors"), load_file(masked / "model.safetensors")
    for name, origin in (("layers.3.mlp.down_proj", 2), ("layers.4.self_attn.o_proj", 2), ("norm", None)):
        before = old[f"model.{name}.weight" if origin is None else f"model.layers.{origin}.{name[9:]}.weight"]
        after = new[f"model.{name}.weight"]
        assert torch.equal(after[tuple(map(slice, before.shape))], before)
        assert after.count_nonzero() == after.numel()
    fold_masks(masked, tmp_path / "one", alpha=1.0)
    folded = load_file(tmp_path / "one/model.safetensors")
    assert all(torch.equal(folded[name], new[name]) for name in new)
    plain = json.loads((tmp_path / "one/config.json").read_bytes())
    assert "growth_state" not in plain
    assert (plain["model_type"], plain["rms_norm_eps"]) == ("TeleFLM", 1e-5)
    assert not (tmp_path / "one/masked_teleflm.py").exists()
    card = (tmp_path / "one/README.md").read_text()
    heard = (
        "Growth masks folded into the weights at alpha 1, where what was added is heard: another function than before"
    )
    assert heard in card
    assert "`import growth.training.masks`" in (masked / "README.md").read_text()


def test_new_heads_of_larger_groups_lie_between_the_old_ones(grouped, tmp_path):
    grow(grouped, tmp_path / "out", heads(10, 2))
    assert load_masked(tmp_path / "out").config.growth_state["new_heads"] == [4, 9]


# Mutants: one forgotten mask, one norm that divides by D.


def _masks(model: TeleFLMMaskedForCausalLM) -> dict[str, TeleFLMGrowthMask]:
    """Those that multiply; the masks of norms only count."""
    modules = {name: module for name, module in model.named_modules() if isinstance(module, TeleFLMGrowthMask)}
    return {name: mask for name, mask in modules.items() if "norm" not in name}


@pytest.mark.slow
def test_every_forgotten_mask_and_every_wrong_norm_is_caught(masked, tmp_path):
    fold_masks(masked, tmp_path / "out", alpha=0.5)
    oracle, model = load(tmp_path / "out"), load_masked(masked)
    model.set_mask_step(50)
    assert compare_logits(oracle, model, IDS).relative < 1e-12
    assert len(_masks(model)) == 1 + 5 * 4
    for mask in _masks(model).values():
        power = mask.power.clone()
        assert power.any()
        mask.power.zero_()
        assert compare_logits(oracle, model, IDS).relative > 1e-6
        mask.power.copy_(power)
    for norm in (module for module in model.modules() if isinstance(module, TeleFLMMaskedRMSNorm)):
        features, norm.old_features = norm.old_features, 96
        assert compare_logits(oracle, model, IDS).relative > 1e-6
        norm.old_features = features
    assert compare_logits(oracle, model, IDS).relative < 1e-12


@pytest.mark.parametrize("kind", ["embed_tokens", "o_proj", "down_proj", "new layers", "norm"])
def test_every_forgotten_factor_of_the_fold_is_caught(kind, masked, tmp_path, monkeypatch):
    powers, weigh = folding.mask_powers, folding._fold_weight

    def forgetful(weight, architecture, state, *, is_new_layer):
        found = powers(weight, architecture, state, is_new_layer=is_new_layer and kind != "new layers")
        return None if kind in weight.name else found

    def without_share(name, weight, layer, view, architecture, state, alpha, share, dtype):
        return weigh(name, weight, layer, view, architecture, state, alpha, 1.0, dtype)

    if kind == "norm":
        monkeypatch.setattr(folding, "_fold_weight", without_share)
    else:
        monkeypatch.setattr(folding, "mask_powers", forgetful)
    fold_masks(masked, tmp_path / "out", alpha=0.5)
    model = load_masked(masked)
    model.set_mask_step(50)
    assert compare_logits(load(tmp_path / "out"), model, IDS).relative > 1e-6


# The new weights learn from the first step on, and not at alpha = 0.


@pytest.mark.parametrize("step", [0, 1])
def test_gradients(step, source, tmp_path):  # noqa: F811
    target = {"hidden_size": 40, "num_attention_heads": 5, "intermediate_size": 110, "num_hidden_layers": 4}
    grow(source, tmp_path / "out", target, steps=5000, layers="1")
    model = load_masked(tmp_path / "out")
    model.set_mask_step(step)
    model(IDS, labels=IDS).loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    new = new_entries(Architecture.from_config(json.loads((source / "config.json").read_bytes())), gradients)
    new |= {name: gradient for name, gradient in gradients.items() if "layers.2." in name}  # the copy of layer 1
    used = torch.zeros(640, dtype=torch.bool)
    used[IDS[:, :-1].unique()] = True
    for name, gradient in new.items():
        entries = gradient.reshape(640, -1)[used] if "embed_tokens" in name else gradient
        assert entries.numel() > 0
        assert (entries != 0).all() if step else not entries.any(), name


# Alpha is a tensor of the model's, and lives in its configuration.


@pytest.mark.parametrize("arguments", [{}, {"dtype": torch.bfloat16}, {"device_map": "cpu"}], ids=str)
def test_alpha_survives_saving_loading_and_casts(arguments, masked, tmp_path):
    """Loading makes the model on the meta device; bfloat16 has no 4999 / 5000."""
    model = load_masked(masked)
    model.set_mask_step(99)
    assert model.mask_alpha == 0.99
    model.save_pretrained(tmp_path / "out")
    again = load_masked(tmp_path / "out", **arguments)
    assert again.mask_step == 99
    for name, mask in model.named_modules():
        if isinstance(mask, TeleFLMGrowthMask):
            other = again.get_submodule(name)
            assert torch.equal(other.step, mask.step)
            assert torch.equal(other.power, mask.power)
            assert other.alpha(torch.float64) == 0.99
    assert not any("mask" in name for name in load_file(tmp_path / "out/model.safetensors"))
    if not arguments:
        assert torch.equal(again(IDS).logits, model(IDS).logits)
        fold_masks(tmp_path / "out", tmp_path / "plain")  # alpha is the checkpoint's own
        assert compare_logits(load(tmp_path / "plain"), model, IDS).relative < 1e-12


@pytest.mark.slow
def test_steps_do_not_recompile(masked):
    model = load_masked(masked)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        compiled(IDS, use_cache=False)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for step in (1, 2, 50, 100):
                model.set_mask_step(step)
                logits = compiled(IDS, use_cache=False).logits
                torch.testing.assert_close(logits, model(IDS, use_cache=False).logits, rtol=1e-10, atol=1e-12)


# Who knows no masks must not load it.


@pytest.mark.parametrize("stock", [TeleFLMForCausalLM, LlamaForCausalLM])
def test_stock_classes_refuse(stock, masked):
    with pytest.raises(Exception, match="rms_norm_eps"):
        stock.from_pretrained(masked)


@pytest.mark.slow
def test_without_this_package_only_the_code_of_the_folder_loads_it(masked, tmp_path):
    script = f"""if True:
        import torch, modeling_teleflm
        from transformers import AutoModelForCausalLM
        try:
            AutoModelForCausalLM.from_pretrained({str(masked)!r}, trust_remote_code=False)
        except ValueError as error:
            assert "trust_remote_code" in str(error) or "TeleFLMMasked" in str(error), error
        else:
            raise AssertionError("it loaded")
        model = AutoModelForCausalLM.from_pretrained({str(masked)!r}, trust_remote_code=True)
        assert type(model).__name__ == "TeleFLMMaskedForCausalLM"
        model.set_mask_step(7)
        model.save_pretrained({str(tmp_path / "out")!r})
    """
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=120, stdin=subprocess.DEVNULL)
    assert load_masked(tmp_path / "out").mask_step == 7


def test_the_command(masked, tmp_path):
    """Also that folding needs no torch."""
    script = f"""if True:
        import sys, teleflm.app
        sys.argv = ["teleflm", "fold", {str(masked)!r}, {str(tmp_path / "out")!r}, "--alpha", "0.25"]
        try:
            teleflm.app.main()
        except SystemExit as stop:
            assert stop.code == 0, stop.code
        assert not {{"torch", "transformers"}} & sys.modules.keys()
    """
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "Masks at alpha 0.25" in result.stdout
    assert json.loads((tmp_path / "out/teleflm_manifest.json").read_bytes())["lineage"]["alpha"] == 0.25


# Training raises the masks.


class Recorder(TrainerCallback):
    def __init__(self):
        self.alphas = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.alphas.append(model.mask_alpha)
        assert model.model.norm.mask.alpha(torch.float64) == model.mask_alpha


def train(model, folder: Path, steps: int, resume: str | None = None, **arguments) -> list[float]:
    recorder = Recorder()
    fields = {"max_steps": steps, "save_steps": 2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    args = TrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, learning_rate=1e-4, **{**fields, **arguments}
    )
    rows = [{"input_ids": row[:16], "labels": row[:16]} for row in IDS.repeat(8, 1)]
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[MaskCallback(), recorder])
    trainer.train(resume_from_checkpoint=resume)
    return recorder.alphas


@pytest.mark.slow
def test_the_callback_follows_the_steps_and_resumes(masked, tmp_path):
    def fresh(folder: Path = masked) -> TeleFLMMaskedForCausalLM:
        return load_masked(folder, dtype=torch.float32)

    expected = [step / STEPS for step in range(1, 7)]
    assert train(fresh(), tmp_path / "run", 6) == expected
    middle, last = tmp_path / "run/checkpoint-4", tmp_path / "run/checkpoint-6"
    assert json.loads((middle / "config.json").read_bytes())["growth_state"]["step"] == 4
    # Resumed into the model that the run began with, into one loaded from the checkpoint, and a run of its own.
    assert train(fresh(), tmp_path / "run", 6, resume=str(middle)) == expected[4:]
    assert train(fresh(middle), tmp_path / "run", 6, resume=str(middle)) == expected[4:]
    assert train(fresh(last), tmp_path / "next", 2) == [0.07, 0.08]


def test_the_callback_needs_a_masked_model(source, tmp_path):  # noqa: F811
    with pytest.raises(TypeError, match="TeleFLMForCausalLM; MaskCallback needs a TeleFLMMaskedForCausalLM"):
        train(load(source, torch.float32), tmp_path / "run", 1)


# Notes and refusals.


@pytest.mark.parametrize(("steps", "warned"), [(1999, True), (2000, False)])
def test_short_schedules_are_warned_of(steps, warned, source, tmp_path):  # noqa: F811
    notes = grow(source, tmp_path / "out", {"num_hidden_layers": 4}, steps, dry_run=True).notes
    assert any("is short" in note for note in notes) is warned
    assert any("no optimizer state" in note.lower() for note in notes)


@pytest.mark.parametrize("damage", [{"step": -1}, {"total_steps": 0}, {"schedule": "cosine"}, {"new_layers": [5]}])
def test_damaged_states_are_refused_by_model_and_fold(damage, masked, tmp_path):
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in masked.glob("*.safetensors"):
        (folder / file.name).symlink_to(file)
    config = json.loads((masked / "config.json").read_bytes())
    config["growth_state"] |= damage
    (folder / "config.json").write_text(json.dumps(config))
    name = next(iter(damage))
    with pytest.raises(CheckpointError, match=f"growth_state.*{name}"):
        fold_masks(folder, tmp_path / "out")
    with pytest.raises(Exception, match=rf"growth_state: .*{name.removeprefix('total_')}"):
        load_masked(folder)
    assert not (tmp_path / "out").exists()


def test_refusals(source, masked, tmp_path):  # noqa: F811
    with pytest.raises(CheckpointError, match=r"alpha is 1\.5, expected a number from 0 to 1"):
        fold_masks(masked, tmp_path / "out", alpha=1.5)
    with pytest.raises(CheckpointError, match="model_type is 'TeleFLM', expected 'TeleFLMMasked'"):
        fold_masks(source, tmp_path / "out")
    with pytest.raises(CheckpointError, match="model_type is 'TeleFLMMasked'; `teleflm fold` it first"):
        grow_checkpoint(masked, tmp_path / "out", {"num_hidden_layers": 6})
    with pytest.raises(CheckpointError, match="mask_steps is 0, expected at least 1"):
        grow(source, tmp_path / "out", {"num_hidden_layers": 4}, steps=0)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_tensor_parallel_masks_are_those_of_one_process(make_source, tmp_path):  # noqa: F811
    """Heads and neurons in two halves, on real processes: logits and gradients, with autograd and without."""
    everything = tmp_path / "everything"
    grow(make_source(), everything, {**ALL_AXES, **heads(6, 6)}, steps=5)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = subprocess.run(
        [*torchrun, "-m", "tests.growth.tensor_parallel_worker", everything],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    model, ids = load_masked(everything, dtype=torch.float32), torch.arange(40)[None]
    found = torch.load(everything / "found.pt")
    assert found["sharded"] == [name for name in dict(model.named_parameters()) if "norm" not in name]
    for step in (3, 5):
        model.set_mask_step(step)
        with torch.no_grad():
            torch.testing.assert_close(found[f"logits {step}"], model(ids).logits, rtol=1e-4, atol=1e-5)
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[f"gradients {step}"][name], parameter.grad, rtol=1e-4, atol=1e-6)

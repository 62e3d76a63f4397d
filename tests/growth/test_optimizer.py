# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Adam's moments grow as the gradients do.

The oracle is autograd: with beta1 = beta2 = 0 the moments of torch's AdamW are the gradient and its square, so those of
the grown state must be the gradient of the grown model and its square, wherever an entry of the source went.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments
from typer.testing import CliRunner

import conversion.checkpoint.finish as finishing
import growth.moments as growing
from conversion import convert_checkpoint, export_checkpoint
from conversion.architecture import Architecture
from conversion.checkpoint.errors import CheckpointError, CorruptData
from conversion.checkpoint.execute import WriteOptions
from conversion.checkpoint.manifest import MANIFEST, read_manifest
from conversion.checkpoint.sources import open_checkpoint
from conversion.hub.saved_model import record_saved_model
from conversion.inspect import inspect_checkpoint
from conversion.optimizer_state import parameter_names
from growth import grow_checkpoint
from growth.fold import fold_masks
from growth.method import Mask, Tile, Zero
from growth.moments import read_adam_state, read_grown_state
from growth.training.grown_adam import check_adam_state, find_grown_state, load_adam_state
from growth.training.mup import parameter_groups
from modeling_teleflm import TeleFLMForCausalLM
from teleflm.app import app
from tests.growth.test_growth import (  # noqa: F401
    ALL_AXES,
    GROUPED,
    IDS,
    heads,
    load,
    make_source,
    one_thread,
    source,
)

TARGET = {**ALL_AXES, "output_mult": 0.3}


def trainer_groups(model: torch.nn.Module) -> list[dict]:
    """The groups of transformers' Trainer, which leave norms without decay."""
    norms = [parameter for name, parameter in model.named_parameters() if "norm" in name]
    matrices = [parameter for name, parameter in model.named_parameters() if "norm" not in name]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]


def mup_groups(model: torch.nn.Module) -> list[dict]:
    return parameter_groups(model, learning_rate=1e-3, weight_decay=0.1, width_ratio=2.0)


def one_group(model: torch.nn.Module) -> list[dict]:
    return [{"params": list(model.parameters())}]


def gradients(model: TeleFLMForCausalLM, vocab_size: int = 640) -> dict[str, torch.Tensor]:
    """Of a loss that only sees the old vocabulary."""
    logits = model(IDS).logits[..., :vocab_size]
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def save_state(folder: Path, path: Path, groups=trainer_groups, betas=(0.0, 0.0)) -> None:
    model = load(folder)
    optimizer = torch.optim.AdamW(groups(model), lr=1e-3, betas=betas)
    gradients(model)
    optimizer.step()
    torch.save(optimizer.state_dict(), path)


def by_name(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    saved = torch.load(path, weights_only=True)
    groups = saved["param_groups"]
    return {name: saved["state"][i] for g in groups for name, i in zip(g["param_names"], g["params"], strict=True)}


@pytest.mark.parametrize("groups", [trainer_groups, mup_groups, one_group])
@pytest.mark.parametrize(
    ("fields", "target", "arguments"),
    [
        pytest.param({}, TARGET, {}, id="zero"),
        pytest.param(GROUPED, {**heads(12, 3), "num_hidden_layers": 5}, {}, id="zero, GQA 8/2 to 12/3"),
        pytest.param({}, {**TARGET, **heads(8, 8)}, {"method": Tile(0.0)}, id="tile"),
        pytest.param(GROUPED, {**heads(16, 4), "intermediate_size": 264}, {"method": Tile(0.0)}, id="x 2, x 3"),
    ],
)
def test_moments_are_the_gradient_of_the_grown_model(fields, target, arguments, groups, make_source, tmp_path):  # noqa: F811
    source = make_source(**fields)  # noqa: F811
    save_state(source, tmp_path / "optimizer.pt", groups)
    result = grow_checkpoint(source, tmp_path / "out", target, optimizer=tmp_path, multipliers="target", **arguments)
    assert any("after 1 steps" in note for note in result.notes)
    copies = {index for index, origin in enumerate(result.growth.layers) if origin.is_copy}
    check_moments(tmp_path / "out", copies)


def check_moments(folder: Path, copies: set[int]) -> None:
    """Compare the moments of a grown checkpoint with its gradients."""
    grown, model = by_name(folder / "optimizer.pt"), load(folder)
    expected = gradients(model)
    assert list(expected) == sorted(grown, key=list(expected).index)
    for name, state in grown.items():
        m, v = state["exp_avg"], state["exp_avg_sq"]
        assert m.dtype == v.dtype == torch.float32
        assert m.shape == expected[name].shape
        assert state["step"] == 1
        is_copy = name.startswith("model.layers.") and int(name.split(".")[2]) in copies
        old = m != 0
        if is_copy:
            assert not old.any()
            assert (v == v.flatten()[0]).all()
        else:
            assert old.any()
            scale = expected[name].abs().max().item()
            torch.testing.assert_close(m[old].double(), expected[name][old], rtol=1e-5, atol=1e-6 * scale)
            torch.testing.assert_close(v[old].double(), expected[name][old] ** 2, rtol=1e-5, atol=1e-6 * scale**2)
        mean = expected[name].square()
        if "embed" not in name and not is_copy and (~old).any():  # rows of tokens that do not occur are old and zero
            assert (v[~old] == v[~old][0]).all()
            torch.testing.assert_close(v[~old][0].double(), mean[old].mean(), rtol=1e-5, atol=0)


def _no_factor(monkeypatch):
    monkeypatch.setattr(growing, "gradient_factor", lambda *args: 1.0)


def _inverse_factor(monkeypatch):
    factor = growing.gradient_factor
    monkeypatch.setattr(growing, "gradient_factor", lambda *args: 1.0 / factor(*args))


def _copies_do_not_share(monkeypatch):
    def factor(weight, plan, growth):
        return 1.0 / next(piece.scale for piece in plan.pieces if hasattr(piece, "scale"))

    monkeypatch.setattr(growing, "gradient_factor", factor)


def _new_entries_at_zero(monkeypatch):
    moment = growing._moment
    monkeypatch.setattr(growing, "_moment", lambda plan, factor, rest, **kw: moment(plan, factor, 0.0, **kw))


def _additional_layers_as_copies(monkeypatch):
    moment = growing._moment
    monkeypatch.setattr(growing, "_moment", lambda *args, is_new: moment(*args, is_new=False))


@pytest.mark.parametrize(
    ("mutant", "method"),
    [
        (_no_factor, Zero()),
        (_no_factor, Tile(0.0)),
        (_inverse_factor, Zero()),
        (_copies_do_not_share, Tile(0.0)),
        (_new_entries_at_zero, Zero()),
        (_additional_layers_as_copies, Zero()),
    ],
)
def test_mutants_are_caught(mutant, method, source, tmp_path, monkeypatch):  # noqa: F811
    save_state(source, tmp_path / "optimizer.pt")
    mutant(monkeypatch)
    target = {**TARGET, **heads(8, 8)}
    result = grow_checkpoint(
        source,
        tmp_path / "out",
        target,
        optimizer=tmp_path,
        method=method,
        multipliers="target",
    )
    with pytest.raises(AssertionError):
        check_moments(tmp_path / "out", {i for i, origin in enumerate(result.growth.layers) if origin.is_copy})


def test_every_old_entry_is_carried(source, tmp_path):  # noqa: F811
    """A second oracle, by hand: where each old block is, and its factor."""
    save_state(source, tmp_path / "optimizer.pt")
    result = grow_checkpoint(source, tmp_path / "out", TARGET, optimizer=tmp_path, multipliers="target")
    model = load(source)
    before = gradients(model)
    after = by_name(tmp_path / "out/optimizer.pt")
    originals = [i for i, origin in enumerate(result.growth.layers) if not origin.is_copy]
    s, head, embed = (32 / 40) ** 0.5, (0.5 / 4) / (0.3 / 5), 2.5
    for name, g in before.items():
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(originals[int(parts[2])])
        c = s if "norm" in name else head if "lm_head" in name else embed if "embed" in name else 1.0
        state = after[".".join(parts)]
        kept = tuple(map(slice, g.shape))
        torch.testing.assert_close(state["exp_avg"][kept].double(), g / c, rtol=1e-6, atol=0)
        torch.testing.assert_close(state["exp_avg_sq"][kept].double(), (g / c) ** 2, rtol=1e-6, atol=0)
        rest = torch.ones(state["exp_avg"].shape, dtype=torch.bool)
        rest[kept] = False
        assert not state["exp_avg"][rest].any()
        mean = ((g / c) ** 2).mean()
        torch.testing.assert_close(state["exp_avg_sq"][rest].double(), mean.expand(int(rest.sum())), rtol=1e-6, atol=0)


def test_key_value_copies_share_the_gradient(make_source, tmp_path):  # noqa: F811
    """Each copy serves some of the queries; what is known is that their gradients add up to the old one."""
    source = make_source(**GROUPED)  # noqa: F811
    save_state(source, tmp_path / "optimizer.pt")
    grow_checkpoint(source, tmp_path / "out", heads(8, 4), optimizer=tmp_path)
    name = "model.layers.1.self_attn.k_proj.weight"
    m = by_name(tmp_path / "out/optimizer.pt")[name]["exp_avg"].double()
    truth = gradients(load(tmp_path / "out"))[name]
    torch.testing.assert_close(m.view(2, 2, 8, -1).sum(1), truth.view(2, 2, 8, -1).sum(1), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("betas", "grown", "zeroed"), [((0.9, 0.95), 0.10, 0.45), ((0.9, 0.999), 0.10, 3.16)], ids=["0.95", "0.999"]
)
@pytest.mark.parametrize("with_v", [True, False], ids=["v = mean", "v = 0"])
def test_the_first_update_of_new_entries(with_v, betas, grown, zeroed, source, tmp_path):  # noqa: F811
    """In units of the learning rate, at a gradient of the usual size and a step counter that goes on.

    A mean of v that starts at zero would make it several times the learning rate.
    """
    save_state(source, tmp_path / "optimizer.pt", betas=betas)
    saved = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    for state in saved["state"].values():
        state["step"].fill_(100_000)
    torch.save(saved, tmp_path / "optimizer.pt")
    grow_checkpoint(source, tmp_path / "out", {"intermediate_size": 110}, optimizer=tmp_path)
    model = load(tmp_path / "out")
    optimizer = torch.optim.AdamW(trainer_groups(model), lr=1e-3, betas=betas, eps=0.0, weight_decay=0.0)
    load_adam_state(optimizer, model, tmp_path / "out/optimizer.pt")
    parameter = model.model.layers[1].mlp.gate_proj.weight
    usual = optimizer.state[parameter]["exp_avg_sq"][-1, -1].sqrt().item()
    if not with_v:
        optimizer.state[parameter]["exp_avg_sq"][88:] = 0
    before = parameter.detach().clone()
    parameter.grad = torch.full_like(parameter, usual)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    optimizer.step()
    update = (before - parameter.detach())[88:] / 1e-3
    torch.testing.assert_close(update, torch.full_like(update, grown if with_v else zeroed), rtol=0.02, atol=0)


@pytest.fixture(scope="module")
def trained(make_source, tmp_path_factory) -> tuple[Path, Path]:  # noqa: F811
    """A source and a checkpoint of its training by transformers' own Trainer."""
    source = make_source(torch.float32)  # noqa: F811
    return source, run(load(source), tmp_path_factory.mktemp("run")) / "checkpoint-3"


def run(model, folder: Path, trainer_class=Trainer, **arguments) -> Path:
    args = TrainingArguments(
        str(folder),
        max_steps=3,
        save_steps=3,
        learning_rate=1e-3,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        lr_scheduler_type="constant",
        per_device_train_batch_size=2,
    )
    rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]
    trainer_class(model, args, train_dataset=rows, **arguments).train()
    return folder


@pytest.mark.slow
def test_from_one_trainer_to_the_next(trained, tmp_path):
    folder, checkpoint = trained
    grow_checkpoint(folder, tmp_path / "out", ALL_AXES, optimizer=checkpoint)
    model = load(tmp_path / "out")
    saved = torch.load(tmp_path / "out/optimizer.pt", weights_only=True)
    own = Trainer(model, TrainingArguments(str(tmp_path / "x"), use_cpu=True)).create_optimizer()
    own.load_state_dict(saved)
    assert [len(group["params"]) for group in own.param_groups] == [5 * 7 + 2, 5 * 2 + 1]
    other = torch.optim.AdamW(mup_groups(model), lr=1e-3)
    load_adam_state(other, model, tmp_path / "out/optimizer.pt")
    for parameter in model.parameters():
        assert other.state[parameter]["step"] == 3
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(own.state[parameter][moment], other.state[parameter][moment])
    assert other.param_groups[1]["lr"] == 5e-4  # settings are the new run's
    run(model, tmp_path / "next", optimizers=(own, None))
    assert own.state[model.lm_head.weight]["step"] == 6


def test_the_command(trained, tmp_path):
    folder, checkpoint = trained
    arguments = ["grow", folder, tmp_path / "out", "--set", "intermediate_size=96", "--optimizer", checkpoint]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0
    assert "optimizer.pt: Adam's moments after 3 steps" in result.output
    first = (tmp_path / "out/optimizer.pt").read_bytes()
    again = CliRunner().invoke(app, list(map(str, arguments)))
    assert "already done" in again.output
    assert (tmp_path / "out/optimizer.pt").read_bytes() == first
    without = CliRunner().invoke(app, [*map(str, arguments[:5]), "--dry-run"])
    assert "No optimizer state" in without.output


# Bad input: one line, before anything is written.


def _momentum(saved):
    for state in saved["state"].values():
        state["momentum_buffer"] = state.pop("exp_avg")


def _other_shape(saved):
    saved["state"][0]["exp_avg_sq"] = torch.zeros(640, 31)


def _fewer(saved):
    saved["param_groups"][1]["params"].pop()


def _lost(saved):
    del saved["state"][3]


def _integers(saved):
    saved["state"][0]["exp_avg"] = torch.zeros(640, 32, dtype=torch.int8)


def _no_number(saved):
    saved["state"][0]["step"] = "three"


def _other_names(saved):
    for group in saved["param_groups"]:
        group["param_names"] = [f"weight.{index}" for index in group["params"]]


def _amsgrad(saved):
    for state in saved["state"].values():
        state["max_exp_avg_sq"] = state["exp_avg_sq"]
    for group in saved["param_groups"]:
        group["amsgrad"] = True


def _radam(saved):
    model = [torch.nn.Parameter(torch.ones(1))]
    (settings,) = torch.optim.RAdam(model).state_dict()["param_groups"]
    for group in saved["param_groups"]:
        members = group["params"]
        group.clear()
        group.update({**settings, "params": members})


def _nothing(saved):
    saved.clear()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_momentum, r"state of model\.embed_tokens\.weight is .*momentum_buffer.*only Adam"),
        (
            _other_shape,
            r"exp_avg_sq of model\.embed_tokens\.weight has shape \(640, 31\), config\.json says \(640, 32\)",
        ),
        (_fewer, r"param_groups have \[23, 6\] parameters, the model has \[30\] or \[23, 7\] or \[2, 21, 7\]"),
        (_lost, r"state of model\.layers\.0\.self_attn\.v_proj\.weight is None"),
        (_integers, r"exp_avg of model\.embed_tokens\.weight is no tensor of floating-point numbers"),
        (_no_number, r"step of model\.embed_tokens\.weight is 'three', expected a whole number"),
        (_other_names, "param_names are not the 30 parameters of the model"),
        (_amsgrad, r"the state of model\.embed_tokens\.weight has max_exp_avg_sq, so it is of an Adam with amsgrad"),
        (_radam, r"parameter group 0 has foreach and no amsgrad, which torch's RAdam leaves"),
        (_nothing, "is no optimizer state"),
    ],
)
def test_other_states_are_refused(damage, message, trained, tmp_path):
    saved = torch.load(trained[1] / "optimizer.pt", weights_only=True)
    damage(saved)
    torch.save(saved, tmp_path / "optimizer.pt")
    with pytest.raises(CheckpointError, match=message):
        grow_checkpoint(trained[0], tmp_path / "out", ALL_AXES, optimizer=tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("settings", [{}, {"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_loading_is_as_torch_loads(dtype, settings, trained, tmp_path):
    """The next step is that of an optimizer which torch's own load_state_dict filled; the parameters in any order."""
    grow_checkpoint(trained[0], tmp_path / "out", {"intermediate_size": 96}, optimizer=trained[1])
    path = tmp_path / "out/optimizer.pt"
    models = [load(tmp_path / "out").to(dtype) for _ in range(2)]
    saved = torch.load(path, weights_only=True)
    names = [name for group in saved["param_groups"] for name in group["param_names"]]
    theirs = torch.optim.AdamW([dict(models[0].named_parameters())[name] for name in names], lr=1e-3, **settings)
    group = {**theirs.state_dict()["param_groups"][0], "params": list(range(len(names)))}
    theirs.load_state_dict({"state": saved["state"], "param_groups": [group]})
    ours = torch.optim.AdamW(list(models[1].parameters())[::-1], lr=1e-3, **settings)
    load_adam_state(ours, models[1], path)
    check_adam_state(ours, models[1], path)
    for model, optimizer in zip(models, (theirs, ours), strict=True):
        gradients(model)
        optimizer.step()
    for (name, expected), found in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(found, expected), name


def _other_value(optimizer, model):
    moment = optimizer.state[model.lm_head.weight]["exp_avg"]
    moment[0, 0] = torch.nextafter(moment[0, 0], torch.tensor(1.0))


def _other_step(optimizer, model):
    optimizer.state[model.lm_head.weight]["step"] += 1


def _swapped(optimizer, model):
    group = optimizer.param_groups[0]["params"]
    group[:] = [torch.nn.Parameter(parameter.detach().clone()) for parameter in group]


def _exchanged(optimizer, model):
    first, second = (layer.mlp.gate_proj.weight for layer in model.model.layers[:2])
    optimizer.state[first], optimizer.state[second] = optimizer.state[second], optimizer.state[first]


def _without_one(optimizer, model):
    del optimizer.state[model.model.norm.weight]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_other_value, r"moments of lm_head\.weight, of shape \(640, 32\), are not those"),
        (_other_step, r"at step 4 for lm_head\.weight, expected step 3"),
        (_swapped, r"steps a tensor of shape \(640, 32\) that is none of the model's parameters"),
        (_exchanged, r"moments of model\.layers\.0\.mlp\.gate_proj\.weight, of shape \(96, 32\), are not those"),
        (_without_one, "no moments for 1 of the 30 tensors"),
    ],
)
def test_a_state_that_was_touched_is_noticed(damage, message, trained, tmp_path):
    grow_checkpoint(trained[0], tmp_path / "out", {"intermediate_size": 96}, optimizer=trained[1])
    model = load(tmp_path / "out")
    optimizer = torch.optim.AdamW(model.parameters())
    load_adam_state(optimizer, model, tmp_path / "out/optimizer.pt")
    check_adam_state(optimizer, model, tmp_path / "out/optimizer.pt")
    damage(optimizer, model)
    with pytest.raises(CheckpointError, match=message):
        check_adam_state(optimizer, model, tmp_path / "out/optimizer.pt")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("optimizer_0", "FSDP's sharded state; only an unsharded"),
        ("latest", "DeepSpeed's state; only an unsharded"),
        ("optimizer.bin", r"FSDP's gathered state; .* save with SHARDED_STATE_DICT, of which"),
        ("nothing", r"holds no optimizer\.pt"),
    ],
)
def test_sharded_states_are_a_stated_limit(name, message, source, tmp_path):  # noqa: F811
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / name).touch()
    with pytest.raises(CheckpointError, match=message):
        grow_checkpoint(source, tmp_path / "out", ALL_AXES, optimizer=tmp_path / "state")
    assert not (tmp_path / "out").exists()


def test_a_state_through_a_link_is_not_called_weights(trained, tmp_path):
    (tmp_path / "optimizer.pt").symlink_to(trained[1] / "optimizer.pt")
    result = grow_checkpoint(trained[0], tmp_path / "out", ALL_AXES, optimizer=tmp_path, dry_run=True)
    (note,) = [note for note in result.notes if "through links" in note]
    assert note.startswith("The optimizer's state was taken through links that lead out of its folder: optimizer.pt (")


def test_a_state_of_another_model_is_not_loaded(trained, tmp_path):
    folder, checkpoint = trained
    grow_checkpoint(folder, tmp_path / "out", {"intermediate_size": 96}, optimizer=checkpoint)
    for model, message in (
        (load(folder), r"gate_proj\.weight has shape \(96, 32\), the model has \(88, 32\)"),
        (TeleFLMForCausalLM(load(folder).config), r"gate_proj\.weight has shape"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_adam_state(torch.optim.AdamW(model.parameters()), model, tmp_path / "out/optimizer.pt")
    with pytest.raises(CheckpointError, match="does not name its parameters"):
        load_adam_state(torch.optim.AdamW(model.parameters()), model, checkpoint / "optimizer.pt")


def test_moments_are_read_without_loading_them(trained):
    folder, checkpoint = trained
    architecture = Architecture.from_config(json.loads((folder / "config.json").read_bytes()))
    state = read_adam_state(checkpoint, architecture)
    assert state.steps["model.norm.weight"] == 3
    assert state.moments["lm_head.weight"][0].shape == (640, 32)
    assert state.groups[0][0]["betas"] == (0.9, 0.999)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_mult": 5.0}, "the factor on the embeddings 5, and the model 2.5, so its moments are of other weights"),
        ({"output_mult": 1.0}, "the factor on the logits 0.25, and the model 0.125"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps 1e-06, and the model 1e-05"),
    ],
)
def test_moments_beside_a_model_with_other_factors_are_none_of_this_one(change, message, source, tmp_path):  # noqa: F811
    """As of weights into which a factor was folded: sizes do not tell them apart."""
    save_state(source, tmp_path / "optimizer.pt")
    config = json.loads((source / "config.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    architecture = Architecture.from_config(config)
    with pytest.raises(CheckpointError, match=rf"optimizer\.pt: config\.json beside it has {message}"):
        read_adam_state(tmp_path, architecture)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "other"}))
    read_adam_state(tmp_path, architecture)


def test_moments_from_under_masks_are_those_of_a_fold_at_their_end_alone(source, tmp_path):  # noqa: F811
    grow_checkpoint(source, tmp_path / "masked", {"num_hidden_layers": 4}, method=Mask(8))
    path, plain = tmp_path / "masked/config.json", tmp_path / "plain"
    config = json.loads(path.read_bytes())
    config["growth_state"]["step"] = 8
    path.write_text(json.dumps(config))
    fold_masks(tmp_path / "masked", plain)
    save_state(plain, tmp_path / "masked/optimizer.pt")
    architecture = Architecture.from_config(json.loads((plain / "config.json").read_bytes()))
    read_adam_state(tmp_path / "masked", architecture)
    config["growth_state"]["step"] = 7
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"is of masks at step 7 of 8, which `teleflm fold` multiplied into"):
        read_adam_state(tmp_path / "masked", architecture)


# Whose moments lie beside the weights.


@pytest.fixture
def folder_with_moments(source, tmp_path) -> tuple[Path, Path]:  # noqa: F811
    """A growth with moments; and where its source's lie."""
    save_state(source, tmp_path / "optimizer.pt")
    grow_checkpoint(source, tmp_path / "out", TARGET, optimizer=tmp_path)
    return tmp_path / "out", tmp_path


def test_moments_of_an_earlier_growth_do_not_stay(folder_with_moments, source):  # noqa: F811
    out, moments = folder_with_moments
    assert grow_checkpoint(source, out, TARGET, optimizer=moments).written.already_done
    with pytest.raises(CheckpointError, match=r"lineage\.optimizer was '.* and is None"):
        grow_checkpoint(source, out, TARGET)
    grow_checkpoint(source, out, TARGET, options=WriteOptions(overwrite=True))
    assert not (out / "optimizer.pt").exists()


def test_other_moments_are_another_growth(folder_with_moments, source):  # noqa: F811
    out, moments = folder_with_moments
    before = (out / "optimizer.pt").read_bytes()
    state = torch.load(moments / "optimizer.pt", weights_only=True)
    for entry in state["state"].values():
        entry["exp_avg"] += 1
    torch.save(state, moments / "optimizer.pt")
    with pytest.raises(CheckpointError, match=r"the source file optimizer\.pt has changed since"):
        grow_checkpoint(source, out, TARGET, optimizer=moments)
    assert (out / "optimizer.pt").read_bytes() == before


def damaged_files(folder: Path) -> list[str]:
    return [damage.file for damage in inspect_checkpoint(folder, check=True).damages or []]


def test_the_record_describes_the_moments(folder_with_moments):
    out, _ = folder_with_moments
    entry, names = read_manifest(out)["files"]["optimizer.pt"], list(by_name(out / "optimizer.pt"))
    assert entry["bytes"] == (out / "optimizer.pt").stat().st_size
    assert not any(name.startswith("optimizer.pt") for name in read_manifest(out)["tensors"])
    for index in range(len(names)):
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert entry["tensors"].pop(f"optimizer.pt/state.{index}.{key}")["digest"]
    assert entry["tensors"] == {}
    assert damaged_files(out) == []
    assert not (out / ".teleflm").exists()


def _junk(path):
    path.write_bytes(b"junk")


def _one_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _a_byte_of_a_moment(path):  # which no sample sees: only the digest
    content = bytearray(path.read_bytes())
    content[len(content) // 2 + 1000] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [_junk, _one_byte, _a_byte_of_a_moment, Path.unlink])
def test_destroyed_moments_are_not_already_done(damage, folder_with_moments, source):  # noqa: F811
    out, moments = folder_with_moments
    damage(out / "optimizer.pt")
    assert damaged_files(out) == ["optimizer.pt"]
    if damage is not _a_byte_of_a_moment:
        state = {_junk: "has 4 bytes, expected", Path.unlink: "is missing"}.get(damage, "is not what was written there")
        with pytest.raises(CheckpointError, match=rf"out.*optimizer\.pt:? {state}.*--overwrite"):
            grow_checkpoint(source, out, TARGET, optimizer=moments)
    if damage is Path.unlink:
        with pytest.raises(CheckpointError, match="is missing, and the folder's record says"):
            find_grown_state(out)
    options = WriteOptions(overwrite=True)
    if damage is not _a_byte_of_a_moment:
        assert not grow_checkpoint(source, out, TARGET, optimizer=moments, options=options).written.already_done
        assert damaged_files(out) == []
        assert by_name(out / "optimizer.pt")


@pytest.mark.parametrize("field", ["bytes", "sha256", "samples"])
def test_an_edited_record_of_moments_is_noticed(field, folder_with_moments, source):  # noqa: F811
    out, moments = folder_with_moments
    record = read_manifest(out)
    record["files"]["optimizer.pt"][field] = "0"
    (out / MANIFEST).write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"optimizer\.pt"):
        grow_checkpoint(source, out, TARGET, optimizer=moments)


LIMITED = """
import resource, sys
from teleflm.app import app
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
app()
"""


@pytest.mark.slow
@pytest.mark.parametrize("room", [-0.6, 0.05, 0.999], ids=str)
def test_a_full_disk_under_the_moments(room, folder_with_moments, source, tmp_path):  # noqa: F811
    """Torch says it with an error of its own, from other places: while it writes, and while it closes the file."""
    out = tmp_path / "full"
    whole, moments = folder_with_moments
    arguments = ["grow", source, out, "--dtype", "bfloat16", "--optimizer", moments]
    arguments += [text for key, value in ALL_AXES.items() for text in ("--set", f"{key}={value}")]
    least, most = (whole / "model.safetensors").stat().st_size // 4, (whole / "optimizer.pt").stat().st_size
    limit = int(least + (most - least) * room) if room > 0 else int(-room * least)
    command = [sys.executable, "-c", LIMITED.format(limit=limit), *map(str, arguments)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 1, found.stderr
    assert "Traceback" not in found.stderr
    file = "optimizer.pt" if room > 0 else "model.safetensors"
    assert re.search(rf"teleflm: .*{file}.*: File too large", " ".join(found.stderr.split()))
    with pytest.raises(CheckpointError):
        open_checkpoint(out)
    assert CliRunner().invoke(app, list(map(str, arguments))).exit_code == 0
    assert damaged_files(out) == []


@pytest.mark.parametrize(
    ("step", "call", "when"),
    [
        ("write_small_files", 1, "before"),
        ("write_small_files", 1, "after"),
        ("_name_shard", 1, "before"),
        ("_name_shard", 1, "after"),
        ("_name_shard", 2, "after"),
    ],
)
def test_a_kill_leaves_no_weights_without_their_moments(step, call, when, source, tmp_path, monkeypatch):  # noqa: F811
    """At each step of what makes a folder loadable; and what was written is not written again."""
    save_state(source, tmp_path / "optimizer.pt")
    real, out, calls = getattr(finishing, step), tmp_path / "out", []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) < call or when == "after":
            real(*arguments)
        if len(calls) == call:
            raise SystemExit

    monkeypatch.setattr(finishing, step, killed)
    with pytest.raises(SystemExit):
        grow_checkpoint(source, out, TARGET, optimizer=tmp_path)
    assert (out / "model.safetensors").exists() == ((step, call) == ("_name_shard", 2))
    assert (out / "optimizer.pt").exists() == ((step, when) == ("_name_shard", "after"))
    before = next(out.glob("optimizer.pt*")).stat()
    monkeypatch.undo()
    grow_checkpoint(source, out, TARGET, optimizer=tmp_path)
    after = (out / "optimizer.pt").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert damaged_files(out) == []
    assert by_name(out / "optimizer.pt")
    assert grow_checkpoint(source, out, TARGET, optimizer=tmp_path).written.already_done


def test_moments_put_there_while_it_ran_are_not_replaced(source, tmp_path, monkeypatch):  # noqa: F811
    save_state(source, tmp_path / "optimizer.pt")
    real = finishing.write_small_files

    def put(*arguments):
        (tmp_path / "out/optimizer.pt").write_text("mine")
        real(*arguments)

    monkeypatch.setattr(finishing, "write_small_files", put)
    with pytest.raises(CheckpointError, match=r"out/optimizer\.pt"):
        grow_checkpoint(source, tmp_path / "out", TARGET, optimizer=tmp_path)
    assert (tmp_path / "out/optimizer.pt").read_text() == "mine"
    assert not (tmp_path / "out/model.safetensors").exists()


def test_moments_that_change_while_they_grow(source, tmp_path, monkeypatch):  # noqa: F811
    save_state(source, tmp_path / "optimizer.pt")
    save_state(source, tmp_path / "other.pt", betas=(0.5, 0.5))

    def change(nbytes, total):
        if nbytes and (tmp_path / "other.pt").exists():
            (tmp_path / "other.pt").replace(tmp_path / "optimizer.pt")

    options = WriteOptions(progress=change, workers=1)
    with pytest.raises(CorruptData, match=r"while it was written, the source file optimizer\.pt has changed"):
        grow_checkpoint(source, tmp_path / "out", TARGET, optimizer=tmp_path, options=options)
    assert not (tmp_path / "out/model.safetensors").exists()


@pytest.mark.parametrize("write", [grow_checkpoint, lambda folder, out, _, **kw: convert_checkpoint(folder, out, **kw)])
def test_overwriting_leaves_a_users_own_moments(write, source, tmp_path):  # noqa: F811
    """They are named, the check names them, and training refuses them."""
    out, options = tmp_path / "out", WriteOptions(overwrite=True)
    out.mkdir()
    (out / "optimizer.pt").write_text("mine")
    for dry_run in (True, False):
        notes = write(source, out, TARGET, options=options, dry_run=dry_run).notes
        assert [note for note in notes if re.search(r"out/optimizer\.pt is not of this .* stays", note)]
        assert (out / "optimizer.pt").read_text() == "mine"
    assert damaged_files(out) == ["optimizer.pt"]
    with pytest.raises(CheckpointError, match="this is another model's"):
        find_grown_state(out)


def test_overwriting_keeps_what_a_user_put_in_the_place_of_moments(folder_with_moments, source):  # noqa: F811
    out, moments = folder_with_moments
    (out / "optimizer.pt").write_text("mine")
    result = grow_checkpoint(source, out, {**TARGET, "vocab_size": 700}, options=WriteOptions(overwrite=True))
    assert (out / "optimizer.pt").read_text() == "mine"
    assert any("optimizer.pt is not of this" in note for note in result.notes)
    grow_checkpoint(source, out, TARGET, optimizer=moments, options=WriteOptions(overwrite=True))
    assert by_name(out / "optimizer.pt")  # written anew, which --overwrite says


@pytest.mark.parametrize("with_moments", [False, True])
def test_a_users_file_of_that_name_is_in_the_way(with_moments, source, tmp_path):  # noqa: F811
    save_state(source, tmp_path / "optimizer.pt")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/optimizer.pt").write_text("mine")
    moments = {"optimizer": tmp_path} if with_moments else {}
    with pytest.raises(CheckpointError, match=r"out/optimizer\.pt: was not written by a growth"):
        grow_checkpoint(source, tmp_path / "out", TARGET, **moments)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"optimizer.pt"}


def test_training_does_not_take_moments_that_the_record_does_not_know(folder_with_moments, source, tmp_path):  # noqa: F811
    out, _ = folder_with_moments
    assert find_grown_state(out) == out / "optimizer.pt"
    grow_checkpoint(source, tmp_path / "other", TARGET)
    shutil.copy(out / "optimizer.pt", tmp_path / "other")
    with pytest.raises(CheckpointError, match="this is another model's"):
        find_grown_state(tmp_path / "other")


# Streamed like the weights.


def _killed_after(share: float):
    """Progress that fails once so much of the output is written."""
    seen = 0

    def advance(nbytes: int, total: int) -> None:
        nonlocal seen
        seen += nbytes
        if seen > share * total:
            raise KeyboardInterrupt

    return advance


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.95])
def test_a_resumed_growth_has_the_bytes_of_one_that_was_not_interrupted(share, folder_with_moments, source, tmp_path):  # noqa: F811
    whole, moments = folder_with_moments
    options = WriteOptions(progress=_killed_after(share), workers=1)
    with pytest.raises(KeyboardInterrupt):
        grow_checkpoint(source, tmp_path / "again", TARGET, optimizer=moments, options=options)
    assert not (tmp_path / "again/model.safetensors").exists()
    grow_checkpoint(source, tmp_path / "again", TARGET, optimizer=moments)
    for name in ("model.safetensors", "optimizer.pt"):
        assert (tmp_path / "again" / name).read_bytes() == (whole / name).read_bytes()


def test_shards_and_workers_do_not_show(folder_with_moments, source, tmp_path):  # noqa: F811
    whole, moments = folder_with_moments
    options = WriteOptions(max_shard_size="100KB", workers=3)
    grow_checkpoint(source, tmp_path / "again", TARGET, optimizer=moments, options=options)
    assert (tmp_path / "again/model.safetensors.index.json").exists()
    assert (tmp_path / "again/optimizer.pt").read_bytes() == (whole / "optimizer.pt").read_bytes()
    assert damaged_files(tmp_path / "again") == []


def test_parameters_are_in_the_order_of_the_model(make_source):  # noqa: F811
    for fields in ({}, {"tie_word_embeddings": True}, GROUPED):
        folder = make_source(**fields)
        architecture = Architecture.from_config(json.loads((folder / "config.json").read_bytes()))
        assert parameter_names(architecture) == [name for name, _ in load(folder).named_parameters()]


WITHOUT_TORCH = """
import sys
from teleflm.app import app
try:
    app()
except SystemExit as end:
    assert not end.code, end.code
assert "torch" not in sys.modules
"""


def test_growing_moments_needs_no_torch(trained, tmp_path):
    command = ["grow", trained[0], tmp_path / "out", "--set", "intermediate_size=96", "--optimizer", trained[1]]
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *map(str, command)], check=True)
    assert by_name(tmp_path / "out/optimizer.pt")


def test_a_model_is_itself_without_its_moments(folder_with_moments):
    """They are as large as four such models in bfloat16, and no part of it: whoever removes them has the model."""
    out, _ = folder_with_moments
    assert not inspect_checkpoint(out).chain[-1].problems
    assert inspect_checkpoint(out, check=True, with_state=False).damages == []
    (out / "optimizer.pt").unlink()
    assert not inspect_checkpoint(out).chain[-1].problems
    assert inspect_checkpoint(out, check=True, with_state=False).damages == []


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_moments_that_are_no_numbers_are_refused(key, value, source, tmp_path):  # noqa: F811
    save_state(source, tmp_path / "optimizer.pt")
    saved = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    saved["state"][3][key][2, 1] = value
    torch.save(saved, tmp_path / "optimizer.pt")
    with pytest.raises(CheckpointError, match=rf"{key}.* is (nan|inf|NaN or infinite)"):
        grow_checkpoint(source, tmp_path / "out", TARGET, optimizer=tmp_path)
    assert not (tmp_path / "out/model.safetensors").exists()


# A state is that of its record, and of the step of the weights.


@pytest.fixture
def two_grown(make_source, tmp_path) -> tuple[Path, Path]:  # noqa: F811
    """The same weights grown with the states of two runs."""
    source = make_source()  # noqa: F811
    for name, groups in (("one", trainer_groups), ("two", mup_groups)):
        (tmp_path / name).mkdir()
        save_state(source, tmp_path / name / "optimizer.pt", groups, betas=(0.0, 0.0) if name == "one" else (0.9, 0.9))
        grow_checkpoint(source, tmp_path / f"grown {name}", TARGET, optimizer=tmp_path / name, multipliers="target")
    return tmp_path / "grown one", tmp_path / "grown two"


def test_a_state_that_was_exchanged_since_its_record_is_refused(two_grown):
    """By whoever opens it: growth, training, an export."""
    one, two = two_grown
    shutil.copy(two / "optimizer.pt", one / "optimizer.pt")
    architecture = Architecture.from_config(json.loads((one / "config.json").read_bytes()))
    refusal = r"optimizer\.pt: has (other content|\d+ bytes, expected \d+), so it is not what the record says"
    with pytest.raises(CheckpointError, match=refusal):
        read_adam_state(one, architecture)
    with pytest.raises(CheckpointError, match=refusal):
        grow_checkpoint(one, one.parent / "again", {"num_hidden_layers": 7}, optimizer=one)
    with pytest.raises(CheckpointError, match=refusal):
        export_checkpoint(one, one.parent / "dcp", to="dcp", optimizer=True)
    shapes = {name: tuple(parameter.shape) for name, parameter in load(one).named_parameters()}
    with pytest.raises(CheckpointError, match=refusal):
        read_grown_state(one / "optimizer.pt", shapes)


@pytest.mark.parametrize("where", ["the source", "the state"])
def test_weights_and_moments_of_different_steps_do_not_grow(where, make_source, tmp_path):  # noqa: F811
    """As a Trainer says of its checkpoint, beside the weights or beside the moments."""
    source, state = make_source(), tmp_path / "state"  # noqa: F811
    state.mkdir()
    save_state(source, state / "optimizer.pt")
    folder = source if where == "the source" else state
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 8}))
    with pytest.raises(CheckpointError, match=r"Adam is at step 1, .*trainer_state\.json says 8"):
        grow_checkpoint(source, tmp_path / "out", TARGET, optimizer=state, multipliers="target")
    assert not (tmp_path / "out").exists()
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 1}))
    grow_checkpoint(source, tmp_path / "out", TARGET, optimizer=state, multipliers="target")


def test_the_base_width_of_the_run_before_is_the_one_to_go_on_with(make_source, tmp_path):  # noqa: F811
    source = make_source()  # noqa: F811
    record_saved_model(
        source, {"operation": "train", "mup_base_width": 16, "steps": 8, "tokens": 64, "parent": None}, 0
    )
    notes = " ".join(grow_checkpoint(source, tmp_path / "out", TARGET, multipliers="target").notes)
    assert "--mup_base_width 16`" in notes
    assert "--mup_base_width 32" not in notes


def test_the_base_width_of_a_second_growth_is_that_of_the_last_training(source, tmp_path):  # noqa: F811
    """Which is what `continue_schedule` takes; nothing was trained at the width between the two."""
    grow_checkpoint(source, tmp_path / "wider", {"hidden_size": 40, "num_attention_heads": 5})
    wider = {"hidden_size": 48, "num_attention_heads": 6}
    again = grow_checkpoint(tmp_path / "wider", tmp_path / "again", wider, dry_run=True)
    assert "--mup_base_width 32`" in " ".join(again.notes)
    record_saved_model(tmp_path / "wider", {"operation": "fine-tune", "parent": None}, 0)
    again = grow_checkpoint(tmp_path / "wider", tmp_path / "again", wider, dry_run=True)
    assert "--mup_base_width 40`" in " ".join(again.notes)

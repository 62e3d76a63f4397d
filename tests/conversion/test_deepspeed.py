# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""DeepSpeed's checkpoints: those of the library itself, and small ones laid out by hand as its source lays them out.

The library is heavy and its runs take seconds, so its own folders are read in `make test-external`, where its own
`zero_to_fp32` says what is in them; those by hand are in `make test`, with every fault that a folder can have.
"""

import enum
import io
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file

from conversion import convert_checkpoint
from conversion.checkpoint.errors import CheckpointError
from conversion.native.checkpoint import NativeCheckpoint
from conversion.native.deepspeed import is_deepspeed, read_deepspeed
from modeling_teleflm import TeleFLMConfig
from tests.fixtures.hostile_pickles import harm_done, hostile_pickles
from tests.fixtures.sharded_tensors import holds
from tests.fixtures.tiny import tiny_config, tiny_model

WORLD = 3
TAG = "global_step7"
Tensors = Mapping[str, torch.Tensor]


class ZeroStageEnum(enum.IntEnum):
    """DeepSpeed stores the stage as a member of an enum of its own."""

    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3


def masters() -> dict[str, torch.Tensor]:
    """float32 weights of sizes that no number of ranks divides, the first one smaller than a rank's part."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "model.norm.weight": (2,),
        "model.embed_tokens.weight": (7, 5),
        "model.layers.0.mlp.up_proj.weight": (5, 3),
        "model.layers.0.input_layernorm.weight": (11,),
        "lm_head.weight": (7, 5),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def trained(tensors: Tensors) -> dict[str, torch.Tensor]:
    return {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}


def matches(found: NativeCheckpoint, expected: Tensors) -> bool:
    return found.tensors.keys() == expected.keys() and all(
        holds(found.tensors[name], tensor) for name, tensor in expected.items()
    )


# Folders by hand, after deepspeed/runtime/engine.py and runtime/zero of DeepSpeed 0.19.


def _groups(tensors: Tensors) -> list[Tensors]:
    """Two groups of parameters, as an optimizer with and without weight decay has them."""
    norms = {name: tensor for name, tensor in tensors.items() if tensor.ndim == 1}
    return [{name: tensor for name, tensor in tensors.items() if name not in norms}, norms]


def _model_states(module: Tensors, groups: list[Tensors], **more: Any) -> dict[str, Any]:
    return {
        "module": OrderedDict(module),
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [OrderedDict((name, tensor.shape) for name, tensor in group.items()) for group in groups],
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "shared_params": {},
        "global_steps": 7,
        "ds_config": {"train_batch_size": WORLD},
        "ds_version": "0.19.6",
        **more,
    }


def _write(root: Path, files: Mapping[str, Any]) -> Path:
    (root / TAG).mkdir(parents=True)
    (root / "latest").write_text(TAG)
    for name, content in files.items():
        (root / TAG / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, root / TAG / name)
    return root


def _optimizer_file(rank: int) -> str:
    return f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def _optimizer_states(stage: int, field: str, groups: list[torch.Tensor], **more: Any) -> dict[str, Any]:
    states = {"zero_stage": ZeroStageEnum(stage), "partition_count": WORLD, field: groups, "loss_scaler": object()}
    return {"optimizer_state_dict": {**states, "base_optimizer_state": {"state": {}}, **more}, "ds_version": "0.19.6"}


def zero2(root: Path, tensors: Tensors, *, module: Tensors | None = None, **more: Any) -> Path:
    """Each group flat, padded to twice the ranks and cut; the padding is stripped from the last part on saving."""
    parts: list[list[torch.Tensor]] = [[] for _ in range(WORLD)]
    for group in _groups(tensors):
        flat = torch.cat([tensor.flatten() for tensor in group.values()])
        padding = -flat.numel() % (2 * WORLD)
        cut = torch.cat([flat, torch.full((padding,), math.nan)]).chunk(WORLD)
        for rank, part in enumerate(cut):
            parts[rank].append(part[: part.numel() - padding] if rank == WORLD - 1 else part)
    states = {
        _optimizer_file(rank): _optimizer_states(
            2, "single_partition_of_fp32_groups", part, partition_count=[WORLD] * 2
        )
        for rank, part in enumerate(parts)
    }
    model = _model_states(trained(tensors) if module is None else module, _groups(tensors), **more)
    return _write(root, {"mp_rank_00_model_states.pt": model, **states})


def zero3(root: Path, tensors: Tensors, *, sub_groups: int = 1, frozen: Tensors | None = None, **more: Any) -> Path:
    """Each weight flat, padded to the ranks and cut; the parts of a rank one after the other, over its sub-groups."""

    def cut(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        padding = -tensor.numel() % WORLD
        return torch.cat([tensor.flatten(), torch.full((padding,), math.nan).to(tensor.dtype)]).chunk(WORLD)

    frozen = frozen or {}
    empty = {name: torch.empty(0, dtype=torch.bfloat16) for name in (*tensors, *frozen)}
    files: dict[str, Any] = {}
    for rank in range(WORLD):
        flat = torch.cat([cut(tensor)[rank] for group in _groups(tensors) for tensor in group.values()])
        groups = [part.clone() for part in flat.chunk(sub_groups)]
        fragments = {name: cut(tensor)[rank] for name, tensor in frozen.items()}
        shapes = {name: tensor.shape for name, tensor in frozen.items()}
        files[f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"] = _model_states(
            empty, _groups(tensors), frozen_param_shapes=shapes, frozen_param_fragments=fragments, **more
        )
        files[_optimizer_file(rank)] = _optimizer_states(3, "fp32_flat_groups", groups)
    return _write(root, files)


def universal(root: Path, tensors: Tensors, *, flat: bool) -> Path:
    """A file for each weight: after ZeRO 3 flat, and where the model states hold none."""
    files: dict[str, Any] = {
        f"zero/{name}/{state}.pt": value.flatten() if flat else {"param": value, "cat_dim": 0}
        for name, tensor in tensors.items()
        for state, value in (("fp32", tensor), ("exp_avg", tensor), ("exp_avg_sq", tensor.abs()))
    }
    module = {name: torch.empty(0, dtype=torch.bfloat16) for name in tensors} if flat else trained(tensors)
    states = _model_states(module, _groups(tensors))
    name = "zero_pp_rank_0_mp_rank_00_model_states.pt" if flat else "mp_rank_00_model_states.pt"
    return _write(root, {name: states, "zero/optimizer_state.pt": {"optimizer_state_dict": {}}, **files})


def test_zero2_has_the_weights_as_they_were_trained(tmp_path):
    root = zero2(tmp_path / "run", masters())
    for path in (root / TAG).glob("*optim_states.pt"):
        path.unlink()  # nobody needs them for that
    found = read_deepspeed(root)
    assert matches(found, trained(masters()))
    assert (found.format, found.iteration, found.dtype, found.table) == ("deepspeed", 7, None, None)
    assert found.folder == str(root / TAG)


def test_zero2_has_the_float32_weights_too(tmp_path):
    found = read_deepspeed(zero2(tmp_path / "run", masters()), fp32_master=True)
    assert matches(found, masters())
    assert found.dtype.name == "float32"
    assert found.parallel == "ZeRO 1 or 2, 3 ranks"


@pytest.mark.parametrize("sub_groups", [1, 2, 5])
def test_zero3(sub_groups, tmp_path):
    root = zero3(tmp_path / "run", masters(), sub_groups=sub_groups)
    found = read_deepspeed(root / TAG)
    assert matches(found, masters())
    assert (found.dtype.name, found.iteration) == ("bfloat16", 7)
    assert read_deepspeed(root, fp32_master=True).dtype.name == "float32"


@pytest.mark.parametrize("flat", [True, False])
def test_universal(flat, tmp_path):
    root = universal(tmp_path / "run", masters(), flat=flat)
    (root / "latest").rename(root / "latest_universal")
    assert is_deepspeed(root)
    assert matches(read_deepspeed(root, fp32_master=True), masters())
    found = read_deepspeed(root)
    assert matches(found, masters() if flat else trained(masters()))
    assert (found.dtype and found.dtype.name) == ("bfloat16" if flat else None)


@pytest.mark.parametrize(("write", "fp32_master"), [(zero2, True), (zero2, False), (zero3, False)])
def test_tied_weights_are_stored_once(write, fp32_master, tmp_path):
    tensors = masters()
    head = tensors.pop("lm_head.weight")
    module = trained({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]})
    more = {"module": module} if write is zero2 else {}
    root = write(tmp_path / "run", tensors, shared_params={"lm_head.weight": "model.embed_tokens.weight"}, **more)
    found = read_deepspeed(root, fp32_master=fp32_master)
    assert found.tensors["lm_head.weight"] == found.tensors["model.embed_tokens.weight"]
    assert not holds(found.tensors["lm_head.weight"], head)
    assert len(found.tensors) == 5


@pytest.mark.parametrize("fp32_master", [True, False])
def test_frozen_weights_have_no_master(fp32_master, tmp_path):
    tensors = masters()
    frozen = trained({name: tensors.pop(name) for name in ("model.embed_tokens.weight", "model.norm.weight")})
    found = read_deepspeed(zero3(tmp_path / "zero3", tensors, frozen=frozen), fp32_master=fp32_master)
    assert matches(found, {**tensors, **frozen})
    fragments = {"frozen_param_fragments": frozen, "frozen_param_shapes": {n: t.shape for n, t in frozen.items()}}
    root = zero2(tmp_path / "zero2", tensors, module={**trained(tensors), **frozen}, **fragments)
    expected = tensors if fp32_master else trained(tensors)
    assert matches(read_deepspeed(root, fp32_master=fp32_master), {**expected, **frozen})


def test_wrapped_names_and_buffers(tmp_path):
    tensors = {f"module.{name}": tensor for name, tensor in masters().items()}
    root = zero3(tmp_path / "run", tensors)
    for path in (root / TAG).glob("*model_states.pt"):
        states = torch.load(path, weights_only=False)
        states["module"]["module.model.rotary_emb.inv_freq"] = torch.arange(4.0)
        torch.save(states, path)
    assert matches(read_deepspeed(root), {**masters(), "model.rotary_emb.inv_freq": torch.arange(4.0)})


def test_what_is_no_deepspeed_folder(tmp_path):
    assert not is_deepspeed(tmp_path)
    (tmp_path / "latest").write_text("../elsewhere")
    (tmp_path / "pytorch_model.bin").touch()
    assert not is_deepspeed(tmp_path)
    assert is_deepspeed(zero3(tmp_path / "run", masters()))
    assert is_deepspeed(tmp_path / "run" / TAG)


@pytest.mark.parametrize(
    ("write", "fp32_master", "dtype"),
    [
        (zero3, False, torch.bfloat16),
        (zero3, True, torch.float32),
        (zero2, False, torch.bfloat16),
        (zero2, True, torch.float32),
    ],
)
def test_a_run_becomes_a_hub_folder(write, fp32_master, dtype, tmp_path):
    """Rounded as torch rounds, which is how the run itself made the weights it computed with."""
    model = tiny_model()
    root = write(tmp_path / "run", model.state_dict())
    config = model.config.to_dict()
    convert_checkpoint(root, tmp_path / "out", config=config, fp32_master=fp32_master)
    found = load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == model.state_dict().keys()
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    assert all(torch.equal(found[name], tensor.to(dtype)) for name, tensor in model.state_dict().items())


# Adam's moments.


def with_moments(root: Path, elastic: bool = False) -> Path:
    """Have every rank's optimizer keep, beside each flat tensor w of the weights, the moments 2 w and w^2."""
    paths = sorted((root / TAG).glob("*optim_states.pt"))
    longest = _flats(torch.load(paths[0], weights_only=False))
    for path in paths:
        content = torch.load(path, weights_only=False)
        state = content["optimizer_state_dict"]
        entries = []
        for flat, first in zip(_flats(content), longest, strict=True):
            padding = 0 if elastic else len(first) - len(flat)  # which ZeRO 1 and 2 strip from the weights alone
            flat = torch.cat([flat, torch.full((padding,), math.nan)])
            entries.append({"step": torch.tensor(7.0), "exp_avg": 2 * flat, "exp_avg_sq": flat**2})
        groups = [{"lr": 1e-3, "betas": (0.9, 0.95), "params": [index]} for index in range(len(entries))]
        numbered = {"state": dict(enumerate(entries)), "param_groups": groups}
        name = "optimizer_state_dict" if "fp32_flat_groups" in state else "base_optimizer_state"
        state[name] = entries if elastic else numbered
        torch.save(content, path)
    return root


def _flats(content: Any) -> list[torch.Tensor]:
    state = content["optimizer_state_dict"]
    return state.get("fp32_flat_groups") or state["single_partition_of_fp32_groups"]


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda root, tensors: with_moments(zero2(root, tensors)), id="ZeRO 2"),
        pytest.param(lambda root, tensors: with_moments(zero2(root, tensors), elastic=True), id="ZeRO 2, elastic"),
        pytest.param(lambda root, tensors: with_moments(zero3(root, tensors)), id="ZeRO 3"),
        pytest.param(lambda root, tensors: with_moments(zero3(root, tensors, sub_groups=3)), id="ZeRO 3, sub-groups"),
    ],
)
def test_moments_become_those_of_a_trainer(write, tmp_path):
    model = tiny_model()
    root = write(tmp_path / "run", model.state_dict())
    convert_checkpoint(root, tmp_path / "out", config=model.config.to_dict(), optimizer=True)
    saved = torch.load(tmp_path / "out/optimizer.pt", weights_only=True)
    names = [name for group in saved["param_groups"] for name in group["param_names"]]
    assert sorted(names) == sorted(model.state_dict())
    for index, name in enumerate(names):
        weight, state = model.state_dict()[name], saved["state"][index]
        assert torch.equal(state["exp_avg"], 2 * weight)
        assert torch.equal(state["exp_avg_sq"], weight**2)
        assert state["step"] == 7
    is_norm = [all(model.state_dict()[name].ndim == 1 for name in g["param_names"]) for g in saved["param_groups"]]
    assert is_norm == [False, True]
    parameters = [
        {"params": [model.get_parameter(name) for name in group["param_names"]]} for group in saved["param_groups"]
    ]
    torch.optim.AdamW(parameters).load_state_dict(saved)


@pytest.mark.parametrize("flat", [True, False])
def test_moments_of_a_universal_checkpoint(flat, tmp_path):
    model = tiny_model()
    root = universal(tmp_path / "run", model.state_dict(), flat=flat)
    for index, name in enumerate(model.state_dict()):
        torch.save([7, torch.tensor(7.0), 7.0][index % 3], root / TAG / "zero" / name / "step.pt")
    convert_checkpoint(root, tmp_path / "out", config=model.config.to_dict(), optimizer=True)
    saved = torch.load(tmp_path / "out/optimizer.pt", weights_only=True)
    names = [name for group in saved["param_groups"] for name in group["param_names"]]
    for index, name in enumerate(names):  # whose files hold the weights themselves
        assert torch.equal(saved["state"][index]["exp_avg"], model.state_dict()[name])
        assert saved["state"][index]["step"] == 7


def test_the_step_of_a_universal_checkpoint_that_says_it_once(tmp_path):
    model = tiny_model()
    root = universal(tmp_path / "run", model.state_dict(), flat=True)
    state = {index: {"step": torch.tensor(5.0)} for index in range(2)}
    torch.save({"optimizer_state_dict": {"state": state}}, root / TAG / "zero/optimizer_state.pt")
    assert set(read_deepspeed(root, optimizer=True).adam.steps.values()) == {5.0}
    state[1]["step"] += 1
    torch.save({"optimizer_state_dict": {"state": state}}, root / TAG / "zero/optimizer_state.pt")
    with pytest.raises(
        CheckpointError, match=r"optimizer_state\.pt: the optimizer's steps are \[5\.0, 6\.0\], expected"
    ):
        read_deepspeed(root, optimizer=True)
    torch.save({"optimizer_state_dict": {}}, root / TAG / "zero/optimizer_state.pt")
    with pytest.raises(CheckpointError, match=r"optimizer_state\.pt: does not say how many steps"):
        read_deepspeed(root, optimizer=True)


def _edit_base(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def edit(tag: Path) -> None:
        path = tag / _optimizer_file(1)
        content = torch.load(path, weights_only=False)
        change(content["optimizer_state_dict"])
        torch.save(content, path)

    return edit


def _momentum(state: Any) -> None:
    for entry in state["base_optimizer_state"]["state"].values():
        entry["momentum_buffer"] = entry.pop("exp_avg")


def _shorter(state: Any) -> None:
    entry = state["base_optimizer_state"]["state"][0]
    entry["exp_avg"] = entry["exp_avg"][:5]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_edit_base(_momentum), r"the optimizer's state is exp_avg_sq, momentum_buffer, step; only that of Adam"),
        (_edit_base(lambda state: state["base_optimizer_state"]["state"].clear()), "has no base_optimizer_state with"),
        (_edit_base(_shorter), r"param_shapes has \d+ elements in group 0, the 3 ranks hold \d+"),
        (
            lambda tag: [path.unlink() for path in tag.glob("*optim_states.pt")],
            r"no \*_optim_states\.pt, where the mom",
        ),
    ],
)
def test_moments_that_are_no_adams(damage, message, tmp_path):
    model = tiny_model()
    root = with_moments(zero2(tmp_path / "run", model.state_dict()))
    damage(root / TAG)
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(root, tmp_path / "out", config=model.config.to_dict(), optimizer=True)
    assert not (tmp_path / "out").exists()
    convert_checkpoint(root, tmp_path / "out", config=model.config.to_dict())


def test_a_weight_that_was_not_trained_has_no_moments(tmp_path):
    model = tiny_model()
    tensors = dict(model.state_dict())
    frozen = trained({"model.norm.weight": tensors.pop("model.norm.weight")})
    root = with_moments(zero3(tmp_path / "run", tensors, frozen=frozen))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has no moments, as it was not trained"):
        convert_checkpoint(root, tmp_path / "out", config=model.config.to_dict(), optimizer=True)


def test_only_runs_of_deepspeed_and_fsdp_have_an_optimizer(tmp_path):
    tiny_model().save_pretrained(tmp_path / "hub")
    with pytest.raises(CheckpointError, match="--optimizer is for checkpoints of training runs"):
        convert_checkpoint(tmp_path / "hub", tmp_path / "out", optimizer=True)


# What is refused.


def _edit(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def edit(tag: Path) -> None:
        content = torch.load(tag / name, weights_only=False)
        change(content)
        torch.save(content, tag / name)

    return edit


def _optimizer(**fields: Any) -> Callable[[Any], None]:
    return lambda content: content["optimizer_state_dict"].update(fields)


def _rename(old: str, new: str) -> Callable[[Path], None]:
    return lambda tag: (tag / old).rename(tag / new)


def _copy(old: str, new: str) -> Callable[[Path], Any]:
    return lambda tag: shutil.copy(tag / old, tag / new)


ZERO3_MODEL = "zero_pp_rank_0_mp_rank_00_model_states.pt"
ZERO2_MODEL = "mp_rank_00_model_states.pt"


@pytest.mark.parametrize(
    ("write", "damage", "message"),
    [
        (zero3, lambda t: (t / _optimizer_file(1)).unlink(), rf"3 ranks, {_optimizer_file(1)} is missing; copy"),
        (zero3, _copy(_optimizer_file(1), _optimizer_file(4)), rf"3 ranks, but {_optimizer_file(4)} is there too"),
        (zero2, lambda t: (t / _optimizer_file(0)).unlink(), "makes it 3 ranks, bf16_zero_pp_rank_0_.* is missing"),
        (zero3, lambda t: [p.unlink() for p in t.glob("*optim_states.pt")], r"holds no \*_optim_states\.pt"),
        (zero3, _copy(ZERO3_MODEL, "zero_pp_rank_0_mp_rank_01_model_states.pt"), "is of 2 tensor- or pipeline-"),
        (zero2, _rename(ZERO2_MODEL, "mp_rank_01_model_states.pt"), "is of 2 tensor- or pipeline-parallel ranks"),
        (zero2, _copy(ZERO2_MODEL, "layer_03-model_00-model_states.pt"), "layer_03-.*: is of pipeline"),
        (
            zero3,
            _edit(_optimizer_file(2), _optimizer(fp32_flat_groups=[torch.zeros(12)])),
            r"rank_2_mp_rank_00_optim_states\.pt: holds 12 elements, its part .* is 34; the files are of two runs",
        ),
        (
            zero3,
            _edit(_optimizer_file(2), _optimizer(fp32_flat_groups=[torch.zeros(17)] * 2)),
            r"rank_2_.*: has 2 groups of weights, .*rank_0_.* has 1; the files are of two runs",
        ),
        (
            zero2,
            _edit(_optimizer_file(1), _optimizer(single_partition_of_fp32_groups=[torch.zeros(90), torch.zeros(6)])),
            "param_shapes has 85 elements in group 0, the 3 ranks hold 145",
        ),
        (
            zero3,
            _edit(_optimizer_file(1), _optimizer(zero_stage=ZeroStageEnum.gradients)),
            "rank_1_.*: is of ZeRO stage 2 and has fp32_flat_groups; the model states are of stage 3",
        ),
        (
            zero2,
            _edit(_optimizer_file(0), lambda c: c["optimizer_state_dict"].pop("single_partition_of_fp32_groups")),
            "rank_0_.*: is of ZeRO stage 2 and lacks single_partition_of_fp32_groups",
        ),
        (zero2, _edit(_optimizer_file(0), _optimizer(partition_count="3")), "partition_count is '3', expected a num"),
        (zero2, _edit(_optimizer_file(0), lambda c: c.pop("optimizer_state_dict")), "has no optimizer_state_dict"),
        (
            zero2,
            _edit(ZERO2_MODEL, lambda c: c["param_shapes"].pop()),
            "has 2 groups of weights, param_shapes of .* has 1",
        ),
        (zero3, _edit(ZERO3_MODEL, lambda c: c.update(param_shapes=None)), "has no param_shapes, so that nothing says"),
        (zero2, _edit(ZERO2_MODEL, lambda c: c.update(param_shapes=[{"a": "b"}])), "param_shapes is no dict of shapes"),
        (zero2, _edit(ZERO2_MODEL, lambda c: c.update(shared_params={"a": 3})), "shared_params is no dict of names"),
        (zero2, _edit(ZERO2_MODEL, lambda c: c.update(module=None)), "module is a NoneType, expected tensors by name"),
        (
            zero2,
            _edit(ZERO2_MODEL, lambda c: c["module"].update(x=torch.zeros(2).to_sparse())),
            "x of module is a sparse tensor, expected a plain tensor",
        ),
        (
            zero2,
            _edit(ZERO2_MODEL, lambda c: c["module"].update({"module.lm_head.weight": torch.zeros(1)})),
            r"module\.lm_head\.weight is there under another name too, as lm_head\.weight",
        ),
        (zero2, _edit(ZERO2_MODEL, lambda c: None), None),
    ],
)  # fmt: skip
def test_a_folder_with_a_fault(write, damage, message, tmp_path):
    root = write(tmp_path / "run", masters())
    damage(root / TAG)
    if message is None:
        read_deepspeed(root, fp32_master=True)
        return
    with pytest.raises(CheckpointError, match=message) as refusal:
        read_deepspeed(root, fp32_master=True)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: shutil.rmtree(t / "zero/lm_head.weight"), r"lm_head\.weight/fp32\.pt cannot be read: No such file"),
        (lambda t: (t / "zero/odd").mkdir(), r"zero/odd: is no weight of .*; it would be lost"),
        (
            lambda t: torch.save(torch.zeros(3), t / "zero/lm_head.weight/fp32.pt"),
            r"lm_head\.weight has shape \(7, 5\), but the ranks hold 3 elements of it",
        ),
        (
            _edit(ZERO3_MODEL, lambda c: c["param_shapes"][0].update({"../outside": torch.Size([1])})),
            r"'\.\./outside' of param_shapes is no name of a folder",
        ),
    ],
)
def test_a_universal_folder_with_a_fault(damage, message, tmp_path):
    root = universal(tmp_path / "run", masters(), flat=True)
    damage(root / TAG)
    with pytest.raises(CheckpointError, match=message):
        read_deepspeed(root)


def test_a_lost_part_of_a_frozen_weight(tmp_path):
    tensors = masters()
    frozen = {"model.norm.weight": tensors.pop("model.norm.weight")}
    root = zero3(tmp_path / "run", tensors, frozen=frozen)
    name = "zero_pp_rank_1_mp_rank_00_model_states.pt"
    _edit(name, lambda content: content["frozen_param_fragments"].clear())(root / TAG)
    with pytest.raises(CheckpointError, match=rf"{name}: model\.norm\.weight of frozen_param_fragments is missing"):
        read_deepspeed(root)
    (root / TAG / name).unlink()
    with pytest.raises(CheckpointError, match=rf"zero_pp_rank_2_.* makes it 3 ranks, {name} is missing"):
        read_deepspeed(root)


@pytest.mark.parametrize("tag", ["global_step8", "../run/global_step7", ""])
def test_latest_that_leads_nowhere(tag, tmp_path):
    root = zero3(tmp_path / "run", masters())
    (root / "latest").write_text(tag)
    with pytest.raises(CheckpointError, match=r"latest: says .*, but there is no such folder; give a tag's folder"):
        read_deepspeed(root)


def test_hostile_pickles_execute_nothing(tmp_path):
    root, canary = zero3(tmp_path / "run", masters()), tmp_path / "canary"
    for name in (ZERO3_MODEL, _optimizer_file(1)):
        good = (root / TAG / name).read_bytes()
        for data in hostile_pickles(canary).values():
            stream = io.BytesIO()
            with zipfile.ZipFile(stream, "w") as archive:
                archive.writestr("archive/data.pkl", data)
            (root / TAG / name).write_bytes(stream.getvalue())
            with pytest.raises(CheckpointError, match=r"damaged or hostile|expected DeepSpeed's dict"):
                read_deepspeed(root)
            assert not harm_done(canary)
        (root / TAG / name).write_bytes(good)


# The library's own.

FROZEN = "model.layers.0.self_attn.o_proj.weight"


def train_config(stage: int) -> TeleFLMConfig:
    """With sizes that two ranks do not divide, and tied once."""
    return tiny_config(vocab_size=79, num_hidden_layers=2, intermediate_size=41, tie_word_embeddings=stage == 2)


def _train(rank: int, stage: int, folder: str, port: int) -> None:
    """Two steps of a small model, of which one weight is frozen, and a checkpoint with the library's own word on it."""
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ.update(place, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    model = tiny_model(train_config(stage), dtype=torch.bfloat16).train()
    model.get_parameter(FROZEN).requires_grad_(False)
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}], lr=1e-3)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, "sub_group_size": 5000},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    tokens = torch.arange(12).reshape(1, 12) + rank
    for _ in range(2):
        engine.backward(engine(input_ids=tokens, labels=tokens, use_cache=False).loss)
        engine.step()
    engine.save_checkpoint(folder)
    weights = engine._zero3_consolidated_16bit_state_dict() if stage == 3 else engine.module.state_dict()
    if rank == 0:
        torch.save({name: tensor.clone() for name, tensor in weights.items()}, f"{folder}/trained.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module", params=[1, 2, 3], ids="ZeRO {}".format)
def real(request, tmp_path_factory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp(f"zero{request.param}")
    with socket.socket() as any_socket:
        any_socket.bind(("127.0.0.1", 0))
        port = any_socket.getsockname()[1]
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("DS_ACCELERATOR", "cpu")
        pytest.importorskip("deepspeed")
        train_config(request.param).save_pretrained(folder)
        mp.spawn(_train, (request.param, str(folder), port), nprocs=2)
        yield folder


def _library_masters(folder: Path) -> Tensors:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return get_fp32_state_dict_from_zero_checkpoint(str(folder))


def _with_frozen(tensors: Tensors, folder: Path) -> Tensors:
    """With the weight that is not trained, which zero_to_fp32 loses after ZeRO 1."""
    return {FROZEN: torch.load(folder / "trained.pt")[FROZEN], **tensors}


@pytest.mark.external
def test_the_library_saved_what_is_read(real):
    weights = torch.load(real / "trained.pt")
    found = read_deepspeed(real)
    assert found.iteration == 2
    assert is_deepspeed(real)
    if found.dtype is None:
        assert matches(found, weights)
    else:  # ZeRO 3: float32, to be rounded as the run itself rounds
        assert found.dtype.name == "bfloat16"
        trainable = {name: tensor for name, tensor in found.tensors.items() if tensor.dtype.name == "float32"}
        assert len(trainable) == len(weights) - 1
        rounded = {name: tensor.to(torch.bfloat16) for name, tensor in _library_masters(real).items()}
        assert all(torch.equal(rounded[name], weights[name]) for name in weights)


@pytest.mark.external
def test_the_hub_folder_holds_what_was_trained(real, tmp_path):
    weights = torch.load(real / "trained.pt")
    config = json.loads((real / "config.json").read_text())
    convert_checkpoint(real, tmp_path / "out", config=config)
    found = load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == weights.keys() - ({"lm_head.weight"} if config["tie_word_embeddings"] else set())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in found.items())


@pytest.mark.external
def test_float32_weights_are_those_of_zero_to_fp32(real):
    found = read_deepspeed(real, fp32_master=True)
    expected = _with_frozen(_library_masters(real), real)
    assert matches(found, expected)


def read_model_ties(folder: Path) -> set[str]:
    tied = json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    return {"lm_head.weight"} if tied else set()


@pytest.mark.external
def test_a_universal_checkpoint_of_the_library(real, tmp_path):
    root = shutil.copytree(real, tmp_path / "run")
    command = ["--input_folder", str(root / "global_step2"), "--output_folder", str(root / "global_step2_universal")]
    module = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    subprocess.run([*module, *command], check=True, capture_output=True)
    (root / "latest").unlink()
    expected = _with_frozen(_library_masters(real), real)
    found = read_deepspeed(root, fp32_master=True)
    assert found.folder.endswith("global_step2_universal")
    assert matches(found, expected)
    for folder in (root, real / "global_step2"):  # as the library's own tool tells the moments of each weight
        adam = read_deepspeed(folder, optimizer=True).adam
        for key, tensors in adam.moments.items():
            assert tensors.keys() == expected.keys() - {FROZEN, *read_model_ties(real)}
            for name, tensor in tensors.items():
                told = torch.load(Path(found.folder) / "zero" / name / f"{key}.pt", weights_only=False)
                told = told["param"] if isinstance(told, dict) else told
                assert told.abs().max() > 0
                assert holds(tensor, told.flatten()[: tensor.numel].reshape(tensor.shape))
        assert set(adam.steps.values()) == {2.0}
    if list(real.glob("global_step2/mp_rank*")):  # ZeRO 1 and 2, whose groups are those of the optimizer
        assert [settings["weight_decay"] for settings, _ in adam.groups] == [0.01, 0.0]

# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The judge accepts every growth that the logits accept, and names the first element of every fault planted.

The growths and the mutants are those of test_growth.py, where the numbers judge them.
"""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file

import conversion.checkpoint.assemble as assemble
import growth.fold as fold
import growth.operators as operators
import growth.spec as spec
import tests.growth.test_growth as growth_tests
import tests.growth.test_tile as tile_tests
from conversion import WriteOptions, convert_checkpoint
from conversion.architecture import Architecture
from conversion.checkpoint.dtypes import parse_dtype
from conversion.checkpoint.errors import CheckpointError
from conversion.mapping import weights
from growth import grow_checkpoint
from growth.fold import fold_masks
from growth.method import Mask, Tile, Zero
from growth.verification.certificate import Certificate, _check_sum, _Rounding, certify
from growth.verification.conditions import Run, axis_map, compose
from tests.fixtures.tiny import tiny_config, tiny_model

ROOT = Path(__file__).parents[2]
GROWTHS = growth_tests.test_preserves_the_function.pytestmark[0].args[1]
TILINGS = next(mark.args[1] for mark in tile_tests.test_preserves_the_function.pytestmark if "target" in mark.args[0])
MUTANTS = growth_tests.test_mutants_are_caught.pytestmark[0].args[1]
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
ALL_AXES, GROUPED, heads = growth_tests.ALL_AXES, growth_tests.GROUPED, growth_tests.heads


@pytest.fixture(scope="module")
def make_source(tmp_path_factory) -> Callable[..., Path]:
    def make(dtype: str = "float64", **fields) -> Path:
        folder = tmp_path_factory.mktemp("source")
        tiny_model(tiny_config(**fields), dtype=DTYPES[dtype]).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def grown(make_source, tmp_path_factory) -> tuple[Path, Path]:
    """A grouped source of 8/2 heads and its growth along every axis, bfloat16."""
    source, out = make_source("bfloat16", **GROUPED), tmp_path_factory.mktemp("grown") / "out"
    target = {"hidden_size": 96, **heads(12, 3), "intermediate_size": 110, "num_hidden_layers": 5, "vocab_size": 704}
    grow_checkpoint(source, out, {**target, "output_mult": 0.3}, layers="0,2", multipliers="target")
    return source, out


def problems(certificate: Certificate) -> str:
    return "\n".join(map(str, [*certificate.broken_fields, *certificate.violations]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("fields", "target"), GROWTHS)
def test_accepts(fields, target, dtype, make_source, tmp_path):
    source = make_source(dtype, **fields)
    grow_checkpoint(source, tmp_path / "out", target)
    certificate = certify(source, tmp_path / "out", workers=2)
    assert certificate.holds, problems(certificate)
    assert max(tensor.worst_ulp for tensor in certificate.tensors) <= (1.0 if dtype == "float64" else 0.51)
    assert not any(tensor.is_dead for tensor in certificate.tensors)
    for tensor in certificate.tensors:
        assert sum(block.block.numel for block in tensor.blocks) == np.prod(tensor.shape)


@pytest.mark.parametrize("multipliers", ["preserve", "target"])
def test_accepts_new_multipliers(multipliers, make_source, tmp_path):
    source = make_source("bfloat16")
    target = {**ALL_AXES, "output_mult": 0.3, "input_mult": 7.0}
    grow_checkpoint(source, tmp_path / "out", target, multipliers=multipliers)
    factors = {tensor.conditions.name: tensor.conditions.factor for tensor in certify(source, tmp_path / "out").tensors}
    assert certify(source, tmp_path / "out").holds
    assert factors["model.embed_tokens.weight"] == 2.5
    assert factors["lm_head.weight"] == (1.0 if multipliers == "preserve" else pytest.approx(0.125 / 0.06))


@pytest.mark.parametrize("layers", ["stack", "top", "0,0,2,2"])
def test_accepts_copies_anywhere(layers, make_source, tmp_path):
    source = make_source("float32")
    options = WriteOptions(max_shard_size="50KB")
    grow_checkpoint(source, tmp_path / "out", {"num_hidden_layers": 7}, layers=layers, options=options)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 5
    assert certify(source, tmp_path / "out").holds


def test_accepts_other_formats_and_dtypes(make_source, tmp_path):
    """Models of the same sizes need no record: B may come from any tool, in another container or dtype."""
    source = make_source("float32")
    tensors = load_file(source / "model.safetensors")
    (tmp_path / "bin").mkdir()
    shutil.copy(source / "config.json", tmp_path / "bin")
    torch.save(tensors, tmp_path / "bin/pytorch_model.bin")
    convert_checkpoint(tmp_path / "bin", tmp_path / "half", dtype="bfloat16")
    assert all(tensor.worst_ulp == 0 for tensor in certify(source, tmp_path / "bin").tensors)
    rounded = certify(tmp_path / "bin", tmp_path / "half")
    assert rounded.holds
    assert 0.4 < max(tensor.worst_ulp for tensor in rounded.tensors) <= 0.5
    assert not certify(tmp_path / "half", source).holds  # what was rounded away is not there


def test_old_and_new_spellings_of_the_rotary_embedding_are_the_same(grown, tmp_path):
    source = shutil.copytree(grown[0], tmp_path / "source")
    config = json.loads((source / "config.json").read_bytes())
    del config["rope_parameters"]
    (source / "config.json").write_text(json.dumps({**config, "rope_theta": 10000, "rope_scaling": None}))
    assert certify(source, grown[1]).holds


# Two growths.


@pytest.mark.parametrize("dtype", DTYPES)
def test_certifies_over_two_growths(dtype, make_source, tmp_path):
    source = make_source(dtype, **GROUPED)
    grow_checkpoint(source, tmp_path / "b", {**heads(12, 3), "num_hidden_layers": 4}, layers="1")
    # A layer that is a copy becomes an original's neighbour; its own copy must be silent too.
    target = {**heads(16, 8), "num_hidden_layers": 6, "intermediate_size": 110, "vocab_size": 704}
    grow_checkpoint(tmp_path / "b", tmp_path / "c", target, layers="0,2")
    assert certify(tmp_path / "b", tmp_path / "c").holds
    certificate = certify(source, tmp_path / "c")
    assert certificate.holds, problems(certificate)
    assert certificate.conditions.growths == 2
    assert any("2 growths away" in note for note in certificate.notes)
    assert max(tensor.worst_ulp for tensor in certificate.tensors) <= (4.0 if dtype == "float64" else 1.5)
    damage(tmp_path / "c", "model.layers.5.mlp.down_proj.weight", (3, 4))
    (violation,) = certify(source, tmp_path / "c").violations
    assert (violation.tensor, violation.row, violation.column) == ("model.layers.5.mlp.down_proj.weight", 3, 4)


@pytest.mark.parametrize(
    ("source", "target", "places"),
    [
        (heads(8, 2), heads(10, 2), [0, 1, 2, 3, 5, 6, 7, 8]),  # groups of 4 become groups of 5
        (heads(8, 2), heads(16, 8), [0, 1, 2, 3, 4, 5, 6, 7]),  # two copies of each key/value head, two queries each
        (heads(6, 2), heads(10, 5), [0, 1, 2, 4, 5, 6]),  # groups of 3 over two groups of 2
    ],
)
def test_every_query_stays_with_its_keys(source, target, places):
    """Against attention as it is defined: query head n reads key/value head floor(n / group)."""
    small, large = (Architecture.from_config(tiny_config(**fields).to_dict()) for fields in (source, target))
    queries, keys = axis_map("query", small, large), axis_map("key_value", small, large)
    query_of = {(run.target + i) // 8: (run.source + i) // 8 for run in queries for i in range(0, run.size, 8)}
    key_of = {(run.target + i) // 8: (run.source + i) // 8 for run in keys for i in range(0, run.size, 8)}
    assert sorted(query_of) == places
    group, new_group = (a.num_attention_heads // a.num_key_value_heads for a in (small, large))
    for new, old in query_of.items():
        assert key_of[new // new_group] == old // group


def test_maps_compose_like_arrays():
    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b, c = np.sort(rng.integers(1, 40, 3))
        one, two = rng.permutation(b)[:a], rng.permutation(c)[:b]  # where old entries go
        first, second = (tuple(Run(int(t), s, 1) for s, t in enumerate(places)) for places in (one, two))
        composed = {run.source + i: run.target + i for run in compose(first, second) for i in range(run.size)}
        assert composed == dict(enumerate(two[one]))


# Repetition.


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("fields", "target"), TILINGS)
def test_accepts_tiling(fields, target, dtype, noise, make_source, tmp_path):
    """Copies are 1/k of the source's weight, rounded; with noise, each is anything that makes up their sum."""
    source = make_source(dtype, **fields)
    grow_checkpoint(source, tmp_path / "out", target, method=Tile(noise), multipliers="target")
    certificate = certify(source, tmp_path / "out", workers=2)
    assert certificate.holds, problems(certificate)
    assert not any(tensor.is_dead for tensor in certificate.tensors)
    for tensor in certificate.tensors:
        assert sum(block.block.numel for block in tensor.blocks) == np.prod(tensor.shape)
        assert noise or not any(block.block.rule == "sum" for block in tensor.blocks)
    if dtype != "float64" and not noise:
        assert max(tensor.worst_ulp for tensor in certificate.tensors) <= 0.51


@pytest.fixture(scope="module")
def tiled(make_source, tmp_path_factory) -> tuple[Path, Path]:
    """Three copies of every feature and head, bfloat16, with noise; neurons that are no multiple."""
    source, out = make_source("bfloat16"), tmp_path_factory.mktemp("tiled") / "out"
    target = {"hidden_size": 96, "num_attention_heads": 12, "intermediate_size": 200, "num_hidden_layers": 4}
    grow_checkpoint(source, out, {**target, "vocab_size": 704}, method=Tile(0.3), layers="1")
    return source, out


def test_what_has_to_add_up(tiled):
    rules = {
        tensor.conditions.name: [(x.block.rule, x.block.rows, x.block.columns, x.block.others) for x in tensor.blocks]
        for tensor in certify(*tiled).tensors
    }
    thirds, copies = [(0, 32), (32, 64), (64, 96)], (32, 64)
    assert rules["model.norm.weight"] == [("copy", (0, 1), columns, ()) for columns in thirds]
    assert rules["model.layers.0.self_attn.q_proj.weight"] == [("sum", rows, (0, 32), copies) for rows in thirds]
    assert rules["model.layers.0.mlp.up_proj.weight"] == [
        ("sum", (0, 88), (0, 32), copies),
        ("free", (88, 200), (0, 96), ()),
    ]
    assert rules["model.layers.0.mlp.down_proj.weight"] == [
        block for rows in thirds for block in (("copy", rows, (0, 88), ()), ("zero", rows, (88, 200), ()))
    ]
    assert rules["model.layers.2.mlp.down_proj.weight"] == [("zero", (0, 96), (0, 200), ())]
    assert rules["lm_head.weight"][0] == ("sum", (0, 640), (0, 32), copies)


@pytest.mark.parametrize(
    ("name", "index", "factor", "place", "expected"),
    [
        ("model.embed_tokens.weight", (7, 35), None, "[7, 35] is", "model.embed_tokens.weight[7, 3] of A"),
        ("model.layers.0.input_layernorm.weight", (64,), None, "[64] is", "input_layernorm.weight[0] of A"),
        (
            "model.layers.3.self_attn.o_proj.weight",
            (40, 70),
            1.1,
            "[40, 6] + [40, 38] + [40, 70] is",
            "layers.2.self_attn.o_proj.weight[8, 6] of A: 3 copies of each input are read together",
        ),
        (
            "model.layers.1.mlp.gate_proj.weight",
            (87, 31),
            1 + 2**-5,
            "[87, 31] + [87, 63] + [87, 95] is",
            "[87, 31] of A",
        ),
        ("model.layers.1.mlp.down_proj.weight", (95, 88), None, "[95, 88] is", "expected 0"),
        ("lm_head.weight", (639, 0), float("nan"), "[639, 0] + [639, 32] + [639, 64] is nan", "lm_head.weight[639, 0]"),
        ("model.layers.2.self_attn.o_proj.weight", (5, 5), None, "[5, 5] is", "an additional copy of layer 1"),
    ],
)
def test_one_changed_element_of_a_tiling_is_named(name, index, factor, place, expected, tiled, tmp_path):
    """A value that is copied is changed by one unit in the last place, one of several that add up by some more."""
    out = shutil.copytree(tiled[1], tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    damage(out, name, index, None if factor is None else tensors[name][index].item() * factor)
    (violation,) = certify(tiled[0], out).violations
    assert violation.count == 1
    assert str(violation).startswith(f"{name}{place}")
    assert expected in str(violation)


def _noise_does_not_cancel(monkeypatch):
    monkeypatch.setattr(operators, "_balanced_weight", lambda copy, copies: copy + 1)


def _each_copy_draws_for_itself(monkeypatch):
    words = assemble._words_of
    monkeypatch.setattr(
        assemble, "_words_of", lambda view, noise, seed: words(view, noise, seed + round(noise.weight * 100) + 500)
    )


def _norms_are_scaled(monkeypatch):
    monkeypatch.setattr(spec.Growth, "norm_scale", property(lambda growth: 0.5**0.5))


def _copies_are_not_shared(monkeypatch):
    grow_axis = operators.grow_axis
    monkeypatch.setattr(operators, "grow_axis", lambda *args: dataclasses.replace(grow_axis(*args), copies=1))


def _one_copy_is_scaled(monkeypatch):
    copy = operators.Copy

    def scaled(box, source, scale, *, noise):
        return copy(box, source, scale * (0.99 if len(box.start) > 2 and box.start[-2] else 1.0), noise=noise)

    monkeypatch.setattr(operators, "Copy", scaled)


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize(
    "mutant",
    [
        _noise_does_not_cancel,
        _each_copy_draws_for_itself,
        _norms_are_scaled,
        _copies_are_not_shared,
        _one_copy_is_scaled,
    ],
)
def test_mutants_of_tiling_are_caught(mutant, noise, make_source, tmp_path, monkeypatch):
    """By the bytes of what is stored in bfloat16, and by the logits in float64."""
    source, exact = make_source("bfloat16"), make_source("float64")
    mutant(monkeypatch)
    for folder in (source, exact):
        grow_checkpoint(folder, tmp_path / folder.name, tile_tests.TWICE, method=Tile(noise))
    is_harmless = mutant in (_noise_does_not_cancel, _each_copy_draws_for_itself) and not noise
    assert certify(source, tmp_path / source.name).holds == is_harmless
    assert (growth_tests.compare(exact, tmp_path / exact.name).relative < 1e-12) == is_harmless


def test_a_tiling_keeps_epsilon(tiled, tmp_path):
    out = shutil.copytree(tiled[1], tmp_path / "out")
    _edit_config(rms_norm_eps=1e-5 / 3)(out)
    assert "rms_norm_eps is 3.3333333333333337e-06, expected 1e-05: 1e-05 x 96 / 96" in problems(certify(tiled[0], out))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("copies", [2, 3, 4])
def test_the_bound_on_a_sum_is_that_of_its_roundings(copies, dtype):
    """Half a unit of the largest copy for each: every honest sum is within it, and most of it is used."""
    rng = np.random.default_rng(0)
    stored = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    source = rng.standard_normal((1, 200_000)).astype(stored)
    noise = rng.standard_normal((copies, source.size))
    noisy = (source.astype(np.float64) / copies + noise - noise.mean(0)).astype(stored)
    rounding = _Rounding(1.0, parse_dtype(dtype), parse_dtype(dtype), times=1)
    total, broken, worst = _check_sum(list(noisy[:, None]), source, rounding)
    np.testing.assert_array_equal(total[0], noisy.astype(np.float64).sum(0))
    assert not broken.any()
    assert 0.7 * copies / 2 < worst <= copies / 2
    noisy[0] += np.abs(noisy).max() * 2 ** (4 - ml_dtypes.finfo(stored).nmant)
    assert _check_sum(list(noisy[:, None]), source, rounding)[1].all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("methods", "noise"), [(("tile", "tile"), 0.3), (("zero", "tile"), 0.0), (("tile", "zero"), 0.3)]
)
def test_certifies_tiling_among_other_growths(methods, noise, dtype, make_source, tmp_path):
    source = make_source(dtype, **heads(8, 2))
    certificate = certify(source, grow_twice(source, tmp_path, methods, noise))
    assert certificate.holds, problems(certificate)
    name = "model.layers.0.self_attn.q_proj.weight"
    damage(tmp_path / "2", name, (0, 0), load_file(tmp_path / "2/model.safetensors")[name][0, 0].item() + 0.1)
    (violation,) = certify(source, tmp_path / "2").violations
    assert (violation.tensor, violation.row, violation.column) == (name, 0, 0)


def grow_twice(source: Path, folder: Path, methods: tuple[str, str], noise: float) -> Path:
    first, second = methods
    target = {**heads(16, 4), "intermediate_size": 176, "num_hidden_layers": 4}
    grow_checkpoint(source, folder / "1", target, method={"zero": Zero(), "tile": Tile(noise)}[first])
    target = {**(heads(32, 8) if second == "tile" else heads(20, 5)), "intermediate_size": 352, "num_hidden_layers": 5}
    grow_checkpoint(folder / "1", folder / "2", target, method={"zero": Zero(), "tile": Tile(noise)}[second])
    return folder / "2"


def test_noise_on_what_was_silent_is_certified_step_by_step(make_source, tmp_path):
    source = make_source("float32", **heads(8, 2))
    grow_twice(source, tmp_path, ("zero", "tile"), 0.3)
    with pytest.raises(CheckpointError, match=r"growth 2 of the lineage repeated, with noise, .* certify each growth"):
        certify(source, tmp_path / "2")
    assert certify(source, tmp_path / "1").holds
    assert certify(tmp_path / "1", tmp_path / "2").holds


# Masks.


@pytest.fixture(scope="module")
def masked(make_source, tmp_path_factory) -> tuple[Path, Path]:
    """A grouped source and its growth along every axis behind masks, float32."""
    source, out = make_source("float32", **GROUPED), tmp_path_factory.mktemp("masked") / "out"
    target = {**heads(12, 3), "intermediate_size": 110, "num_hidden_layers": 5, "vocab_size": 704, "output_mult": 0.3}
    grow_checkpoint(source, out, target, method=Mask(), layers="0,2", multipliers="target")
    return source, out


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_accepts_silent_masks(dtype, masked, tmp_path):
    """Folded at alpha = 0, masks are growth by zeros, written twice."""
    fold_masks(masked[1], tmp_path / "out", alpha=0.0, dtype=dtype)
    certificate = certify(masked[0], tmp_path / "out")
    assert certificate.holds, problems(certificate)
    assert max(tensor.worst_ulp for tensor in certificate.tensors) <= 1.0
    assert not any(tensor.is_dead for tensor in certificate.tensors)
    damage(tmp_path / "out", "model.layers.0.self_attn.o_proj.weight", (3, 70))
    (violation,) = certify(masked[0], tmp_path / "out").violations
    assert str(violation).startswith("model.layers.0.self_attn.o_proj.weight[3, 70] is ")


def test_accepts_growth_of_a_fold(masked, tmp_path):
    fold_masks(masked[1], tmp_path / "fold", alpha=0.0)
    grow_checkpoint(tmp_path / "fold", tmp_path / "out", {**heads(16, 4), "num_hidden_layers": 6})
    certificate = certify(masked[0], tmp_path / "out")
    assert certificate.holds, problems(certificate)
    assert certificate.conditions.growths == 2


def _fold_at_one(folder: Path, monkeypatch) -> None:
    """The masks of a fold, forgotten: what is new is heard although the record says alpha = 0."""
    monkeypatch.setattr(fold, "_scaled", lambda box, view, scale: fold.Copy(box, view.window(box), 1.0))


def _fold_keeps_norms(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(fold, "math", SimpleNamespace(sqrt=lambda share: 1.0))


def _train_one_step(folder: Path, monkeypatch) -> None:
    """An old weight that has moved is no longer the source's, whatever the masks."""
    damage(folder, "model.layers.3.mlp.up_proj.weight", (5, 5))


@pytest.mark.parametrize("fault", [_fold_at_one, _fold_keeps_norms, _train_one_step])
def test_masks_that_are_heard_are_named(fault, masked, tmp_path, monkeypatch):
    folder = shutil.copytree(masked[1], tmp_path / "masked")
    with monkeypatch.context() as patch:
        fault(folder, patch)
        fold_masks(folder, tmp_path / "out", alpha=0.0)
    certificate = certify(masked[0], tmp_path / "out")
    assert certificate.violations
    assert not certificate.broken_fields


def test_only_silent_masks_are_certified(masked, tmp_path):
    fold_masks(masked[1], tmp_path / "out", alpha=0.25)
    with pytest.raises(CheckpointError, match=r"masks of B are folded at alpha 0\.25; only at alpha 0 .* --alpha 0"):
        certify(masked[0], tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"model_type is 'TeleFLMMasked'.* --alpha 0"):
        certify(*masked)
    _edit_lineage(lambda lineage: lineage.update(alpha="0"))(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"alpha of a fold in the lineage is '0'; restore the file"):
        certify(masked[0], tmp_path / "out")
    _edit_lineage(lambda lineage: lineage.update(lineage["parent"]["lineage"]))(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"masks of B are not folded into the weights"):
        certify(masked[0], tmp_path / "out")


# Faults.


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_of_the_operators_are_caught(mutant, make_source, tmp_path, monkeypatch):
    source = make_source("bfloat16", **GROUPED)
    target = {**heads(12, 3), "num_hidden_layers": 4, "intermediate_size": 96, "output_mult": 0.3}
    grow_checkpoint(source, tmp_path / "good", target, multipliers="target")
    assert certify(source, tmp_path / "good").holds
    mutant(monkeypatch)
    grow_checkpoint(source, tmp_path / "bad", target, multipliers="target")
    assert not certify(source, tmp_path / "bad").holds


def damage(folder: Path, name: str, index: tuple[int, ...], value: float | None = None) -> float:
    """Change one element by the least there is, or to a value; returns what it was."""
    tensors = load_file(folder / "model.safetensors")
    element = tensors[name][index]
    old, other = element.item(), torch.tensor(0.0 if element == 0 else torch.inf, dtype=element.dtype)
    toward = torch.tensor(1.0, dtype=element.dtype) if element == 0 else other
    tensors[name][index] = torch.nextafter(element, toward) if value is None else value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return old


@pytest.mark.parametrize(
    ("name", "index", "expected"),
    [
        pytest.param(
            "model.embed_tokens.weight",
            (7, 60),
            " from model.embed_tokens.weight[7, 60] of A",
            id="a copied and scaled embedding",
        ),
        pytest.param("model.embed_tokens.weight", (7, 64), "expected 0", id="an embedding that writes a new feature"),
        pytest.param(
            "model.layers.1.input_layernorm.weight",
            (3,),
            " from model.layers.0.input_layernorm.weight[3] of A",
            id="a norm",
        ),
        pytest.param("model.layers.2.self_attn.q_proj.weight", (95, 9), None, id="a new head is free"),
        pytest.param(
            "model.layers.2.self_attn.q_proj.weight",
            (17, 9),
            " from model.layers.1.self_attn.q_proj.weight[17, 9] of A",
            id="an old head",
        ),
        pytest.param(
            "model.layers.2.self_attn.k_proj.weight",
            (15, 5),
            " from model.layers.1.self_attn.k_proj.weight[15, 5] of A",
            id="a key head",
        ),
        pytest.param("model.layers.2.self_attn.o_proj.weight", (17, 64), "expected 0", id="a new head that speaks"),
        pytest.param("model.layers.2.self_attn.o_proj.weight", (64, 17), "expected 0", id="a new feature written"),
        pytest.param("model.layers.1.self_attn.o_proj.weight", (0, 0), "an additional copy of layer 0", id="a copy"),
        pytest.param("model.layers.4.mlp.down_proj.weight", (95, 109), "an additional copy of layer 2", id="last one"),
        pytest.param(
            "model.layers.3.mlp.gate_proj.weight",
            (87, 63),
            " from model.layers.2.mlp.gate_proj.weight[87, 63] of A",
            id="an old neuron",
        ),
        pytest.param("model.layers.3.mlp.down_proj.weight", (0, 88), "expected 0", id="a new neuron that speaks"),
        pytest.param("model.norm.weight", (63,), " from model.norm.weight[63] of A", id="the last norm"),
        pytest.param("lm_head.weight", (639, 0), "multiplies logits by 0.125 in A and by 0.075 in B", id="the head"),
    ],
)
def test_one_changed_element_is_named(name, index, expected, grown, tmp_path):
    """Changed by one unit in the last place, or from zero to the smallest number there is."""
    source, out = grown[0], shutil.copytree(grown[1], tmp_path / "out")
    old = damage(out, name, index)
    certificate = certify(source, out)
    if expected is None:
        assert certificate.holds
        return
    (violation,) = certificate.violations
    row = index[0] if len(index) == 2 else None
    assert (violation.tensor, violation.row, violation.column, violation.count) == (name, row, index[-1], 1)
    assert violation.found != old
    assert expected in str(violation)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("index", [(17, 9), (95, 9)], ids=["copied", "free"])
def test_what_is_not_finite_is_refused(value, index, grown, tmp_path):
    name, out = "model.layers.2.self_attn.q_proj.weight", shutil.copytree(grown[1], tmp_path / "out")
    damage(out, name, index, value)
    (violation,) = certify(grown[0], out).violations
    assert (violation.row, violation.column) == index


def _edit_config(**fields) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_bytes())
        (folder / "config.json").write_text(json.dumps({**config, **fields}))

    return edit


def _swap_layers(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name in list(tensors):
        if ".layers.2." in name:
            other = name.replace(".layers.2.", ".layers.3.")
            tensors[name], tensors[other] = tensors[other], tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (_edit_config(rms_norm_eps=1e-5), r"rms_norm_eps is 1e-05, expected 6.66666666666667e-06: 1e-05 x 64 / 96"),
        (_edit_config(output_mult=0.31), r"lm_head.weight\[0, 0\] is .* logits by 0.125 in A and by 0.0775 in B"),
        (_edit_config(input_mult=1.5), r"model.embed_tokens.weight\[0, 0\] is .* by 2.5 in A and by 1.5 in B"),
        (_edit_config(rope_parameters={"rope_type": "default", "rope_theta": 5e5}), "rope_parameters is .*500000"),
        (_edit_config(hidden_act="gelu"), "hidden_act is gelu, expected silu"),
        (_swap_layers, r"model.layers.2.input_layernorm.weight\[0\]"),
    ],
)
def test_whole_model_faults_are_named(fault, message, grown, tmp_path):
    out = shutil.copytree(grown[1], tmp_path / "out")
    fault(out)
    certificate = certify(grown[0], out)
    assert not certificate.holds
    assert re.search(message, problems(certificate).splitlines()[0])


def test_dead_new_weights_are_noted(grown, tmp_path):
    """Zeros keep the function; but a neuron that is zero on both sides never learns."""
    out = shutil.copytree(grown[1], tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][88:] = 0
    tensors["model.layers.0.mlp.up_proj.weight"][:, 64:] = 0
    save_file(tensors, out / "model.safetensors")
    certificate = certify(grown[0], out)
    assert certificate.holds
    assert any("1 tensors are all zero and may never learn: model.layers.0.mlp.up_proj" in n for n in certificate.notes)


# What cannot be judged.


def _edit_lineage(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        manifest = json.loads((folder / "teleflm_manifest.json").read_bytes())
        change(manifest["lineage"])
        (folder / "teleflm_manifest.json").write_text(json.dumps(manifest))

    return edit


def _truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (_truncate, "model.safetensors"),
        (lambda folder: (folder / "teleflm_manifest.json").unlink(), "no record of a growth.* 5 layers where A has 3"),
        (_edit_lineage(lambda lineage: lineage.update(method="magic")), "growth by magic; a certificate"),
        (_edit_lineage(lambda lineage: lineage["layers"].pop()), "the layer map has 4 layers.*num_hidden_layers 5"),
        (_edit_lineage(lambda lineage: lineage["layers"][1].update(copy=False)), r"keeps layers \[0, 0, 1, 2\]"),
        (_edit_lineage(lambda lineage: lineage["layers"][1].update(source=9)), "names layer 9, A has 3"),
        (_edit_lineage(lambda lineage: lineage["layers"][1].update(source="0")), "a layer of the lineage is"),
        (_edit_lineage(lambda lineage: lineage.pop("layers")), "has no usable 'layers'"),
        (_edit_lineage(lambda lineage: lineage["source"].update(vocab_size=600)), "vocab_size 600, A has 640"),
        (_edit_config(intermediate_size=111), "has shape .*config.json says"),
        (lambda folder: (folder / "config.json").unlink(), "config.json: no such file"),
    ],
)
def test_what_cannot_be_judged_is_refused(fault, message, grown, tmp_path):
    out = shutil.copytree(grown[1], tmp_path / "out")
    fault(out)
    with pytest.raises(CheckpointError, match=message):
        certify(grown[0], out)


def test_a_smaller_model_is_no_growth(make_source):
    narrow, wide = make_source("float32"), make_source("float32", hidden_size=64, num_attention_heads=8)
    (field, *_) = certify(wide, narrow).broken_fields
    assert "hidden_size is 32, expected 64 or more" in str(field)


# Independence and memory.


GROWERS = ("operators", "spec", "grow", "layer_selection", "fold", "moments")


def test_nothing_that_grows_is_loaded_to_verify(grown):
    script = f"""if True:
        import sys
        from growth import verify_checkpoints
        assert verify_checkpoints({str(grown[0])!r}, {str(grown[1])!r}).same
        growers = {["growth." + name for name in GROWERS]!r}
        print([name for name in [*growers, "torch", "transformers"] if name in sys.modules])
    """
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_memory_is_a_few_blocks(tmp_path):
    """128 MiB of weights are certified in a fraction of it, whatever their shape."""
    rng = np.random.default_rng(0)
    config = tiny_config(vocab_size=16384, hidden_size=512, intermediate_size=4096, num_attention_heads=8)
    config = {**config.to_dict(), "num_key_value_heads": 8, "head_dim": 64, "num_hidden_layers": 5}
    _write_bfloat16(tmp_path / "a", Architecture.from_config(config), config, rng)
    grow_checkpoint(
        tmp_path / "a", tmp_path / "b", {"hidden_size": 640, "num_attention_heads": 10, "num_key_value_heads": 10}
    )
    assert (tmp_path / "b/model.safetensors").stat().st_size > 128 << 20
    script = f"""if True:
        import resource
        from growth.verification.certificate import certify
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert certify({str(tmp_path / "a")!r}, {str(tmp_path / "b")!r}, workers=2).holds
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(result.stdout) < 40 << 10  # KiB


def _write_bfloat16(folder: Path, architecture: Architecture, config: dict, rng: np.random.Generator) -> None:
    folder.mkdir()
    tensors = {
        name: rng.standard_normal(weight.shape(architecture), np.float32).astype(ml_dtypes.bfloat16)
        for name, weight, _ in weights(architecture)
    }
    save_numpy(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "TeleFLM"}))

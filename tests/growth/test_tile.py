# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Growth by repetition: exact, and with noise that cancels, so that copies can part."""

import pytest
import torch
from safetensors.torch import load_file

from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.execute import WriteOptions
from growth import grow_checkpoint
from growth.method import Tile
from tests.growth.test_growth import GROUPED, IDS, compare, heads, load, make_source, one_thread, source  # noqa: F401

TWICE = {"hidden_size": 64, "num_attention_heads": 8, "intermediate_size": 176}


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize(
    ("fields", "target"),
    [
        pytest.param({}, TWICE, id="x 2"),
        pytest.param({}, {"hidden_size": 96, "num_attention_heads": 12, "intermediate_size": 264}, id="x 3"),
        pytest.param(
            {}, {**TWICE, "intermediate_size": 200, "num_hidden_layers": 5, "vocab_size": 704}, id="ffn x 2.3"
        ),
        pytest.param({}, {"hidden_size": 32, "intermediate_size": 176}, id="ffn alone"),
        pytest.param({}, {**TWICE, "mup_scale_factor": 9.0}, id="multipliers"),
        pytest.param(GROUPED, heads(16, 4), id="GQA 8/2 to 16/4"),
        pytest.param(GROUPED, {**heads(16, 2)}, id="GQA 8/2 to 16/2: groups change, heads are added instead"),
    ],
)
def test_preserves_the_function(fields, target, noise, make_source, tmp_path):  # noqa: F811
    source = make_source(**fields)  # noqa: F811
    result = grow_checkpoint(source, tmp_path / "out", target, method=Tile(noise), multipliers="target")
    assert compare(source, tmp_path / "out").relative < 1e-12
    assert compare(source, tmp_path / "out", torch.float32).relative < 1e-5
    assert result.plan.config["rms_norm_eps"] == 1e-5


def test_halves_are_exact_in_bfloat16(make_source, tmp_path):  # noqa: F811
    """A power of two divides without rounding: what is stored computes exactly the source's function."""
    source = make_source(torch.bfloat16, input_mult=1.0)  # noqa: F811
    grow_checkpoint(source, tmp_path / "out", TWICE, method=Tile(0.0))
    assert compare(source, tmp_path / "out").relative < 1e-12
    old, new = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(new[name], (old[name] / 2).tile(2, 2))
    assert torch.equal(new["model.embed_tokens.weight"], old["model.embed_tokens.weight"].tile(1, 2))
    assert torch.equal(new["model.norm.weight"], old["model.norm.weight"].tile(2))


def copies_differ(model) -> float:
    """Root mean square difference of the two output halves of a matrix, in units of the matrix's own."""
    weight = model.model.layers[1].mlp.up_proj.weight.detach()
    first, second = weight[: len(weight) // 2], weight[len(weight) // 2 :]
    return ((first - second).square().mean().sqrt() / weight.square().mean().sqrt()).item()


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_copies_part_only_with_noise(noise, source, tmp_path):  # noqa: F811
    grow_checkpoint(source, tmp_path / "out", TWICE, method=Tile(noise))
    model = load(tmp_path / "out")
    start = copies_differ(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(20):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if noise:
        assert 0.2 < start < 0.6
        assert copies_differ(model) > 0.2
    else:
        assert start == 0.0
        assert copies_differ(model) < 1e-9  # the order in which a product adds may differ between the halves


def test_noise_is_a_fraction_of_each_weights_own_spread(source, tmp_path):  # noqa: F811
    for name, noise in (("plain", 0.0), ("noisy", 0.25)):
        grow_checkpoint(source, tmp_path / name, TWICE, method=Tile(noise))
    plain, noisy = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "noisy"))
    for name in ("model.layers.0.self_attn.o_proj.weight", "model.layers.2.mlp.down_proj.weight", "lm_head.weight"):
        difference = noisy[name] - plain[name]
        assert difference.std() / plain[name].std() == pytest.approx(0.25, rel=0.1)
        left, right = difference.chunk(2, dim=1)
        torch.testing.assert_close(left, -right, rtol=0, atol=1e-15)
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(noisy[name], plain[name])


def test_advice(source, tmp_path):  # noqa: F811
    notes = grow_checkpoint(source, tmp_path / "a", TWICE, method=Tile(), dry_run=True).notes
    assert any("1/2 of the learning rate" in note for note in notes)
    notes = grow_checkpoint(source, tmp_path / "a", TWICE, method=Tile(0.0), dry_run=True).notes
    assert any("never used" in note for note in notes)


def test_workers_and_shards_do_not_change_the_noise(source, tmp_path):  # noqa: F811
    grow_checkpoint(source, tmp_path / "a", TWICE, method=Tile(), options=WriteOptions(workers=1))
    grow_checkpoint(
        source, tmp_path / "b", TWICE, method=Tile(), options=WriteOptions(workers=3, max_shard_size="60KB")
    )
    one = load_file(tmp_path / "a/model.safetensors")
    many = {k: v for file in (tmp_path / "b").glob("*.safetensors") for k, v in load_file(file).items()}
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


@pytest.mark.parametrize(
    ("target", "arguments", "message"),
    [
        ({"hidden_size": 40, "num_attention_heads": 5}, {}, "hidden_size 40 is not a multiple of the source's 32"),
        (TWICE, {"noise": 1.5}, r"noise is 1\.5, expected a number from 0 to below 1"),
    ],
)
def test_refusals(target, arguments, message, source, tmp_path):  # noqa: F811
    with pytest.raises(CheckpointError, match=message):
        grow_checkpoint(source, tmp_path / "out", target, method=Tile(**arguments))
    assert not (tmp_path / "out").exists()

# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What a type cannot hold is said, not written: in every command that casts or scales."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion import WriteOptions, convert_checkpoint, export_checkpoint
from conversion.checkpoint.bytes import identify
from conversion.checkpoint.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, DType
from conversion.checkpoint.errors import CorruptData, NotFinite, Overflow
from conversion.checkpoint.execute import write_checkpoint
from conversion.checkpoint.plan import (
    Box,
    CheckpointPlan,
    Copy,
    Fill,
    Noise,
    Normal,
    RowMean,
    Statistic,
    TensorPlan,
    View,
)
from growth import Mask, fold_masks, grow_checkpoint
from tests.fixtures.checkpoint_runs import run_teleflm
from tests.fixtures.tiny import tiny_config, tiny_model

NAME = "model.layers.1.mlp.up_proj.weight"
LARGE = 1e5  # a float32 and bfloat16 of 99840, but no float16


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A Tele-FLM in float32 with one value that float16 lacks, plain and with the masks of a growth."""
    folder = tmp_path_factory.mktemp("sources")
    tiny_model(tiny_config()).save_pretrained(folder / "plain")
    plant(folder / "plain", LARGE)
    grow_checkpoint(folder / "plain", folder / "masked", {"hidden_size": 64, "num_attention_heads": 8}, method=Mask())
    return folder


def plant(folder: Path, value: float) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[NAME][7, 3] = value
    save_file(tensors, file, {"format": "pt"})


WAYS: dict[str, Callable[..., Any]] = {
    "convert": lambda folder, out, **more: convert_checkpoint(folder / "plain", out, dtype="float16", **more),
    "granite": lambda folder, out, **more: export_checkpoint(
        folder / "plain", out, to="granite", dtype="float16", **more
    ),
    "llama": lambda folder, out, **more: export_checkpoint(folder / "plain", out, to="llama", dtype="float16", **more),
    "megatron": lambda folder, out, **more: export_checkpoint(
        folder / "plain", out, to="megatron", tp=2, dtype="float16", **more
    ),
    "grow": lambda folder, out, **more: grow_checkpoint(
        folder / "plain", out, {"intermediate_size": 96}, dtype="float16", **more
    ),
    "fold": lambda folder, out, **more: fold_masks(folder / "masked", out, dtype="float16", **more),
}


@pytest.mark.parametrize("digest", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_a_cast_that_overflows(way, digest, sources, tmp_path):
    # On Megatron's second rank, the up projection is after the gate's rows.
    place = r"linear_fc1.weight\[\d+, 3\]" if way == "megatron" else rf"{NAME}\[7, 3\]"
    with pytest.raises(Overflow, match=rf"{place} is 100000, the largest float16 is 65504: .*--allow-nonfinite"):
        WAYS[way](sources, tmp_path / "out", options=WriteOptions(digest=digest))
    assert not any((tmp_path / "out").rglob("model.safetensors"))
    assert not (tmp_path / "out/latest_checkpointed_iteration.txt").exists()
    WAYS[way](sources, tmp_path / "let", options=WriteOptions(digest=digest, allow_nonfinite=True))
    if way not in ("megatron",):
        assert load_file(tmp_path / "let/model.safetensors")[NAME][7, 3] == math.inf


@pytest.mark.parametrize("command", ["convert", "export", "grow", "fold"])
def test_the_commands(command, sources, tmp_path):
    more = {
        "convert": ("plain",),
        "export": ("plain", "--to", "llama"),
        "grow": ("plain", "--set", "intermediate_size=96"),
        "fold": ("masked",),
    }[command]
    line = (command, sources / more[0], tmp_path / "out", *more[1:], "--dtype", "float16")
    refused = run_teleflm(*line, folder=tmp_path)
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].startswith(f"teleflm: {NAME}[7, 3] is 100000, the largest float16 is 65504")
    let = run_teleflm(*line, "--allow-nonfinite", "--overwrite", folder=tmp_path)
    assert let.returncode == 0, let.stderr
    assert load_file(tmp_path / "out/model.safetensors")[NAME][7, 3] == math.inf


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_was_not_finite_before_is_no_overflow(value, tmp_path):
    """A copy or a cast keeps it; a training run with it is refused, see test_megatron."""
    tiny_model(tiny_config()).save_pretrained(tmp_path / "in")
    plant(tmp_path / "in", value)
    for dtype in (None, "bfloat16", "float16"):
        convert_checkpoint(tmp_path / "in", tmp_path / str(dtype), dtype=dtype)
        found = load_file(tmp_path / str(dtype) / "model.safetensors")[NAME][7, 3]
        assert str(float(found)) == str(value)


@pytest.mark.parametrize("method", ["zero", "tile"])
def test_new_weights_are_not_drawn_like_a_nan(method, tmp_path):
    from growth import Tile, Zero

    tiny_model(tiny_config()).save_pretrained(tmp_path / "in")
    plant(tmp_path / "in", math.nan)
    wider = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 176}
    way = {"zero": Zero(), "tile": Tile(noise=0.3)}[method]
    with pytest.raises(NotFinite, match=rf"std\({NAME}\).* is nan, .*the tensor holds a NaN"):
        grow_checkpoint(tmp_path / "in", tmp_path / "out", wider, method=way)
    grow_checkpoint(tmp_path / "in", tmp_path / "let", wider, method=way, options=WriteOptions(allow_nonfinite=True))


def view(folder: Path, array: np.ndarray, dtype: DType) -> View:
    (folder / "in").mkdir(exist_ok=True)
    (folder / "in/source").write_bytes(array.astype(dtype.numpy).tobytes())
    return View.contiguous(identify(folder / "in/source"), 0, array.shape, dtype)


BOX = Box.whole((4, 3))
LIMIT = {FLOAT16: "65504", BFLOAT16: "3.38953139e+38", FLOAT32: "3.40282347e+38", FLOAT64: "1.79769313e+308"}


@pytest.mark.parametrize(
    ("source", "dtype", "value", "changes", "says"),
    [
        (FLOAT32, FLOAT16, 65520.0, {}, "65520"),  # the first that is rounded to infinity
        (FLOAT32, BFLOAT16, 3.4e38, {}, "3.39999995e+38"),
        (BFLOAT16, FLOAT16, -LARGE, {}, "-99840"),
        (FLOAT64, FLOAT32, 1e200, {}, "1e+200"),
        (FLOAT64, BFLOAT16, -1e39, {}, "-1e+39"),
        (BFLOAT16, BFLOAT16, 2.0**127, {"scale": 2.0}, "3.40282367e+38"),
        (FLOAT32, FLOAT32, 3e38, {"scale": 1.5}, "4.50000001e+38"),
        (FLOAT64, FLOAT64, 1e308, {"scale": 10.0}, "inf"),
        (FLOAT16, FLOAT16, 65504.0, {"offset": 32.0}, "65536"),
        (FLOAT32, FLOAT16, 6e4, {"noise": Noise(1e6, 1.0, "n", 0)}, ""),
    ],
    ids=str,
)
def test_a_value_too_large(source, dtype, value, changes, says, tmp_path):
    array = np.ones((4, 3))
    array[2, 1] = value
    copy = Copy(BOX, view(tmp_path, array, source), **changes)
    plan = CheckpointPlan((TensorPlan("w", (2, 6), dtype, (copy,), (4, 3)),), {})
    with pytest.raises(Overflow) as error:
        write_checkpoint(plan, tmp_path / "out", WriteOptions())
    assert str(error.value).startswith(f"w[1, 1] is {says}" if says else "w[")
    assert f", the largest {dtype} is {LIMIT[dtype]}: a wider --dtype holds it" in str(error.value)
    write_checkpoint(plan, tmp_path / "let", WriteOptions(allow_nonfinite=True))


@pytest.mark.parametrize(
    ("source", "dtype", "value"),
    [
        (FLOAT32, FLOAT16, 65519.996),
        (FLOAT32, BFLOAT16, 3.396177e38),
        (BFLOAT16, FLOAT32, 3.38953139e38),
        (FLOAT64, FLOAT32, 3.4028235677e38),
    ],
    ids=str,
)
def test_the_largest_that_fit(source, dtype, value, tmp_path):
    copy = Copy(BOX, view(tmp_path, np.full((4, 3), -value), source))
    write_checkpoint(CheckpointPlan((TensorPlan("w", (4, 3), dtype, (copy,)),), {}), tmp_path / "out", WriteOptions())


@pytest.mark.parametrize(
    ("piece", "says"),
    [
        (lambda v: Fill(BOX, 1e5), "w[0, 0] is 100000, the largest float16"),
        (lambda v: Fill(BOX, Statistic("mean", "source", v, 2.0)), "w[0, 0] is 120000, the largest float16"),
        (lambda v: RowMean(BOX, v, 3.0), "w[0, 0] is 180000, the largest float16"),
        (lambda v: Normal(BOX, 6e4), "w: draws with a standard deviation of 60000 are larger than the largest float16"),
    ],
    ids=["constant", "statistic", "mean", "draws"],
)
def test_what_is_made_too_large(piece, says, tmp_path):
    source = view(tmp_path, np.full((4, 3), 6e4), FLOAT16)
    plan = CheckpointPlan((TensorPlan("w", (4, 3), FLOAT16, (piece(source),)),), {})
    with pytest.raises(CorruptData) as error:
        write_checkpoint(plan, tmp_path / "out", WriteOptions())
    assert str(error.value).startswith(says)
    write_checkpoint(plan, tmp_path / "let", WriteOptions(allow_nonfinite=True))


def test_places_are_those_of_the_tensor(tmp_path):
    """Each in turn, through a permutation and the layout of heads; named one is the one that was planted."""
    for place in [(0, 0), (5, 2), (11, 3)]:
        array = np.ones((12, 4))
        array[place] = LARGE
        source = view(tmp_path, array, FLOAT32).unflatten(0, (3, 4)).permute(1, 0, 2)  # row r is now r % 4 * 3 + r // 4
        copy = Copy(Box.whole((4, 3, 4)), source)
        plan = CheckpointPlan((TensorPlan("w", (12, 4), FLOAT16, (copy,), (4, 3, 4)),), {})
        with pytest.raises(Overflow) as error:
            write_checkpoint(plan, tmp_path / "out", WriteOptions(overwrite=True))
        row = place[0] % 4 * 3 + place[0] // 4
        assert str(error.value).startswith(f"w[{row}, {place[1]}] is 100000")


def test_a_vector_and_a_scalar(tmp_path):
    for shape, name in (((3,), "w[0]"), ((), "w[0]")):
        source = view(tmp_path, np.full(shape, LARGE), FLOAT32)
        plan = CheckpointPlan((TensorPlan.copy_of("w", source, FLOAT16),), {})
        with pytest.raises(Overflow) as error:
            write_checkpoint(plan, tmp_path / "out", WriteOptions(overwrite=True))
        assert str(error.value).startswith(f"{name} is 100000")


def test_the_sign_of_zero_is_kept(tmp_path):
    source = view(tmp_path, np.array([-0.0, 0.0, -1.0]), BFLOAT16)
    for dtype in (FLOAT32, FLOAT16, FLOAT64):
        plan = CheckpointPlan((TensorPlan.copy_of("w", source, dtype),), {})
        write_checkpoint(plan, tmp_path / str(dtype), WriteOptions())
        found = load_file(tmp_path / str(dtype) / "model.safetensors")["w"]
        assert torch.signbit(found).tolist() == [True, False, True]

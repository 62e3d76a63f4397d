# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Rows as 8-bit floats, byte by byte what torch's own casts make of them, however blocks and pieces cut them."""

import bisect
import itertools
from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conversion.checkpoint import assemble, row_quant
from conversion.checkpoint.assemble import Resolved, stream
from conversion.checkpoint.bytes import identify
from conversion.checkpoint.containers import safetensors_shards
from conversion.checkpoint.dtypes import BFLOAT16, BY_NAME, FLOAT8, FLOAT16, FLOAT32, FLOAT64, DType
from conversion.checkpoint.errors import CheckpointError, Overflow, Unquantisable
from conversion.checkpoint.execute import WriteOptions, write_checkpoint
from conversion.checkpoint.plan import (
    Box,
    CheckpointPlan,
    Copy,
    Dequantised,
    Fill,
    Normal,
    PlanError,
    RowQuantised,
    RowScales,
    TensorPlan,
    View,
)
from conversion.checkpoint.reader import FileReader
from tests.fixtures.exact_rounding import round_array

TORCH = {BFLOAT16: torch.bfloat16, FLOAT16: torch.float16, FLOAT32: torch.float32}


def by_torch(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales, and codes as uint8: the largest over 448 in the dtype of the rows, the quotients in float32."""
    scales = rows.abs().amax(1, keepdim=True) / torch.tensor(448.0, dtype=rows.dtype)
    scales = torch.where(scales == 0, torch.finfo(rows.dtype).eps, scales).to(rows.dtype)
    quotients = (rows.float() / scales.float()).clamp(-448, 448)
    return scales, quotients.to(torch.float8_e4m3fn).view(torch.uint8)


def as_torch(array: np.ndarray, dtype: DType) -> torch.Tensor:
    return torch.from_numpy(array.view(np.uint8).copy()).view(TORCH[dtype]).reshape(array.shape)


def quantised(rows: np.ndarray, dtype: DType) -> tuple[torch.Tensor, torch.Tensor]:
    scales, codes = row_quant.scales_of(row_quant.largest_of(rows), dtype), np.empty(rows.shape, np.uint8)
    row_quant.quantise(rows, scales, codes)
    return as_torch(scales[:, None], dtype), torch.from_numpy(codes)


@pytest.mark.parametrize("dtype", TORCH, ids=str)
def test_rows_of_every_size(dtype):
    """Rows from the smallest numbers of a type to its largest, rows of zeros, of one value, and of long tails."""
    rng = np.random.default_rng(0)
    least, most = (14, 15) if dtype == FLOAT16 else (120, 120)
    rows = rng.standard_normal((80, 333)) * 2.0 ** np.linspace(-least, most - 8, 80)[:, None]
    rows[0], rows[1, 1:], rows[2] = 0.0, 0.0, rng.choice([-1.0, 1.0], 333)
    rows[3] *= 10.0 ** rng.uniform(-4, 0, 333)
    rows = rows.astype(np.float32).astype(dtype.numpy)
    for found, expected in zip(quantised(rows, dtype), by_torch(as_torch(rows, dtype)), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("exponent", [1, 64, 119, 127, 200, 245])
def test_every_bfloat16_over_scales_of_every_fraction(exponent):
    """All finite bfloat16 that a row may have beside its scale."""
    words = np.arange(1 << 16, dtype=np.uint16)
    row = words[(words & 0x7F80) != 0x7F80].view(ml_dtypes.bfloat16)
    for fraction in range(0, 128, 7):
        scale = np.array([exponent << 7 | fraction], np.uint16).view(ml_dtypes.bfloat16)
        kept = row[np.abs(row.astype(np.float64)) <= 449.75 * float(scale[0])]  # the scale was rounded, perhaps down
        codes = np.empty((1, len(kept)), np.uint8)
        row_quant.quantise(kept[None], scale, codes)
        quotients = as_torch(kept, BFLOAT16).float() / as_torch(scale, BFLOAT16).float()
        expected = quotients.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
        assert torch.equal(torch.from_numpy(codes[0]), expected), fraction


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
def test_a_code_is_the_exact_quotient_rounded_once(dtype):
    """By fractions. torch's own quotients in 16 bits are rounded before, and are not always that."""
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((2, 400)).astype(np.float32).astype(dtype.numpy)
    scales, codes = quantised(rows, dtype)
    grid = [Fraction(float(x)) for x in np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)]
    for row, scale, words in zip(rows, scales, codes, strict=True):
        for value, word in zip(row, words.tolist(), strict=True):
            quotient = abs(Fraction(float(value)) / Fraction(float(scale)))
            after = bisect.bisect(grid, quotient)
            near = [after - 1, *([after] if after < len(grid) else [])]
            assert word & 0x7F == min(near, key=lambda code: (abs(quotient - grid[code]), code % 2))
    eager = (as_torch(rows, dtype) / scales).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    assert 0 < (eager != codes).float().mean() < 0.05


def test_float32_cut_to_16_bits_loses_nothing_that_decides():
    """Middles of two neighbours, and the float32 on both sides of each."""
    codes = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    middles = (codes[1:] + codes[:-1]) / 2
    values = np.concatenate([np.nextafter(middles, np.float32(0)), middles, np.nextafter(middles, np.float32(999))])
    values = np.concatenate([values, -values, np.float32([464, 1e30, -1e30])])
    found = np.empty(values.shape, np.uint8)
    row_quant.quantise(values[None], np.ones(1, np.float32), found[None])
    expected = torch.from_numpy(values).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(torch.from_numpy(found), expected)


# Tensors of files.


def store(path: Path, array: np.ndarray, dtype: DType) -> View:
    path.write_bytes(b"x" * 16 + array.astype(dtype.numpy).tobytes())
    return View.contiguous(identify(path), 16, array.shape, dtype)


def rows_and_scales(values: TensorPlan) -> tuple[TensorPlan, TensorPlan]:
    whole, rows = Box.whole(values.shape), values.shape[0]
    return (
        TensorPlan(values.name, values.shape, FLOAT8, (RowQuantised(whole, values),)),
        TensorPlan(f"{values.name}_scale", (rows, 1), values.dtype, (RowScales(Box.whole((rows, 1)), values),)),
    )


def values_of(
    folder: Path, shape: tuple[int, int] = (23, 17), dtype: DType = BFLOAT16
) -> tuple[TensorPlan, np.ndarray]:
    """A tensor in pieces that cut its rows, one of them transposed, one scaled, one a constant; and what it is."""
    rng = np.random.default_rng(2)
    left, right = (rng.standard_normal((shape[0], n)).astype(np.float32) for n in (5, shape[1] - 7))
    pieces = (
        Copy(Box((0, 0), left.shape), store(folder / "left", np.ascontiguousarray(left.T), FLOAT32).permute(1, 0)),
        Fill(Box((0, 5), (shape[0], 2)), 0.25),
        Copy(Box((0, 7), right.shape), store(folder / "right", right, FLOAT32), 3.0),
    )
    dense = np.concatenate([left, np.full((shape[0], 2), 0.25, np.float32), right * np.float32(3)], 1)
    return TensorPlan("w.weight", shape, dtype, pieces), dense.astype(dtype.numpy)


@pytest.mark.parametrize(("block", "stretch"), [*itertools.product([7, 40, 1000], [5, 17, 100])])
@pytest.mark.parametrize("scales_first", [False, True], ids=["rows first", "scales first"])
def test_blocks_and_stretches_that_cut_rows(block, stretch, scales_first, tmp_path):
    values, dense = values_of(tmp_path)
    tensors, found = rows_and_scales(values), {}
    with FileReader() as reader:
        resolved = Resolved({}, {})
        for tensor in reversed(tensors) if scales_first else tensors:
            chunks = []
            for start in range(0, tensor.numel, block):
                stop = min(start + block, tensor.numel)
                made = stream(tensor, start, stop, reader=reader, resolved=resolved, seed=0, stretch=stretch)
                chunks += map(bytes, made)
            found[tensor.dtype] = b"".join(chunks)
    scales, codes = by_torch(as_torch(dense, BFLOAT16))
    assert found[FLOAT8] == codes.numpy().tobytes()
    assert found[BFLOAT16] == scales.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("workers", [1, 8])
@pytest.mark.parametrize("dtype", TORCH, ids=str)
def test_files(dtype, workers, tmp_path, monkeypatch):
    monkeypatch.setattr(assemble, "BLOCK", 50)
    values, dense = values_of(tmp_path, dtype=dtype)
    plan = CheckpointPlan(rows_and_scales(values), {})
    write_checkpoint(plan, tmp_path / "out", WriteOptions(workers=workers, max_shard_size=10))
    found = load_file(tmp_path / "out/model.safetensors")  # one file: rows and scales are not parted
    scales, codes = by_torch(as_torch(dense, dtype))
    assert torch.equal(found["w.weight_scale"], scales)
    assert torch.equal(found["w.weight"].view(torch.uint8), codes)


def test_scales_are_not_read_for_again(tmp_path, monkeypatch):
    """The rows of a tensor are made once, but for those that lie in two blocks."""
    monkeypatch.setattr(assemble, "BLOCK", 17 * 4)
    values, _ = values_of(tmp_path)
    made, real = [], assemble.assemble

    def counting(tensor, start, stop, *args, **kwargs):
        made.append(stop - start)
        real(tensor, start, stop, *args, **kwargs)

    monkeypatch.setattr(assemble, "assemble", counting)
    write_checkpoint(CheckpointPlan(rows_and_scales(values), {}), tmp_path / "out", WriteOptions(workers=1))
    assert sum(made) == values.numel


def test_what_is_kept_of_scales_is_bounded(tmp_path, monkeypatch):
    found = row_quant.FoundScales()
    monkeypatch.setattr(row_quant, "KEPT_SCALES_BYTES", 100)
    tensors = [TensorPlan(name, (40, 3), BFLOAT16, ()) for name in "abc"]
    for tensor in tensors:
        found.put(tensor, 10, np.full(5, 2.0, ml_dtypes.bfloat16))
    known = [np.isfinite(found.get(tensor, 0, 40).astype(float)).sum() for tensor in tensors]
    assert known == [0, 0, 5]


def test_rows_and_scales_share_a_file(tmp_path):
    values, _ = values_of(tmp_path)
    pair = rows_and_scales(values)
    other = TensorPlan("other", (10,), FLOAT32, (Fill(Box.whole((10,)), 1.0),))
    files = [[t.name for t, _ in shard.tensors] for shard in safetensors_shards([other, *pair, other], pair[0].nbytes)]
    assert files == [["other"], ["w.weight_scale", "w.weight"], ["other"]]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize("stretch", [100, 6])
def test_what_is_not_finite_is_refused_by_its_place(value, allow, stretch, tmp_path):
    array = np.ones((9, 17), np.float32)
    array[5, 11] = value
    values = TensorPlan.copy_of("w.weight", store(tmp_path / "w", array, BFLOAT16))
    for tensor in rows_and_scales(values):
        with (
            FileReader() as reader,
            pytest.raises(Unquantisable, match=r"^w\.weight\[5, 11\] is NaN or infinite as bf"),
        ):
            list(
                stream(
                    tensor,
                    0,
                    tensor.numel,
                    reader=reader,
                    resolved=Resolved({}, {}),
                    seed=0,
                    stretch=stretch,
                    allow_nonfinite=allow,
                )
            )


@pytest.mark.parametrize("change", ["shape", "dtype", "values dtype", "random", "layout", "second piece", "scales"])
def test_plans_that_do_not_add_up(change, tmp_path):
    values, _ = values_of(tmp_path, dtype=FLOAT64 if change == "values dtype" else BFLOAT16)
    if change == "random":
        values = TensorPlan("w", (23, 17), BFLOAT16, (Normal(Box.whole((23, 17)), 0.1),))
    rows, scales = rows_and_scales(values)
    box = Box.whole((23, 17))
    broken = {
        "shape": TensorPlan("w", (17, 23), FLOAT8, (RowQuantised(Box.whole((17, 23)), values),)),
        "dtype": TensorPlan("w", (23, 17), BY_NAME["float8_e5m2"], (RowQuantised(box, values),)),
        "layout": TensorPlan("w", (23, 17), FLOAT8, (RowQuantised(Box.whole((391,)), values),), (391,)),
        "second piece": TensorPlan("w", (23, 17), FLOAT8, (*rows.pieces, *rows.pieces)),
        "scales": TensorPlan("w", (23, 1), FLOAT32, scales.pieces),
    }
    with pytest.raises(PlanError, match=r"^w"):
        broken.get(change, rows).check()
    values_of(tmp_path)[0].check()


# Back.


@pytest.mark.parametrize("out", [*TORCH, FLOAT64], ids=str)
@pytest.mark.parametrize("scale_dtype", TORCH, ids=str)
@pytest.mark.parametrize("kind", ["row", "tensor"])
def test_products_are_rounded_once(kind, scale_dtype, out, tmp_path, monkeypatch):
    """Every code times scales of every size, rounded by fractions."""
    monkeypatch.setattr(assemble, "BLOCK", 300)
    codes = np.tile(np.arange(256, dtype=np.uint8), (6, 1))
    codes[codes & 0x7F == 0x7F] = 0  # NaN
    least, most = (20, 4) if FLOAT16 in (scale_dtype, out) else (130, 100)
    rng = np.random.default_rng(3)
    scales = (rng.uniform(1, 2, (6, 1)) * 2.0 ** np.linspace(-least, most, 6)[:, None]).astype(np.float32)
    scales = scales.astype(scale_dtype.numpy)
    source = store(tmp_path / "codes", codes.view(ml_dtypes.float8_e4m3fn), FLOAT8)
    view = store(tmp_path / "scales", scales, scale_dtype)
    view = View(view.file, view.offset, codes.shape, (1 if kind == "row" else 0, 0), scale_dtype)
    plan = CheckpointPlan(
        (TensorPlan("w", codes.shape, out, (Dequantised(Box.whole(codes.shape), source, view),)),), {}
    )
    write_checkpoint(plan, tmp_path / "out", WriteOptions(workers=2))
    factors = scales if kind == "row" else scales[:1]
    exact = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64) * factors.astype(np.float64)  # of 28 bits at most
    found = load_file(tmp_path / "out/model.safetensors")["w"].double().numpy()
    np.testing.assert_array_equal(found, round_array(lambda value: value, exact, out.name))


def test_a_product_that_is_too_large(tmp_path):
    source = store(tmp_path / "codes", np.full((3, 4), 448.0), FLOAT8)
    scales = store(tmp_path / "scales", np.array([[1.0], [200.0], [1.0]]), FLOAT32)
    scales = View(scales.file, scales.offset, (3, 4), (1, 0), FLOAT32)
    plan = CheckpointPlan((TensorPlan("w", (3, 4), FLOAT16, (Dequantised(Box.whole((3, 4)), source, scales),)),), {})
    with pytest.raises(Overflow, match=r"w\[1, 0\] is 89600, the largest float16 is 65504"):
        write_checkpoint(plan, tmp_path / "out", WriteOptions())
    write_checkpoint(plan, tmp_path / "allowed", WriteOptions(allow_nonfinite=True))
    assert load_file(tmp_path / "allowed/model.safetensors")["w"].isinf().sum() == 4


def test_the_least_memory_is_told(tmp_path):
    values, _ = values_of(tmp_path)
    plan = CheckpointPlan(rows_and_scales(values), {})
    with pytest.raises(CheckpointError, match=r"the least that works is (2\d|3\d)MB"):
        write_checkpoint(plan, tmp_path / "out", WriteOptions(memory="10MB"))

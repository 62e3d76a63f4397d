# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Checkpoints in 8-bit floating point, as compressed-tensors keeps them: written with a scale a row, read and undone.

What is written is its scheme FP8_DYNAMIC: the weights of linear layers in float8_e4m3fn, `weight_scale` [rows, 1]
beside each, activations left to whoever computes. `lm_head`, embeddings and norms stay. What is read has one scale for
a tensor, or one for each of its rows. The arithmetic is in `checkpoint/row_quant.py`.
"""

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .architecture import Architecture
from .checkpoint.dtypes import FLOAT8, FLOAT64, DType
from .checkpoint.errors import CheckpointError, printable
from .checkpoint.plan import Box, Dequantised, RowQuantised, RowScales, TensorPlan, View
from .checkpoint.sources import Source
from .mapping import LAYER, axis_size

FP8 = "fp8"
_FIELD = "quantization_config"
_BLOCK = 128  # of fp8-block, along rows and columns
_WEIGHT, _SCALE, _INPUT_SCALE = ".weight", ".weight_scale", ".input_scale"
_OTHER_SCALE = re.compile(r".+\.(weight|input|output|q|k|v)_(scale|zero_point|packed|shape|g_idx|global_scale)")
# What a release of compressed-tensors writes into config.json; `tests/external` holds it against that one.
_QUANTIZATION_CONFIG: dict[str, Any] = {
    "config_groups": {
        "group_0": {
            "format": "float-quantized",
            "input_activations": {
                "dynamic": True,
                "group_size": None,
                "num_bits": 8,
                "strategy": "token",
                "symmetric": True,
                "type": "float",
            },
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "dynamic": False,
                "group_size": None,
                "num_bits": 8,
                "strategy": "channel",
                "symmetric": True,
                "type": "float",
            },
        }
    },
    "format": "float-quantized",
    "global_compression_ratio": None,
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
    "moe_sparsity_config": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
    "sparsity_config": {},
    "transform_config": {},
    "version": "0.20.1",
}


# Writing.


def check_scheme(scheme: str | None, architecture: Architecture | None = None) -> None:
    """Refuse a scheme that is not written.

    Args:
        scheme: as `--quantize` has it.
        architecture: of the model, which says why; what it does not decide is all that is looked at without.

    Raises:
        CheckpointError: it is not `fp8`.
    """
    if scheme in (None, FP8):
        return
    if scheme != "fp8-block":
        raise CheckpointError(f"--quantize is {scheme!r}; {FP8} is what there is.")
    if architecture is None:
        return
    sizes = dict.fromkeys(axis_size(axis, architecture) for weight in LAYER for axis in weight.axes)
    odd = ", ".join(f"{size:,}" for size in sizes if size % _BLOCK)
    why = f"blocks of {_BLOCK} do not divide this model's {odd}" if odd else "blocks are not written here"
    raise CheckpointError(f"--quantize fp8-block: {why}; --quantize {FP8} has a scale for each row instead.")


def quantise_linear(tensors: Iterable[TensorPlan]) -> tuple[TensorPlan, ...]:
    """The plans of a Tele-FLM's tensors, with those of its linear layers, but the head, as 8-bit floats and scales.

    Args:
        tensors: by their names on the Hub.

    Raises:
        CheckpointError: a weight is in a dtype that gives no scales.
    """
    return tuple(part for tensor in tensors for part in _quantised(tensor))


def _quantised(tensor: TensorPlan) -> Iterator[TensorPlan]:
    if not (tensor.name.startswith("model.layers.") and len(tensor.shape) == 2):
        yield tensor
        return
    if tensor.dtype == FLOAT64:
        raise CheckpointError(f"{tensor.name} is float64, and --quantize takes 16 or 32 bits; give --dtype bfloat16.")
    rows = tensor.shape[0]
    yield TensorPlan(tensor.name, tensor.shape, FLOAT8, (RowQuantised(Box.whole(tensor.shape), tensor),))
    scales = (RowScales(Box.whole((rows, 1)), tensor),)
    yield TensorPlan(scale_name(tensor.name), (rows, 1), tensor.dtype, scales)


def scale_name(weight: str) -> str:
    """The name of the scales of a weight."""
    return weight.removesuffix(_WEIGHT) + _SCALE


def quantised_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that says how `quantise_linear` has quantised the weights."""
    return dict(sorted({**config, "quantization_config": copy.deepcopy(_QUANTIZATION_CONFIG)}.items()))


# Reading.


@dataclass(frozen=True)
class Float8Weights:
    """A checkpoint with weights in 8-bit floats that can be undone.

    Args:
        tensors: all but the scales.
        scales: of each weight in 8-bit floats, the scale of every element: windows of the weight's shape.
        left_out: names of scales of activations, which weights have no use for.
    """

    tensors: dict[str, View]
    scales: dict[str, View]
    left_out: list[str]

    def plan(self, name: str, dtype: DType) -> TensorPlan:
        """The plan of a tensor in another dtype: where it is in 8-bit floats, its products with its scales."""
        view, scale = self.tensors[name], self.scales.get(name)
        if scale is None:
            return TensorPlan.copy_of(name, view, dtype if view.dtype.is_floating else None)
        return TensorPlan(name, view.shape, dtype, (Dequantised(Box.whole(view.shape), view, scale),))


def is_float8(config: Mapping[str, Any] | None) -> bool:
    """Whether a configuration describes weights that `read_float8` reads."""
    return other_scheme(config) is None


def read_float8(source: Source) -> Float8Weights:
    """The weights of a checkpoint whose configuration `is_float8`.

    Raises:
        CheckpointError: a weight has no scale that fits it, a scale no weight, there is something else beside them, or
            nothing is in 8-bit floats.
    """
    tensors, scales, left_out = dict(source.tensors), {}, []
    for name in source.tensors:
        if name.endswith(_INPUT_SCALE):
            left_out.append(name)
            del tensors[name]
        elif name.endswith(_SCALE):
            weight = name.removesuffix(_SCALE) + _WEIGHT
            scales[weight] = _scale_of_each(source, weight, name)
            del tensors[name]
    for name, view in tensors.items():
        if _OTHER_SCALE.fullmatch(name):
            raise CheckpointError(
                f"{source.folder}: {name} belongs to a quantisation that config.json does not describe; correct it."
            )
        if view.dtype == FLOAT8 and name not in scales:
            raise CheckpointError(f"{source.folder}: {name} is {FLOAT8}, its scale is missing; download it again.")
        if view.dtype != FLOAT8 and not view.dtype.is_floating and name.endswith(_WEIGHT):
            raise CheckpointError(
                f"{source.folder}: {name} is {view.dtype}, config.json says 8-bit floats; correct it."
            )
    if not scales:
        raise CheckpointError(
            f"{source.folder}: {_FIELD} of its config.json says 8-bit floats, and no tensor is; remove it from there."
        )
    return Float8Weights(tensors, scales, left_out)


def _scale_of_each(source: Source, weight: str, name: str) -> View:
    """The scale of each element of a weight, as a window that repeats it."""
    view, scale = source.tensors.get(weight), source.tensors[name]
    if view is None or view.dtype != FLOAT8:
        what = "is missing" if view is None else f"is {view.dtype}"
        raise CheckpointError(f"{source.folder}: {name} is there, but {weight} {what}, expected {FLOAT8}.")
    if scale.dtype.name not in ("bfloat16", "float16", "float32"):
        raise CheckpointError(f"{source.folder}: {name} is {scale.dtype}, expected bfloat16, float16 or float32.")
    is_one = scale.numel == 1
    if len(view.shape) != 2 or not (is_one or scale.shape in ((view.shape[0], 1), view.shape[:1])):
        raise CheckpointError(
            f"{source.folder}: {name} has shape {scale.shape}, {weight} {view.shape}; one scale, or one a row, is read."
        )
    return View(scale.file, scale.offset, view.shape, (0 if is_one else 1, 0), scale.dtype)


def other_scheme(config: Mapping[str, Any] | None) -> str | None:
    """What of a configuration is not 8-bit floats with a scale a tensor or a row, and its value; None if nothing is."""
    settings = (config or {}).get(_FIELD)
    if not isinstance(settings, Mapping) or settings.get("quant_method") != "compressed-tensors":
        return f"its {_FIELD} is none of compressed-tensors"
    groups = settings.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        return _said("config_groups", groups)
    for field in ("kv_cache_scheme", "sparsity_config", "transform_config", "moe_sparsity_config"):
        if settings.get(field) and not _is_dense(settings[field]):
            return _said(field, settings[field])
    wanted = {"type": "float", "num_bits": 8, "symmetric": True}
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            return _said(f"config_groups.{name}.weights", weights)
        if weights.get("strategy") not in ("tensor", "channel"):
            return _said(f"config_groups.{name}.weights.strategy", weights.get("strategy"))
        if odd := next((field for field, value in wanted.items() if weights.get(field) != value), None):
            return _said(f"config_groups.{name}.weights.{odd}", weights.get(odd))
    return None


def _is_dense(sparsity: Any) -> bool:
    """Whether a sparsity_config says that nothing is packed, as llm-compressor writes it of whole matrices."""
    return isinstance(sparsity, Mapping) and sparsity.get("format") == "dense"


def _said(field: str, value: Any) -> str:
    text = printable(repr(value))
    return f"{printable(field)} of its {_FIELD} is {text if len(text) <= 80 else text[:77] + '...'}"

# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Element types, in the four vocabularies a checkpoint is written in."""

from dataclasses import dataclass

import ml_dtypes
import numpy as np


@dataclass(frozen=True, slots=True)
class DType:
    """An element type.

    Args:
        name: torch's; of types that torch does not have, as torch would call them.
        code: of safetensors; empty where the format has none.
        storage: torch's storage class; empty where that is untyped, and a tensor says its dtype itself.
        numpy: of one item. Bytes of types that numpy and ml_dtypes do not have are copied as they are.
        packed: values that share an item. A shape counts items, as torch's does, where that of safetensors counts
            values along the last dimension.
    """

    name: str
    code: str
    storage: str
    numpy: np.dtype
    packed: int = 1

    @property
    def itemsize(self) -> int:
        """Bytes per item."""
        return self.numpy.itemsize

    @property
    def is_floating(self) -> bool:
        """Whether values may be scaled, cast and drawn at random in this type; those of any other are only copied."""
        return self.name in ("bfloat16", "float16", "float32", "float64")

    @property
    def compute(self) -> np.dtype:
        """The type arithmetic is done in before the one rounding to this type."""
        return np.dtype(np.float32 if self.itemsize <= 2 else np.float64)

    def holds(self, other: "DType") -> bool:
        """Whether this floating-point type has every value of another one, so that a cast rounds nothing."""
        wide, narrow = (ml_dtypes.finfo(dtype.numpy) for dtype in (self, other))
        least = wide.minexp - wide.nmant <= narrow.minexp - narrow.nmant
        return bool(wide.nmant >= narrow.nmant and wide.maxexp >= narrow.maxexp and least)

    def __str__(self) -> str:
        return self.name


DTYPES: tuple[DType, ...] = (
    DType("bfloat16", "BF16", "BFloat16Storage", np.dtype(ml_dtypes.bfloat16)),
    DType("float16", "F16", "HalfStorage", np.dtype("<f2")),
    DType("float32", "F32", "FloatStorage", np.dtype("<f4")),
    DType("float64", "F64", "DoubleStorage", np.dtype("<f8")),
    DType("complex64", "C64", "ComplexFloatStorage", np.dtype("<c8")),
    DType("complex128", "", "ComplexDoubleStorage", np.dtype("<c16")),
    DType("float8_e4m3fn", "F8_E4M3", "", np.dtype(ml_dtypes.float8_e4m3fn)),
    DType("float8_e5m2", "F8_E5M2", "", np.dtype(ml_dtypes.float8_e5m2)),
    DType("float8_e4m3fnuz", "F8_E4M3FNUZ", "", np.dtype(ml_dtypes.float8_e4m3fnuz)),
    DType("float8_e5m2fnuz", "F8_E5M2FNUZ", "", np.dtype(ml_dtypes.float8_e5m2fnuz)),
    DType("float8_e8m0fnu", "F8_E8M0", "", np.dtype(ml_dtypes.float8_e8m0fnu)),
    DType("float6_e2m3fn_x4", "F6_E2M3", "", np.dtype("V3"), packed=4),
    DType("float6_e3m2fn_x4", "F6_E3M2", "", np.dtype("V3"), packed=4),
    DType("float4_e2m1fn_x2", "F4", "", np.dtype("V1"), packed=2),
    DType("int64", "I64", "LongStorage", np.dtype("<i8")),
    DType("int32", "I32", "IntStorage", np.dtype("<i4")),
    DType("int16", "I16", "ShortStorage", np.dtype("<i2")),
    DType("int8", "I8", "CharStorage", np.dtype("i1")),
    DType("uint64", "U64", "", np.dtype("<u8")),
    DType("uint32", "U32", "", np.dtype("<u4")),
    DType("uint16", "U16", "", np.dtype("<u2")),
    DType("uint8", "U8", "ByteStorage", np.dtype("u1")),
    DType("bool", "BOOL", "BoolStorage", np.dtype("?")),
)

BY_NAME = {dtype.name: dtype for dtype in DTYPES}
BY_CODE = {dtype.code: dtype for dtype in DTYPES if dtype.code}

BFLOAT16 = BY_NAME["bfloat16"]
FLOAT16 = BY_NAME["float16"]
FLOAT32 = BY_NAME["float32"]
FLOAT64 = BY_NAME["float64"]
FLOAT8 = BY_NAME["float8_e4m3fn"]
# Of ggml: 32 values and their scale are an item. Neither torch nor safetensors has such.
Q8_0 = DType("q8_0", "", "", np.dtype("V34"), packed=32)


_SPELLINGS = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "f16": "float16",
    "half": "float16",
    "fp32": "float32",
    "f32": "float32",
    "float": "float32",
    "fp64": "float64",
    "f64": "float64",
    "double": "float64",
}


def dtype_name(text: str) -> str:
    """Torch's name of a floating dtype in any spelling of the field (`bf16`, `fp32`, `torch.half`); else the text."""
    name = text.strip().lower().removeprefix("torch.")
    return _SPELLINGS.get(name, name if name in BY_NAME else text)


def parse_dtype(name: str) -> DType:
    """Look up a floating dtype as users write it (`bfloat16`, `float16`, `float32`, `float64`, `bf16`, `torch.half`).

    Raises:
        ValueError: the name is none of those.
    """
    dtype = BY_NAME.get(dtype_name(name))
    if dtype is None or not dtype.is_floating:
        raise ValueError(f"dtype {name!r} is not one of bfloat16, float16, float32, float64.")
    return dtype

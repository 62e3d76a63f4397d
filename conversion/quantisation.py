# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Quantised checkpoints: how they are told, and what is not done to them.

Their weights mean nothing without the scales beside them, and a scale that is rounded scales everything wrongly. So
they are copied as they are, or refused; 8-bit floats as compressed-tensors keeps them can be undone, see
`compressed_tensors.py`.
"""

import re
from collections.abc import Mapping
from typing import Any

from .checkpoint.errors import CheckpointError
from .checkpoint.plan import View
from .checkpoint.sources import Source
from .compressed_tensors import is_float8

CONFIG_FIELDS = ("quantization_config", "compression_config")
# Tensors that belong to a quantised weight: FP8 of DeepSeek and others; compressed-tensors; GPTQ and AWQ; bitsandbytes
# in 8 and 4 bits; MXFP4.
_COMPANION = re.compile(
    r".+(_scale_inv"
    r"|\.(weight|input|output|k|v)_(scale|zero_point|packed|shape|g_idx|global_scale)"
    r"|\.(qweight|qzeros|g_idx)"
    r"|\.(SCB|weight_format|absmax|quant_map|nested_absmax|nested_quant_map)"
    r"|\.quant_state\..+"
    r"|_blocks)"
)


def quantisation(config: Mapping[str, Any] | None, tensors: Mapping[str, View]) -> str | None:
    """How a checkpoint is quantised and what says so, in words; None if it is not.

    Args:
        config: the content of its config.json.
        tensors: by name.
    """
    for field in CONFIG_FIELDS:
        settings = (config or {}).get(field)
        if settings:
            method = settings.get("quant_method") if isinstance(settings, Mapping) else None
            return f"{str(method)[:40] if method else 'by an unnamed method'}, says {field} of its config.json"
    for name, view in tensors.items():
        if _COMPANION.fullmatch(name):
            return f"it holds {name}"
        is_whole = view.dtype.name.startswith(("int", "uint")) and name.endswith(".weight")
        if is_whole or view.dtype.name.startswith(("float8_", "float6_", "float4_")):
            return f"{name} is {view.dtype}"
    return None


def refuse_quantised(checkpoint: Source, doing: str) -> None:
    """Refuse to change the weights of a quantised checkpoint.

    Args:
        checkpoint: the source.
        doing: what cannot be done, for the message: `grow`.

    Raises:
        CheckpointError: it is quantised.
    """
    how = quantisation(checkpoint.config, checkpoint.tensors)
    if how:
        first = "`teleflm convert --dtype bfloat16`" if is_float8(checkpoint.config) else "dequantise it"
        raise CheckpointError(
            f"{checkpoint.folder}: is quantised ({how}); {doing} would change its weights without their scales. Take "
            f"the original, or {first} first."
        )

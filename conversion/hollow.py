# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""A preset as a checkpoint whose weights are holes in files: enough to plan with before anything is downloaded."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .architecture import Architecture, load_preset, preset_names
from .checkpoint.containers import safetensors_layout
from .checkpoint.dtypes import BFLOAT16
from .checkpoint.plan import TensorPlan
from .mapping import weights

_SHARD_BYTES = 5 * 10**9


def is_preset(source: str) -> bool:
    """Whether a source names a preset; a folder, file or link of that name goes first, also one that leads nowhere."""
    return source in preset_names() and not os.path.lexists(source)


@contextmanager
def hollow_checkpoint(preset: str) -> Iterator[Path]:
    """A Hub folder with a preset's config.json and safetensors files of its bfloat16 weights, which are all holes.

    It takes no room but for the headers, and is gone afterwards. Its values, zeros, are nobody's.

    Args:
        preset: the name.

    Raises:
        CheckpointError: there is no such preset.
    """
    config = load_preset(preset)
    architecture = Architecture.from_config(config)
    plans = [TensorPlan(name, weight.shape(architecture), BFLOAT16, ()) for name, weight, _ in weights(architecture)]
    layout = safetensors_layout(plans, _SHARD_BYTES)
    with tempfile.TemporaryDirectory(prefix="teleflm-") as place:
        folder = Path(place, preset)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        for shard in layout.shards:
            with (folder / shard.filename).open("wb") as file:
                file.write(shard.header)
                file.truncate(shard.nbytes)
        if layout.index:
            name, content = layout.index
            (folder / name).write_bytes(content)
        yield folder


__all__ = ["hollow_checkpoint", "is_preset"]

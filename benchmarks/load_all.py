# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The usual way to merge and rewrite shards, to compare with: everything in memory, then one safetensors file."""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file


def main(source: Path, out: Path) -> None:
    """Load every `.bin` of a folder, write one safetensors file, fsync it."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(source.glob("*.bin")):
        tensors |= torch.load(file, weights_only=True)
    out.mkdir()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    descriptor = os.open(out / "model.safetensors", os.O_RDWR)
    os.fsync(descriptor)
    os.close(descriptor)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What a fine-tuned model was made from: the record beside its weights, as conversion and growth write it.

It is published with the weights, so it holds digests and numbers, and no path.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash

from conversion.architecture import MODEL_TYPE, Architecture
from conversion.checkpoint.assemble import BLOCK
from conversion.checkpoint.manifest import (
    MANIFEST,
    block_digest,
    make_manifest,
    parent_record,
    tensor_digest,
)
from conversion.checkpoint.plan import View
from conversion.checkpoint.reader import FileReader
from conversion.checkpoint.sources import Source, open_checkpoint
from conversion.hub.card import model_card
from conversion.hub.lineage import lineage_steps

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_CARD = "README.md"


def base_digest(base: Source) -> str:
    """A digest that tells one base model from another, at the cost of the first row of each of its tensors.

    Values count as bfloat16, so that a base is the same in every dtype and container that holds these.
    """
    import ml_dtypes

    digest = xxhash.xxh3_128()
    with FileReader() as reader:
        for name, view in sorted(base.tensors.items()):
            digest.update(f"{name} {list(view.shape)}".encode())
            row = reader.read(view[:1] if view.shape else view)
            digest.update(row.astype(ml_dtypes.bfloat16).tobytes())
    return digest.hexdigest()


def describe_base(base: Source) -> dict[str, Any]:
    """What the lineage of a fine-tuned model says of the one it was made from: its digest, and its own lineage."""
    return {"base": base_digest(base), "parent": parent_record(Path(base.folder))}


def write_record(folder: Path, lineage: Mapping[str, Any], seed: int) -> None:
    """Write the record, with the digest of every tensor, and the model card of a Tele-FLM into a saved model.

    Args:
        folder: holds a whole model, or the weights of an adapter.
        lineage: `operation`, what was done, and [`describe_base`].
        seed: of the run.
    """
    is_adapter = (folder / ADAPTER_WEIGHTS).is_file()
    saved = open_checkpoint(folder / ADAPTER_WEIGHTS if is_adapter else folder)
    with FileReader() as reader:
        tensors = {
            name: {
                "file": Path(view.file.name).name,
                "dtype": view.dtype.name,
                "shape": list(view.shape),
                "digest": tensor_digest(_block_digests(view, reader)),
            }
            for name, view in saved.tensors.items()
        }
    plan = hashlib.sha256(json.dumps([lineage, seed, tensors], sort_keys=True).encode()).hexdigest()
    manifest = make_manifest(plan=plan, seed=seed, lineage=lineage, tensors=tensors, digests=True)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    config = saved.config or {}
    if not is_adapter and config.get("model_type") == MODEL_TYPE:
        architecture = Architecture.from_config(config, str(folder / "config.json"), with_biases=True)
        dtype = next(iter(saved.tensors.values())).dtype.name
        (folder / _CARD).write_text(model_card(architecture, dtype, lineage_steps(lineage)), encoding="utf-8")


def _block_digests(view: View, reader: FileReader) -> Iterator[bytes]:
    flat = View.contiguous(view.file, view.offset, (view.numel,), view.dtype)
    for start in range(0, view.numel, BLOCK):
        yield block_digest(reader.chunks(flat[start : start + BLOCK]))


__all__ = ["ADAPTER_WEIGHTS", "base_digest", "describe_base", "write_record"]

# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The record and the card of a folder that a trainer saved, beside its weights, as the engine writes them.

They are published with the weights, so they hold digests and numbers, and no path.
"""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..architecture import MODEL_TYPE
from ..checkpoint.assemble import BLOCK
from ..checkpoint.atomic_file import write_atomically
from ..checkpoint.check import outside_tensors
from ..checkpoint.errors import CheckpointError
from ..checkpoint.folder_formats import is_setting, is_weights, known_files
from ..checkpoint.job import json_bytes
from ..checkpoint.manifest import MANIFEST, between_digest, block_digest, make_manifest, sample_digest, tensor_digest
from ..checkpoint.plan import View
from ..checkpoint.reader import FileReader
from ..checkpoint.sources import WEIGHT_FILES, Source, open_checkpoint
from .card import CARD, is_repo_id, model_facts, render_card, with_files
from .small_files import is_text_or_code

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def has_saved_weights(folder: Path) -> bool:
    """Whether a folder holds weights that a record can be about: a model's, or an adapter's.

    A trainer that is told to save each process's part (FSDP's SHARDED_STATE_DICT, ZeRO 3 without gathering) leaves
    none; `teleflm convert` makes a folder of these.
    """
    return any((folder / name).is_file() for name in (*WEIGHT_FILES, ADAPTER_WEIGHTS))


def record_saved_model(
    folder: Path,
    lineage: Mapping[str, Any],
    seed: int,
    *,
    digests: bool = True,
    model_types: Collection[str] = (MODEL_TYPE,),
    origin: Path | None = None,
    base: str = "",
) -> None:
    """Write the record, and the model card of a Tele-FLM or a Llama, into a saved model; one process of a run does so.

    Args:
        folder: holds a whole model, or the weights of an adapter.
        lineage: `operation`, what was done, and `parent`, see `checkpoint.parent`.
        seed: of the run.
        digests: read all weights for the digest of each tensor; without, the record has samples of the files alone,
            which costs the same for every size of model.
        model_types: of the configurations of which there is a card of ours.
        origin: folder of the model it was made from, whose licence and language it keeps.
        base: name of that model; the card has it where it is one of the Hub.

    Raises:
        CheckpointError: there are no weights, or they cannot be read.
    """
    try:
        saved = open_checkpoint(folder / ADAPTER_WEIGHTS if (folder / ADAPTER_WEIGHTS).is_file() else folder)
        if (saved.config or {}).get("model_type") in model_types:
            write_atomically(folder / CARD, _card(folder, saved, lineage, origin, base).encode())
        _record(folder, saved, lineage, seed, digests=digests)
    except OSError as error:
        where = error.filename or folder
        raise CheckpointError(f"{where}: the record of the saved model cannot be made: {error.strerror}.") from None


def _card(folder: Path, saved: Source, lineage: Mapping[str, Any], origin: Path | None, base: str) -> str:
    facts = model_facts(saved.config or {}, next(iter(saved.tensors.values())).dtype.name, lineage)
    if is_repo_id(base):
        facts = replace(facts, base_models=(base,), relation="finetune")
    return render_card(with_files(facts, origin, [path.name for path in folder.iterdir()]))


def _record(folder: Path, saved: Source, lineage: Mapping[str, Any], seed: int, *, digests: bool) -> None:
    tensors = _tensors(saved, digests=digests)
    plan = hashlib.sha256(json.dumps([lineage, seed, tensors], sort_keys=True).encode()).hexdigest()
    files = _files(folder, saved)
    manifest = make_manifest(plan=plan, seed=seed, lineage=lineage, files=files, tensors=tensors, digests=digests)
    write_atomically(folder / MANIFEST, json_bytes(manifest))


def _tensors(saved: Source, *, digests: bool) -> dict[str, dict[str, Any]]:
    with FileReader() as reader:
        return {
            name: {
                "file": Path(view.file.name).name,
                "dtype": view.dtype.name,
                "shape": list(view.shape),
                **({"digest": tensor_digest(_block_digests(view, reader))} if digests else {}),
            }
            for name, view in saved.tensors.items()
        }


def _block_digests(view: View, reader: FileReader) -> Iterator[bytes]:
    flat = View.contiguous(view.file, view.offset, (view.numel,), view.dtype)
    for start in range(0, view.numel, BLOCK):
        yield block_digest(reader.chunks(flat[start : start + BLOCK]))


def _files(folder: Path, saved: Source) -> dict[str, dict[str, Any]]:
    """What the record says of each file that belongs to the model; optimizer, logs and notes of a run are not of it."""
    weights = {Path(file.name).name: file.size for file in saved.files}
    entries: dict[str, dict[str, Any]] = {}
    for name, size in weights.items():
        inside = [view for view in saved.tensors.values() if Path(view.file.name).name == name]
        between = between_digest(outside_tensors(folder / name, size, inside))
        entries[name] = {"bytes": size, "between": between, "samples": sample_digest(folder / name)}
    for name in known_files(folder):
        belongs = is_setting(name) or is_text_or_code(name) or (is_weights(name) and name.endswith(".json"))
        if belongs and name not in weights and (folder / name).is_file():
            content = (folder / name).read_bytes()
            entries[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return dict(sorted(entries.items()))


__all__ = ["ADAPTER_WEIGHTS", "has_saved_weights", "record_saved_model"]

# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""An adapter of peft on a loaded model: only the one that it is for, and all of it.

peft loads what it finds, and warns of the rest. Here every tensor of the file has its place in the model, every place
its tensor, and the model is the base that the adapter's record names by its digest. Where there is no such record, what
is known is said.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conversion.checkpoint.errors import CheckpointError, one_line, printable
from conversion.checkpoint.manifest import is_edited, read_manifest
from conversion.checkpoint.parent import record_mismatch
from conversion.checkpoint.sources import Source, check_utf8, open_checkpoint
from conversion.checkpoint.strict_json import read_json_object
from conversion.extras import needs
from conversion.model_identity import base_digest, is_base

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."


def check_adapter(folder: Path) -> None:
    """Check, before anything is loaded, that a folder holds an adapter, and that it can be loaded here.

    Raises:
        CheckpointError: it holds none, or peft is not installed.
    """
    check_utf8(folder)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise CheckpointError(f"{folder}/{ADAPTER_CONFIG}: no such file; --adapter is a folder that peft saved.")
    if not any((folder / name).is_file() for name in _WEIGHTS):
        raise CheckpointError(f"{folder}: holds no {_WEIGHTS[0]}; was it saved whole?")
    read_json_object(folder / ADAPTER_CONFIG)
    try:
        import peft  # noqa: F401
    except ImportError:
        raise CheckpointError(needs("--adapter", "peft", "sft")) from None


def check_base(folder: Path, model: str) -> list[str]:
    """Check that a model is the one that an adapter was trained on, as far as its record tells.

    Args:
        folder: the adapter's.
        model: a folder, or the name of a downloaded model on the Hub.

    Returns:
        What is not known, a sentence each.

    Raises:
        CheckpointError: it is another one.
    """
    record = read_manifest(folder) or {}
    recorded = record.get("lineage", {}).get("base")
    if not isinstance(recorded, str):
        named = read_json_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        known = f"is known by its name alone, {printable(str(named))}" if named else "is not known"
        return [f"What {folder} was trained on {known}: nothing tells whether {model} is that."]
    notes = []
    if mismatch := record_mismatch(folder, record):
        notes.append(f"{folder} is not what its record says: {mismatch}; changed since.")
    if is_edited(record):
        notes.append(f"The record of {folder} was edited: its checksum is not that of the rest.")
    base = _open_base(model)
    if base is None:
        return [*notes, f"The files of {model} cannot be compared with the base that {folder} was trained on."]
    if not is_base(base, recorded):
        raise CheckpointError(
            f"{folder}: is an adapter for another base: {model} has other weights (digest {base_digest(base)}, not "
            f"{printable(recorded)[:40]}); name the model that it was trained on."
        )
    return notes


def _open_base(model: str) -> Source | None:
    if Path(model).is_dir():
        return open_checkpoint(model)
    from transformers.utils.hub import cached_file

    try:
        config = cached_file(model, "config.json", local_files_only=True)
        return open_checkpoint(Path(config).parent) if config else None
    except (OSError, ValueError):  # it is there in a way that only transformers knows
        return None


def with_adapter(network: "PreTrainedModel", folder: Path) -> Any:
    """A model with an adapter on it.

    Raises:
        CheckpointError: it cannot be loaded; a tensor of it has no place in the model, or a place no tensor.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is missing, which is refused below
            there = load_peft_weights(str(folder), device="cpu")
            adapted: Any = PeftModel.from_pretrained(network, str(folder)).eval()
            places = get_peft_model_state_dict(adapted, save_embedding_layers=False)
            parameters = set(adapted.state_dict())
    except Exception as error:  # peft, safetensors and torch have no family of errors between them
        raise CheckpointError(f"{folder}: does not fit this model: {one_line(error)}") from error
    # Embeddings that were saved beside an adapter, as where tokens were added, replace the model's own.
    extra = [name for name in there if name not in places and not parameters & {name, name.removeprefix(_PREFIX)}]
    _require_none(folder, [name for name in places if name not in there], places, "is missing in its file")
    _require_none(folder, extra, there, "has no place in this model")
    return adapted


def _require_none(folder: Path, names: list[str], of: Mapping[str, Any], what: str) -> None:
    if names:
        more = f", and so for {len(names) - 1} more" if len(names) > 1 else ""
        raise CheckpointError(
            f"{folder}: does not fit this model: of {len(of)} tensors of the adapter, {names[0]} {what}{more}; it is "
            "for another model, or damaged."
        )


__all__ = ["check_adapter", "check_base", "with_adapter"]

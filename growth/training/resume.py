# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Which checkpoint a run goes on from, and whether it is all there.

A Trainer loads what it finds: without an optimizer.pt it begins with fresh moments, without a scheduler.pt with the
first learning rate, without an rng_state with other dropout, and it says nothing. So a checkpoint has to have them all,
and its files have to be whole, and those that were saved with it: headers, directories and samples are read, no tensor
is, and no object is made of a pickle. Their numbers have to be numbers, as a Trainer takes them as they are. What is
saved last, trainer_state.json, tells a checkpoint from what a kill has left of one.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import transformers
from transformers import TrainerState

from conversion.adam_state import TRAINER_STATE, check_resumed_state
from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.manifest import MANIFEST, read_manifest
from conversion.checkpoint.numbers import read_count, read_number, shown
from conversion.checkpoint.safetensors_file import read_header
from conversion.checkpoint.sources import WEIGHT_FILES, open_checkpoint
from conversion.checkpoint.strict_json import read_json_object
from conversion.checkpoint.torch_file import read_torch_file
from conversion.hub.saved_model import ADAPTER_WEIGHTS
from conversion.optimizer_state import OPTIMIZER_FILE
from conversion.saved_files import check_saved_files

from .errors import RunError
from .same_run import RUN, read_run

logger = logging.getLogger(__name__)

STATE = TRAINER_STATE
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# What a checkpoint has beside what it is: the names under which Trainer, accelerate or DeepSpeed, which keeps all in
# one folder, leave it.
_PARTS: Mapping[str, tuple[str, ...]] = {
    "weights": (*WEIGHT_FILES, ADAPTER_WEIGHTS, "adapter_model.bin", "pytorch_model_fsdp*", "global_step*"),
    "optimizer": ("optimizer.pt", "optimizer.bin", "optimizer_[0-9]*", "global_step*"),
    "learning rate schedule (scheduler.pt)": ("scheduler.pt", "global_step*"),
    "random state (rng_state)": ("rng_state*.pth",),
}
# Files of torch.save that a Trainer unpickles; and folders of torch's, whose .metadata is written last.
_TORCH_FILES = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth", "adapter_model.bin")
_TORCH_FOLDERS = ("optimizer_[0-9]*", "pytorch_model_fsdp_[0-9]*")
_MOST_TOLD = 3


def find_checkpoint(wanted: str | Path | bool | None, output_dir: str | Path) -> str | None:
    """The checkpoint that a run goes on from, if it is one that can be resumed.

    Args:
        wanted: a `checkpoint-N` folder; `True` for the last whole one in `output_dir`; None or False for none.
        output_dir: of the run.

    Raises:
        RunError: there is none, or it lacks what a step needs, or has a part that is damaged.
    """
    if not wanted:
        return None
    if wanted is True:
        return str(_last(Path(output_dir)))
    found = Path(wanted)
    if _read_state(found) is None:
        raise RunError(f"resume_from_checkpoint {found} holds no {STATE} that can be read; name a checkpoint-N folder.")
    if fault := find_fault(found):
        raise RunError(
            f"{found} {fault}: the steps to come would be those of another run. Name another checkpoint, or "
            f"resume_from_checkpoint: true for the last whole one. For a new run from its weights set "
            f"model_name_or_path: {found}, and delete resume_from_checkpoint."
        )
    return str(found)


def find_fault(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed, as what follows its name in a sentence; None if it can."""
    if _read_state(checkpoint) is None:
        return "was not saved to its end"
    missing = [what for what, names in _PARTS.items() if not any(any(checkpoint.glob(name)) for name in names)]
    if missing:
        return f"has no {', '.join(missing)}, as where it was saved with save_only_model"
    if not (checkpoint / RUN).is_file() and _is_of_ours(checkpoint):
        return f"was not saved to its end or was changed since: it has no {RUN}, which tells what run it is of"
    try:
        _check_state(checkpoint / STATE)
        if (checkpoint / RUN).is_file():
            read_run(checkpoint)
        _open_parts(checkpoint)
        check_saved_files(checkpoint)
        if (checkpoint / OPTIMIZER_FILE).is_file():
            check_resumed_state(checkpoint / OPTIMIZER_FILE)
    except (RunError, CheckpointError) as error:
        return f"is damaged ({str(error).rstrip('.')})"
    return None


def _is_of_ours(checkpoint: Path) -> bool:
    """Whether a run of this package saved a checkpoint, and not another one of which an export was made."""
    if not (checkpoint / MANIFEST).is_file():
        return False
    try:
        record = read_manifest(checkpoint)
    except CheckpointError:  # damaged, as nothing that was saved to its end is
        return True
    return record is None or record["lineage"].get("operation") != "export"


def _open_parts(checkpoint: Path) -> None:
    """Read the headers and directories of all files that a Trainer loads.

    Raises:
        CheckpointError: one is not whole.
    """
    if any((checkpoint / name).exists() for name in WEIGHT_FILES):
        open_checkpoint(checkpoint)
    if (checkpoint / ADAPTER_WEIGHTS).exists():
        read_header(checkpoint / ADAPTER_WEIGHTS)
    for path in (path for name in _TORCH_FILES for path in sorted(checkpoint.glob(name))):
        read_torch_file(path)
    for path in (path for name in _TORCH_FOLDERS for path in sorted(checkpoint.glob(name))):
        if path.is_dir() and not (path / ".metadata").is_file():
            raise CheckpointError(f"{path} has no .metadata, so it was not saved to its end.")


def step_of(checkpoint: str | Path) -> int:
    """Updates that a checkpoint has seen, of one that [`find_checkpoint`] has found."""
    state = _read_state(Path(checkpoint))
    return state["global_step"] if state else 0


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Folders of checkpoints in an output folder, whole or not, the last first."""
    folder = Path(output_dir)
    found = [path for path in folder.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: -int(path.name.partition("-")[2]))


def _last(output_dir: Path) -> Path:
    """The last checkpoint that can be resumed; why the ones after it cannot is said."""
    faults: list[str] = []
    for path in checkpoints(output_dir):
        fault = find_fault(path)
        if fault is None:
            for told in faults:
                logger.warning("%s/%s; the run goes on from %s", output_dir, told, path.name)
            return path
        faults.append(f"{path.name} {fault}")
    told = f" ({'; '.join(faults[:_MOST_TOLD])})" if faults else ""
    raise RunError(f"output_dir {output_dir} holds no checkpoint-N to resume{told}; delete resume_from_checkpoint.")


def _read_state(checkpoint: Path) -> dict[str, Any] | None:
    """What a checkpoint says of its step; None if that was not written to its end, or not by a Trainer."""
    try:
        state = read_json_object(checkpoint / STATE, nan=True)
    except CheckpointError:
        return None
    return state if type(state.get("global_step")) is int else None


def _check_state(path: Path) -> None:
    """Check that the state of a Trainer has the fields that it has, of the types that transformers declares.

    Raises:
        CheckpointError: it has not; names the file and the field.
    """
    state, hints = read_json_object(path, nan=True), get_type_hints(TrainerState)
    for name in state.keys() - {field.name for field in fields(TrainerState)}:
        version = transformers.__version__
        raise CheckpointError(f"{path} has {shown(name)}, which transformers {version} has no use for.")
    for name, value in state.items():
        kinds = {*(get_args(hints[name]) or (hints[name],))} & {int, float, str, bool}
        if not kinds or (value is None and name != "train_batch_size"):
            continue
        place = f"{path}: {name}"
        if kinds == {int}:
            read_count(value, place, least=-1 if name == "max_steps" else 0)
        elif float in kinds and name != "best_metric":  # which may be what it is
            read_number(value, place, least=0.0)
        elif not isinstance(value, (*kinds, int) if float in kinds else (*kinds,)):
            raise CheckpointError(f"{place} is {shown(value)}, expected a {' or a '.join(k.__name__ for k in kinds)}.")
    if not _are_objects(state.get("log_history") or []):
        raise CheckpointError(f"{path}: log_history is no list of objects.")
    callbacks = state.get("stateful_callbacks") or {}
    if not isinstance(callbacks, dict) or not all(
        _are_objects(saved if isinstance(saved, list) else [saved]) for saved in callbacks.values()
    ):
        raise CheckpointError(f"{path}: stateful_callbacks is no object of objects.")


def _are_objects(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, dict) for value in values)


__all__ = ["STATE", "checkpoints", "find_checkpoint", "find_fault", "step_of"]

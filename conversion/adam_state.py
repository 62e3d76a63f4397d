# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The reader of Adam's state as torch.save keeps it, the counterpart of `optimizer_state.py`; nothing is executed."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from .architecture import Architecture
from .checkpoint.errors import CheckpointError
from .checkpoint.manifest import read_manifest, sample_digest
from .checkpoint.plan import View
from .checkpoint.reader import FileReader
from .checkpoint.strict_json import read_json_object
from .checkpoint.torch_file import read_torch_file
from .mapping import weights
from .optimizer_state import MOMENTS, OPTIMIZER_FILE, parameter_names
from .parameter_kinds import group_names

TRAINER_STATE = "trainer_state.json"  # what transformers' Trainer leaves in a checkpoint beside the rest
# What torch's AdamW of today has in a group beside rate, betas, eps and decay, with the values of a state that does not
# say it: a loader asks for each by name.
ADAMW_UNSAID = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
}
_LAYOUT = {"state": dict, "param_groups": list}
# What other savers leave in a checkpoint instead, for the message.
_SHARDED = {
    "optimizer_0": "FSDP's sharded state",
    "optimizer.bin": "FSDP's gathered state",
    "latest": "DeepSpeed's state",
    "distrib_optim.pt": "Megatron's distributed state",
}


@dataclass(frozen=True)
class AdamState:
    """Adam's state in a file, by the names of the parameters; the moments are not loaded.

    Args:
        file: its path.
        groups: the parameter groups: their settings, without `params`, and the names of their parameters.
        steps: name -> updates done.
        moments: name -> (first moment, second moment).
    """

    file: str
    groups: tuple[tuple[dict[str, Any], tuple[str, ...]], ...]
    steps: dict[str, float]
    moments: dict[str, tuple[View, View]]


def read_adam_state(path: str | os.PathLike[str], architecture: Architecture, *, as_recorded: bool = True) -> AdamState:
    """Read the Adam or AdamW state that transformers' Trainer or torch.save wrote; nothing in it is executed.

    Such a file numbers the parameters. Which is which follows from the order of the model's parameters and from its
    groups: Trainer's (with and without weight decay), those of `growth.training.mup`, or one; every shape is checked.

    Args:
        path: the file, or the folder that holds it as optimizer.pt.
        architecture: of the model it belongs to.
        as_recorded: whether it has to be what the record in its folder knows.

    Raises:
        CheckpointError: there is no such file, it is not the state of Adam for that architecture, or it is not the one
            that the record knows.
    """
    sizes = {name: weight.shape(architecture) for name, weight, _ in weights(architecture)}
    shapes = {name: sizes[name] for name in parameter_names(architecture)}
    file = _find_file(Path(path))
    state = _read(file, shapes, whose="config.json says", must_name=False)
    if as_recorded:
        check_recorded_state(file)
    return state


def read_grown_state(
    path: str | os.PathLike[str], shapes: Mapping[str, tuple[int, ...]], *, as_recorded: bool = True
) -> AdamState:
    """Read a state that names its parameters, as `write_adam_state` writes it; nothing in it is executed.

    Args:
        path: the file.
        shapes: of the parameters of the model it is for, by name.
        as_recorded: whether it has to be what the record in its folder knows.

    Raises:
        CheckpointError: there is no such file, it does not name its parameters, they are another model's, or it is not
            the one that the record knows.
    """
    file = _find_file(Path(path))
    state = _read(file, shapes, whose="the model has", must_name=True)
    if as_recorded:
        check_recorded_state(file)
    return state


def check_recorded_state(file: str | os.PathLike[str]) -> None:
    """Check that a state is the one that the record in its folder knows, if that knows one.

    Raises:
        CheckpointError: it was exchanged, or edited, since the record was written.
    """
    path = Path(file)
    record = read_manifest(path.parent)
    files = (record or {}).get("files")
    entry = files.get(path.name) if isinstance(files, dict) else None
    if not isinstance(entry, dict) or "samples" not in entry:
        return
    size = path.stat().st_size
    if size == entry.get("bytes") and sample_digest(path) == entry["samples"]:
        return
    how = f"{size} bytes, expected {entry.get('bytes')}" if size != entry.get("bytes") else "other content"
    raise CheckpointError(
        f"{path}: has {how}, so it is not what the record says was written with the weights; restore it, or leave "
        "it out."
    )


def check_trainer_step(folder: Path, where: str, steps: Mapping[str, float]) -> int:
    """The step of a Trainer's checkpoint, checked against that of the optimizer beside it.

    Args:
        folder: of the checkpoint.
        where: the state, for errors.
        steps: name of a parameter -> updates that the optimizer says it had.

    Raises:
        CheckpointError: the two are not of one step.
    """
    path = folder / TRAINER_STATE
    state = read_json_object(path, infinite=True)
    step, callbacks = state.get("global_step"), state.get("stateful_callbacks")
    if type(step) is not int:
        raise CheckpointError(f"{path}: global_step is {step!r}, expected a whole number; copy the checkpoint again.")
    expected = step + _first_step(callbacks)
    found = set(steps.values())
    # In float16 a step whose gradients overflow leaves the weights and the optimizer as they are.
    fits = found == {expected} or ((folder / "scaler.pt").is_file() and max(found) <= expected)
    if not fits:
        raise CheckpointError(
            f"{where}: Adam is at step {' to '.join(f'{value:g}' for value in sorted({min(found), max(found)}))}, "
            f"{path} says {expected:g}, so the two are of different checkpoints; put back the optimizer of this one."
        )
    return step


def _first_step(callbacks: Any) -> float:
    """At which of its steps Adam was when the run began, as `teleflm train` records it; else 0."""
    match callbacks:
        case {"AdamStart": {"attributes": {"first_step": int() | float() as first}}}:
            return float(first)
    return 0.0


def _read(file: str, shapes: Mapping[str, tuple[int, ...]], *, whose: str, must_name: bool) -> AdamState:
    """Read a state of parameters with these shapes, in the order in which the model lists them."""
    saved = read_torch_file(file)
    if not isinstance(saved, dict) or not all(isinstance(saved.get(key), kind) for key, kind in _LAYOUT.items()):
        raise CheckpointError(f"{file} is no optimizer state: expected a dict with state and param_groups.")
    groups = _name_groups(file, saved["param_groups"], list(shapes), must_name=must_name)

    steps: dict[str, float] = {}
    moments: dict[str, tuple[View, View]] = {}
    with FileReader() as reader:
        for (_, names), group in zip(groups, saved["param_groups"], strict=True):
            for name, index in zip(names, group["params"], strict=True):
                entry = saved["state"].get(index)
                moments[name] = _moments(file, name, entry, shapes[name], whose)
                steps[name] = _number(entry["step"], reader)
        settled = tuple(
            ({key: _setting(file, key, value, reader) for key, value in settings.items()}, names)
            for settings, names in groups
        )
    return AdamState(file, settled, steps, moments)


def _find_file(path: Path) -> str:
    if path.is_file():
        return str(path)
    if (path / OPTIMIZER_FILE).is_file():
        return str(path / OPTIMIZER_FILE)
    for name, what in _SHARDED.items():
        if (path / name).exists():
            raise CheckpointError(
                f"{path}: {name} is {what}; only an unsharded {OPTIMIZER_FILE} can grow. `teleflm convert --optimizer` "
                "makes one of FSDP2's, DeepSpeed's and Megatron's."
            )
    raise CheckpointError(
        f"{path}: holds no {OPTIMIZER_FILE}; name a checkpoint of transformers' Trainer, or the file."
    )


def _name_groups(
    file: str, saved: list[Any], names: list[str], *, must_name: bool
) -> list[tuple[dict[str, Any], tuple[str, ...]]]:
    """The settings of each saved group, and the names of its parameters."""
    if not all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in saved):
        raise CheckpointError(f"{file}: param_groups is no list of groups with params.")
    sizes = [len(group["params"]) for group in saved]
    if all("param_names" in group for group in saved):
        found = [list(group["param_names"]) for group in saved]
        named = sorted(map(str, chain.from_iterable(found)))
        if named != sorted(names) or sizes != list(map(len, found)):
            odd = sorted(set(named) ^ set(names))
            example = f": {odd[0]} is in one of the two alone" if odd else ""
            raise CheckpointError(f"{file}: param_names are not the {len(names)} parameters of the model{example}.")
    elif must_name:
        raise CheckpointError(
            f"{file} does not name its parameters: it did not grow with the model. `teleflm grow --optimizer` writes "
            "one that does; or set fresh_optimizer: true and warm up."
        )
    else:
        known = _known_groups(names)
        found = next((groups for groups in known if list(map(len, groups)) == sizes), [])
        if not found:
            expected = " or ".join(str([len(group) for group in groups]) for groups in known)
            raise CheckpointError(f"{file}: param_groups have {sizes} parameters, the model has {expected}.")
    extra = ("params", "param_names")
    settings = [{key: value for key, value in group.items() if key not in extra} for group in saved]
    return [(own, tuple(members)) for own, members in zip(settings, found, strict=True)]


def _known_groups(names: list[str]) -> list[list[list[str]]]:
    """The groups that a file without names may have: one, Trainer's (with and without weight decay), and muP's."""
    biases = [name for name in names if name.endswith(".bias")]
    kinds = group_names(name for name in names if name not in biases)
    undecayed = {*kinds["norm"], *biases}
    trainers = [[name for name in names if name not in undecayed], [name for name in names if name in undecayed]]
    return [[names], trainers, *([] if biases else [list(kinds.values())])]


def _moments(file: str, name: str, entry: Any, shape: tuple[int, ...], whose: str) -> tuple[View, View]:
    keys = sorted(entry) if isinstance(entry, dict) else None
    if keys != sorted((*MOMENTS, "step")):
        raise CheckpointError(
            f"{file}: the state of {name} is {keys}, expected exp_avg, exp_avg_sq, step; only Adam and AdamW can grow."
        )
    step = entry["step"]
    if not isinstance(step, int | float) and not (isinstance(step, View) and step.numel == 1):
        raise CheckpointError(f"{file}: step of {name} is a {type(step).__name__}, expected a number.")
    for key in MOMENTS:
        view = entry[key]
        if not isinstance(view, View) or not view.dtype.is_floating:
            raise CheckpointError(f"{file}: {key} of {name} is no tensor of floating-point numbers.")
        if view.shape != shape:
            raise CheckpointError(f"{file}: {key} of {name} has shape {view.shape}, {whose} {shape}.")
    return entry["exp_avg"], entry["exp_avg_sq"]


def _setting(file: str, key: str, value: Any, reader: FileReader) -> Any:
    if isinstance(value, View) and value.numel == 1:
        return _number(value, reader)
    plain = value if isinstance(value, tuple | list) else (value,)
    if not all(item is None or isinstance(item, bool | int | float | str) for item in plain):
        raise CheckpointError(f"{file}: {key} of a parameter group is a {type(value).__name__}, expected numbers.")
    return value


def _number(value: Any, reader: FileReader) -> float:
    return float(reader.read(value).reshape(-1)[0]) if isinstance(value, View) else float(value)


__all__ = ["AdamState", "read_adam_state", "read_grown_state"]

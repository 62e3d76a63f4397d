# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""From a Hub folder to one that FSDP2 loads in parts: a folder of torch.distributed.checkpoint for the weights, and one
for Adam's moments, under the names that Accelerate gives them.

    OUT/pytorch_model_fsdp_0/.metadata, __0_0.distcp, ...      `model.` and the names of the parameters
    OUT/optimizer_0/.metadata, __0_0.distcp, ...               `optimizer.state.`, `optimizer.param_groups.`
    OUT/trainer_state.json, scheduler.pt, rng_state*.pth       of the run, where the source is a Trainer's checkpoint
    OUT/config.json                                            the model in the Hub's terms

transformers' Trainer resumes only what has a trainer_state.json, and of that without a scheduler.pt it leaves the
optimizer unloaded, without a word. So these go along where there are moments, and are missed where they are not.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..adam_state import (
    ADAMW_UNSAID,
    TRAINER_STATE,
    AdamState,
    check_recorded_state,
    check_trainer_step,
    decay_notes,
    read_adam_state,
)
from ..checkpoint.containers import Layout, Shard
from ..checkpoint.distributed_file import METADATA
from ..checkpoint.distributed_layout import (
    ChunkedTensor,
    Entry,
    KeyPath,
    SameAs,
    chunk_bytes,
    distributed_shards,
)
from ..checkpoint.dtypes import FLOAT32, DType
from ..checkpoint.errors import CheckpointError
from ..checkpoint.manifest import read_manifest
from ..checkpoint.plan import Box, CheckpointPlan, Fill, TensorPlan
from ..checkpoint.sharded import ShardedTensor
from ..checkpoint.sources import source_identity
from ..hub.contents import hub_config
from ..hub.small_files import check_read_files, copied_file, left_behind, small_files
from ..mapping import EMBED_TOKENS, LM_HEAD, weights
from ..native.find import FSDP_OPTIMIZER, FSDP_WEIGHTS
from ..optimizer_state import MOMENTS, OPTIMIZER_FILE
from .model import ExportedModel

_SCHEDULER = "scheduler.pt"
_OF_A_RUN = re.compile(r"run\.json|trainer_state\.json|scheduler\.pt|scaler\.pt|rng_state(_\d+)?\.pth")
_TRAINED = ("train", "fine-tune")  # whose checkpoints have an optimizer that no record lists
_SAID = ("lr", "betas", "eps", "weight_decay")  # what decides the updates


@dataclass(frozen=True)
class OpenState:
    """The optimizer of a folder that is open for planning.

    Args:
        adam: its moments.
        step: updates that the run had done, if the folder is a checkpoint of one.
        files: of that run, what goes along: name -> path.
    """

    adam: AdamState
    step: int | None
    files: Mapping[str, str]


def open_state(model: ExportedModel) -> OpenState:
    """Open the optimizer.pt beside a model, checked to be of that model and of that step.

    Raises:
        CheckpointError: there is none, or it is another model's or of another step.
    """
    folder = model.folder
    if not (folder / OPTIMIZER_FILE).is_file():
        raise CheckpointError(f"{folder}: holds no {OPTIMIZER_FILE}, whose moments --optimizer exports; leave it out.")
    check_recorded_state(folder / OPTIMIZER_FILE)
    _check_record(model)
    adam = read_adam_state(folder, model.architecture)
    for number, (settings, _) in enumerate(adam.groups):
        if missing := [name for name in _SAID if name not in settings]:
            raise CheckpointError(
                f"{adam.file}: parameter group {number} does not say {', '.join(missing)}, which a run takes from "
                "there; leave --optimizer out."
            )
    if not (folder / TRAINER_STATE).is_file():
        return OpenState(adam, None, {})
    step = check_trainer_step(folder, adam.file, adam.steps)
    names = sorted(entry.name for entry in folder.iterdir() if _OF_A_RUN.fullmatch(entry.name))
    return OpenState(adam, step, {name: path for name in names if (path := copied_file(folder, name))})


def _check_record(model: ExportedModel) -> None:
    """Check that the moments are those that the record of the folder knows, if it has one that should."""
    path, record = model.folder / OPTIMIZER_FILE, read_manifest(model.folder)
    files = (record or {}).get("files")
    if record is None or not isinstance(files, dict):
        return
    parent = model.parent or {}
    if parent.get("matches") is False:
        raise CheckpointError(
            f"{path}: the weights beside it are not those of the record ({parent.get('mismatch')}), so these moments "
            "are of others; leave --optimizer out."
        )
    entry = files.get(OPTIMIZER_FILE)
    if not isinstance(entry, dict):
        if record["lineage"].get("operation") in _TRAINED:
            return
        raise CheckpointError(
            f"{path}: the record of the folder tells of weights without an optimizer, so this is another model's; "
            "leave --optimizer out."
        )


def plan_dcp(
    model: ExportedModel, state: OpenState | None, cast: DType | None, shard_bytes: int
) -> tuple[CheckpointPlan, Layout, list[str]]:
    """The plan of a folder that FSDP2 loads in parts, its files, and notes.

    Args:
        model: what is exported.
        state: its optimizer, if that is too.
        cast: of the weights; the source's dtype unless given. Moments stay as they are.
        shard_bytes: most bytes of tensors in a file.

    Raises:
        CheckpointError: what a Trainer loads with the optimizer is not there.
    """
    if state and state.step is not None and _SCHEDULER not in state.files:
        raise CheckpointError(
            f"{model.folder}: has a {TRAINER_STATE} and no {_SCHEDULER}, without which transformers' Trainer leaves "
            "the optimizer unloaded; copy the checkpoint again, or leave --optimizer out."
        )
    dtype = model.dtype(cast)
    numel = sum(view.numel for view in model.checkpoint.tensors.values())
    most = chunk_bytes(numel * dtype.itemsize, shard_bytes)
    shards, index = distributed_shards(FSDP_WEIGHTS, _weights(model, cast, most), shard_bytes)
    config = hub_config(model.config, model.architecture, dtype.name)
    config = {key: value for key, value in config.items() if key != "auto_map"}
    check_read_files(model.folder)
    # The card says how transformers loads the model, which is not how this folder is loaded.
    sidecars = {name: path for name, path in small_files(model.folder, {}).items() if name != "README.md"}
    details: dict[str, Any] = {}
    states: list[Shard] = []
    if state:
        entries = _optimizer(state.adam, chunk_bytes(2 * numel * FLOAT32.itemsize, shard_bytes))
        states, of_state = distributed_shards(FSDP_OPTIMIZER, {}, shard_bytes, states=entries)
        sidecars |= {**state.files, f"{FSDP_OPTIMIZER}/{METADATA}": of_state}
        details["optimizer"] = source_identity(state.adam.file)
    tensors = tuple(tensor for shard in (*shards, *states) for tensor, _ in shard.tensors)
    layout = Layout((*shards, *states), (f"{FSDP_WEIGHTS}/{METADATA}", index))
    plan = CheckpointPlan(tensors, config, sidecars, model.lineage("dcp", cast, **details))
    return plan, layout, [*left_behind(model.folder, sidecars), *_notes(model, state)]


def _weights(model: ExportedModel, cast: DType | None, most: int) -> dict[KeyPath, Entry]:
    """What FSDP2 calls each weight: it knows the head of tied embeddings by its own name too."""
    entries: dict[KeyPath, Entry] = {
        ("model", name): ChunkedTensor.in_rows(ShardedTensor.of(model.checkpoint.tensors[name]), cast, most)
        for name, *_ in weights(model.architecture)
    }
    if model.architecture.tie_word_embeddings:
        entries["model", LM_HEAD.name] = SameAs(("model", EMBED_TOKENS.name))
    return entries


def _optimizer(adam: AdamState, most: int) -> dict[KeyPath, Entry]:
    """What torch's `get_optimizer_state_dict` calls the state of each parameter, and the settings of each group."""
    entries: dict[KeyPath, Entry] = {}
    for _, names in adam.groups:
        for name in names:
            step = TensorPlan("", (), FLOAT32, (Fill(Box((0,), (1,)), float(adam.steps[name])),))
            entries["optimizer", "state", name, "step"] = ChunkedTensor.whole(step)
            for key, view in zip(MOMENTS, adam.moments[name], strict=True):
                moment = ChunkedTensor.in_rows(ShardedTensor.of(view), None, most)
                is_square = key == MOMENTS[1]
                entries["optimizer", "state", name, key] = moment.nonnegative() if is_square else moment
    for number, (settings, names) in enumerate(adam.groups):
        group = {**ADAMW_UNSAID, "initial_lr": settings["lr"], **settings, "params": list(names)}
        entries |= {("optimizer", "param_groups", number, key): value for key, value in group.items()}
    return entries


def _notes(model: ExportedModel, state: OpenState | None) -> Iterable[str]:
    if state is None:
        if (model.folder / OPTIMIZER_FILE).is_file():
            yield f"{OPTIMIZER_FILE} is left behind; --optimizer exports its moments too."
        yield "Weights alone: torch.distributed.checkpoint and Accelerate's load_fsdp_model load them on any ranks."
        return
    sizes = [len(names) for _, names in state.adam.groups]
    yield (
        f"{FSDP_OPTIMIZER}: Adam's moments after {max(state.adam.steps.values()):.0f} steps, in {len(sizes)} parameter "
        f"groups of {', '.join(map(str, sizes))}; a run that loads them has to have the same number of groups."
    )
    yield from decay_notes(state.adam)
    if state.step is None:
        yield (
            f"The source is of no run (it has no {TRAINER_STATE}): Accelerate's load_fsdp_model and "
            "load_fsdp_optimizer load the two folders, as torch.distributed.checkpoint does; transformers' Trainer has "
            "nothing to resume here."
        )
        return
    yield (
        f"transformers' Trainer under FSDP2 with SHARDED_STATE_DICT goes on from step {state.step}: "
        "resume_from_checkpoint=OUT."
    )
    if "rng_state.pth" in state.files:
        yield "The run was one process, so several begin with random states of their own: dropout and the like differ."
    elif not any(name.startswith("rng_state") for name in state.files):
        yield "The source has no random states (rng_state), so the run begins with others: dropout and the like differ."


__all__ = ["OpenState", "open_state", "plan_dcp"]

# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""One process of test_spread.py: runs of `growth.training.train` on CPUs, spread as accelerators would be.

accelerate shards on accelerators alone, so where it is to, it is told that these are some; all else is its own code.
A run that is refused is an outcome too. Rank 0 writes what came out.
"""

import dataclasses
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from transformers import TrainerCallback

from conversion.checkpoint.errors import CheckpointError
from growth.training import grown_adam
from growth.training.errors import RunError
from growth.training.launch import count_wrapped, leave_processes
from growth.training.record import digest_examples, start_record
from growth.training.same_run import describe_run, hold_to_run
from growth.training.train import build_trainer, find_checkpoint, parse_arguments


class Watch(TrainerCallback):
    """The step counters of the optimizer as each step begins, and where the masks are."""

    def __init__(self):
        self.steps: list[list[float]] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.steps.append(sorted(grown_adam.held_steps(kwargs["optimizer"])))


def load_too_early(trainer, path):
    """The fault: the moments are given to the optimizer before it is prepared, and not again afterwards."""
    create, load = trainer.create_optimizer, grown_adam.load_adam_state

    def create_and_load(model=None):
        is_new = trainer.optimizer is None
        optimizer = create(model)
        if is_new:
            load(optimizer, trainer.model, path)
        return optimizer

    trainer.create_optimizer = create_and_load
    grown_adam.load_adam_state = lambda *args: None
    return load


def spoil(trainer, path):
    """The fault: one bit of one moment, on one process, after they were loaded."""
    load = grown_adam.load_adam_state

    def load_and_spoil(optimizer, model, path):
        load(optimizer, model, path)
        if trainer.args.process_index == 1:
            state = list(grown_adam.innermost(optimizer).state.values())[-1]
            moment = grown_adam.local(state["exp_avg_sq"]).view(-1)
            moment[-1:] = torch.nextafter(moment[-1:], moment[-1:] + 1)

    grown_adam.load_adam_state = load_and_spoil
    return load


FAULTS = {"load too early": load_too_early, "spoil": spoil}


def run(keys: dict, fault: str | None, folder: Path) -> dict:
    """One run; what came of it, and its weights in `folder`."""
    (folder / "keys.json").write_text(json.dumps(keys))
    growth, args = parse_arguments([str(folder / "keys.json")])
    if fault == "unseen" and args.process_index == 1:
        growth.model_name_or_path += "-elsewhere"  # the fault: as on a machine where the moments were not copied to
    if args.fsdp_plugin_args is not None:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    load = grown_adam.load_adam_state
    watch = Watch()
    try:
        checkpoint = find_checkpoint(args)
        trainer = build_trainer(growth, args, [watch])
        if fault in FAULTS:
            load = FAULTS[fault](trainer, Path(growth.model_name_or_path) / "optimizer.pt")
        data = digest_examples(trainer.train_dataset)
        hold_to_run(trainer, lambda: describe_run(args, dataclasses.asdict(growth), data), checkpoint)
        record = start_record(trainer, Path(growth.model_name_or_path), checkpoint)
        trainer.train(resume_from_checkpoint=checkpoint)
    except (CheckpointError, RunError) as error:
        return {"error": str(error), "steps": watch.steps}
    finally:
        grown_adam.load_adam_state = load
    record.save_model()
    return {
        "kind": trainer.accelerator.distributed_type.value,
        "optimizer": type(trainer.optimizer.optimizer).__name__,
        "wrapped": count_wrapped(trainer.model_wrapped),
        "steps": watch.steps,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "growth_state": getattr(trainer.model.config, "growth_state", None),
    }


def main(runs: str, out: str) -> None:
    outcomes = []
    for index, (keys, fault) in enumerate(json.loads(Path(runs).read_text())):
        if "deepspeed" in keys and not dist.is_initialized():
            import deepspeed

            deepspeed.init_distributed(dist_backend="gloo")  # before from_pretrained asks it, under ZeRO 3
        folder = Path(out) / str(index)
        folder.mkdir(exist_ok=True)
        outcomes.append(run(keys, fault, folder))
        if "deepspeed" not in keys:  # accelerate would keep what the first run said of FSDP
            AcceleratorState._reset_state()
            GradientState._reset_state()
    together = [None] * dist.get_world_size()
    dist.all_gather_object(together, outcomes)
    if dist.get_rank() == 0:
        (Path(out) / "outcomes.json").write_text(json.dumps(together))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
    leave_processes()

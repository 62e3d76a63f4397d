# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""One process of test_spread_moments.py: `growth.training.train` on CPUs, spread as accelerators would be.

accelerate shards on accelerators alone, so under FSDP it is told that these are some; everything after is its own code.
Rank 0 writes what came out: the whole weights, and the step counters of every process.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import TrainerCallback

from conversion.checkpoint.errors import CheckpointError
from growth.training import grown_adam
from growth.training.errors import RunError
from growth.training.grown_adam import held_steps
from growth.training.launch import count_wrapped
from growth.training.train import build_trainer, find_checkpoint, parse_arguments


class Watch(TrainerCallback):
    """What a step began and ended with."""

    def __init__(self):
        self.steps: list[list[float]] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.steps.append(sorted(held_steps(kwargs["optimizer"])))


class TooEarly(TrainerCallback):
    """The fault: moments are given to the optimizer before it is prepared, as was done once, and not afterwards."""

    @staticmethod
    def plant(trainer, path):
        create = trainer.create_optimizer
        load = grown_adam.load_adam_state

        def create_and_load(model=None):
            is_new = trainer.optimizer is None
            optimizer = create(model)
            if is_new:
                load(optimizer, trainer.model, path)
            return optimizer

        trainer.create_optimizer = create_and_load
        grown_adam.load_adam_state = lambda *args: None


def run(path: str, out: str) -> None:
    growth, args = parse_arguments([path])
    plan = json.loads(Path(f"{path}.plan").read_text())
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    checkpoint = find_checkpoint(args)
    watch = Watch()
    trainer = build_trainer(growth, args, [watch])
    if plan.get("fault") == "too early":
        TooEarly.plant(trainer, Path(growth.model_name_or_path) / "optimizer.pt")
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    steps = [None] * args.world_size
    dist.all_gather_object(steps, watch.steps)
    if args.process_index == 0:
        found = {
            "kind": trainer.accelerator.distributed_type.value,
            "optimizer": type(trainer.optimizer.optimizer).__name__,
            "wrapped": count_wrapped(trainer.model_wrapped),
            "steps": steps,
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        }
        (Path(out) / "result.json").write_text(json.dumps(found))
    dist.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        run(*sys.argv[1:])
    except (CheckpointError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

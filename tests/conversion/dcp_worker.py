# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""One process of test_dcp_export.py: a run of transformers' own Trainer goes on from a folder in parts, under FSDP2.

accelerate shards on accelerators alone, so it is told that CPUs are some; all else is its own code, and transformers'.
Rank 0 writes what was loaded, whole, and what the steps made of it.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, load_fsdp_model, load_fsdp_optimizer
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from modeling_teleflm import TeleFLMForCausalLM

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def save_whole(model, optimizer, file: Path) -> None:
    """What all processes hold together."""
    state = {"model": get_model_state_dict(model, options=WHOLE)}
    state["optimizer"] = get_optimizer_state_dict(model, optimizer, options=WHOLE)
    state["sharded"] = sum(isinstance(parameter, DTensor) for parameter in model.parameters())
    if dist.get_rank() == 0:
        torch.save(state, file)


class Loaded(TrainerCallback):
    """Saves what a run has loaded before its first step."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        save_whole(model, optimizer.optimizer, self.file)


def resume(checkpoint: Path, rows: list, settings: dict, out: Path) -> None:
    """transformers' Trainer, from a checkpoint to its last step."""
    args = TrainingArguments(str(out / "run"), **settings)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    model = TeleFLMForCausalLM.from_pretrained(checkpoint.parent / "start")
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[Loaded(out / "loaded.pt")])
    trainer.train(resume_from_checkpoint=str(checkpoint))
    save_whole(trainer.model, trainer.optimizer.optimizer, out / "trained.pt")


def load_grown(folder: Path, source: Path, rows: list, out: Path) -> None:
    """Accelerate's own two functions, into a model and an optimizer that know nothing yet; and one step."""
    model = TeleFLMForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    norms = [parameter for name, parameter in model.named_parameters() if "norm" in name]
    matrices = [parameter for name, parameter in model.named_parameters() if "norm" not in name]
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": norms}], lr=0.5)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
    load_fsdp_model(plugin, PartialState(), model, str(folder))
    load_fsdp_optimizer(plugin, PartialState(), optimizer, model, str(folder))
    save_whole(model, optimizer, out / "grown_loaded.pt")
    batch = torch.tensor([row["input_ids"] for row in rows])[dist.get_rank() :: dist.get_world_size()]
    model(batch, labels=batch).loss.backward()
    optimizer.step()
    save_whole(model, optimizer, out / "grown_stepped.pt")


def main(job: str) -> None:
    jobs = json.loads(Path(job).read_text())
    out, rows = Path(job).parent, jobs["rows"]
    resume(Path(jobs["checkpoint"]), rows, jobs["settings"], out)
    load_grown(Path(jobs["grown"]), Path(jobs["grown_source"]), rows, out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])

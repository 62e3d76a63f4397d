# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""One process of test_distributed.py: trains the model of a recipe on the CPU, sharded by PyTorch's fully_shard.

accelerate shards on accelerators alone, so the few lines of it that matter are here: shard each layer and the root,
feed each process its part of the batch, divide by the tokens of all. Rank 0 writes what came out.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from growth.training.launch import count_wrapped, leave_processes
from sft.training.guards import fused_loss_gap
from sft.training.recipe import read_recipe
from sft.training.train import build_trainer


def main(recipe: str, out: str, steps: int) -> None:
    trainer, _, _ = build_trainer(read_recipe(recipe))
    model, args = trainer.model, trainer.args
    mesh = init_device_mesh("cpu", (args.world_size,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    wrapped = count_wrapped(model)
    gap = fused_loss_gap(model, model)

    optimizer = torch.optim.SGD(model.parameters(), lr=args.learning_rate)
    rows, size = trainer.train_dataset, args.per_device_train_batch_size
    losses = []
    for step in range(steps):
        start = (step * args.world_size + args.process_index) * size
        batch = trainer.data_collator([rows[index] for index in range(start, start + size)])
        tokens = (batch["labels"][:, 1:] != -100).sum()
        dist.all_reduce(tokens)
        # fully_shard averages gradients over processes, as DDP does.
        loss = -model(**batch, fused_lm_head=True, use_cache=False).log_probs.sum() / tokens * args.world_size
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss.detach())
        losses.append(loss.item() / args.world_size)

    sharded = sum(isinstance(parameter, DTensor) for parameter in model.parameters())
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if args.process_index == 0:
        torch.save(weights, Path(out) / "weights.pt")
        found = {"wrapped": wrapped, "dtensors": sharded, "gap": gap, "losses": losses}
        (Path(out) / "result.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    leave_processes()

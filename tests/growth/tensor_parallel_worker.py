# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""One process of a test of tensor parallelism: logits and gradients of models, by transformers' own plan."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import growth.training.masks  # noqa: F401  (registers the masked model)
from growth.training.launch import leave_processes


def _is_sharded(value: torch.Tensor) -> bool:
    return isinstance(value, DTensor) and any(placement.is_shard() for placement in value.placements)


def main(folders: list[str]) -> None:
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float32)
        ids = torch.arange(40)[None]
        found = {"sharded": [name for name, value in model.named_parameters() if _is_sharded(value)]}
        for step in (3, 5):
            if hasattr(model, "set_mask_step"):
                model.set_mask_step(step)
            with torch.no_grad():
                found[f"logits {step}"] = model(ids).logits
            model.zero_grad()
            model(ids, labels=ids).loss.backward()
            found[f"gradients {step}"] = {
                name: value.grad.full_tensor() if isinstance(value.grad, DTensor) else value.grad.clone()
                for name, value in model.named_parameters()
            }
        if dist.get_rank() == 0:
            torch.save(found, Path(folder) / "found.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
    leave_processes()

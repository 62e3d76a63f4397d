# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Ranks of megatron-core with masks on their GPTModels: logits, gradients, and a few steps of SGD.

    python -m tests.growth.megatron_mask_worker FOLDER EXPORT...

Each rank of an EXPORT in FOLDER leaves FOLDER/EXPORT.RANK.pt, and its part of the run in FOLDER/EXPORT-run.
"""

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from growth.training.megatron_masks import install_masks
from tests.fixtures.megatron_files import write_rank_file
from tests.fixtures.megatron_loader import config_of, first_args, load_and_run, load_rank_file
from tests.fixtures.megatron_worlds import TOKENS, build_model, patch_for_cpu

STEPS = (0, 37, 100)  # of the masks
TRAINED, RATE = 3, 0.05  # steps of SGD


def probe(vocab_size: int) -> torch.Tensor:
    """What the logits are multiplied by before they are added up to a loss."""
    return torch.randn(*TOKENS.shape, vocab_size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def _logits(model: Any, vocab_size: int) -> torch.Tensor:
    count = TOKENS.shape[1]
    later = torch.ones(1, 1, count, count, dtype=torch.bool).triu(1)
    return model(TOKENS, torch.arange(count).expand_as(TOKENS), later)[..., :vocab_size]


def _run_rank(rank: int, world: tuple[int, int], folder: Path, names: list[str]) -> None:
    from megatron.core import parallel_state

    torch.set_num_threads(1)
    patch_for_cpu()
    tensor, pipeline = world
    rendezvous = f"file://{folder}/.rendezvous-{tensor}-{pipeline}-{os.getppid()}"
    torch.distributed.init_process_group(
        "gloo", rendezvous, timedelta(minutes=2), world_size=tensor * pipeline, rank=rank
    )
    parallel_state.initialize_model_parallel(tensor, pipeline)
    for name in names:
        found = (_stages if pipeline > 1 else _steps)(folder, name, rank)
        torch.save(found, folder / f"{name}.{rank}.pt")
    torch.distributed.destroy_process_group()


def _stages(folder: Path, name: str, rank: int) -> dict[str, Any]:
    """Logits alone, which the last stage has."""
    found = {}
    for step in STEPS:

        def prepare(model: Any, step: int = step) -> None:
            install_masks([model], folder / name).set_step(step)

        args = first_args(folder / name)
        found[f"logits {step}"] = load_and_run(folder / name, args, args.pipeline_model_parallel_size, None, prepare)
    return found


def _steps(folder: Path, name: str, rank: int) -> dict[str, Any]:
    args, content = first_args(folder / name), load_rank_file(folder / name, rank, None)
    model = build_model(config_of(args), args.params_dtype, None, None, args.padded_vocab_size)
    model.load_state_dict(content["model"], strict=True)
    names = list(model.state_dict())
    masks = install_masks(model, folder / name)
    assert list(model.state_dict()) == names, "no tensor is added, none is renamed"
    weights = probe(args.vocab_size).to(args.params_dtype)
    found: dict[str, Any] = {"first step": masks.first_step, "alpha": masks.alpha}
    for step in STEPS:
        masks.set_step(step)
        model.zero_grad()
        logits = _logits(model, args.vocab_size)
        (logits * weights).sum().backward()
        found[f"logits {step}"] = logits.detach()
        found[f"gradients {step}"] = {key: value.grad.clone() for key, value in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for iteration in range(1, TRAINED + 1):
        masks.set_step(masks.first_step + iteration)
        optimizer.zero_grad()
        (_logits(model, args.vocab_size) * weights).mean().backward()
        optimizer.step()
    with torch.no_grad():
        found["logits after"] = _logits(model, args.vocab_size)
        masks.remove()
        found["logits without"] = _logits(model, args.vocab_size)
    state = {"args": args, "checkpoint_version": 3.0, "iteration": TRAINED, "model": model.state_dict()}
    write_rank_file(folder / f"{name}-run", state, rank, None, number=TRAINED)
    return found


def main(folder: Path, names: list[str]) -> None:
    """All exports, world by world."""
    import megatron.core.models.gpt.gpt_layer_specs  # noqa: F401  what is imported before the fork is imported once

    worlds: dict[tuple[int, int], list[str]] = {}
    for name in names:
        args = first_args(folder / name)
        worlds.setdefault((args.tensor_model_parallel_size, args.pipeline_model_parallel_size), []).append(name)
    for world, members in worlds.items():
        torch.multiprocessing.start_processes(
            _run_rank, (world, folder, members), nprocs=world[0] * world[1], start_method="fork"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), sys.argv[2:])

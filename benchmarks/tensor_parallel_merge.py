# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Merging the ranks of a tensor-parallel checkpoint, against `cp` of the same bytes and against loading it all.

Four files, each with its rank's slices of a Llama's layers as Megatron lays them out: queries, keys and values
interleaved by head, gate and up stacked (contiguous runs), o_proj and down_proj cut by columns (strided), vocabulary
cut by rows. Bounds as for bin_to_safetensors.py: 1.25 and 1.5 times cp, 4 times faster than loading all.

This file builds the plan itself; with three arguments, SRC OUT digest|no-digest|load-all, it is one of the contestants.
"""

import json
import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from measure import AGAINST_CP, Run, against_cp, arguments, cp, interleave, report, run_processes, workplace

from conversion.architecture import Architecture
from conversion.checkpoint.execute import WriteOptions, write_checkpoint
from conversion.checkpoint.plan import Box, CheckpointPlan, Copy, TensorPlan, View
from conversion.checkpoint.torch_file import read_torch_tensors

if TYPE_CHECKING:
    import torch

RANKS = 4
LOAD_ALL = "load all, save_file"


def write_ranks(folder: Path, config: Mapping[str, object]) -> list[Path]:
    """Write one file of random slices a rank, in Megatron's names and shapes."""
    import numpy as np
    import torch
    from synthetic import random_weight

    a = Architecture.from_config(config)
    query, key_value = a.num_attention_heads * a.head_dim // RANKS, a.num_key_value_heads * a.head_dim // RANKS
    shapes = {"embedding": (a.vocab_size // RANKS, a.hidden_size)}
    for n in range(a.num_hidden_layers):
        shapes |= {
            f"{n}.input_norm": (a.hidden_size,),
            f"{n}.qkv": (query + 2 * key_value, a.hidden_size),
            f"{n}.proj": (a.hidden_size, query),
            f"{n}.post_norm": (a.hidden_size,),
            f"{n}.fc1": (2 * a.intermediate_size // RANKS, a.hidden_size),
            f"{n}.fc2": (a.hidden_size, a.intermediate_size // RANKS),
        }
    shapes |= {"norm": (a.hidden_size,), "output": (a.vocab_size // RANKS, a.hidden_size)}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    files = [folder / f"rank_{rank}.pt" for rank in range(RANKS)]
    for rank, file in enumerate(files):
        generator = np.random.SFC64(rank)
        torch.save({name: random_weight(generator, shape) for name, shape in shapes.items()}, file)
    return files


def merged(
    name: str, shape: tuple[int, ...], slices: list[View], axis: int, layout: tuple[int, ...] = ()
) -> TensorPlan:
    """The ranks' slices of a tensor, one after the other along an axis of its layout."""
    pieces = []
    for rank, view in enumerate(slices):
        start = [0] * len(view.shape)
        start[axis] = rank * view.shape[axis]
        pieces.append(Copy(Box(tuple(start), view.shape), view))
    return TensorPlan(name, shape, slices[0].dtype, tuple(pieces), layout)


def merge_plan(folder: Path) -> CheckpointPlan:
    """The whole model from its ranks."""
    config = json.loads((folder / "config.json").read_text())
    a = Architecture.from_config(config)
    ranks = [read_torch_tensors(folder / f"rank_{rank}.pt") for rank in range(RANKS)]
    groups, hidden, ffn = a.num_key_value_heads, a.hidden_size, a.intermediate_size
    per_group = a.num_attention_heads // groups

    def each(name: str) -> list[View]:
        return [tensors[name] for tensors in ranks]

    def rows(name: str, part: str, count: int) -> TensorPlan:
        return merged(name, (count, hidden), each(part), 0)

    def heads(name: str, parts: list[View], begin: int, count: int) -> TensorPlan:
        windows = [view[:, begin : begin + count] for view in parts]
        return merged(name, (groups * count * a.head_dim, hidden), windows, 0, (groups, count, a.head_dim, hidden))

    tensors = [rows("model.embed_tokens.weight", "embedding", a.vocab_size)]
    for n in range(a.num_hidden_layers):
        layer = f"model.layers.{n}"
        qkv = [view.unflatten(0, (groups // RANKS, per_group + 2, a.head_dim)) for view in each(f"{n}.qkv")]
        gate_up = [view.unflatten(0, (2, ffn // RANKS)) for view in each(f"{n}.fc1")]
        tensors += [
            TensorPlan.copy_of(f"{layer}.input_layernorm.weight", ranks[0][f"{n}.input_norm"]),
            heads(f"{layer}.self_attn.q_proj.weight", qkv, 0, per_group),
            heads(f"{layer}.self_attn.k_proj.weight", qkv, per_group, 1),
            heads(f"{layer}.self_attn.v_proj.weight", qkv, per_group + 1, 1),
            merged(f"{layer}.self_attn.o_proj.weight", (hidden, hidden), each(f"{n}.proj"), 1),
            TensorPlan.copy_of(f"{layer}.post_attention_layernorm.weight", ranks[0][f"{n}.post_norm"]),
            merged(f"{layer}.mlp.gate_proj.weight", (ffn, hidden), [v[:1] for v in gate_up], 1, (1, ffn, hidden)),
            merged(f"{layer}.mlp.up_proj.weight", (ffn, hidden), [v[1:] for v in gate_up], 1, (1, ffn, hidden)),
            merged(f"{layer}.mlp.down_proj.weight", (hidden, ffn), each(f"{n}.fc2"), 1),
        ]
    tensors += [
        TensorPlan.copy_of("model.norm.weight", ranks[0]["norm"]),
        rows("lm_head.weight", "output", a.vocab_size),
    ]
    return CheckpointPlan(tuple(tensors), config)


def load_all(folder: Path, out: Path) -> None:
    """The usual way: every rank in memory, slices and cat, one safetensors file."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((folder / "config.json").read_text())
    a = Architecture.from_config(config)
    groups, per_group = a.num_key_value_heads, a.num_attention_heads // a.num_key_value_heads
    ranks = [torch.load(folder / f"rank_{rank}.pt", weights_only=True) for rank in range(RANKS)]

    def cat(name: str, axis: int) -> "torch.Tensor":
        return torch.cat([tensors.pop(name) for tensors in ranks], axis)

    tensors = {"model.embed_tokens.weight": cat("embedding", 0), "lm_head.weight": cat("output", 0)}
    tensors["model.norm.weight"] = ranks[0]["norm"]
    for n in range(a.num_hidden_layers):
        layer = f"model.layers.{n}"
        qkv = cat(f"{n}.qkv", 0).unflatten(0, (groups, per_group + 2, a.head_dim))
        q, k, v = (part.reshape(-1, a.hidden_size) for part in qkv.split([per_group, 1, 1], dim=1))
        halves = [part.chunk(2) for part in (tensors.pop(f"{n}.fc1") for tensors in ranks)]
        tensors |= {
            f"{layer}.input_layernorm.weight": ranks[0][f"{n}.input_norm"],
            f"{layer}.self_attn.q_proj.weight": q,
            f"{layer}.self_attn.k_proj.weight": k,
            f"{layer}.self_attn.v_proj.weight": v,
            f"{layer}.self_attn.o_proj.weight": cat(f"{n}.proj", 1),
            f"{layer}.post_attention_layernorm.weight": ranks[0][f"{n}.post_norm"],
            f"{layer}.mlp.gate_proj.weight": torch.cat([gate for gate, _ in halves]),
            f"{layer}.mlp.up_proj.weight": torch.cat([up for _, up in halves]),
            f"{layer}.mlp.down_proj.weight": cat(f"{n}.fc2", 1),
        }
    out.mkdir()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    descriptor = os.open(out / "model.safetensors", os.O_RDWR)
    os.fsync(descriptor)
    os.close(descriptor)


def contest(source: Path, out: Path, way: str) -> None:
    if way == "load-all":
        load_all(source, out)
    else:
        write_checkpoint(merge_plan(source), out, WriteOptions(digest=way == "digest"))


def as_process(source: Path, out: Path, *, way: str) -> Run:
    return run_processes([sys.executable, __file__, str(source), str(out), way])


def require_equal(source: Path, place: Path) -> None:
    """Both ways give the same tensors."""
    from safetensors import safe_open

    contest(source, place / "merged", "digest")
    as_process(source, place / "loaded", way="load-all")
    files = [safe_open(place / name / "model.safetensors", "pt") for name in ("merged", "loaded")]
    if {*files[0].keys()} != {*files[1].keys()}:
        raise RuntimeError("the two ways give different tensors")
    for name in files[0].keys():  # noqa: SIM118
        if not files[0].get_tensor(name).equal(files[1].get_tensor(name)):
            raise RuntimeError(f"the two ways give a different {name}")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--cache", choices=["warm", "cold"], nargs="+", default=["warm", "cold"])
    options = parser.parse_args()
    from synthetic import tele_flm_config

    with workplace(options.folder) as place:
        (place / "small").mkdir()
        write_ranks(place / "small/source", tele_flm_config(0.1) | {"num_key_value_heads": 8})
        require_equal(place / "small/source", place / "small")
        files = write_ranks(place / "source", tele_flm_config(options.size))
        size = sum(file.stat().st_size for file in files)
        for cache in options.cache:
            contestants = {
                "cp": partial(cp, files),
                "merge, no digests": partial(as_process, place / "source", way="no-digest"),
                "merge": partial(as_process, place / "source", way="digest"),
                LOAD_ALL: partial(as_process, place / "source", way="load-all"),
            }
            runs = interleave(contestants, options.pairs, place, files, cache)
            report(
                f"A tensor-parallel checkpoint of {RANKS} ranks to one safetensors file, {cache} cache",
                options.folder,
                f"{RANKS} files, {size:,} bytes, {cache}; {options.pairs} rounds.",
                AGAINST_CP,
                against_cp(runs, LOAD_ALL),
            )


if __name__ == "__main__":
    if len(sys.argv) == 4 and not sys.argv[1].startswith("-"):
        contest(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    else:
        main()

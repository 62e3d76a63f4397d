# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""A Megatron checkpoint of several tensor-parallel ranks to the Hub, against `cp` of the weights and loading it all.

A file a rank in Megatron's names: queries, keys and values interleaved by group, gate and up stacked (contiguous runs),
linear_proj and linear_fc2 cut by columns (strided), the vocabulary cut by rows and padded. With --optimizer each file
also holds AdamW's float32 states, six times the weights, which are none of a converter's business: `cp` then copies
files without them.

Bounds: 1.25 times cp without digests, 1.5 with (1.3 with an optimizer), 4 times faster than loading all, less than
300 MiB, and with an optimizer no more than 1.1 times the weights read.

With SRC OUT load-all, or SRC OUT count-bytes, this file is a contestant itself.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from measure import AGAINST_CP, TELEFLM, Run, against_cp, arguments, cp, interleave, report, run_processes, workplace
from results import Goal

from conversion.architecture import Architecture

GOALS = (
    Goal(
        "convert from Megatron stays near cp, without them",
        "x the time of cp",
        1.25,
        rows=r"--allow-nonfinite",
    ),
    Goal(
        "convert from Megatron stays near cp, with digests and checks",
        "x the time of cp",
        1.5,
        rows=r"^convert \|",
    ),
    Goal(
        "convert from Megatron is 4 times faster than loading all",
        "times faster than loading all",
        4,
        at_least=True,
        rows=r"^convert",
    ),
    Goal("convert from Megatron takes less than 300 MiB", "peak RSS, MiB", 300, rows=r"^convert"),
)
# Beside an optimizer, and without the one whose memory would have to hold all files, which may be left out.
OPTIMIZER_GOALS = tuple(
    replace(goal, bound=1.3) if goal.bound == 1.5 else goal for goal in GOALS if "loading all" not in goal.claim
)

RANKS = 4
PADDING = 128  # Megatron's make_vocab_size_divisible_by: the vocabulary of a run is a multiple of this a rank
LOAD_ALL = "load all, save_file"


def padded_vocabulary(a: Architecture) -> int:
    """Rows of the embedding in the run."""
    return -(-a.vocab_size // (PADDING * RANKS)) * PADDING * RANKS


def rank_shapes(a: Architecture) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight on one rank."""
    rows = (a.num_attention_heads + 2 * a.num_key_value_heads) * a.head_dim // RANKS
    ffn, vocab = a.intermediate_size // RANKS, padded_vocabulary(a) // RANKS
    shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (vocab, a.hidden_size)}
    for n in range(a.num_hidden_layers):
        layer = f"decoder.layers.{n}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (a.hidden_size,),
            f"{layer}.self_attention.linear_qkv.weight": (rows, a.hidden_size),
            f"{layer}.self_attention.linear_proj.weight": (a.hidden_size, a.num_attention_heads * a.head_dim // RANKS),
            f"{layer}.pre_mlp_layernorm.weight": (a.hidden_size,),
            f"{layer}.mlp.linear_fc1.weight": (2 * ffn, a.hidden_size),
            f"{layer}.mlp.linear_fc2.weight": (a.hidden_size, ffn),
        }
    return shapes | {"decoder.final_layernorm.weight": (a.hidden_size,), "output_layer.weight": (vocab, a.hidden_size)}


def megatron_args(a: Architecture) -> argparse.Namespace:
    """The arguments of the run that decide its model."""
    return argparse.Namespace(
        num_layers=a.num_hidden_layers,
        hidden_size=a.hidden_size,
        ffn_hidden_size=a.intermediate_size,
        num_attention_heads=a.num_attention_heads,
        group_query_attention=True,
        num_query_groups=a.num_key_value_heads,
        kv_channels=a.head_dim,
        norm_epsilon=a.rms_norm_eps,
        rotary_base=10000,
        untie_embeddings_and_output_weights=True,
        tensor_model_parallel_size=RANKS,
        pipeline_model_parallel_size=1,
    )


def write_run(folder: Path, config: Mapping[str, Any], *, optimizer: bool) -> list[Path]:
    """Write a run's checkpoint of random weights, norms alike on all ranks; returns the files."""
    import numpy as np
    import torch
    from synthetic import random_weight

    a = Architecture.from_config(config)
    files = []
    for rank in range(RANKS):
        own, shared = np.random.SFC64(rank), np.random.SFC64(RANKS)
        model = {
            name: random_weight(shared if "norm" in name else own, shape) for name, shape in rank_shapes(a).items()
        }
        content = {"args": megatron_args(a), "checkpoint_version": 3.0, "iteration": 100, "model": model}
        if optimizer:
            states = [weight.float() for weight in model.values()]
            content["optimizer"] = {
                "fp32_from_fp16_params": [states],
                "optimizer": {"state": {n: {"exp_avg": s + 1, "exp_avg_sq": s + 2} for n, s in enumerate(states)}},
            }
        files.append(folder / "iter_0000100" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt")
        files[-1].parent.mkdir(parents=True)
        torch.save(content, files[-1])
    (folder / "latest_checkpointed_iteration.txt").write_text("100")
    return files


def load_all(source: Path, out: Path) -> None:
    """The usual way: every rank in memory, slices and cat, one safetensors file."""
    import torch
    from safetensors.torch import save_file

    contents = [torch.load(file, weights_only=False) for file in sorted(source.glob("iter_*/*/*.pt"))]
    ranks, args = [content["model"] for content in contents], contents[0]["args"]
    groups, per_group = args.num_query_groups, args.num_attention_heads // args.num_query_groups
    vocab = json.loads((source / "config.json").read_text())["vocab_size"]

    def cat(name: str, axis: int) -> torch.Tensor:
        return torch.cat([model.pop(name) for model in ranks], axis)

    tensors = {
        "model.embed_tokens.weight": cat("embedding.word_embeddings.weight", 0)[:vocab].clone(),
        "lm_head.weight": cat("output_layer.weight", 0)[:vocab].clone(),
        "model.norm.weight": ranks[0]["decoder.final_layernorm.weight"],
    }
    for n in range(args.num_layers):
        native, layer = f"decoder.layers.{n}", f"model.layers.{n}"
        qkv = cat(f"{native}.self_attention.linear_qkv.weight", 0).unflatten(0, (groups, per_group + 2, -1))
        q, k, v = (part.reshape(-1, args.hidden_size) for part in qkv.split([per_group, 1, 1], dim=1))
        halves = [model.pop(f"{native}.mlp.linear_fc1.weight").chunk(2) for model in ranks]
        tensors |= {
            f"{layer}.input_layernorm.weight": ranks[0][f"{native}.input_layernorm.weight"],
            f"{layer}.self_attn.q_proj.weight": q,
            f"{layer}.self_attn.k_proj.weight": k,
            f"{layer}.self_attn.v_proj.weight": v,
            f"{layer}.self_attn.o_proj.weight": cat(f"{native}.self_attention.linear_proj.weight", 1),
            f"{layer}.post_attention_layernorm.weight": ranks[0][f"{native}.pre_mlp_layernorm.weight"],
            f"{layer}.mlp.gate_proj.weight": torch.cat([gate for gate, _ in halves]),
            f"{layer}.mlp.up_proj.weight": torch.cat([up for _, up in halves]),
            f"{layer}.mlp.down_proj.weight": cat(f"{native}.mlp.linear_fc2.weight", 1),
        }
    out.mkdir()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    descriptor = os.open(out / "model.safetensors", os.O_RDWR)
    os.fsync(descriptor)
    os.close(descriptor)


def count_bytes(source: Path, out: Path) -> None:
    """Convert, and print what the process read, beside what importing the package reads."""
    from conversion import convert_checkpoint

    before = _bytes_read()
    convert_checkpoint(source, out, config=source / "config.json")
    print(_bytes_read() - before)


def _bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


def convert(source: Path, out: Path, *, flags: tuple[str, ...] = ()) -> Run:
    """The command; one file, as the others write."""
    config = ["--config", str(source / "config.json"), "--max-shard-size", "1TB"]
    return run_processes([*TELEFLM, "convert", str(source), str(out), *config, *flags])


def as_process(source: Path, out: Path, *, way: str) -> Run:
    return run_processes([sys.executable, __file__, str(source), str(out), way])


def require_equal(source: Path, place: Path) -> None:
    """Both ways give the same tensors."""
    from safetensors import safe_open

    convert(source, place / "converted")
    as_process(source, place / "loaded", way="load-all")
    ours, theirs = (safe_open(place / name / "model.safetensors", "pt") for name in ("converted", "loaded"))
    names = {*theirs.keys()}
    if {*ours.keys()} != names or not all(ours.get_tensor(name).equal(theirs.get_tensor(name)) for name in names):
        raise RuntimeError("the two ways give different tensors")


def read_ratio(source: Path, place: Path, weights: int) -> float:
    """Bytes that a conversion reads, over those of the weights."""
    import subprocess

    command = [sys.executable, __file__, str(source), str(place / "counted"), "count-bytes"]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / weights


def make_run(place: Path, name: str, config: Mapping[str, Any], *, optimizer: bool) -> tuple[Path, list[Path]]:
    """A run's folder with its configuration, and its files."""
    files = write_run(place / name, config, optimizer=optimizer)
    (place / name / "config.json").write_text(json.dumps(config))
    return place / name, files


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--cache", choices=["warm", "cold"], nargs="+", default=["warm", "cold"])
    parser.add_argument("--optimizer", action="store_true", help="with AdamW's states in the files")
    parser.add_argument("--no-load-all", action="store_true", help="without that one, whose memory must hold all files")
    options = parser.parse_args()
    from synthetic import tele_flm_config

    with workplace(options.folder) as place:
        small, _ = make_run(place, "small", tele_flm_config(0.1) | {"num_key_value_heads": 8}, optimizer=False)
        require_equal(small, place)
        source, files = make_run(place, "source", tele_flm_config(options.size), optimizer=options.optimizer)
        plain = (
            make_run(place, "plain", tele_flm_config(options.size), optimizer=False)[1] if options.optimizer else files
        )
        weights, total = (sum(file.stat().st_size for file in group) for group in (plain, files))
        title = f"A Megatron checkpoint of {RANKS} ranks to the Hub, "
        about = f"{RANKS} files, {total:,} bytes, of which {weights:,} are weights"
        if options.optimizer:
            title += "with an optimizer in the files, "
            about += f"; a conversion reads {read_ratio(source, place, weights):.3f} times the weights"
        for cache in options.cache:
            contestants = {
                "cp": partial(cp_ranks, plain),
                "convert --no-digest --allow-nonfinite": partial(
                    convert, source, flags=("--no-digest", "--allow-nonfinite")
                ),
                "convert --no-digest": partial(convert, source, flags=("--no-digest",)),
                "convert": partial(convert, source),
            }
            if not options.no_load_all:
                contestants[LOAD_ALL] = partial(as_process, source, way="load-all")
            runs = interleave(contestants, options.pairs, place, [*plain, *files], cache)
            report(
                f"{title}{cache} cache",
                options.folder,
                f"{about}; {cache}; {options.pairs} rounds.",
                AGAINST_CP,
                against_cp(runs, LOAD_ALL),
                OPTIMIZER_GOALS if options.optimizer else GOALS,
            )


def cp_ranks(files: list[Path], folder: Path) -> Run:
    """`cp` of files that have one name."""
    return cp(files, folder, names=[file.parent.name for file in files])


if __name__ == "__main__":
    if len(sys.argv) == 4 and not sys.argv[1].startswith("-"):
        {"load-all": load_all, "count-bytes": count_bytes}[sys.argv[3]](Path(sys.argv[1]), Path(sys.argv[2]))
    else:
        main()

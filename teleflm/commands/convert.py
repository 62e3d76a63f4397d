# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The command `teleflm convert`."""

from pathlib import Path
from typing import Annotated

import typer

from conversion.checkpoint.limits import DEFAULT_MEMORY
from teleflm.terminal import (
    DEFAULT_WORKERS,
    AllowNonfinite,
    Debug,
    DryRun,
    Dtype,
    Json,
    MaxShardSize,
    Memory,
    NoDigest,
    Overwrite,
    Rank,
    VerifySource,
    Workers,
    WorldSize,
)

Source = Annotated[Path, typer.Argument(metavar="SRC", help="Folder of a Hugging Face checkpoint or of a run.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")]
Format = Annotated[str, typer.Option(help="Of SRC: auto, hf, megatron, torch_dist, fsdp_dtensor, dcp or deepspeed.")]
Iteration = Annotated[int | None, typer.Option(help="Of a run; its latest unless given.", min=0)]
Config = Annotated[str | None, typer.Option(help="Preset or config.json with what the run itself does not say.")]
Tokenizer = Annotated[Path | None, typer.Option(help="Folder of the tokenizer that goes with a run.")]
VocabSize = Annotated[int | None, typer.Option(help="Of a run: rows of the vocabulary without padding.", min=1)]
Multipliers = Annotated[
    str | None, typer.Option(help="Of a run that does not say them: none, or input_mult=16,output_mult=0.5,...")
]
Mapping = Annotated[Path | None, typer.Option(help="YAML file with the tensor names of a fork of Megatron.")]
Fp32Master = Annotated[bool, typer.Option("--fp32-master", help="Of DeepSpeed: the optimizer's float32 weights.")]
AllowUnequalReplicas = Annotated[
    bool, typer.Option("--allow-unequal-replicas", help="Take rank 0's where a run's copies of one tensor differ.")
]


def convert(
    source: Source,
    out: Out,
    format: Format = "auto",
    iteration: Iteration = None,
    config: Config = None,
    tokenizer: Tokenizer = None,
    vocab_size: VocabSize = None,
    multipliers: Multipliers = None,
    mapping: Mapping = None,
    fp32_master: Fp32Master = False,
    allow_unequal_replicas: AllowUnequalReplicas = False,
    dtype: Dtype = None,
    allow_nonfinite: AllowNonfinite = False,
    workers: Workers = DEFAULT_WORKERS,
    memory: Memory = DEFAULT_MEMORY,
    max_shard_size: MaxShardSize = "5GB",
    rank: Rank = None,
    world_size: WorldSize = None,
    overwrite: Overwrite = False,
    no_digest: NoDigest = False,
    verify_source: VerifySource = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Make a Hub folder of safetensors from a training checkpoint, or from .bin files."""
    from conversion.convert import convert_checkpoint

    from ..plan_report import run_and_report

    run_and_report(
        "converting",
        out,
        lambda options: convert_checkpoint(
            source,
            out,
            format=format,
            iteration=iteration,
            config=config,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            multipliers=multipliers,
            mapping=mapping,
            fp32_master=fp32_master,
            allow_unequal_replicas=allow_unequal_replicas,
            allow_nonfinite=allow_nonfinite,
            dtype=dtype,
            options=options,
            dry_run=dry_run,
        ),
        workers=workers,
        memory=memory,
        max_shard_size=max_shard_size,
        rank=rank,
        world_size=world_size,
        dry_run=dry_run,
        overwrite=overwrite,
        no_digest=no_digest,
        verify_source=verify_source,
        as_json=as_json,
        debug=debug,
        allow_nonfinite=allow_nonfinite,
    )

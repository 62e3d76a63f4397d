# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The command `teleflm export`."""

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

Source = Annotated[
    str, typer.Argument(metavar="SRC", help="Folder of a Tele-FLM or a Llama in Hub format; or OWNER/NAME, a URL.")
]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")]
To = Annotated[str, typer.Option(help="granite, llama, gguf, megatron, torch_dist or dcp.")]
TensorParallel = Annotated[int, typer.Option("--tp", help="For megatron: tensor-parallel ranks.")]
PipelineParallel = Annotated[int, typer.Option("--pp", help="For megatron: pipeline stages.")]
VirtualPipeline = Annotated[int, typer.Option("--vpp", help="For megatron: chunks of layers in a stage.")]
PipelineLayout = Annotated[
    str | None,
    typer.Option(
        help="For megatron: stages of unlike size: first=N,last=N layers, or embedding,loss as a layer each, or the "
        "string of Megatron's --pipeline-model-parallel-layout.",
        show_default="as many layers in each",
    ),
]
Multipliers = Annotated[
    str, typer.Option(help="For Megatron's: fold them into the weights, or keep them, for a trainer that knows them.")
]
Spec = Annotated[str, typer.Option(help="For megatron: layers of te (Transformer Engine) or local.")]
Link = Annotated[bool, typer.Option("--link", help="For granite: link to the weights of SRC rather than copy them.")]
Optimizer = Annotated[
    bool, typer.Option("--optimizer", help="For dcp and torch_dist: Adam's moments too, of the optimizer.pt in SRC.")
]
OutType = Annotated[
    str | None,
    typer.Option(
        help="For gguf: bf16, f16, f32 or q8_0, of the matrices; that of SRC unless given.", show_default=False
    ),
]
Prompts = Annotated[
    str, typer.Option(help="For gguf: have llama.cpp tokenize a chat as the model's tokenizer does, or plain text.")
]
Name = Annotated[
    str | None,
    typer.Option(help="For gguf: of the model and its files; that of SRC's folder unless given.", show_default=False),
]


def export(
    source: Source,
    out: Out,
    to: To,
    tp: TensorParallel = 1,
    pp: PipelineParallel = 1,
    vpp: VirtualPipeline = 1,
    pipeline_layout: PipelineLayout = None,
    multipliers: Multipliers = "fold",
    spec: Spec = "te",
    link: Link = False,
    optimizer: Optimizer = False,
    dtype: Dtype = None,
    outtype: OutType = None,
    prompts: Prompts = "chat",
    name: Name = None,
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
    """Make a folder that another runtime or trainer loads."""
    from conversion.exports.export import export_checkpoint

    from ..plan_report import run_and_report

    run_and_report(
        "exporting",
        out,
        lambda options: export_checkpoint(
            source,
            out,
            to=to,
            tp=tp,
            pp=pp,
            vpp=vpp,
            pipeline_layout=pipeline_layout,
            multipliers=multipliers,
            spec=spec,
            link=link,
            optimizer=optimizer,
            dtype=dtype,
            outtype=outtype,
            prompts=prompts,
            name=name,
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

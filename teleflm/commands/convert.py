# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The commands `teleflm inspect` and `teleflm convert`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from conversion.checkpoint.limits import DEFAULT_MEMORY
from conversion.checkpoint.sizes import format_bytes
from teleflm.terminal import (
    DEFAULT_WORKERS,
    EXIT_NO,
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
    byte_progress,
    exit_codes,
    make_console,
    print_json,
)

if TYPE_CHECKING:
    from conversion.inspect import Inspection

Path_ = Annotated[Path, typer.Argument(metavar="PATH", help="Folder of a checkpoint, or one weight file.")]
Check = Annotated[
    bool,
    typer.Option("--check", help="Read all of it and compare it with its record."),
]
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


def inspect(
    path: Path_,
    check: Check = False,
    workers: Workers = DEFAULT_WORKERS,
    memory: Memory = DEFAULT_MEMORY,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what a checkpoint is: architecture, parameters, files, record, problems."""
    from conversion.inspect import inspect_checkpoint

    with exit_codes(debug=debug):
        with byte_progress("checking") as progress:
            inspection = inspect_checkpoint(path, check=check, workers=workers, memory=memory, progress=progress)
        if as_json:
            print_json(_describe(inspection))
        else:
            _print_inspection(inspection)
    if inspection.damages:
        raise typer.Exit(EXIT_NO)


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


def _describe(inspection: "Inspection") -> dict[str, Any]:
    """The inspection as one JSON object, with the numbers that follow from the architecture."""
    architecture = inspection.architecture
    derived = {"logit_scale": architecture.logit_scale} if architecture else {}
    return {**asdict(inspection), **derived}


def _print_inspection(inspection: "Inspection") -> None:
    from rich.table import Table
    from rich.text import Text

    from conversion.checkpoint.errors import printable

    console = make_console()
    table = Table(show_header=False, title=inspection.folder, title_justify="left")
    table.add_row("model type", inspection.model_type or "unknown: no configuration")
    if inspection.parallel is not None:
        step = f", iteration {inspection.iteration}" if inspection.iteration is not None else ""
        table.add_row("training run", f"{inspection.format}, {inspection.parallel}{step}")
    table.add_row("parameters", f"{inspection.parameters:,}")
    table.add_row("dtypes", ", ".join(f"{name} ({count} tensors)" for name, count in inspection.dtypes.items()))
    sizes = inspection.files.values()
    table.add_row(
        "weights", f"{format_bytes(sum(sizes))} in {len(sizes)} {inspection.format} file{'s' * (len(sizes) != 1)}"
    )
    if inspection.architecture:
        a = inspection.architecture
        table.add_row("layers", f"{a.num_hidden_layers}")
        table.add_row("hidden size", f"{a.hidden_size:,}, feed-forward {a.intermediate_size:,}")
        table.add_row("heads", f"{a.num_attention_heads} of {a.head_dim}, {a.num_key_value_heads} key/value")
        table.add_row("multipliers", f"embeddings x {a.embedding_scale:g}, logits x {a.logit_scale:g}")
        pieces = f", {inspection.pieces:,} pieces" if inspection.pieces else ", no tokenizer"
        padding = f", {inspection.padding_rows:,} rows of padding" if inspection.padding_rows else ""
        padding = ", padding included" if inspection.parallel is not None else padding
        table.add_row("vocabulary", f"{a.vocab_size:,} rows{pieces}{padding}")
    console.print(table, soft_wrap=False)
    for step in inspection.lineage:
        console.print(f"- {printable(step)}")
    for problem in inspection.problems:
        console.print(Text.assemble(("problem", "bold red"), f" {problem}"))
    for damage in inspection.damages or []:
        console.print(Text.assemble(("damaged", "bold red"), printable(f" {damage}.")))
    if inspection.damages == []:
        others = "the others were not looked at" if inspection.alone else "no other file would be loaded"
        files = f"{inspection.checked_files} file{'s' * (inspection.checked_files != 1)}, and {others}."
        if not inspection.checked_tensors:
            console.print("The record has no digests of tensors: of these, types, places and samples were compared.")
            console.print(f"They are what it says, and so is all else in its {files}")
        else:
            console.print("Every tensor has its digest.")
            if inspection.checked_files:
                console.print(f"So has all else in its {files}")
